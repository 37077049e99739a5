"""Every Triton kernel compiles for a Hopper GPU, on any machine, without the assembler's known mistakes, and fits."""

import pytest
from triton_cases import needs_triton, run_compiler


@pytest.mark.slow
@needs_triton
# Whole and with segments, and with what high precision adds.
@pytest.mark.parametrize("options", [[], ["--processors", "132"], ["--precision", "high"]], ids=" ".join)
@pytest.mark.parametrize("op", ["householder", "diagonal", "discretized", "low_rank", "selective", "slstm"])
def test_every_kernel_compiles_and_fits(op, options, tmp_path):
    check(op, ["64"], options, tmp_path)


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize(
    ("op", "sizes"), [("householder", ["32x64", "160x128"]), ("diagonal", ["16x32", "32x64", "16x128"])]
)
def test_nothing_is_wrong_with_tiles_that_an_assembler_was_wrong_about(op, sizes, tmp_path):
    check(op, sizes, [], tmp_path)


def check(op, sizes, options, tmp_path):
    command = ["-m", "benchmarks.kernel_resources", "--ops", op, "--sizes", *sizes, "--dtypes", "bfloat16", *options]
    assert "registers" in run_compiler(*command, TRITON_CACHE_DIR=str(tmp_path))
