"""The Triton kernels: under Triton's interpreter with TRITON_INTERPRET=1, and on a GPU (marked `gpu`).

The interpreter can't multiply bfloat16; `split` runs the path of bfloat16 with halves in float32 there.
"""

import importlib
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from cases import check_against_reference, check_neighbours, relative_error, results
from test_householder import SHORT, make_case, one_key, parity_bits, with_short_keys
from triton_cases import (
    FLOAT32,
    SIZES,
    check_compiled,
    check_on_gpu,
    check_operators,
    interpreted,
    on_gpu,
    short_segments,
)

from statetrack.ops import available_backends, linear_recurrence, triton_common, triton_householder


@pytest.fixture(autouse=True)
def _own_shapes():
    """Shapes are cached by sizes, whatever else a test has changed."""
    triton_householder._shape.cache_clear()
    yield
    triton_householder._shape.cache_clear()


@pytest.fixture(params=["whole", "split", "segments"])
def path(request, monkeypatch):
    """float32 operands; the same in two halves; and that with segments scanned at once."""
    if request.param != "whole":
        monkeypatch.setattr(triton_householder, "_operands", lambda dtypes: (torch.float32, True))
    if request.param == "segments":
        short_segments(monkeypatch)


# For what runs the same code with segments as without.
without_segments = pytest.mark.parametrize("path", ["whole", "split"], indirect=True)


def test_without_a_gpu_the_backend_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    case = make_case(**FLOAT32)
    assert "triton" not in available_backends(case.transition)
    with pytest.raises(ValueError, match=r"backend 'triton' can't serve Householder: .*(CUDA device|not installed)"):
        case.run("triton")


def test_without_triton_the_backend_says_why(monkeypatch):
    monkeypatch.setattr(triton_common, "HAS_TRITON", False)
    case = make_case(**FLOAT32)
    with pytest.raises(ValueError, match="the package triton is not installed"):
        case.run("triton")
    assert case.run("auto")[0].isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"dtype": torch.float64}, "does not serve float64"),
        ({"decay": "channel", **FLOAT32}, "one decay for each head"),
        ({"k": 257, **FLOAT32}, "up to 256 channels, not 257"),
        ({"n": 65, "t": 2, **FLOAT32}, "up to 64 factors a token, not 65"),
    ],
)
def test_what_is_not_served_is_said(arguments, reason, monkeypatch):
    monkeypatch.setattr(triton_common, "HAS_TRITON", True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert reason in (triton_householder.supports(make_case(**arguments).transition) or "")


@interpreted
@pytest.mark.parametrize("decay", ["none", "head"])
@pytest.mark.parametrize(("t", "n"), [(1, 1), (32, 1), (64, 1), (65, 1), (129, 1), (1, 3), (10, 3), (22, 3), (43, 3)])
@pytest.mark.thin(2)
def test_lengths_around_the_chunk_agree_with_the_reference(t, n, decay, path):
    check_against_reference(make_case(1, t, n, 1, 8, 5, decay=decay, **FLOAT32), "triton")


@interpreted
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("size", [1e-3, 1e-10, 1.2])
@pytest.mark.thin(2)
def test_decays_of_one_size_agree_with_the_reference(size, n, path):
    case = make_case(1, 70 if n == 1 else 25, n, 1, 8, 5, decay="head", **FLOAT32)
    decay = size * torch.where(case.transition.decay < 0.5, -1.0, 1.0)
    check_against_reference(case.with_tensors(case.tensors() | {"decay": decay}), "triton")


@interpreted
# In the half of a tile that is masked; on some processors numpy also says so of the product after that.
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
def test_decays_whose_product_over_a_chunk_exceeds_2_to_the_63_agree_with_the_reference(path):
    case = make_case(1, 32, 1, 1, 8, 5, decay="head", **FLOAT32)
    decay = torch.full_like(case.transition.decay, 10.0)
    check_against_reference(case.with_tensors(case.tensors() | {"decay": decay}), "triton")


@interpreted
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("t", "n", "k", "v"), [(30, 1, 1, 1), (33, 2, 40, 72), (5, 16, 17, 9), (13, 5, 130, 20)])
@pytest.mark.thin(3)
def test_sizes_that_are_no_powers_of_two_agree_with_the_reference(t, n, k, v, normalize, path):
    check_against_reference(make_case(1, t, n, 1, k, v, decay="head", normalize=normalize, **FLOAT32), "triton")


@interpreted
@pytest.mark.parametrize("normalize", [True, False])
def test_zero_keys_do_nothing(normalize, path):
    case = make_case(1, 40, 2, 2, normalize=normalize, **FLOAT32)
    keys = case.transition.k.clone()
    keys[:, ::3] = 0
    check_against_reference(replace(case, transition=replace(case.transition, k=keys)), "triton")


@interpreted
@without_segments
@pytest.mark.parametrize("length", SHORT)
def test_short_keys_do_nothing(length, path):
    check_against_reference(with_short_keys(make_case(1, 20, 2, 1, **FLOAT32), 0.9 * length), "triton")


@interpreted
@pytest.mark.parametrize("length", [0.9e-9, 1e-20])
def test_short_keys_do_nothing_when_decoding(length):
    case = with_short_keys(make_case(t=2, **FLOAT32), length)
    assert all(map(torch.equal, case.run("triton"), with_short_keys(case, 0).run("triton")))


@interpreted
@pytest.mark.parametrize("cu_seqlens", [[0, 40], [0, 0, 3, 3, 20, 21, 40, 40]], ids=str)
def test_packed_sequences_agree_with_the_reference(cu_seqlens):
    check_against_reference(make_case(1, 40, 2, 2, decay="head", cu_seqlens=cu_seqlens, **FLOAT32), "triton")


@interpreted
@pytest.mark.filterwarnings("ignore:invalid value")  # NumPy's, of what NaN leads to
def test_nan_in_a_packed_sequence_stays_there():
    check_neighbours(make_case(1, 45, 2, 2, decay="head", cu_seqlens=[0, 18, 27, 45], **FLOAT32), "triton")


@interpreted
@pytest.mark.parametrize("t", [1, 4])
def test_decoding_agrees_with_the_reference(t):
    case = make_case(t=t, n=2, decay="head", **FLOAT32)
    o, state = case.run("triton")
    expected, end = case.run("reference")
    assert relative_error(o, expected) < 1e-6
    assert relative_error(state, end) < 1e-6


@interpreted
@pytest.mark.parametrize("wanted", [0, 1], ids=["o", "final state"])
def test_gradients_of_one_of_the_results_agree_with_the_reference(wanted, path):
    case = make_case(1, 70, 1, 1, 8, 5, decay="head", **FLOAT32)
    found = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        inputs = {name: x.to(dtype).requires_grad_() for name, x in case.tensors().items()}
        result = case.with_tensors(inputs).run(backend)[wanted]
        found.append(torch.autograd.grad(result.square().sum(), list(inputs.values()), allow_unused=True))
    for name, computed, expected in zip(case.tensors(), *found, strict=True):
        # A final state does not depend on the queries.
        assert expected is not None or name == "q"
        assert relative_error(computed, torch.zeros_like(computed) if expected is None else expected) < (
            path or 2e-5
        ), name


@interpreted
@pytest.mark.parametrize("decay", ["none", "head"])
def test_compiled_in_one_graph_for_every_length(decay):
    check_compiled(make_case(1, 20, 2, 1, decay=decay, **FLOAT32), make_case(1, 40, 2, 1, decay=decay, **FLOAT32))


@interpreted
def test_operators_are_what_they_say(path):
    check_operators(triton_householder, make_case(1, 40, 2, 1, **FLOAT32))
    check_operators(triton_householder, make_case(1, 70, 1, 1, decay="head", **FLOAT32))


@interpreted
@pytest.mark.parametrize(
    ("t", "beta"), [(1024, 2.0), (256, 1.9), (512, parity_bits)], ids=["beta=2", "beta=1.9", "parity bits"]
)
@pytest.mark.thin(3)
def test_one_key_repeated(t, beta, path):
    # Up to 2e-5, or up to 3.5e-5 where numpy multiplies by OpenBLAS's kernels for AVX2 (OPENBLAS_CORETYPE=Haswell),
    # which round the product of two equal keys differently in different places of a tile; tensor cores don't.
    check_against_reference(one_key(t, beta, k=16), "triton", 5e-5)


@interpreted
@without_segments
@pytest.mark.parametrize("decay", ["none", "head"])
@pytest.mark.parametrize(("n", "k"), [(1, 37), (3, 37), (1, 48)])
@pytest.mark.thin(2)
def test_gradients_of_keys_in_several_tiles_agree_with_the_reference(n, k, decay, path, monkeypatch):
    monkeypatch.setattr(triton_householder, "_KEYS", 16)
    t = 40 if n == 1 else 15
    check_against_reference(make_case(1, t, n, 1, k, 5, decay=decay, normalize=n == 1, **FLOAT32), "triton")


@interpreted
@without_segments
@pytest.mark.parametrize(("n", "decay"), [(1, "none"), (1, "head"), (3, "none"), (3, "head")])
@pytest.mark.thin(2)
def test_states_in_pieces_agree_with_the_reference(n, decay, path):
    t = 70 if n == 1 else 25
    check_against_reference(make_case(1, t, n, 1, 144, 40, decay=decay, normalize=n == 1, **FLOAT32), "triton")


@interpreted
@pytest.mark.parametrize("cut", ["whole", "segments", "pieces"])
@pytest.mark.parametrize("decay", ["none", "head"])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.thin(2)
def test_high_precision_rounds_results_alone(n, decay, cut, monkeypatch):
    """float16 in the place of bfloat16, which the interpreter can't multiply: halves of 22 bits, and wholes of 11.

    Its range is too small for what stands for a gate of 0.
    """
    monkeypatch.setattr(triton_householder, "_operands", lambda dtypes: (torch.float16, True))
    if cut == "segments":
        short_segments(monkeypatch)
    if cut == "pieces":
        monkeypatch.setattr(triton_householder, "_LONGEST_WHOLE", 16)
        monkeypatch.setattr(triton_householder, "_PIECE", 16)
    case = make_case(1, 150 if n == 1 else 50, n, 1, 24, 20, decay=decay, dtype=torch.float16)
    gates = {name: x for name, x in case.tensors().items() if name in ("beta", "decay")}
    case = case.with_tensors({name: torch.where(x == 0, 0.5, x) for name, x in gates.items()})
    exact = results(case.with_tensors({name: x.double() for name, x in case.tensors().items()}), "reference")
    default, high = results(case, "triton"), results(case, "triton", "high")
    for name, expected in exact.items():
        # Rounding a result to 11 bits is an error of 2e-4.
        limit = 3e-4 if high[name].dtype == torch.float16 else 1e-5
        assert relative_error(high[name], expected) < limit, name
    # By default the products of queries and keys are rounded before they are summed.
    name = "gradient of initial_state"
    assert 1e-5 < relative_error(default[name], exact[name]) < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("decay", ["none", "head"])
@pytest.mark.parametrize(
    ("n", "k", "v"),
    [(1, 128, 128), (2, 64, 64), (3, 40, 72), (1, 256, 256), (2, 256, 200), (1, 144, 40), (1, 256, 32), (16, 32, 32)],
)
def test_values_and_gradients_on_a_gpu(n, k, v, decay, dtype):
    check_on_gpu(make_case(2, 150, n, 2, k, v, decay=decay, dtype=dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("decay", ["none", "head"])
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize(("k", "v"), SIZES)
def test_sizes_of_all_tiles_on_a_gpu(k, v, n, decay):
    check_on_gpu(make_case(2, 150, n, 2, k, v, decay=decay, dtype=torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("beta", [2.0, 1.9, parity_bits], ids=["beta=2", "beta=1.9", "parity bits"])
@pytest.mark.parametrize(("t", "k"), [(256, 128), (2048, 128), (2048, 256)])
def test_one_key_repeated_on_a_gpu(t, k, beta):
    check_on_gpu(one_key(t, beta, dtype=torch.bfloat16, k=k), 1e-2)


@pytest.mark.gpu
def test_compiled_on_a_gpu_in_one_graph():
    case = on_gpu(make_case(1, 200, 2, 2, 32, 32, decay="head", dtype=torch.bfloat16))
    leaves = [x.requires_grad_() for x in case.tensors().values()]

    def loss(*tensors):
        o, state = case.with_tensors(dict(zip(case.tensors(), tensors, strict=True))).run("triton")
        return o.float().square().sum() + state.square().sum()

    eager = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    assert all(relative_error(a, e) < 1e-2 for a, e in zip(compiled, eager, strict=True))


@pytest.mark.gpu
def test_a_second_length_and_batch_compile_nothing_anew():
    module = importlib.import_module("statetrack.ops.kernels.householder")

    def run(b, t):
        case = on_gpu(make_case(b, t, 1, 2, 32, 32, dtype=torch.bfloat16))
        with torch.no_grad():
            linear_recurrence(case.transition, case.q, case.v, backend="triton")
        return sum(len(cache[0]) for cache in module.scan_forward.device_caches.values())

    before = run(1, 100)
    assert run(2, 333) == run(3, 64) == before


def test_importing_the_package_imports_no_triton():
    code = "import sys, statetrack.ops; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
