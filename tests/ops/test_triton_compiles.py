"""Every Triton kernel compiles for a Hopper GPU, on any machine, without the assembler's known mistakes, and fits."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
# Whole and with segments, and with what high precision adds.
@pytest.mark.parametrize("options", [[], ["--processors", "132"], ["--precision", "high"]], ids=" ".join)
@pytest.mark.parametrize("op", ["householder", "diagonal", "discretized", "low_rank", "selective"])
def test_every_kernel_compiles_and_fits(op, options, tmp_path):
    check(op, ["64"], options, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize(
    ("op", "sizes"), [("householder", ["32x64", "160x128"]), ("diagonal", ["16x32", "32x64", "16x128"])]
)
def test_nothing_is_wrong_with_tiles_that_an_assembler_was_wrong_about(op, sizes, tmp_path):
    check(op, sizes, [], tmp_path)


def check(op, sizes, options, tmp_path):
    # A process of its own: a stand-in takes the place of triton's driver, and the interpreter must be off.
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    command = ["-m", "benchmarks.kernel_resources", "--ops", op, "--sizes", *sizes, "--dtypes", "bfloat16", *options]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=Path(__file__).parents[2],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "registers" in done.stdout
