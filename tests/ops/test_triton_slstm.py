"""sLSTM's Triton kernels against the operator in float64: in Triton's interpreter, and on a GPU (marked `gpu`)."""

import pytest
import torch
from cases import relative_error, uninitialized_memory_is_nan
from triton_cases import interpreted

from statetrack.ops import slstm as operators
from statetrack.ops import triton_slstm
from statetrack.ops.slstm import slstm


def make_inputs(t, h, b, n, *, start, device="cpu"):
    """Gates, R, and a state before the first token: that of a sequence's start, or one in its middle."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator).to(device)

    state = [torch.zeros(h, b, n, device=device) for _ in range(3)] + [torch.full((h, b, n), -torch.inf, device=device)]
    if not start:
        state = [randn(h, b, n), randn(h, b, n), 1 + randn(h, b, n).abs(), randn(h, b, n)]
    return [2 * randn(t, h, b, 4 * n), randn(h, n, 4 * n) / n**0.5, *state]


def results(inputs, backend):
    """States, and gradients of what does not depend on the stabilizer, and of h, c and n each."""
    leaves = [x.clone().requires_grad_() for x in inputs[:5]]
    h, c, n, m = slstm(leaves[0], leaves[1], (*leaves[2:], inputs[5]), backend)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(h.shape, generator=generator).to(h) for _ in range(3)]
    gradients = torch.autograd.grad(sum((x * w).sum() for x, w in zip((h, c, n), weights, strict=True)), leaves)
    names = ("gates", "recurrent", "h", "c", "n")
    return {"h": h, "c": c, "n": n, "m": m, **{f"gradient of {k}": g for k, g in zip(names, gradients, strict=True)}}


def check(*sizes, start, device="cpu"):
    inputs = make_inputs(*sizes, start=start, device=device)
    exact = results([x.double() for x in inputs], "torch")
    with uninitialized_memory_is_nan():
        computed = results(inputs, "triton")
    errors = {name: relative_error(computed[name], expected) for name, expected in exact.items()}
    assert all(error <= 2e-5 for error in errors.values()), errors
    assert all(x.dtype == torch.float32 for x in computed.values())


@interpreted
@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (9, 2, 3, 5), (6, 1, 17, 16), (4, 2, 2, 40)], ids=str)
def test_states_and_gradients_agree_with_float64(sizes, start):
    check(*sizes, start=start)


@interpreted
def test_gates_that_overflow_an_exponential_are_stabilized():
    gates, recurrent, *state = make_inputs(7, 1, 2, 4, start=True)
    gates[..., 4:8] += 1000
    computed = slstm(gates, recurrent, tuple(state), "triton")
    expected = slstm(gates.double(), recurrent.double(), tuple(x.double() for x in state), "torch")
    # Near 1000 two float32 numbers are 6e-5 apart.
    assert all(relative_error(a, e) < 1e-3 for a, e in zip(computed[:3], expected[:3], strict=True))


@interpreted
def test_operators_tell_the_truth_about_themselves():
    inputs = make_inputs(3, 2, 2, 5, start=False)
    torch.library.opcheck(operators._triton_forward_op, inputs, test_utils=("test_schema", "test_faketensor"))
    states = operators._triton_forward_op(*inputs)
    arguments = (*inputs, *states, *(torch.randn_like(x) for x in states[:3]))
    torch.library.opcheck(operators._triton_backward_op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_what_is_not_served_is_said(monkeypatch):
    gates, recurrent, *state = make_inputs(2, 1, 1, 65, start=True)
    with pytest.raises(ValueError, match="must be auto, torch or triton, got 'fast'"):
        slstm(gates, recurrent, tuple(state), "fast")
    monkeypatch.setattr("statetrack.ops.triton_common.HAS_TRITON", False)
    with pytest.raises(ValueError, match="can't serve sLSTM: the package triton is not installed"):
        slstm(gates, recurrent, tuple(state), "triton")
    monkeypatch.setattr("statetrack.ops.triton_common.HAS_TRITON", True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "up to 64 channels, not 65" in (triton_slstm.supports(gates, recurrent) or "")
    small = recurrent[:, :8, :32].double()
    assert "does not serve float64" in (triton_slstm.supports(gates.double(), small) or "")


@pytest.mark.gpu
@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("sizes", [(64, 4, 256, 32), (33, 2, 5, 64), (100, 4, 16, 16), (17, 3, 40, 40)], ids=str)
def test_states_and_gradients_on_a_gpu(sizes, start):
    check(*sizes, start=start, device="cuda")
