"""A second length or batch size compiles nothing anew: what triton tells kernels apart by does not hold T or B."""

import json

import pytest
from triton_cases import needs_triton, run_compiler


@needs_triton
# None, which any rows fill, and so many that all sizes are cut into segments.
@pytest.mark.parametrize("processors", [0, 10**6])
@pytest.mark.parametrize("op", ["householder", "diagonal", "discretized", "low_rank", "selective"])
@pytest.mark.thin(2)
def test_kernels_are_the_same_for_every_batch_size_and_length(op, processors):
    for first, *more in json.loads(run_compiler("tests/ops/kernel_keys.py", op, str(processors))):
        assert first >= 2  # forward and backward
        assert more == [0] * len(more)
