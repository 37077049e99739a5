"""Signed diagonal linear attention on a GPU, with decays for each head or each key channel: Triton kernels.

Forward: one kernel prepares all chunks at once, one walks through them. Backward: one walks back; one, or three where
decays are different for each channel, finish all chunks at once. `docs/kernels.md` has the derivation,
`kernels/diagonal.py` the kernels.
"""

from __future__ import annotations

from functools import lru_cache, partial
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
from statetrack.transition import Diagonal, Transition


def supports(transition: Transition) -> str | None:
    if not isinstance(transition, Diagonal):
        return "triton_diagonal serves Diagonal transitions"
    return unavailable(transition.decay)


def _run_dense(
    transition: Transition, q: Tensor, v: Tensor, write: Tensor | None, initial_state: Tensor | None, *, high: bool
) -> tuple[Tensor, Tensor]:
    assert isinstance(transition, Diagonal)
    assert write is not None
    inputs = (q, write, v, transition.decay, initial_state)
    if wants_gradient(*inputs):
        return _TritonDiagonal.apply(*distinct(inputs), high)
    o, final_state, _ = _forward_op(*inputs, high, False)
    return o, final_state


BACKEND = Backend(
    name="triton",
    supports=supports,
    run=by_rows(partial(_run_dense, high=False), check_inputs),
    run_high=by_rows(partial(_run_dense, high=True), check_inputs),
    priority=CHECKED_ON_A_CARD,
)


class _TritonDiagonal(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, initial_state: Tensor | None, high: bool
    ) -> tuple[Tensor, Tensor]:
        o, final_state, tape = _forward_op(q, k, v, decay, initial_state, high, True)
        ctx.save_for_backward(q, k, v, decay, *tape)
        ctx.initial_dtype = None if initial_state is None else initial_state.dtype
        return o, final_state

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        d_o, d_state = grad_outputs
        q, k, v, decay, *tape = ctx.saved_tensors
        *gradients, d_initial = _backward_op(q, k, v, decay, tape, d_o, d_state)
        return *gradients, None if ctx.initial_dtype is None else d_initial.to(ctx.initial_dtype), None


def _kernels() -> Any:
    return kernels("diagonal", "channels", "channels_backward")


# By kernel and by the key dimension's power of two, up to which an entry serves: for the scans the width of the tiles
# of values, for the others that of the tiles of keys. Those of one decay a head were compared on an H100 at 128
# channels; the others are from the registers and the shared memory that the compiler reports
# (`python -m benchmarks.kernel_resources`).
_TABLE: dict[str, dict[int, Launch]] = {
    "prepare_heads": {64: Launch(64, 4, 2), 128: Launch(64, 4, 2), 256: Launch(64, 4, 2)},
    "prepare_channels": {64: Launch(64, 2, 1), 128: Launch(128, 4, 1), 256: Launch(128, 4, 1)},
    "scan_forward": {64: Launch(64, 4, 2), 128: Launch(64, 4, 2), 256: Launch(64, 8, 1)},
    "scan_backward": {64: Launch(64, 4, 2), 128: Launch(64, 4, 2), 256: Launch(64, 8, 1)},
    "gradients_heads": {64: Launch(64, 4, 2), 128: Launch(64, 4, 2), 256: Launch(64, 4, 2)},
    "scale_within": {64: Launch(64, 1, 1), 128: Launch(64, 1, 1), 256: Launch(64, 1, 1)},
    "gradients_between": {64: Launch(64, 4, 1), 128: Launch(64, 4, 1), 256: Launch(64, 4, 1)},
    "gradients_within": {64: Launch(64, 1, 1), 128: Launch(64, 1, 1), 256: Launch(64, 1, 1)},
}
# float32 operands take twice the shared memory.
_TABLE_FLOAT32: dict[str, dict[int, Launch]] = {
    "prepare_heads": {64: Launch(32, 4, 1), 128: Launch(32, 4, 1), 256: Launch(32, 4, 1)},
    "prepare_channels": {64: Launch(64, 2, 1), 128: Launch(128, 4, 1), 256: Launch(128, 4, 1)},
    "scan_forward": {64: Launch(32, 4, 1), 128: Launch(32, 4, 1), 256: Launch(16, 4, 1)},
    "scan_backward": {64: Launch(32, 4, 1), 128: Launch(32, 4, 1), 256: Launch(16, 4, 1)},
    "gradients_heads": {64: Launch(32, 4, 1), 128: Launch(32, 4, 1), 256: Launch(32, 4, 1)},
    "scale_within": {64: Launch(64, 1, 1), 128: Launch(64, 1, 1), 256: Launch(64, 1, 1)},
    "gradients_between": {64: Launch(64, 4, 1), 128: Launch(64, 4, 1), 256: Launch(64, 4, 1)},
    "gradients_within": {64: Launch(64, 1, 1), 128: Launch(64, 1, 1), 256: Launch(64, 1, 1)},
}
# float32 with a decay a head, up to 16 keys and 33 to 64 values, as in small models of mLSTM, whose normalizer is one
# value more: 0.10 ms a scan of 768 rows of 40 tokens in place of 0.24, and 0.15 for the gradients in place of 0.25.
_TABLE_NARROW: dict[str, dict[int, Launch]] = {
    "prepare_heads": {16: Launch(32, 2, 1)},
    "scan_forward": {16: Launch(64, 4, 1)},
    "scan_backward": {16: Launch(64, 4, 1)},
    "gradients_heads": {16: Launch(32, 2, 1)},
}
# The width of the tiles of values of the kernels that cut keys, by the size of an operand in bytes.
_VALUES = {2: 64, 4: 32}
# The tokens of a block in `kernels/channels.py`.
BLOCK = 16


def _operand(q: Tensor, k: Tensor, v: Tensor, high: bool) -> torch.dtype:
    return torch.float32 if high else operand_dtype(q, k, v)


def _split(operand: torch.dtype) -> bool:
    """Whether the float32 numbers of which the decays' gradients are sums become operands in two halves."""
    return operand == torch.bfloat16


def _tokens(operand: torch.dtype) -> int:
    """Of a chunk: half as many of float32, for whose tiles of 64 rows registers do not suffice."""
    return 32 if operand == torch.float32 else 64


class _Shape:
    """The sizes of one call and the arguments that its kernels share."""

    def __init__(
        self, keys: torch.Size, device: torch.device, value_dim: int, operand: torch.dtype, by_channel: bool
    ) -> None:
        self.batch, self.length, self.heads, self.key_dim = keys
        self.value_dim, self.operand, self.by_channel = value_dim, operand, by_channel
        self.device = device
        self.tokens = _tokens(operand)
        self.block_k = power_of_two(self.key_dim)
        self.chunks = -(-self.length // self.tokens)
        self.blocks = self.tokens // BLOCK
        self.rows = self.batch * self.heads

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.operand, device=self.device)

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.length, self.heads, self.chunks

    @property
    def precision(self) -> str:
        return "tf32x3" if self.operand == torch.float32 else "ieee"

    def _launch(self, kernel: str) -> Launch:
        if self.operand != torch.float32:
            return _TABLE[kernel][max(64, self.block_k)]
        if self.block_k == 16 and power_of_two(self.value_dim) == 64 and not self.by_channel:
            return _TABLE_NARROW[kernel][self.block_k]
        return _TABLE_FLOAT32[kernel][max(64, self.block_k)]

    def whole(self, kernel: str) -> dict[str, Any]:
        """Options of a kernel that does all chunks at once, in tiles of keys."""
        launch = self._launch(kernel)
        levels: dict[str, int] = {}
        if self.by_channel:
            levels = {"KINDS": 1, "BLOCKS": self.blocks, "LEVELS": self.blocks.bit_length() - 1}
        block = min(launch.block, self.block_k)
        # Products of the narrowest tiles by 8 warps read shared memory that is not theirs (Triton 3.6 on an H100).
        options = launch.options | {"num_warps": min(launch.num_warps, 4)} if block < 32 else launch.options
        return {
            "K": self.key_dim, "BC": self.tokens, "BD": block, "PRECISION": self.precision, **levels, **options,
        }  # fmt: skip

    def values(self) -> dict[str, int]:
        """Options of a kernel that also reads values, in tiles."""
        return {"V": self.value_dim, "BV": min(_VALUES[self.operand.itemsize], power_of_two(self.value_dim))}

    def within(self, kernel: str) -> tuple[tuple[int, int], dict[str, Any]]:
        """Of a kernel whose programs have one block and a tile of keys each: the grid, and the options."""
        launch = self._launch(kernel)
        grid = (self.rows * self.chunks * self.blocks, -(-self.key_dim // launch.block))
        return grid, {"K": self.key_dim, **launch.by_thread}

    def scan(self, kernel: str) -> tuple[int, int, int, dict[str, Any]]:
        """Of a kernel that walks through the chunks, in tiles of values: the programs for a segment, the number of
        segments, how many chunks each has, and the options."""
        launch = self._launch(kernel)
        block = min(launch.block, power_of_two(self.value_dim))
        constants = {
            "K": self.key_dim, "V": self.value_dim, "BC": self.tokens, "BK": self.block_k, "BV": block,
            "CHANNEL": self.by_channel, "PRECISION": self.precision,
        }  # fmt: skip
        blocks = -(-self.value_dim // block)
        return blocks, *segments(self.chunks, self.rows * blocks, self.device), constants | launch.options

    def empty_segments(self, count: int) -> tuple[Tensor, Tensor]:
        """What segments do to a state: one of zeros, transposed, and the products of their decays."""
        ends = self.new(self.rows, count, self.value_dim, self.key_dim, dtype=torch.float32)
        return ends, self.new(self.rows, count, self.key_dim, dtype=torch.float32)

    def empty_prepared(self) -> list[Tensor]:
        """attention, into, out_of, and with a decay for each channel q_in and k_out."""
        places = self.rows * self.chunks
        attention = self.new(places, self.tokens, self.tokens)
        if not self.by_channel:
            return [attention, *(self.new(places, self.tokens, dtype=torch.float32) for _ in range(2))]
        q = (self.batch, self.length, self.heads, self.key_dim)
        float32 = torch.float32
        return [
            attention,
            self.new(places, self.key_dim, dtype=float32),
            self.new(0, dtype=float32),
            self.new(*q),
            self.new(*q),
        ]

    def empty_states(self) -> Tensor:
        """A state of every chunk, transposed."""
        return self.new(self.rows * self.chunks, self.value_dim, self.key_dim)


_shape = lru_cache(maxsize=64)(_Shape)
"""Of sizes that come again and again, which are numbers: not of those that torch.compile traces with."""


def _forward(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, initial_state: Tensor | None, high: bool, save: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Returns o, the final state, and a tape for `_backward`, which is empty unless `save`."""
    launch = _kernels()
    operand = _operand(q, k, v, high)
    shape = _shape(k.shape, k.device, v.shape[-1], operand, decay.ndim == 4)
    o = v.new_empty(v.shape)
    final = shape.new(shape.batch, shape.heads, shape.key_dim, shape.value_dim, dtype=torch.float32)
    initial = None if initial_state is None else as_float32(initial_state)
    q, k, v = (x.to(operand).contiguous() for x in (q, k, v))
    decay = as_float32(decay)
    prepared = shape.empty_prepared()
    attention, into, out_of, *scaled = prepared
    starts = shape.empty_states() if save else None
    with torch.cuda.device_of(k):
        if shape.by_channel:
            launch.prepare_channels[(shape.rows * shape.chunks,)](
                q, q, k, k, decay, attention, *scaled, into, None, *shape.sizes, 0,
                **shape.whole("prepare_channels"),
            )  # fmt: skip
        else:
            options = shape.whole("prepare_heads")
            launch.prepare_heads[(shape.rows * shape.chunks,)](q, k, decay, *prepared, *shape.sizes, **options)
        blocks, count, length, options = shape.scan("scan_forward")
        grid = (shape.rows * count, blocks)
        inputs = (*(scaled or (q, k)), v, attention, into, out_of)
        options |= {"INITIAL": initial is not None}
        mode, first = 0, initial
        if count > 1:
            ends, products = shape.empty_segments(count)
            launch.scan_forward[grid](
                *inputs, None, None, ends, None, products, *shape.sizes, count, length, MODE=2, SAVE=False, **options
            )
            mode, first = 1, join_segments(products, ends, initial, reverse=False)
        launch.scan_forward[grid](
            *inputs, first, o, final, starts, None, *shape.sizes, count, length, MODE=mode, SAVE=save, **options
        )
    return o, final, [] if starts is None else [*prepared, starts]


def _empty_results(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, initial_state: Tensor | None, high: bool, save: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    shape = _Shape(k.shape, k.device, v.shape[-1], _operand(q, k, v, high), decay.ndim == 4)
    final = shape.new(shape.batch, shape.heads, shape.key_dim, shape.value_dim, dtype=torch.float32)
    return v.new_empty(v.shape), final, [*shape.empty_prepared(), shape.empty_states()] if save else []


def _backward(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, tape: list[Tensor], d_o: Tensor, d_state: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k, v, decay and the initial state; `d_x` is that of x."""
    launch = _kernels()
    attention, into, out_of, *scaled, starts = tape
    shape = _shape(k.shape, k.device, v.shape[-1], starts.dtype, decay.ndim == 4)
    d_q, d_k, d_v, d_decay, d_initial = _empty_gradients(q, k, v, decay, tape, d_o, d_state)
    q, k, v, d_o = (x.to(shape.operand).contiguous() for x in (q, k, v, d_o))
    decay = as_float32(decay)
    d_ends = shape.empty_states()
    with torch.cuda.device_of(k):
        blocks, count, length, options = shape.scan("scan_backward")
        grid = (shape.rows * count, blocks)
        inputs = (*(scaled or (q, k)), attention, into, out_of, d_o)
        mode, last = 0, as_float32(d_state)
        if count > 1:
            d_starts, products = shape.empty_segments(count)
            launch.scan_backward[grid](
                *inputs, None, None, None, d_starts, products, *shape.sizes, count, length, MODE=2, **options
            )
            mode, last = 1, join_segments(products, d_starts, last, reverse=True)
        launch.scan_backward[grid](
            *inputs, last, d_v, d_ends, d_initial, None, *shape.sizes, count, length, MODE=mode, **options
        )
        if shape.by_channel:
            _gradients_by_channel(shape, q, k, v, decay, starts, d_o, d_ends, d_q, d_k, d_decay)
        else:
            launch.gradients_heads[(shape.rows * shape.chunks,)](
                q, k, v, decay, starts, d_o, d_ends, d_q, d_k, d_decay, *shape.sizes,
                SPLIT=_split(shape.operand), **shape.values(), **shape.whole("gradients_heads"),
            )  # fmt: skip
    return d_q, d_k, d_v, d_decay, d_initial


def _gradients_by_channel(
    shape: _Shape, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, starts: Tensor, d_o: Tensor, d_ends: Tensor,
    d_q: Tensor, d_k: Tensor, d_decay: Tensor,
) -> None:  # fmt: skip
    """Fills in the gradients of q, k and decay: between blocks of tokens, then within them."""
    launch = _kernels()
    blocks = shape.chunks * shape.blocks
    q_in, k_out, d_q_in, d_k_out = (torch.empty_like(k) for _ in range(4))
    across, d_across = (shape.new(shape.rows * blocks, shape.key_dim, dtype=torch.float32) for _ in range(2))
    d_scores = shape.new(shape.rows * blocks, BLOCK, BLOCK, dtype=torch.float32)
    grid, options = shape.within("scale_within")
    launch.scale_within[grid](q, k, decay, q_in, k_out, across, shape.length, shape.heads, blocks, **options)
    launch.gradients_between[(shape.rows * shape.chunks,)](
        q_in, k_out, across, starts, d_o, d_o, v, v, d_ends, d_scores, d_q_in, d_k_out, d_across, *shape.sizes, 0,
        **shape.values(), **shape.whole("gradients_between"),
    )  # fmt: skip
    grid, options = shape.within("gradients_within")
    launch.gradients_within[grid](
        q, q, k, k, decay, d_scores, d_q_in, d_k_out, d_across, d_q, d_q, d_k, d_k, d_decay,
        shape.length, shape.heads, blocks, 0, KINDS=1, **options,
    )  # fmt: skip


def _empty_gradients(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, tape: list[Tensor], d_o: Tensor, d_state: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    d_q, d_k, d_v, d_decay, d_initial = (x.new_empty(x.shape) for x in (q, k, v, decay, d_state))
    return d_q, d_k, d_v, d_decay, d_initial


_forward_op = register_operator(
    "triton_diagonal",
    _forward,
    _empty_results,
    then=lambda results, q, k, v, decay, *_: _backward(q, k, v, decay, results[2], *results[:2]),
)
_backward_op = register_operator("triton_diagonal_backward", _backward, _empty_gradients)
