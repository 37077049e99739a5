"""What a process may use of the machine: cores, where the system tells which ones and where it does not, and GPUs."""

import os

import pytest
import torch

from statetrack.machine import available_cores, available_devices


def test_there_is_at_least_one_core_and_no_more_than_the_machine_has():
    assert 1 <= available_cores() <= (os.cpu_count() or 1)


def test_systems_without_affinity_count_all(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert available_cores() == 7


@pytest.mark.parametrize(("gpus", "devices"), [(0, ["cpu"]), (1, ["cuda:0"]), (3, ["cuda:0", "cuda:1", "cuda:2"])])
def test_every_gpu_is_a_device(gpus, devices, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert available_devices() == devices
