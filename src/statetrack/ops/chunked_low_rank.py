"""A decay for each channel minus a matrix of rank one, chunk by chunk: RWKV-7, and Kimi-Linear's KDA.

Every factor of every token is a micro-step with `D = diag(decay)`,

    H <- D H - u (w^T H) + p v^T,

for a `LowRank` transition with its u and w and the write p. For a `Householder` transition `u = p = beta k`, and w = k
reads the state after the token's decay, which acts before the first of its N factors. For a chunk that starts from the
state `H_0`, and with `D_ij` the product of the decays between the micro-steps j and i, the reads r_i solve a unit
triangular system; outputs and the next state follow by matrix products:

    r_i = w_i^T D_i0 H_0 + sum_{j < i} (w_i^T D_ij p_j) v_j - (w_i^T D_ij u_j) r_j.

The products D_ij are different for each channel, so that w_i^T D_ij u_j is no product of two matrices. But it is one
wherever a token lies between j and i at which D_ij can be cut in two: for the two halves of a chunk, for the two halves
of each half, and so on down to single tokens. Decays are multiplied, never divided by and never taken logarithms of, so
they may be negative or 0; and the products with the longest way to go are as exact as the shortest.

The system is solved by substitution, and in float64, as are its entries: where one key repeats, the rounding errors of
w^T u are the same every time, and thousands of reflections would add them up. The backward is written by hand; it
visits the chunks from the last to the first, with what the forward has put on its tape.
"""

from __future__ import annotations

from functools import partial
from math import ceil
from typing import Any

import torch
from torch import Tensor

from statetrack.ops.backend import Backend, differentiable_once, distinct, register_operator, wants_gradient
from statetrack.ops.packing import by_rows
from statetrack.transition import SHORTEST_KEY, Householder, LowRank, Transition, accumulation_dtype

# How many numbers the largest buffer of a group of heads may have on a CPU. Measured with 1 MB of cache for each core.
_CACHED_NUMBERS = 2**17
# The most micro-steps of a chunk, unless one token has more. Measured.
_STEPS = 16


def supports(transition: Transition) -> str | None:
    if isinstance(transition, LowRank):
        return None
    if isinstance(transition, Householder) and transition.decay is not None and transition.decay.ndim == 4:
        return None
    return "chunked_low_rank serves LowRank transitions, and Householder transitions with a decay for each channel"


def _run_dense(
    transition: Transition, q: Tensor, v: Tensor, write: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Brings both kinds of transition into one form: keys and values [B, T, N, H, ...], a decay for each channel."""
    if isinstance(transition, LowRank):
        assert write is not None
        decay = transition.decay
        decay = decay.unsqueeze(-1).expand_as(q) if decay.ndim == 3 else decay
        keys = [x.unsqueeze(2) for x in (transition.w, transition.u, write)]
        v, normalize = v.unsqueeze(2), False
    else:
        assert isinstance(transition, Householder)
        assert transition.decay is not None
        decay, keys, normalize = transition.decay, [transition.k, transition.beta], transition.normalize
    inputs = (q, v, decay, initial_state, *keys)
    if wants_gradient(*inputs):
        return _ChunkedLowRank.apply(normalize, *distinct(inputs))
    o, final_state, _ = _forward_op(q, v, decay, initial_state, keys, normalize, False)
    return o, final_state


BACKEND = Backend(name="chunked", supports=supports, run=by_rows(_run_dense), priority=10, min_length=2)


class _ChunkedLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        normalize: bool,
        q: Tensor,
        v: Tensor,
        decay: Tensor,
        initial_state: Tensor | None,
        *keys: Tensor,
    ) -> tuple[Tensor, Tensor]:
        o, final_state, tape = _forward_op(q, v, decay, initial_state, list(keys), normalize, True)
        ctx.save_for_backward(q, decay, *keys, *tape)
        ctx.normalize = normalize
        ctx.key_count = len(keys)
        ctx.initial_dtype = None if initial_state is None else initial_state.dtype
        return o, final_state

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        d_o, d_state = grad_outputs
        q, decay, *rest = ctx.saved_tensors
        keys, tape = rest[: ctx.key_count], rest[ctx.key_count :]
        d_q, d_v, d_decay, d_initial, d_keys = _backward_op(q, decay, keys, ctx.normalize, tape, d_o, d_state)
        d_initial = None if ctx.initial_dtype is None else d_initial.to(ctx.initial_dtype)
        return None, d_q, d_v, d_decay, d_initial, *d_keys


def _forward(
    q: Tensor,
    v: Tensor,
    decay: Tensor,
    initial_state: Tensor | None,
    keys: list[Tensor],
    normalize: bool,
    save: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Returns o, the final state, and a tape for `_backward`, which is empty unless `save`.

    `keys` are [w, u, p], [B, T, 1, H, K] each, or k [B, T, N, H, K] and beta [B, T, N, H] of a Householder transition.
    """
    o, states, tape = _empty_results(q, v, decay, initial_state, keys, normalize, save)
    plan = _Plan(keys, v.shape[-1], states.dtype, normalize)
    if initial_state is None:
        states.zero_()
    else:
        states.copy_(initial_state)
    records = _records(tape) if save else [None] * plan.count
    pieces = zip(
        *(plan.tokens(q), plan.steps(v), plan.tokens(decay), plan.key_steps(keys)),
        *(plan.tokens(o), plan.states(states), records),
        strict=True,
    )
    with torch.autocast(q.device.type, enabled=False):
        for piece in pieces:
            _forward_chunk(plan, *piece)
    return o, states, tape


def _empty_results(
    q: Tensor,
    v: Tensor,
    decay: Tensor,
    initial_state: Tensor | None,
    keys: list[Tensor],
    normalize: bool,
    save: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    dtype = accumulation_dtype(*(x for x in (q, v, decay, initial_state, *keys) if x is not None))
    b, t, _, h, value_dim = v.shape
    states = v.new_empty(b, h, q.shape[-1], value_dim, dtype=dtype)
    tape = _Plan(keys, value_dim, dtype, normalize).empty_tape() if save else []
    return v.new_empty(b, t, h, value_dim), states, tape


def _backward(
    q: Tensor,
    decay: Tensor,
    keys: list[Tensor],
    normalize: bool,
    tape: list[Tensor],
    d_o: Tensor,
    d_state: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """Returns the gradients of q, v, decay, the initial state and the keys; `d_x` is that of x."""
    d_q, d_v, d_decay, d_states, d_keys = _empty_gradients(q, decay, keys, normalize, tape, d_o, d_state)
    d_states.copy_(d_state)
    plan = _Plan(keys, d_o.shape[-1], d_state.dtype, normalize)
    pieces = zip(
        *(plan.tokens(q), plan.tokens(decay), plan.key_steps(keys), plan.tokens(d_o)),
        *(plan.tokens(d_q), plan.steps(d_v), plan.tokens(d_decay), plan.key_steps(d_keys)),
        *(plan.states(d_states), _records(tape)),
        strict=True,
    )
    with torch.autocast(q.device.type, enabled=False):
        for piece in reversed(list(pieces)):
            _backward_chunk(plan, *piece)
    return d_q, d_v, d_decay, d_states, d_keys


def _empty_gradients(
    q: Tensor,
    decay: Tensor,
    keys: list[Tensor],
    normalize: bool,
    tape: list[Tensor],
    d_o: Tensor,
    d_state: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    return (
        q.new_empty(q.shape),
        d_o.new_empty(*keys[0].shape[:-1], d_o.shape[-1]),
        decay.new_empty(decay.shape),
        d_state.new_empty(d_state.shape),
        [x.new_empty(x.shape) for x in keys],
    )


def _forward_chunk(
    plan: _Plan,
    q: Tensor,
    v: Tensor,
    decay: Tensor,
    keys: tuple[Tensor, ...],
    o: Tensor,
    state: Tensor,
    record: tuple[Tensor, ...] | None,
) -> None:
    """Writes the outputs to `o`, moves `state` to the chunk's end, and fills the record for the backward."""
    chunk = plan.chunk(q)
    chunk.load(chunk.exact, q, decay, keys)
    exact = chunk.exact.multiply()
    weights, system, z, start = record or (*chunk.record, state)
    if record is not None:
        start.copy_(state)
    weights.copy_(exact)
    chunk.by_factor(system).copy_(exact[:, :, :-1, :, : chunk.factors])
    x, y = (rounded.copy_(x).flatten(1, 2) for rounded, x in zip(chunk.rounded, chunk.exact.rows, strict=True))

    read = torch.bmm(x, start, out=chunk.read).view(chunk.row_shape)
    solved, given = chunk.split(z)
    right = chunk.right
    if chunk.separate:
        given.zero_()
        chunk.real(given).copy_(v)
        torch.bmm(weights[:, :, 0, :, 1].contiguous(), given.squeeze(2), out=chunk.error)
        chunk.error.add_(read[:, :, 0]).neg_()
    else:
        error = chunk.error.view(solved.shape).zero_()
        chunk.real(error).copy_(v)
        error.sub_(read[:, :, :-1])
    right.copy_(chunk.error)
    solved.copy_(chunk.solve(system, right, transpose=False).view(solved.shape))
    out = torch.baddbmm(read[:, :, -1], weights[:, :, -1].flatten(2), z.flatten(1, 2), out=chunk.out)
    o.copy_(chunk.real(out))
    state.mul_(chunk.exact.across.unsqueeze(2))
    state.baddbmm_(y.mT, z.flatten(1, 2))


def _backward_chunk(
    plan: _Plan,
    q: Tensor,
    decay: Tensor,
    keys: tuple[Tensor, ...],
    d_o: Tensor,
    d_q: Tensor,
    d_v: Tensor,
    d_decay: Tensor,
    d_keys: tuple[Tensor, ...],
    d_state: Tensor,
    record: tuple[Tensor, ...],
) -> None:
    """Writes the gradients, and moves `d_state` from the chunk's end to its start."""
    chunk = plan.chunk(q)
    pairs = chunk.pairs
    chunk.load(pairs, q, decay, keys)
    pairs.scale()
    weights, system, z, start = record
    flat_z = z.flatten(1, 2)
    x, y = (x.flatten(1, 2) for x in pairs.rows)
    # The gradients of what was read of H_0, x H_0: those of the outputs, and for the system those of its right side
    # with the other sign.
    d_out = chunk.out.zero_()
    chunk.real(d_out).copy_(d_o)
    d_z = torch.bmm(y, d_state, out=chunk.d_z.flatten(1, 2))
    d_z.baddbmm_(weights[:, :, -1].flatten(2).mT, d_out)
    d_solved, d_given = chunk.split(chunk.d_z)
    chunk.right.view(d_solved.shape).copy_(d_solved)
    d_error = chunk.error.copy_(chunk.solve(system, chunk.right, transpose=True))
    d_read = chunk.read.view(chunk.row_shape)
    torch.neg(d_error.view(d_solved.shape), out=d_read[:, :, :-1])
    d_read[:, :, -1] = d_out
    if chunk.separate:
        d_given.sub_(torch.bmm(weights[:, :, 0, :, 1].contiguous().mT, d_error).unsqueeze(2))
        d_v.copy_(chunk.real(d_given))
    else:
        d_v.copy_(chunk.real(d_error.view(d_solved.shape)))

    d_read = chunk.read
    d_weights = torch.bmm(d_read, flat_z.mT, out=chunk.d_weights.flatten(3).flatten(1, 2))
    torch.bmm(d_read, start.mT, out=pairs.d_x.flatten(1, 2))
    torch.bmm(flat_z, d_state.mT, out=pairs.d_y.flatten(1, 2))
    d_across = torch.mul(d_state, start).sum(2)
    d_state.mul_(pairs.across.unsqueeze(2))
    d_state.baddbmm_(x.mT, d_read)
    pairs.gradient(d_weights.view(weights.shape), d_across)
    chunk.store(d_q, d_decay, d_keys)


def _records(tape: list[Tensor]) -> list[tuple[Tensor, ...]]:
    return list(zip(tape[0::4], tape[1::4], tape[2::4], tape[3::4], strict=True))


class _Plan:
    """How a batch is cut: into groups of rows whose buffers fit a CPU's cache, and each group into chunks of tokens.

    All lists are in one order: group after group, in each the chunks in the order of time.
    """

    def __init__(self, keys: list[Tensor], value_dim: int, dtype: torch.dtype, normalize: bool) -> None:
        batch, length, self.factors, self.heads, self.key_dim = keys[0].shape
        self.value_dim, self.normalize = value_dim, normalize
        # Whether what is written with the values, p v^T, has a direction of its own.
        self.separate = len(keys) == 3
        self.columns = self.factors + self.separate
        self.dtype, self.device = dtype, keys[0].device
        # A power of two, so that chunks can be halved.
        tokens = 1 << max(0, (_STEPS // self.factors).bit_length() - 1)
        rows = batch
        if self.device.type == "cpu":
            numbers = max(self.key_dim * value_dim, tokens * (self.factors + 1) * max(self.key_dim, value_dim))
            heads = max(1, _CACHED_NUMBERS // numbers)
            rows = ceil(batch / ceil(batch * self.heads / heads))
        self.token_counts = [min(tokens, length - start) for start in range(0, length, tokens)]
        self.row_counts = [min(rows, batch - start) for start in range(0, batch, rows)]
        self.count = len(self.row_counts) * len(self.token_counts)
        self._chunks: dict[tuple[int, int], _Chunk] = {}

    def chunk(self, q: Tensor) -> _Chunk:
        """The buffers for a piece `q`; pieces of one size share them."""
        size = (q.shape[0], q.shape[2])
        if size not in self._chunks:
            self._chunks[size] = _Chunk(self, *size)
        return self._chunks[size]

    def tokens(self, x: Tensor) -> list[Tensor]:
        """Views [b, H, c, ...] of a tensor [B, T, H, ...], b rows and c tokens each."""
        return self._cut(x.movedim(2, 1))

    def steps(self, x: Tensor) -> list[Tensor]:
        """Views [b, H, c, N, ...] of a tensor [B, T, N, H, ...]."""
        return self._cut(x.movedim(3, 1))

    def key_steps(self, keys: list[Tensor]) -> list[tuple[Tensor, ...]]:
        return list(zip(*(self.steps(x) for x in keys), strict=True))

    def states(self, x: Tensor) -> list[Tensor]:
        """For each chunk the state [b H, K, V] of its group, a view of [B, H, K, V]."""
        return [group.flatten(0, 1) for group in x.split(self.row_counts) for _ in self.token_counts]

    def empty_tape(self) -> list[Tensor]:
        """For each chunk four tensors for its backward: those of `empty_record`, and H_0.

        Many small ones, because a C library gives large allocations back to the system and pays for fresh pages again.
        """
        tape = []
        for rows in self.row_counts:
            for tokens in self.token_counts:
                state = rows * self.heads, self.key_dim, self.value_dim
                tape += [*self.empty_record(rows, tokens), torch.empty(state, dtype=self.dtype, device=self.device)]
        return tape

    def empty_record(self, rows: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Empty tensors for the weights [h, c, N + 1, c, C], the system [h, c N, c N], and z [h, c, C, V]."""
        h, c, n = rows * self.heads, _padded(tokens), self.factors
        new = partial(torch.empty, device=self.device)
        return (
            new(h, c, n + 1, c, self.columns, dtype=self.dtype),
            new(h, c * n, c * n, dtype=torch.float64),
            new(h, c, self.columns, self.value_dim, dtype=self.dtype),
        )

    def _cut(self, x: Tensor) -> list[Tensor]:
        return [piece for group in x.split(self.row_counts) for piece in group.split(self.token_counts, 2)]


class _Chunk:
    """Buffers for c tokens in h = b H heads, and how tensors are brought into their order.

    A token has N + 1 rows, which read the state: w of every factor, and q. It has C columns, which are written to the
    state: u of every factor, and p where p is not u. What the columns write is z: for u = p the error v - r, else -r
    and v. Tokens that fill a chunk up to a power of two have a decay of 1 and are 0 otherwise.
    """

    def __init__(self, plan: _Plan, rows: int, tokens: int) -> None:
        self.rows, self.tokens, self.padded = rows, tokens, _padded(tokens)
        self.factors, self.normalize, self.separate = plan.factors, plan.normalize, plan.separate
        h, c, n, columns, value_dim = rows * plan.heads, self.padded, plan.factors, plan.columns, plan.value_dim
        shape = h, c, n + 1, columns, plan.key_dim
        self.row_shape = h, c, n + 1, value_dim
        new = partial(torch.zeros, dtype=plan.dtype, device=plan.device)
        self.exact = _Pairs(shape, plan.separate, torch.float64, plan.device)
        self.pairs = _Pairs(shape, plan.separate, plan.dtype, plan.device)
        self.rounded = [torch.empty_like(x, dtype=plan.dtype) for x in self.exact.rows]
        self.record = plan.empty_record(rows, tokens)
        self.read, self.error, self.out = (new(h, rows, value_dim) for rows in (c * (n + 1), c * n, c))
        self.right = self.error.to(torch.float64)
        self.solution = torch.empty_like(self.right)
        self.d_z, self.d_weights = new(h, c, columns, value_dim), new(h, c, n + 1, c, columns)

    def real(self, x: Tensor) -> Tensor:
        """[b H, padded c, ...] as [b, H, c, ...]."""
        return x.view(self.rows, -1, *x.shape[1:])[:, :, : self.tokens]

    def split(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """What is solved for, and what is given, of z [h, c, C, V]."""
        return z[:, :, : self.factors], z[:, :, self.factors :]

    def by_factor(self, system: Tensor) -> Tensor:
        """[h, m, m] as [h, c, N, c, N]."""
        return system.view(-1, self.padded, self.factors, self.padded, self.factors)

    def solve(self, system: Tensor, right: Tensor, *, transpose: bool) -> Tensor:
        """Solves with the unit triangular matrix whose entries below the diagonal are those of `system`."""
        matrix = system.mT if transpose else system
        return torch.linalg.solve_triangular(matrix, right, upper=transpose, unitriangular=True, out=self.solution)

    def load(self, pairs: _Pairs, q: Tensor, decay: Tensor, keys: tuple[Tensor, ...]) -> None:
        """Fills x, y and decays, as they are at their own token."""
        x, y = self.real(pairs.x), self.real(pairs.y)
        x[..., :-1, :], x[..., -1, :] = keys[0], q
        self.real(pairs.decay).copy_(decay)
        if self.separate:
            y[..., :1, :], y[..., 1:, :] = keys[1:]
            return
        k = x[..., :-1, :]
        self.beta = keys[1].to(x.dtype).unsqueeze(-1)
        if self.normalize:
            squared_norm = k.square().sum(-1, keepdim=True)
            self.inverse_norm = torch.where(squared_norm > SHORTEST_KEY**2, squared_norm.reciprocal(), 0)
            self.beta = self.beta * self.inverse_norm
        torch.mul(k, self.beta, out=y)

    def store(self, d_q: Tensor, d_decay: Tensor, d_keys: tuple[Tensor, ...]) -> None:
        """Writes the gradients of what `load` has read."""
        d_x, d_y = self.real(self.pairs.d_x), self.real(self.pairs.d_y)
        d_q.copy_(d_x[..., -1, :])
        d_decay.copy_(self.real(self.pairs.d_decay))
        d_k = d_x[..., :-1, :]
        if self.separate:
            for d_key, gradient in zip(d_keys, (d_k, d_y[..., :1, :], d_y[..., 1:, :]), strict=True):
                d_key.copy_(gradient)
            return
        k = self.real(self.pairs.raw_x)[..., :-1, :]
        d_beta = (d_y * k).sum(-1, keepdim=True)
        d_k.addcmul_(d_y, self.beta)
        if self.normalize:
            d_beta = d_beta * self.inverse_norm
            d_k.addcmul_(k, self.beta * d_beta, value=-2)
        d_keys[0].copy_(d_k)
        d_keys[1].copy_(d_beta.squeeze(-1))


class _Pairs:
    """The products x_i^T D_ij y_j of all rows x of a chunk with all columns y of the tokens before, and their gradient.

    Level after level two blocks of s tokens become one. The product of a row of the later block with a column of the
    earlier one is that of the row as it reads the state between the two with the column as it has reached this state.
    In the end `x` reads the state at the chunk's start, and `y` is what has reached its end.
    """

    def __init__(
        self, shape: tuple[int, int, int, int, int], separate: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        h, c, rows, columns, key_dim = shape
        new = partial(torch.zeros, dtype=dtype, device=device)
        self.x, self.y = new(h, c, rows, key_dim), new(h, c, columns, key_dim)
        self.rows = self.x, self.y
        self.decay = new(h, c, key_dim).fill_(1)
        self.weights = new(h, c, rows, c, columns)
        self.raw_x, self.raw_y, self.d_x, self.d_y = (torch.empty_like(x) for x in (*self.rows, *self.rows))
        self.d_decay = torch.empty_like(self.decay)
        # The rows that read the state after the decay of their own token; w of a LowRank transition does not.
        self.decayed = slice(1 if separate else 0, None)
        # Within a token a factor sees those before it, the query all.
        factor = torch.arange(rows - 1, device=device)
        factor = torch.cat([factor, factor]) if separate else factor
        self.within = (factor < torch.arange(rows, device=device).unsqueeze(1)).to(dtype)
        self.sizes = [1 << level for level in range(c.bit_length() - 1)]

    def multiply(self) -> Tensor:
        """Turns x, y and decays as they are at their own token into those at the chunk's ends.

        Returns:
            The products of rows and columns, [h, c, N + 1, c, C], 0 for columns that a row does not see.
        """
        x, y = (x.flatten(0, 1) for x in self.rows)
        within = _product(x, y.mT).mul_(self.within)
        _blocks(self.weights, 0).copy_(within.view(*self.decay.shape[:2], *self.within.shape))
        self.x[:, :, self.decayed].mul_(self.decay.unsqueeze(2))
        across = self.decay
        for size in self.sizes:
            later, earlier, across = self._halves(self.x, self.y, across, size)
            target = _blocks(self.weights, size)
            target.copy_(_product(later, earlier.mT).view(target.shape))
            later.mul_(across[:, :1])
            earlier.mul_(across[:, 1:])
            across = across.prod(1)
        self.across = across.view(-1, x.shape[-1])
        return self.weights

    def scale(self) -> None:
        """The same without the products, but with notes for the gradient."""
        self.raw_x.copy_(self.x)
        self.raw_y.copy_(self.y)
        self.x[:, :, self.decayed].mul_(self.decay.unsqueeze(2))
        across = self.decay
        self.notes = []
        for size in self.sizes:
            later, earlier, across = self._halves(self.x, self.y, across, size)
            self.notes.append((later.clone(), earlier.clone(), across))
            later.mul_(across[:, :1])
            earlier.mul_(across[:, 1:])
            across = across.prod(1)
        self.across = across.view(-1, self.x.shape[-1])

    def gradient(self, d_weights: Tensor, d_across: Tensor) -> None:
        """Turns the gradients d_x and d_y at the chunk's ends into those at their own tokens, and sets d_decay.

        Entries of `d_weights` for columns that a row does not see have no effect.
        """
        for size, (later, earlier, across) in zip(reversed(self.sizes), reversed(self.notes), strict=True):
            d_later, d_earlier, _ = self._halves(self.d_x, self.d_y, self.decay, size)
            d_halves = torch.stack([(d_later * later).sum(1), (d_earlier * earlier).sum(1)], 1)
            d_halves.addcmul_(d_across.view(-1, 1, d_halves.shape[-1]), across.flip(1))
            d_block = _blocks(d_weights, size).reshape(-1, later.shape[1], earlier.shape[1])
            d_later.mul_(across[:, :1]).add_(_product(d_block, earlier))
            d_earlier.mul_(across[:, 1:]).add_(_product(d_block.mT, later))
            d_across = d_halves
        torch.sum(self.d_x[:, :, self.decayed] * self.raw_x[:, :, self.decayed], 2, out=self.d_decay)
        self.d_decay.add_(d_across.view(self.d_decay.shape))
        self.d_x[:, :, self.decayed].mul_(self.decay.unsqueeze(2))
        d_within = (_blocks(d_weights, 0) * self.within).flatten(0, 1)
        self.d_x.flatten(0, 1).add_(_product(d_within, self.raw_y.flatten(0, 1)))
        self.d_y.flatten(0, 1).add_(_product(d_within.mT, self.raw_x.flatten(0, 1)))

    @staticmethod
    def _halves(x: Tensor, y: Tensor, across: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of all pairs of blocks of `size` tokens the rows of the later, the columns of the earlier, both decays."""
        dim = x.shape[-1]
        later = x.view(-1, 2, size * x.shape[2], dim)[:, 1]
        earlier = y.view(-1, 2, size * y.shape[2], dim)[:, 0]
        return later, earlier, across.view(-1, 2, dim)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Batched matrix product, [n, i, j] and [n, j, k]; for the smallest ones `torch.bmm` is a scalar loop."""
    if a.shape[1] * a.shape[2] * b.shape[2] >= 400:
        return torch.bmm(a, b)
    if b.shape[2] <= a.shape[2]:
        return torch.mul(a.unsqueeze(2), b.mT.unsqueeze(1)).sum(3)
    return torch.mul(a.unsqueeze(3), b.unsqueeze(1)).sum(2)


def _blocks(weights: Tensor, size: int) -> Tensor:
    """Of all pairs of blocks the later's rows, the earlier's columns: a view [h, c / (2 size), size R, size C].

    For size 0 those of every token with itself, [h, c, R, C].
    """
    h, c, rows, _, columns = weights.shape
    if size == 0:
        return weights.diagonal(dim1=1, dim2=3).movedim(3, 1)
    pairs = c // (2 * size)
    halves = weights.view(h, pairs, 2, size * rows, pairs, 2, size * columns)
    return halves[:, :, 1, :, :, 0].diagonal(dim1=1, dim2=3).movedim(3, 1)


def _padded(tokens: int) -> int:
    return 1 << (tokens - 1).bit_length()


_forward_op = register_operator("chunked_low_rank", _forward, _empty_results)
_backward_op = register_operator("chunked_low_rank_backward", _backward, _empty_gradients)
