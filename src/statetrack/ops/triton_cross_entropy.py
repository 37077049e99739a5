"""The cross-entropy of a chunk of logits and its gradient on a GPU: one Triton kernel.

In PyTorch a chunk of bfloat16 logits is read and written in 24 bytes a logit between the product that makes it and
those that read its gradient; here in 4 to 6. `kernels/cross_entropy.py` has the kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from statetrack.ops.backend import register_operator
from statetrack.ops.triton_common import CHECKED_ON_A_CARD, kernels, power_of_two, unavailable

PRIORITY = CHECKED_ON_A_CARD
"""As that of the backends."""

_LOGITS = 4096
"""Of a row that a program has in its registers at once."""


def serves(logits: Tensor) -> bool:
    """Whether `replace_by_gradient` is to be used for these logits."""
    return PRIORITY == CHECKED_ON_A_CARD and unavailable(logits) is None


def replace_by_gradient(
    logits: Tensor, labels: Tensor, shares: Tensor | None, *, z_loss: float = 0.0, ignore: int = -100
) -> Tensor:
    """The losses [N] of logits [N, V], which become the gradient of `sum(shares * losses)` where there are shares.

    Args:
        logits: [N, V], contiguous, float32 or shorter.
        labels: int64 [N], in 0..V-1 or `ignore`.
        shares: float32 [N], 0 where the label is to be ignored; None for the losses alone.
        z_loss: weight of the squared logsumexp.
        ignore: the label of rows without a loss.

    Returns:
        The losses, float32.
    """
    return _op(logits, labels, shares, z_loss, ignore)  # type: ignore[no-any-return]


def _replace_by_gradient(logits: Tensor, labels: Tensor, shares: Tensor | None, z_loss: float, ignore: int) -> Tensor:
    rows, size = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    block = power_of_two(min(size, _LOGITS))
    with torch.cuda.device_of(logits):
        _kernels().replace_by_gradient[(rows,)](
            logits, labels, losses if shares is None else shares, losses, z_loss,
            V=size, IGNORE=ignore, GRADIENT=shares is not None, BV=block, num_warps=8 if block == _LOGITS else 4,
        )  # fmt: skip
    return losses


def _empty_losses(logits: Tensor, labels: Tensor, shares: Tensor | None, z_loss: float, ignore: int) -> Tensor:
    return logits.new_empty(len(logits), dtype=torch.float32)


_op = register_operator("triton_cross_entropy", _replace_by_gradient, _empty_losses, mutates=("logits",))


def _kernels() -> Any:
    return kernels("cross_entropy")
