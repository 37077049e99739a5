"""Mamba between its projections by Triton kernels: under the interpreter, and on a GPU (marked `gpu`)."""

import pytest
import torch
from cases import TOLERANCE, relative_error, uninitialized_memory_is_nan
from torch.func import functional_call, vmap
from torch.nn import functional as F
from triton_cases import interpreted

from statetrack import Mamba
from statetrack.ops import linear_recurrence, triton_selective
from statetrack.ops.triton_common import CHECKED_ON_A_CARD, ON_REQUEST
from statetrack.ops.triton_selective import selective_scan
from statetrack.transition import Discretized, EigenvalueRange

RANGES = [EigenvalueRange(0, 1), EigenvalueRange(-1, 1), EigenvalueRange(-1, 0.5)]
NAMES = ("u", "raw", "bias", "A", "lower_end", "write", "q", "D", "z", "initial_state")


def make_inputs(b, t, k, v, *, dtype=torch.float32, lower_end=False, initial=True, device="cpu"):
    """Activations in `dtype`, parameters in float32; z and what x_proj gives are parts of wider tensors."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    # On the device before they are cut: to move a part is to copy it.
    pair, projected = (randn(b, t, size).to(device, dtype) for size in (2 * v, 2 * k + 3))
    inputs = {
        "u": randn(b, t, v).to(dtype), "raw": (3 * randn(b, t, v)).to(dtype), "bias": randn(v) - 2,
        "A": -randn(k, v).exp(), "lower_end": -torch.rand(v, generator=generator) if lower_end else None,
        "write": projected[..., 3 : 3 + k], "q": projected[..., 3 + k :], "D": randn(v), "z": pair[..., v:],
        "initial_state": randn(b, 1, k, v) if initial else None,
    }  # fmt: skip
    return {name: None if x is None else x.to(device).requires_grad_() for name, x in inputs.items()}


def formula(u, raw, bias, A, lower_end, write, q, D, z, initial_state, range_):
    dt = F.softplus(raw + bias)
    low = None if lower_end is None else lower_end.unsqueeze(0)
    o, state = linear_recurrence(
        Discretized(dt.unsqueeze(2), A.unsqueeze(0), range_, low),
        q.unsqueeze(2),
        (dt * u).unsqueeze(2),
        write=write.unsqueeze(2),
        initial_state=initial_state,
        backend="reference",
    )
    return (o.squeeze(2) + D * u) * F.silu(z), state


def results(function, inputs, range_):
    y, state = function(**inputs, **range_)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(x.shape, generator=generator).bfloat16().to(x) for x in (y, state)]
    given = {name: x for name, x in inputs.items() if x is not None}
    gradients = torch.autograd.grad([y, state], list(given.values()), weights)
    return {"y": y, "final state": state, **dict(zip(given, gradients, strict=True))}


def check(inputs, range_=RANGES[1], tolerance=None):
    """Values and every gradient, against the float64 step loop and PyTorch's operations of the same inputs."""
    wide = {name: None if x is None else x.detach().double().requires_grad_() for name, x in inputs.items()}
    exact = results(formula, wide, {"range_": range_})
    with uninitialized_memory_is_nan():
        computed = results(selective_scan, inputs, {"eigenvalue_range": range_})
    dtype, on_gpu = inputs["u"].dtype, inputs["u"].is_cuda
    # The interpreter cuts bits off where a GPU rounds to bfloat16, here three times from inputs to results.
    limit = tolerance or (2e-2 if dtype == torch.bfloat16 and not on_gpu else TOLERANCE[dtype])
    dtypes = {"y": dtype, "final state": torch.float32}
    for name, x in computed.items():
        assert x.dtype == (dtypes[name] if name in dtypes else inputs[name].dtype), name
        assert relative_error(x, exact[name]) <= limit, name


@interpreted
@pytest.mark.parametrize(
    ("dtype", "range_"),
    [*((torch.float32, range_) for range_ in RANGES), (torch.bfloat16, RANGES[1]), (torch.float16, RANGES[0])],
    ids=str,
)
def test_every_range_and_dtype_agrees_with_the_reference(dtype, range_):
    check(make_inputs(1, 9, 2, 3, dtype=dtype), range_)


@interpreted
@pytest.mark.parametrize(("b", "t", "k", "v"), [(1, 1, 1, 1), (3, 4, 3, 18), (1, 7, 2, 40)])
def test_every_shape_agrees_with_the_reference(b, t, k, v, monkeypatch):
    for name, value in {"_RUN": 2, "_TOKENS": 2, "_CHANNELS": 16}.items():
        monkeypatch.setattr(triton_selective, name, value)
    check(make_inputs(b, t, k, v, lower_end=True))
    check(make_inputs(b, t, k, v, initial=False))


@interpreted
def test_small_and_extreme_step_sizes_are_right():
    """The series of the softplus and its gradient, number by number."""
    raw = torch.tensor([-1e30, -104.0, -80, -30, -10, -7, -3, -1, -1e-4, 0, 1e-4, 0.5, 2, 9, 30, 1e4]).view(1, 1, -1)
    v = raw.shape[-1]
    # Of one step from nothing the output is the step size and its gradient the derivative.
    one, none = torch.ones(1, 1, v), torch.zeros(v)
    raw.requires_grad_()
    key, z = torch.ones(1, 1, 1), torch.full((1, 1, v), 40.0)
    y, _ = selective_scan(one, raw, none, -torch.ones(1, v), None, key, key, none, z, None, RANGES[0])
    exact = raw.detach().double().requires_grad_()
    expected = 40 * F.softplus(exact, threshold=50)
    found = (y, *torch.autograd.grad(y.sum(), raw))
    for a, b in zip(found, (expected, *torch.autograd.grad(expected.sum(), exact)), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=1e-35)


@interpreted
@pytest.mark.parametrize("used", [0, 1], ids=["y", "final state"])
def test_gradients_where_one_result_is_unused(used):
    inputs = make_inputs(1, 5, 2, 3, initial=False)
    given = [x for x in inputs.values() if x is not None]
    wide = {name: None if x is None else x.detach().double().requires_grad_() for name, x in inputs.items()}
    loss = selective_scan(**inputs, eigenvalue_range=RANGES[1])[used].square().sum()
    exact = formula(**wide, range_=RANGES[1])[used].square().sum()
    wanted = [x for x in wide.values() if x is not None]
    expected = torch.autograd.grad(exact, wanted, allow_unused=True)
    for a, b in zip(torch.autograd.grad(loss, given), expected, strict=True):
        assert relative_error(a, torch.zeros_like(a) if b is None else b) <= TOLERANCE[torch.float32]


@interpreted
def test_without_a_gradient_it_is_the_same():
    inputs = make_inputs(2, 9, 2, 5)
    with torch.no_grad():
        y, state = selective_scan(**inputs, eigenvalue_range=RANGES[1])
    expected = selective_scan(**inputs, eigenvalue_range=RANGES[1])
    assert torch.equal(y, expected[0])
    assert torch.equal(state, expected[1])


@interpreted
def test_a_gradient_of_a_gradient_is_refused():
    inputs = make_inputs(1, 5, 2, 3)
    y, _ = selective_scan(**inputs, eigenvalue_range=RANGES[1])
    (d_u,) = torch.autograd.grad(y.square().sum(), inputs["u"], create_graph=True)
    with pytest.raises(RuntimeError, match="gradients of gradients"):
        d_u.sum().backward()


@interpreted
@pytest.mark.parametrize(("save", "lower_end"), [(False, False), (True, True)])
def test_the_operators_fakes_tell_the_truth(save, lower_end):
    inputs = [
        None if x is None else torch.stack(2 * [x.detach()])
        for x in make_inputs(1, 3, 1, 2, lower_end=lower_end).values()
    ]
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(triton_selective._forward_op, (*inputs, -1.0, 1.0, save), test_utils=tests)
    y, state, tape = triton_selective._forward_op(*inputs, -1.0, 1.0, True)
    arguments = (*inputs[:-1], tape, -1.0, 1.0, torch.ones_like(y), torch.ones_like(state))
    torch.library.opcheck(triton_selective._backward_op, arguments, test_utils=tests)


def check_replicas(device="cpu", shared=("u", "A")):
    """Against one replica after the other; some tensors are the same for all."""
    one = make_inputs(2, 3, 2, 5, lower_end=True, device=device)
    names = [name for name in NAMES if name not in shared]
    many = {name: torch.stack([one[name].detach(), one[name].detach().flip(-1)]).requires_grad_() for name in names}
    given = [one[name] if name in shared else many[name] for name in NAMES]

    def both(function):
        y, state = function()
        weights = [torch.linspace(-1, 1, x.numel(), device=device).view(x.shape) for x in (y, state)]
        return [y, state, *torch.autograd.grad([y, state], given, weights)]

    def scan(*tensors):
        return selective_scan(*tensors, RANGES[1])

    def one_by_one():
        each = [scan(*(one[name] if name in shared else many[name][i] for name in NAMES)) for i in range(2)]
        return [torch.stack(parts) for parts in zip(*each, strict=True)]

    found = both(lambda: vmap(scan, tuple(None if name in shared else 0 for name in NAMES))(*given))
    for a, b in zip(found, both(one_by_one), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@interpreted
@pytest.mark.parametrize("shared", [("u", "A"), ("q", "z", "bias", "initial_state")], ids=str)
def test_replicas_and_what_they_share(shared):
    check_replicas(shared=shared)


@interpreted
def test_replicas_of_a_layer_are_the_layers(monkeypatch):
    layers = [Mamba(4, state_size=2, eigenvalue_range=(-1, 1)) for _ in range(2)]
    parameters = {name: torch.stack([x, layers[1].get_parameter(name)]) for name, x in layers[0].named_parameters()}
    x = torch.randn(2, 5, 4)
    monkeypatch.setattr(triton_selective, "PRIORITY", CHECKED_ON_A_CARD)
    y = vmap(lambda own: functional_call(layers[0], own, (x,)))(parameters)
    monkeypatch.setattr(triton_selective, "PRIORITY", ON_REQUEST)
    torch.testing.assert_close(y, torch.stack([layer(x) for layer in layers]), rtol=1e-5, atol=1e-5)


def layer_results(layer, x, state=None, *, device="cpu", dtype=None):
    state = None if state is None else {name: value.clone().requires_grad_() for name, value in state.items()}
    inputs = [x, *layer.parameters(), *(() if state is None else state.values())]
    with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
        y, after = layer.scan(x, state)
    outputs = [y, after["recurrence"]]
    weights = [torch.linspace(-1, 1, part.numel(), device=device).view(part.shape).to(part.dtype) for part in outputs]
    return [*outputs, *torch.autograd.grad(outputs, inputs, weights)]


@interpreted
@pytest.mark.parametrize(
    ("options", "carried"),
    [({}, False), ({"conv_size": 0, "eigenvalue_range": (0, 1)}, True), ({"learn_lower_end": True}, True)],
    ids=str,
)
def test_a_mamba_layer_is_the_same_with_and_without_them(options, carried, monkeypatch):
    layer = Mamba(6, state_size=3, **{"eigenvalue_range": (-1, 1)} | options)
    x, state, calls = torch.randn(2, 4, 6, requires_grad=True), None, []
    if carried:
        _, state = layer.scan(torch.randn(2, 1, 6))
        state = {name: value.detach() for name, value in state.items()}
    monkeypatch.setattr(triton_selective, "PRIORITY", ON_REQUEST)
    expected = layer_results(layer, x, state)
    monkeypatch.setattr(triton_selective, "PRIORITY", CHECKED_ON_A_CARD)
    scan = triton_selective.selective_scan
    monkeypatch.setattr(triton_selective, "selective_scan", lambda *args: calls.append(1) or scan(*args))
    for a, b in zip(layer_results(layer, x, state), expected, strict=True):
        assert relative_error(a, b) < 2e-5
    assert calls == [1]
    layer.scan(x[:, :1])
    layer.scan(x[:1], cu_seqlens=torch.tensor([0, 1, 4]))
    assert calls == [1]


def test_kernels_that_no_card_has_checked_and_timed_are_not_used(monkeypatch):
    monkeypatch.setattr(triton_selective, "unavailable", lambda *tensors: None)
    x = torch.zeros(1, 2, 3)
    monkeypatch.setattr(triton_selective, "PRIORITY", ON_REQUEST)
    assert not triton_selective.serves(x, x, x, x)
    monkeypatch.setattr(triton_selective, "PRIORITY", CHECKED_ON_A_CARD)
    assert triton_selective.serves(x, x, x, x)
    assert not triton_selective.serves(x[:, :1], x, x, x)


@pytest.mark.gpu
@pytest.mark.parametrize("range_", RANGES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("b", "t", "k", "v"), [(2, 150, 16, 256), (1, 700, 5, 40), (3, 65, 64, 64), (40, 33, 16, 200)])
def test_values_and_gradients_on_a_gpu(b, t, k, v, dtype, range_):
    check(make_inputs(b, t, k, v, dtype=dtype, lower_end=v == 40, device="cuda"), range_)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_a_layer_on_a_gpu_is_the_same_with_and_without_them(dtype, monkeypatch):
    layer, x = Mamba(128, eigenvalue_range=(-1, 1)).cuda(), torch.randn(4, 300, 128, device="cuda", requires_grad=True)
    found = []
    for priority in (ON_REQUEST, CHECKED_ON_A_CARD):
        monkeypatch.setattr(triton_selective, "PRIORITY", priority)
        found.append(layer_results(layer, x, device="cuda", dtype=dtype))
    for a, b in zip(*found, strict=True):
        assert relative_error(b, a) < (1e-4 if dtype is None else 2e-2)


@pytest.mark.gpu
def test_replicas_on_a_gpu():
    check_replicas("cuda")


@pytest.mark.gpu
def test_gradients_on_a_gpu_are_the_same_every_time():
    inputs = make_inputs(8, 700, 16, 512, dtype=torch.bfloat16, device="cuda")
    first, second = (results(selective_scan, inputs, {"eigenvalue_range": RANGES[1]}) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.gpu
def test_no_other_batch_compiles_a_kernel_again_on_a_gpu():
    kernels, counts = triton_selective._kernels(), []
    for b, t in ((1, 160), (5, 33), (16, 64), (3, 1000)):
        check(make_inputs(b, t, 4, 96, device="cuda"), tolerance=1e-3)
        names = ("before", "after", "after_backward", "before_backward")
        counts.append([len(getattr(kernels, name).device_caches[0][0]) for name in names])
    assert counts == counts[:1] * len(counts)
