"""`statetrack pretrain` as a person uses it, in one process and under torchrun."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from metrics_of_runs import losses

from statetrack.cli import main

TOML = """
[model]
d_model = 16
num_layers = 1
mixer = {{ name = "deltanet", num_heads = 2 }}
[data]
directory = "{data}"
sequence_length = 24
batch_size = 4
[training]
steps = 8
[schedule]
warmup_steps = 2
[execution]
log_every = 1
checkpoint_every = 3
evaluate_every = 4
evaluation_sequences = 3
"""


def run(*words):
    try:
        return main([str(word) for word in words])
    except SystemExit as end:
        return end.code


def command(processes, *words):
    """The command in processes of its own."""
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*start, "statetrack", "pretrain", *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def finish(process, timeout=120):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out + err


@pytest.fixture
def file(tmp_path, text_data):
    path = tmp_path / "config.toml"
    path.write_text(TOML.format(data=text_data))
    return path


def test_a_model_is_trained_and_writes(file, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert run("pretrain", file, "--out", tmp_path / "run", "--set", "training.steps=5") == 0
    assert run("pretrain", "--out", tmp_path / "run") == 0
    assert run("generate", tmp_path / "run", "--prompt", "one", "--max-new-tokens", 3) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("one")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert model.config.eos_token_id == tokenizer.eos_token_id == 256
    assert sorted(losses(tmp_path / "run")) == [1, 2, 3, 4, 5]


def test_metrics_go_to_tensorboard(file, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = ("--set", "execution.logging.tensorboard=true", "--set", "training.steps=3")
    assert run("pretrain", file, "--out", tmp_path / "run", *options) == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    found = {event.step: event.value for event in events.Scalars("training/loss")}
    expected = {step: loss for step, (loss, _) in losses(tmp_path / "run").items()}
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["training.stepz=3"], "[training] unknown key stepz"),
        (["trainning.steps=3"], "unknown table trainning"),
        (["training.steps=0"], "[training] steps must be at least 1, got 0"),
        (["training.steps=many"], "[training] steps must be an integer, got 'many'"),
        (["training.precision=float16"], "[training] precision must be float32 or bfloat16, got 'float16'"),
        (["optimizer.learning_rate=nan"], "[optimizer] learning_rate must be a positive number, got nan"),
        (["data.directory=5"], "[data] directory must be a string, got 5"),
        (["data.shares=5"], "[data] shares must be a table, in which each value is a number, got 5"),
        (["model.preset=5"], "[model] preset must be a string, got 5"),
        (["model.mlp_ratio=1e300"], "[model] mlp_ratio * d_model must be at most"),
        (["steps=3"], "an override is table.key=value"),
        (["model.vocab_size=300"], "[model] vocab_size = 300 is not the data's, 257"),
        (["model.preset=deltanet-11m"], "unknown preset 'deltanet-11m'"),
        (["model.mixer.name=deltanut"], "did you mean 'deltanet'"),
        (["data.directory=/nowhere"], "/nowhere is no prepared data"),
        (["data.batch_size=100000"], "needs 2,400,001 tokens"),
        (["data.shares={songs=1}"], "no domain 'songs'"),
        (["execution.micro_batch_size=3"], "batch_size = 4 must be a multiple of 1 processes * micro_batch_size = 3"),
        (["execution.logging.wandb=mine"], "logging to wandb needs the package wandb"),
    ],
)
def test_bad_input_gets_one_sentence(options, message, file, tmp_path, capsys):
    words = [word for option in options for word in ("--set", option)]
    assert run("pretrain", file, "--out", tmp_path / "run", *words) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "run" / "checkpoints").exists() or "wandb" in message


def test_a_table_that_is_none_gets_one_sentence(tmp_path, capsys):
    (tmp_path / "config.toml").write_text("data = 5\n")
    assert run("pretrain", tmp_path / "config.toml", "--out", tmp_path / "run", "--data", tmp_path) == 2
    assert capsys.readouterr().err == "statetrack: data must be a table [data], got 5\n"


def test_want_of_memory_is_said_plainly(file, tmp_path, capsys):
    assert run("pretrain", file, "--out", tmp_path / "run", "--set", f"training.spike_window={10**15}") == 1
    error = capsys.readouterr().err
    assert "not enough memory for another 8000000000000000 bytes" in error
    assert len(error.splitlines()) == 1


def test_a_plan_trains_nothing(file, tmp_path, capsys):
    assert run("pretrain", file, "--out", tmp_path / "run", "--plan") == 0
    out = capsys.readouterr().out
    assert "GFLOP a token" in out
    assert "checkpointing ┃ weights" in out  # no heading is cut off
    assert not (tmp_path / "run").exists()


def test_an_unfinished_run_has_no_model_yet(file, tmp_path, capsys):
    assert run("pretrain", file, "--out", tmp_path / "run", "--set", "training.steps=1") == 0
    (tmp_path / "run" / "model" / "config.json").unlink()
    assert run("generate", tmp_path / "run") == 2
    assert "has no model yet" in capsys.readouterr().err


def test_two_processes_have_the_losses_of_one_and_each_goes_on_with_the_other(file, tmp_path):
    """Two with FSDP2, killed on the spot, then one; and the same numbers as one alone."""
    assert run("pretrain", file, "--out", tmp_path / "one") == 0
    status, text = finish(command(2, file, "--out", tmp_path / "two"))
    assert status == 0, text
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert sorted(two) == list(range(1, 9))
    assert all(two[step] == pytest.approx(one[step], abs=1e-4) for step in one)
    shards = list((tmp_path / "two" / "checkpoints" / "step-00000006").glob("*.safetensors"))
    assert len(shards) == 2

    # From the checkpoint of step 6, which two have written, one goes on.
    last = tmp_path / "two" / "checkpoints" / "step-00000008"
    for path in last.iterdir():
        path.unlink()
    last.rmdir()
    assert run("pretrain", file, "--out", tmp_path / "two") == 0
    again = losses(tmp_path / "two")
    assert sorted(again) == list(range(1, 9))
    assert all(again[step] == pytest.approx(two[step], abs=1e-4) for step in two)


def wait_for_step(directory, step, process, seconds=60):
    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        lines = (directory / "metrics.jsonl").read_text().splitlines() if (directory / "metrics.jsonl").exists() else []
        if any(json.loads(line)["step"] >= step for line in lines if line.endswith("}")):
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} did not come: {process.poll()}")


LONG = ("--set", "training.steps=400", "--set", "execution.checkpoint_every=20", "--set", "execution.evaluate_every=0")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_saves_and_the_same_command_goes_on_exactly(processes, file, tmp_path):
    words = (file, "--out", tmp_path / "run", *LONG)
    process = command(processes, *words)
    wait_for_step(tmp_path / "run", 30, process)
    process.send_signal(signal.SIGTERM)
    status, text = finish(process)
    assert status != 0
    assert "To go on" in text
    assert status == 130 or processes > 1  # torchrun has a status of its own
    saved = max((tmp_path / "run" / "checkpoints").glob("step-*")).name
    assert int(saved.removeprefix("step-")) >= 30
    assert finish(command(processes, *words))[0] == 0
    assert finish(command(processes, file, "--out", tmp_path / "whole", *LONG))[0] == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_and_the_same_command_goes_on_exactly(file, tmp_path):
    words = (file, "--out", tmp_path / "run", *LONG)
    process = command(2, *words)
    wait_for_step(tmp_path / "run", 30, process)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout
    os.kill(int(children.split()[-1]), signal.SIGKILL)
    began = time.monotonic()
    status, text = finish(process)
    assert status != 0
    assert time.monotonic() - began < 60
    assert text.count("statetrack: ") == 1
    assert "the same command goes on from the last checkpoint" in text
    assert finish(command(2, *words))[0] == 0
    assert finish(command(2, file, "--out", tmp_path / "whole", *LONG))[0] == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


@pytest.mark.slow
def test_ranks_end_when_torchrun_is_killed(file, tmp_path):
    words = (file, "--out", tmp_path / "run", *LONG)
    process = command(2, *words)
    wait_for_step(tmp_path / "run", 10, process)
    process.kill()
    _, text = finish(process)  # waits until the last of its processes has closed the pipes
    assert "To go on" in text
    last = max((tmp_path / "run" / "checkpoints").glob("step-*")).name
    assert 10 <= int(last.removeprefix("step-")) < 400


@pytest.mark.slow
def test_damage_that_one_rank_finds_ends_all_of_them(file, tmp_path):
    words = (file, "--out", tmp_path / "run")
    assert finish(command(2, *words))[0] == 0
    second = sorted((tmp_path / "run" / "checkpoints" / "step-00000008").glob("*.safetensors"))[1]
    data = bytearray(second.read_bytes())
    data[-1] ^= 1
    second.write_bytes(data)
    began = time.monotonic()
    status, text = finish(command(2, *words))
    assert status != 0
    assert time.monotonic() - began < 60
    assert text.count("statetrack: ") == 1
    assert f"{second.name} is not the file that was written: its hash differs" in text


@pytest.mark.slow
def test_sigkill_loses_nothing_but_the_steps_since_the_last_checkpoint(file, tmp_path):
    words = (file, "--out", tmp_path / "run", *LONG)
    for step in (25, 90):
        process = command(1, *words)
        wait_for_step(tmp_path / "run", step, process)
        process.kill()
        process.communicate()
    assert finish(command(1, *words))[0] == 0
    assert finish(command(1, file, "--out", tmp_path / "whole", *LONG))[0] == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
