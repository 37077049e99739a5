"""Transitions against matrices written out by hand, and the ranges of their eigenvalues."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from statetrack import Diagonal, Discretized, EigenvalueRange, Householder, LowRank


@pytest.mark.parametrize("value", [(-1, 1), [-1, 1], "-1,1", " -1 , 1.0", EigenvalueRange(-1, 1)])
def test_a_range_can_be_said_in_many_ways(value):
    assert EigenvalueRange.of(value) == EigenvalueRange(-1.0, 1.0)


@pytest.mark.parametrize("value", ["", "1", "0,1,2", "a,b", (0,), None, 3, "(-1,1)"])
def test_what_is_not_two_numbers_is_refused(value):
    with pytest.raises(ValueError, match="two numbers lo,hi"):
        EigenvalueRange.of(value)


@pytest.mark.parametrize("lo_hi", [(1, -1), (0, 0), (-1.1, 1), (-1, 1.5), (math.nan, 1), (0, math.inf)])
def test_a_range_outside_the_unit_interval_or_reversed_is_refused(lo_hi):
    with pytest.raises(ValueError, match="-1 <= lo < hi <= 1"):
        EigenvalueRange(*lo_hi)


@given(lo=st.floats(-1, 0.9), width=st.floats(0.01, 2), gate=st.floats(0, 1))
def test_widening_maps_the_unit_interval_onto_the_range(lo, width, gate):
    hi = min(1.0, lo + width)
    widened = EigenvalueRange(lo, hi).widen(torch.tensor(gate, dtype=torch.float64)).item()
    assert lo - 1e-12 <= widened <= hi + 1e-12
    assert widened == pytest.approx(lo + (hi - lo) * gate)


def test_the_ends_of_the_gate_are_exactly_the_ends_of_the_range():
    gate = torch.tensor([0.0, 1.0])
    assert EigenvalueRange(-1, 1).widen(gate).tolist() == [-1, 1]
    assert EigenvalueRange(-1, 1).householder_beta(gate).tolist() == [0, 2]
    assert EigenvalueRange(0, 1).householder_beta(gate).tolist() == [0, 1]
    assert EigenvalueRange(0, 1).widen(gate) is gate


def test_a_householder_range_must_end_at_one():
    with pytest.raises(ValueError, match="ends at 1"):
        EigenvalueRange(-1, 0.5).householder_beta(torch.zeros(1))


def test_a_unit_key_with_beta_two_is_a_reflection():
    k = torch.tensor([3.0, 4.0, 0.0]).view(1, 1, 1, 1, 3)
    reflection = Householder(k, torch.full((1, 1, 1, 1), 2.0), normalize=True).dense().squeeze()
    assert torch.allclose(reflection @ reflection, torch.eye(3), atol=1e-6)
    assert torch.det(reflection).item() == pytest.approx(-1)
    assert torch.allclose(reflection @ k.flatten(), -k.flatten(), atol=1e-5)


def test_factors_act_in_order_after_the_decay():
    torch.manual_seed(0)
    k = torch.randn(1, 1, 2, 1, 3, dtype=torch.float64)
    beta = torch.tensor([0.7, 1.3], dtype=torch.float64).view(1, 1, 2, 1)
    decay = torch.tensor([0.5, -1.0, 0.0], dtype=torch.float64).view(1, 1, 1, 3)
    first, second = (
        torch.eye(3, dtype=torch.float64) - b * torch.outer(key, key)
        for key, b in zip(k.view(2, 3), beta.flatten(), strict=True)
    )
    expected = second @ first @ torch.diag(decay.flatten())
    assert torch.allclose(Householder(k, beta, decay).dense().squeeze(), expected)


def test_two_reflections_make_a_rotation_with_non_real_eigenvalues():
    angles = torch.tensor([0.0, math.pi / 3], dtype=torch.float64)
    k = torch.stack([angles.cos(), angles.sin()], -1).view(1, 1, 2, 1, 2)
    eigenvalues = Householder(k, torch.full((1, 1, 2, 1), 2.0)).eigenvalues().flatten()
    assert eigenvalues.abs().tolist() == pytest.approx([1, 1])
    assert sorted(eigenvalues.angle().tolist()) == pytest.approx([-2 * math.pi / 3, 2 * math.pi / 3])


def test_a_zero_key_normalized_is_the_identity_with_finite_gradients():
    k = torch.zeros(1, 1, 1, 1, 4, requires_grad=True)
    beta = torch.full((1, 1, 1, 1), 2.0, requires_grad=True)
    dense = Householder(k, beta, normalize=True).dense()
    dense.sum().backward()
    assert torch.equal(dense.squeeze().detach(), torch.eye(4))
    assert k.grad is not None
    assert beta.grad is not None
    assert torch.isfinite(k.grad).all()
    assert torch.isfinite(beta.grad).all()


def test_normalize_uses_the_norm_of_the_key_as_it_was_rounded():
    torch.manual_seed(0)
    k = torch.nn.functional.normalize(torch.randn(1, 50, 1, 1, 16), dim=-1).bfloat16()
    beta = torch.full((1, 50, 1, 1), 2.0)
    lowest = Householder(k, beta, normalize=True).eigenvalues().real.amin(-1)
    assert lowest.flatten().tolist() == pytest.approx([-1] * 50, abs=1e-6)
    rounded = Householder(k, beta).eigenvalues().real.amin(-1)
    assert (rounded + 1).abs().max() > 1e-3


@given(n=st.integers(1, 4), seed=st.integers(0, 1000))
def test_products_of_factors_in_the_range_never_expand(n, seed):
    generator = torch.Generator().manual_seed(seed)
    k = torch.randn(1, 3, n, 2, 5, generator=generator, dtype=torch.float64)
    beta = 2 * torch.rand(1, 3, n, 2, generator=generator, dtype=torch.float64)
    transition = Householder(k, beta, normalize=True)
    assert torch.linalg.matrix_norm(transition.dense(), 2).max() <= 1 + 1e-10
    assert transition.eigenvalues().abs().max() <= 1 + 1e-10


@pytest.mark.parametrize("lo_hi", [(0, 1), (-1, 1), (-0.5, 0.25)])
def test_discretized_eigenvalues_stay_in_the_range_and_reach_its_ends(lo_hi):
    lo, hi = lo_hi
    dt = torch.tensor([0.0, 0.3, 1e4]).view(1, 3, 1, 1).expand(1, 3, 1, 2)
    transition = Discretized(dt, -torch.ones(1, 4, 2), EigenvalueRange(lo, hi))
    eigenvalues = transition.eigenvalues()
    assert eigenvalues.shape == transition.dense().shape[:-1] == (1, 3, 1, 2, 4)
    assert eigenvalues[0, :, 0, 0, 0].real.tolist() == pytest.approx([hi, lo + (hi - lo) * math.exp(-0.3), lo])
    assert torch.equal(transition.dense().diagonal(dim1=-2, dim2=-1).double(), eigenvalues.real)


def test_shapes_that_do_not_go_together_are_refused():
    k, beta = torch.zeros(2, 3, 1, 4, 5), torch.zeros(2, 3, 1, 4)
    with pytest.raises(ValueError, match=r"k must be \[B, T, N, H, K\]"):
        Householder(k[:, :, 0], beta)
    with pytest.raises(ValueError, match=r"beta must be \[B, T, N, H\]"):
        Householder(k, beta[..., 0])
    with pytest.raises(ValueError, match="decay must be"):
        Householder(k, beta, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="at least one factor"):
        Householder(k[..., :0], beta)
    with pytest.raises(ValueError, match="must share H and V"):
        Discretized(torch.zeros(2, 3, 1, 4), torch.zeros(1, 2, 5))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("decay", [None, "head", "channel"])
@pytest.mark.parametrize("factors", [1, 2, 3, 6])
def test_eigenvalues_of_few_factors_are_those_of_the_matrix(factors, decay, normalize):
    """Traces of powers tell whether all eigenvalues are right, however they are ordered."""
    torch.manual_seed(0)
    k = torch.randn(2, 5, factors, 3, 5, dtype=torch.float64)
    k[0, 0] = 0  # no reflection at all
    k[0, 1] = k[0, 1, :1]  # the same one again and again
    beta = torch.rand(2, 5, factors, 3, dtype=torch.float64) * 2
    beta[0, 1], beta[1, 0] = 2, 0
    shape = {None: None, "head": (2, 5, 3), "channel": (2, 5, 3, 5)}[decay]
    decays = None if shape is None else torch.rand(shape, dtype=torch.float64) * 2 - 1
    transition = Householder(k * 0.5, beta, decays, normalize)
    values, dense = transition.eigenvalues(), transition.dense()
    assert values.shape == dense.shape[:-1]
    power = dense
    for exponent in range(1, 6):
        traces = power.diagonal(dim1=-2, dim2=-1).sum(-1)
        assert torch.allclose((values**exponent).sum(-1), traces.to(values.dtype), atol=1e-9)
        power = power @ dense


def test_eigenvalues_of_float32_are_not_rounded_to_float32():
    k = torch.tensor([3.0, 4.0, 0.0]).view(1, 1, 1, 1, 3)
    beta = torch.tensor(2 - 1e-6).view(1, 1, 1, 1)
    lowest = Householder(k, beta, normalize=True).eigenvalues().real.min()
    assert float(lowest) == pytest.approx(1 - float(beta), abs=1e-14)


def test_not_a_number_has_no_eigenvalues():
    with pytest.raises(ValueError, match="NaN or infinite"):
        Householder(torch.full((1, 1, 1, 1, 2), math.nan), torch.ones(1, 1, 1, 1)).eigenvalues()


@pytest.mark.parametrize("lo", [-1.0, -0.4, 0.0, 0.3])
def test_a_removal_takes_a_decay_down_to_the_lower_end(lo):
    gate, decay = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64), 0.6
    removal = EigenvalueRange(lo, 1).removal(gate, decay)
    assert (decay - removal).tolist() == pytest.approx([decay, (decay + lo) / 2, lo])
    own_end = torch.tensor(lo, dtype=torch.float64)
    assert torch.allclose(EigenvalueRange(0, 1).removal(gate, decay, own_end), removal)
    assert torch.allclose(EigenvalueRange(lo, 1).removal(gate, 1.0), EigenvalueRange(lo, 1).householder_beta(gate))


@pytest.mark.parametrize(
    ("bounds", "message"), [((-1, 0.5), "ends at 1"), ((0.6, 1), "starts below the smallest decay")]
)
def test_a_removal_that_no_gate_gives_is_refused(bounds, message):
    with pytest.raises(ValueError, match=message):
        EigenvalueRange(*bounds).removal(torch.zeros(1), 0.6)


@pytest.mark.parametrize("kind", [Diagonal, Discretized, Householder, LowRank])
def test_a_transition_names_all_its_tensors(kind):
    tensors = [field.name for field in dataclasses.fields(kind) if "Tensor" in str(field.type)]
    assert list(kind.names) == tensors
    assert set(kind.identity) <= set(tensors)
