"""What holds for all tests: one thread a worker, and those marked `gpu` are skipped where there is no CUDA device."""

import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # workers already share the cores; set before torch counts them
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
