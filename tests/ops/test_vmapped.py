"""`torch.func.vmap` over the recurrences: replicas with parameters of their own, forward and backward, as one call."""

import pytest
import torch
from torch.func import grad, vmap

from statetrack import ops
from statetrack.ops import Backend, linear_recurrence
from statetrack.ops.slstm import slstm
from statetrack.ops.step import in_place_steps
from statetrack.transition import Diagonal, Discretized, EigenvalueRange, Householder, LowRank

R, B, T, N, H, K, V = 3, 2, 7, 2, 2, 3, 4


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def householder(k, beta, decay):
    return Householder(k, 2 * torch.sigmoid(beta), torch.tanh(decay), normalize=True)


def discretized(dt, a, lower_end):
    return Discretized(dt.exp(), -a.exp(), EigenvalueRange(-1, 1), -torch.sigmoid(lower_end))


KINDS = {
    "householder": (householder, [(B, T, N, H, K), (B, T, N, H), (B, T, H)]),
    "diagonal": (lambda decay: Diagonal(torch.tanh(decay)), [(B, T, H, K)]),
    "discretized": (discretized, [(B, T, H, V), (H, K, V), (H, V)]),
    "low_rank": (lambda decay, u, w: LowRank(torch.tanh(decay), u, 0.1 * w), [(B, T, H, K)] * 3),
}


def assert_vmaps(function, inputs, in_dims):
    """Results and gradients of the replicas at once are those of one after the other."""
    inputs = [x.requires_grad_() for x in inputs]
    together = vmap(function, in_dims=in_dims)(*inputs)
    each = [
        function(*(x if dim is None else x.select(dim, r) for x, dim in zip(inputs, in_dims, strict=True)))
        for r in range(R)
    ]
    expected = [torch.stack(parts) for parts in zip(*each, strict=True)]
    weights = [torch.randn_like(x) for x in expected]
    gradients = [
        torch.autograd.grad([(x * w).sum() for x, w in zip(results, weights, strict=True)], inputs)
        for results in (together, expected)
    ]
    for a, b in [*zip(together, expected, strict=True), *zip(*gradients, strict=True)]:
        assert a.shape == b.shape
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_replicas_of_a_recurrence_are_one_recurrence(kind, backend):
    make, shapes = KINDS[kind]
    tensors = [randn(R, *shape) for shape in shapes]
    v = randn(R, B, T, *((N,) if kind == "householder" else ()), H, V)
    q, start = randn(B, R, T, H, K), randn(B, H, K, V)  # an axis elsewhere, and one start for all
    write = () if kind == "householder" else (randn(R, B, T, H, K),)

    def function(q, v, start, *others):
        tensors, rest = others[: len(shapes)], others[len(shapes) :]
        transition = make(*tensors)
        return linear_recurrence(
            transition, q, v, write=rest[0] if rest else None, initial_state=start, backend=backend
        )

    assert_vmaps(function, [q, v, start, *tensors, *write], (1, 0, None, *[0] * len((*tensors, *write))))


def test_replicas_of_slstm_have_recurrent_matrices_of_their_own():
    state = [randn(B, H, K) for _ in range(2)] + [1 + randn(B, H, K).square(), randn(B, H, K)]

    def function(z, i, f, o, bias, recurrent):
        return slstm((z, i, f, o), bias, recurrent, state)[:3]

    inputs = [randn(R, B, T, H, K) for _ in range(4)]
    assert_vmaps(function, [*inputs, randn(R, H, 4 * K), randn(R, H, K, 4 * K)], (0,) * 6)


def test_what_vmap_can_not_do_is_said():
    decay, q, v = randn(R, 1, T, H, K), randn(R, 1, T, H, K), randn(R, 1, T, H, V)

    def packed(decay, q, v):
        return linear_recurrence(Diagonal(decay), q, v, write=q, cu_seqlens=torch.tensor([0, T]))[0]

    with pytest.raises(ValueError, match="packed sequences can't be vmapped"):
        vmap(packed)(decay, q, v)
    with pytest.raises(NotImplementedError, match="vmap alone"):
        grad(lambda q: linear_recurrence(Diagonal(decay[0]), q, v[0], write=q)[0].sum())(q[0])


def test_replicas_are_computed_in_the_precision_that_is_asked_for(monkeypatch):
    def rounded(transition, q, v, *others):
        return v, torch.zeros(len(v), H, K, V)

    def exact(transition, q, v, *others):
        return v + 1, torch.zeros(len(v), H, K, V)

    backend = Backend("two_precisions", lambda transition: None, rounded, run_high=exact)
    monkeypatch.setattr(ops, "_BACKENDS", (backend,))
    decay, q, v = randn(R, B, T, H, K), randn(R, B, T, H, K), randn(R, B, T, H, V)
    for precision, more in (("default", 0), ("high", 1)):

        def recur(decay, q, v, precision=precision):
            return linear_recurrence(Diagonal(decay), q, v, write=q, backend="two_precisions", precision=precision)[0]

        assert torch.equal(vmap(recur)(decay, q, v), v + more)


@pytest.mark.parametrize("kind", KINDS)
def test_single_tokens_of_replicas_may_be_computed_in_place(kind):
    make, shapes = KINDS[kind]
    tensors = [randn(R, *(1 if size == T else size for size in shape)) for shape in shapes]
    v = randn(R, B, 1, *((N,) if kind == "householder" else ()), H, V)
    q, start = randn(R, B, 1, H, K), randn(R, B, H, K, V)
    write = () if kind == "householder" else (randn(R, B, 1, H, K),)

    def function(q, v, start, *others):
        rest = others[len(shapes) :]
        transition = make(*others[: len(shapes)])
        return linear_recurrence(transition, q, v, write=rest[0] if rest else None, initial_state=start)

    expected = vmap(function)(q, v, start, *tensors, *write)
    with in_place_steps():
        in_place = vmap(function)(q, v, start.clone(), *tensors, *write)
    for a, b in zip(in_place, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)
    assert_vmaps(function, [q, v, start, *tensors, *write], (0,) * (3 + len((*tensors, *write))))
