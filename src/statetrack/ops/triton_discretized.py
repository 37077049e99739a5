"""Mamba's selective scan on a GPU, with either eigenvalue range: Triton kernels.

Gradients are deterministic: nothing is added up by atomics, and sums over channels, time and batch are made of partial
sums in a fixed order. `docs/kernels.md` explains the algorithm, `kernels/discretized.py` has the kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from statetrack.ops.backend import Backend, differentiable_once, register_operator, wants_gradient
from statetrack.ops.packing import by_rows
from statetrack.ops.triton_common import (
    INTERPRETED_ONLY,
    Launch,
    as_float32,
    check_inputs,
    kernels,
    power_of_two,
    processors,
    unavailable,
)
from statetrack.transition import Discretized, Transition

# Steps of a tile. The states between tiles are kept in memory, in float32: K / 4 bytes for each step and channel.
_STEPS = 16
# Tiles go to programs of their own where rows and blocks of channels are fewer than so many for each processor: it
# takes twice the exponentials, but a program is a single warp, and each of a processor's four schedulers needs a few.
_PROGRAMS = 16
# Elements of a state that one program joins.
_JOINED = 128
# The block is that of the channels, and a thread has one or two of them. Not yet measured on a card: from the
# registers and the instructions that the compiler reports (`python -m benchmarks.kernel_resources`).
_FORWARD = Launch(64, 1, 1)
_BACKWARD = Launch(32, 1, 1)


def supports(transition: Transition) -> str | None:
    if not isinstance(transition, Discretized):
        return "triton_discretized serves Discretized transitions"
    return unavailable(transition.dt, transition.A, transition.lower_end)


def _run_dense(
    transition: Transition, q: Tensor, v: Tensor, write: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    assert isinstance(transition, Discretized)
    assert write is not None
    inputs = (transition.dt, transition.A, transition.lower_end, q, write, v, initial_state)
    lo, hi = transition.eigenvalue_range.lo, transition.eigenvalue_range.hi
    if wants_gradient(*inputs):
        return _TritonDiscretized.apply(*inputs, lo, hi)
    o, final_state, _ = _forward_op(*inputs, lo, hi)
    return o, final_state


BACKEND = Backend(name="triton", supports=supports, run=by_rows(_run_dense, check_inputs), priority=INTERPRETED_ONLY)


class _TritonDiscretized(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        dt: Tensor,
        A: Tensor,
        lower_end: Tensor | None,
        q: Tensor,
        write: Tensor,
        v: Tensor,
        initial_state: Tensor | None,
        lo: float,
        hi: float,
    ) -> tuple[Tensor, Tensor]:
        o, final_state, starts = _forward_op(dt, A, lower_end, q, write, v, initial_state, lo, hi)
        ctx.save_for_backward(dt, A, lower_end, q, write, v, starts)
        ctx.range = lo, hi
        ctx.initial_dtype = None if initial_state is None else initial_state.dtype
        return o, final_state

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        dt, A, lower_end, q, write, v, starts = ctx.saved_tensors
        d_dt, d_A, d_lower_end, *gradients, d_initial = _backward_op(
            dt, A, lower_end, q, write, v, starts, *ctx.range, *grad_outputs
        )
        return (
            *(d_dt, d_A, None if lower_end is None else d_lower_end, *gradients),
            *(None if ctx.initial_dtype is None else d_initial.to(ctx.initial_dtype), None, None),
        )


def _kernels() -> Any:
    return kernels("discretized")


class _Shape:
    """The sizes of one call, and the grids and options of its kernels."""

    def __init__(self, q: Tensor, v: Tensor, launch: Launch, *, has_lower_end: bool) -> None:
        self.batch, self.length, self.heads, self.key_dim = q.shape
        self.value_dim, self.device = v.shape[-1], q.device
        self.tiles = -(-self.length // _STEPS)
        self.rows = self.batch * self.heads
        block = min(launch.block, power_of_two(self.value_dim, least=1))
        self.blocks = -(-self.value_dim // block)
        self.options = {
            "K": self.key_dim, "V": self.value_dim, "BT": _STEPS, "BV": block, "LOWER": has_lower_end, **launch.options,
        }  # fmt: skip

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.length, self.heads, self.tiles

    @property
    def serial(self) -> bool:
        """Whether one program walks through all tiles of its channels."""
        return self.tiles == 1 or self.rows * self.blocks >= _PROGRAMS * processors(self.device)

    @property
    def every_tile(self) -> tuple[int, int]:
        """The grid of a kernel that has a program for every tile."""
        return self.rows * self.tiles, self.blocks

    @property
    def scan(self) -> tuple[int, int]:
        return (self.rows, self.blocks) if self.serial else self.every_tile

    def new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def empty_state(self) -> Tensor:
        return self.new(self.batch, self.heads, self.key_dim, self.value_dim)

    def empty_states(self) -> Tensor:
        """A state for every tile."""
        return self.new(self.rows, self.tiles, self.key_dim, self.value_dim)

    def join(self, ends: Tensor, products: Tensor, border: Tensor, *, reverse: bool) -> Tensor:
        """The states between tiles, from what the tiles do to them and the one at the border."""
        borders = self.empty_states()
        size = self.key_dim * self.value_dim
        _kernels().join_tiles[(self.rows, -(-size // _JOINED))](
            ends, products, border, borders, self.tiles, SIZE=size, BLOCK=_JOINED, REVERSE=reverse, num_warps=4
        )
        return borders


def _forward(
    dt: Tensor,
    A: Tensor,
    lower_end: Tensor | None,
    q: Tensor,
    write: Tensor,
    v: Tensor,
    initial_state: Tensor | None,
    lo: float,
    hi: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns o, the final state, and the states before all tiles, which the backward starts from."""
    launch = _kernels()
    shape = _Shape(q, v, _FORWARD, has_lower_end=lower_end is not None)
    o, final = v.new_empty(v.shape), shape.empty_state()
    dt, q, write, v = (x.contiguous() for x in (dt, q, write, v))
    A, lower_end = as_float32(A), None if lower_end is None else as_float32(lower_end)
    initial = torch.zeros_like(final) if initial_state is None else as_float32(initial_state)
    with torch.cuda.device_of(q):
        if shape.serial:
            starts = shape.empty_states()
            starts[:, 0] = initial.flatten(0, 1)
        else:
            ends, products = shape.empty_states(), shape.empty_states()
            launch.summarize_forward[shape.every_tile](
                dt, A, lower_end, write, v, ends, products, *shape.sizes, lo, hi, **shape.options
            )
            starts = shape.join(ends, products, initial, reverse=False)
        launch.scan_forward[shape.scan](
            dt, A, lower_end, q, write, v, starts, o, final, *shape.sizes, lo, hi,
            SERIAL=shape.serial, **shape.options,
        )  # fmt: skip
    return o, final, starts


def _empty_results(
    dt: Tensor,
    A: Tensor,
    lower_end: Tensor | None,
    q: Tensor,
    write: Tensor,
    v: Tensor,
    initial_state: Tensor | None,
    lo: float,
    hi: float,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = _Shape(q, v, _FORWARD, has_lower_end=lower_end is not None)
    return v.new_empty(v.shape), shape.empty_state(), shape.empty_states()


def _backward(
    dt: Tensor,
    A: Tensor,
    lower_end: Tensor | None,
    q: Tensor,
    write: Tensor,
    v: Tensor,
    starts: Tensor,
    lo: float,
    hi: float,
    d_o: Tensor,
    d_state: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of dt, A, lower_end (empty without one), q, write, v and the initial state."""
    launch = _kernels()
    shape = _Shape(q, v, _BACKWARD, has_lower_end=lower_end is not None)
    results = _empty_gradients(dt, A, lower_end, q, write, v, starts, lo, hi, d_o, d_state)
    d_dt, d_A, d_lower_end, d_q, d_write, d_v, d_initial = results
    dt, q, write, v, d_o = (x.contiguous() for x in (dt, q, write, v, d_o))
    low = None if lower_end is None else as_float32(lower_end)
    scales, d_final = as_float32(A), as_float32(d_state)
    part_q, part_write = (shape.new(shape.blocks, shape.rows, shape.key_dim, shape.length) for _ in range(2))
    part_A = shape.empty_states()
    part_low = shape.new(shape.rows, shape.tiles, shape.value_dim) if low is not None else None
    with torch.cuda.device_of(q):
        if shape.serial:
            d_ends = shape.empty_states()
            d_ends[:, -1] = d_final.flatten(0, 1)
        else:
            d_starts, products = shape.empty_states(), shape.empty_states()
            launch.summarize_backward[shape.every_tile](
                dt, scales, low, q, d_o, d_starts, products, *shape.sizes, lo, hi, **shape.options
            )
            d_ends = shape.join(d_starts, products, d_final, reverse=True)
        launch.scan_backward[shape.scan](
            dt, scales, low, q, write, v, starts, d_o, d_ends,
            d_dt, d_v, part_q, part_write, part_A, part_low, d_initial, *shape.sizes, shape.rows, lo, hi,
            SERIAL=shape.serial, **shape.options,
        )  # fmt: skip
    for part, whole in ((part_q, d_q), (part_write, d_write)):
        whole.copy_(part.sum(0).view(shape.batch, shape.heads, shape.key_dim, shape.length).permute(0, 3, 1, 2))
    d_A.copy_(part_A.view(shape.batch, shape.heads, *part_A.shape[1:]).sum((0, 2)))
    if part_low is not None:
        d_lower_end.copy_(part_low.view(shape.batch, shape.heads, *part_low.shape[1:]).sum((0, 2)))
    return results


def _empty_gradients(
    dt: Tensor,
    A: Tensor,
    lower_end: Tensor | None,
    q: Tensor,
    write: Tensor,
    v: Tensor,
    starts: Tensor,
    lo: float,
    hi: float,
    d_o: Tensor,
    d_state: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    d_dt, d_A, d_q, d_write, d_v, d_initial = (x.new_empty(x.shape) for x in (dt, A, q, write, v, d_state))
    d_lower_end = A.new_empty(0) if lower_end is None else lower_end.new_empty(lower_end.shape)
    return d_dt, d_A, d_lower_end, d_q, d_write, d_v, d_initial


_forward_op = register_operator("triton_discretized", _forward, _empty_results)
_backward_op = register_operator("triton_discretized_backward", _backward, _empty_gradients)
