"""Products of generalized Householder matrices on a GPU: the chunked algorithm as a few Triton kernels.

Forward: one kernel prepares all chunks at once, one walks through them. Backward: one walks back, one finishes all
chunks at once. `docs/kernels.md` has the derivation and what it costs, `kernels/householder.py` the kernels. Triton is
imported by the first call, not with the package. Tile sizes come from a table, so nothing is tuned at run time.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from statetrack.ops.backend import Backend, differentiable_once, register_operator, wants_gradient
from statetrack.ops.packing import by_rows
from statetrack.ops.triton_common import (
    CHECKED_ON_A_CARD,
    LARGEST_KEY,
    Launch,
    as_float32,
    check_inputs,
    power_of_two,
    processors,
    unavailable,
)
from statetrack.transition import Householder, Transition

# The tensors that a state-free kernel leaves for the scans, and those that a forward scan leaves for the backward.
_PREPARED = 6
_LARGEST_PRODUCT = 64
# Shorter sequences go step by step: with so few tokens the state's own traffic is all there is.
_STEP_BY_STEP = 4
# Of segments that are scanned at once: less than so many don't pay, nor do shorter ones (in chunks).
_FEWEST_SEGMENTS = 4
_SHORTEST_SEGMENT = 8


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
    transition: Transition, q: Tensor, v: Tensor, write: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    assert isinstance(transition, Householder)
    inputs = (q, transition.k, v, transition.beta, transition.decay, initial_state)
    if wants_gradient(*inputs):
        return _TritonHouseholder.apply(*inputs, transition.normalize)
    o, final_state, _ = _forward_op(*inputs, transition.normalize, False)
    return o, final_state


BACKEND = Backend(
    name="triton", supports=supports, run=by_rows(_run_dense, check_inputs), priority=CHECKED_ON_A_CARD, decodes=True
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
    ) -> tuple[Tensor, Tensor]:
        o, final_state, tape = _forward_op(q, k, v, beta, decay, initial_state, normalize, True)
        ctx.save_for_backward(q, k, beta, decay, *tape)
        ctx.normalize, ctx.value_dtype = normalize, v.dtype
        ctx.initial_dtype = None if initial_state is None else initial_state.dtype
        return o, final_state

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        d_o, d_state = grad_outputs
        q, k, beta, decay, *tape = ctx.saved_tensors
        dq, dk, dv, d_beta, d_decay, d_initial = _backward_op(q, k, beta, decay, ctx.normalize, tape, d_o, d_state)
        return (
            *(dq, dk, dv, d_beta),
            None if decay is None else d_decay,
            None if ctx.initial_dtype is None else d_initial.to(ctx.initial_dtype),
            None,
        )


@cache
def _kernels() -> Any:
    return import_module("statetrack.ops.kernels.householder")


def _operands(dtypes: set[torch.dtype]) -> tuple[torch.dtype, bool]:
    """The dtype of the tensor cores' operands, and whether float32 numbers are split in two of them."""
    return (torch.bfloat16, True) if dtypes == {torch.bfloat16} else (torch.float32, False)


# By kernel and by the key dimension's power of two, up to which an entry serves. The block of `prepare` is
# that of its substitution. Measured on an H100 in bfloat16.
_TABLE: dict[str, dict[int, Launch]] = {
    "prepare": {64: Launch(4, 4, 1), 128: Launch(4, 4, 1), 256: Launch(4, 4, 1)},
    "scan_forward": {64: Launch(64, 4, 2), 128: Launch(128, 8, 2), 256: Launch(64, 8, 1)},
    "scan_backward": {64: Launch(64, 4, 2), 128: Launch(128, 8, 2), 256: Launch(64, 8, 1)},
    "gradients": {64: Launch(64, 4, 2), 128: Launch(64, 4, 2), 256: Launch(32, 8, 1)},
}
# float32 operands take twice the shared memory.
_TABLE_FLOAT32: dict[str, dict[int, Launch]] = {
    "prepare": {64: Launch(16, 4, 1), 128: Launch(16, 4, 1), 256: Launch(16, 8, 1)},
    "scan_forward": {64: Launch(32, 4, 1), 128: Launch(32, 4, 1), 256: Launch(16, 4, 1)},
    "scan_backward": {64: Launch(32, 4, 1), 128: Launch(32, 4, 1), 256: Launch(16, 4, 1)},
    "gradients": {64: Launch(32, 4, 1), 128: Launch(32, 8, 1), 256: Launch(16, 8, 1)},
}


class _Shape:
    """The sizes of one call and the arguments that its kernels share."""

    def __init__(self, k: Tensor, value_dim: int, operand: torch.dtype, split: bool) -> None:
        self.batch, self.length, self.factors, self.heads, self.key_dim = k.shape
        self.value_dim, self.operand, self.split = value_dim, operand, split
        self.device = k.device
        # Half a chunk does for the products of keys of 256 channels in float32, which would not fit on the chip.
        self.block_m = 32 if operand == torch.float32 and self.key_dim > 64 and self.factors <= 32 else 64
        self.tokens = self.block_m // self.factors
        self.block_c = power_of_two(self.tokens)
        self.block_k = power_of_two(self.key_dim)
        self.chunks = -(-self.length // self.tokens)
        self.rows = self.batch * self.heads

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.operand, device=self.device)

    def launch(self, kernel: str) -> tuple[int, dict[str, int]]:
        """The entry's block and triton's options."""
        table = (_TABLE if self.split else _TABLE_FLOAT32)[kernel]
        entry = table[max(64, self.block_k)]
        return min(entry.block, power_of_two(self.value_dim)), entry.options

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.length, self.heads, self.chunks

    def constants(self, **more: Any) -> dict[str, Any]:
        return {
            "N": self.factors, "K": self.key_dim, "C": self.tokens,
            "BM": self.block_m, "BC": self.block_c, "BK": self.block_k,
            "SPLIT": self.split, "PRECISION": "ieee" if self.split else "tf32x3", **more,
        }  # fmt: skip

    def empty_prepared(self, has_decay: bool) -> list[Tensor]:
        """inverse_high, inverse_low, attention, into, into_token, out_of; those not needed are empty."""
        places = self.rows * self.chunks
        bm, bc = self.block_m, self.block_c
        float32 = torch.float32
        return [
            self.new(places, bm, bm),
            self.new(places if self.split else 0, bm, bm),
            self.new(places, bc, bm),
            self.new(places if has_decay else 0, bm, dtype=float32),
            self.new(places if has_decay else 0, bc, dtype=float32),
            self.new(places if has_decay else 0, bm, dtype=float32),
        ]

    def segments(self, blocks: int) -> tuple[int, int]:
        """How many segments the chunks are cut into, to be scanned at once by `blocks` programs each, and their length.

        Segments cost the scan almost three times the work, so there are none where rows fill the device by themselves.
        """
        count = processors(self.device) // (self.rows * blocks)
        if count < _FEWEST_SEGMENTS or self.block_k > 128:
            return 1, self.chunks
        length = max(_SHORTEST_SEGMENT, -(-self.chunks // count))
        # The backward finds the length again from the number of segments.
        count = -(-self.chunks // length)
        return count, -(-self.chunks // count)

    def empty_maps(self) -> list[Tensor]:
        """The products of the transitions of every segment, transposed, where there are segments."""
        block_v, _ = self.launch("scan_forward")
        count, _ = self.segments(-(-self.value_dim // block_v))
        return [] if count == 1 else [self.new(self.rows, count, self.key_dim, self.key_dim, dtype=torch.float32)]

    def join(self, maps: Tensor, ends: Tensor, border: Tensor | None, borders: Tensor, *, reverse: bool) -> None:
        """Fills `borders` with the states between segments."""
        block_v = min(64, power_of_two(self.value_dim))
        _kernels().join_segments[(self.rows, -(-self.value_dim // block_v))](
            maps, ends, border, borders, maps.shape[1],
            K=self.key_dim, V=self.value_dim, BK=self.block_k, BV=block_v,
            BORDER=border is not None, REVERSE=reverse, num_warps=4, num_stages=1,
        )  # fmt: skip

    def empty_record(self) -> list[Tensor]:
        """Every chunk's first state, transposed, and u in two halves."""
        u = (self.batch, self.length, self.factors, self.heads, self.value_dim)
        return [
            self.new(self.rows * self.chunks, self.value_dim, self.key_dim),
            self.new(*u),
            self.new(*(u if self.split else (0,))),
        ]


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    initial_state: Tensor | None,
    normalize: bool,
    save: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Returns o, the final state, and a tape for `_backward`, which is empty unless `save`."""
    kernels = _kernels()
    operand, split = _operands({q.dtype, k.dtype, v.dtype})
    shape = _Shape(k, v.shape[-1], operand, split)
    o = v.new_empty(shape.batch, shape.length, shape.heads, shape.value_dim)
    final = shape.new(shape.batch, shape.heads, shape.key_dim, shape.value_dim, dtype=torch.float32)
    initial = None if initial_state is None else as_float32(initial_state)
    beta, decay = _parameters(beta, decay)
    with torch.cuda.device_of(k):
        if shape.length <= _STEP_BY_STEP and not save:
            block_v = min(32, power_of_two(shape.value_dim))
            kernels.steps[(shape.rows, -(-shape.value_dim // block_v))](
                q.contiguous(), k.contiguous(), v.contiguous(), beta, decay, initial, o, final,
                shape.length, shape.heads,
                N=shape.factors, K=shape.key_dim, V=shape.value_dim, BK=shape.block_k, BV=block_v,
                NORMALIZE=normalize, DECAY=decay is not None, INITIAL=initial is not None, num_warps=4,
            )  # fmt: skip
            return o, final, []
        q, k, v = (x.to(operand).contiguous() for x in (q, k, v))
        prepared = shape.empty_prepared(decay is not None)
        base, options = shape.launch("prepare")
        kernels.prepare[(shape.rows * shape.chunks,)](
            q, k, beta, decay, *prepared, *shape.sizes,
            **shape.constants(BASE=base, NORMALIZE=normalize, DECAY=decay is not None), **options,
        )  # fmt: skip
        record = shape.empty_record() if save else [None] * 3
        block_v, options = shape.launch("scan_forward")
        blocks = -(-shape.value_dim // block_v)
        constants = shape.constants(INITIAL=initial is not None, DECAY=decay is not None)
        segments, length = shape.segments(blocks)
        maps = None
        if segments == 1:
            mode, first = 0, initial
        else:
            mode, first = 1, shape.new(shape.rows, segments, shape.value_dim, shape.key_dim, dtype=torch.float32)
            maps = shape.new(shape.rows, segments, shape.key_dim, shape.key_dim, dtype=torch.float32)
            ends = torch.empty_like(first)
            for what, target, width in ((2, ends, shape.value_dim), (3, maps, shape.key_dim)):
                block = min(block_v, power_of_two(width))
                kernels.scan_forward[(shape.rows * segments, -(-width // block))](
                    q, k, v, *prepared, None, o, target, *[None] * 3, *shape.sizes, segments, length,
                    V=width, BV=block, MODE=what, SAVE=False, **constants, **options,
                )  # fmt: skip
            shape.join(maps, ends, initial, first, reverse=False)
        kernels.scan_forward[(shape.rows * segments, blocks)](
            q, k, v, *prepared, first, o, final, *record, *shape.sizes, segments, length,
            V=shape.value_dim, BV=block_v, MODE=mode, SAVE=save, **constants, **options,
        )  # fmt: skip
    if not save:
        return o, final, []
    tape = [*prepared, *(x for x in record if x is not None)]
    return o, final, tape if maps is None else [*tape, maps]


def _empty_results(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    initial_state: Tensor | None,
    normalize: bool,
    save: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    shape = _Shape(k, v.shape[-1], *_operands({q.dtype, k.dtype, v.dtype}))
    o = v.new_empty(shape.batch, shape.length, shape.heads, shape.value_dim)
    final = shape.new(shape.batch, shape.heads, shape.key_dim, shape.value_dim, dtype=torch.float32)
    if not save:
        return o, final, []
    return o, final, [*shape.empty_prepared(decay is not None), *shape.empty_record(), *shape.empty_maps()]


def _backward(
    q: Tensor,
    k: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    normalize: bool,
    tape: list[Tensor],
    d_o: Tensor,
    d_state: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k, v, beta, decay (empty without one) and the initial state; `d_x` is that of x."""
    kernels = _kernels()
    prepared, (starts, u_high, u_low, *maps) = tape[:_PREPARED], tape[_PREPARED:]
    shape = _Shape(k, d_o.shape[-1], u_high.dtype, tape[1].numel() > 0)
    d_q, d_k, d_v, d_beta, d_decay, d_initial = _empty_gradients(q, k, beta, decay, normalize, tape, d_o, d_state)
    operand_q, operand_k, operand_d_o = (x.to(shape.operand).contiguous() for x in (q, k, d_o))
    beta, decay = _parameters(beta, decay)
    d_error_high = d_v if d_v.dtype == shape.operand else torch.empty_like(u_high)
    d_error_low, d_ends = torch.empty_like(u_low), torch.empty_like(starts)
    has_decay = decay is not None
    with torch.cuda.device_of(k):
        block_v, options = shape.launch("scan_backward")
        blocks = -(-shape.value_dim // block_v)
        constants = shape.constants(V=shape.value_dim, BV=block_v, DECAY=has_decay)
        inputs = (operand_q, operand_k, *prepared, operand_d_o)
        segments, length = (maps[0].shape[1], -(-shape.chunks // maps[0].shape[1])) if maps else (1, shape.chunks)
        mode, last = 0, as_float32(d_state)
        if maps:
            first = shape.new(shape.rows, segments, shape.value_dim, shape.key_dim, dtype=torch.float32)
            kernels.scan_backward[(shape.rows * segments, blocks)](
                *inputs, None, None, None, None, first, *shape.sizes, segments, length, MODE=2, **constants, **options
            )
            mode, border, last = 1, last, torch.empty_like(first)
            shape.join(maps[0], first, border, last, reverse=True)
        kernels.scan_backward[(shape.rows * segments, blocks)](
            *inputs, last, d_error_high, d_error_low, d_ends, d_initial, *shape.sizes, segments, length,
            MODE=mode, **constants, **options,
        )  # fmt: skip
        block_v, options = shape.launch("gradients")
        kernels.gradients[(shape.rows * shape.chunks,)](
            operand_q, operand_k, beta, decay, starts, u_high, u_low, operand_d_o, d_error_high, d_error_low, d_ends,
            d_q, d_k, d_beta, d_decay, *shape.sizes,
            **shape.constants(V=shape.value_dim, BV=block_v, NORMALIZE=normalize, DECAY=has_decay), **options,
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
    d_state: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        d_o.new_empty(*k.shape[:-1], d_o.shape[-1]),
        beta.new_empty(beta.shape),
        d_state.new_empty(0) if decay is None else decay.new_empty(decay.shape),
        d_state.new_empty(d_state.shape),
    )


def _parameters(beta: Tensor, decay: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return as_float32(beta), None if decay is None else as_float32(decay)


_forward_op = register_operator("triton_householder", _forward, _empty_results)
_backward_op = register_operator("triton_householder_backward", _backward, _empty_gradients)
