"""Products of generalized Householder matrices: every backend against the reference, and right at the eigenvalue -1."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import TOLERANCE, Case, check_against_reference, relative_error, results
from hypothesis import given, settings
from hypothesis import strategies as st

from statetrack.ops import available_backends, linear_recurrence
from statetrack.transition import Householder

CHUNK = 16  # of the chunked backend on a CPU, in micro-steps, for heads of less than 64


def make_case(
    b=2, t=20, n=1, h=3, k=5, v=7, *, decay="none", dtype=torch.float64, normalize=True, cu_seqlens=None, seed=0
) -> Any:
    """Random arguments with beta anywhere in [0, 2] and exactly 0, 1 and 2; decays likewise with 0, 1 and -1."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    keys = randn(b, t, n, h, k)
    beta = 2 * torch.rand(b, t, n, h, generator=generator, dtype=torch.float64)
    for value, kind in zip((0.0, 1.0, 2.0), torch.randint(6, (3, *beta.shape), generator=generator), strict=True):
        beta[kind == 0] = value
    decays = None
    if decay != "none":
        decays = 2 * torch.rand(b, t, h, *([k] if decay == "channel" else []), generator=generator) - 1
        for value, kind in zip(
            (0.0, 1.0, -1.0), torch.randint(6, (3, *decays.shape), generator=generator), strict=True
        ):
            decays[kind == 0] = value
        decays = decays.to(state_dtype)
    states = b if cu_seqlens is None else len(cu_seqlens) - 1
    return Case(
        Householder(torch.nn.functional.normalize(keys, dim=-1).to(dtype), beta.to(state_dtype), decays, normalize),
        q=randn(b, t, h, k).to(dtype),
        v=randn(b, t, n, h, v).to(dtype),
        initial_state=randn(states, h, k, v).to(state_dtype),
        cu_seqlens=None if cu_seqlens is None else torch.tensor(cu_seqlens),
    )


# The backends that serve float64 here; those for a GPU in float32 have tests of their own.
FAST = [name for name in available_backends(make_case().transition) if name != "reference"]


def one_key(t, beta, *, dtype=torch.float32, normalize=True, k=64, decay="none") -> Any:
    """One key repeated for ever; `beta` is a number or a function of the number of tokens. All decays are 1."""
    case = make_case(1, t, 1, 2, k, k, dtype=dtype, normalize=normalize)
    keys = case.transition.k[:, :1].expand_as(case.transition.k).contiguous()
    betas = torch.full((1, t, 1, 2), beta) if isinstance(beta, float) else beta(t)
    decays = {"none": None, "channel": torch.ones(1, t, 2, k)}[decay]
    return replace(case, transition=replace(case.transition, k=keys, beta=betas, decay=decays))


def parity_bits(t):
    return 2.0 * torch.randint(2, (1, t, 1, 2), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("decay", ["none", "head", "channel"])
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("t", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 97])
def test_every_length_agrees_with_the_reference(t, n, decay, backend):
    check_against_reference(make_case(t=t, n=n, decay=decay), backend)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("decay", ["none", "head", "channel"])
def test_a_thousand_tokens_agree_with_the_reference(decay, backend):
    check_against_reference(make_case(1, 1000, 2, 1, decay=decay), backend)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("decay", ["head", "channel"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize(("b", "h", "k", "v"), [(1, 1, 1, 1), (3, 2, 3, 33), (1, 4, 65, 12), (5, 1, 64, 64)])
def test_every_shape_agrees_with_the_reference(b, h, k, v, n, normalize, decay, backend):
    check_against_reference(make_case(b, CHUNK + 3, n, h, k, v, decay=decay, normalize=normalize), backend)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("decay", ["none", "head", "channel"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_every_dtype_agrees_with_the_reference(dtype, decay, backend):
    check_against_reference(make_case(t=150, n=2, decay=decay, dtype=dtype), backend)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("decay", ["none", "channel"])
@pytest.mark.parametrize("normalize", [True, False])
def test_zero_keys_do_nothing(normalize, decay, backend):
    case = make_case(t=40, n=2, decay=decay, normalize=normalize)
    keys = case.transition.k.clone()
    keys[:, ::3] = 0
    check_against_reference(replace(case, transition=replace(case.transition, k=keys)), backend)


# In float32 the squares of these underflow or leave no room for a gradient, which grows like 1 / |k|^2.
SHORT = [1e-9, 1e-12, 1e-20, 1e-38, 1e-44]


def with_short_keys(case, length) -> Any:
    keys = case.transition.k.clone()
    keys[:, ::3] *= length
    return replace(case, transition=replace(case.transition, k=keys))


@pytest.mark.parametrize("length", SHORT)
@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("decay", ["none", "channel"])
@pytest.mark.parametrize("normalize", [True, False])
def test_short_keys_do_nothing(normalize, decay, backend, length):
    case = with_short_keys(make_case(t=40, n=2, decay=decay, normalize=normalize, dtype=torch.float32), 0.9 * length)
    check_against_reference(case, backend)
    if normalize:
        zero = results(with_short_keys(case, 0), "reference")
        for name, value in results(case, "reference").items():
            assert torch.equal(value, zero[name]), name


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("decay", ["none", "channel"])
def test_the_shortest_keys_that_act_have_finite_gradients(decay, backend):
    case = with_short_keys(make_case(t=4, decay=decay, dtype=torch.float32), 1.1e-9)
    computed = results(case, backend)
    assert computed["o"].abs().max() > 1e7  # a value is written 1 / |k| times
    assert all(value.isfinite().all() for value in computed.values())


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("decay", ["none", "head", "channel"])
@pytest.mark.parametrize(
    "cu_seqlens", [[0, 40], [0, 0, 3, 3, 20, 21, 40, 40], [0, *range(1, 41)], [0, 38, 40]], ids=str
)
def test_packed_sequences_agree_with_the_reference(cu_seqlens, decay, backend):
    check_against_reference(make_case(1, 40, 2, decay=decay, cu_seqlens=cu_seqlens), backend)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("decay", ["head", "channel"])
@pytest.mark.parametrize("split", [1, 15, 16, 17, 39])
def test_a_sequence_can_be_split_with_its_state_handed_on(split, decay, backend):
    case = make_case(t=40, n=2, decay=decay)
    o, state = case.run(backend)
    handed, pieces = case.initial_state, []
    for part in (slice(None, split), slice(split, None)):
        transition = case.transition.map_tokens(lambda x, part=part: x[:, part])
        piece, handed = linear_recurrence(
            transition, case.q[:, part], case.v[:, part], initial_state=handed, backend=backend
        )
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
@pytest.mark.parametrize("decay", ["none", "head", "channel"])
def test_gradients_agree_with_finite_differences(decay, backend):
    case = make_case(1, 7, 2, 2, 3, 2, decay=decay)
    names, tensors = zip(*case.tensors().items(), strict=True)
    inputs = [x.requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(
        lambda *xs: case.with_tensors(dict(zip(names, xs, strict=True))).run(backend), inputs, fast_mode=False
    )


@given(t=st.integers(1, 50), n=st.integers(1, 4), k=st.integers(1, 9), v=st.integers(1, 9), seed=st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_anything_agrees_with_the_reference(t, n, k, v, seed):
    for backend in FAST:
        for decay in ("head", "channel"):
            check_against_reference(make_case(1, t, n, 2, k, v, decay=decay, seed=seed), backend, 1e-9)


# The property that this project is about: at the eigenvalue -1 nothing grows and nothing fades.
BETAS = pytest.mark.parametrize(
    ("t", "beta"), [(2048, 2.0), (512, 1.9), (1024, parity_bits)], ids=["beta=2", "beta=1.9", "parity bits"]
)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("decay", ["none", "channel"])
@BETAS
@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "raw unit keys"])
@pytest.mark.thin(2)
def test_one_key_repeated_in_float32(t, beta, normalize, decay, backend):
    check_against_reference(one_key(t, beta, normalize=normalize, decay=decay), backend, 2e-5)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("decay", ["none", "channel"])
@BETAS
def test_one_key_repeated_with_bfloat16_inputs(t, beta, decay, backend):
    check_against_reference(one_key(t, beta, dtype=torch.bfloat16, decay=decay), backend, 1e-2)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("decay", ["none", "channel"])
def test_reflections_by_bfloat16_keys_keep_the_norm_of_the_state(decay, backend):
    case = one_key(8192, 2.0, dtype=torch.bfloat16, decay=decay)
    state = replace(case, v=torch.zeros_like(case.v)).run(backend)[1]
    assert relative_error(state, case.initial_state) < 2e-3
    # A key of squared norm 1 + e has the eigenvalue -1 - 2e without normalization: the state explodes or fades.
    raw = replace(case, v=torch.zeros_like(case.v), transition=replace(case.transition, normalize=False))
    assert relative_error(raw.run(backend)[1], case.initial_state) > 0.1


@pytest.mark.parametrize("backend", FAST)
def test_beta_below_two_lets_the_component_along_the_key_fade(backend):
    case = one_key(400, 1.9)
    state = replace(case, v=torch.zeros_like(case.v)).run(backend)[1]
    key = case.transition.k[:, 0, 0]
    left = torch.einsum("bhk,bhkv->bhv", key, state).norm() / case.initial_state.norm()
    assert left < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_reflection_repeated_65536_times(dtype, backend):
    case = one_key(65_536, 2.0, dtype=dtype, k=32)
    state = replace(case, v=torch.zeros_like(case.v)).run(backend)[1]
    assert relative_error(state, case.initial_state) < 2e-2


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("largest_beta", [1.0, 2.0])
def test_the_gated_delta_rule_of_transformers(gated, largest_beta, backend):
    module = pytest.importorskip(
        "transformers.models.olmo_hybrid.modeling_olmo_hybrid", reason="compares with transformers"
    )
    case = make_case(2, 70, 1, 3, 16, 24, dtype=torch.float32, normalize=False, decay="head" if gated else "none")
    beta = case.transition.beta * largest_beta / 2
    decay = torch.full(case.q.shape[:3], 1.0)
    if gated:  # theirs is the logarithm of a positive decay
        decay = case.transition.decay.abs().clamp(min=0.05)
    case = replace(case, transition=replace(case.transition, beta=beta, decay=decay if gated else None))
    inputs = [case.q, case.transition.k, case.v, beta]
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    q, k, v, b = leaves
    for name in ("torch_recurrent_gated_delta_rule", "torch_chunk_gated_delta_rule"):
        function = getattr(module, name)
        function = getattr(function, "__wrapped__", function)  # where it is installed, a kernel would take its place
        theirs, their_state = function(
            q, k[:, :, 0], v[:, :, 0], decay.log(), b[:, :, 0],
            initial_state=case.initial_state, output_final_state=True,
        )  # fmt: skip
        transition = replace(case.transition, k=k, beta=b)
        # They scale the queries by 1 / sqrt(K), which here is the caller's business.
        scaled = replace(case, transition=transition, q=q / math.sqrt(q.shape[-1]), v=v)
        ours, our_state = scaled.run(backend)
        assert relative_error(ours.detach(), theirs.detach()) < 1e-5
        assert relative_error(our_state.detach(), their_state.detach()) < 1e-5
        weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(0))
        for a, e in zip(*(torch.autograd.grad((o * weights).sum(), leaves) for o in (ours, theirs)), strict=True):
            assert relative_error(a, e) < 1e-4


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("decay", ["none", "channel"])
def test_gradients_of_gradients_are_computed_by_the_reference_and_refused_by_others(decay, backend):
    case = make_case(1, 3, decay=decay)
    k = case.transition.k.clone().requires_grad_()
    o, _ = replace(case, transition=replace(case.transition, k=k)).run(backend)
    (gradient,) = torch.autograd.grad(o.square().sum(), k, create_graph=True)
    assert gradient.isfinite().all()
    if backend == "reference":
        assert torch.autograd.grad(gradient.sum(), k)[0].isfinite().all()
        return
    with pytest.raises(RuntimeError, match="ask for them with backend='reference'"):
        torch.autograd.grad(gradient.sum(), k)


def test_memory_grows_with_the_chunks_and_not_with_the_states():
    """The tape of the backward is linear in T and far below one state a token."""
    case = make_case(1, 512, 1, 1, 32, 32, dtype=torch.float32)
    saved = []

    def pack(x):
        saved.append(x.numel())
        return x

    inputs = {name: x.clone().requires_grad_() for name, x in case.tensors().items()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        case.with_tensors(inputs).run("chunked")
    assert sum(saved) < 512 * 32 * 32 / 3


# torch's own tracing of autograd functions warns.
def test_compiled_in_one_graph():
    case = make_case(1, 40, 2, decay="head", dtype=torch.float32)

    def loss(q, k, v, beta, decay, state):
        o, final = linear_recurrence(Householder(k, beta, decay, True), q, v, initial_state=state, backend="chunked")
        return o.square().sum() + final.square().sum()

    arguments = [case.q, case.transition.k, case.v, case.transition.beta, case.transition.decay, case.initial_state]
    leaves = [x.clone().requires_grad_() for x in arguments]
    eager = torch.autograd.grad(loss(*leaves), leaves)
    # The backend "aot_eager" traces forward and backward like the default one, without a C++ compiler.
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    assert all(relative_error(a, e) < 1e-6 for a, e in zip(compiled, eager, strict=True))


@pytest.mark.parametrize("backend", ["auto", "chunked", "reference"])
@pytest.mark.parametrize("t", [1, 20])
def test_high_precision_is_what_a_cpu_has(t, backend):
    case = make_case(1, t, 1, 2, 4, 4)
    assert all(map(torch.equal, case.run(backend, "high"), case.run(backend)))


T, F_ = (2, 6, 1, 3, 5), (2, 6, 1, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q": torch.zeros(2, 6, 3, 4)}, r"q must be \[B, T, H, K\] = \(2, 6, 3, 5\)"),
        ({"v": torch.zeros(2, 6, 3, 7)}, r"v must be \[B, T, N, H, V\]"),
        ({"write": torch.zeros(2, 6, 3, 5)}, "leave out `write`"),
        ({"initial_state": torch.zeros(2, 3, 5, 6)}, r"initial_state must be \(2, 3, 5, 7\)"),
        ({"cu_seqlens": torch.tensor([0, 6])}, "B must be 1 with cu_seqlens, got 2"),
        ({"backend": "fast"}, "unknown backend 'fast'; available: auto, triton, chunked, reference"),
        ({"precision": "low"}, 'precision must be "default" or "high", got \'low\''),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(arguments, message):
    transition = Householder(torch.zeros(T), torch.zeros(F_))
    given_ = {"q": torch.zeros(2, 6, 3, 5), "v": torch.zeros(2, 6, 1, 3, 7), **arguments}
    with pytest.raises(ValueError, match=message):
        linear_recurrence(transition, **given_)


@pytest.mark.parametrize("bad", [[0.0, 6.0], [6], [1, 6], [0, 5], [0, 4, 2, 6]])
def test_boundaries_that_are_none_are_refused(bad):
    transition = Householder(torch.zeros(1, *T[1:]), torch.zeros(1, *F_[1:]))
    with pytest.raises(ValueError, match="cu_seqlens must"):
        linear_recurrence(transition, torch.zeros(1, 6, 3, 5), torch.zeros(1, 6, 1, 3, 7), cu_seqlens=torch.tensor(bad))


@pytest.mark.parametrize("shape", [(0, 0), (0, 1), (1, 0)])
def test_empty_batches_and_lengths_are_refused(shape):
    b, t = shape
    transition = Householder(torch.zeros(b, t, 1, 2, 3), torch.zeros(b, t, 1, 2))
    with pytest.raises(ValueError, match="at least one sequence, one token and one head"):
        linear_recurrence(transition, torch.zeros(b, t, 2, 3), torch.zeros(b, t, 1, 2, 3))


def test_results_helper_sees_a_wrong_gradient():
    """The comparison itself can fail: a backend that forgets its gradient would be caught."""
    case = make_case()
    assert (
        relative_error(results(case, "chunked")["gradient of k"] * 1.001, results(case, "reference")["gradient of k"])
        > 1e-4
    )


@pytest.mark.gpu
@pytest.mark.parametrize("decay", ["none", "head", "channel"])
@pytest.mark.parametrize("n", [1, 3])
def test_on_a_gpu_as_on_a_cpu(n, decay):
    case = make_case(t=150, n=n, decay=decay, k=16, v=16, dtype=torch.float32)
    expected = results(case, "chunked")
    inputs = {name: x.cuda().requires_grad_() for name, x in case.tensors().items()}
    o, state = case.with_tensors(inputs).run("chunked")
    assert relative_error(o.detach().cpu(), expected["o"]) < 1e-4
    assert relative_error(state.detach().cpu(), expected["final state"]) < 1e-4
    (o.sum() + state.sum()).backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in inputs.values())
