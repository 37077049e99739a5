"""The normalization's Triton kernels: under the interpreter, and on a GPU (marked `gpu`)."""

import pytest
import torch
from torch.func import vmap
from triton_cases import interpreted

from statetrack.layers import l2_normalize, unit_vectors
from statetrack.ops import triton_normalize
from statetrack.ops.triton_common import ON_REQUEST

FUNCTIONS = [l2_normalize, lambda x: l2_normalize(x, eps=1e-12, scale=0.3), unit_vectors]
NAMES = ["l2_normalize", "scaled", "unit_vectors"]


def results(function, x, d_y):
    x = x.detach().requires_grad_()
    y = function(x)
    return y, torch.autograd.grad(y, x, d_y.to(y.dtype))[0]


def check(function, shape, device="cpu", dtype=torch.float32):
    """Against the formula in float64, which no kernel serves; some vectors are short, some zero."""
    x = torch.randn(shape, device=device)
    x = x * torch.tensor([1.0, 1e-3, 1e-14, 0.0, 1e3], device=device)[torch.arange(shape[0]) % 5].view(-1, 1, 1)
    x, d_y = x.to(dtype), torch.randn(shape, device=device, dtype=dtype)
    limit = 1e-5 if dtype == torch.float32 else 5e-3
    for a, b in zip(results(function, x, d_y), results(function, x.double(), d_y), strict=True):
        assert a.dtype == dtype
        for one, expected in zip(a.double(), b, strict=True):
            assert (one - expected).norm() <= limit * expected.norm()


@interpreted
@pytest.mark.parametrize("function", FUNCTIONS, ids=NAMES)
@pytest.mark.parametrize("shape", [(5, 3, 8), (7, 20, 33), (5, 2, 256)])
def test_the_kernels_are_the_formula(function, shape):
    assert triton_normalize.serves(torch.zeros(shape))
    check(function, shape)


@interpreted
def test_longer_vectors_are_left_to_pytorch():
    assert not triton_normalize.serves(torch.zeros(2, 257))
    check(l2_normalize, (5, 1, 257))


@interpreted
@pytest.mark.parametrize("function", FUNCTIONS, ids=NAMES)
def test_what_is_not_finite_stays_visible(function):
    x = torch.randn(3, 4)
    x[1, 2] = torch.nan
    y = function(x)
    assert y.isnan().any(-1).tolist() == [False, True, False]


@interpreted
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_replicas_on_any_axis(axis, monkeypatch):
    x, d_y = torch.randn(4, 5, 6), torch.randn(4, 5, 6)
    fused = results(vmap(unit_vectors, axis, axis), x, d_y)
    monkeypatch.setattr(triton_normalize, "PRIORITY", ON_REQUEST)
    for a, b in zip(fused, results(vmap(unit_vectors, axis, axis), x, d_y), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", FUNCTIONS, ids=NAMES)
@pytest.mark.parametrize("shape", [(5, 3, 8), (7, 20, 33), (5, 2, 256), (10, 3000, 128), (5, 1, 257)])
def test_the_kernels_on_a_gpu(function, shape, dtype):
    check(function, shape, device="cuda", dtype=dtype)
