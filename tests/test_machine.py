"""The count of cores, where the system tells which ones a process may use and where it does not."""

import os

from statetrack.machine import available_cores


def test_there_is_at_least_one_core_and_no_more_than_the_machine_has():
    assert 1 <= available_cores() <= (os.cpu_count() or 1)


def test_systems_without_affinity_count_all(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert available_cores() == 7
