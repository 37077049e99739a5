"""A causal depthwise convolution over time with its activation on a GPU: one Triton kernel forward, one backward.

PyTorch's own operations take a pass over memory for each tap and direction; a small model's training step consists of
such passes. Here the forward reads x and writes y, and the backward reads x and the gradient of y and writes that of x:
what is between the convolution and its activation is computed again. Several convolutions of one size, of channels that
lie beside each other, are one launch. `kernels/convolution.py` has the kernels.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from statetrack.ops.backend import differentiable_once, register_operator, with_signature
from statetrack.ops.triton_common import CHECKED_ON_A_CARD, contiguous, kernels, power_of_two, sum_parts, unavailable
from statetrack.ops.vmapped import replicas_first

PRIORITY = CHECKED_ON_A_CARD
"""As that of the backends."""

# The tiles of the forward, and of the backward: how many runs of tokens, channels, how long a run may be, and how many
# tokens of it are loaded at once. Four warps read 16 and 8 bytes of bfloat16 a thread.
_TOKENS, _CHANNELS = 16, 128
_RUNS, _RUN_CHANNELS, _LONGEST_RUN, _AHEAD = 8, 64, 32, 4


def serves(*tensors: Tensor | None) -> bool:
    """Whether `convolve` is to be used for these tensors; the compiler makes kernels of its own."""
    return PRIORITY == CHECKED_ON_A_CARD and unavailable(*tensors) is None and not torch.compiler.is_compiling()


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    padded: bool,
    silu: bool = False,
    reach: Tensor | None = None,
) -> Tensor:
    """`y_t = bias + sum_i weight[:, 0, i] e_{t + i}`, and of that the silu if asked for, where e is x or x padded.

    Sums run in float32. Differentiable once; `torch.func.vmap` works.

    Args:
        x: [B, L, C].
        weight: [C, 1, S].
        bias: [C].
        padded: whether S - 1 zeros come before x. If not, L is at least S.
        silu: whether y is `silu` of what is above.
        reach: int32 [L], how many tokens before it each token sees, of all rows alike; what is further away is 0 to it.
            Only with `padded`. None for no limit.

    Returns:
        [B, L, C] if padded, else [B, L - S + 1, C], in the dtype of x.
    """
    return _Convolution.apply(x, weight, bias, reach, padded, silu)  # type: ignore[no-any-return]


def convolve_parts(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sizes: tuple[int, ...],
    passed: tuple[int, ...] = (),
    *,
    silu: bool = False,
    reach: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """`convolve`, padded, of several parts of the channels of x, and other parts of x as they are.

    So one product computes what is convolved and what is not: the gradients of all parts are written into one tensor.

    Args:
        x: [B, L, W]: the convolved parts, those that are passed on, then channels that nobody reads.
        weight: [C, 1, S], where C is the sum of `sizes`.
        bias: [C].
        sizes: channels of the convolved parts, up to three.
        passed: channels of the parts after them.
        silu: as in `convolve`, and so is `reach`.
        reach: int32 [L].

    Returns:
        [B, L, size] of every part, in the dtype of x; those passed on are views of it.
    """
    return _Parts.apply(x, weight, bias, reach, sizes, passed, silu)  # type: ignore[no-any-return]


class _Convolution(torch.autograd.Function):
    """All tensors but `reach` may have a first axis more, of replicas; then all have."""

    @staticmethod
    @with_signature
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, reach: Tensor | None, padded: bool, silu: bool
    ) -> Tensor:
        (y,) = _forward_op(x, weight, bias, reach, [x.shape[-1]], padded, silu)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        *tensors, ctx.padded, ctx.silu = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, reach = ctx.saved_tensors
        d_x, d_weight, d_bias = _backward_op(x, weight, bias, reach, [grad_outputs[0]], ctx.padded, ctx.silu)
        return d_x, d_weight, None if bias is None else d_bias, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        *tensors, reach, padded, silu = args
        return _Convolution.apply(*replicas_first(info, in_dims[:3], tensors), reach, padded, silu), 0


class _Parts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        reach: Tensor | None,
        sizes: tuple[int, ...],
        passed: tuple[int, ...],
        silu: bool,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, weight, bias, reach)
        ctx.sizes, ctx.passed, ctx.silu = sizes, passed, silu
        ctx.set_materialize_grads(False)
        convolved = _forward_op(x, weight, bias, reach, list(sizes), True, silu)
        return *convolved, *(x[..., columns] for columns in _columns(sum(sizes), passed))

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bias, reach = ctx.saved_tensors
        sizes = ctx.sizes
        d_ys = [
            x.new_zeros(*x.shape[:-1], size) if d is None else d for d, size in zip(grad_outputs, sizes, strict=False)
        ]
        d_x, d_weight, d_bias = _backward_op(x, weight, bias, reach, d_ys, True, ctx.silu)
        for columns, d in zip(_columns(sum(sizes), ctx.passed), grad_outputs[len(sizes) :], strict=True):
            if d is None:
                d_x[..., columns].zero_()
            else:
                d_x[..., columns].copy_(d)
        if (used := sum(sizes) + sum(ctx.passed)) < x.shape[-1]:
            d_x[..., used:].zero_()
        return d_x, d_weight, None if bias is None else d_bias, None, None, None, None


def _columns(start: int, sizes: tuple[int, ...]) -> list[slice]:
    """Of parts one after the other."""
    ends = list(itertools.accumulate(sizes, initial=start))
    return [slice(*ends_of_one) for ends_of_one in itertools.pairwise(ends)]


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, reach: Tensor | None, sizes: list[int], padded: bool, silu: bool
) -> list[Tensor]:
    x, rows, constants = _arguments(x, weight, bias, reach, sizes, padded, silu)
    ys = _empty_outputs(x, weight, bias, reach, sizes, padded, silu)
    tokens = ys[0].shape[-2]
    if ys[0].shape[:-1].numel() and sum(sizes):
        block_t, block_c = power_of_two(min(tokens, _TOKENS)), power_of_two(min(max(sizes), _CHANNELS))
        grid = (x.shape[:-2].numel() * -(-tokens // block_t), sum(-(-size // block_c) for size in sizes))
        with torch.cuda.device_of(x):
            _kernels().forward[grid](
                x, weight.contiguous(), contiguous(bias), reach, *_three(ys), x.shape[-2], rows,
                **constants, BT=block_t, BC=block_c, num_warps=4,
            )  # fmt: skip
    return ys


def _backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reach: Tensor | None,
    d_ys: list[Tensor],
    padded: bool,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of x has the width of x; what lies behind the convolved channels is left for others to write."""
    sizes = [d_y.shape[-1] for d_y in d_ys]
    x, rows, constants = _arguments(x, weight, bias, reach, sizes, padded, silu)
    size, channels = weight.shape[-1], sum(sizes)
    d_x, sets = torch.empty(x.shape, dtype=x.dtype, device=x.device), weight.shape[:-3].numel()
    count, tokens = x.shape[:-2].numel(), x.shape[-2]
    run = min(_LONGEST_RUN, _AHEAD * -(-tokens // (_RUNS * _AHEAD)))
    blocks = -(-tokens // (_RUNS * max(run, 1)))
    block_c = power_of_two(min(max(sizes), _RUN_CHANNELS))
    d_taps = torch.empty(sets, count // sets * blocks, channels, size, dtype=torch.float32, device=x.device)
    d_bias = d_taps.new_empty(d_taps.shape[:3] if bias is not None else (sets, 0, 0))
    if d_x.numel():
        with torch.cuda.device_of(x):
            _kernels().backward[count * blocks, sum(-(-size // block_c) for size in sizes)](
                x, weight.contiguous(), contiguous(bias), reach, *_three([d_y.contiguous() for d_y in d_ys]), d_x,
                d_taps, d_bias, x.shape[-2], rows, run, **constants, WIDTH=x.shape[-1],
                BR=_RUNS, BC=block_c, AHEAD=_AHEAD, num_warps=4,
            )  # fmt: skip
    d_weight = sum_parts(d_taps, weight)
    if bias is None:
        return d_x, d_weight, weight.new_empty(0)
    return d_x, d_weight, sum_parts(d_bias, bias)


def _three(parts: list[Tensor]) -> list[Tensor]:
    """The kernels' arguments, of which those that are not there are never read."""
    return [*parts, *parts[:1] * (3 - len(parts))]


def _arguments(
    x: Tensor, weight: Tensor, bias: Tensor | None, reach: Tensor | None, sizes: list[int], padded: bool, silu: bool
) -> tuple[Tensor, int, dict[str, Any]]:
    """x with tokens at one distance from each other, how many rows share their taps, and the kernels' constants."""
    if len(sizes) > 3:
        raise ValueError(f"one launch convolves up to three parts, got {len(sizes)}")
    size = weight.shape[-1]
    # A part of a wider projection is read where it is; of one row the distances between rows don't matter.
    stride = x.stride(-2)
    expected = stride * x.shape[-2]
    for extent, distance in zip(reversed(x.shape[:-2]), reversed(x.stride()[:-2]), strict=True):
        if distance != expected and extent > 1:
            stride = 0
        expected *= extent
    if x.stride(-1) != 1 or stride < x.shape[-1]:
        x = x.contiguous()
        stride = x.shape[-1]
    first, second, third = [*sizes, *[0] * (3 - len(sizes))]
    constants = {
        "C": sum(sizes), "C0": first, "C1": second, "C2": third, "S": size, "PAD": size - 1 if padded else 0,
        "STRIDE": stride, "SILU": silu, "BIAS": bias is not None, "REACH": reach is not None,
    }  # fmt: skip
    return x, max(1, x.shape[:-2].numel() // max(1, weight.shape[:-3].numel())), constants


def _empty_outputs(
    x: Tensor, weight: Tensor, bias: Tensor | None, reach: Tensor | None, sizes: list[int], padded: bool, silu: bool
) -> list[Tensor]:
    *batch, length, _ = x.shape
    tokens = length if padded else length - weight.shape[-1] + 1
    return [x.new_empty(*batch, tokens, size) for size in sizes]


def _empty_gradients(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reach: Tensor | None,
    d_ys: list[Tensor],
    padded: bool,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    d_bias = weight.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), d_bias


_forward_op = register_operator(
    "triton_convolution",
    _forward,
    _empty_outputs,
    then=lambda ys, x, weight, bias, reach, sizes, *options: _backward(x, weight, bias, reach, ys, *options),
)
_backward_op = register_operator("triton_convolution_backward", _backward, _empty_gradients)


def _kernels() -> Any:
    return kernels("convolution")
