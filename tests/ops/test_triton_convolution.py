"""The convolution's Triton kernels: under the interpreter, and on a GPU (marked `gpu`)."""

import pytest
import torch
from torch.func import functional_call, vmap
from torch.nn import functional as F
from triton_cases import interpreted

from statetrack import layers
from statetrack.ops import triton_convolution
from statetrack.ops.triton_common import ON_REQUEST
from statetrack.ops.triton_convolution import convolve


def check(replicas, batch, length, channels, size, *options, device="cpu", dtype=torch.float32):
    """Against PyTorch's grouped convolution in float64, outputs and gradients; x is a part of a wider tensor."""
    padded, silu, bias = (name in options for name in ("padded", "silu", "bias"))
    sets, pad = (replicas,) if replicas else (), size - 1 if padded else 0
    x = torch.randn(*sets, batch, length, 2 * channels, device=device, dtype=dtype)[..., :channels]
    # Weights are float32 whatever the activations are, as under autocast.
    weight = torch.randn(*sets, channels, 1, size, device=device)
    inputs = [x, weight, *([torch.randn(*sets, channels, device=device)] if bias else [])]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]

    def formula(x, weight, bias=None):
        y = F.conv1d(F.pad(x.mT, (pad, 0)), weight, bias, groups=channels).mT
        return F.silu(y) if silu else y

    def kernels(x, weight, bias=None):
        return convolve(x, weight, bias, padded=padded, silu=silu)

    y = vmap(kernels)(*inputs) if replicas else kernels(*inputs)
    expected = torch.stack([formula(*one) for one in zip(*wide, strict=True)]) if replicas else formula(*wide)
    d_y = torch.randn(y.shape, device=device, dtype=dtype)
    results = (y, *torch.autograd.grad(y, inputs, d_y))
    references = (expected, *torch.autograd.grad(expected, wide, d_y.double()))
    for a, b, source in zip(results, references, [x, *inputs], strict=True):
        assert a.shape == b.shape
        assert a.dtype == source.dtype
        assert (a.double() - b).norm() <= (1e-5 if dtype == torch.float32 else 5e-3) * b.norm()


OPTIONS = [("padded",), ("silu",), ("padded", "silu", "bias"), ("bias",)]
SHAPES = [(0, 2, 5, 5, 2), (0, 3, 43, 16, 4), (2, 3, 7, 70, 3), (0, 1, 150, 3, 5)]


@interpreted
@pytest.mark.parametrize("options", OPTIONS, ids="-".join)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernels_are_a_grouped_convolution(shape, options):
    check(*shape, *options)


@interpreted
@pytest.mark.parametrize("length", [1, 2, 3])
def test_fewer_tokens_than_taps(length):
    check(0, 2, length, 5, 4, "padded", "silu")


@interpreted
def test_longer_than_the_runs_of_one_program(monkeypatch):
    monkeypatch.setattr(triton_convolution, "_RUNS", 2)
    monkeypatch.setattr(triton_convolution, "_LONGEST_RUN", 4)
    check(2, 2, 21, 3, 4, "padded", "silu", "bias")


def results(layer, x, *, state=None, cu_seqlens=None):
    inputs = [x, *([] if state is None else [state]), *layer.parameters()]
    y, after = layer(x, state, cu_seqlens, activation="silu")
    weights = [torch.linspace(-1, 1, part.numel()).view(part.shape) for part in (y, after)]
    return [y, after, *torch.autograd.grad([y, after], inputs, weights)]


CALLS = {
    "no state": {},
    "one token": {"length": 1},
    "state": {"state": torch.Size([3, 3, 6])},
    "packed": {"batch": 1, "cu_seqlens": [0, 4, 4, 5, 9]},
    "packed with states": {"batch": 1, "cu_seqlens": [0, 2, 9], "state": torch.Size([2, 3, 6])},
}


@interpreted
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_short_convolution_is_the_same_with_and_without_them(call, monkeypatch):
    layer = layers.ShortConvolution(6, 4, bias=True)
    x = torch.randn(call.get("batch", 3), call.get("length", 9), 6, requires_grad=True)
    given = {}
    if "state" in call:
        given["state"] = torch.randn(call["state"], requires_grad=True)
    if "cu_seqlens" in call:
        given["cu_seqlens"] = torch.tensor(call["cu_seqlens"])
    fused = results(layer, x, **given)
    monkeypatch.setattr(triton_convolution, "PRIORITY", ON_REQUEST)
    for a, b in zip(fused, results(layer, x, **given), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@interpreted
def test_replicas_of_a_short_convolution_share_their_input():
    layer, x = layers.ShortConvolution(6, 4), torch.randn(2, 9, 6)
    weights = torch.randn(3, 6, 1, 4)
    y = vmap(lambda w: functional_call(layer, {"weight": w}, (x, None), {"activation": "silu"})[0])(weights)
    for weight, one in zip(weights, y, strict=True):
        expected = F.silu(F.conv1d(F.pad(x.mT, (3, 0)), weight, groups=6).mT)
        assert torch.allclose(one, expected, atol=1e-5)


@interpreted
def test_a_gradient_of_a_gradient_is_refused():
    x, weight = torch.randn(1, 5, 3, requires_grad=True), torch.randn(3, 1, 2, requires_grad=True)
    (d_x,) = torch.autograd.grad(convolve(x, weight, padded=True).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="gradients of gradients"):
        d_x.sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids="-".join)
@pytest.mark.parametrize("shape", [*SHAPES, (0, 256, 40, 128, 4), (3, 256, 40, 384, 4), (0, 2, 5000, 96, 4)])
def test_the_kernels_on_a_gpu(shape, options, dtype):
    check(*shape, *options, device="cuda", dtype=dtype)


@pytest.mark.gpu
def test_gradients_on_a_gpu_are_the_same_every_time():
    layer, x = layers.ShortConvolution(96, 4).cuda(), torch.randn(8, 700, 96, device="cuda").bfloat16()
    x.requires_grad_()
    y = layer(x, None, activation="silu")[0]
    first, *others = [torch.autograd.grad(y, [x, layer.weight], y.detach(), retain_graph=True) for _ in range(4)]
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
