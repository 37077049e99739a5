"""Products of generalized Householder matrices, chunk by chunk: matrix products in place of a loop over tokens.

Every factor of every token is a micro-step `H <- H + k u^T` with `u = beta (v - H^T k)`, and a token's decay acts
before the first of its N micro-steps. For a chunk of m micro-steps that starts from the state `H_0`, and with `D_ij`
the product of the decays after micro-step j up to micro-step i, the rows r_i of

    r_i = v_i - D_i0 H_0^T k_i - sum_{j < i} D_ij (k_i . k_j) u_j,        u_j = beta_j r_j

solve a unit triangular system; outputs and the next state follow by matrix products (section 3 of arXiv 2406.06484,
there without decay and with N = 1):

    o_t = D_t0 H_0^T q_t + sum_{j up to token t} D_tj (q_t . k_j) u_j,        H_m = D_m0 H_0 + sum_j D_mj k_j u_j^T.

The system is solved by substitution. Inverting it by a sum of powers is exact on paper too, but the powers grow
exponentially where a key repeats with beta = 2, the very reflections that track parity. Decays are multiplied, never
divided by and never taken logarithms of, so they may be negative or 0. The backward is written by hand; it visits the
chunks from the last to the first, with what the forward has put on its tape.
"""

from __future__ import annotations

from functools import partial
from math import ceil
from typing import Any

import torch
from torch import Tensor

from statetrack.ops.backend import Backend, differentiable_once, distinct, register_operator, wants_gradient
from statetrack.ops.chunking import Cut, decay_gradient, decay_products, rows_in_cache
from statetrack.ops.packing import by_rows
from statetrack.transition import SHORTEST_KEY, Householder, Transition, accumulation_dtype

# Up to so many rows (sequences times heads) with states of up to so many numbers a chunk is long even on a CPU.
# Measured: one head, K = V = 5, N = 4, a sequence of 65,536 tokens: 1.25 s with 16 micro-steps a chunk, 0.36 s with 64.
_FEW_ROWS, _SMALL_STATE = 4, 256


def supports(transition: Transition) -> str | None:
    if not isinstance(transition, Householder):
        return "chunked_householder serves Householder transitions"
    if transition.decay is not None and transition.decay.ndim == 4:
        return "chunked_householder serves one decay for each head, [B, T, H], not one for each channel"
    return None


def _run_dense(
    transition: Transition, q: Tensor, v: Tensor, write: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    assert isinstance(transition, Householder)
    inputs = (q, transition.k, v, transition.beta, transition.decay, initial_state)
    if wants_gradient(*inputs):
        return _ChunkedHouseholder.apply(*distinct(inputs), transition.normalize)
    o, final_state, _ = _forward_op(*inputs, transition.normalize, False)
    return o, final_state


BACKEND = Backend(name="chunked", supports=supports, run=by_rows(_run_dense), priority=10, min_length=2)


class _ChunkedHouseholder(torch.autograd.Function):
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
        ctx.normalize = normalize
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
    o, states, tape = _empty_results(q, k, v, beta, decay, initial_state, normalize, save)
    plan = _Plan(k, v.shape[-1], states.dtype, normalize)
    if initial_state is None:
        states.zero_()
    else:
        states.copy_(initial_state)
    records = _records(tape) if save else [None] * plan.count
    pieces = zip(
        *(plan.tokens(q), plan.steps(k), plan.steps(v), plan.steps(beta), plan.tokens(decay), plan.tokens(o)),
        *(plan.states(states), records),
        strict=True,
    )
    with torch.autocast(k.device.type, enabled=False):
        for piece in pieces:
            _forward_chunk(plan, *piece)
    return o, states, tape


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
    dtype = accumulation_dtype(*(x for x in (q, k, v, beta, decay, initial_state) if x is not None))
    b, t, _, h, value_dim = v.shape
    states = v.new_empty(b, h, k.shape[-1], value_dim, dtype=dtype)
    tape = _Plan(k, value_dim, dtype, normalize).empty_tape() if save else []
    return v.new_empty(b, t, h, value_dim), states, tape


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
    d_q, d_k, d_v, d_beta, d_decay, d_states = _empty_gradients(q, k, beta, decay, normalize, tape, d_o, d_state)
    d_states.copy_(d_state)
    plan = _Plan(k, d_o.shape[-1], tape[0].dtype, normalize)
    pieces = zip(
        *(plan.tokens(q), plan.steps(k), plan.steps(beta), plan.tokens(decay), plan.tokens(d_o)),
        *(plan.tokens(d_q), plan.steps(d_k), plan.steps(d_v), plan.steps(d_beta)),
        *(plan.tokens(None if decay is None else d_decay), plan.states(d_states), _records(tape)),
        strict=True,
    )
    with torch.autocast(k.device.type, enabled=False):
        for piece in reversed(list(pieces)):
            _backward_chunk(plan, *piece)
    return d_q, d_k, d_v, d_beta, d_decay, d_states


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
    d_v = d_o.new_empty(*k.shape[:-1], d_o.shape[-1])
    d_decay = d_state.new_empty(0) if decay is None else decay.new_empty(decay.shape)
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        d_v,
        beta.new_empty(beta.shape),
        d_decay,
        d_state.new_empty(d_state.shape),
    )


def _forward_chunk(
    plan: _Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    o: Tensor,
    state: Tensor,
    record: tuple[Tensor, Tensor, Tensor] | None,
) -> None:
    """Writes the outputs to `o`, moves `state` to the chunk's end, and fills the record for the backward."""
    chunk = plan.chunk(q)
    m = chunk.steps
    chunk.load(q, k, beta, decay)
    gram, r, start = record or (chunk.gram, chunk.u, state)
    if record is not None:
        start.copy_(state)
    torch.bmm(chunk.kq, chunk.k.mT, out=gram)
    gram[:, m:].mul_(chunk.mask[m:])
    chunk.set_system(gram)

    error = chunk.error
    chunk.by_step(error).copy_(v)
    error.baddbmm_(chunk.kq_in[:, :m], start, alpha=-1)
    chunk.solve(error, upper=False, out=r)
    u = torch.mul(r, chunk.beta_scaled, out=chunk.u)
    out = torch.bmm(chunk.kq_in[:, m:], start, out=chunk.out)
    out.baddbmm_(chunk.weights[:, m:], u)
    o.copy_(chunk.by_token(out))
    if chunk.decays is not None:
        state.mul_(chunk.decays.across)
    state.baddbmm_(chunk.k_out.mT, u)


def _backward_chunk(
    plan: _Plan,
    q: Tensor,
    k: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    d_o: Tensor,
    d_q: Tensor,
    d_k: Tensor,
    d_v: Tensor,
    d_beta: Tensor,
    d_decay: Tensor | None,
    d_state: Tensor,
    record: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Writes the gradients, and moves `d_state` from the chunk's end to its start."""
    chunk = plan.chunk(q)
    m = chunk.steps
    chunk.load(q, k, beta, decay)
    gram, r, start = record
    chunk.set_system(gram)
    decays = chunk.decays
    u = torch.mul(r, chunk.beta_scaled, out=chunk.u)
    # The gradients of k_in H_0 and q_in H_0, one above the other: -d_error and d_o.
    d_read = chunk.d_read
    d_out = d_read[:, m:]
    chunk.by_token(d_out).copy_(d_o)

    # r = error - W u and u = beta r, so that d_error = beta s where (I + beta W)^T s = d_u.
    d_u = torch.bmm(chunk.k_out, d_state, out=chunk.error)
    d_u.baddbmm_(chunk.weights[:, m:].mT, d_out)
    s = chunk.solve(d_u, upper=True, out=chunk.solution)
    d_beta_scaled = torch.mul(s, r, out=chunk.error).sum(-1, keepdim=True)
    d_error = s.mul_(chunk.beta_scaled)
    d_v.copy_(chunk.by_step(d_error))
    torch.neg(d_error, out=d_read[:, :m])

    # What the state gave to the chunk, the chunk to the state, and keys and queries to keys.
    d_keys = torch.bmm(u, d_state.mT, out=chunk.d_keys)
    d_gram = torch.bmm(d_read, u.mT, out=chunk.gram).mul_(chunk.mask)
    if decays is None:
        d_keys.baddbmm_(d_read[:, :m], start.mT)
        d_queries = torch.bmm(d_out, start.mT, out=chunk.d_queries)
    else:
        assert d_decay is not None
        d_out_of = (d_keys * chunk.k).sum(-1)
        d_keys.mul_(decays.out_of)
        d_kq_in = d_read @ start.mT
        d_into = (d_kq_in * chunk.kq).sum(-1)
        d_kq_in.mul_(decays.into)
        d_keys.add_(d_kq_in[:, :m])
        d_queries = chunk.d_queries.copy_(d_kq_in[:, m:])
        d_across = (d_state * start).sum((1, 2))
        d_decay.copy_(decays.gradient(d_gram * gram, d_into, d_out_of, d_across).view(d_decay.shape))
        d_gram.mul_(decays.pairs)
        d_state.mul_(decays.across)
    d_state.baddbmm_(chunk.kq_in.mT, d_read)
    d_key_products = torch.add(d_gram[:, :m], d_gram[:, :m].mT, out=chunk.between_keys)
    if plan.normalize:
        d_beta_scaled.mul_(chunk.inverse_norm)
        d_key_products.diagonal(dim1=1, dim2=2).addcmul_(
            d_beta_scaled.squeeze(2), chunk.beta_scaled.squeeze(2), value=-2
        )
    d_beta.copy_(d_beta_scaled.view(d_beta.shape))
    d_keys.baddbmm_(d_key_products, chunk.k)
    d_keys.baddbmm_(d_gram[:, m:].mT, chunk.q)
    d_queries.baddbmm_(d_gram[:, m:], chunk.k)
    d_k.copy_(chunk.by_step(d_keys))
    d_q.copy_(chunk.by_token(d_queries))


def _records(tape: list[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    return list(zip(tape[0::3], tape[1::3], tape[2::3], strict=True))


class _Plan(Cut):
    """The cut of a batch, and the buffers for its pieces."""

    def __init__(self, k: Tensor, value_dim: int, dtype: torch.dtype, normalize: bool) -> None:
        batch, length, self.factors, self.heads, self.key_dim = k.shape
        self.value_dim, self.normalize = value_dim, normalize
        self.options: dict[str, Any] = {"dtype": dtype, "device": k.device}
        cpu = k.device.type == "cpu"
        # Longer chunks do more arithmetic, shorter ones more calls with smaller matrices. Measured.
        steps = (16 if max(self.key_dim, value_dim) < 64 else 32) if cpu else 64
        if batch * self.heads <= _FEW_ROWS and self.key_dim * value_dim <= _SMALL_STATE:
            steps = 64  # the calls would take far longer than what they compute
        chunks = max(1, (length * self.factors + steps // 2) // steps)
        tokens = ceil(length / chunks)
        rows = batch
        if cpu:
            steps = tokens * self.factors
            rows = rows_in_cache(batch, self.heads, max(self.key_dim * value_dim, steps * (steps + tokens)))
        super().__init__(batch, length, rows, tokens)
        self._chunks: dict[tuple[int, int], _Chunk] = {}

    def chunk(self, q: Tensor) -> _Chunk:
        """The buffers for a piece `q`; pieces of one size share them."""
        size = (q.shape[0], q.shape[2])
        if size not in self._chunks:
            self._chunks[size] = _Chunk(self, *size)
        return self._chunks[size]

    def empty_tape(self) -> list[Tensor]:
        """For each chunk three tensors for its backward: the products of keys and queries with keys, r, and H_0.

        Many small ones, because a C library gives large allocations back to the system and pays for fresh pages again.
        """
        tape = []
        for rows in self.row_counts:
            for tokens in self.token_counts:
                h, m = rows * self.heads, tokens * self.factors
                shapes = (h, m + tokens, m), (h, m, self.value_dim), (h, self.key_dim, self.value_dim)
                tape += [torch.empty(shape, **self.options) for shape in shapes]
        return tape


class _Chunk:
    """Buffers for the m = c N micro-steps of c tokens in h = b H heads, and what both directions compute from them.

    Rows of keys stand above rows of queries wherever a tensor has m + c of them.
    """

    def __init__(self, plan: _Plan, rows: int, tokens: int) -> None:
        heads, self.factors = rows * plan.heads, plan.factors
        self.rows, self.tokens, self.steps = rows, tokens, tokens * plan.factors
        m, n = self.steps, self.steps + tokens
        key_dim, value_dim = plan.key_dim, plan.value_dim
        new = partial(torch.empty, **plan.options)

        self.kq, self.beta = new(heads, n, key_dim), new(heads, m, 1)
        self.gram, self.between_keys = new(heads, n, m), new(heads, m, m)
        self.normalize = plan.normalize
        self.system, self.wide = self.between_keys, None
        if not self.normalize and self.gram.dtype != torch.float64:
            self.system = torch.empty_like(self.between_keys, dtype=torch.float64)
            self.wide = self.system.new_empty(2, heads, m, value_dim)
        self.error, self.u, self.solution = (new(heads, m, value_dim) for _ in range(3))
        self.out, self.d_read = new(heads, tokens, value_dim), new(heads, n, value_dim)
        self.d_keys, self.d_queries = new(heads, m, key_dim), new(heads, tokens, key_dim)

        # How many micro-steps each row sees: a key those before it, a query those up to the end of its token.
        step = torch.arange(m, device=self.kq.device)
        seen = torch.cat([step, step[self.factors - 1 :: self.factors] + 1])
        self.mask = (step < seen.unsqueeze(1)).to(self.kq.dtype)

    def by_step(self, x: Tensor) -> Tensor:
        """[b H, m, ...] as [b, H, c, N, ...]."""
        return x.view(self.rows, -1, self.tokens, self.factors, *x.shape[2:])

    def by_token(self, x: Tensor) -> Tensor:
        """[b H, c, ...] as [b, H, c, ...]."""
        return x.view(self.rows, -1, *x.shape[1:])

    def load(self, q: Tensor, k: Tensor, beta: Tensor, decay: Tensor | None) -> None:
        self.k, self.q = self.kq[:, : self.steps], self.kq[:, self.steps :]
        self.by_step(self.k).copy_(k)
        self.by_token(self.q).copy_(q)
        self.by_step(self.beta).squeeze(-1).copy_(beta)
        self.decays = None if decay is None else _Decays(decay.to(self.kq.dtype).flatten(0, 1), self.factors)
        # As they read the state at the chunk's start, and as they write the one at its end.
        self.kq_in = self.kq if self.decays is None else self.kq * self.decays.into
        self.k_out = self.k if self.decays is None else self.k * self.decays.out_of

    def set_system(self, gram: Tensor) -> None:
        """Sets `weights` = D_ij (x_i . k_j), x a key or a query; `system`; and `beta_scaled`, the factor of k k^T.

        `gram` is x_i . k_j, [b H, m + c, m]. The weights between keys are symmetric. So the rows of `system` are
        beta_i D_ij (k_i . k_j), and its transpose has the forward's system below its diagonal, the backward's above.

        The rounding errors of k . k and of beta are the same wherever a key repeats, and thousands of reflections would
        add them up. Hence the division: its quotient is then exactly 1, and the eigenvalue 1 - strength. The strength
        is beta itself with `normalize`; else it is beta |k|^2, which takes float64 to hold and to solve with.
        """
        self.weights = gram if self.decays is None else gram * self.decays.pairs
        squared_norm = gram[:, : self.steps].diagonal(dim1=1, dim2=2).unsqueeze(2)
        nonzero = squared_norm > (SHORTEST_KEY**2 if self.normalize else 0)
        squared_norm = torch.where(nonzero, squared_norm, 1)
        if self.normalize:
            self.inverse_norm = torch.where(nonzero, squared_norm.reciprocal(), 0)
            self.beta_scaled = self.beta * self.inverse_norm
            strength = torch.where(nonzero, self.beta, 0)
        else:
            self.beta_scaled = self.beta
            exact = torch.linalg.vector_norm(self.k, dim=-1, keepdim=True, dtype=torch.float64).square_()
            strength = exact.mul_(self.beta)
        torch.div(self.weights[:, : self.steps], squared_norm, out=self.between_keys)
        torch.mul(self.between_keys, strength, out=self.system)

    def solve(self, right: Tensor, *, upper: bool, out: Tensor) -> Tensor:
        """Solves with the unit triangular matrix whose other entries are those of `system`^T above or below."""
        if self.wide is None:
            return torch.linalg.solve_triangular(self.system.mT, right, upper=upper, unitriangular=True, out=out)
        wide_right, wide_out = self.wide[0].copy_(right), self.wide[1]
        torch.linalg.solve_triangular(self.system.mT, wide_right, upper=upper, unitriangular=True, out=wide_out)
        return out.copy_(wide_out)


class _Decays:
    """Products of the decays [h, c] of c tokens of N micro-steps each, and their gradient."""

    def __init__(self, decay: Tensor, factors: int) -> None:
        c = decay.shape[1]
        self.factors = factors
        products = decay_products(decay)
        self.products = products
        within = products[:, 1:, 1:]
        to_queries = within.repeat_interleave(factors, 2)
        between_keys = (within * within.mT).repeat_interleave(factors, 1).repeat_interleave(factors, 2)
        self.pairs = torch.cat([between_keys, to_queries], 1)
        into = products[:, 1:, :1]
        self.into = torch.cat([into.repeat_interleave(factors, 1), into], 1)
        self.out_of = products[:, c, 1:].repeat_interleave(factors, 1).unsqueeze(2)
        self.across = products[:, c:, :1]

    def gradient(self, d_pairs: Tensor, d_into: Tensor, d_out_of: Tensor, d_across: Tensor) -> Tensor:
        """The gradient of the decays, [h, c], from those of pairs [h, m + c, m], into [h, m + c], out_of and across."""
        h, c, n = d_across.shape[0], self.products.shape[1] - 1, self.factors
        m = c * n
        d_products = torch.zeros_like(self.products)
        within = d_products[:, 1:, 1:]
        torch.sum(d_pairs[:, :m].view(h, c, n, c, n), (2, 4), out=within) if n > 1 else within.copy_(d_pairs[:, :m])
        within += d_pairs[:, m:].view(h, c, c, n).sum(3)
        d_products[:, 1:, 0] = d_into[:, :m].view(h, c, n).sum(2) + d_into[:, m:]
        d_products[:, c, 1:] += d_out_of.view(h, c, n).sum(2)
        d_products[:, c, 0] += d_across
        return decay_gradient(self.products, d_products)


_forward_op = register_operator("chunked_householder", _forward, _empty_results)
_backward_op = register_operator("chunked_householder_backward", _backward, _empty_gradients)
