"""The assembler of kernels on Hopper."""

import json
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from triton_cases import check_prepared_once, needs_triton, run_compiler

from statetrack.ops import triton_assembler
from statetrack.ops.triton_assembler import use_newer_assembler

HOPPER, AMPERE = 90, 80


@needs_triton
@pytest.mark.parametrize("background", [[], ["background"]], ids=["at once", "background"])
def test_a_kernel_is_assembled_by_the_newer_one_and_another_is_not(background, tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_PTXAS_PATH", raising=False)
    printed = run_compiler("tests/ops/kernel_assembler.py", *background, TRITON_CACHE_DIR=str(tmp_path))
    # PTX 8.8 is that of CUDA 12.9, which is also in the key that compiled kernels are kept by.
    assert json.loads(printed) == {
        "ours": ["8.8", "12.9"], "another's": ["8.7", "12.8"], "left as it was": "12.8",
    }  # fmt: skip


@pytest.fixture
def on(monkeypatch):
    """on(arch, backend="cuda"): the version that a kernel is compiled with on such a card, without compiling it."""
    triton = pytest.importorskip("triton", reason="needs triton")
    compiler = pytest.importorskip("triton.backends.nvidia.compiler")
    monkeypatch.delenv("TRITON_PTXAS_PATH", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    triton_assembler._warn.cache_clear()

    def version(arch, backend="cuda", current=None):
        target = SimpleNamespace(arch=arch, backend=backend)
        active = SimpleNamespace(get_current_target=lambda: SimpleNamespace(arch=current or arch, backend=backend))
        monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=active))
        kernel = SimpleNamespace(compile=lambda target: compiler.get_ptxas(arch).version)
        kernel._do_compile = lambda: kernel.compile(target=target)
        use_newer_assembler(kernel)
        return kernel._do_compile()

    return version


@pytest.mark.parametrize(
    ("arch", "backend", "expected"), [(HOPPER, "cuda", "12.9"), (AMPERE, "cuda", "12.8"), (HOPPER, "hip", "12.8")]
)
def test_it_is_the_newer_one_on_hopper_alone(arch, backend, expected, on):
    assert on(arch, backend) == expected


def test_what_counts_is_the_gpu_that_a_kernel_is_for(on):
    """Threads in the background have the first GPU as the current one."""
    assert on(HOPPER, current=AMPERE) == "12.9"
    assert on(AMPERE, current=HOPPER) == "12.8"


def test_what_the_user_has_chosen_stays(on, monkeypatch):
    nvidia = pytest.importorskip("triton.knobs").nvidia
    older = nvidia.ptxas.path
    with monkeypatch.context() as patch:
        patch.setenv("TRITON_PTXAS_PATH", older)
        assert on(HOPPER) == "12.8"
    assert on(HOPPER) == "12.9"
    with nvidia.scope():
        nvidia.ptxas = older
        assert on(HOPPER) == "12.8"


def test_what_torch_has_chosen_does_not(on, monkeypatch, tmp_path):
    """As torch.compile does with a wheel that has an assembler in it."""
    older = Path(pytest.importorskip("triton.knobs").nvidia.ptxas.path)
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    (tmp_path / "torch" / "bin").mkdir(parents=True)
    (tmp_path / "torch" / "bin" / "ptxas").symlink_to(older)
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(tmp_path / "torch" / "bin" / "ptxas"))
    assert on(HOPPER) == "12.9"


@pytest.mark.parametrize("reason", ["it is missing", "the driver may be older"])
def test_without_one_that_serves_there_is_a_warning_and_tritons_choice(reason, on, monkeypatch):
    knobs = pytest.importorskip("triton.knobs")

    class Tools:
        ptxas = knobs.nvidia.ptxas

        @property
        def ptxas_blackwell(self):
            if reason == "it is missing":
                raise RuntimeError("Cannot find ptxas-blackwell")
            return SimpleNamespace(path="ptxas", version="13.1")

    monkeypatch.setattr(knobs, "nvidia", Tools())
    with pytest.warns(UserWarning, match=r"ptxas 12\.8, .* makes gradients of narrow heads wrong; let TRITON_PTXAS"):
        assert on(HOPPER) == "12.8"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert on(HOPPER) == "12.8"


def test_other_threads_have_tritons_choice_meanwhile(on):
    compiler = pytest.importorskip("triton.backends.nvidia.compiler")
    on(HOPPER)
    found = []

    def compile_kernel():
        other = threading.Thread(target=lambda: found.append(compiler.get_ptxas(HOPPER).version))
        other.start()
        other.join()
        return compiler.get_ptxas(HOPPER).version

    assert triton_assembler._assembled(compile_kernel)() == "12.9"
    assert found == ["12.8"]


def test_a_failed_compilation_leaves_tritons_choice(on):
    compiler = pytest.importorskip("triton.backends.nvidia.compiler")
    on(HOPPER)

    def fail():
        raise RuntimeError("out of registers")

    with pytest.raises(RuntimeError, match="out of registers"):
        triton_assembler._assembled(fail)()
    assert compiler.get_ptxas(HOPPER).version == "12.8"


def test_a_kernel_is_prepared_once_and_other_things_not_at_all():
    check_prepared_once(use_newer_assembler)
