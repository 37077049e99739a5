"""What the Triton backends share."""

import pytest
import torch
from triton_cases import interpreted

from statetrack.ops import triton_convolution, triton_cross_entropy, triton_norm, triton_normalize
from statetrack.ops.triton_common import CHECKED_ON_A_CARD, ON_REQUEST, sum_parts


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


@interpreted
@pytest.mark.parametrize("shape", [(1,), (3, 1, 4), (17,)], ids=str)
@pytest.mark.parametrize("count", [1, 256, 300])
def test_parts_of_a_gradient_are_summed(count, shape):
    """Fewer and more than a program sums at once, of two sets."""
    parts = torch.randn(2, count, *shape)
    total = sum_parts(parts, torch.empty(2, *shape))
    torch.testing.assert_close(total, parts.double().sum(1).float(), rtol=1e-5, atol=1e-5)
    assert sum_parts(parts, torch.empty(2, *shape, dtype=torch.bfloat16)).dtype == torch.bfloat16
