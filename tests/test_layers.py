"""The layers against PyTorch's own convolution and formulas."""

from contextlib import contextmanager

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from statetrack import layers
from statetrack.layers import (
    GatedMLP,
    HeadNorm,
    LowRankMap,
    ReLUMLP,
    RMSNorm,
    ShortConvolution,
    l2_normalize,
    token_shift,
    unit_vectors,
)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_short_convolution_equals_a_padded_grouped_convolution(size, bias):
    torch.manual_seed(0)
    layer, x = ShortConvolution(6, size, bias=bias), torch.randn(2, 9, 6)
    expected = F.conv1d(F.pad(x.mT, (size - 1, 0)), layer.weight, layer.bias, groups=6).mT
    y, state = layer(x, layer.init_state(2))
    assert torch.allclose(y, expected, atol=1e-6)
    assert torch.equal(state, x[:, 9 - size + 1 :])


@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_the_gradients_of_a_short_convolution_are_those_of_a_grouped_one(rows, monkeypatch):
    """Also where the batch is cut into groups of so many rows, of which the last is smaller."""
    monkeypatch.setattr(layers, "CACHED_NUMBERS", 4 * rows * 12 * 6)
    layer, x = ShortConvolution(6, 4, bias=True).double(), torch.randn(4, 9, 6, dtype=torch.float64)
    state, d_y = torch.randn(4, 3, 6, dtype=torch.float64), torch.randn(4, 9, 6, dtype=torch.float64)
    inputs = [x.requires_grad_(), state.requires_grad_(), *layer.parameters()]
    y = layer(x, state)[0]
    expected = F.conv1d(torch.cat([state, x], 1).mT, layer.weight, layer.bias, groups=6).mT
    assert torch.allclose(y, expected)
    gradients = [torch.autograd.grad(out, inputs, d_y) for out in (y, expected)]
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b)


@pytest.mark.parametrize("windows", [0, 2**20])
def test_replicas_of_a_short_convolution_have_taps_of_their_own(windows, monkeypatch):
    monkeypatch.setattr(layers, "_WINDOWS", windows)
    replicas = [ShortConvolution(6, 4).double() for _ in range(3)]
    x = torch.randn(2, 3, 9, 6, dtype=torch.float64, requires_grad=True)  # replicas on the second axis
    weights = torch.stack([layer.weight.detach() for layer in replicas]).requires_grad_()
    start = replicas[0].init_state(2)

    def one(weight, x):
        return functional_call(replicas[0], {"weight": weight}, (x, start))[0]

    y = vmap(one, in_dims=(0, 1), out_dims=1)(weights, x)
    expected = torch.stack([layer(x[:, i], start)[0] for i, layer in enumerate(replicas)], 1)
    assert torch.allclose(y, expected)
    d_y = torch.randn_like(y)
    d_weights, d_x = torch.autograd.grad(y, [weights, x], d_y)
    expected_d_x, *expected_d_weights = torch.autograd.grad(expected, [x, *(p.weight for p in replicas)], d_y)
    assert torch.allclose(d_x, expected_d_x)
    assert torch.allclose(d_weights, torch.stack(expected_d_weights))


@pytest.mark.parametrize("split", [1, 2, 5])
def test_short_convolution_carries_its_state(split):
    torch.manual_seed(0)
    layer, x = ShortConvolution(3, 4).double(), torch.randn(2, 7, 3, dtype=torch.float64)
    whole, end = layer(x, layer.init_state(2))
    first, state = layer(x[:, :split], layer.init_state(2))
    second, state = layer(x[:, split:], state)
    assert torch.allclose(torch.cat([first, second], 1), whole)
    assert torch.equal(state, end)


@pytest.mark.parametrize("lengths", [[5, 0, 1, 2, 4], [12], [1] * 12, [0, 12, 0]])
def test_packed_sequences_do_not_see_each_other(lengths):
    torch.manual_seed(0)
    layer, x = ShortConvolution(3, 4, bias=True).double(), torch.randn(1, 12, 3, dtype=torch.float64)
    states = torch.randn(len(lengths), 3, 3, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    y, after = layer(x, states, cu_seqlens)
    for index, (start, stop) in enumerate(zip(cu_seqlens.tolist(), cu_seqlens[1:].tolist(), strict=False)):
        alone, state = layer(x[:, start:stop], states[index : index + 1])
        assert torch.allclose(y[:, start:stop], alone)
        assert torch.equal(after[index : index + 1], state)


def test_a_convolution_over_one_token_is_refused():
    with pytest.raises(ValueError, match="at least 2 tokens"):
        ShortConvolution(3, 1)


def test_a_convolution_with_another_activation_is_refused():
    with pytest.raises(ValueError, match='must be None or "silu"'):
        ShortConvolution(3, 2)(torch.zeros(1, 4, 3), None, activation="tanh")  # pyright: ignore[reportArgumentType]


def test_gated_mlp_is_swiglu():
    torch.manual_seed(0)
    mlp, x = GatedMLP(4, 6), torch.randn(2, 3, 4)
    gate, up = x @ mlp.gate_proj.weight.mT, x @ mlp.up_proj.weight.mT
    assert torch.allclose(mlp(x), (gate * torch.sigmoid(gate) * up) @ mlp.down_proj.weight.mT, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_l2_normalize_keeps_the_dtype_and_survives_zero(dtype):
    x = torch.randn(5, 8).to(dtype)
    y = l2_normalize(x)
    assert y.dtype == dtype
    assert torch.allclose(y.double().norm(dim=-1), torch.ones(5, dtype=torch.float64), atol=1e-2)
    assert torch.equal(l2_normalize(torch.zeros(2, dtype=dtype)), torch.zeros(2, dtype=dtype))


@pytest.mark.parametrize("length", [1e3, 1.0, 1e-6, 1e-11, 1e-13, 1e-30, 0.0])
def test_unit_vectors_have_the_length_1_or_0_and_finite_gradients(length):
    x = (length * torch.nn.functional.normalize(torch.ones(2, 3), dim=-1)).requires_grad_()
    y = unit_vectors(x)
    y.sum().backward()
    assert torch.allclose(y.norm(dim=-1), torch.full((2,), float(length > 1e-12)))
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_a_relu_mlp_is_its_formula_at_any_depth():
    torch.manual_seed(0)
    mlp = ReLUMLP(5, 7, depth=2).double()
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    first, second = (layer for layer in mlp.hidden if isinstance(layer, torch.nn.Linear))
    hidden = torch.relu(torch.relu(x @ first.weight.T + first.bias) @ second.weight.T + second.bias)
    assert torch.allclose(mlp(x), hidden @ mlp.down_proj.weight.T)


def test_token_shift_gives_predecessors_and_keeps_sequences_apart():
    x, state = torch.arange(10.0).view(1, 5, 2), -torch.ones(3, 2)
    shifted, last = token_shift(x, state[:1])
    assert torch.equal(shifted[0], torch.cat([state[:1], x[0, :-1]]))
    assert torch.equal(last, x[:, -1])
    shifted, last = token_shift(x, state, torch.tensor([0, 2, 2, 5]))
    assert torch.equal(shifted[0], torch.stack([state[0], x[0, 0], state[2], x[0, 2], x[0, 3]]))
    assert torch.equal(last, torch.stack([x[0, 1], state[1], x[0, 4]]))


def test_head_norm_is_a_group_norm_of_every_token():
    torch.manual_seed(0)
    layer, original, x = HeadNorm(3, 4, 1e-3), torch.nn.GroupNorm(3, 12, eps=1e-3), torch.randn(2, 5, 3, 4)
    with torch.no_grad():
        layer.weight.normal_()
        layer.bias.normal_()
    original.load_state_dict(layer.state_dict())
    assert torch.allclose(layer(x), original(x.reshape(10, 12)).view(2, 5, 12), atol=1e-6)


def test_low_rank_map_is_computed_in_float32():
    torch.manual_seed(0)
    layer, x = LowRankMap(6, 2, 5, torch.tanh).double(), torch.randn(3, 6, dtype=torch.float64)
    assert layer.bias is not None
    with torch.no_grad():
        layer.bias.normal_()
    expected = torch.tanh(x @ layer.down.weight.T) @ layer.up.weight.T + layer.bias
    assert torch.allclose(layer(x), expected)
    y = layer.bfloat16()(x.bfloat16())
    assert y.dtype == torch.float32
    assert torch.allclose(y.double(), expected, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_rms_norm_is_its_formula_in_the_dtype_of_the_products_after_it(autocast, dtype):
    x = (100 * torch.randn(3, 5, 16)).to(dtype).requires_grad_()
    norm = RMSNorm(16, eps=1e-5).to(torch.float32 if autocast and dtype != torch.float64 else dtype)
    torch.nn.init.uniform_(norm.weight, 0.5, 2.0)
    wide = x.double().detach().requires_grad_()
    expected = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * norm.weight.double()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = norm(x)
    assert y.dtype == (torch.bfloat16 if autocast and dtype == torch.float32 else dtype)
    # The weight, the output and nothing else is rounded to bfloat16.
    tolerance = 2**-7 if torch.bfloat16 in (dtype, y.dtype) else 1e-6
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=0)
    d_y = torch.randn_like(expected).to(y.dtype)
    found, wanted = torch.autograd.grad(y, x, d_y)[0], torch.autograd.grad(expected, wide, d_y.double())[0]
    assert found.dtype == dtype
    assert (found.double() - wanted).norm() <= tolerance * wanted.norm()


class _Casts(TorchDispatchMode):
    """How many tensors of some shape are cast."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and args[0].shape == self.shape:
            self.count += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def cuda_autocast():
    """As `torch.autocast("cuda")`, which does nothing where there is no GPU."""
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_layer_after_a_norm_casts_its_output_under_autocast_on_a_gpu(dtype):
    """On tensors without numbers, which are on a GPU that need not be there."""
    shape = (2, 6, 8)
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad(), cuda_autocast():
        norm, weight = RMSNorm(8), torch.empty(8, 8)
        y = norm(torch.empty(shape, dtype=dtype))
        with _Casts(shape) as casts:
            out = F.linear(y, weight) + F.linear(y, weight)
        assert y.dtype == out.dtype == torch.bfloat16
        assert casts.count == 0
        with _Casts(shape) as casts:  # the check sees the casts of PyTorch's own norm
            F.linear(F.rms_norm(torch.empty(shape, dtype=dtype), (8,)), weight)
        assert casts.count > 0


@pytest.mark.gpu
def test_a_norm_of_bfloat16_is_one_kernel_on_a_gpu():
    x, norm = torch.randn(2, 6, 8, device="cuda", dtype=torch.bfloat16), RMSNorm(8).cuda()
    with torch.autocast("cuda", torch.bfloat16), _Casts(x.shape) as casts:
        y = norm(x)
    assert casts.count == 0
    assert y.dtype == torch.bfloat16
