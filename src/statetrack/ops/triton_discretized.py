"""Mamba's selective scan on a GPU, with either eigenvalue range: Triton kernels.

Gradients are deterministic: nothing is added up by atomics, and sums over channels, time and batch are made of partial
sums in a fixed order. `docs/kernels.md` explains the algorithm, `kernels/discretized.py` has the kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from statetrack.ops.backend import Backend, differentiable_once, distinct, register_operator, wants_gradient
from statetrack.ops.packing import by_rows
from statetrack.ops.triton_common import (
    CHECKED_ON_A_CARD,
    Launch,
    as_float32,
    check_inputs,
    kernels,
    power_of_two,
    processors,
    unavailable,
)
from statetrack.transition import Discretized, Transition

# Steps of a tile. The states between tiles are kept for a backward, in float32: K / 2 bytes for each step and channel.
_STEPS = 8
# Neighbouring keys of a thread, at most, as long as a warp has lanes for all keys.
_KEYS = 4
# Steps are cut into segments where there are not even a third as many warps as this for each processor, which are as
# many as run on one at once: a further pass over all segments but one costs most of a forward.
_FORWARD_WARPS = 16
_BACKWARD_WARPS = 8
_FEWEST_SEGMENTS = 3
# In tiles.
_SHORTEST_SEGMENT = 8
# Elements of a state that one program joins, numbers that one packs, and steps for which one adds up partial sums.
_JOINED = 128
_PACKED = 1024
_ADDED = 32
# A launch's block is the channels of a warp with so many keys; with other numbers of keys a thread has as many states.
# The fastest of six pairs on an H100.
_BLOCK_KEYS = 16
_FORWARD = Launch(32, 1, 1)
_BACKWARD = Launch(16, 1, 1)


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
        return _TritonDiscretized.apply(*distinct(inputs), lo, hi)
    o, final_state, _ = _forward_op(*inputs, lo, hi, False)
    return o, final_state


BACKEND = Backend(name="triton", supports=supports, run=by_rows(_run_dense, check_inputs), priority=CHECKED_ON_A_CARD)


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
        o, final_state, tape = _forward_op(dt, A, lower_end, q, write, v, initial_state, lo, hi, True)
        ctx.save_for_backward(dt, A, lower_end, q, write, v, *tape)
        ctx.set_materialize_grads(False)
        ctx.range = lo, hi
        ctx.initial_dtype = None if initial_state is None else initial_state.dtype
        return o, final_state

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        d_o, d_state = grad_outputs
        dt, A, lower_end, q, write, v, *tape = ctx.saved_tensors
        if d_o is None:
            d_o = torch.zeros_like(v)
        d_dt, d_A, d_lower_end, *gradients, d_initial = _backward_op(
            dt, A, lower_end, q, write, v, tape, *ctx.range, d_o, d_state
        )
        return (
            *(d_dt, d_A, None if lower_end is None else d_lower_end, *gradients),
            *(None if ctx.initial_dtype is None else d_initial.to(ctx.initial_dtype), None, None),
        )


def _kernels() -> Any:
    return kernels("discretized")


class _Shape:
    """The sizes of one call, and the grids and options of its kernels."""

    def __init__(self, q: Tensor, v: Tensor, launch: Launch, warps: int) -> None:
        self.batch, self.length, self.heads, self.key_dim = q.shape
        self.value_dim, self.device = v.shape[-1], q.device
        self.rows = self.batch * self.heads
        padded = power_of_two(self.key_dim, least=1)
        key_lanes = max(1, min(32, padded // _KEYS))
        self.keys = padded // key_lanes
        value_lanes = 32 // key_lanes
        least = power_of_two(-(-self.value_dim // value_lanes), least=1)
        self.warps = min(launch.num_warps, least)
        channels = max(1, min(launch.block * _BLOCK_KEYS // padded // value_lanes, least) // self.warps)
        self.blocks = -(-self.value_dim // (self.warps * value_lanes * channels))
        self.padded_keys = key_lanes * self.keys
        whole = self.length // _STEPS
        self.tiles = whole + self.length % _STEPS
        count = min(
            warps * processors(self.device) // max(1, self.rows * self.blocks * self.warps), whole // _SHORTEST_SEGMENT
        )
        self.segment = -(-whole // count) if count >= _FEWEST_SEGMENTS else whole
        self.segments = -(-whole // self.segment) if self.segment else 1
        self.options = {
            "H": self.heads, "K": self.key_dim, "V": self.value_dim, "BT": _STEPS, "W": self.warps, "LK": key_lanes,
            "LV": value_lanes, "J": self.keys, "C": channels, **launch.options, "num_warps": self.warps,
        }  # fmt: skip

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.length, self.segments, self.segment

    def grid(self, segments: int) -> tuple[int, int]:
        return self.rows * segments, self.blocks

    def new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def empty_state(self) -> Tensor:
        return self.new(self.batch, self.heads, self.key_dim, self.value_dim)

    def empty_borders(self) -> Tensor:
        """A state for every segment."""
        return self.new(self.rows, self.segments, self.key_dim, self.value_dim)

    def empty_tape(self) -> list[Tensor]:
        """q and write as the kernels read them, and the states before all tiles."""
        pairs = torch.empty(self.rows, self.length, self.padded_keys, dtype=torch.int64, device=self.device)
        return [pairs, self.new(self.rows, self.tiles, self.key_dim, self.value_dim)]

    def join(self, ends: Tensor, products: Tensor, border: Tensor | None, *, reverse: bool) -> Tensor:
        """The states between segments, from what the segments do to them and the one at the border."""
        borders = torch.empty_like(ends)
        size = self.key_dim * self.value_dim
        _kernels().join[(self.rows, -(-size // _JOINED))](
            ends, products, border, borders, self.segments, SIZE=size, BLOCK=_JOINED, BORDER=border is not None,
            REVERSE=reverse, num_warps=4,
        )  # fmt: skip
        return borders


def _kinds(lower_end: Tensor | None, lo: float, hi: float) -> dict[str, bool]:
    """What the kernels have to know about the range when they are compiled."""
    return {"UNIT": lower_end is None and (lo, hi) == (0, 1), "LOWER": lower_end is not None}


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
    save: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Returns o, the final state, and a tape for `_backward`, which is empty unless `save`."""
    launch = _kernels()
    shape = _Shape(q, v, _FORWARD, _FORWARD_WARPS)
    o, final = torch.empty_like(v, memory_format=torch.contiguous_format), shape.empty_state()
    dt, q, write, v = (x.contiguous() for x in (dt, q, write, v))
    A, lower_end = as_float32(A), None if lower_end is None else as_float32(lower_end)
    border = None if initial_state is None else as_float32(initial_state)
    pairs, starts = shape.empty_tape() if save else (shape.empty_tape()[0], None)
    options = shape.options | _kinds(lower_end, lo, hi)
    with torch.cuda.device_of(q):
        count = pairs.numel()
        launch.pack[(-(-count // _PACKED),)](
            q, write, pairs.view(torch.float32), shape.length, count,
            H=shape.heads, K=shape.key_dim, PADDED=shape.padded_keys, BLOCK=_PACKED, num_warps=4,
        )  # fmt: skip
        if shape.segments > 1:
            ends, products = shape.empty_borders(), shape.empty_borders()
            launch.scan_forward[shape.grid(shape.segments - 1)](
                dt, A, lower_end, pairs, v, None, None, ends, None, products, *shape.sizes, lo, hi,
                INITIAL=False, SAVE=False, OUT=False, **options,
            )  # fmt: skip
            border = shape.join(ends, products, border, reverse=False)
        launch.scan_forward[shape.grid(shape.segments)](
            dt, A, lower_end, pairs, v, border, o, final, starts, None, *shape.sizes, lo, hi,
            INITIAL=border is not None, SAVE=save, OUT=True, **options,
        )  # fmt: skip
    return o, final, [] if starts is None else [pairs, starts]


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
    save: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    shape = _Shape(q, v, _FORWARD, _FORWARD_WARPS)
    return v.new_empty(v.shape), shape.empty_state(), shape.empty_tape() if save else []


def _backward(
    dt: Tensor,
    A: Tensor,
    lower_end: Tensor | None,
    q: Tensor,
    write: Tensor,
    v: Tensor,
    tape: list[Tensor],
    lo: float,
    hi: float,
    d_o: Tensor,
    d_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of dt, A, lower_end (empty without one), q, write, v and the initial state."""
    launch = _kernels()
    shape = _Shape(q, v, _BACKWARD, _BACKWARD_WARPS)
    results = _empty_gradients(dt, A, lower_end, q, write, v, tape, lo, hi, d_o, d_state)
    d_dt, d_A, d_lower_end, d_q, d_write, d_v, d_initial = results
    pairs, starts = tape
    dt, v, d_o = (x.contiguous() for x in (dt, v, d_o))
    scales, low = as_float32(A), None if lower_end is None else as_float32(lower_end)
    border = None if d_state is None else as_float32(d_state)
    parts = shape.new(2, shape.blocks, shape.rows, shape.padded_keys, shape.length)
    part_A = shape.empty_borders()
    part_low = shape.new(shape.rows, shape.segments, shape.value_dim) if low is not None else None
    options = shape.options | _kinds(lower_end, lo, hi)
    with torch.cuda.device_of(q):
        if shape.segments > 1:
            d_starts, products = shape.empty_borders(), shape.empty_borders()
            launch.summarize_backward[shape.grid(shape.segments - 1)](
                dt, scales, low, pairs, d_o, d_starts, products, *shape.sizes, lo, hi, **options
            )
            border = shape.join(d_starts, products, border, reverse=True)
        launch.scan_backward[shape.grid(shape.segments)](
            dt, scales, low, pairs, v, starts, d_o, border, d_dt, d_v, parts, part_A, part_low, d_initial,
            shape.length, shape.rows, shape.segments, shape.segment, lo, hi, FINAL=border is not None, **options,
        )  # fmt: skip
        # Time comes first: the other axes of a grid have 65,535 programs at most.
        launch.add_parts[(-(-shape.length // _ADDED), shape.rows, 2)](
            parts, d_q, d_write, shape.length, shape.rows, shape.blocks,
            H=shape.heads, K=shape.key_dim, PADDED=shape.padded_keys, BK=power_of_two(shape.key_dim, least=1),
            BT=_ADDED, num_warps=4,
        )  # fmt: skip
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
    tape: list[Tensor],
    lo: float,
    hi: float,
    d_o: Tensor,
    d_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    d_dt, d_A, d_q, d_write, d_v = (x.new_empty(x.shape) for x in (dt, A, q, write, v))
    d_lower_end = A.new_empty(0) if lower_end is None else lower_end.new_empty(lower_end.shape)
    d_initial = dt.new_empty((q.shape[0], q.shape[2], q.shape[3], v.shape[3]), dtype=torch.float32)
    return d_dt, d_A, d_lower_end, d_q, d_write, d_v, d_initial


_forward_op = register_operator(
    "triton_discretized",
    _forward,
    _empty_results,
    then=lambda results, dt, A, lower_end, q, write, v, initial_state, lo, hi, save: _backward(
        dt, A, lower_end, q, write, v, results[2], lo, hi, results[0], None
    ),
)
_backward_op = register_operator("triton_discretized_backward", _backward, _empty_gradients)
