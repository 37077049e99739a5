"""One token: the step that "auto" takes for every kind of transition, against the reference."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import TOLERANCE, Case, check_against_reference

from statetrack.ops.step import in_place_steps
from statetrack.transition import Diagonal, Discretized, EigenvalueRange, Householder, LowRank

B, H, N, K, V = 2, 3, 2, 5, 7
KINDS = [
    "householder", "householder, raw", "householder, head", "householder, channel", "diagonal, head",
    "diagonal, channel", "low rank, head", "low rank, channel", "discretized", "discretized, lower end",
]  # fmt: skip


def make_case(
    kind: str, dtype: torch.dtype = torch.float64, sizes: tuple[int, int, int, int, int] = (B, H, N, K, V)
) -> Any:
    """A token of a kind; sizes are B, H, N, K, V."""
    b, h, n, key_dim, value_dim = sizes
    generator = torch.Generator().manual_seed(0)
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def uniform(*shape):
        return (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1).to(state_dtype)

    decay = {"head": uniform(b, 1, h), "channel": uniform(b, 1, h, key_dim)}.get(kind.rpartition(", ")[2])
    write = None if kind.startswith("householder") else randn(b, 1, h, key_dim).to(dtype)
    values = randn(*((b, 1, n, h, value_dim) if write is None else (b, 1, h, value_dim))).to(dtype)
    if kind.startswith("householder"):
        beta, keys = uniform(b, 1, n, h) + 1, randn(b, 1, n, h, key_dim)
        if "raw" in kind:  # of about length 1: longer ones' states would leave float16
            keys /= key_dim**0.5
        transition = Householder(keys.to(dtype), beta, decay, normalize="raw" not in kind)
    elif kind.startswith("diagonal"):
        assert decay is not None
        transition = Diagonal(decay)
    elif kind.startswith("low rank"):
        assert decay is not None
        transition = LowRank(decay, randn(b, 1, h, key_dim).to(dtype), randn(b, 1, h, key_dim).to(dtype))
    else:
        dt, A = randn(b, 1, h, value_dim).abs().to(dtype), -randn(h, key_dim, value_dim).exp().to(state_dtype)
        lower_end = uniform(h, value_dim) if "lower end" in kind else None
        transition = Discretized(dt, A, EigenvalueRange(-1, 1), lower_end)
    state = randn(b, h, key_dim, value_dim).to(state_dtype)
    return Case(transition, randn(b, 1, h, key_dim).to(dtype), values, write, state)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_one_token_agrees_with_the_reference(kind, dtype):
    check_against_reference(make_case(kind, dtype), "auto")


@pytest.mark.parametrize("length", [0.9e-9, 1e-20, 1e-44])
@pytest.mark.parametrize("kind", ["householder", "householder, head"])
def test_short_keys_do_nothing(kind, length):
    case = make_case(kind, torch.float32)
    keys = case.transition.k.clone()
    keys[:, :, 1] *= length / keys[:, :, 1].norm(dim=-1, keepdim=True)
    check_against_reference(replace(case, transition=replace(case.transition, k=keys)), "auto")


@pytest.mark.parametrize("kind", KINDS)
def test_no_initial_state_is_a_state_of_zeros(kind):
    case = make_case(kind)
    tensors = case.tensors()
    zeros = case.with_tensors({**tensors, "initial_state": torch.zeros_like(tensors["initial_state"])})
    without = Case(case.transition, case.q, case.v, case.write)
    assert all(torch.equal(a, e) for a, e in zip(without.run("auto"), zeros.run("auto"), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_in_place_overwrites_the_state(kind):
    case = make_case(kind)
    expected, before = case.run("auto"), case.initial_state.clone()
    assert torch.equal(case.initial_state, before)
    with in_place_steps():
        o, state = case.run("auto")
        assert state is case.initial_state
        assert torch.equal(o, expected[0])
        assert torch.equal(state, expected[1])
        # Where it can't be, the state is left alone: another dtype, no contiguous memory, or wanted gradients.
        for given in (before.float(), before.transpose(2, 3).contiguous().transpose(2, 3)):
            kept = given.clone()
            o, state = replace(case, initial_state=given).run("auto")
            assert torch.equal(given, kept)
            assert state.data_ptr() != given.data_ptr()
        with torch.enable_grad():
            assert replace(case, initial_state=before).run("auto")[1] is not before
    assert case.run("auto")[1] is not case.initial_state


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_changes_nothing(kind):
    case = make_case(kind, torch.float32)
    expected = case.run("auto")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = case.run("auto")
    assert all(torch.equal(a, e) for a, e in zip(under_autocast, expected, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_one_token_can_be_exported(kind):
    case = make_case(kind, torch.float32)
    names, tensors = zip(*case.tensors().items(), strict=True)

    class Step(torch.nn.Module):
        def forward(self, *xs):
            return case.with_tensors(dict(zip(names, xs, strict=True))).run("auto")

    with torch.no_grad():
        program = torch.export.export(Step(), tensors)
        computed, expected = program.module()(*tensors), case.run("auto")
    assert all(torch.allclose(a, e, atol=1e-6) for a, e in zip(computed, expected, strict=True))
