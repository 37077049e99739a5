"""A second length or batch size compiles nothing anew: what triton tells kernels apart by does not hold T or B."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
# None, which any rows fill, and so many that all sizes are cut into segments.
@pytest.mark.parametrize("processors", [0, 10**6])
@pytest.mark.parametrize("op", ["householder", "diagonal", "discretized", "low_rank", "selective"])
def test_kernels_are_the_same_for_every_batch_size_and_length(op, processors):
    folder = Path(__file__).parent
    path = [str(folder.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(folder / "kernel_keys.py"), op, str(processors)],
        cwd=folder.parents[1],
        env=environment | {"PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for first, *more in json.loads(done.stdout):
        assert first >= 2  # forward and backward
        assert more == [0] * len(more)
