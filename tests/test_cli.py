"""The commands as a person uses them: what they do, and what they say about bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from statetrack.cli import main

SMALL = "--d-model 8 --num-layers 1 --batch-size 4 --steps 6 --max-length 8 --num-heads 2 --log-every 2"


def run(text):
    try:
        return main(text.split())
    except SystemExit as end:  # tyro's own way to end: help with 0, errors with 2
        return end.code


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    place = tmp_path_factory.mktemp("trained") / "run"
    assert run(f"train parity --mixer deltanet --eigenvalue-range=-1,1 --out {place} {SMALL}") == 0
    return place


@pytest.fixture
def parity(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_train_evaluate_report(parity, tmp_path, capsys):
    config = json.loads((parity / "config.json").read_text())
    assert config["model"]["mixer"]["eigenvalue_range"] == [-1, 1]
    assert config["training"]["steps"] == 6
    result = tmp_path / "result.json"
    assert run(f"evaluate {parity} --lengths 5,40 --sequences 16 --json {result}") == 0
    data = json.loads(result.read_text())
    assert set(data["accuracy"]) == {"5", "40"}
    assert data["sequences"] == {"5": 16, "40": 16}
    assert all(0 <= value <= 1 for value in data["accuracy"].values())
    assert run(f"report {parity} --out {tmp_path}/page.html") == 0
    page = (tmp_path / "page.html").read_text()
    assert "parity" in page
    assert "DeltaNet" in page
    assert "parity" in capsys.readouterr().out


def test_a_model_can_be_judged_on_another_task_with_the_same_tokens(parity):
    assert run(f"evaluate {parity} --task modular_addition:2 --lengths 5 --sequences 4") == 0
    assert run(f"evaluate {parity} --task group:S3 --lengths 5 --sequences 4") == 2


@pytest.mark.parametrize("words", ["--eigenvalue-range=0,1", "--eigenvalue-range 0,1", "--eigenvalue-range -1,1"])
def test_a_range_may_follow_an_equals_sign_or_a_space(words, tmp_path):
    assert run(f"train parity --mixer mamba {words} --out {tmp_path}/run {SMALL.replace('--num-heads 2', '')}") == 0


def test_the_same_command_again_goes_on_and_another_one_is_refused(parity, capsys):
    before = (parity / "training_state.safetensors").read_bytes()
    assert run(f"train parity --mixer deltanet --eigenvalue-range=-1,1 --out {parity} {SMALL}") == 0
    assert run(f"train --resume {parity}") == 0
    assert (parity / "training_state.safetensors").read_bytes() == before
    assert run(f"train parity --mixer deltanet --eigenvalue-range=0,1 --out {parity} {SMALL}") == 2
    assert "eigenvalue_range is -1,1 there, not 0,1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", ["", "demo", "train", "train --mixer mamba", "evaluate", "report", "tasks", "mixers"]
)
def test_help_is_a_page_that_a_person_can_use(command, capsys):
    assert run(f"{command} --help") == 0
    page = capsys.readouterr().out
    assert "usage: statetrack" in page
    assert len(page.splitlines()) > 5


def test_help_of_train_shows_the_options_of_the_mixer_with_their_documentation(capsys):
    run("train --mixer gated_deltanet --help")
    page = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--decay-range LO,HI" in page
    assert "generalized Householder factors for each token" in page
    run("train --mixer mamba --help")
    page = capsys.readouterr().out
    assert "--state-size" in page
    assert "--num-householder" not in page


def test_tasks_and_mixers_are_listed(capsys):
    assert run("tasks") == run("mixers") == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("parity", "group:S3", "modular_addition", "deltaproduct", "gated_deltanet"))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train paritty --out OUT", "paritty"),
        ("train group:X7 --out OUT", "X7"),
        ("train modular_addition:0 --out OUT", "modular_addition"),
        ("train parity --out OUT --mixer deltanut", "did you mean 'deltanet'"),
        ("train parity --out OUT --mixer", "--mixer"),
        ("train parity", "--out"),
        ("train --out OUT", "TASK"),
        ("train parity --out OUT --speed 3", "--speed"),
        ("train parity --out OUT --mixer mamba --num-householder 2", "--num-householder"),
        ("train parity --out OUT --eigenvalue-range=-1,2", "-1 <= lo < hi"),
        ("train parity --out OUT --eigenvalue-range=1,-1", "-1 <= lo < hi"),
        ("train parity --out OUT --eigenvalue-range=1", "two numbers"),
        ("train parity --out OUT --eigenvalue-range=-1,0.5", "ends at 1"),
        ("train parity --out OUT --eigenvalue-range=nan,1", "-1 <= lo < hi"),
        ("train parity --out OUT --mixer retnet --eigenvalue-range=-1,1", "no gate to widen"),
        ("train parity --out OUT --mixer attention --eigenvalue-range -1,1", "no state-transition matrix"),
        ("train parity --out OUT --num-heads 3", "must divide d_model"),
        ("train parity --out OUT --num-heads x", "--num-heads"),
        ("train parity --out OUT --d-model 0", "d_model must be a positive integer"),
        ("train parity --out OUT --min-length 0", "min_length must be at least 1"),
        ("train parity --out OUT --min-length 9 --max-length 4", "must not exceed"),
        ("train parity --out OUT --steps 0", "steps must be at least 1"),
        ("train parity --out OUT --learning-rate nan", "learning_rate must be a positive number"),
        ("train parity --out OUT --device tpu", "unknown device"),
        ("train --resume OUT", "there is no run directory"),
        ("evaluate OUT", "there is no run directory"),
        ("evaluate RUN --lengths 0", "lengths must be at least 1"),
        ("evaluate RUN --lengths a,b", "lengths must be whole numbers"),
        ("evaluate RUN --lengths=", "lengths must be whole numbers"),
        ("evaluate RUN --sequences 0", "sequences must be at least 1"),
        ("evaluate RUN --json OUT/no/where.json --lengths 3 --sequences 1", "no such file or directory"),
        ("report", "RUNS"),
        ("report OUT", "there is no run directory"),
        ("demo --seeds 1,x", "seeds must be whole numbers"),
        ("demo --workers 0", "workers must be at least 1"),
        ("fly", "fly"),
        ("", "demo"),
    ],
)
def test_bad_input_is_refused_with_status_2(command, message, parity, tmp_path, capsys):
    capsys.readouterr()
    command = command.replace("OUT", str(tmp_path / "out")).replace("RUN", str(parity))
    assert run(command) == 2
    error = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message.lower() in error.lower()
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    out = tmp_path / "run"
    command = f"train parity --out {out} --steps 100000 --log-every 10 --d-model 8 --num-heads 2 --num-layers 1"
    process = subprocess.Popen(
        [sys.executable, "-m", "statetrack.cli", *command.split()], stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    while not (out / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"To go on: statetrack train --resume {out}" in error
    assert "Traceback" not in error
    assert (out / "training_state.safetensors").exists()
    assert (out / "model.safetensors").exists()


def test_ctrl_c_while_torch_is_imported_shows_no_traceback(tmp_path):
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    for command, quiet in ((["-m", "statetrack", "tasks"], True), (["-c", "import statetrack"], False)):
        result = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
        assert result.returncode == -signal.SIGINT
        assert ("Traceback" in result.stderr) != quiet


def test_a_reader_that_has_seen_enough_is_no_error():
    command = [sys.executable, "-m", "statetrack", "tasks", "--json", "-"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


def test_importing_statetrack_is_light():
    script = (
        "import torch, time, sys; start = time.perf_counter(); import statetrack; "
        "heavy = ('triton', 'transformers', 'matplotlib', 'tyro'); "
        "print(time.perf_counter() - start, any(module in sys.modules for module in heavy))"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONSTARTUP"}
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    seconds, heavy = output.stdout.split()
    assert heavy == "False"
    assert float(seconds) < 2
