"""Mamba's selective scan by Triton kernels: under the interpreter, and on a GPU (marked `gpu`)."""

from dataclasses import replace

import pytest
import torch
from cases import check_against_reference, results
from test_discretized import RANGES, SIGNED, make_case
from triton_cases import FLOAT32, check_compiled, check_on_gpu, check_operators, gpu_results, interpreted, on_gpu

from statetrack.ops import available_backends, triton_common, triton_discretized


def walk(monkeypatch, warps):
    """Tiles of four steps, walked through by one program or, with many warps to give work to, in segments."""
    for name, value in {
        "_STEPS": 4, "_FORWARD_WARPS": warps, "_BACKWARD_WARPS": warps, "_FEWEST_SEGMENTS": 2, "_SHORTEST_SEGMENT": 1,
    }.items():  # fmt: skip
        monkeypatch.setattr(triton_discretized, name, value)


@pytest.fixture(params=[0, 10**6], ids=["whole", "segments"])
def tiles(request, monkeypatch):
    walk(monkeypatch, request.param)


def with_lower_end(case):
    h, v = case.transition.A.shape[0], case.transition.A.shape[2]
    lower_end = -torch.rand(h, v, generator=torch.Generator().manual_seed(1))
    return replace(case, transition=replace(case.transition, lower_end=lower_end))


def test_without_a_gpu_the_backend_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"backend 'triton' can't serve Discretized: .*(CUDA device|not installed)"):
        make_case(**FLOAT32).run("triton")


def test_auto_prefers_it(monkeypatch):
    monkeypatch.setattr(triton_common, "HAS_TRITON", True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    backends = available_backends(make_case(**FLOAT32).transition)
    assert backends.index("triton") < backends.index("chunked")


@interpreted
@pytest.mark.parametrize("t", [1, 7, 8, 13])
def test_lengths_around_the_tile_agree_with_the_reference(t, tiles):
    check_against_reference(make_case(1, t, 1, 2, 3, **FLOAT32), "triton")


@interpreted
@pytest.mark.parametrize("range_", RANGES, ids=str)
def test_every_range_agrees_with_the_reference(range_, tiles):
    check_against_reference(make_case(1, 11, 1, 2, 3, range_=range_, extreme=True, **FLOAT32), "triton")


@interpreted
@pytest.mark.parametrize(("b", "h", "k", "v"), [(1, 1, 1, 1), (2, 2, 3, 5), (1, 1, 2, 37)])
def test_every_shape_agrees_with_the_reference(b, h, k, v, tiles):
    check_against_reference(make_case(b, 9, h, k, v, **FLOAT32), "triton")


@interpreted
@pytest.mark.parametrize(("keys", "block", "warps"), [(2, 32, 1), (1, 32, 2), (4, 64, 2)])
@pytest.mark.parametrize("v", [37, 64])
def test_every_share_of_a_thread_agrees_with_the_reference(keys, block, warps, v, monkeypatch):
    walk(monkeypatch, 0)
    monkeypatch.setattr(triton_discretized, "_KEYS", keys)
    for name in ("_FORWARD", "_BACKWARD"):
        monkeypatch.setattr(triton_discretized, name, triton_common.Launch(block, warps, 1))
    check_against_reference(make_case(1, 6, 1, 4, v, extreme=True, **FLOAT32), "triton")


@interpreted
def test_a_lower_end_for_each_channel_agrees_with_the_reference(tiles):
    check_against_reference(with_lower_end(make_case(2, 11, 2, 2, 3, extreme=True, **FLOAT32)), "triton")


@interpreted
@pytest.mark.parametrize("cu_seqlens", [[0, 12], [0, 0, 3, 3, 11, 12, 12]], ids=str)
def test_packed_sequences_agree_with_the_reference(cu_seqlens, tiles):
    check_against_reference(make_case(1, 12, 1, 2, 3, cu_seqlens=cu_seqlens, **FLOAT32), "triton")


@interpreted
def test_float16_agrees_with_the_reference(tiles):
    check_against_reference(make_case(1, 11, 1, 2, 3, dtype=torch.float16), "triton")


@interpreted
def test_both_ways_to_walk_through_the_tiles_agree(monkeypatch):
    case, found = make_case(1, 18, 1, 2, 3, **FLOAT32), []
    for warps in (0, 10**6):
        walk(monkeypatch, warps)
        found.append(results(case, "triton"))
    for name, whole in found[0].items():
        torch.testing.assert_close(whole, found[1][name], rtol=1e-5, atol=1e-5)


@interpreted
def test_operators_are_what_they_say():
    check_operators(triton_discretized, make_case(1, 9, 1, 2, 3, **FLOAT32))


@interpreted
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile does it
def test_compiled_in_one_graph_for_every_length():
    check_compiled(make_case(1, 9, 1, 2, 3, **FLOAT32), make_case(1, 13, 1, 2, 3, **FLOAT32))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("warps", [0, 10**6], ids=["whole", "segments"])
@pytest.mark.parametrize(("b", "h", "k", "v"), [(2, 1, 16, 256), (1, 3, 5, 40), (1, 1, 64, 64)])
def test_values_and_gradients_on_a_gpu(b, h, k, v, warps, dtype, monkeypatch):
    walk(monkeypatch, warps)
    check_on_gpu(make_case(b, 150, h, k, v, range_=SIGNED, dtype=dtype, extreme=True))


@pytest.mark.gpu
@pytest.mark.parametrize("warps", [0, 10**6], ids=["whole", "segments"])
@pytest.mark.parametrize("launch", [triton_common.Launch(16, 1, 1), triton_common.Launch(64, 4, 1)], ids=str)
def test_a_lower_end_on_a_gpu(launch, warps, monkeypatch):
    walk(monkeypatch, warps)
    for name in ("_FORWARD", "_BACKWARD"):
        monkeypatch.setattr(triton_discretized, name, launch)
    check_on_gpu(with_lower_end(make_case(2, 150, 2, 16, 40, **FLOAT32)))


@pytest.mark.gpu
def test_gradients_on_a_gpu_are_the_same_every_time():
    case = on_gpu(make_case(4, 300, 1, 16, 512, dtype=torch.bfloat16))
    first, second = gpu_results(case, "triton"), gpu_results(case, "triton")
    assert all(torch.equal(first[name], second[name]) for name in first)
