"""A decay for each channel minus a matrix of rank one on a GPU (RWKV-7, Kimi-Linear's KDA): Triton kernels.

A generalized Householder matrix after a decay for each channel is of this kind too,

    (I - beta k k^T) diag(a) = diag(a) - (beta k) (a * k)^T,

and further factors of a token are steps of their own without a decay. Forward: one kernel prepares all chunks at once,
one walks through them. Backward: one walks back, one finishes all chunks at once. `docs/kernels.md` has the derivation,
`kernels/low_rank.py` the kernels.
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
    INTERPRETED_ONLY,
    Launch,
    as_float32,
    check_inputs,
    operand_dtype,
    power_of_two,
    unavailable,
)
from statetrack.transition import Householder, LowRank, Transition

# Tensors of the preparation, which the scans read.
_PREPARED = 5
# Steps of a chunk.
_STEPS = 16
# The blocks of forward substitution.
_BASE = 4
# The width of the tiles of values of the kernel that cuts keys.
_VALUES = 32


def supports(transition: Transition) -> str | None:
    if isinstance(transition, LowRank):
        return unavailable(transition.u, transition.w, transition.decay)
    if isinstance(transition, Householder) and transition.decay is not None and transition.decay.ndim == 4:
        return unavailable(transition.k, transition.beta, transition.decay)
    return "triton_low_rank serves LowRank transitions, and Householder transitions with a decay for each channel"


def _run_dense(
    transition: Transition, q: Tensor, v: Tensor, write: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    if isinstance(transition, Householder):
        n = transition.k.shape[2]
        steps = _householder_steps(transition, q, v)
        o, final_state = _run_steps(*steps, initial_state)
        return o[:, n - 1 :: n], final_state
    assert isinstance(transition, LowRank)
    assert write is not None
    decay = transition.decay
    decay = decay.unsqueeze(-1).expand_as(q) if decay.ndim == 3 else decay
    return _run_steps(q, transition.w, transition.u, write, v, decay, initial_state)


BACKEND = Backend(name="triton", supports=supports, run=by_rows(_run_dense, check_inputs), priority=INTERPRETED_ONLY)


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
    q: Tensor, w: Tensor, u: Tensor, p: Tensor, v: Tensor, decay: Tensor, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    inputs = (q, w, u, p, v, decay, initial_state)
    if wants_gradient(*inputs):
        return _TritonLowRank.apply(*inputs)
    o, final_state, _ = _forward_op(*inputs, False)
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
    ) -> tuple[Tensor, Tensor]:
        o, final_state, tape = _forward_op(q, w, u, p, v, decay, initial_state, True)
        ctx.save_for_backward(q, w, u, p, v, decay, *tape)
        ctx.initial_dtype = None if initial_state is None else initial_state.dtype
        return o, final_state

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        d_o, d_state = grad_outputs
        q, w, u, p, v, decay, *tape = ctx.saved_tensors
        *gradients, d_initial = _backward_op(q, w, u, p, v, decay, tape, d_o, d_state)
        return *gradients, None if ctx.initial_dtype is None else d_initial.to(ctx.initial_dtype)


@cache
def _kernels() -> Any:
    return import_module("statetrack.ops.kernels.low_rank")


@cache
def _channel_kernels() -> Any:
    return import_module("statetrack.ops.kernels.channels")


# By kernel and by the key dimension's power of two, up to which an entry serves: for the scans the width of the tiles
# of values, for the others that of the tiles of keys. Not yet measured on a card: from the registers and the shared
# memory that the compiler reports (`python -m benchmarks.kernel_resources`).
_TABLE: dict[str, dict[int, Launch]] = {
    "prepare_channels": {64: Launch(16, 4, 1), 128: Launch(16, 4, 1), 256: Launch(16, 4, 1)},
    "scan_forward": {64: Launch(64, 4, 1), 128: Launch(16, 4, 1), 256: Launch(16, 8, 1)},
    "scan_backward": {64: Launch(64, 4, 1), 128: Launch(16, 4, 1), 256: Launch(16, 8, 1)},
    "gradients_channels": {64: Launch(16, 4, 1), 128: Launch(16, 4, 1), 256: Launch(16, 4, 1)},
}


class _Shape:
    """The sizes of one call and the arguments that its kernels share."""

    def __init__(self, q: Tensor, value_dim: int) -> None:
        self.batch, self.length, self.heads, self.key_dim = q.shape
        self.value_dim, self.device = value_dim, q.device
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

    def whole(self, kernel: str) -> dict[str, Any]:
        """Options of a kernel that does all chunks at once, in tiles of keys."""
        launch = _TABLE[kernel][max(64, self.block_k)]
        return {
            "K": self.key_dim, "BC": _STEPS, "KINDS": 2, "BD": min(launch.block, self.block_k),
            "LEVELS": _STEPS.bit_length() - 1, "PRECISION": "tf32x3", **launch.options,
        }  # fmt: skip

    def scan(self, kernel: str) -> tuple[tuple[int, int], dict[str, Any]]:
        """The grid and the options of a kernel that walks through the chunks, in tiles of values."""
        launch = _TABLE[kernel][max(64, self.block_k)]
        block = min(launch.block, power_of_two(self.value_dim))
        constants = {"K": self.key_dim, "V": self.value_dim, "BC": _STEPS, "BK": self.block_k, "BV": block}
        return (self.rows, -(-self.value_dim // block)), constants | launch.options

    def empty_prepared(self) -> list[Tensor]:
        """scores, x_in, y_out, across, inverse."""
        places = self.rows * self.chunks
        return [
            self.new(places, 2 * _STEPS, 2 * _STEPS),
            *(self.new(2, self.batch, self.length, self.heads, self.key_dim) for _ in range(2)),
            self.new(places, self.key_dim),
            self.new(places, _STEPS, _STEPS),
        ]

    def empty_states(self, dtype: torch.dtype) -> Tensor:
        """A state of every chunk, transposed."""
        return self.new(self.rows * self.chunks, self.value_dim, self.key_dim, dtype=dtype)

    def empty_values(self) -> Tensor:
        return self.new(self.batch, self.length, self.heads, self.value_dim)

    def empty_tape(self, dtype: torch.dtype) -> list[Tensor]:
        return [*self.empty_prepared(), self.empty_states(dtype), self.empty_values()]


def _forward(
    q: Tensor,
    w: Tensor,
    u: Tensor,
    p: Tensor,
    v: Tensor,
    decay: Tensor,
    initial_state: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Returns o, the final state, and a tape for `_backward`, which is empty unless `save`."""
    kernels = _kernels()
    shape = _Shape(q, v.shape[-1])
    o = v.new_empty(v.shape)
    final = shape.new(shape.batch, shape.heads, shape.key_dim, shape.value_dim)
    # States that a backward only reads may be as short as what was given.
    record = operand_dtype(q, w, u, p, v)
    q, w, u, p, v = (x.contiguous() for x in (q, w, u, p, v))
    initial = None if initial_state is None else as_float32(initial_state)
    prepared = shape.empty_prepared()
    saved = [shape.empty_states(record), shape.empty_values()] if save else []
    with torch.cuda.device_of(q):
        _channel_kernels().prepare_channels[(shape.rows * shape.chunks,)](
            q, w, u, p, as_float32(decay), *prepared, *shape.sizes, shape.numbers,
            BASE=_BASE, **shape.whole("prepare_channels"),
        )  # fmt: skip
        grid, options = shape.scan("scan_forward")
        kernels.scan_forward[grid](
            v, *prepared, initial, o, final, *(saved or (None, None)), *shape.sizes, shape.numbers,
            INITIAL=initial is not None, SAVE=save, **options,
        )  # fmt: skip
    return o, final, [*prepared, *saved] if save else []


def _empty_results(
    q: Tensor,
    w: Tensor,
    u: Tensor,
    p: Tensor,
    v: Tensor,
    decay: Tensor,
    initial_state: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    shape = _Shape(q, v.shape[-1])
    final = shape.new(shape.batch, shape.heads, shape.key_dim, shape.value_dim)
    return v.new_empty(v.shape), final, shape.empty_tape(operand_dtype(q, w, u, p, v)) if save else []


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
    kernels = _kernels()
    prepared, (starts, written) = tape[:_PREPARED], tape[_PREPARED:]
    shape = _Shape(q, v.shape[-1])
    results = _empty_gradients(q, w, u, p, v, decay, tape, d_o, d_state)
    d_q, d_w, d_u, d_p, d_v, d_decay, d_initial = results
    q, w, u, p, v, d_o = (x.contiguous() for x in (q, w, u, p, v, d_o))
    d_ends, d_read = torch.empty_like(starts), torch.empty_like(written)
    with torch.cuda.device_of(q):
        grid, options = shape.scan("scan_backward")
        kernels.scan_backward[grid](
            *prepared, d_o, as_float32(d_state), d_v, d_read, d_ends, d_initial, *shape.sizes, shape.numbers, **options
        )
        _channel_kernels().gradients_channels[(shape.rows * shape.chunks,)](
            q, w, u, p, as_float32(decay), starts, d_o, d_read, written, v, d_ends, d_q, d_w, d_u, d_p, d_decay,
            *shape.sizes, V=shape.value_dim, BV=min(_VALUES, power_of_two(shape.value_dim)), SPLIT=False,
            **shape.whole("gradients_channels"),
        )  # fmt: skip
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


_forward_op = register_operator("triton_low_rank", _forward, _empty_results)
_backward_op = register_operator("triton_low_rank_backward", _backward, _empty_gradients)
