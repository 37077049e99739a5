"""What the Triton backends share."""

import pytest
import torch

from statetrack.ops import triton_convolution, triton_cross_entropy, triton_norm, triton_normalize
from statetrack.ops.triton_common import CHECKED_ON_A_CARD, ON_REQUEST


@pytest.mark.parametrize(
    "kernels",
    [triton_convolution, triton_cross_entropy, triton_norm, triton_normalize],
    ids=["convolution", "cross-entropy", "norm", "normalize"],
)
def test_kernels_that_no_card_has_checked_and_timed_are_not_used(kernels, monkeypatch):
    monkeypatch.setattr(kernels, "PRIORITY", ON_REQUEST)
    monkeypatch.setattr(kernels, "unavailable", lambda *tensors: None)
    x = torch.zeros(1)
    assert not kernels.serves(x)
    monkeypatch.setattr(kernels, "PRIORITY", CHECKED_ON_A_CARD)
    assert kernels.serves(x)
