"""flash-linear-attention's pure-torch functions, each from its file alone: the rest of that package needs Triton."""

import importlib.util
from pathlib import Path

import pytest
import torch


def naive(operation):
    """The module `fla/ops/<operation>/naive.py`; skips the test where the package is not installed."""
    package = importlib.util.find_spec("fla")
    if package is None or not package.submodule_search_locations:
        pytest.skip("compares with flash-linear-attention: pip install fla-core")
    path = Path(package.submodule_search_locations[0], "ops", operation, "naive.py")
    spec = importlib.util.spec_from_file_location(f"fla_{operation}_naive", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_alike(ours, theirs, x, module):
    """Outputs [B, T, D] of two functions of `x` and `module`'s parameters, and all their gradients, to 1e-5."""
    weights, results = torch.randn(x.shape), []
    for function in (ours, theirs):
        module.zero_grad()
        x.grad = None
        y = function(x)
        (y * weights).sum().backward()
        results.append({"y": y.detach(), "x": x.grad} | {n: p.grad.clone() for n, p in module.named_parameters()})
    for name, expected in results[1].items():
        assert (results[0][name] - expected).norm() <= 1e-5 * expected.norm(), name
