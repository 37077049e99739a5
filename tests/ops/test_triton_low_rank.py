"""A decay for each channel minus a matrix of rank one by Triton kernels: under the interpreter, and on a GPU."""

from dataclasses import replace

import pytest
import test_householder
import torch
from cases import check_against_reference, check_neighbours, relative_error, results
from test_low_rank import make_case, one_key
from triton_cases import FLOAT32, SIZES, check_compiled, check_on_gpu, check_operators, interpreted, short_segments

from statetrack.ops import available_backends, triton_common, triton_low_rank


def householder(*shape, **options):
    return test_householder.make_case(*shape, decay="channel", **options)


def test_without_a_gpu_the_backend_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"backend 'triton' can't serve LowRank: .*(CUDA device|not installed)"):
        make_case(**FLOAT32).run("triton")


@pytest.mark.parametrize("make", [make_case, householder])
def test_auto_prefers_it(make, monkeypatch):
    monkeypatch.setattr(triton_common, "HAS_TRITON", True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    backends = available_backends(make(**FLOAT32).transition)
    assert backends.index("triton") < backends.index("chunked")


@interpreted
@pytest.mark.parametrize("t", [1, 15, 16, 17, 40])
def test_lengths_around_the_chunk_agree_with_the_reference(t):
    check_against_reference(make_case(1, t, 1, 8, 5, **FLOAT32), "triton")


@interpreted
def test_segments_scanned_at_once_agree_with_the_reference(monkeypatch):
    short_segments(monkeypatch)
    check_against_reference(make_case(1, 65, 1, 8, 5, **FLOAT32), "triton")


@interpreted
def test_high_precision_keeps_states_in_float32():
    case = make_case(1, 20, 1, 8, 5, dtype=torch.float16)
    exact = results(case.with_tensors({name: x.double() for name, x in case.tensors().items()}), "reference")
    high = results(case, "triton", "high")
    assert all(relative_error(high[name], x) < 3e-4 for name, x in exact.items())
    assert relative_error(high["gradient of decay"], exact["gradient of decay"]) < 1e-5


@interpreted
@pytest.mark.parametrize(("t", "k", "v"), [(5, 1, 1), (20, 40, 72), (5, 17, 33), (5, 130, 20), (5, 20, 130)])
@pytest.mark.thin(2)
def test_sizes_that_are_no_powers_of_two_agree_with_the_reference(t, k, v):
    check_against_reference(make_case(1, t, 1, k, v, **FLOAT32), "triton")


@interpreted
def test_one_decay_for_each_head_agrees_with_the_reference():
    check_against_reference(make_case(1, 5, 2, decay="head", **FLOAT32), "triton")


@interpreted
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0])
@pytest.mark.thin(2)
def test_one_decay_for_ever_agrees_with_the_reference(value):
    case = make_case(1, 12, 1, **FLOAT32)
    decay = torch.full_like(case.transition.decay, value)
    check_against_reference(replace(case, transition=replace(case.transition, decay=decay)), "triton")


@interpreted
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0])
def test_such_decays_at_the_edges_of_chunks_agree_with_the_reference(value):
    case = make_case(1, 34, 1, 8, 5, **FLOAT32)
    decay = case.transition.decay.clone()
    decay[:, 1::5], decay[:, 3::7], decay[:, 4::11] = -1.0, 1.0, 0.0
    decay[:, 15::16], decay[:, 16::32] = value, value
    check_against_reference(replace(case, transition=replace(case.transition, decay=decay)), "triton")


@interpreted
@pytest.mark.parametrize("cu_seqlens", [[0, 17], [0, 0, 3, 3, 17, 17]], ids=str)
def test_packed_sequences_agree_with_the_reference(cu_seqlens):
    check_against_reference(make_case(1, 17, 1, cu_seqlens=cu_seqlens, **FLOAT32), "triton")


@interpreted
@pytest.mark.filterwarnings("ignore:invalid value")  # NumPy's, of what NaN leads to
@pytest.mark.slow
def test_nan_in_a_packed_sequence_stays_there():
    check_neighbours(make_case(1, 45, 2, cu_seqlens=[0, 18, 27, 45], **FLOAT32), "triton")


@interpreted
def test_float16_agrees_with_the_reference():
    check_against_reference(make_case(1, 20, 1, dtype=torch.float16), "triton")


@interpreted
@pytest.mark.parametrize(("beta", "decay"), [(2.0, 1.0), (1.9, 1.0), (2.0, -1.0)])
def test_one_key_repeated(beta, decay):
    check_against_reference(one_key(32, beta, decay=decay, k=16), "triton", 1e-4)


@interpreted
@pytest.mark.parametrize(("t", "n", "normalize"), [(1, 1, True), (17, 1, False), (1, 3, False), (6, 3, True)])
def test_householder_products_with_a_decay_for_each_channel_agree_with_the_reference(t, n, normalize):
    check_against_reference(householder(1, t, n, 1, 12, 9, normalize=normalize, **FLOAT32), "triton")


@interpreted
def test_householder_products_whose_queries_are_shorter_numbers_than_their_decays_agree_with_the_reference():
    check_against_reference(householder(1, 9, 2, 1, 12, 9, normalize=True, dtype=torch.float16), "triton")


@interpreted
def test_packed_householder_products_agree_with_the_reference():
    check_against_reference(householder(1, 10, 2, 1, 12, 9, cu_seqlens=[0, 0, 3, 9, 10], **FLOAT32), "triton")


@interpreted
def test_operators_are_what_they_say():
    check_operators(triton_low_rank, make_case(1, 17, 1, **FLOAT32))


@interpreted
@pytest.mark.parametrize(("make", "longer"), [(make_case, 18), (householder, 7)], ids=["low rank", "householder"])
def test_compiled_in_one_graph_for_every_length(make, longer):
    check_compiled(make(1, 5, h=1, k=8, v=8, **FLOAT32), make(1, longer, h=1, k=8, v=8, **FLOAT32))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("k", "v"), [(64, 64), (128, 128), (40, 72), (256, 64)])
def test_values_and_gradients_on_a_gpu(k, v, dtype):
    check_on_gpu(make_case(2, 150, 2, k, v, dtype=dtype))


@pytest.mark.gpu
@pytest.mark.parametrize(("k", "v"), SIZES)
def test_sizes_of_all_tiles_on_a_gpu(k, v):
    check_on_gpu(make_case(2, 150, 2, k, v, dtype=torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("n", [1, 2])
def test_householder_products_with_a_decay_for_each_channel_on_a_gpu(n, dtype):
    check_on_gpu(householder(2, 150, n, 2, 64, 64, normalize=True, dtype=dtype))


@pytest.mark.gpu
@pytest.mark.parametrize(("beta", "decay"), [(2.0, 1.0), (1.9, 1.0), (2.0, -1.0)])
def test_one_key_repeated_on_a_gpu(beta, decay):
    check_on_gpu(one_key(2048, beta, decay=decay), 1e-3)
