"""A process that waits without end for one that was killed, as on a GPU: it says so and ends when torchrun tells it."""

import signal
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, sys, time
from pathlib import Path
from statetrack.cli import stop_on_signal
from statetrack.pretraining.commands import ends_if_stuck

with stop_on_signal() as stopping, ends_if_stuck(Path(sys.argv[1]), 1):
    print("waiting", flush=True)
    {wait}
"""
# As a wait for a GPU does, the second lock never comes back to the interpreter, so no handler of a signal runs.
FOREVER = "mutex = ctypes.create_string_buffer(64); [ctypes.CDLL(None).pthread_mutex_lock(mutex) for _ in range(2)]"


def start(place, wait):
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(wait=wait), str(place)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a pthread mutex has another initial value than zeros")
def test_a_stuck_process_ends_with_one_sentence(tmp_path):
    first, second = (start(tmp_path, FOREVER) for _ in range(2))
    for process in (first, second):
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGTERM)
    texts = [process.communicate(timeout=30)[1] for process in (first, second)]
    assert [first.returncode, second.returncode] == [1, 1]
    assert sum(text.count("statetrack: ") for text in texts) == 1
    assert "the same command goes on from the last checkpoint" in "".join(texts)


def test_a_process_that_ends_in_time_is_left_alone(tmp_path):
    process = start(tmp_path, "while not stopping(): time.sleep(0.01)")
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGTERM)
    _, text = process.communicate(timeout=30)
    assert (process.returncode, text) == (0, "")
