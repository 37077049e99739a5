"""Diagonal matrices minus one of rank one: every backend against the reference, and right at the eigenvalue -1."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import TOLERANCE, Case, check_against_reference, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from statetrack.ops import available_backends, linear_recurrence
from statetrack.transition import Householder, LowRank

FAST = [name for name in available_backends(LowRank(*torch.zeros(3, 1, 1, 1, 1))) if name != "reference"]
CHUNK = 16  # of the chunked backend


def make_case(
    b=2, t=20, h=3, k=5, v=7, *, decay="channel", dtype=torch.float64, decay_dtype=None, cu_seqlens=None, seed=0
) -> Any:
    """Random arguments with decays anywhere in [-1, 1] and exactly 0, 1 and -1; u and w have length 1, and most u
    are scaled down, so that products of many transitions don't explode."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    decays = 2 * torch.rand(b, t, h, *([k] if decay == "channel" else []), generator=generator, dtype=torch.float64) - 1
    for value, kind in zip((0.0, 1.0, -1.0), torch.randint(6, (3, *decays.shape), generator=generator), strict=True):
        decays[kind == 0] = value
    u, w = (torch.nn.functional.normalize(randn(b, t, h, k), dim=-1) for _ in range(2))
    u = torch.where(torch.rand(b, t, h, 1, generator=generator) < 1 / 3, u, u / 4)
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    states = b if cu_seqlens is None else len(cu_seqlens) - 1
    return Case(
        LowRank(decays.to(decay_dtype or state_dtype), u.to(dtype), w.to(dtype)),
        q=randn(b, t, h, k).to(dtype),
        v=randn(b, t, h, v).to(dtype),
        write=randn(b, t, h, k).to(dtype),
        initial_state=randn(states, h, k, v).to(state_dtype),
        cu_seqlens=None if cu_seqlens is None else torch.tensor(cu_seqlens),
    )


def one_key(t, beta, *, decay=1.0, k=64) -> Any:
    """decay (I - beta k k^T), one key repeated for ever, which also is what values are written along."""
    case = make_case(1, t, 2, k, k, dtype=torch.float32)
    keys = case.transition.w[:, :1].expand_as(case.transition.w).contiguous()
    transition = LowRank(torch.full_like(keys, decay), decay * beta * keys, keys)
    return replace(case, transition=transition, write=beta * keys)


def test_auto_takes_the_chunked_backend():
    case = make_case()
    assert available_backends(case.transition)[0] == "chunked"
    assert torch.equal(case.run("auto")[0], case.run("chunked")[0])


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("decay", ["head", "channel"])
@pytest.mark.parametrize("t", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 97])
def test_every_length_agrees_with_the_reference(t, decay, backend):
    check_against_reference(make_case(t=t, decay=decay), backend)


@pytest.mark.parametrize("backend", FAST)
def test_a_thousand_tokens_agree_with_the_reference(backend):
    check_against_reference(make_case(1, 1000, 1), backend)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(("b", "h", "k", "v"), [(1, 1, 1, 1), (3, 2, 3, 33), (1, 4, 65, 12), (40, 1, 64, 64)])
def test_every_shape_agrees_with_the_reference(b, h, k, v, backend):
    check_against_reference(make_case(b, CHUNK + 3, h, k, v), backend)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("decay", ["head", "channel"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_every_dtype_agrees_with_the_reference(dtype, decay, backend):
    check_against_reference(make_case(t=150, decay=decay, dtype=dtype), backend)


@pytest.mark.parametrize("backend", FAST)
def test_a_decay_in_the_dtype_of_the_activations_agrees_with_the_reference(backend):
    check_against_reference(make_case(t=40, dtype=torch.bfloat16, decay_dtype=torch.bfloat16), backend)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0])
def test_a_decay_that_is_the_same_everywhere_agrees_with_the_reference(value, backend):
    case = make_case(t=40)
    transition = replace(case.transition, decay=torch.full_like(case.transition.decay, value), u=case.transition.u / 4)
    check_against_reference(replace(case, transition=transition), backend)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(
    "cu_seqlens", [[0, 40], [0, 0, 3, 3, 20, 21, 40, 40], [0, *range(1, 41)], [0, 38, 40]], ids=str
)
def test_packed_sequences_agree_with_the_reference(cu_seqlens, backend):
    check_against_reference(make_case(1, 40, cu_seqlens=cu_seqlens), backend)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("split", [1, 15, 16, 17, 39])
def test_a_sequence_can_be_split_with_its_state_handed_on(split, backend):
    case = make_case(t=40)
    o, state = case.run(backend)
    handed, pieces = case.initial_state, []
    for part in (slice(None, split), slice(split, None)):
        piece, handed = linear_recurrence(
            case.transition.map_tokens(lambda x, part=part: x[:, part]), case.q[:, part], case.v[:, part],
            write=case.write[:, part], initial_state=handed, backend=backend,
        )  # fmt: skip
        pieces.append(piece)
    assert relative_error(torch.cat(pieces, 1), o) < 1e-12
    assert relative_error(handed, state) < 1e-12


@pytest.mark.parametrize("backend", FAST)
def test_no_initial_state_is_a_state_of_zeros(backend):
    case = make_case()
    without, end = replace(case, initial_state=None).run(backend)
    zeros, end_of_zeros = replace(case, initial_state=torch.zeros_like(case.initial_state)).run(backend)
    assert torch.equal(without, zeros)
    assert torch.equal(end, end_of_zeros)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("decay", ["head", "channel"])
def test_gradients_agree_with_finite_differences(decay, backend):
    case = make_case(1, 7, 2, 3, 2, decay=decay)
    names, tensors = zip(*case.tensors().items(), strict=True)
    inputs = [x.requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(
        lambda *xs: case.with_tensors(dict(zip(names, xs, strict=True))).run(backend), inputs, fast_mode=False
    )


@given(t=st.integers(1, 50), k=st.integers(1, 9), v=st.integers(1, 9), seed=st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_anything_agrees_with_the_reference(t, k, v, seed):
    for backend in FAST:
        check_against_reference(make_case(1, t, 2, k, v, seed=seed), backend, 1e-9)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("decay", [1.0, -1.0])
@pytest.mark.parametrize(("t", "beta"), [(2048, 2.0), (512, 1.9)], ids=["2.0", "1.9"])
@pytest.mark.thin(2)
def test_one_key_repeated_in_float32(t, beta, decay, backend):
    """At the eigenvalue -1 nothing grows and nothing fades."""
    check_against_reference(one_key(t, beta, decay=decay), backend, 2e-5)


@pytest.mark.parametrize("backend", FAST)
def test_what_reads_and_writes_along_one_key_is_a_householder_matrix(backend):
    case = make_case(t=40)
    w, beta = case.transition.w, 2 * torch.rand(2, 40, 3, 1, dtype=torch.float64)
    decay = case.transition.decay
    # (I - beta k k^T) diag(decay) = diag(decay) - beta k (decay k)^T
    low_rank = replace(case, transition=LowRank(decay, beta * w, decay * w), write=beta * w)
    householder = replace(
        case, transition=Householder(w.unsqueeze(2), beta.transpose(2, 3), decay), v=case.v.unsqueeze(2), write=None
    )
    for ours, expected in zip(low_rank.run(backend), householder.run(backend), strict=True):
        assert relative_error(ours, expected) < 1e-12


def test_memory_grows_with_the_chunks_and_not_with_the_states():
    """The tape of the backward is linear in T and far below one state a token."""
    case = make_case(1, 512, 1, 32, 32, dtype=torch.float32)
    saved = []

    def pack(x):
        saved.append(x.numel())
        return x

    inputs = {name: x.clone().requires_grad_() for name, x in case.tensors().items()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        case.with_tensors(inputs).run("chunked")
    assert 0 < sum(saved) < 512 * 32 * 32 / 2


# torch's own tracing of autograd functions warns.
@pytest.mark.parametrize("kind", ["low rank", "householder"])
def test_compiled_in_one_graph(kind):
    case = make_case(1, 40, dtype=torch.float32)
    names = ["q", "v", "initial_state", "decay", "w", "u", "write"]
    if kind == "householder":
        names[-2:] = ["beta"]
    tensors = {**case.tensors(), "beta": case.transition.u[..., 0].abs()}

    def loss(q, v, state, decay, w, u, write=None):
        if kind == "householder":
            transition, v = Householder(w.unsqueeze(2), u.unsqueeze(2), decay, True), v.unsqueeze(2)
        else:
            transition = LowRank(decay, u, w)
        o, final = linear_recurrence(transition, q, v, write=write, initial_state=state, backend="chunked")
        return o.square().sum() + final.square().sum()

    leaves = [tensors[name].clone().requires_grad_() for name in names]
    eager = torch.autograd.grad(loss(*leaves), leaves)
    # The backend "aot_eager" traces forward and backward like the default one, without a C++ compiler.
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    assert all(relative_error(a, e) < 1e-6 for a, e in zip(compiled, eager, strict=True))


@pytest.mark.gpu
def test_on_a_gpu_as_on_a_cpu():
    case = make_case(t=150, k=16, v=16, dtype=torch.float32)
    expected, expected_state = case.run("chunked")
    inputs = {name: x.cuda().requires_grad_() for name, x in case.tensors().items()}
    o, state = case.with_tensors(inputs).run("chunked")
    assert relative_error(o.detach().cpu(), expected) < 1e-4
    assert relative_error(state.detach().cpu(), expected_state) < 1e-4
    (o.sum() + state.sum()).backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in inputs.values())
