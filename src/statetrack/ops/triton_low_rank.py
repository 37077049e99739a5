"""A decay for each channel minus a matrix of rank one on a GPU (RWKV-7, Kimi-Linear's KDA): Triton kernels.

A generalized Householder matrix after a decay for each channel is of this kind too,

    (I - beta k k^T) diag(a) = diag(a) - (beta k) (a * k)^T,

and further factors of a token are steps of their own without a decay. Forward: one kernel prepares all chunks at once,
one walks through them. Backward: one walks back, two finish all chunks at once. `docs/kernels.md` has the derivation,
`kernels/low_rank.py` the kernels.
"""

from __future__ import annotations

from functools import lru_cache, partial, reduce
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
    join_segments,
    kernels,
    operand_dtype,
    power_of_two,
    segments,
    unavailable,
)
from statetrack.transition import Householder, LowRank, Transition

# Tensors of the preparation, which the scans read.
_PREPARED = 5
# Steps of a chunk.
_STEPS = 16
# The channels of all chunks that a warp prepares at once: four for each of its threads.
_A_WARP = 128
# The products of the segments' transitions fit a multiprocessor up to keys of so many channels.
_LARGEST_MAP = 128
# The width of the tiles of values of the kernel that cuts keys.
_VALUES = 32


def supports(transition: Transition) -> str | None:
    if isinstance(transition, LowRank):
        return unavailable(transition.u, transition.w, transition.decay)
    if isinstance(transition, Householder) and transition.decay is not None and transition.decay.ndim == 4:
        return unavailable(transition.k, transition.beta, transition.decay)
    return "triton_low_rank serves LowRank transitions, and Householder transitions with a decay for each channel"


def _run_dense(
    transition: Transition, q: Tensor, v: Tensor, write: Tensor | None, initial_state: Tensor | None, *, high: bool
) -> tuple[Tensor, Tensor]:
    if isinstance(transition, Householder):
        n = transition.k.shape[2]
        steps = _householder_steps(transition, q, v)
        o, final_state = _run_steps(*steps, initial_state, high)
        return o[:, n - 1 :: n], final_state
    assert isinstance(transition, LowRank)
    assert write is not None
    decay = transition.decay
    decay = decay.unsqueeze(-1).expand_as(q) if decay.ndim == 3 else decay
    return _run_steps(q, transition.w, transition.u, write, v, decay, initial_state, high)


BACKEND = Backend(
    name="triton",
    supports=supports,
    run=by_rows(partial(_run_dense, high=False), check_inputs),
    run_high=by_rows(partial(_run_dense, high=True), check_inputs),
    priority=CHECKED_ON_A_CARD,
)


def _householder_steps(
    transition: Householder, q: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, w, u, p, v and decays [B, T N, H, ...].

    Every factor is a step, the token's decay acts in the first of them, and q reads after the last.
    """
    assert transition.decay is not None
    k = transition.k.to(torch.float32)
    decay = transition.decay.to(torch.float32).unsqueeze(2)
    u = transition.effective_beta.unsqueeze(-1) * k
    w = torch.cat([decay * k[:, :, :1], k[:, :, 1:]], 2)
    decay = torch.cat([decay, torch.ones_like(k[:, :, 1:])], 2)
    q = torch.cat([q.unsqueeze(2).new_zeros(k[:, :, 1:].shape), q.unsqueeze(2)], 2)
    q, w, u, v, decay = (x.flatten(1, 2) for x in (q, w, u, v, decay))
    return q, w, u, u, v, decay


def _run_steps(
    q: Tensor, w: Tensor, u: Tensor, p: Tensor, v: Tensor, decay: Tensor, initial_state: Tensor | None, high: bool
) -> tuple[Tensor, Tensor]:
    inputs = (q, w, u, p, v, decay, initial_state)
    if wants_gradient(*inputs):
        return _TritonLowRank.apply(*distinct(inputs), high)
    o, final_state, _ = _forward_op(*inputs, high, False)
    return o, final_state


class _TritonLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        w: Tensor,
        u: Tensor,
        p: Tensor,
        v: Tensor,
        decay: Tensor,
        initial_state: Tensor | None,
        high: bool,
    ) -> tuple[Tensor, Tensor]:
        o, final_state, tape = _forward_op(q, w, u, p, v, decay, initial_state, high, True)
        ctx.save_for_backward(q, w, u, p, v, decay, *tape)
        ctx.initial_dtype = None if initial_state is None else initial_state.dtype
        return o, final_state

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        d_o, d_state = grad_outputs
        q, w, u, p, v, decay, *tape = ctx.saved_tensors
        *gradients, d_initial = _backward_op(q, w, u, p, v, decay, tape, d_o, d_state)
        return *gradients, None if ctx.initial_dtype is None else d_initial.to(ctx.initial_dtype), None


def _kernels() -> Any:
    return kernels("low_rank", "channels", "channels_backward")


# By kernel and by the key dimension's power of two, up to which an entry serves: for the scans the width of the tiles
# of values, for the others that of the tiles of keys. Not compared on a card: from the registers and the shared
# memory that the compiler reports (`python -m benchmarks.kernel_resources`).
_TABLE: dict[str, dict[int, Launch]] = {
    "prepare_channels": {64: Launch(64, 1, 1), 128: Launch(128, 1, 1), 256: Launch(128, 1, 1)},
    "scan_forward": {64: Launch(64, 4, 1), 128: Launch(16, 4, 1), 256: Launch(16, 8, 1)},
    "scan_backward": {64: Launch(64, 4, 1), 128: Launch(16, 4, 1), 256: Launch(16, 4, 1)},
    "gradients_between": {64: Launch(64, 2, 1), 128: Launch(64, 2, 1), 256: Launch(64, 2, 1)},
    "gradients_within": {64: Launch(32, 1, 1), 128: Launch(32, 1, 1), 256: Launch(32, 1, 1)},
}


class _Shape:
    """The sizes of one call and the arguments that its kernels share."""

    def __init__(self, queries: torch.Size, device: torch.device, value_dim: int) -> None:
        self.batch, self.length, self.heads, self.key_dim = queries
        self.value_dim, self.device = value_dim, device
        self.block_k = power_of_two(self.key_dim)
        self.chunks = -(-self.length // _STEPS)
        self.rows = self.batch * self.heads

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.length, self.heads, self.chunks

    @property
    def numbers(self) -> int:
        """How far the kinds of rows or columns lie apart in memory."""
        return self.batch * self.length * self.heads * self.key_dim

    def between(self) -> dict[str, Any]:
        """Options of the kernel for the gradients between chunks, in tiles of keys and of values."""
        launch = _TABLE["gradients_between"][max(64, self.block_k)]
        return {
            "K": self.key_dim, "V": self.value_dim, "BC": _STEPS, "KINDS": 2, "BLOCKS": 1, "LEVELS": 0,
            "BD": min(launch.block, self.block_k), "BV": min(_VALUES, power_of_two(self.value_dim)),
            "PRECISION": "tf32x3", **launch.options,
        }  # fmt: skip

    def within(self) -> tuple[tuple[int, int], dict[str, Any]]:
        """Of the kernel for the gradients within chunks, whose programs have a tile of keys each: grid and options."""
        launch = _TABLE["gradients_within"][max(64, self.block_k)]
        grid = (self.rows * self.chunks, -(-self.key_dim // launch.block))
        return grid, {"K": self.key_dim, "KINDS": 2, **launch.by_thread}

    def prepare(self) -> tuple[int, dict[str, Any]]:
        """Of the kernel that prepares chunks, several at once: the number of programs, and the options."""
        launch = _TABLE["prepare_channels"][max(64, self.block_k)]
        width = min(launch.block, self.block_k)
        chunks = max(1, launch.num_warps * _A_WARP // width)
        constants = {
            "K": self.key_dim, "BC": _STEPS, "KINDS": 2, "BLOCKS": chunks, "BD": width, "LEVELS": 0,
            "PRECISION": "tf32x3",
        }  # fmt: skip
        return self.rows * -(-self.chunks // chunks), constants | launch.options

    def scan(self, kernel: str, width: int) -> tuple[int, dict[str, Any]]:
        """Of a kernel that walks through the chunks, in tiles of `width` values: programs a segment, and options."""
        launch = _TABLE[kernel][max(64, self.block_k)]
        block = min(launch.block, power_of_two(width))
        constants = {"K": self.key_dim, "V": width, "BC": _STEPS, "BK": self.block_k, "BV": block}
        return -(-width // block), constants | launch.options

    def segments(self) -> tuple[int, int]:
        """How many segments the chunks are cut into, and their length in chunks."""
        if self.block_k > _LARGEST_MAP:
            return 1, self.chunks
        blocks, _ = self.scan("scan_forward", self.value_dim)
        return segments(self.chunks, self.rows * blocks, self.device)

    def empty_segments(self, count: int, width: int) -> Tensor:
        """A state of `width` values for every segment, transposed."""
        return self.new(self.rows, count, width, self.key_dim)

    def empty_products(self) -> list[Tensor]:
        """scores, x_in, y_out, across; or their gradients."""
        places = self.rows * self.chunks
        return [
            self.new(places, 2 * _STEPS, 2 * _STEPS),
            *(self.new(2, self.batch, self.length, self.heads, self.key_dim) for _ in range(2)),
            self.new(places, self.key_dim),
        ]

    def empty_prepared(self) -> list[Tensor]:
        """What `empty_products` has, and inverse."""
        return [*self.empty_products(), self.new(self.rows * self.chunks, _STEPS, _STEPS)]

    def empty_states(self, dtype: torch.dtype) -> Tensor:
        """A state of every chunk, transposed."""
        return self.new(self.rows * self.chunks, self.value_dim, self.key_dim, dtype=dtype)

    def empty_values(self) -> Tensor:
        return self.new(self.batch, self.length, self.heads, self.value_dim)

    def empty_tape(self, dtype: torch.dtype) -> list[Tensor]:
        count, _ = self.segments()
        maps = [] if count == 1 else [self.empty_segments(count, self.key_dim)]
        return [*self.empty_prepared(), self.empty_states(dtype), self.empty_values(), *maps]


_shape = lru_cache(maxsize=64)(_Shape)
"""Of sizes that come again and again, which are numbers: not of those that torch.compile traces with."""


def _record(q: Tensor, w: Tensor, u: Tensor, p: Tensor, v: Tensor, high: bool) -> torch.dtype:
    """The dtype of the states that a backward only reads: as short as what was given."""
    return torch.float32 if high else operand_dtype(q, w, u, p, v)


def _of_one_dtype(*tensors: Tensor) -> list[Tensor]:
    """Contiguous, and in the longest dtype among them: kernels take rows of two kinds, and columns, in one loop."""
    dtype = reduce(torch.promote_types, (x.dtype for x in tensors))
    return [x.to(dtype).contiguous() for x in tensors]


def _forward(
    q: Tensor,
    w: Tensor,
    u: Tensor,
    p: Tensor,
    v: Tensor,
    decay: Tensor,
    initial_state: Tensor | None,
    high: bool,
    save: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Returns o, the final state, and a tape for `_backward`, which is empty unless `save`."""
    launch = _kernels()
    shape = _shape(q.shape, q.device, v.shape[-1])
    o = v.new_empty(v.shape)
    final = shape.new(shape.batch, shape.heads, shape.key_dim, shape.value_dim)
    record = _record(q, w, u, p, v, high)
    q, w, u, p = _of_one_dtype(q, w, u, p)
    v = v.contiguous()
    initial = None if initial_state is None else as_float32(initial_state)
    prepared = shape.empty_prepared()
    saved = [shape.empty_states(record), shape.empty_values()] if save else []
    with torch.cuda.device_of(q):
        programs, options = shape.prepare()
        launch.prepare_channels[(programs,)](
            q, w, u, p, as_float32(decay), *prepared, *shape.sizes, shape.numbers, **options,
        )  # fmt: skip
        count, length = shape.segments()
        sizes = (*shape.sizes, shape.numbers, count, length)
        mode, first, maps = 0, initial, []
        if count > 1:
            ends, maps = shape.empty_segments(count, shape.value_dim), [shape.empty_segments(count, shape.key_dim)]
            for what, target in ((2, ends), (3, maps[0])):
                blocks, options = shape.scan("scan_forward", target.shape[2])
                launch.scan_forward[(shape.rows * count, blocks)](
                    v, *prepared, None, None, target, None, None, *sizes,
                    INITIAL=False, MODE=what, SAVE=False, **options,
                )  # fmt: skip
            mode, first = 1, join_segments(maps[0], ends, initial, reverse=False)
        blocks, options = shape.scan("scan_forward", shape.value_dim)
        launch.scan_forward[(shape.rows * count, blocks)](
            v, *prepared, first, o, final, *(saved or (None, None)), *sizes,
            INITIAL=initial is not None, MODE=mode, SAVE=save, **options,
        )  # fmt: skip
    return o, final, [*prepared, *saved, *maps] if save else []


def _empty_results(
    q: Tensor,
    w: Tensor,
    u: Tensor,
    p: Tensor,
    v: Tensor,
    decay: Tensor,
    initial_state: Tensor | None,
    high: bool,
    save: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    shape = _Shape(q.shape, q.device, v.shape[-1])
    final = shape.new(shape.batch, shape.heads, shape.key_dim, shape.value_dim)
    return v.new_empty(v.shape), final, shape.empty_tape(_record(q, w, u, p, v, high)) if save else []


def _backward(
    q: Tensor,
    w: Tensor,
    u: Tensor,
    p: Tensor,
    v: Tensor,
    decay: Tensor,
    tape: list[Tensor],
    d_o: Tensor,
    d_state: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of q, w, u, p, v, decay and the initial state; `d_x` is that of x."""
    launch = _kernels()
    prepared, (starts, written, *maps) = tape[:_PREPARED], tape[_PREPARED:]
    shape = _shape(q.shape, q.device, v.shape[-1])
    results = _empty_gradients(q, w, u, p, v, decay, tape, d_o, d_state)
    d_q, d_w, d_u, d_p, d_v, d_decay, d_initial = results
    q, w, u, p = _of_one_dtype(q, w, u, p)
    v, d_o = v.contiguous(), d_o.contiguous()
    d_ends, d_read = torch.empty_like(starts), torch.empty_like(written)
    # The kernel's loop over rows is for both kinds, whose gradients need one dtype too.
    d_rows = (d_q, d_w) if d_q.dtype == d_w.dtype else (torch.empty_like(q), torch.empty_like(w))
    with torch.cuda.device_of(q):
        blocks, options = shape.scan("scan_backward", shape.value_dim)
        count = maps[0].shape[1] if maps else 1
        sizes = (*shape.sizes, shape.numbers, count, -(-shape.chunks // count))
        mode, last = 0, as_float32(d_state)
        if maps:
            d_starts = shape.empty_segments(count, shape.value_dim)
            launch.scan_backward[(shape.rows * count, blocks)](
                *prepared, d_o, *[None] * 4, d_starts, *sizes, MODE=2, **options
            )
            mode, last = 1, join_segments(maps[0], d_starts, last, reverse=True)
        launch.scan_backward[(shape.rows * count, blocks)](
            *prepared, d_o, last, d_v, d_read, d_ends, d_initial, *sizes, MODE=mode, **options
        )
        d_scores, d_x_in, d_y_out, d_across = shape.empty_products()
        launch.gradients_between[(shape.rows * shape.chunks,)](
            None, None, None, starts, d_o, d_read, written, v, d_ends, d_scores, d_x_in, d_y_out, d_across,
            *shape.sizes, shape.numbers, **shape.between(),
        )  # fmt: skip
        grid, options = shape.within()
        launch.gradients_within[grid](
            q, w, u, p, as_float32(decay), d_scores, d_x_in, d_y_out, d_across, *d_rows, d_u, d_p, d_decay,
            *shape.sizes, shape.numbers, **options,
        )  # fmt: skip
    if d_rows[0] is not d_q:
        d_q.copy_(d_rows[0])
        d_w.copy_(d_rows[1])
    return results


def _empty_gradients(
    q: Tensor,
    w: Tensor,
    u: Tensor,
    p: Tensor,
    v: Tensor,
    decay: Tensor,
    tape: list[Tensor],
    d_o: Tensor,
    d_state: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    d_q, d_w, d_u, d_p, d_v, d_decay, d_initial = (x.new_empty(x.shape) for x in (q, w, u, p, v, decay, d_state))
    return d_q, d_w, d_u, d_p, d_v, d_decay, d_initial


_forward_op = register_operator(
    "triton_low_rank",
    _forward,
    _empty_results,
    then=lambda results, q, w, u, p, v, decay, *_: _backward(q, w, u, p, v, decay, results[2], *results[:2]),
)
_backward_op = register_operator("triton_low_rank_backward", _backward, _empty_gradients)
