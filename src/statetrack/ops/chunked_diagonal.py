"""Signed linear attention with decays for each head or each key channel, chunk by chunk, in matrix products.

For a chunk of c tokens that starts from the state `H_0`, with `D_ij` the product of the decays after token j up to
token i (a number for each head, or one for each key channel),

    o_i = H_0^T (D_i0 * q_i) + sum_{j <= i} S_ij v_j,        S_ij = sum over K of q_i * D_ij * k_j,
    H_c = D_c0 * H_0 + sum_j (D_cj * k_j) v_j^T.

With one decay a head, S is (Q K^T) * D. With one for each channel, [c, c, K] products would be needed, and the usual
way round, D_ij = D_i0 / D_j0, divides by decays that may be 0. Here the tokens are merged in pairs, the pairs in fours,
and so on. Between an earlier half ending at token m and the later half of the same block D_ij = D_im D_mj, so that its
part of S is one matrix product of queries and keys that have been scaled as far as m; multiplying them by the other
half's total decay then takes them as far as the ends of the block, and at the last of the log2(c) levels to those of
the chunk.

Decays are only ever multiplied, so they may be negative or 0, in the hand-written backward too.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from statetrack.ops.backend import Backend, differentiable_once, distinct, register_operator, wants_gradient
from statetrack.ops.chunking import Cut, decay_gradient, decay_products, rows_in_cache
from statetrack.ops.packing import by_rows
from statetrack.transition import Diagonal, Transition, accumulation_dtype

# Longer chunks do more arithmetic, shorter ones more calls with smaller matrices. Measured.
_CPU_CHUNK = 32
_GPU_CHUNK = 64


def supports(transition: Transition) -> str | None:
    return None if isinstance(transition, Diagonal) else "chunked_diagonal serves Diagonal transitions"


def _run_dense(
    transition: Transition, q: Tensor, v: Tensor, write: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    assert isinstance(transition, Diagonal)
    assert write is not None
    inputs = (q, write, v, transition.decay, initial_state)
    if wants_gradient(*inputs):
        return _ChunkedDiagonal.apply(*distinct(inputs))
    o, final_state, _ = _forward_op(*inputs, False)
    return o, final_state


BACKEND = Backend(name="chunked", supports=supports, run=by_rows(_run_dense), priority=10, min_length=2)


class _ChunkedDiagonal(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, initial_state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        o, final_state, tape = _forward_op(q, k, v, decay, initial_state, True)
        ctx.save_for_backward(q, k, v, decay, *tape)
        ctx.initial_dtype = None if initial_state is None else initial_state.dtype
        return o, final_state

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        d_o, d_state = grad_outputs
        q, k, v, decay, *tape = ctx.saved_tensors
        *gradients, d_initial = _backward_op(q, k, v, decay, tape, d_o, d_state)
        return *gradients, None if ctx.initial_dtype is None else d_initial.to(ctx.initial_dtype)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, initial_state: Tensor | None, save: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Returns o, the final state, and a tape for `_backward`, which is empty unless `save`."""
    o, states, tape = _empty_results(q, k, v, decay, initial_state, save)
    plan = _Plan(k, v, decay, states.dtype)
    if initial_state is None:
        states.zero_()
    else:
        states.copy_(initial_state)
    records = _records(tape) if save else [None] * plan.count
    pieces = zip(*(plan.tokens(x) for x in (q, k, v, decay, o)), plan.states(states), records, strict=True)
    with torch.autocast(k.device.type, enabled=False):
        for piece in pieces:
            _forward_chunk(plan, *piece)
    return o, states, tape


def _empty_results(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, initial_state: Tensor | None, save: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    dtype = accumulation_dtype(*(x for x in (q, k, v, decay, initial_state) if x is not None))
    b, _, h, value_dim = v.shape
    states = v.new_empty(b, h, k.shape[-1], value_dim, dtype=dtype)
    tape = _Plan(k, v, decay, dtype).empty_tape() if save else []
    return v.new_empty(v.shape), states, tape


def _backward(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, tape: list[Tensor], d_o: Tensor, d_state: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k, v, decay and the initial state; `d_x` is that of x."""
    d_q, d_k, d_v, d_decay, d_states = _empty_gradients(q, k, v, decay, tape, d_o, d_state)
    d_states.copy_(d_state)
    plan = _Plan(k, v, decay, tape[0].dtype)
    pieces = zip(
        *(plan.tokens(x) for x in (q, k, v, decay, d_o, d_q, d_k, d_v, d_decay)),
        *(plan.states(d_states), _records(tape)),
        strict=True,
    )
    with torch.autocast(k.device.type, enabled=False):
        for piece in reversed(list(pieces)):
            _backward_chunk(plan, *piece)
    return d_q, d_k, d_v, d_decay, d_states


def _empty_gradients(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, tape: list[Tensor], d_o: Tensor, d_state: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    d_q, d_k, d_v, d_decay, d_states = (x.new_empty(x.shape) for x in (q, k, v, decay, d_state))
    return d_q, d_k, d_v, d_decay, d_states


def _forward_chunk(
    plan: _Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    o: Tensor,
    state: Tensor,
    record: tuple[Tensor, Tensor] | None,
) -> None:
    """Writes the outputs to `o`, moves `state` to the chunk's end, and fills the record for the backward."""
    chunk = plan.chunk(q)
    chunk.load(q, k, v)
    chunk.by_token(chunk.decay).copy_(decay)
    products, start = record or (chunk.products, state)
    if record is not None:
        start.copy_(state)
    scores = chunk.decays.forward(chunk, products)
    out = torch.bmm(chunk.q_in, start, out=chunk.out)
    out.baddbmm_(scores, chunk.v)
    o.copy_(chunk.by_token(out))
    state.mul_(chunk.decays.across).baddbmm_(chunk.k_out.mT, chunk.v)


def _backward_chunk(
    plan: _Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    d_o: Tensor,
    d_q: Tensor,
    d_k: Tensor,
    d_v: Tensor,
    d_decay: Tensor,
    d_state: Tensor,
    record: tuple[Tensor, Tensor],
) -> None:
    """Writes the gradients, and moves `d_state` from the chunk's end to its start."""
    chunk = plan.chunk(q)
    chunk.load(q, k, v)
    chunk.by_token(chunk.decay).copy_(decay)
    chunk.by_token(chunk.d_o).copy_(d_o)
    products, start = record
    scores = chunk.decays.again(chunk, products)
    out = torch.bmm(chunk.k_out, d_state, out=chunk.out)
    out.baddbmm_(scores.mT, chunk.d_o)
    d_v.copy_(chunk.by_token(out))
    torch.bmm(chunk.d_o, start.mT, out=chunk.d_q)
    torch.bmm(chunk.v, d_state.mT, out=chunk.d_k)
    torch.bmm(chunk.d_o, chunk.v.mT, out=chunk.d_scores)
    chunk.decays.backward(chunk, products, start, d_state)
    d_q.copy_(chunk.by_token(chunk.d_q))
    d_k.copy_(chunk.by_token(chunk.d_k))
    d_decay.copy_(chunk.by_token(chunk.d_decay))
    d_state.mul_(chunk.decays.across).baddbmm_(chunk.q_in.mT, chunk.d_o)


def _records(tape: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(tape[0::2], tape[1::2], strict=True))


class _Plan(Cut):
    """The cut of a batch, and the buffers for its pieces."""

    def __init__(self, k: Tensor, v: Tensor, decay: Tensor, dtype: torch.dtype) -> None:
        batch, length, self.heads, self.key_dim = k.shape
        self.value_dim = v.shape[-1]
        self.by_channel = decay.ndim == 4
        self.options: dict[str, Any] = {"dtype": dtype, "device": k.device}
        cpu = k.device.type == "cpu"
        tokens = _CPU_CHUNK if cpu else _GPU_CHUNK
        largest = max(self.key_dim * self.value_dim, tokens * max(tokens, self.key_dim, self.value_dim))
        super().__init__(batch, length, rows_in_cache(batch, self.heads, largest) if cpu else batch, tokens)
        self._chunks: dict[tuple[int, int], _Chunk] = {}

    def chunk(self, q: Tensor) -> _Chunk:
        """The buffers for a piece `q`; pieces of one size share them."""
        size = (q.shape[0], q.shape[2])
        if size not in self._chunks:
            self._chunks[size] = _Chunk(self, *size)
        return self._chunks[size]

    def padded(self, tokens: int) -> int:
        """The rows of a chunk's buffers: the tokens, or the next power of two where they are merged by halves."""
        return 1 << (tokens - 1).bit_length() if self.by_channel else tokens

    def empty_tape(self) -> list[Tensor]:
        """For each chunk two tensors for its backward: the scores (before the decays if each head has one) and H_0.

        Many small ones, because a C library gives large allocations back to the system and pays for fresh pages again.
        """
        tape = []
        for rows in self.row_counts:
            for tokens in self.token_counts:
                h, c = rows * self.heads, self.padded(tokens)
                tape += [torch.empty(shape, **self.options) for shape in ((h, c, c), (h, self.key_dim, self.value_dim))]
        return tape


class _Chunk:
    """Buffers for c tokens in h = b H heads. Tokens that only fill it up write nothing and leave the state alone.

    Attributes:
        q, k: [h, c, K]; q_in, k_out: as they read the state at the chunk's start, and write the one at its end.
        v: [h, c, V]; decay: [h, c] or [h, c, K].
        d_o, d_q, d_k, d_decay: gradients; d_q and d_k first hold those of q_in and k_out.
        scores: [h, c, c]; products: those that the record of a chunk has where there is a backward.
    """

    def __init__(self, plan: _Plan, rows: int, tokens: int) -> None:
        self.rows, self.tokens = rows, tokens
        heads, c = rows * plan.heads, plan.padded(tokens)
        new = partial(torch.zeros if tokens < c else torch.empty, **plan.options)
        self.q, self.k, self.q_in, self.k_out, self.d_q, self.d_k = (new(heads, c, plan.key_dim) for _ in range(6))
        self.v, self.d_o, self.out = (new(heads, c, plan.value_dim) for _ in range(3))
        self.decay, self.d_decay = (new(heads, c, plan.key_dim) if plan.by_channel else new(heads, c) for _ in range(2))
        self.decay[:, tokens:] = 1
        self.products, self.d_scores = new(heads, c, c), new(heads, c, c)
        self.decays = _ChannelDecays(self) if plan.by_channel else _HeadDecays(self)

    def by_token(self, x: Tensor) -> Tensor:
        """[b H, c, ...] as [b, H, c, ...], without the tokens that fill up."""
        return x.view(self.rows, -1, *x.shape[1:])[:, :, : self.tokens]

    def load(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        for buffer, x in ((self.q, q), (self.k, k), (self.v, v)):
            self.by_token(buffer).copy_(x)


class _HeadDecays:
    """One decay for each head: the scores are (q k^T) * D."""

    across: Tensor
    """The product of the chunk's decays, [h, 1, 1]."""

    def __init__(self, chunk: _Chunk) -> None:
        self.scores = torch.empty_like(chunk.products)

    def forward(self, chunk: _Chunk, products: Tensor) -> Tensor:
        """Sets q_in, k_out and `products` = q k^T, and returns the scores."""
        torch.bmm(chunk.q, chunk.k.mT, out=products).tril_()
        return self.again(chunk, products)

    def again(self, chunk: _Chunk, products: Tensor) -> Tensor:
        """The same from products that are known."""
        self.decay_products = decay_products(chunk.decay)
        self.within = self.decay_products[:, 1:, 1:]
        self.into = self.decay_products[:, 1:, :1]
        self.out_of = self.decay_products[:, -1, 1:].unsqueeze(2)
        self.across = self.decay_products[:, -1:, :1]
        torch.mul(chunk.q, self.into, out=chunk.q_in)
        torch.mul(chunk.k, self.out_of, out=chunk.k_out)
        return torch.mul(products, self.within, out=self.scores)

    def backward(self, chunk: _Chunk, products: Tensor, start: Tensor, d_state: Tensor) -> None:
        """From the gradients of q_in, k_out and the scores sets those of q, k and decay."""
        d_q, d_k, d_scores = chunk.d_q, chunk.d_k, chunk.d_scores
        d_decay_products = torch.zeros_like(self.decay_products)
        torch.mul(d_scores, products, out=d_decay_products[:, 1:, 1:])
        d_decay_products[:, 1:, 0] = (d_q * chunk.q).sum(2)
        d_decay_products[:, -1, 1:] += (d_k * chunk.k).sum(2)
        d_decay_products[:, -1, 0] += (d_state * start).sum((1, 2))
        chunk.d_decay = decay_gradient(self.decay_products, d_decay_products)
        d_products = d_scores.mul_(self.within).tril_()
        d_q.mul_(self.into).baddbmm_(d_products, chunk.k)
        d_k.mul_(self.out_of).baddbmm_(d_products.mT, chunk.q)


class _ChannelDecays:
    """One decay for each key channel: halves of blocks of 2, 4, 8, ... tokens are merged, level by level."""

    across: Tensor
    """The product of the chunk's decays, [h, K, 1]."""

    def __init__(self, chunk: _Chunk) -> None:
        h, c, _ = chunk.q.shape
        sizes = [1 << level for level in range(c.bit_length() - 1)]
        self.levels = [_Level(chunk, size) for size in sizes]
        self.diagonal = chunk.products.new_empty(h, c)

    def forward(self, chunk: _Chunk, products: Tensor) -> Tensor:
        """Sets q_in, k_out and `products`, which are the scores and returned."""
        products.zero_()
        torch.sum(chunk.q * chunk.k, 2, out=products.diagonal(dim1=1, dim2=2))
        self._merge(chunk, products)
        return products

    def again(self, chunk: _Chunk, products: Tensor) -> Tensor:
        """The same from products that are known."""
        self._merge(chunk, None)
        return products

    def backward(self, chunk: _Chunk, products: Tensor, start: Tensor, d_state: Tensor) -> None:
        """From the gradients of q_in, k_out and the scores sets those of q, k and decay."""
        d_total = (d_state * start).sum(2)
        for level in reversed(self.levels):
            d_total = level.backward(chunk.d_scores, d_total)
        d_q, d_k = chunk.d_q, chunk.d_k
        torch.mul(d_q, chunk.q, out=chunk.d_decay).add_(d_total.view_as(d_q))
        diagonal = self.diagonal.copy_(chunk.d_scores.diagonal(dim1=1, dim2=2)).unsqueeze(2)
        d_q.mul_(chunk.decay).addcmul_(diagonal, chunk.k)
        d_k.addcmul_(diagonal, chunk.q)

    def _merge(self, chunk: _Chunk, scores: Tensor | None) -> None:
        torch.mul(chunk.q, chunk.decay, out=chunk.q_in)
        chunk.k_out.copy_(chunk.k)
        total = chunk.decay
        for level in self.levels:
            total = level.merge(total, scores)
        self.across = total.view(chunk.q.shape[0], -1, 1)


class _Level:
    """Merges blocks of s tokens in pairs, n pairs in all heads together."""

    def __init__(self, chunk: _Chunk, size: int) -> None:
        self.heads, self.size = chunk.q.shape[0], size

        def halves(x: Tensor) -> Tensor:
            return x.view(-1, 2, size, x.shape[-1])

        self.later_q, self.earlier_k = halves(chunk.q_in)[:, 1], halves(chunk.k_out)[:, 0]
        self.d_later_q, self.d_earlier_k = halves(chunk.d_q)[:, 1], halves(chunk.d_k)[:, 0]
        # As they are before the merging scales them, side by side: for the products here and in the backward.
        self.q, self.k, self.d = (torch.empty_like(self.later_q.contiguous()) for _ in range(3))
        self.block = self.q.new_empty(len(self.q), size, size)

    def merge(self, total: Tensor, scores: Tensor | None) -> Tensor:
        """Sets the scores of later with earlier halves, and returns the total decay [n, K] of the merged blocks."""
        self.total = total.view(len(self.q), 2, 1, -1)
        self.q.copy_(self.later_q)
        self.k.copy_(self.earlier_k)
        if scores is not None:
            if self.size == 1:  # where `bmm` is slower
                torch.sum(self.q * self.k, 2, keepdim=True, out=self.block)
            else:
                torch.bmm(self.q, self.k.mT, out=self.block)
            self._blocks(scores).copy_(self.block.view(self.heads, -1, self.size, self.size))
        torch.mul(self.q, self.total[:, 0], out=self.later_q)
        torch.mul(self.k, self.total[:, 1], out=self.earlier_k)
        return self.total[:, 0] * self.total[:, 1]

    def backward(self, d_scores: Tensor, d_total: Tensor) -> Tensor:
        """Takes the gradients of the scaled halves to those of the halves; returns that of the two total decays."""
        d_total = d_total.view(len(self.q), 1, -1)
        d_later_total = torch.addcmul((self.d_earlier_k * self.k).sum(1, keepdim=True), d_total, self.total[:, 0])
        d_earlier_total = torch.addcmul((self.d_later_q * self.q).sum(1, keepdim=True), d_total, self.total[:, 1])
        self.block.view(self.heads, -1, self.size, self.size).copy_(self._blocks(d_scores))
        self._multiply(self.block, self.k)
        torch.addcmul(self.d, self.d_later_q, self.total[:, 0], out=self.d_later_q)
        self._multiply(self.block.mT, self.q)
        torch.addcmul(self.d, self.d_earlier_k, self.total[:, 1], out=self.d_earlier_k)
        return torch.stack([d_earlier_total, d_later_total], 1)

    def _multiply(self, block: Tensor, x: Tensor) -> None:
        """d = block x. For the smallest blocks `bmm` is several times slower than sums of multiples."""
        if self.size > 2:
            torch.bmm(block, x, out=self.d)
            return
        torch.mul(block[:, :, :1], x[:, :1], out=self.d)
        if self.size == 2:
            self.d.addcmul_(block[:, :, 1:], x[:, 1:])

    def _blocks(self, scores: Tensor) -> Tensor:
        """Of scores [h, c, c] those of later with earlier halves, a view [h, n / h, s, s]."""
        c, s = scores.shape[-1], self.size
        pairs = scores.view(self.heads, c // (2 * s), 2 * s, c // (2 * s), 2 * s).diagonal(dim1=1, dim2=3)
        return pairs[:, s:, :s].permute(0, 3, 1, 2)


_forward_op = register_operator("chunked_diagonal", _forward, _empty_results)
_backward_op = register_operator("chunked_diagonal_backward", _backward, _empty_gradients)
