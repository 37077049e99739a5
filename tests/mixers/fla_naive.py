"""flash-linear-attention's pure-torch functions, each from its file alone: the rest of that package needs Triton."""

import pytest
import torch

from benchmarks.common import fla_if_installed


def naive(operation):
    """The module `fla/ops/<operation>/naive.py`; skips the test where the package is not installed."""
    if (module := fla_if_installed(f"{operation}/naive")) is None:
        pytest.skip("compares with flash-linear-attention: pip install fla-core")
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
