"""One token on a GPU: a Triton kernel for each transition that reads the state once and writes it once.

The kernel overwrites the state where it lies, or writes the next one into new memory. There is no backward: tokens with
gradients take the PyTorch step. Operators say which tensor they overwrite, so that torch.compile, torch.export and CUDA
graphs take them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from statetrack.ops.backend import register_operator, wants_gradient
from statetrack.ops.step import overwrites
from statetrack.ops.triton_common import LARGEST_KEY, contiguous, kernels, power_of_two, processors, unavailable
from statetrack.transition import Diagonal, Discretized, Householder, LowRank, Transition

# A program's part of the state, in numbers, at most; and how many value channels it has at least, which are a segment
# of memory for each key. Narrow parts are for few rows: they give every processor a program of its own.
_LARGEST_TILE = 8192
_NARROWEST, _WIDEST = 16, 64
_SMALL_TILE = 2048


def supports(
    transition: Transition, q: Tensor, v: Tensor, write: Tensor | None, initial_state: Tensor | None
) -> str | None:
    """Why no kernel can take this token, or None where one can."""
    inputs = (q, v, write, initial_state, *transition.tensors().values())
    if reason := unavailable(*inputs):
        return reason
    if wants_gradient(*inputs):
        return "the kernels for one token have no backward"
    if q.shape[-1] > LARGEST_KEY:
        return f"the kernels for one token serve keys of up to {LARGEST_KEY} channels, not {q.shape[-1]}"
    return None


def run(
    transition: Transition,
    q: Tensor,
    v: Tensor,
    write: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`linear_recurrence` where T is 1 and nothing is packed; arguments and results as there, already checked."""
    b, _, h = transition.batch_shape
    shape = (b, h, q.shape[-1], v.shape[-1])
    before = None
    if initial_state is None:
        state = q.new_zeros(shape, dtype=torch.float32)
    elif overwrites(initial_state, torch.float32):
        state = initial_state
    else:
        before = initial_state.to(torch.float32).contiguous()
        state = torch.empty_like(before)
    q, v = q.contiguous(), v.contiguous()
    if isinstance(transition, Householder):
        k, beta, decay = (contiguous(x) for x in (transition.k, transition.beta, transition.decay))
        return _householder_op(state, before, q, k, v, beta, decay, transition.normalize), state
    assert write is not None
    inputs = (q, write.contiguous(), v)
    if isinstance(transition, Diagonal):
        return _diagonal_op(state, before, *inputs, transition.decay.contiguous()), state
    if isinstance(transition, LowRank):
        return _low_rank_op(
            state, before, *inputs, *(x.contiguous() for x in (transition.decay, transition.u, transition.w))
        ), state
    assert isinstance(transition, Discretized)
    dt, A, lower_end = (contiguous(x) for x in (transition.dt, transition.A, transition.lower_end))
    lo, hi = transition.eigenvalue_range.lo, transition.eigenvalue_range.hi
    return _discretized_op(state, before, *inputs, dt, A, lower_end, lo, hi), state


def _kernels() -> Any:
    return kernels("step")


def _decay_kind(decay: Tensor | None) -> str:
    return "none" if decay is None else ("head" if decay.ndim == 3 else "channel")


def _launch(kernel: str, state: Tensor, before: Tensor | None, *arguments: Any, **constants: Any) -> None:
    b, h, key_dim, value_dim = state.shape
    block_k = power_of_two(key_dim, least=1)
    block_v = min(_WIDEST, power_of_two(value_dim, least=1), max(1, _LARGEST_TILE // block_k))
    while block_v > _NARROWEST and b * h * -(-value_dim // block_v) < 2 * processors(state.device):
        block_v //= 2
    with torch.cuda.device_of(state):
        getattr(_kernels(), kernel)[(b * h, -(-value_dim // block_v))](
            state if before is None else before, state, *arguments,
            K=key_dim, V=value_dim, BK=block_k, BV=block_v, **constants,
            num_warps=4 if block_k * block_v > _SMALL_TILE else 2,
        )  # fmt: skip


def _householder(
    state: Tensor,
    before: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    normalize: bool,
) -> Tensor:
    """Writes the next state into `state`, from `before` or, if that is None, from itself; returns o [B, 1, H, V]."""
    o = _outputs(state, v)
    _launch(
        "householder", state, before, q, k, v, beta, decay, o, k.shape[3],
        N=k.shape[2], NORMALIZE=normalize, DECAY=_decay_kind(decay),
    )  # fmt: skip
    return o


def _diagonal(state: Tensor, before: Tensor | None, q: Tensor, write: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    o = _outputs(state, v)
    _launch("diagonal", state, before, q, write, v, decay, o, DECAY=_decay_kind(decay))
    return o


def _low_rank(
    state: Tensor, before: Tensor | None, q: Tensor, write: Tensor, v: Tensor, decay: Tensor, u: Tensor, w: Tensor
) -> Tensor:
    o = _outputs(state, v)
    _launch("low_rank", state, before, q, write, v, decay, u, w, o, DECAY=_decay_kind(decay))
    return o


def _discretized(
    state: Tensor,
    before: Tensor | None,
    q: Tensor,
    write: Tensor,
    v: Tensor,
    dt: Tensor,
    A: Tensor,
    lower_end: Tensor | None,
    lo: float,
    hi: float,
) -> Tensor:
    o = _outputs(state, v)
    _launch(
        "discretized", state, before, q, write, v, dt, A, lower_end, o, q.shape[2], lo, hi, LOWER=lower_end is not None
    )
    return o


def _outputs(state: Tensor, v: Tensor) -> Tensor:
    b, h, _, value_dim = state.shape
    return v.new_empty(b, 1, h, value_dim)


def _empty_outputs(state: Tensor, before: Tensor | None, q: Tensor, k_or_write: Tensor, v: Tensor, *_: Any) -> Tensor:
    return _outputs(state, v)


_householder_op, _diagonal_op, _low_rank_op, _discretized_op = (
    register_operator(f"triton_step{function.__name__}", function, _empty_outputs, mutates=("state",))
    for function in (_householder, _diagonal, _low_rank, _discretized)
)
