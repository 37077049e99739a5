"""What this process may use of the machine."""

from __future__ import annotations

import os

import torch


def available_cores() -> int:
    """How many cores this process may run on, where the system tells; else how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_devices() -> list[str]:
    """Every GPU that this process sees, `cuda:0`, `cuda:1` and so on; the CPU where there are none."""
    return [f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["cpu"]
