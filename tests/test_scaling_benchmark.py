"""The benchmark of several GPUs, over gloo: its comparisons see what is right and what is not."""

import json
import subprocess
import sys
import time

import pytest

from benchmarks import scaling
from benchmarks.scaling import SectionError, Setting


@pytest.fixture
def setting(tmp_path):
    return Setting(2, "cpu", tmp_path, 1e-4, 1e-5)


def test_a_sequence_split_in_time_is_compared_with_the_whole(setting, tmp_path):
    sections = scaling.run_sections(setting, ["long-sequence"], tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text())["sections"] == sections
    result = sections["long-sequence"]
    assert result["passed"], result
    assert result["tokens_per_second_split"] > 0
    assert "passed" in scaling.table(sections)


def test_a_section_that_hangs_is_ended_and_does_not_stop_the_next(setting, tmp_path, monkeypatch):
    sleeping = []

    def hang(setting, deadline):
        launched = scaling._start(setting, 1, "timeit", "-n1", "-r1", "import time; time.sleep(600)")
        sleeping.append(launched.process)
        scaling._finish(launched, deadline)
        return {"passed": True}

    def differ(setting, deadline):
        return {"passed": scaling._difference({1: 5.0}, {1: 5.1}, 1) <= setting.tolerance, "differences": {}}

    monkeypatch.setattr(scaling, "SECTIONS", {"resume": (hang, 1.0), "same-losses": (differ, 1.0)})
    began = time.monotonic()
    sections = scaling.run_sections(setting, ["same-losses", "resume"], tmp_path / "out.json")
    assert time.monotonic() - began < 30
    assert sleeping[0].poll() is not None
    assert "not done within the time limit" in sections["resume"]["failure"]
    assert not sections["same-losses"]["passed"]
    assert scaling.table(sections).count("FAILED") == 2


def test_losses_of_other_steps_are_no_comparison():
    with pytest.raises(SectionError, match=r"steps \[1, 2\] and \[1\]"):
        scaling._difference({1: 5.0, 2: 4.0}, {1: 5.0}, 2)


def test_a_rank_is_found_among_the_processes_below_its_launcher(setting):
    program = "import os, subprocess, sys; subprocess.run(['sleep', '60'], env={**os.environ, 'RANK': '1'})"
    launcher = subprocess.Popen([sys.executable, "-c", program])
    try:
        deadline, found = time.monotonic() + 30, []
        while not found and time.monotonic() < deadline:
            found = scaling._descendants(launcher.pid)
            time.sleep(0.05)
        time.sleep(0.2)  # between fork and exec a process still has its parent's environment
        assert scaling._rank(launcher.pid, 1) in found
        with pytest.raises(SectionError, match="no process of rank 3"):
            scaling._rank(launcher.pid, 3)
    finally:
        scaling._Launched(launcher, setting.directory / "none").stop()
    assert not scaling._descendants(launcher.pid)
