"""Diagonal decays: every backend against the reference, with decays of exactly 0, 1 and -1."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import TOLERANCE, Case, check_against_reference, relative_error, results
from hypothesis import given, settings
from hypothesis import strategies as st

from statetrack.ops import available_backends, linear_recurrence
from statetrack.transition import Diagonal, Discretized, Householder

FAST = [name for name in available_backends(Diagonal(torch.zeros(1, 1, 1))) if name != "reference"]
CHUNK = 32  # of the chunked backend on a CPU, in tokens
KINDS = ["head", "channel"]


def make_case(
    b=2, t=20, h=3, k=5, v=7, *, decay="channel", dtype=torch.float64, cu_seqlens=None, seed=0, special=True
) -> Any:
    """Random arguments with decays anywhere in [-1, 1], and with `special` often exactly 0, 1 and -1."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    shape = (b, t, h, k) if decay == "channel" else (b, t, h)
    decays = 2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1
    if special:
        for value, kind in zip((0.0, 1.0, -1.0), torch.randint(6, (3, *shape), generator=generator), strict=True):
            decays[kind == 0] = value
    states = b if cu_seqlens is None else len(cu_seqlens) - 1
    return Case(
        Diagonal(decays.to(state_dtype)),
        q=randn(b, t, h, k).to(dtype),
        v=randn(b, t, h, v).to(dtype),
        write=randn(b, t, h, k).to(dtype),
        initial_state=randn(states, h, k, v).to(state_dtype),
        cu_seqlens=None if cu_seqlens is None else torch.tensor(cu_seqlens),
    )


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("decay", KINDS)
@pytest.mark.parametrize("t", [1, 2, 3, 15, 16, 17, CHUNK - 1, CHUNK, CHUNK + 1, 97])
def test_every_length_agrees_with_the_reference(t, decay, backend):
    check_against_reference(make_case(t=t, decay=decay), backend)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("decay", KINDS)
def test_a_thousand_tokens_agree_with_the_reference(decay, backend):
    check_against_reference(make_case(1, 1000, 1, decay=decay), backend)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("decay", KINDS)
@pytest.mark.parametrize(("b", "h", "k", "v"), [(1, 1, 1, 1), (3, 2, 3, 33), (1, 4, 65, 12), (5, 1, 64, 64)])
def test_every_shape_agrees_with_the_reference(b, h, k, v, decay, backend):
    check_against_reference(make_case(b, CHUNK + 3, h, k, v, decay=decay), backend)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("decay", KINDS)
@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_every_dtype_agrees_with_the_reference(dtype, special, decay, backend):
    check_against_reference(make_case(t=150, decay=decay, dtype=dtype, special=special), backend)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("decay", KINDS)
def test_a_batch_of_many_groups_agrees_with_the_reference(decay, backend, monkeypatch):
    monkeypatch.setattr("statetrack.ops.chunking.CACHED_NUMBERS", 2**12)
    check_against_reference(make_case(5, CHUNK + 2, 2, decay=decay), backend)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("decay", KINDS)
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0])
def test_one_decay_for_ever_agrees_with_the_reference(value, decay, backend):
    case = make_case(t=CHUNK + 5, decay=decay)
    transition = Diagonal(torch.full_like(case.transition.decay, value))
    check_against_reference(replace(case, transition=transition), backend)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("decay", KINDS)
@pytest.mark.parametrize(
    "cu_seqlens", [[0, 40], [0, 0, 3, 3, 20, 21, 40, 40], [0, *range(1, 41)], [0, 38, 40]], ids=str
)
def test_packed_sequences_agree_with_the_reference(cu_seqlens, decay, backend):
    check_against_reference(make_case(1, 40, 2, decay=decay, cu_seqlens=cu_seqlens), backend)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("decay", KINDS)
@pytest.mark.parametrize("split", [1, 15, CHUNK, CHUNK + 1, 39])
def test_a_sequence_can_be_split_with_its_state_handed_on(split, decay, backend):
    case = make_case(t=40, decay=decay)
    o, state = case.run(backend)
    handed, pieces = case.initial_state, []
    for part in (slice(None, split), slice(split, None)):
        transition = case.transition.map_tokens(lambda x, part=part: x[:, part])
        piece, handed = linear_recurrence(
            transition,
            case.q[:, part],
            case.v[:, part],
            write=case.write[:, part],
            initial_state=handed,
            backend=backend,
        )
        pieces.append(piece)
    assert relative_error(torch.cat(pieces, 1), o) < 1e-12
    assert relative_error(handed, state) < 1e-12


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("decay", KINDS)
def test_no_initial_state_is_a_state_of_zeros(decay, backend):
    case = make_case(decay=decay)
    without, end = replace(case, initial_state=None).run(backend)
    zeros, end_of_zeros = replace(case, initial_state=torch.zeros_like(case.initial_state)).run(backend)
    assert torch.equal(without, zeros)
    assert torch.equal(end, end_of_zeros)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("decay", KINDS)
def test_gradients_agree_with_finite_differences(decay, backend):
    case = make_case(1, 7, 2, 3, 2, decay=decay)
    names, tensors = zip(*case.tensors().items(), strict=True)
    inputs = [x.requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(
        lambda *xs: case.with_tensors(dict(zip(names, xs, strict=True))).run(backend), inputs, fast_mode=False
    )


@given(
    t=st.integers(1, 70),
    k=st.integers(1, 9),
    v=st.integers(1, 9),
    decay=st.sampled_from(KINDS),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=25, deadline=None)
def test_anything_agrees_with_the_reference(t, k, v, decay, seed):
    for backend in FAST:
        check_against_reference(make_case(1, t, 2, k, v, decay=decay, seed=seed), backend)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("decay", KINDS)
def test_minus_one_at_every_step_in_float32(decay, backend):
    """The eigenvalue of parity: nothing grows and nothing fades, over 2,048 tokens."""
    case = make_case(1, 2048, 2, 16, 16, decay=decay, dtype=torch.float32)
    case = replace(case, transition=Diagonal(torch.full_like(case.transition.decay, -1.0)))
    check_against_reference(case, backend, 2e-5)
    assert torch.equal(replace(case, v=torch.zeros_like(case.v)).run(backend)[1], case.initial_state)


@pytest.mark.parametrize("decay", KINDS)
def test_strided_and_expanded_inputs(decay):
    case = make_case(b=4, t=CHUNK + 3, decay=decay)
    strided = {
        name: x.transpose(0, -1).contiguous().transpose(0, -1) if name != "q" else x[:1].expand_as(x)
        for name, x in case.tensors().items()
    }
    contiguous = {name: x.contiguous() for name, x in strided.items()}
    for actual, expected in zip(
        case.with_tensors(strided).run("chunked"), case.with_tensors(contiguous).run("chunked"), strict=True
    ):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("decay", KINDS)
def test_memory_grows_with_the_chunks_and_not_with_the_states(decay):
    """The tape of the backward is linear in T and far below one state a token."""

    def saved_numbers(t):
        case, saved = make_case(1, t, 1, 32, 32, decay=decay, dtype=torch.float32), []

        def pack(x):
            saved.append(x.numel())
            return x

        inputs = {name: x.clone().requires_grad_() for name, x in case.tensors().items()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            case.with_tensors(inputs).run("chunked")
        return sum(saved)

    assert saved_numbers(512) < 512 * 32 * 32 / 4
    assert saved_numbers(1024) == 2 * saved_numbers(512)


# torch's own tracing of autograd functions warns.
@pytest.mark.parametrize("decay", KINDS)
def test_compiled_in_one_graph(decay):
    case = make_case(1, 40, decay=decay, dtype=torch.float32)

    def loss(q, k, v, decay, state):
        o, final = linear_recurrence(Diagonal(decay), q, v, write=k, initial_state=state, backend="chunked")
        return o.square().sum() + final.square().sum()

    arguments = [case.q, case.write, case.v, case.transition.decay, case.initial_state]
    leaves = [x.clone().requires_grad_() for x in arguments]
    eager = torch.autograd.grad(loss(*leaves), leaves)
    # The backend "aot_eager" traces forward and backward like the default one, without a C++ compiler.
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    assert all(relative_error(a, e) < 1e-6 for a, e in zip(compiled, eager, strict=True))


def test_compiled_with_one_tensor_in_two_places():
    """Keys that are the queries: both gradients count."""
    case = make_case(1, 40, dtype=torch.float32)

    def loss(x):
        o, _ = linear_recurrence(Diagonal(case.transition.decay), x, case.v, write=x, backend="chunked")
        return o.square().sum()

    x = case.q.clone().requires_grad_()
    (eager,) = torch.autograd.grad(loss(x), x)
    (compiled,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x), x)
    assert relative_error(compiled, eager) < 1e-6


@pytest.mark.parametrize("decay", KINDS)
def test_autocast_changes_nothing(decay):
    case = make_case(t=CHUNK + 1, decay=decay, dtype=torch.float32)
    expected = results(case, "chunked")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = results(case, "chunked")
    assert all(torch.equal(value, expected[name]) for name, value in under_autocast.items())


@pytest.mark.parametrize(
    ("key_dim", "value_dim", "message"), [(0, 2, "at least one key channel"), (2, 0, "at least one value channel")]
)
def test_a_state_without_channels_is_refused(key_dim, value_dim, message):
    q, v = torch.zeros(1, 3, 1, key_dim), torch.zeros(1, 3, 1, value_dim)
    with pytest.raises(ValueError, match=message):
        linear_recurrence(Diagonal(torch.ones(1, 3, 1)), q, v, write=q)
    dt, a = torch.ones(1, 3, 1, value_dim), -torch.ones(1, key_dim, value_dim)
    with pytest.raises(ValueError, match=message):
        linear_recurrence(Discretized(dt, a), q, v, write=q)


def test_it_is_the_first_choice_for_diagonal_transitions_and_serves_no_others():
    from statetrack.ops import chunked_diagonal

    assert available_backends(make_case().transition)[0] == "chunked"
    reason = chunked_diagonal.supports(Householder(torch.zeros(1, 2, 1, 1, 3), torch.zeros(1, 2, 1, 1)))
    assert reason == "chunked_diagonal serves Diagonal transitions"


@pytest.mark.gpu
@pytest.mark.parametrize("decay", KINDS)
def test_on_a_gpu_as_on_a_cpu(decay):
    case = make_case(t=150, decay=decay, k=16, v=16, dtype=torch.float32)
    expected = results(case, "chunked")
    inputs = {name: x.cuda().requires_grad_() for name, x in case.tensors().items()}
    o, state = case.with_tensors(inputs).run("chunked")
    assert relative_error(o.detach().cpu(), expected["o"]) < 1e-4
    assert relative_error(state.detach().cpu(), expected["final state"]) < 1e-4
    (o.sum() + state.sum()).backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in inputs.values())
