"""One token: the step that "auto" takes for every kind of transition, against the reference."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import TOLERANCE, Case, check_against_reference

from statetrack.transition import Diagonal, Discretized, EigenvalueRange, Householder, LowRank

B, H, N, K, V = 2, 3, 2, 5, 7
KINDS = [
    "householder", "householder, raw", "householder, head", "householder, channel", "diagonal, head",
    "diagonal, channel", "low rank, head", "low rank, channel", "discretized", "discretized, lower end",
]  # fmt: skip


def make_case(kind: str, dtype: torch.dtype = torch.float64) -> Any:
    generator = torch.Generator().manual_seed(0)
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def uniform(*shape):
        return (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1).to(state_dtype)

    decay = {"head": uniform(B, 1, H), "channel": uniform(B, 1, H, K)}.get(kind.rpartition(", ")[2])
    write = None if kind.startswith("householder") else randn(B, 1, H, K).to(dtype)
    values = randn(*((B, 1, N, H, V) if write is None else (B, 1, H, V))).to(dtype)
    if kind.startswith("householder"):
        beta = uniform(B, 1, N, H) + 1
        transition = Householder(randn(B, 1, N, H, K).to(dtype), beta, decay, normalize="raw" not in kind)
    elif kind.startswith("diagonal"):
        assert decay is not None
        transition = Diagonal(decay)
    elif kind.startswith("low rank"):
        assert decay is not None
        transition = LowRank(decay, randn(B, 1, H, K).to(dtype), randn(B, 1, H, K).to(dtype))
    else:
        dt, A = randn(B, 1, H, V).abs().to(dtype), -randn(H, K, V).exp().to(state_dtype)
        lower_end = uniform(H, V) if "lower end" in kind else None
        transition = Discretized(dt, A, EigenvalueRange(-1, 1), lower_end)
    return Case(transition, randn(B, 1, H, K).to(dtype), values, write, randn(B, H, K, V).to(state_dtype))


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
