"""The convolution's Triton kernels: under the interpreter, and on a GPU (marked `gpu`)."""

import pytest
import torch
from torch.nn import functional as F
from triton_cases import interpreted

from statetrack import layers
from statetrack.ops import triton_convolution
from statetrack.ops.triton_common import CHECKED_ON_A_CARD
from statetrack.ops.triton_convolution import convolve, convolve_backward


def check(replicas, batch, length, channels, size, device="cpu", dtype=torch.float32):
    """Against PyTorch's grouped convolution in float64, outputs and gradients."""
    shape = (*((replicas,) if replicas else ()), batch, length + size - 1, channels)
    extended = torch.randn(shape, device=device, dtype=dtype)
    weight = torch.randn(*shape[:-3], channels, 1, size, device=device, dtype=dtype)
    wide, taps = extended.double().requires_grad_(), weight.double().requires_grad_()
    sets = zip(wide, taps, strict=True) if replicas else [(wide, taps)]
    y = torch.stack([F.conv1d(x.mT, w, groups=channels).mT for x, w in sets]).view(*shape[:-2], length, channels)
    d_y = torch.randn(y.shape, device=device, dtype=dtype)
    results = (convolve(extended, weight), *convolve_backward(extended, weight, d_y))
    expected = (y, *torch.autograd.grad(y, [wide, taps], d_y.double()))
    for a, b in zip(results, expected, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * b.norm()


SHAPES = [(0, 2, 1, 5, 2), (0, 3, 33, 16, 4), (2, 3, 7, 70, 3)]


@interpreted
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernels_are_a_grouped_convolution(shape):
    check(*shape)


@interpreted
def test_more_rows_than_blocks(monkeypatch):
    monkeypatch.setattr(triton_convolution, "_BLOCKS", 2)
    check(2, 5, 9, 4, 4)


@interpreted
def test_a_short_convolution_uses_them_once_they_are_checked(monkeypatch):
    layer, x = layers.ShortConvolution(6, 4, bias=True), torch.randn(3, 9, 6, requires_grad=True)
    inputs, d_y = [x, *layer.parameters()], torch.randn(3, 9, 6)
    expected = layer(x, layer.init_state(3))[0]
    gradients = torch.autograd.grad(expected, inputs, d_y)
    monkeypatch.setattr(triton_convolution, "PRIORITY", CHECKED_ON_A_CARD)
    y = layer(x, layer.init_state(3))[0]
    assert torch.allclose(y, expected, atol=1e-6)
    for a, b in zip(torch.autograd.grad(y, inputs, d_y), gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, (0, 256, 40, 128, 4), (3, 256, 40, 384, 4), (0, 2, 5000, 96, 4)])
def test_the_kernels_on_a_gpu(shape, dtype):
    check(*shape, device="cuda", dtype=dtype)
