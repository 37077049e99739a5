"""The selective scan: the chunked backend against the reference, and its range [0, 1] against transformers' scan."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from cases import TOLERANCE, Case, check_against_reference, relative_error, results
from hypothesis import given
from hypothesis import strategies as st

from statetrack.ops import available_backends, chunked_discretized, linear_recurrence
from statetrack.transition import Discretized, EigenvalueRange

ZERO_ONE, SIGNED = EigenvalueRange(0, 1), EigenvalueRange(-1, 1)
RANGES = [ZERO_ONE, SIGNED, EigenvalueRange(-1, 0.5)]
FAST = [n for n in available_backends(Discretized(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1))) if n != "reference"]
# The steps of a small tile.
CHUNK = 16
# exp(dt A) is 0 for every A that occurs here.
LARGE_DT = 1e4


@pytest.fixture(autouse=True)
def _poison_kept_memory():
    """What earlier calls have left in the memory that the backend keeps must not matter."""
    for memory in chunked_discretized._memory.kept.values():
        memory.fill_(torch.nan)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of two sequences by `CHUNK` steps, so that small tests cross their boundaries."""

    def of(q, v):
        b, t = q.shape[:2]
        return chunked_discretized._Tiling(b, t, rows=min(2, b), steps=min(CHUNK, t))

    monkeypatch.setattr(chunked_discretized._Tiling, "of", of)


def make_case(b=3, t=20, h=1, k=5, v=7, *, range_=SIGNED, dtype=torch.float64, cu_seqlens=None, extreme=False) -> Any:
    """Random arguments; with `extreme` a third of dt is 0 (decay hi), a third so large that the decay is lo."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    dt = torch.nn.functional.softplus(randn(b, t, h, v))
    if extreme:
        kind = torch.randint(3, dt.shape, generator=generator)
        dt[kind == 0], dt[kind == 1] = 0, LARGE_DT
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    states = b if cu_seqlens is None else len(cu_seqlens) - 1
    return Case(
        Discretized(dt.to(dtype), -randn(h, k, v).exp().to(state_dtype), range_),
        q=randn(b, t, h, k).to(dtype),
        v=randn(b, t, h, v).to(dtype),
        write=randn(b, t, h, k).to(dtype),
        initial_state=randn(states, h, k, v).to(state_dtype),
        cu_seqlens=None if cu_seqlens is None else torch.tensor(cu_seqlens),
    )


def with_dt(case, dt):
    return replace(case, transition=replace(case.transition, dt=dt))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("range_", RANGES, ids=str)
@pytest.mark.parametrize("t", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 97, 1000])
def test_every_length_agrees_with_the_reference(t, range_, backend):
    check_against_reference(make_case(t=t, range_=range_), backend)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("b", [1, 2, 5])
@pytest.mark.parametrize("h", [1, 3])
@pytest.mark.parametrize(("k", "v"), [(1, 1), (3, 5), (16, 33), (7, 130)])
def test_every_shape_agrees_with_the_reference(b, h, k, v, backend):
    check_against_reference(make_case(b, CHUNK + 3, h, k, v), backend)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("range_", RANGES, ids=str)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_every_dtype_agrees_with_the_reference(dtype, range_, extreme, backend):
    check_against_reference(make_case(t=150, h=2, range_=range_, dtype=dtype, extreme=extreme), backend)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("range_", RANGES, ids=str)
def test_tiles_of_full_size_agree_with_the_reference(range_, backend):
    check_against_reference(make_case(9, 70, 1, 16, 256, range_=range_, dtype=torch.float32), backend)


def test_inputs_of_different_dtypes():
    case = make_case(dtype=torch.bfloat16)
    mixed = replace(case, q=case.q.float(), write=case.write.double())
    check_against_reference(mixed, "chunked")


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("t", [CHUNK, 999])
def test_decays_of_one_and_minus_one_are_exact(t):
    case = make_case(t=t, dtype=torch.float32)
    flip = torch.rand(case.v.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    silent = replace(with_dt(case, flip * LARGE_DT), write=torch.zeros_like(case.q))
    _, state = silent.run("chunked")
    sign = 1 - 2 * (flip.sum(1) % 2)
    assert torch.equal(state, case.initial_state * sign.unsqueeze(2))


def test_a_decay_of_zero_forgets():
    case = make_case(t=9, range_=ZERO_ONE, dtype=torch.float32)
    _, state = with_dt(case, torch.full_like(case.v, LARGE_DT)).run("chunked")
    assert torch.equal(state, case.write[:, -1].unsqueeze(-1) * case.v[:, -1].unsqueeze(-2))


def with_lower_ends(case, seed=2):
    """Lower ends anywhere in [-1, 1), with the first exactly -1."""
    shape = case.transition.A[:, 0].shape
    ends = 2 * torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1
    ends[:, 0] = -1
    return replace(case, transition=replace(case.transition, lower_end=ends.to(case.transition.A.dtype)))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("range_", RANGES, ids=str)
@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_a_lower_end_for_each_channel_agrees_with_the_reference(dtype, extreme, range_, backend):
    case = with_lower_ends(make_case(t=50, h=2, range_=range_, dtype=dtype, extreme=extreme))
    check_against_reference(case, backend)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.usefixtures("small_tiles")
def test_gradients_of_lower_ends_agree_with_finite_differences(backend):
    case = with_lower_ends(make_case(1, 7, 2, 3, 2))
    names, tensors = zip(*case.tensors().items(), strict=True)
    assert "lower_end" in names
    inputs = [x.requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(
        lambda *xs: case.with_tensors(dict(zip(names, xs, strict=True))).run(backend), inputs, fast_mode=False
    )


def test_packed_sequences_with_lower_ends_agree_with_the_reference():
    cu_seqlens = [0, 0, 7, 16, 24, 24, 40, 41, 60, 60]
    check_against_reference(with_lower_ends(make_case(1, 60, 3, cu_seqlens=cu_seqlens)), "chunked")


# The last has lengths of 0, and others so close that they share a padded batch where hi is 1.
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("range_", RANGES, ids=str)
@pytest.mark.parametrize("cu_seqlens", [[0, 60], [0, 20, 40, 60], [0, 0, 7, 16, 24, 24, 40, 41, 60, 60]], ids=str)
def test_packed_sequences_agree_with_the_reference(cu_seqlens, range_):
    check_against_reference(make_case(1, 60, 3, range_=range_, cu_seqlens=cu_seqlens), "chunked")


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("split", [1, CHUNK, 33])
def test_a_sequence_in_two_parts_is_the_whole(split):
    case = make_case(t=50)
    o, state = case.run("chunked")
    outputs, carried = [], case.initial_state
    for part in (slice(None, split), slice(split, None)):
        o_part, carried = linear_recurrence(
            case.transition.map_tokens(lambda x, part=part: x[:, part]),
            case.q[:, part],
            case.v[:, part],
            write=case.write[:, part],
            initial_state=carried,
            backend="chunked",
        )
        outputs.append(o_part)
    assert relative_error(torch.cat(outputs, 1), o) < 1e-14
    assert relative_error(carried, state) < 1e-14


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("range_", RANGES, ids=str)
def test_gradcheck(range_):
    case = make_case(2, CHUNK + 2, 1, 2, 3, range_=range_)
    names, inputs = zip(*((name, x.requires_grad_()) for name, x in case.tensors().items()), strict=True)
    assert torch.autograd.gradcheck(
        lambda *xs: case.with_tensors(dict(zip(names, xs, strict=True))).run("chunked"), inputs
    )


@pytest.mark.parametrize("used", [0, 1], ids=["o", "final state"])
def test_gradients_where_one_result_is_unused(used):
    case = make_case()
    gradients = {}
    for backend in ("chunked", "reference"):
        inputs = {name: x.clone().requires_grad_() for name, x in case.tensors().items()}
        loss = case.with_tensors(inputs).run(backend)[used].square().sum()
        gradients[backend] = dict(
            zip(inputs, torch.autograd.grad(loss, list(inputs.values()), allow_unused=True), strict=True)
        )
    for name, expected in gradients["reference"].items():
        actual = gradients["chunked"][name]
        assert relative_error(actual, torch.zeros_like(actual) if expected is None else expected) < 1e-12, name


def test_without_initial_state_it_is_zero():
    case = make_case()
    zero = replace(case, initial_state=torch.zeros_like(case.initial_state))
    explicit, implicit = results(zero, "chunked"), results(replace(case, initial_state=None), "chunked")
    assert set(explicit) - set(implicit) == {"gradient of initial_state"}
    for name, value in implicit.items():
        assert torch.equal(value, explicit[name]), name


def test_strided_and_expanded_inputs():
    case = make_case(b=4, t=12)
    strided = {
        name: x.transpose(0, -1).contiguous().transpose(0, -1) if name != "q" else x[:1].expand_as(x)
        for name, x in case.tensors().items()
    }
    contiguous = {name: x.contiguous() for name, x in strided.items()}
    for actual, expected in zip(
        case.with_tensors(strided).run("chunked"), case.with_tensors(contiguous).run("chunked"), strict=True
    ):
        assert torch.equal(actual, expected)


def test_inference_mode_and_autocast_change_nothing():
    case = make_case(dtype=torch.float32, k=16, v=33)
    chunked_discretized._memory.kept.clear()
    with torch.inference_mode():
        inferred, _ = case.run("chunked")
    expected = results(case, "chunked")
    assert torch.equal(inferred, expected["o"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = results(case, "chunked")
    for name, value in under_autocast.items():
        assert torch.equal(value, expected[name]), name


def test_threads_do_not_share_memory():
    cases = [make_case(t=200, range_=range_) for range_ in RANGES]
    expected = [case.run("chunked")[0] for case in cases]
    with ThreadPoolExecutor(len(cases)) as pool:
        for _ in range(5):
            for (o, _), exact in zip(pool.map(lambda case: case.run("chunked"), cases), expected, strict=True):
                assert torch.equal(o, exact)


@pytest.mark.gpu
def test_gpu_agrees_with_cpu():
    case = make_case(5, 200, 2, 16, 33, dtype=torch.float32)
    computed = []
    for device in ("cpu", "cuda"):
        inputs = {name: x.to(device).requires_grad_() for name, x in case.tensors().items()}
        o, state = case.with_tensors(inputs).run("chunked")
        loss = o.square().sum() + state.square().sum()
        computed.append([o, state, *torch.autograd.grad(loss, list(inputs.values()))])
    for cpu, gpu in zip(*computed, strict=True):
        assert relative_error(gpu.cpu(), cpu) < TOLERANCE[torch.float32]


# torch's own tracing of autograd functions warns.
@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile_without_graph_breaks(dynamic):
    case = make_case(dtype=torch.float32)
    names, inputs = zip(*((name, x.requires_grad_()) for name, x in case.tensors().items()), strict=True)

    def loss(*xs):
        x = dict(zip(names, xs, strict=True))
        transition = Discretized(x["dt"].sigmoid(), x["A"], case.transition.eigenvalue_range)
        o, state = linear_recurrence(
            transition, x["q"], x["v"], write=x["write"], initial_state=x["initial_state"], backend="chunked"
        )
        return o.sin().sum() + state.cos().sum()

    expected = torch.autograd.grad(loss(*inputs), inputs)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for name, actual, exact in zip(names, torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
        assert relative_error(actual, exact) < 1e-6, name


@given(b=st.integers(1, 500), t=st.integers(1, 5000), k=st.integers(1, 64), v=st.integers(1, 20000))
def test_tiles_cover_the_batch_and_are_small(b, t, k, v):
    q, values = (torch.empty(b, t, 1, dim, device="meta") for dim in (k, v))
    tiling = chunked_discretized._Tiling.of(q, values)
    for slices, total in ((tiling.row_slices(), b), (tiling.time_slices(), t)):
        assert slices[0].start == 0
        assert slices[-1].stop == total
        assert all(before.stop == after.start for before, after in pairwise(slices))
        assert all(part.start < part.stop for part in slices)
    assert len(tiling.time_slices()) == tiling.tiles_along_time
    allowed = max(chunked_discretized._TILE_SIZE, chunked_discretized._MIN_STEPS * k * v)
    assert tiling.rows * tiling.steps * k * v <= allowed


def test_it_is_the_first_choice_for_discretized_transitions():
    assert available_backends(make_case().transition)[0] == "chunked"


def test_the_range_from_zero_to_one_agrees_with_the_scan_of_transformers():
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    case = make_case(t=60, k=16, v=24, range_=EigenvalueRange(0, 1), dtype=torch.float32)
    x, dt, A = case.v, case.transition.dt, case.transition.A
    expected, expected_state = mamba_selective_scan(
        x.squeeze(2).mT,
        dt.squeeze(2).mT,
        A.squeeze(0).mT,
        case.write.squeeze(2).mT,
        case.q.squeeze(2).mT,
        return_last_state=True,
    )
    o, state = replace(case, v=dt * x, initial_state=None).run("chunked")
    assert relative_error(o.squeeze(2).mT, expected) < TOLERANCE[torch.float32]
    assert relative_error(state.squeeze(1).mT, expected_state) < TOLERANCE[torch.float32]
