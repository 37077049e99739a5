"""Products of generalized Householder matrices on a GPU: the chunked algorithm as a few Triton kernels.

Forward: one kernel prepares all chunks at once, one walks through them. Backward: one walks back, one finishes all
chunks at once. `docs/kernels.md` has the derivation and what it costs, `kernels/householder.py` the kernels. Triton is
imported by the first call, not with the package. Tile sizes come from a table, so nothing is tuned at run time.
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
    LARGEST_KEY,
    Launch,
    as_float32,
    check_inputs,
    join_segments,
    kernels,
    power_of_two,
    segments,
    unavailable,
)
from statetrack.transition import Householder, Transition

# The tensors that a state-free kernel leaves for the scans, and those that a forward scan leaves for the backward.
_PREPARED = 7
_LARGEST_PRODUCT = 64
# The widest tile of key channels of `gradients`, whose accumulators would else not fit the registers.
_KEYS = 128
# The scans keep a state of keys of up to so many channels in one piece. Beside a larger one there are no registers for
# its halves: it is cut along the keys, and a piece at a time is split.
_LONGEST_WHOLE = 128
_PIECE, _PIECE_FLOAT32 = 64, 32
# Shorter sequences go step by step: with so few tokens the state's own traffic is all there is.
_STEP_BY_STEP = 4
# The products of the segments' transitions fit a multiprocessor up to keys of so many channels.
_LARGEST_MAP = 128


def supports(transition: Transition) -> str | None:
    if not isinstance(transition, Householder):
        return "triton_householder serves Householder transitions"
    k = transition.k
    if reason := unavailable(k, transition.beta, transition.decay):
        return reason
    if transition.decay is not None and transition.decay.ndim == 4:
        return "triton_householder serves one decay for each head, [B, T, H], not one for each channel"
    if k.shape[-1] > LARGEST_KEY:
        return f"triton_householder serves keys of up to {LARGEST_KEY} channels, not {k.shape[-1]}"
    if k.shape[2] > _LARGEST_PRODUCT:
        return f"triton_householder serves up to {_LARGEST_PRODUCT} factors a token, not {k.shape[2]}"
    return None


def _run_dense(
    transition: Transition, q: Tensor, v: Tensor, write: Tensor | None, initial_state: Tensor | None, *, high: bool
) -> tuple[Tensor, Tensor]:
    assert isinstance(transition, Householder)
    inputs = (q, transition.k, v, transition.beta, transition.decay, initial_state)
    if wants_gradient(*inputs):
        return _TritonHouseholder.apply(*distinct(inputs), transition.normalize, high)
    o, final_state, _ = _forward_op(*inputs, transition.normalize, high, False)
    return o, final_state


BACKEND = Backend(
    name="triton",
    supports=supports,
    run=by_rows(partial(_run_dense, high=False), check_inputs),
    run_high=by_rows(partial(_run_dense, high=True), check_inputs),
    priority=CHECKED_ON_A_CARD,
    decodes=True,
)


class _TritonHouseholder(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        decay: Tensor | None,
        initial_state: Tensor | None,
        normalize: bool,
        high: bool,
    ) -> tuple[Tensor, Tensor]:
        o, final_state, tape = _forward_op(q, k, v, beta, decay, initial_state, normalize, high, True)
        ctx.save_for_backward(q, k, beta, decay, *tape)
        ctx.normalize, ctx.value_dim, ctx.value_dtype = normalize, v.shape[-1], v.dtype
        if not torch.compiler.is_compiling():  # which need not know this method
            # A final state that nobody asks about has no gradient, not one of zeros that a kernel must fill in.
            ctx.set_materialize_grads(False)
        ctx.initial_dtype = None if initial_state is None else initial_state.dtype
        return o, final_state

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        d_o, d_state = grad_outputs
        q, k, beta, decay, *tape = ctx.saved_tensors
        if d_o is None:
            d_o = q.new_zeros(*q.shape[:-1], ctx.value_dim, dtype=ctx.value_dtype)
        dq, dk, dv, d_beta, d_decay, d_initial = _backward_op(q, k, beta, decay, ctx.normalize, tape, d_o, d_state)
        return (
            *(dq, dk, dv, d_beta),
            None if decay is None else d_decay,
            None if ctx.initial_dtype is None else d_initial.to(ctx.initial_dtype),
            *(None, None),
        )


def _kernels() -> Any:
    return kernels("householder", "householder_backward")


def _operands(dtypes: set[torch.dtype]) -> tuple[torch.dtype, bool]:
    """The dtype of the tensor cores' operands, and whether float32 numbers are split in two of them."""
    return (torch.bfloat16, True) if dtypes == {torch.bfloat16} else (torch.float32, False)


# By kernel and by the key dimension's power of two, up to which an entry serves. The block of `prepare` is that of its
# substitution. Measured on an H100 in bfloat16 (docs/kernels.md).
_TABLE: dict[str, dict[int, Launch]] = {
    "prepare": {64: Launch(4, 4, 1), 128: Launch(4, 4, 1), 256: Launch(4, 4, 1)},
    "scan_forward": {64: Launch(64, 4, 2), 128: Launch(128, 8, 2), 256: Launch(128, 8, 2)},
    "scan_backward": {64: Launch(64, 4, 2), 128: Launch(128, 8, 2), 256: Launch(128, 8, 2)},
    # With 128 values the low half of P would not fit on the chip.
    "scan_backward_high": {64: Launch(64, 4, 2), 128: Launch(128, 8, 2), 256: Launch(64, 4, 2)},
    "gradients": {64: Launch(64, 4, 2), 128: Launch(64, 4, 2), 256: Launch(64, 4, 1)},
    "gradients_decay": {64: Launch(64, 4, 2), 128: Launch(64, 4, 2), 256: Launch(32, 8, 2)},
}
# float32 operands take twice the shared memory.
_TABLE_FLOAT32: dict[str, dict[int, Launch]] = {
    "prepare": {64: Launch(16, 4, 1), 128: Launch(16, 4, 1), 256: Launch(16, 8, 1)},
    "scan_forward": {64: Launch(32, 4, 1), 128: Launch(32, 4, 1), 256: Launch(16, 4, 1)},
    "scan_backward": {64: Launch(32, 4, 1), 128: Launch(32, 4, 1), 256: Launch(16, 4, 1)},
    "gradients": {64: Launch(32, 4, 1), 128: Launch(32, 8, 1), 256: Launch(32, 8, 1)},
    "gradients_decay": {64: Launch(32, 4, 1), 128: Launch(32, 8, 1), 256: Launch(32, 8, 1)},
}


class _Shape:
    """The sizes of one call and the arguments that its kernels share."""

    def __init__(
        self, keys: torch.Size, device: torch.device, value_dim: int, operand: torch.dtype, split: bool, high: bool
    ) -> None:
        self.batch, self.length, self.factors, self.heads, self.key_dim = keys
        self.value_dim, self.operand, self.split = value_dim, operand, split
        # Nothing is rounded to 16 bits where no operand is split.
        self.high = high and split
        self.device = device
        # float32 operands take half a chunk: tiles of 64 rows don't fit into registers, nor on the chip for long keys.
        self.block_m = 32 if operand == torch.float32 and self.factors <= 32 else 64
        self.tokens = self.block_m // self.factors
        self.block_c = power_of_two(self.tokens)
        self.block_k = power_of_two(self.key_dim)
        piece = _PIECE if split else _PIECE_FLOAT32
        self.piece = piece if self.block_k > _LONGEST_WHOLE else self.block_k
        self.chunks = -(-self.length // self.tokens)
        self.rows = self.batch * self.heads

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.operand, device=self.device)

    def launch(self, kernel: str) -> tuple[int, dict[str, int]]:
        """The entry's block and triton's options."""
        table = (_TABLE if self.split else _TABLE_FLOAT32)[kernel]
        entry = table[max(64, self.block_k)]
        block, options = min(entry.block, power_of_two(self.value_dim)), entry.options
        if self.block_k > _LONGEST_WHOLE and block < entry.block:
            # Eight warps would divide the keys, and each half go through shared memory to the other.
            options["num_warps"] = min(4, entry.num_warps)
        return block, options

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.length, self.heads, self.chunks

    def constants(self, **more: Any) -> dict[str, Any]:
        return {
            "N": self.factors, "K": self.key_dim, "C": self.tokens,
            "BM": self.block_m, "BC": self.block_c, "BK": self.block_k,
            "SPLIT": self.split, "HIGH": self.high, "PRECISION": "ieee" if self.split else "tf32x3", **more,
        }  # fmt: skip

    def empty_prepared(self, has_decay: bool) -> list[Tensor | None]:
        """inverse_high, inverse_low, attention, attention_low, into, into_token, out_of; None where not needed."""
        places = self.rows * self.chunks
        bm, bc = self.block_m, self.block_c
        float32 = torch.float32
        return [
            self.new(places, bm, bm),
            self.new(places, bm, bm) if self.split else None,
            self.new(places, bc, bm),
            self.new(places, bc, bm) if self.high else None,
            *(self.new(places, size, dtype=float32) if has_decay else None for size in (bm, bc, bm)),
        ]

    def segments(self, blocks: int) -> tuple[int, int]:
        """How many segments the chunks are cut into, with `blocks` programs each, and their length in chunks."""
        if self.block_k > _LARGEST_MAP:
            return 1, self.chunks
        return segments(self.chunks, self.rows * blocks, self.device)

    def empty_maps(self) -> Tensor | None:
        """The products of the transitions of every segment, transposed, where there are segments."""
        block_v, _ = self.launch("scan_forward")
        count, _ = self.segments(-(-self.value_dim // block_v))
        return None if count == 1 else self.new(self.rows, count, self.key_dim, self.key_dim, dtype=torch.float32)

    def empty_record(self) -> list[Tensor | None]:
        """Every chunk's first state, transposed, in two halves, the second None where not needed, and u likewise."""
        u = (self.batch, self.length, self.factors, self.heads, self.value_dim)
        places = self.rows * self.chunks
        return [
            self.new(places, self.value_dim, self.key_dim),
            self.new(places, self.value_dim, self.key_dim) if self.high else None,
            self.new(*u),
            self.new(*u) if self.split else None,
        ]


_shape = lru_cache(maxsize=64)(_Shape)
"""Of sizes that come again and again, which are numbers: not of those that torch.compile traces with."""


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    initial_state: Tensor | None,
    normalize: bool,
    high: bool,
    save: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Returns o, the final state, and a tape for `_backward`, which is empty unless `save`."""
    launch = _kernels()
    operand, split = _operands({q.dtype, k.dtype, v.dtype})
    shape = _shape(k.shape, k.device, v.shape[-1], operand, split, high)
    o = v.new_empty(shape.batch, shape.length, shape.heads, shape.value_dim)
    final = shape.new(shape.batch, shape.heads, shape.key_dim, shape.value_dim, dtype=torch.float32)
    initial = None if initial_state is None else as_float32(initial_state)
    beta, decay = _parameters(beta, decay)
    with torch.cuda.device_of(k):
        if shape.length <= _STEP_BY_STEP and not save:
            block_v = min(32, power_of_two(shape.value_dim))
            launch.steps[(shape.rows, -(-shape.value_dim // block_v))](
                q.contiguous(), k.contiguous(), v.contiguous(), beta, decay, initial, o, final,
                shape.length, shape.heads,
                N=shape.factors, K=shape.key_dim, V=shape.value_dim, BK=shape.block_k, BV=block_v,
                NORMALIZE=normalize, DECAY=decay is not None, INITIAL=initial is not None, num_warps=4,
            )  # fmt: skip
            return o, final, []
        q, k, v = (x.to(operand).contiguous() for x in (q, k, v))
        prepared = shape.empty_prepared(decay is not None)
        base, options = shape.launch("prepare")
        launch.prepare[(shape.rows * shape.chunks,)](
            q, k, beta, decay, *prepared, *shape.sizes,
            **shape.constants(BASE=base, NORMALIZE=normalize, DECAY=decay is not None), **options,
        )  # fmt: skip
        record: list[Tensor | None] = shape.empty_record() if save else [None] * 4
        block_v, options = shape.launch("scan_forward")
        blocks = -(-shape.value_dim // block_v)
        constants = shape.constants(BD=shape.piece, INITIAL=initial is not None, DECAY=decay is not None)
        count, length = shape.segments(blocks)
        maps = None
        if count == 1:
            mode, first = 0, initial
        else:
            ends = shape.new(shape.rows, count, shape.value_dim, shape.key_dim, dtype=torch.float32)
            maps = shape.new(shape.rows, count, shape.key_dim, shape.key_dim, dtype=torch.float32)
            for what, target, width in ((2, ends, shape.value_dim), (3, maps, shape.key_dim)):
                block = min(block_v, power_of_two(width))
                launch.scan_forward[(shape.rows * count, -(-width // block))](
                    q, k, v, *prepared, None, o, target, *[None] * 4, *shape.sizes, count, length,
                    V=width, BV=block, MODE=what, SAVE=False, **constants, **options,
                )  # fmt: skip
            mode, first = 1, join_segments(maps, ends, initial, reverse=False)
        launch.scan_forward[(shape.rows * count, blocks)](
            q, k, v, *prepared, first, o, final, *record, *shape.sizes, count, length,
            V=shape.value_dim, BV=block_v, MODE=mode, SAVE=save, **constants, **options,
        )  # fmt: skip
    if not save:
        return o, final, []
    return o, final, _tape(prepared, record, maps)


def _empty_results(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    initial_state: Tensor | None,
    normalize: bool,
    high: bool,
    save: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    shape = _Shape(k.shape, k.device, v.shape[-1], *_operands({q.dtype, k.dtype, v.dtype}), high)
    o = v.new_empty(shape.batch, shape.length, shape.heads, shape.value_dim)
    final = shape.new(shape.batch, shape.heads, shape.key_dim, shape.value_dim, dtype=torch.float32)
    if not save:
        return o, final, []
    return o, final, _tape(shape.empty_prepared(decay is not None), shape.empty_record(), shape.empty_maps())


def _tape(prepared: list[Tensor | None], record: list[Tensor | None], maps: Tensor | None) -> list[Tensor]:
    """What there is of them: an empty tensor in the place of the rest would cost as much time as any other."""
    return [x for x in (*prepared, *record, maps) if x is not None]


def _untape(tape: list[Tensor], has_decay: bool) -> tuple[list[Tensor | None], list[Tensor | None], Tensor | None]:
    """The reverse of `_tape`: two tensors more where float32 numbers are split, and two again with high precision."""
    halves, has_maps = divmod(len(tape) - (7 if has_decay else 4), 2)
    is_there = [True, halves > 0, True, halves > 1, *[has_decay] * 3, True, halves > 1, True, halves > 0, has_maps == 1]
    left = iter(tape)
    *found, maps = [next(left) if there else None for there in is_there]
    return found[:_PREPARED], found[_PREPARED:], maps


def _backward(
    q: Tensor,
    k: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    normalize: bool,
    tape: list[Tensor],
    d_o: Tensor,
    d_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k, v, beta, decay (empty without one) and the initial state; `d_x` is that of x."""
    launch = _kernels()
    prepared, (starts, starts_low, u_high, u_low), maps = _untape(tape, decay is not None)
    assert starts is not None
    assert u_high is not None
    split, high = u_low is not None, starts_low is not None
    shape = _shape(k.shape, k.device, d_o.shape[-1], u_high.dtype, split, high)
    d_q, d_k, d_v, d_beta, d_decay, d_initial = _empty_gradients(q, k, beta, decay, normalize, tape, d_o, d_state)
    operand_q, operand_k, operand_d_o = (x.to(shape.operand).contiguous() for x in (q, k, d_o))
    beta, decay = _parameters(beta, decay)
    d_error_high = d_v if d_v.dtype == shape.operand else torch.empty_like(u_high)
    d_error_low, d_ends, d_ends_low = (None if x is None else torch.empty_like(x) for x in (u_low, starts, starts_low))
    has_decay = decay is not None
    with torch.cuda.device_of(k):
        block_v, options = shape.launch("scan_backward_high" if high else "scan_backward")
        blocks = -(-shape.value_dim // block_v)
        constants = shape.constants(
            BD=shape.piece, V=shape.value_dim, BV=block_v, DECAY=has_decay, FINAL=d_state is not None
        )
        inputs = (operand_q, operand_k, *prepared, operand_d_o)
        count = 1 if maps is None else maps.shape[1]
        length = -(-shape.chunks // count)
        mode, last = 0, None if d_state is None else as_float32(d_state)
        if maps is not None:
            first = shape.new(shape.rows, count, shape.value_dim, shape.key_dim, dtype=torch.float32)
            launch.scan_backward[(shape.rows * count, blocks)](
                *inputs, *[None] * 5, first, *shape.sizes, count, length, MODE=2, **constants, **options
            )
            mode, last = 1, join_segments(maps, first, last, reverse=True)
        launch.scan_backward[(shape.rows * count, blocks)](
            *inputs, last, d_error_high, d_error_low, d_ends, d_ends_low, d_initial, *shape.sizes, count, length,
            MODE=mode, **constants, **options,
        )  # fmt: skip
        block_v, options = shape.launch("gradients_decay" if has_decay else "gradients")
        launch.gradients[(shape.rows * shape.chunks,)](
            operand_q, operand_k, beta, decay, starts, starts_low, u_high, u_low, operand_d_o,
            d_error_high, d_error_low, d_ends, d_ends_low, d_q, d_k, d_beta, d_decay, *shape.sizes,
            **shape.constants(
                BD=min(shape.block_k, _KEYS), V=shape.value_dim, BV=block_v, NORMALIZE=normalize, DECAY=has_decay
            ),
            **options,
        )  # fmt: skip
    if d_error_high is not d_v:
        d_v.copy_(d_error_high)
    return d_q, d_k, d_v, d_beta, d_decay, d_initial


def _empty_gradients(
    q: Tensor,
    k: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    normalize: bool,
    tape: list[Tensor],
    d_o: Tensor,
    d_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        d_o.new_empty(*k.shape[:-1], d_o.shape[-1]),
        beta.new_empty(beta.shape),
        beta.new_empty(0) if decay is None else decay.new_empty(decay.shape),
        beta.new_empty(k.shape[0], k.shape[3], k.shape[4], d_o.shape[-1], dtype=torch.float32),
    )


def _parameters(beta: Tensor, decay: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return as_float32(beta), None if decay is None else as_float32(decay)


_forward_op = register_operator(
    "triton_householder",
    _forward,
    _empty_results,
    then=lambda results, q, k, v, beta, decay, initial_state, normalize, *_: _backward(
        q, k, beta, decay, normalize, results[2], results[0], None
    ),
)
_backward_op = register_operator("triton_householder_backward", _backward, _empty_gradients)
