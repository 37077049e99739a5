"""Signed diagonal linear attention by Triton kernels: under the interpreter, and on a GPU (marked `gpu`)."""

from dataclasses import replace

import pytest
import torch
from cases import check_against_reference, check_neighbours, relative_error, results
from test_diagonal import KINDS, make_case
from triton_cases import (
    FLOAT32,
    SIZES,
    check_compiled,
    check_on_gpu,
    check_operators,
    gpu_results,
    interpreted,
    on_gpu,
    short_segments,
)

from statetrack.ops import available_backends, triton_common, triton_diagonal
from statetrack.transition import Diagonal


@pytest.fixture(params=[32, 64])
def path(request, monkeypatch):
    """float32 operands, and the same in what bfloat16, which the interpreter can't multiply, takes: chunks of 64 tokens
    and sums of decays' gradients in two halves."""
    monkeypatch.setattr(triton_diagonal, "_split", lambda operand: request.param == 64)
    monkeypatch.setattr(triton_diagonal, "_tokens", lambda operand: request.param)
    triton_diagonal._shape.cache_clear()
    yield request.param
    triton_diagonal._shape.cache_clear()


def at_edges(case, value):
    """Decays of `value` at the first and last tokens of blocks of 16, and of exactly 0, 1 and -1 elsewhere too."""
    decay = case.transition.decay.clone()
    decay[:, 1::5], decay[:, 3::7], decay[:, 4::11] = -1.0, 1.0, 0.0
    decay[:, 15::16], decay[:, 16::32] = value, value
    return replace(case, transition=replace(case.transition, decay=decay))


def test_without_a_gpu_the_backend_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"backend 'triton' can't serve Diagonal: .*(CUDA device|not installed)"):
        make_case(**FLOAT32).run("triton")


def test_auto_prefers_it(monkeypatch):
    monkeypatch.setattr(triton_common, "HAS_TRITON", True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    backends = available_backends(make_case(**FLOAT32).transition)
    assert backends.index("triton") < backends.index("chunked")


@pytest.mark.parametrize("name", ["q", "v", "write", "initial_state"])
def test_float64_is_refused(name, monkeypatch):
    monkeypatch.setattr(triton_common, "HAS_TRITON", True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    case = make_case(**FLOAT32)
    with pytest.raises(ValueError, match="give q, v, write and initial_state in float32"):
        replace(case, **{name: getattr(case, name).double()}).run("triton")


def test_keys_of_too_many_channels_are_refused(monkeypatch):
    monkeypatch.setattr(triton_common, "HAS_TRITON", True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="keys of up to 256 channels, got 257"):
        make_case(1, 2, 1, 257, 1, **FLOAT32).run("triton")


@interpreted
@pytest.mark.parametrize("decay", KINDS)
@pytest.mark.parametrize("t", [1, 17, 32, 33, 64, 65])
@pytest.mark.thin(3)
def test_lengths_around_the_chunk_agree_with_the_reference(t, decay, path):
    check_against_reference(make_case(1, t, 1, 8, 5, decay=decay, **FLOAT32), "triton")


@interpreted
@pytest.mark.parametrize(("t", "decay"), [(97, "head"), (129, "head"), (129, "channel")])
def test_segments_scanned_at_once_agree_with_the_reference(t, decay, monkeypatch):
    short_segments(monkeypatch)
    check_against_reference(make_case(1, t, 1, 8, 5, decay=decay, **FLOAT32), "triton")


@interpreted
@pytest.mark.parametrize("decay", KINDS)
def test_high_precision_takes_operands_of_float32(decay):
    """float16 in the place of bfloat16, which the interpreter can't multiply, as operands of default precision."""
    case = make_case(1, 35, 1, decay=decay, dtype=torch.float16)
    exact = results(case.with_tensors({name: x.double() for name, x in case.tensors().items()}), "reference")
    high = results(case, "triton", "high")
    assert relative_error(high["final state"], exact["final state"]) < 1e-6
    assert all(relative_error(high[name], x) < 3e-4 for name, x in exact.items())


@interpreted
@pytest.mark.parametrize("decay", KINDS)
@pytest.mark.parametrize(("k", "v"), [(1, 1), (40, 72), (17, 33), (130, 20), (20, 130)])
@pytest.mark.thin(2)
def test_sizes_that_are_no_powers_of_two_agree_with_the_reference(k, v, decay):
    check_against_reference(make_case(1, 20, 1, k, v, decay=decay, **FLOAT32), "triton")


@interpreted
@pytest.mark.parametrize("decay", KINDS)
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 1e-30])
@pytest.mark.thin(3)
def test_one_decay_for_ever_agrees_with_the_reference(value, decay, path):
    case = make_case(1, 40, 1, decay=decay, **FLOAT32)
    check_against_reference(replace(case, transition=Diagonal(torch.full_like(case.transition.decay, value))), "triton")


@interpreted
@pytest.mark.parametrize("decay", KINDS)
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0])
@pytest.mark.thin(3)
def test_such_decays_at_the_edges_of_blocks_agree_with_the_reference(value, decay, path):
    check_against_reference(at_edges(make_case(1, path + 2, 1, 8, 5, decay=decay, **FLOAT32), value), "triton")


@interpreted
@pytest.mark.parametrize("decay", KINDS)
@pytest.mark.parametrize("cu_seqlens", [[0, 40], [0, 0, 3, 3, 20, 21, 40, 40]], ids=str)
@pytest.mark.thin(2)
def test_packed_sequences_agree_with_the_reference(cu_seqlens, decay):
    check_against_reference(make_case(1, 40, 2, decay=decay, cu_seqlens=cu_seqlens, **FLOAT32), "triton")


@interpreted
@pytest.mark.parametrize("decay", KINDS)
@pytest.mark.filterwarnings("ignore:invalid value")  # NumPy's, of what NaN leads to
@pytest.mark.thin(2)
def test_nan_in_a_packed_sequence_stays_there(decay):
    check_neighbours(make_case(1, 45, 2, decay=decay, cu_seqlens=[0, 18, 27, 45], **FLOAT32), "triton")


@interpreted
@pytest.mark.parametrize("decay", KINDS)
def test_float16_agrees_with_the_reference(decay):
    check_against_reference(make_case(1, 35, 2, decay=decay, dtype=torch.float16), "triton")


@interpreted
@pytest.mark.parametrize("decay", KINDS)
def test_no_initial_state_is_a_state_of_zeros(decay):
    case = make_case(1, 20, 1, decay=decay, **FLOAT32)
    without, end = replace(case, initial_state=None).run("triton")
    zeros, end_of_zeros = replace(case, initial_state=torch.zeros_like(case.initial_state)).run("triton")
    assert torch.equal(without, zeros)
    assert torch.equal(end, end_of_zeros)


@interpreted
@pytest.mark.parametrize("decay", KINDS)
def test_operators_are_what_they_say(decay):
    check_operators(triton_diagonal, make_case(1, 20, 1, decay=decay, **FLOAT32))


@interpreted
@pytest.mark.parametrize("decay", KINDS)
def test_compiled_in_one_graph_for_every_length(decay):
    check_compiled(make_case(1, 17, 1, decay=decay, **FLOAT32), make_case(1, 33, 1, decay=decay, **FLOAT32))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("decay", KINDS)
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0])
def test_decays_at_the_edges_of_blocks_on_a_gpu(value, decay, dtype):
    check_on_gpu(at_edges(make_case(1, 300, 2, 64, 64, decay=decay, dtype=dtype), value))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("decay", KINDS)
@pytest.mark.parametrize(("k", "v"), [(128, 128), (64, 64), (40, 72), (256, 256), (256, 64)])
def test_values_and_gradients_on_a_gpu(k, v, decay, dtype):
    check_on_gpu(make_case(2, 150, 2, k, v, decay=decay, dtype=dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("decay", KINDS)
@pytest.mark.parametrize(("k", "v"), SIZES)
def test_sizes_of_all_tiles_on_a_gpu(k, v, decay):
    check_on_gpu(make_case(2, 150, 2, k, v, decay=decay, dtype=torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("decay", KINDS)
def test_compiled_on_a_gpu_in_one_graph(decay):
    case = on_gpu(make_case(1, 200, 2, 32, 32, decay=decay, dtype=torch.bfloat16))
    eager = gpu_results(case, "triton")
    run = torch.compile(lambda *xs: case.with_tensors(dict(zip(case.tensors(), xs, strict=True))).run("triton"))
    for computed, name in zip(run(*case.tensors().values()), ("o", "final state"), strict=True):
        assert relative_error(computed, eager[name]) < 1e-2
