"""What the Triton backends share."""

import pytest
import torch

from statetrack.ops import triton_convolution, triton_cross_entropy
from statetrack.ops.triton_common import CHECKED_ON_A_CARD


@pytest.mark.parametrize("kernels", [triton_convolution, triton_cross_entropy], ids=["convolution", "cross-entropy"])
def test_kernels_that_no_card_has_checked_and_timed_are_not_used(kernels, monkeypatch):
    monkeypatch.setattr(kernels, "unavailable", lambda *tensors: None)
    x = torch.zeros(1)
    assert kernels.serves(x) == (kernels.PRIORITY == CHECKED_ON_A_CARD)
    monkeypatch.setattr(kernels, "PRIORITY", CHECKED_ON_A_CARD)
    assert kernels.serves(x)
