"""What the chunked backends share: how a batch is cut into pieces, and products of one decay for each head."""

from __future__ import annotations

from math import ceil
from typing import Any

import torch
from torch import Tensor

# How many numbers the largest buffer of a group of heads may have on a CPU. Measured with 1 MB of cache for each core.
CACHED_NUMBERS = 2**18


class Cut:
    """How a batch is cut: into groups of rows whose buffers fit a CPU's cache, and each group into chunks of tokens.

    All lists are in one order: group after group, in each the chunks in the order of time.
    """

    def __init__(self, batch: int, length: int, rows: int, tokens: int) -> None:
        """At most `rows` rows in a group, and `tokens` tokens in a chunk."""
        self.token_counts = [min(tokens, length - start) for start in range(0, length, tokens)]
        self.row_counts = [min(rows, batch - start) for start in range(0, batch, rows)]
        self.count = len(self.row_counts) * len(self.token_counts)

    def tokens(self, x: Tensor | None) -> list[Any]:
        """Views [b, H, c, ...] of a tensor [B, T, H, ...], b rows and c tokens each; a list of None for None."""
        return [None] * self.count if x is None else self._pieces(x.movedim(2, 1))

    def steps(self, x: Tensor) -> list[Tensor]:
        """Views [b, H, c, N, ...] of a tensor [B, T, N, H, ...]."""
        return self._pieces(x.movedim(3, 1))

    def states(self, x: Tensor) -> list[Tensor]:
        """For each chunk the state [b H, K, V] of its group, a view of [B, H, K, V]."""
        return [group.flatten(0, 1) for group in x.split(self.row_counts) for _ in self.token_counts]

    def _pieces(self, x: Tensor) -> list[Tensor]:
        return [piece for group in x.split(self.row_counts) for piece in group.split(self.token_counts, 2)]


def rows_in_cache(batch: int, heads: int, numbers: int) -> int:
    """The rows of a group on a CPU: groups of nearly equal size, as few as a cache allows.

    Args:
        numbers: the size of the largest buffer of one head.
    """
    return ceil(batch / ceil(batch * heads / max(1, CACHED_NUMBERS // numbers)))


def decay_products(decay: Tensor) -> Tensor:
    """products[i, j] [h, c + 1, c + 1] of decays [h, c]: over the tokens after j up to i, counted from 1, for i > j.

    On the diagonal and above it is 1.
    """
    c = decay.shape[1]
    below = torch.ones(c + 1, c + 1, dtype=torch.bool, device=decay.device).tril(-1)
    return torch.where(below, torch.cat([decay[:, :1], decay], 1).unsqueeze(2), 1).cumprod(1)


def decay_gradient(products: Tensor, d_products: Tensor) -> Tensor:
    """The gradient of the decays, [h, c], from that of `decay_products`, which is not read above the diagonal.

    Between a token j before and a token i' at or after it, decay i is one factor of products[i', j] =
    products[i', i] decay_i products[i - 1, j]. Nothing is divided, so decays may be 0.
    """
    products = products.tril()
    left = d_products @ products.mT
    return (products[:, :, 1:] * left[:, :, :-1]).sum(1)
