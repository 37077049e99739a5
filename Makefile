# Two commands for a fresh clone: `make demo` and `make test`. Python >= 3.11 is all they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-kernels check format benchmark corpora build clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "statetrack needs Python 3.11 or newer; say which with PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(VENV)/installed-benchmark: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[benchmark]'
	@touch $@

demo: $(VENV)/installed ## Train linear RNNs that track state, and those that can't; writes runs/demo/report.html
	$(BIN)/statetrack demo

check: $(VENV)/installed-dev ## ruff and pyright
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

test: check ## ruff, pyright and the tests, in minutes
	$(BIN)/pytest -n 2
	$(MAKE) test-kernels

# In a folder of its own: with it in the environment and no GPU, transformers' layers take kernels that can't run.
$(VENV)/triton/installed: constraints.txt
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/triton --constraint constraints.txt "triton; platform_system == 'Linux' and platform_machine == 'x86_64'" || echo "triton could not be installed: its kernels are not tested" >&2
	@mkdir -p $(VENV)/triton && touch $@

test-kernels: $(VENV)/installed-dev $(VENV)/triton/installed ## The Triton kernels on a CPU, in triton's interpreter; skipped where there is no triton
	PYTHONPATH=$(VENV)/triton TRITON_INTERPRET=1 $(BIN)/pytest -n 2 $(if $(ALL),-m 'not gpu') tests/ops/test_triton_*.py

test-all: check ## Also the long tests
	$(BIN)/pytest -n 2 -m 'not gpu'
	$(MAKE) test-kernels ALL=1

format: $(VENV)/installed-dev ## Format the code and mend what ruff can mend
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

benchmark: $(VENV)/installed-benchmark ## Measure against others' implementations; writes results/
	$(BIN)/python -m benchmarks.cpu_ops
	$(BIN)/python -m benchmarks.training_step
	$(BIN)/python -m benchmarks.delta_rule
	$(BIN)/python -m benchmarks.selective_scan
	$(BIN)/python -m benchmarks.sampling
	$(BIN)/python -m benchmarks.recipes
	$(BIN)/python -m benchmarks.recipes --experiment parity --models all --seeds 5 --first 2000 --out results/cpu/parity.json

corpora: $(VENV)/installed-dev ## Build corpora of code, formal mathematics and technical English; writes runs/corpora
	$(BIN)/python -m benchmarks.corpora

build: $(VENV)/installed-dev ## Build the wheel
	$(BIN)/python -m build

clean: ## Remove what was built or installed
	rm -rf $(VENV) build dist src/*.egg-info
