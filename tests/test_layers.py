"""The layers against PyTorch's own convolution and formulas."""

import types
from contextlib import contextmanager

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from statetrack import layers
from statetrack.layers import (
    GatedMLP,
    HeadNorm,
    LowRankMap,
    ReLUMLP,
    RMSNorm,
    ShortConvolution,
    gated_halves,
    joined_product,
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


@pytest.fixture
def joined_on_cpu(monkeypatch):
    monkeypatch.setattr(layers, "_JOINED_ON", ("cpu",))


def several(*outputs, inputs=6):
    return [torch.nn.Linear(inputs, size, bias=False) for size in outputs]


def joined_linear(x, *linears):
    """What the layers return, from one product where they are joined."""
    product = joined_product(x, *linears)
    if product is None:
        return tuple(linear(x) for linear in linears)
    return product.split([linear.weight.shape[0] for linear in linears], -1)


@pytest.fixture(params=[0, 2**20], ids=["none is kept", "small ones are kept"])
def kept(request, monkeypatch):
    monkeypatch.setattr(layers, "_KEPT_BYTES", request.param)


@pytest.mark.usefixtures("kept", "joined_on_cpu")
@pytest.mark.parametrize("multiple", [1, 16])
def test_layers_joined_are_each_alone_and_so_are_their_gradients(multiple):
    linears, x = several(5, 7, 1), torch.randn(3, 11, 6, requires_grad=True)
    weights = [linear.weight for linear in linears]
    product = joined_product(x, *linears, multiple=multiple)
    assert product is not None
    assert product.shape == (3, 11, 13 if multiple == 1 else 16)
    assert torch.equal(product[..., 13:], torch.zeros_like(product[..., 13:]))
    y = product[..., :13].split([5, 7, 1], -1)
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, *weights)]
    expected = [wide[0] @ weight.mT for weight in wide[1:]]
    d = [torch.randn_like(part) for part in y]
    found = [*y, *torch.autograd.grad(y, [x, *weights], d)]
    exact = [*expected, *torch.autograd.grad(expected, wide, [part.double() for part in d])]
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_joined_layers_are_views_of_one_tensor(joined_on_cpu):
    y = joined_linear(torch.randn(20, 6), *several(5, 7))
    assert [part.shape for part in y] == [(20, 5), (20, 7)]
    assert len({part.untyped_storage().data_ptr() for part in y}) == 1


def test_joined_weights_are_rounded_as_autocast_rounds_them(joined_on_cpu, monkeypatch):
    linears, x = several(5, 7), torch.randn(20, 6, requires_grad=True)
    inputs, d = [x, *(linear.weight for linear in linears)], torch.randn(20, 12).bfloat16()
    found = []
    for join in (True, False):
        monkeypatch.setattr(layers, "JOIN", join)
        with torch.autocast("cpu", torch.bfloat16):
            y = joined_linear(x, *linears)
        gradients = torch.autograd.grad(y, inputs, d.split([5, 7], -1))
        assert [part.dtype for part in (*y, *gradients)] == [torch.bfloat16] * 2 + [torch.float32] * 3
        found.append((*y, *gradients))
    # The gradient of x is a sum that is rounded once, not twice.
    torch.testing.assert_close(*found, rtol=2**-6, atol=2**-6)
    assert all(torch.equal(a, b) for a, b in zip(found[0][:2], found[1][:2], strict=True))


@pytest.mark.usefixtures("kept", "joined_on_cpu")
def test_weights_of_two_dtypes_are_joined_under_autocast(monkeypatch):
    """As FSDP gathers them: what is for products alone in bf16, the rest in float32."""
    linears, x = several(5, 7), torch.randn(20, 6, requires_grad=True)
    linears[0].bfloat16()
    inputs, d = [x, *(linear.weight for linear in linears)], torch.randn(20, 12).bfloat16()
    found = []
    for join in (True, False):
        monkeypatch.setattr(layers, "JOIN", join)
        with torch.autocast("cpu", torch.bfloat16):
            assert (joined_product(x, *linears) is not None) is join
            y = joined_linear(x, *linears)
        gradients = torch.autograd.grad(y, inputs, d.split([5, 7], -1))
        assert [g.dtype for g in gradients] == [torch.float32, torch.bfloat16, torch.float32]
        found.append((*y, *gradients))
    torch.testing.assert_close(*found, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_copy_of_weights_in_the_dtype_of_the_product_is_kept(dtype, joined_on_cpu, monkeypatch):
    monkeypatch.setattr(layers, "_KEPT_BYTES", 5 * 6 * dtype.itemsize)
    linears, x = several(5, 7), torch.randn(20, 6, dtype=dtype, requires_grad=True)
    for linear in linears:
        linear.to(dtype)
    saved, own = [], {x.data_ptr(), *(linear.weight.data_ptr() for linear in linears)}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        assert joined_product(x, *linears) is not None
    assert set(saved) == own


@pytest.mark.usefixtures("kept", "joined_on_cpu")
def test_a_frozen_layer_among_the_joined_has_no_gradient():
    first, second = several(5, 7)
    first.weight.requires_grad_(False)
    sum(y.sum() for y in joined_linear(torch.randn(20, 6), first, second)).backward()
    assert first.weight.grad is None
    assert second.weight.grad is not None


@pytest.mark.usefixtures("kept", "joined_on_cpu")
def test_gradients_of_gradients_of_joined_layers(monkeypatch):
    mlp, x = GatedMLP(4, 6), torch.randn(20, 4, requires_grad=True)
    found = []
    for join in (True, False):
        monkeypatch.setattr(layers, "JOIN", join)
        first = torch.autograd.grad(mlp(x).square().sum(), [x, *mlp.parameters()], create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), [x, *mlp.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


class _Scaled(torch.nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class _Negative(torch.nn.Module):
    def forward(self, weight):
        return -weight


def _patched(linear):
    linear.forward = types.MethodType(lambda self, x: F.linear(x, 3 * self.weight), linear)


STANDS_BETWEEN = {
    "a forward hook": lambda linear: linear.register_forward_hook(lambda module, inputs, output: 2 * output),
    "a hook before": lambda linear: linear.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],)),
    "a backward hook": lambda linear: linear.register_full_backward_hook(lambda module, d_x, d_y: (2 * d_x[0],)),
    "a parametrization": lambda linear: parametrize.register_parametrization(linear, "weight", _Negative()),
    "another forward": _patched,
    "another class": lambda linear: setattr(linear, "__class__", _Scaled),
    "another dtype": lambda linear: linear.bfloat16(),
    "a bias": lambda linear: setattr(linear, "bias", torch.nn.Parameter(torch.ones(7))),
}


@pytest.mark.parametrize("change", STANDS_BETWEEN.values(), ids=STANDS_BETWEEN)
def test_what_stands_between_a_layer_and_its_weight_keeps_it_alone(change, joined_on_cpu):
    linears, x = several(5, 7), torch.randn(20, 6)
    assert joined_product(x, *linears) is not None
    change(linears[1])
    assert joined_product(x, *linears) is None
    if linears[1].weight.dtype == torch.float32:
        y = joined_linear(x, *linears)
        assert all(torch.equal(part, linear(x)) for part, linear in zip(y, linears, strict=True))


def test_where_layers_are_not_joined(joined_on_cpu, monkeypatch):
    linears, x = several(5, 7), torch.randn(20, 6)
    assert joined_product(x[:11], *linears) is None  # fewer tokens than outputs
    assert joined_product(x.double(), *(linear.double() for linear in several(5, 7))) is None
    seen = []
    vmap(lambda x: seen.append(joined_product(x, *linears)) or x)(x.expand(2, 20, 6))
    assert seen == [None]
    hook = torch.nn.modules.module.register_module_forward_hook(lambda module, inputs, output: None)
    assert joined_product(x, *linears) is None
    hook.remove()
    assert joined_product(x, *linears) is not None
    monkeypatch.setattr(layers, "JOIN", False)
    assert joined_product(x, *linears) is None
    monkeypatch.undo()
    assert joined_product(x, *linears) is None  # on a CPU


def test_a_gated_mlp_is_the_same_with_one_product(joined_on_cpu, monkeypatch):
    mlp, x = GatedMLP(4, 6), torch.randn(2, 30, 4, requires_grad=True)
    names, inputs = list(mlp.state_dict()), [x, *mlp.parameters()]
    found = []
    for join in (True, False):
        monkeypatch.setattr(layers, "JOIN", join)
        y = mlp(x)
        again = checkpoint(mlp, x, use_reentrant=False)
        assert torch.equal(y, again)
        gradients = torch.autograd.grad(y.square().sum(), inputs)
        torch.testing.assert_close(torch.autograd.grad(again.square().sum(), inputs), gradients, rtol=0, atol=0)
        found.append((y, *gradients))
    torch.testing.assert_close(*found)
    assert list(mlp.state_dict()) == names == ["gate_proj.weight", "up_proj.weight", "down_proj.weight"]


def test_a_gated_mlp_with_one_product_compiles_in_one_graph(joined_on_cpu):
    torch._dynamo.reset()
    mlp, x = GatedMLP(4, 6), torch.randn(2, 30, 4, requires_grad=True)
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    for length in (30, 2):
        inputs = [part := x[:, :length].detach().requires_grad_(), *mlp.parameters()]
        y, expected = compiled(part), mlp(part)
        torch.testing.assert_close(y, expected)
        gradients = torch.autograd.grad(y.square().sum(), inputs)
        torch.testing.assert_close(gradients, torch.autograd.grad(expected.square().sum(), inputs))


def test_two_halves_are_gated():
    both = torch.randn(3, 8)
    assert torch.equal(gated_halves(both, "sigmoid"), torch.sigmoid(both[:, :4]) * both[:, 4:])
    assert torch.equal(gated_halves(both), F.silu(both[:, :4]) * both[:, 4:])


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


class _Calls(TorchDispatchMode):
    """The operations, by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_joined_layers_are_one_product_forward_and_two_backward(joined_on_cpu):
    linears, x = several(6, 6, 2, inputs=8), torch.randn(4, 32, 8).bfloat16().requires_grad_()
    weights = [linear.weight for linear in linears]
    with torch.autocast("cpu", torch.bfloat16), _Calls() as calls:
        y = joined_product(x, *linears, multiple=16)
        assert y is not None
        d_x, *d_weights = torch.autograd.grad(y, [x, *weights], torch.ones_like(y))
    assert (y.shape, y.dtype, d_x.dtype) == ((4, 32, 16), torch.bfloat16, torch.bfloat16)
    assert [(d.shape, d.dtype) for d in d_weights] == [(weight.shape, torch.float32) for weight in weights]
    assert [name for name in calls.names if name in ("mm", "addmm", "bmm", "linear", "matmul")] == ["mm"] * 3
    assert calls.names.count("_foreach_copy_") == 1  # joins and casts the weights
    assert calls.names.count("_to_copy") == 1  # of their gradients
    assert "cat" not in calls.names


def test_layers_are_joined_on_a_gpu():
    """On tensors without numbers, which are on a GPU that need not be there."""
    linears = several(6, 6, 2, inputs=8)
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad(), cuda_autocast():
        for linear in linears:
            linear.weight = torch.nn.Parameter(torch.empty(linear.weight.shape))
        y = joined_product(torch.empty(4, 32, 8), *linears)
        assert y is not None
        assert (y.shape, y.dtype) == ((4, 32, 14), torch.bfloat16)


@pytest.mark.gpu
def test_a_norm_of_bfloat16_is_one_kernel_on_a_gpu():
    x, norm = torch.randn(2, 6, 8, device="cuda", dtype=torch.bfloat16), RMSNorm(8).cuda()
    with torch.autocast("cuda", torch.bfloat16), _Casts(x.shape) as casts:
        y = norm(x)
    assert casts.count == 0
    assert y.dtype == torch.bfloat16
