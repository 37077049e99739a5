"""Triton kernels for the gradients of rows, columns and decays with a decay for each key channel.

Letters and layouts are those of `channels.py`. Between blocks of 16 tokens gradients are products of matrices; within
a block the pairs are taken one by one, and a thread has its channels of all 16 tokens. Decays are only ever multiplied.
"""

from __future__ import annotations

import triton
import triton.language as tl

from statetrack.ops.kernels.channels import (
    BLOCK,
    GROUP,
    is_later,
    lies_between,
    products_to_end,
)
from statetrack.ops.kernels.tiles import load_kinds, outer_products, state_overlap, state_products, store_kinds


@triton.jit
def _channels(start, THREADS: tl.constexpr, EACH: tl.constexpr):
    """[THREADS, EACH]: the channels that each thread has, neighbours, so that a load takes them at once.

    The `&`, which changes nothing, hides from the compiler that threads are neighbours too: it would give each several.
    """
    return start + (tl.arange(0, THREADS) & (THREADS - 1))[:, None] * EACH + tl.arange(0, EACH)[None, :]


@triton.jit
def _load_token(
    pointer, t, tokens_left, row_stride, start, K: tl.constexpr, THREADS: tl.constexpr, EACH: tl.constexpr
):  # fmt: skip
    """[THREADS, EACH] in float32."""
    channel = _channels(start, THREADS, EACH)
    ok = (t < tokens_left) & (channel < K)
    return tl.load(pointer + t * row_stride + channel, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def _store_token(
    pointer, x, t, tokens_left, row_stride, start, K: tl.constexpr, THREADS: tl.constexpr, EACH: tl.constexpr
):  # fmt: skip
    channel = _channels(start, THREADS, EACH)
    tl.store(pointer + t * row_stride + channel, x.to(pointer.dtype.element_ty), mask=(t < tokens_left) & (channel < K))


@triton.jit
def _load_block(
    pointer, tokens_left, row_stride, start, OTHER: tl.constexpr,
    K: tl.constexpr, THREADS: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """The 16 tokens, a tuple of tiles [THREADS, EACH] in float32.

    They are one load, and then split in halves, which moves nothing between threads: the compiler's time for choosing
    the layouts of loads goes with the square of their number.
    """
    token, channel = tl.arange(0, BLOCK)[None, :, None], _channels(start, THREADS, EACH)[:, None, :]
    ok = (token < tokens_left) & (channel < K)
    x = tl.load(pointer + token * row_stride + channel, mask=ok, other=OTHER).to(tl.float32)
    rows = (tl.permute(tl.reshape(x, [THREADS, 2, 2, 2, 2, EACH]), [0, 5, 4, 3, 2, 1]),)
    for _ in tl.static_range(4):
        halves = ()
        for part in tl.static_range(len(rows)):
            halves = halves + tl.split(rows[part])
        rows = halves
    return rows


@triton.jit
def _store_block(
    pointer, rows, tokens_left, row_stride, start, K: tl.constexpr, THREADS: tl.constexpr, EACH: tl.constexpr
):  # fmt: skip
    for _ in tl.static_range(4):
        pairs = ()
        for part in tl.static_range(0, len(rows), 2):
            pairs = pairs + (tl.join(rows[part], rows[part + 1]),)
        rows = pairs
    x = tl.reshape(tl.permute(rows[0], [0, 5, 4, 3, 2, 1]), [THREADS, BLOCK, EACH]).to(pointer.dtype.element_ty)
    token, channel = tl.arange(0, BLOCK)[None, :, None], _channels(start, THREADS, EACH)[:, None, :]
    tl.store(pointer + token * row_stride + channel, x, mask=(token < tokens_left) & (channel < K))


@triton.jit(do_not_specialize=["T", "blocks"])
def scale_within(
    x, y, decay, x_in, y_out, across,
    T, H, blocks,
    K: tl.constexpr, THREADS: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """For every block of 16 tokens the rows as they read the state at its start, the columns as they write the one at
    its end, [B, T, H, K], and the product of its decays, [block, K]."""
    pid = tl.program_id(0)
    block = pid % blocks
    head = (pid // blocks).to(tl.int64)
    start = tl.program_id(1) * (THREADS * EACH)
    tokens_left = T - block * BLOCK
    row_stride = H * K
    base = ((head // H * T + block * BLOCK) * H + head % H) * K
    a = _load_block(decay + base, tokens_left, row_stride, start, 1.0, K, THREADS, EACH)
    rows = _load_block(x + base, tokens_left, row_stride, start, 0.0, K, THREADS, EACH)
    columns = _load_block(y + base, tokens_left, row_stride, start, 0.0, K, THREADS, EACH)
    to_end = products_to_end(a, THREADS, EACH)
    from_start = tl.full([THREADS, EACH], 1.0, tl.float32)
    reading, writing = (), ()
    for t in tl.static_range(BLOCK):
        from_start *= a[t]
        reading = reading + (rows[t] * from_start,)
        writing = writing + (columns[t] * to_end[BLOCK - 1 - t],)
    _store_block(x_in + base, reading, tokens_left, row_stride, start, K, THREADS, EACH)
    _store_block(y_out + base, writing, tokens_left, row_stride, start, K, THREADS, EACH)
    channel = _channels(start, THREADS, EACH)
    tl.store(across + (head * blocks + block) * K + channel, to_end[BLOCK], mask=channel < K)


@triton.jit
def _load_pair(scores):
    """Two neighbours by one load."""
    both = tl.load(scores.to(tl.pointer_type(tl.uint64)))
    first, second = (both & 0xFFFFFFFF).to(tl.uint32), (both >> 32).to(tl.uint32)
    return first.to(tl.float32, bitcast=True), second.to(tl.float32, bitcast=True)


@triton.jit
def _load_scores(scores, COUNT: tl.constexpr):
    """The first COUNT of a row, a tuple of numbers."""
    found = ()
    for j in tl.static_range(0, COUNT, 2):
        found = found + _load_pair(scores + j)
    return found


@triton.jit
def _gradients_of_row(
    x, d_x, d_x_in, d_scores, a, columns, d_a, d_columns, i, last, tokens_left, row_stride, start,
    FIRST: tl.constexpr, K: tl.constexpr, KINDS: tl.constexpr, THREADS: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """Of row i, FIRST <= i < FIRST + GROUP, which sees the tokens up to `last`: stores its own gradient, and returns
    those of decays and columns with its part added."""
    COUNT: tl.constexpr = FIRST + GROUP
    # Up: the gradient of the row as it reads the state before each token.
    before = ()
    of_row = _load_token(d_x_in, i, tokens_left, row_stride, start, K, THREADS, EACH)
    first = _load_scores(d_scores, COUNT)
    if KINDS == 2:
        second = _load_scores(d_scores + BLOCK, COUNT)
    for j in tl.static_range(COUNT):
        before = before + (of_row,)
        own = first[j] * columns[j]
        if KINDS == 2:
            own += second[j] * columns[BLOCK + j]
        of_row = of_row * (a[j] if j < FIRST else tl.where(j <= last, a[j], 1.0)) + own
    _store_token(d_x, of_row, i, tokens_left, row_stride, start, K, THREADS, EACH)
    # Down: the row as it reads the state after each token.
    row = _load_token(x, i, tokens_left, row_stride, start, K, THREADS, EACH)
    of_a, of_first, of_second = (), (), ()
    for j in tl.static_range(COUNT - 1, -1, -1):
        of_first = (d_columns[j] + first[j] * row,) + of_first
        if KINDS == 2:
            of_second = (d_columns[BLOCK + j] + second[j] * row,) + of_second
        if j < FIRST:
            of_a = (d_a[j] + row * before[j],) + of_a
            row *= a[j]
        else:
            of_a = (d_a[j] + tl.where(j <= last, row * before[j], 0.0),) + of_a
            row *= tl.where(j <= last, a[j], 1.0)
    for j in tl.static_range(COUNT, BLOCK):
        of_a, of_first = of_a + (d_a[j],), of_first + (d_columns[j],)
        if KINDS == 2:
            of_second = of_second + (d_columns[BLOCK + j],)
    return of_a, of_first + of_second


@triton.jit
def _gradients_of_end(
    d_y_out, numbers, of_total, a, columns, tokens_left, row_stride, start,
    K: tl.constexpr, KINDS: tl.constexpr, THREADS: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """The gradients of decays and columns from those of the columns as they write the state at the block's end, and of
    the product of all decays: as of one more row of ones, whose scores are different for each channel."""
    d_written = _load_block(d_y_out, tokens_left, row_stride, start, 0.0, K, THREADS, EACH)
    if KINDS == 2:
        d_written = d_written + _load_block(d_y_out + numbers, tokens_left, row_stride, start, 0.0, K, THREADS, EACH)
    to_end = products_to_end(a, THREADS, EACH)
    d_a, d_columns = (), ()
    for j in tl.static_range(BLOCK):
        d_a = d_a + (to_end[BLOCK - 1 - j] * of_total,)
        own = d_written[j] * columns[j]
        if KINDS == 2:
            own += d_written[BLOCK + j] * columns[BLOCK + j]
        of_total = of_total * a[j] + own
    for kind in tl.static_range(KINDS):
        for j in tl.static_range(BLOCK):
            d_columns = d_columns + (to_end[BLOCK - 1 - j] * d_written[kind * BLOCK + j],)
    return d_a, d_columns


@triton.jit(do_not_specialize=["T", "blocks", "numbers"])
def gradients_within(
    x, x2, y, y2, decay, d_scores, d_x_in, d_y_out, d_across, d_x, d_x2, d_y, d_y2, d_decay,
    T, H, blocks, numbers: tl.int64,
    K: tl.constexpr, KINDS: tl.constexpr, THREADS: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """The gradients of rows, columns and decays, from those that `gradients_between` gives for every block.

    With E(i, j) the gradient of row i as it reads the state after token j, d_x_i is its own at the end of

        E(i, j) = a_j E(i, j-1) + dS_ij y_j

    and with the row as it reads that state, G(i, j), which is x_i at first and then takes a_j at each token,

        d_a_j += G(i, j) E(i, j-1)        d_y_j += dS_ij G(i, j)
    """
    ROWS: tl.constexpr = KINDS * 16
    pid = tl.program_id(0)
    block = pid % blocks
    head = (pid // blocks).to(tl.int64)
    start = tl.program_id(1) * (THREADS * EACH)
    tokens_left = T - block * BLOCK
    row_stride = H * K
    base = ((head // H * T + block * BLOCK) * H + head % H) * K
    place = head * blocks + block
    x, y, decay, d_x, d_y, d_decay = x + base, y + base, decay + base, d_x + base, d_y + base, d_decay + base
    d_x_in, d_y_out, d_scores = d_x_in + base, d_y_out + base, d_scores + place * ROWS * ROWS
    channel = _channels(start, THREADS, EACH)
    of_total = tl.load(d_across + place * K + channel, mask=channel < K, other=0.0)
    a = _load_block(decay, tokens_left, row_stride, start, 1.0, K, THREADS, EACH)
    columns = _load_block(y, tokens_left, row_stride, start, 0.0, K, THREADS, EACH)
    if KINDS == 2:
        x2, y2, d_x2, d_y2 = x2 + base, y2 + base, d_x2 + base, d_y2 + base
        columns = columns + _load_block(y2, tokens_left, row_stride, start, 0.0, K, THREADS, EACH)
    d_a, d_columns = _gradients_of_end(
        d_y_out, numbers, of_total, a, columns, tokens_left, row_stride, start, K, KINDS, THREADS, EACH
    )
    # Rows, of both kinds, are loops: unrolled in code they take the compiler several times as long.
    for first in tl.static_range(0, BLOCK, GROUP):
        for step in range(first * KINDS, (first + GROUP) * KINDS):
            i, kind = step // KINDS, step % KINDS
            of_kind, d_of_kind = x, d_x
            if kind == 1:
                of_kind, d_of_kind = x2, d_x2
            # w sees the tokens before its own.
            d_a, d_columns = _gradients_of_row(
                of_kind, d_of_kind, d_x_in + kind * numbers, d_scores + (kind * BLOCK + i) * ROWS, a, columns, d_a,
                d_columns, i, i - kind, tokens_left, row_stride, start, first, K, KINDS, THREADS, EACH,
            )  # fmt: skip
    _store_block(d_decay, d_a, tokens_left, row_stride, start, K, THREADS, EACH)
    _store_block(d_y, d_columns[:BLOCK], tokens_left, row_stride, start, K, THREADS, EACH)
    if KINDS == 2:
        _store_block(d_y2, d_columns[BLOCK:], tokens_left, row_stride, start, K, THREADS, EACH)


@triton.jit
def _totals_of_others(across, level: tl.constexpr, start, K: tl.constexpr, BLOCKS: tl.constexpr, BD: tl.constexpr):
    """The products of all decays of the other one of each pair of neighbours of 2^level blocks, [BLOCKS, BD]."""
    channel = start + tl.arange(0, BD)[None, :]
    other = ((tl.arange(0, BLOCKS)[:, None] >> level) ^ 1) << level
    product = tl.full([BLOCKS, BD], 1.0, tl.float32)
    for block in tl.static_range(1 << level):
        product *= tl.load(across + (other + block) * K + channel, mask=channel < K, other=1.0)
    return product


@triton.jit
def _by_token(x, BLOCKS: tl.constexpr, BD: tl.constexpr):
    """What the tokens of every block share, [BLOCKS, BD], for each of them, [BLOCKS 16, BD]."""
    return tl.reshape(tl.broadcast_to(x[:, None, :], [BLOCKS, BLOCK, BD]), [BLOCKS * BLOCK, BD])


@triton.jit
def _sums_of_others(x, level: tl.constexpr, BLOCKS: tl.constexpr, BD: tl.constexpr):
    """For every block the sum of x [BLOCKS, BD] over the other one of its pair of neighbours of 2^level blocks."""
    SHAPE: tl.constexpr = [BLOCKS >> (level + 1), 2 << level, BD]
    later = is_later(level, BLOCKS)
    of_earlier = tl.sum(tl.reshape(tl.where(later, 0.0, x), SHAPE), axis=1)
    of_later = tl.sum(tl.reshape(tl.where(later, x, 0.0), SHAPE), axis=1)
    of_earlier = tl.reshape(tl.broadcast_to(of_earlier[:, None, :], SHAPE), [BLOCKS, BD])
    of_later = tl.reshape(tl.broadcast_to(of_later[:, None, :], SHAPE), [BLOCKS, BD])
    return tl.where(later, of_earlier, of_later)


@triton.jit
def _down(
    of_own, own, other, across, pairs, tokens_left, row_stride, start, LATER: tl.constexpr,
    K: tl.constexpr, BC: tl.constexpr, BLOCKS: tl.constexpr, BD: tl.constexpr,
    LEVELS: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From the gradient `of_own` of one side's tokens, as scaled to the chunk's border, that as scaled to the block's.

    LATER is the side of rows, which the later one of a pair of groups has, `own`, where the earlier one has columns,
    `other`; else it is the reverse and `pairs` are transposed. Also returns, for every level, what this side's tokens
    add to the gradient of the total of their group's other, without the factors of the group itself, [BLOCKS, BD].
    """
    sums = ()
    for level in tl.static_range(LEVELS - 1, -1, -1):
        scaled = load_kinds(own, own, tokens_left, row_stride, start, K, BC, 1, BD)
        sums = (tl.sum(tl.reshape(of_own * scaled, [BLOCKS, BLOCK, BD]), axis=1),) + sums
        seen = load_kinds(other, other, tokens_left, row_stride, start, K, BC, 1, BD)
        for below in tl.static_range(level):
            totals = _totals_of_others(across, below, start, K, BLOCKS, BD)
            seen *= _by_token(tl.where(is_later(below, BLOCKS) == LATER, 1.0, totals), BLOCKS, BD)
        totals = _totals_of_others(across, level, start, K, BLOCKS, BD)
        of_own *= _by_token(tl.where(is_later(level, BLOCKS) == LATER, totals, 1.0), BLOCKS, BD)
        of_own = tl.dot(pairs[level], seen.to(OPERAND), of_own, input_precision=PRECISION)
    return of_own, sums


@triton.jit
def _store_scores(scores, x, BC: tl.constexpr, KINDS: tl.constexpr):
    """Those of the pairs within blocks, a tile [KINDS 16, KINDS 16] for each block, with zeros above the diagonal."""
    row, column = tl.arange(0, KINDS * BC)[:, None], tl.arange(0, KINDS * BC)[None, :]
    if KINDS == 1:
        at = row * BLOCK + column % BLOCK
        tl.store(scores + at, tl.where(row >= column, x, 0.0), mask=row // BLOCK == column // BLOCK)
    else:
        # w does not see its own token.
        seen = row % BC - row // BC >= column % BC
        tl.store(scores + row * (KINDS * BC) + column, tl.where(seen, x, 0.0))


@triton.jit(do_not_specialize=["T", "chunks", "numbers"])
def gradients_between(
    x_in, y_out, across, starts, d_out, d_out2, written, written2, d_ends, d_scores, d_x_in, d_y_out, d_across,
    T, H, chunks, numbers: tl.int64,
    K: tl.constexpr, V: tl.constexpr, BC: tl.constexpr, KINDS: tl.constexpr, BLOCKS: tl.constexpr, BD: tl.constexpr,
    BV: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For every chunk, of 2^LEVELS blocks, the gradients of what `scale_within` gives, and of the scores of the pairs
    within blocks [block, KINDS 16, KINDS 16].

    From the whole chunk down to its blocks; one of one block has no x_in, y_out and across. `d_out` is the gradient of
    what each row has read, `written` the values that each column writes. `d_x_in` and `d_y_out` are [KINDS, B, T, H,
    K], where the kinds are `numbers` apart.
    """
    OPERAND: tl.constexpr = d_x_in.dtype.element_ty
    ROWS: tl.constexpr = KINDS * BC
    pid = tl.program_id(0)
    chunk = pid % chunks
    head = (pid // chunks).to(tl.int64)
    h = head % H
    first = head // H * T + chunk * BC
    tokens_left = tl.minimum(T - chunk * BC, BC)
    place = head * chunks + chunk
    base, values_at = (first * H + h) * K, (first * H + h) * V
    d_out, d_out2, written, written2 = d_out + values_at, d_out2 + values_at, written + values_at, written2 + values_at
    starts, d_ends = starts + place * K * V, d_ends + place * K * V
    d_x_in, d_y_out = d_x_in + base, d_y_out + base
    if LEVELS > 0:
        x_in, y_out, across = x_in + base, y_out + base, across + place * BLOCKS * K
    pairs = outer_products(d_out, d_out2, written, written2, tokens_left, H * V, V, BC, KINDS, BV, OPERAND, PRECISION)
    _store_scores(d_scores + place * ROWS * ROWS // BLOCKS, pairs, BC, KINDS)
    seen, seen_from = (), ()
    for level in tl.static_range(LEVELS):
        between = tl.where(lies_between(level, BC), pairs, 0.0).to(OPERAND)
        seen, seen_from = seen + (between,), seen_from + (tl.trans(between),)
    for start in range(0, K, BD):
        of_x = state_products(
            d_out, d_out2, starts, tokens_left, H * V, start, K, V, BC, KINDS, BD, BV, OPERAND, PRECISION
        )
        if LEVELS > 0:
            of_x, sums_x = _down(
                of_x, x_in, y_out, across, seen, tokens_left, H * K, start, True,
                K, BC, BLOCKS, BD, LEVELS, OPERAND, PRECISION,
            )  # fmt: skip
        store_kinds(d_x_in, d_x_in + numbers, of_x, tokens_left, H * K, start, K, BC, KINDS, BD)
        of_y = state_products(
            written, written2, d_ends, tokens_left, H * V, start, K, V, BC, KINDS, BD, BV, OPERAND, PRECISION
        )
        if LEVELS > 0:
            of_y, sums_y = _down(
                of_y, y_out, x_in, across, seen_from, tokens_left, H * K, start, False,
                K, BC, BLOCKS, BD, LEVELS, OPERAND, PRECISION,
            )  # fmt: skip
        store_kinds(d_y_out, d_y_out + numbers, of_y, tokens_left, H * K, start, K, BC, KINDS, BD)
        # The gradient of the product of all decays of each block's group, which in the end is the block itself.
        of_group = tl.zeros([BLOCKS, BD], tl.float32) + state_overlap(starts, d_ends, start, K, V, BD, BV)[None, :]
        for level in tl.static_range(LEVELS - 1, -1, -1):
            later = is_later(level, BLOCKS)
            sums = tl.where(later, sums_x[level], sums_y[level])
            for below in tl.static_range(level):
                later_below = is_later(below, BLOCKS)
                totals = _totals_of_others(across, below, start, K, BLOCKS, BD)
                sums *= tl.where(later == later_below, totals, 1.0)
            totals = _totals_of_others(across, level, start, K, BLOCKS, BD)
            of_group = of_group * totals + _sums_of_others(sums, level, BLOCKS, BD)
        block, channel = tl.arange(0, BLOCKS)[:, None], start + tl.arange(0, BD)[None, :]
        at = (place * BLOCKS + block) * K + channel
        tl.store(d_across + at, of_group, mask=(channel < K) & (block < BLOCKS))
