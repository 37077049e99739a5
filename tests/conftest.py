"""What holds for all tests: one thread a worker, one seed a test, and `gpu` tests are skipped without a CUDA device."""

import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # workers already share the cores; set before torch counts them
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch


@pytest.fixture(autouse=True)
def _one_seed():
    """What a test draws doesn't depend on the tests that a worker happened to run before it."""
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what is slow
def pytest_collection_modifyitems(items):
    thin_out(items)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def thin_out(items):
    """Of tests marked `thin(n)` one of n cases is for every day: along a diagonal, so that each value comes up."""
    cases = {}
    for item in items:
        if marker := item.get_closest_marker("thin"):
            cases.setdefault((marker.args[0], item.nodeid.partition("[")[0]), []).append(item)
    for (n, _), members in cases.items():
        for index, item in enumerate(members):
            if (index + index // n) % n:
                item.add_marker(pytest.mark.slow)
