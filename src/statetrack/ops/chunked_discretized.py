"""Mamba's selective scan with any eigenvalue range, tile by tile, in PyTorch operations for every device.

The states of all tokens, [B, T, H, K, V], are far larger than the inputs. They exist for one tile at a time, some
sequences by some steps, small enough for a CPU's cache: the forward keeps the state before every tile, and the backward
computes those inside it once more. What a tile needs is written, by `out=` or in place, to memory that was used before,
because touching fresh memory costs more than the arithmetic does.

Nothing is divided by a decay and no decays are multiplied up, so a decay of 0 or below is as good as any.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from statetrack.ops.backend import Backend, differentiable_once, distinct, register_operator, wants_gradient
from statetrack.ops.packing import by_rows
from statetrack.transition import Discretized, Transition, accumulation_dtype

# Elements of the largest tensors of a tile: 2 MiB each in float32. The forward has two of them, the backward four.
_TILE_SIZE = 2**19
# Elements of the states of one step: enough to hide the dispatch of the operation that computes them.
_STEP_SIZE = 2**15
# However large the states are, a tile has some steps, because the state before every tile is kept.
_MIN_STEPS = 8
# With fewer multiplications in each matrix product, `torch.bmm` on a CPU is a scalar loop.
_SMALL_BMM = 400


def supports(transition: Transition) -> str | None:
    return None if isinstance(transition, Discretized) else "chunked_discretized serves Discretized transitions"


def _run_dense(
    transition: Transition, q: Tensor, v: Tensor, write: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    assert isinstance(transition, Discretized)
    assert write is not None
    inputs = (transition.dt, transition.A, transition.lower_end, q, write, v, initial_state)
    lo, hi = transition.eigenvalue_range.lo, transition.eigenvalue_range.hi
    if wants_gradient(*inputs):
        return _ChunkedDiscretized.apply(*distinct(inputs), lo, hi)
    o, final_state, _ = _forward_op(*inputs, lo, hi, False)
    return o, final_state


BACKEND = Backend(name="chunked", supports=supports, run=by_rows(_run_dense), priority=10, min_length=2)


class _ChunkedDiscretized(torch.autograd.Function):
    # `register_autograd` of the operators would do as well, but costs 80 us a call more than this class.

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
        o, final_state, entry_states = _forward_op(dt, A, lower_end, q, write, v, initial_state, lo, hi, True)
        ctx.save_for_backward(dt, A, lower_end, q, write, v, entry_states)
        ctx.range = lo, hi
        ctx.initial_dtype = None if initial_state is None else initial_state.dtype
        ctx.set_materialize_grads(False)
        return o, final_state

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        dt, A, lower_end, q, write, v, entry_states = ctx.saved_tensors
        ddt, dA, dlower_end, *gradients, dinitial = _backward_op(
            dt, A, lower_end, q, write, v, entry_states, *ctx.range, *grad_outputs
        )
        return (
            *(ddt, dA, None if lower_end is None else dlower_end, *gradients),
            *(None if ctx.initial_dtype is None else dinitial.to(ctx.initial_dtype), None, None),
        )


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
) -> tuple[Tensor, Tensor, Tensor]:
    """H_t = (lo + (hi - lo) exp(dt_t A)) * H_{t-1} + write_t v_t^T, o_t = H_t^T q_t; shapes as in `linear_recurrence`.

    `lower_end` [H, V], where there is one, takes the place of lo.

    Returns:
        o [B, T, H, V] in the dtype of v; the final state [B, H, K, V]; the states before each tile along T, which the
        backward starts from: [tiles, B, H, K, V], or [0, B, H, K, V] without `save`.
    """
    o, final_state, entry_states = _empty_results(dt, A, lower_end, q, write, v, initial_state, lo, hi, save)
    tiling = _Tiling.of(q, v)
    range_ = _Range.of(lo, hi, lower_end, final_state.dtype)
    tile_of = cache(lambda rows, steps: _Tile(rows, steps, final_state, range_, backward=False))
    log2_decay = _log2_decay(A, final_state.dtype)
    for rows in tiling.row_slices():
        state = None if initial_state is None else initial_state[rows]
        for index, times in enumerate(tiling.time_slices()):
            tile = tile_of(rows.stop - rows.start, times.stop - times.start)
            for whole, part in ((dt, tile.dt), (q, tile.q), (write, tile.write), (v, tile.v)):
                _load(whole, part, rows, times)
            tile.compute_states(state, log2_decay)
            if save:
                entry_states[index, rows] = tile.h[0]
            _store(_sum_over_keys(tile.q, tile.h[1:], out=tile.value_sums, scratch=tile.gate), o, rows, times)
            state = tile.h[-1]
        assert state is not None  # there is at least one tile
        final_state[rows] = state
    return o, final_state, entry_states


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
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(*(x for x in (dt, A, lower_end, q, write, v, initial_state) if x is not None))
    b, _, h, key_dim = q.shape
    state_shape = (b, h, key_dim, v.shape[-1])
    tiles = _Tiling.of(q, v).tiles_along_time if save else 0
    return v.new_empty(v.shape), v.new_empty(state_shape, dtype=dtype), v.new_empty((tiles, *state_shape), dtype=dtype)


def _backward(
    dt: Tensor,
    A: Tensor,
    lower_end: Tensor | None,
    q: Tensor,
    write: Tensor,
    v: Tensor,
    entry_states: Tensor,
    lo: float,
    hi: float,
    do: Tensor | None,
    dfinal_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of dt, A, lower_end, q, write, v and the initial state from those of o and the final state.

    A gradient of None is zero; that of a missing lower_end is empty.

    With dH_t the gradient of the state after step t, elementwise on [K, V] but for the outer product:

        dH_t = q_t do_t^T + decay_{t+1} dH_{t+1},        d(dt_t A) = (hi - lo) exp(dt_t A) H_{t-1} dH_t,

    and that of the lower end of a channel is the sum of (1 - exp(dt_t A)) H_{t-1} dH_t over time and keys.
    """
    ddt, dA, dlower_end, dq, dwrite, dv, dinitial = _empty_gradients(dt, A, lower_end, q, write, v, entry_states)
    if do is None:
        do = v.new_zeros(1).expand(v.shape)
    tiling = _Tiling.of(q, v)
    range_ = _Range.of(lo, hi, lower_end, dinitial.dtype)
    tile_of = cache(lambda rows, steps: _Tile(rows, steps, dinitial, range_, backward=True))
    log2_decay = _log2_decay(A, dinitial.dtype)
    # The factor hi - lo costs least where there is no time: on A and on the sum for dA.
    scaled_A = A.to(dinitial.dtype).contiguous() * range_.width
    dA_sum = torch.zeros_like(scaled_A)
    dlower_end_sum = torch.zeros_like(dinitial[0, :, 0])
    for rows in tiling.row_slices():
        # What comes back from the steps after a tile, and in the end the gradient of the initial state.
        dstate = dinitial[rows]
        dstate.zero_() if dfinal_state is None else dstate.copy_(dfinal_state[rows])
        for index, times in reversed(list(enumerate(tiling.time_slices()))):
            tile = tile_of(rows.stop - rows.start, times.stop - times.start)
            for whole, part in ((dt, tile.dt), (q, tile.q), (write, tile.write), (v, tile.v), (do, tile.do)):
                _load(whole, part, rows, times)
            tile.compute_states(entry_states[index, rows], log2_decay)
            tile.compute_state_gradients(dstate)
            _store(_sum_over_values(tile.do, tile.h[1:], out=tile.key_sums), dq, rows, times)
            _store(_sum_over_values(tile.v, tile.dh, out=tile.key_sums), dwrite, rows, times)
            # From here on nobody needs the states themselves, and their memory is free.
            if lower_end is None:
                gradient = tile.gate.mul_(tile.h[:-1]).mul_(tile.dh)  # of dt A, up to the factor hi - lo
            else:
                ddecay = torch.mul(tile.h[:-1], tile.dh, out=tile.decay)
                gradient = tile.gate.mul_(ddecay)
                dlower_end_sum += ddecay.sub_(gradient).sum((0, 1, 3))
            scratch = tile.h[1:]
            _store(_sum_over_keys(tile.write, tile.dh, out=tile.value_sums, scratch=scratch), dv, rows, times)
            torch.sum(torch.mul(gradient, scaled_A, out=scratch), -2, out=tile.value_sums)
            _store(tile.value_sums, ddt, rows, times)
            dA_sum += gradient.mul_(tile.dt.unsqueeze(-2)).sum((0, 1))
    dA.copy_(dA_sum.mul_(range_.width))
    if lower_end is not None:
        dlower_end.copy_(dlower_end_sum)
    return ddt, dA, dlower_end, dq, dwrite, dv, dinitial


def _empty_gradients(
    dt: Tensor,
    A: Tensor,
    lower_end: Tensor | None,
    q: Tensor,
    write: Tensor,
    v: Tensor,
    entry_states: Tensor,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    ddt, dA, dq, dwrite, dv = (x.new_empty(x.shape) for x in (dt, A, q, write, v))
    dlower_end = A.new_empty(0) if lower_end is None else lower_end.new_empty(lower_end.shape)
    return ddt, dA, dlower_end, dq, dwrite, dv, entry_states.new_empty(entry_states.shape[1:])


def _log2_decay(A: Tensor, dtype: torch.dtype) -> Tensor:
    """A / ln 2. exp(dt A) is computed as exp2(dt A / ln 2), as `exp2` takes a third of the time of `exp` on a CPU."""
    return A.to(dtype).contiguous() * math.log2(math.e)


@dataclass(frozen=True)
class _Range:
    """What takes a gate to a decay, lo + width gate: numbers, or with ends of their own for channels [H, 1, V]."""

    lo: float | Tensor
    width: float | Tensor

    @classmethod
    def of(cls, lo: float, hi: float, lower_end: Tensor | None, dtype: torch.dtype) -> _Range:
        if lower_end is None:
            return cls(lo, hi - lo)
        lower = lower_end.to(dtype).unsqueeze(1)
        return cls(lower, hi - lower)

    @property
    def is_unit(self) -> bool:
        """Whether the gate is the decay."""
        return not isinstance(self.lo, Tensor) and (self.lo, self.width) == (0, 1)

    def widen(self, gate: Tensor, out: Tensor) -> None:
        if isinstance(self.lo, Tensor):
            assert isinstance(self.width, Tensor)
            torch.addcmul(self.lo, gate, self.width, out=out)
        else:
            assert not isinstance(self.width, Tensor)
            torch.add(gate.new_tensor(self.lo), gate, alpha=self.width, out=out)


@dataclass(frozen=True)
class _Tiling:
    """How [B, T] is cut into tiles of at most `rows` sequences by `steps` steps."""

    batch: int
    length: int
    rows: int
    steps: int

    @classmethod
    def of(cls, q: Tensor, v: Tensor) -> _Tiling:
        batch, length, heads, key_dim = q.shape
        state_size = heads * key_dim * v.shape[-1]
        rows = _even_part(batch, max(1, _STEP_SIZE // state_size))
        steps = _even_part(length, max(_MIN_STEPS, _TILE_SIZE // (rows * state_size)))
        return cls(batch, length, rows, steps)

    @property
    def tiles_along_time(self) -> int:
        return -(-self.length // self.steps)

    def row_slices(self) -> list[slice]:
        return _slices(self.batch, self.rows)

    def time_slices(self) -> list[slice]:
        return _slices(self.length, self.steps)


def _even_part(total: int, limit: int) -> int:
    """The size of the parts when `total` is cut into as few nearly equal parts as `limit` allows."""
    parts = -(-total // limit)
    return -(-total // parts)


def _slices(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


class _Memory(threading.local):
    """One piece of memory for each thread, name and dtype, as large as was ever asked for.

    On a CPU it outlives the call: the allocator may hand blocks of this size back to the system, and touching new ones
    in every call takes up to three times as long as a small scan itself. In float32 it amounts to 10 MiB where K is 16,
    and to more than 25 MiB only where the states of one step exceed 2**16 elements. GPUs have caching allocators.
    """

    def __init__(self) -> None:
        self.kept: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """An uninitialised tensor of the dtype and device of `like`; valid until `name` is taken again."""
        if like.device.type != "cpu":
            return like.new_empty(shape)
        size = math.prod(shape)
        memory = self.kept.get((name, like.dtype))
        if memory is None or memory.numel() < size:
            # A tensor made in inference mode could not be written outside of it.
            with torch.inference_mode(False):
                memory = self.kept[name, like.dtype] = torch.empty(size, dtype=like.dtype)
        return memory[:size].view(shape)


_memory = _Memory()


class _Tile:
    """The tensors of R sequences by C steps. Time comes first, so that each step is one piece of memory.

    Attributes:
        h: the states [C + 1, R, H, K, V], beginning with the one before the first step.
        gate: exp(dt A), [C, R, H, K, V].
        decay: the gate widened to the range, [C, R, H, K, V]; where the two needn't be told apart, it is `gate` itself.
        dh: the gradient of h[1:], [C, R, H, K, V]; in the backward only.
        dt, v, do: [C, R, H, V]; value_sums: room for a sum over K, of the same shape.
        q, write: [C, R, H, K]; key_sums: room for a sum over V, of the same shape.
    """

    def __init__(self, rows: int, steps: int, like: Tensor, range_: _Range, *, backward: bool) -> None:
        """Takes the memory. `like` is a tensor [..., H, K, V] of the dtype and device of the states."""
        state_shape = like.shape[-3:]
        heads, key_dim, value_dim = state_shape

        def take(name: str, *shape: int) -> Tensor:
            return _memory.take(name, shape, like)

        self.range = range_
        self.h = take("h", steps + 1, rows, *state_shape)
        self.gate = take("gate", steps, rows, *state_shape)
        separate = backward and not range_.is_unit
        self.decay = take("decay", steps, rows, *state_shape) if separate else self.gate
        self.dt, self.v, self.value_sums = (take(x, steps, rows, heads, value_dim) for x in ("dt", "v", "value_sums"))
        self.q, self.write = (take(x, steps, rows, heads, key_dim) for x in ("q", "write"))
        self._h_steps = self.h.unbind()
        self._decay_steps = self.decay.unbind()
        if backward:
            self.dh = take("dh", steps, rows, *state_shape)
            self.do = take("do", steps, rows, heads, value_dim)
            self.key_sums = take("key_sums", steps, rows, heads, key_dim)
            self._dh_steps = self.dh.unbind()

    def compute_states(self, state: Tensor | None, log2_decay: Tensor) -> None:
        """Fills `h`, `gate` and `decay`, beginning with the state [R, H, K, V] before the first step (None is zero)."""
        self.h[0].zero_() if state is None else self.h[0].copy_(state)
        torch.mul(self.dt.unsqueeze(-2), log2_decay, out=self.gate).exp2_()
        if not self.range.is_unit:
            self.range.widen(self.gate, self.decay)
        torch.mul(self.write.unsqueeze(-1), self.v.unsqueeze(-2), out=self.h[1:])
        for decay, before, after in zip(self._decay_steps, self._h_steps, self._h_steps[1:], strict=False):
            after.addcmul_(decay, before)

    def compute_state_gradients(self, dstate: Tensor) -> None:
        """Fills `dh`. The gradient of h[-1] from later steps, `dstate` [R, H, K, V], is replaced by that of h[0]."""
        torch.mul(self.q.unsqueeze(-1), self.do.unsqueeze(-2), out=self.dh)
        self._dh_steps[-1].add_(dstate)
        for t in range(len(self._dh_steps) - 1, 0, -1):
            self._dh_steps[t - 1].addcmul_(self._decay_steps[t], self._dh_steps[t])
        torch.mul(self._decay_steps[0], self._dh_steps[0], out=dstate)


def _load(whole: Tensor, part: Tensor, rows: slice, times: slice) -> None:
    """Copies a tile's part of a tensor [B, T, ...] to a tensor [C, R, ...] of the tile."""
    part.copy_(whole[rows, times].transpose(0, 1))


def _store(part: Tensor, whole: Tensor, rows: slice, times: slice) -> None:
    """The reverse of `_load`."""
    whole[rows, times].copy_(part.transpose(0, 1))


def _sum_over_keys(weights: Tensor, states: Tensor, *, out: Tensor, scratch: Tensor) -> Tensor:
    """out [..., V] = the sum over K of weights [..., K] times states [..., K, V]; may write `scratch` [..., K, V]."""
    key_dim, value_dim = states.shape[-2:]
    if key_dim * value_dim < _SMALL_BMM:
        return torch.sum(torch.mul(weights.unsqueeze(-1), states, out=scratch), -2, out=out)
    torch.bmm(weights.view(-1, 1, key_dim), states.view(-1, key_dim, value_dim), out=out.view(-1, 1, value_dim))
    return out


def _sum_over_values(weights: Tensor, states: Tensor, *, out: Tensor) -> Tensor:
    """out [..., K] = the sum over V of weights [..., V] times states [..., K, V]."""
    key_dim, value_dim = states.shape[-2:]
    # A row times the transposed matrix takes a tenth of the time of the matrix times a column.
    torch.bmm(weights.view(-1, 1, value_dim), states.view(-1, key_dim, value_dim).mT, out=out.view(-1, 1, key_dim))
    return out


_forward_op = register_operator("chunked_discretized", _forward, _empty_results)
_backward_op = register_operator("chunked_discretized_backward", _backward, _empty_gradients)
