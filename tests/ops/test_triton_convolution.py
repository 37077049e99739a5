"""The convolution's Triton kernels: under the interpreter, and on a GPU (marked `gpu`)."""

from dataclasses import replace

import pytest
import torch
from torch.func import functional_call, vmap
from torch.nn import functional as F
from triton_cases import interpreted

from statetrack import layers
from statetrack.mixers.deltanet import DeltaNetConfig, DeltaProductConfig, GatedDeltaNetConfig, KimiDeltaAttentionConfig
from statetrack.ops import triton_convolution
from statetrack.ops.triton_common import ON_REQUEST
from statetrack.ops.triton_convolution import convolve, convolve_parts


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
@pytest.mark.thin(2)
def test_the_kernels_are_a_grouped_convolution(shape, options):
    check(*shape, *options)


def reach_of(lengths, size, device="cpu"):
    return torch.cat([torch.arange(length).clamp(max=size - 1) for length in lengths]).int().to(device)


def check_parts(lengths, sizes, passed, size, *options, spare=3, device="cpu", dtype=torch.float32):
    """Parts of a wider tensor against PyTorch's grouped convolution of each sequence alone, in float64.

    Lengths of packed sequences, or one number for a batch of two rows of so many tokens.
    """
    packed, channels = isinstance(lengths, list), sum(sizes)
    silu, bias = "silu" in options, "bias" in options
    batch, length = (1, sum(lengths)) if packed else (2, lengths)
    width = channels + sum(passed) + spare
    x = torch.randn(batch, length, width, device=device, dtype=dtype)
    inputs = [x, torch.randn(channels, 1, size, device=device)]
    inputs += [torch.randn(channels, device=device)] if bias else []
    inputs = [tensor.requires_grad_() for tensor in inputs]
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]

    def formula(x, weight, bias=None):
        convolved = [
            F.conv1d(F.pad(piece.mT, (size - 1, 0)), weight, bias, groups=channels).mT
            for piece in x[..., :channels].split(lengths if packed else length, 1)
            if piece.shape[1]
        ]
        y = torch.cat(convolved, 1)
        y = F.silu(y) if silu else y
        return *y.split(sizes, -1), *x[..., channels : width - spare].split(passed, -1)

    reach = reach_of(lengths, size, device) if packed else None
    parts = convolve_parts(*inputs[:2], inputs[2] if bias else None, sizes, passed, silu=silu, reach=reach)
    expected = formula(*wide)
    d_parts = [torch.randn_like(part) for part in parts]
    results = (*parts, *torch.autograd.grad(parts, inputs, d_parts))
    references = (*expected, *torch.autograd.grad(expected, wide, [d.double() for d in d_parts]))
    for a, b, source in zip(results, references, [*[x] * len(parts), *inputs], strict=True):
        assert a.shape == b.shape
        assert a.dtype == source.dtype
        assert (a.double() - b).norm() <= (1e-5 if dtype == torch.float32 else 5e-3) * b.norm()
    assert all(part.is_contiguous() for part in parts[: len(sizes)])


PACKINGS = [[5, 0, 1, 2, 4], [1] * 9, [0, 23, 0], [3, 1, 40, 0, 7]]
PARTS = [((5,), ()), ((16, 16, 16), (4, 3)), ((3, 40), (2,)), ((16, 32, 7), ())]


@interpreted
@pytest.mark.parametrize("lengths", [11, *PACKINGS], ids=str)
@pytest.mark.parametrize(("sizes", "passed"), PARTS)
@pytest.mark.thin(2)
def test_parts_of_a_projection_are_convolved_and_passed_on(sizes, passed, lengths):
    check_parts(lengths, sizes, passed, 4, "silu")


@interpreted
@pytest.mark.parametrize("options", [(), ("bias",), ("silu", "bias")], ids="-".join)
@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.thin(3)
def test_parts_with_other_sizes_and_biases(size, options):
    for lengths in (9, PACKINGS[0]):
        check_parts(lengths, (6, 6), (1,), size, *options, spare=0)


@interpreted
def test_packed_sequences_longer_than_the_runs_of_one_program(monkeypatch):
    monkeypatch.setattr(triton_convolution, "_RUNS", 2)
    monkeypatch.setattr(triton_convolution, "_LONGEST_RUN", 4)
    check_parts([3, 1, 17, 0, 7, 2], (6, 9), (2,), 4, "silu", "bias")


@interpreted
def test_channels_of_several_programs_of_a_part(monkeypatch):
    monkeypatch.setattr(triton_convolution, "_CHANNELS", 16)
    monkeypatch.setattr(triton_convolution, "_RUN_CHANNELS", 16)
    check_parts(PACKINGS[0], (33, 16, 40), (2,), 4, "silu", "bias")


@interpreted
def test_what_a_token_does_not_reach_counts_for_nothing_even_if_it_is_not_finite():
    x, weight = torch.randn(1, 6, 5), torch.randn(5, 1, 3)
    x[:, :3] = torch.nan
    x.requires_grad_()
    y = convolve(x, weight, padded=True, silu=True, reach=reach_of([3, 3], 3))
    assert torch.equal(y[:, 3:], convolve(x[:, 3:], weight, padded=True, silu=True))
    (d_x,) = torch.autograd.grad(y[:, 3:].sum(), x)
    assert torch.isfinite(d_x[:, 3:]).all()


@interpreted
def test_parts_that_nobody_reads_have_gradients_of_zero():
    x, weight = torch.randn(2, 7, 14, requires_grad=True), torch.randn(9, 1, 4, requires_grad=True)
    for kept in range(4):
        parts = convolve_parts(x, weight, None, (4, 5), (2, 1))
        d_x, d_weight = torch.autograd.grad(parts[kept].square().sum(), [x, weight])
        whole = torch.cat([convolve(x[..., :9], weight, padded=True), x[..., 9:12]], -1).split([4, 5, 2, 1], -1)
        expected = torch.autograd.grad(whole[kept].square().sum(), [x, weight], allow_unused=True)
        torch.testing.assert_close(d_x, expected[0])
        torch.testing.assert_close(d_weight, torch.zeros_like(weight) if kept > 1 else expected[1])


@interpreted
def test_more_than_three_parts_are_refused():
    with pytest.raises(ValueError, match="up to three parts, got 4"):
        convolve_parts(torch.randn(1, 5, 4), torch.randn(4, 1, 2), None, (1, 1, 1, 1))


@interpreted
def test_replicas_share_how_far_their_tokens_see():
    x, weight, reach = torch.randn(3, 1, 9, 5), torch.randn(5, 1, 4), reach_of([4, 5], 4)
    y = vmap(lambda x: convolve(x, weight, padded=True, reach=reach))(x)
    for one, part in zip(x, y, strict=True):
        torch.testing.assert_close(part, convolve(one, weight, padded=True, reach=reach))


@interpreted
def test_the_operators_fakes_tell_the_truth():
    x, weight, bias, tests = (
        torch.randn(1, 9, 20),
        torch.randn(12, 1, 4),
        torch.randn(12),
        ("test_schema", "test_faketensor"),
    )
    for given in ((None, None), (bias, reach_of([4, 5], 4))):
        forward = (x, weight, *given, [5, 7], True, True)
        torch.library.opcheck(triton_convolution._forward_op, forward, test_utils=tests)
        d_ys = [torch.randn(1, 9, 5), torch.randn(1, 9, 7)]
        backward = (x, weight, *given, d_ys, True, True)
        outputs = triton_convolution._backward_op(*backward)
        fakes = triton_convolution._empty_gradients(*backward)
        assert [(y.shape, y.dtype) for y in outputs] == [(y.shape, y.dtype) for y in fakes]


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
def test_packed_sequences_without_states_need_no_longer_row(monkeypatch):
    monkeypatch.setattr(layers, "_convolution_places", None)
    layer, x = layers.ShortConvolution(6, 4), torch.randn(1, 9, 6)
    y, after = layer(x, None, torch.tensor([0, 2, 2, 9]), activation="silu")
    for index, (start, stop) in enumerate([(0, 2), (2, 2), (2, 9)]):
        if start < stop:
            alone, state = layer(x[:, start:stop], layer.init_state(1), activation="silu")
            torch.testing.assert_close(y[:, start:stop], alone)
            assert torch.equal(after[index : index + 1], state)
    assert torch.equal(after[1], torch.zeros(3, 6))


@interpreted
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("cu_seqlens", [None, torch.tensor([0, 4, 4, 5, 9])], ids=["rows", "packed"])
def test_convolutions_together_are_each_alone(cu_seqlens, bias):
    several = [layers.ShortConvolution(channels, 4, bias=bias) for channels in (6, 3, 8)]
    weights = [weight for layer in several for weight in layer.parameters()]
    x = torch.randn(1 if cu_seqlens is not None else 3, 9, 24, requires_grad=True)
    together = layers.convolve_together(x, several, [4, 1], cu_seqlens, activation="silu")
    assert together is not None
    parts = x.split([6, 3, 8, 4, 1, 2], -1)
    alone = [layer(part, None, cu_seqlens, activation="silu") for layer, part in zip(several, parts, strict=False)]
    results = [*together[0], *together[1]]
    expected = [*(y for y, _ in alone), *parts[3:5], *(state for _, state in alone)]
    torch.testing.assert_close(results, expected)
    d = [torch.randn_like(y) for y in expected]
    gradients = torch.autograd.grad(results, [x, *weights], d)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, [x, *weights], d))


@interpreted
def test_convolutions_that_are_not_alike_stay_alone():
    def several(*options):
        return [layers.ShortConvolution(4, **each) for each in options]

    x, alike = torch.randn(1, 9, 16), several({"size": 3}, {"size": 3})
    assert layers.convolve_together(x, alike, []) is not None
    assert layers.convolve_together(x[:, :1], alike, []) is None  # too short to have a state
    assert layers.convolve_together(x.double(), alike, []) is None
    assert layers.convolve_together(x, several({"size": 3}, {"size": 4}), []) is None
    assert layers.convolve_together(x, several({"size": 3}, {"size": 3, "bias": True}), []) is None
    assert layers.convolve_together(x, several(*[{"size": 3}] * 4), []) is None
    alike[1].register_forward_hook(lambda module, inputs, output: None)
    assert layers.convolve_together(x, alike, []) is None


MIXERS = {
    "deltanet": DeltaNetConfig(num_heads=2, backend="chunked"),
    "gated_deltanet": GatedDeltaNetConfig(num_heads=2, value_dim=12, backend="chunked"),
    "deltaproduct": DeltaProductConfig(num_heads=2, conv_bias=True, activation="identity", backend="chunked"),
    "kda": KimiDeltaAttentionConfig(num_heads=2, backend="chunked"),
}


@interpreted
@pytest.mark.parametrize("cu_seqlens", [None, [0, 0, 70, 71, 120]], ids=["rows", "packed"])
@pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)
@pytest.mark.thin(2)
def test_mixers_are_the_same_with_one_product_and_one_convolution(mixer, cu_seqlens, monkeypatch):
    monkeypatch.setattr(layers, "_JOINED_ON", ("cpu",))
    calls = []
    monkeypatch.setattr(
        triton_convolution,
        "convolve_parts",
        lambda *args, **options: calls.append(1) or convolve_parts(*args, **options),
    )
    module, x = replace(mixer).build(16), torch.randn(1, 120, 16, requires_grad=True)
    cu_seqlens = None if cu_seqlens is None else torch.tensor(cu_seqlens)

    def results():
        y, after = module.scan(x, None, cu_seqlens)
        states = [after[name] for name in sorted(after)]
        total = sum((part * torch.linspace(-1, 1, part.numel()).view(part.shape)).sum() for part in (y, *states))
        return [y, *states, *torch.autograd.grad(total, [x, *module.parameters()])]

    joined = results()
    assert calls == [1]
    monkeypatch.setattr(layers, "JOIN", False)
    torch.testing.assert_close(joined, results(), rtol=1e-4, atol=1e-4)
    assert calls == [1]


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [11, 3000, *PACKINGS, [700, 1, 0, 2, 900, 333]], ids=str)
@pytest.mark.parametrize(("sizes", "passed"), [*PARTS, ((512, 512, 512), (4,)), ((384, 384, 768), (768, 3, 3))])
def test_parts_of_a_projection_on_a_gpu(sizes, passed, lengths, dtype):
    for options in ((), ("silu", "bias")):
        check_parts(
            lengths, sizes, passed, 4, *options, spare=-(sum(sizes) + sum(passed)) % 16, device="cuda", dtype=dtype
        )


@pytest.mark.gpu
def test_gradients_on_a_gpu_are_the_same_every_time():
    layer, x = layers.ShortConvolution(96, 4).cuda(), torch.randn(8, 700, 96, device="cuda").bfloat16()
    x.requires_grad_()
    y = layer(x, None, activation="silu")[0]
    first, *others = [torch.autograd.grad(y, [x, layer.weight], y.detach(), retain_graph=True) for _ in range(4)]
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "length"), [(1, 2**20 + 3), (2**16 + 5, 5)])
def test_more_blocks_than_the_other_axes_of_a_grid_have(batch, length):
    check(0, batch, length, 4, 4, "padded", "silu", device="cuda")
