"""sLSTM's Triton kernels against the operator in float64: in Triton's interpreter, and on a GPU (marked `gpu`)."""

import pytest
import torch
from cases import relative_error, uninitialized_memory_is_nan
from triton_cases import interpreted

from statetrack.ops import slstm as operators
from statetrack.ops import triton_slstm
from statetrack.ops.slstm import slstm

NAMES = ("z", "i", "f", "o", "bias", "recurrent", "h", "c", "n")


def make_inputs(b, t, h, n, *, start, device="cpu", dtype=torch.float32):
    """Inputs, bias, R, and a state before the first token: that of a sequence's start, or one in its middle."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator).to(device)

    state = [torch.zeros(b, h, n, device=device) for _ in range(3)] + [torch.full((b, h, n), -torch.inf, device=device)]
    if not start:
        state = [randn(b, h, n), randn(b, h, n), 1 + randn(b, h, n).abs(), randn(b, h, n)]
    inputs = [2 * randn(b, t, h, n) for _ in range(4)]
    return [*(x.to(dtype) for x in inputs), randn(h, 4 * n), randn(h, n, 4 * n) / n**0.5, *state]


def results(inputs, backend, *, of_states=True):
    """States, and gradients of what does not depend on the stabilizer: of h, and with `of_states` of c and n each."""
    leaves = [x.clone().requires_grad_() for x in inputs[:9]]
    states = slstm(leaves[:4], *leaves[4:6], (*leaves[6:], inputs[9]), backend)
    generator = torch.Generator().manual_seed(1)
    parts = states[:3] if of_states else states[:1]
    loss = sum((x * torch.randn(x.shape, generator=generator).to(x)).sum() for x in parts)
    gradients = torch.autograd.grad(loss, leaves)
    named = {f"gradient of {name}": x for name, x in zip(NAMES, gradients, strict=True)}
    return dict(zip("hcnm", states, strict=True)) | named


def check(*sizes, device="cpu", dtype=torch.float32, of_states=True, **options):
    inputs = make_inputs(*sizes, device=device, dtype=dtype, **options)
    exact = results([x.double() for x in inputs], "torch", of_states=of_states)
    with uninitialized_memory_is_nan():
        computed = results(inputs, "triton", of_states=of_states)
        again = results(inputs, "triton", of_states=of_states)
    errors = {name: relative_error(computed[name], expected) for name, expected in exact.items()}
    rounded = {f"gradient of {name}" for name in "zifo"} if dtype == torch.bfloat16 else set()
    wrong = {name: error for name, error in errors.items() if not error <= (3e-3 if name in rounded else 2e-5)}
    assert not wrong, wrong
    assert all(x.dtype == (dtype if name in rounded else torch.float32) for name, x in computed.items())
    assert all(torch.equal(x, again[name]) for name, x in computed.items())


@interpreted
@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("sizes", [(2, 1, 1, 3), (3, 9, 2, 5), (17, 6, 1, 16), (2, 4, 2, 40)], ids=str)
def test_states_and_gradients_agree_with_float64(sizes, start):
    check(*sizes, start=start)


@interpreted
def test_states_that_nobody_asks_about_have_no_gradient():
    check(3, 5, 2, 4, start=True, of_states=False)


@interpreted
def test_gates_that_overflow_an_exponential_are_stabilized():
    inputs = make_inputs(2, 7, 1, 4, start=True)
    inputs[1] += 1000
    computed, expected = (
        slstm(x[:4], *x[4:6], x[6:], backend)
        for x, backend in ((inputs, "triton"), ([x.double() for x in inputs], "torch"))
    )
    # Near 1000 two float32 numbers are 6e-5 apart.
    assert all(relative_error(a, e) < 1e-3 for a, e in zip(computed[:3], expected[:3], strict=True))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=interpreted)])
def test_operators_tell_the_truth_about_themselves(backend, groups):
    """Groups of rows have parameters of their own; of a single group a permuted tensor need not be a copy."""
    forward, backward = {
        "torch": (operators._forward_op, operators._backward_op),
        "triton": (operators._triton_forward_op, operators._triton_backward_op),
    }[backend]
    inputs = make_inputs(4, 3, 2, 5, start=False)
    inputs[4:6] = torch.randn(groups, 2, 20), torch.randn(groups, 2, 5, 20)
    for save in (True, False):
        torch.library.opcheck(forward, (*inputs, save), test_utils=("test_schema", "test_faketensor"))
    *states, gates = forward(*inputs, True)
    for d_c in (torch.randn_like(states[1]), None):
        gradients = (torch.randn_like(states[0]), d_c, d_c)
        arguments = (gates[0], inputs[5], *inputs[6:], *states, *gradients, torch.bfloat16)
        torch.library.opcheck(backward, arguments, test_utils=("test_schema", "test_faketensor"))


def test_what_is_not_served_is_said(monkeypatch):
    inputs = make_inputs(1, 2, 1, 65, start=True)
    parts, bias, recurrent, state = inputs[:4], inputs[4], inputs[5], inputs[6:]
    with pytest.raises(ValueError, match="must be auto, torch or triton, got 'fast'"):
        slstm(parts, bias, recurrent, state, "fast")
    monkeypatch.setattr("statetrack.ops.triton_common.HAS_TRITON", False)
    with pytest.raises(ValueError, match="can't serve sLSTM: the package triton is not installed"):
        slstm(parts, bias, recurrent, state, "triton")
    monkeypatch.setattr("statetrack.ops.triton_common.HAS_TRITON", True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "up to 64 channels, not 65" in (triton_slstm.supports(parts, recurrent) or "")
    assert "does not serve float64" in (triton_slstm.supports(parts, recurrent[:, :8, :32].double()) or "")
    assert "compute in float32, not torch.float16" in (triton_slstm.supports(parts, recurrent.half()) or "")


def test_gradients_of_gradients_are_refused():
    inputs = [x.requires_grad_() for x in make_inputs(1, 2, 1, 4, start=True)[:6]]
    state = make_inputs(1, 2, 1, 4, start=True)[6:]
    h = slstm(inputs[:4], *inputs[4:], state)[0]
    (gradient,) = torch.autograd.grad(h.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="gradients of gradients are not computed"):
        gradient.sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("sizes", [(256, 64, 4, 32), (5, 33, 2, 64), (16, 100, 4, 16), (40, 17, 3, 40)], ids=str)
def test_states_and_gradients_on_a_gpu(sizes, start, dtype):
    check(*sizes, start=start, device="cuda", dtype=dtype, of_states=start)
