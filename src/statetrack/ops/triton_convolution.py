"""A causal depthwise convolution over time on a GPU: one Triton kernel forward, two backward.

PyTorch's own operations take a pass over memory for each tap and direction; a small model's training step consists of
such passes. `kernels/convolution.py` has the kernels.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from statetrack.ops.triton_common import CHECKED_ON_A_CARD, ON_REQUEST, power_of_two, unavailable

PRIORITY = ON_REQUEST
"""As that of the backends. `tests/ops/test_triton_convolution.py` has passed on an H100, but nothing is timed."""

_TOKENS, _CHANNELS, _BLOCKS = 32, 64, 64


def serves(*tensors: Tensor) -> bool:
    """Whether `convolve` is to be used for these tensors."""
    return PRIORITY == CHECKED_ON_A_CARD and unavailable(*tensors) is None


def convolve(extended: Tensor, weight: Tensor) -> Tensor:
    """`y_t = sum_i weight[..., 0, i] extended_{t + i}`.

    Args:
        extended: [B, L + S - 1, C], or [R, B, L + S - 1, C] for R replicas.
        weight: [C, 1, S], or [R, C, 1, S].

    Returns:
        [B, L, C], or [R, B, L, C], in the dtype of `extended`.
    """
    extended, taps = extended.contiguous(), weight.contiguous()
    *batch, long, channels = extended.shape
    size = weight.shape[-1]
    y = extended.new_empty(*batch, long - size + 1, channels)
    rows, grid, sizes = _launch(extended, taps, y.shape[-2])
    _kernels().forward[grid](extended, taps, y, y.shape[-2], rows, channels, size, **sizes)
    return y


def convolve_backward(extended: Tensor, weight: Tensor, d_y: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `extended` and `weight` of `convolve`."""
    extended, taps, d_y = extended.contiguous(), weight.contiguous(), d_y.contiguous()
    length, channels, size = d_y.shape[-2], d_y.shape[-1], weight.shape[-1]
    d_extended = torch.empty_like(extended)
    rows, grid, sizes = _launch(extended, taps, extended.shape[-2])
    _kernels().backward_inputs[grid](d_y, taps, d_extended, length, rows, channels, size, **sizes)
    sets, blocks = taps.numel() // (channels * size), min(rows, _BLOCKS)
    parts = torch.empty(sets, blocks, size, channels, dtype=torch.float32, device=d_y.device)
    _kernels().backward_taps[sets, blocks, grid[2]](
        extended, d_y, parts, length, rows, blocks, channels, size, **sizes
    )  # fmt: skip
    return d_extended, parts.sum(1).mT.reshape(weight.shape).to(weight.dtype)


def _launch(extended: Tensor, taps: Tensor, tokens: int) -> tuple[int, tuple[int, int, int], dict[str, int]]:
    """Rows that share their taps, the grid over rows, tokens and channels, and the tiles."""
    channels, size = extended.shape[-1], taps.shape[-1]
    count = extended.numel() // (extended.shape[-2] * channels)
    tiles = {"BT": power_of_two(min(tokens, _TOKENS)), "BC": power_of_two(min(channels, _CHANNELS))}
    grid = (count, -(-tokens // tiles["BT"]), -(-channels // tiles["BC"]))
    return count * channels * size // taps.numel(), grid, tiles


@cache
def _kernels() -> Any:
    return import_module("statetrack.ops.kernels.convolution")
