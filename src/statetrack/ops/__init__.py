"""The linear recurrence itself, by several backends; nothing here knows a model.

A backend is a file in this folder with a `BACKEND`; `linear_recurrence` finds it by itself.
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from statetrack.ops import triton_step
from statetrack.ops.backend import Backend
from statetrack.ops.packing import packing_of
from statetrack.ops.step import Step, one_token
from statetrack.ops.vmapped import Recurrence, is_vmapped, vmapped_recurrence
from statetrack.transition import Diagonal, Discretized, Householder, LowRank, Transition

__all__ = ["Backend", "Precision", "available_backends", "check_packing", "linear_recurrence"]

Precision = Literal["default", "high"]

_log = logging.getLogger("statetrack.ops")


def linear_recurrence(
    transition: Transition,
    q: Tensor,
    v: Tensor,
    *,
    write: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    precision: Precision = "default",
) -> tuple[Tensor, Tensor]:
    """Computes `H_t = A_t H_{t-1} + B_t`, `o_t = H_t^T q_t` (equation 1 of arXiv 2411.12537).

    `A_t` is the transition. What is written, `B_t`, depends on its kind:
        Householder: every factor j writes its own value along its own key,
            `H <- H - beta_j k_j (k_j^T H - v_j^T)`, so `v` is [B, T, N, H, V] and `write` must be None;
        all others: `B_t = write_t v_t^T`, so `write` is [B, T, H, K] and `v` is [B, T, H, V].

    Args:
        transition: the state-transition matrices.
        q: queries [B, T, H, K], any floating dtype.
        v: values, see above, any floating dtype.
        write: keys [B, T, H, K] along which the values are written, see above.
        initial_state: [B, H, K, V], or [S, H, K, V] with `cu_seqlens`; None is zero.
        cu_seqlens: the boundaries [S + 1] (integer, from 0 to T, not decreasing) of S sequences packed along T; then B
            is 1. Best on the CPU wherever the rest is: one on a GPU is read once, which waits for the GPU.
        backend: a name from `available_backends()`, or "auto" for the fastest that supports the transition
            (a single token has code of its own).
        precision: "default", or "high" for no rounding to less than 16 bits between inputs and results. It concerns
            bfloat16 inputs on a GPU, of which the kernels by default round to bfloat16 what is not fed back into the
            state; all else computes in float32 or better anyway. The eigenvalue -1 is exact either way.

    `torch.func.vmap` makes one call of all replicas; cu_seqlens are then not supported.

    Returns:
        o: [B, T, H, V] in the dtype of `v`.
        final_state: [B, H, K, V], or [S, H, K, V] with `cu_seqlens`; float64 if any input is float64, else float32.
            Inside `in_place_steps()` that of a single token may be `initial_state` itself, overwritten.

    Raises:
        ValueError: for shapes that don't go together, a length of 0, an unknown backend or one that does not support
            the transition, an unknown precision.
    """
    if precision not in ("default", "high"):
        raise ValueError(f'precision must be "default" or "high", got {precision!r}')
    _check(transition, q, v, write, initial_state, cu_seqlens)
    if is_vmapped():
        if cu_seqlens is not None:
            raise ValueError("packed sequences can't be vmapped: give every replica rows of one length, or pad them")
        return vmapped_recurrence(_positional(backend, precision), transition, q, v, write, initial_state)
    if q.shape[1] == 1 and cu_seqlens is None:
        step = _choose_step(backend, transition, q, v, write, initial_state)
        if step is not None:
            return step(transition, q, v, write, initial_state)
    chosen = _choose(transition, q.shape[1], backend)
    run = chosen.run_high if precision == "high" and chosen.run_high is not None else chosen.run
    return run(transition, q, v, write, initial_state, cu_seqlens)


def _choose_step(
    backend: str, transition: Transition, q: Tensor, v: Tensor, write: Tensor | None, initial_state: Tensor | None
) -> Step | None:
    """The code for a single token; None where it goes the way of all sequences."""
    if backend not in ("auto", "triton"):
        return None
    if triton_step.supports(transition, q, v, write, initial_state) is None:
        return triton_step.run
    if backend == "triton" or any(decoder.supports(transition) is None for decoder in _DECODERS):
        return None
    return one_token


def available_backends(transition: Transition | None = None) -> list[str]:
    """The names of all backends, or of those that support `transition`; the one that "auto" prefers comes first."""
    names = [b.name for b in _BACKENDS if transition is None or b.supports(transition) is None]
    return list(dict.fromkeys(names))


def _choose(transition: Transition, length: int, name: str) -> Backend:
    reasons = []
    for candidate in _BACKENDS:
        if name not in ("auto", candidate.name):
            continue
        reason = candidate.supports(transition)
        if name == "auto" and reason is None and length < candidate.min_length:
            reason = f"{candidate.name} serves lengths from {candidate.min_length}"
        if reason is None:
            if name == "auto" and not torch.compiler.is_compiling():
                _log_choice(type(transition).__name__, candidate.name)
            return candidate
        reasons.append(reason)
    if not reasons:
        raise ValueError(f"unknown backend {name!r}; available: auto, {', '.join(available_backends())}")
    raise ValueError(f"backend {name!r} can't serve {type(transition).__name__}: {'; '.join(reasons)}")


def _positional(backend: str, precision: Precision) -> Recurrence:
    return lambda transition, q, v, write, initial_state: linear_recurrence(
        transition, q, v, write=write, initial_state=initial_state, backend=backend, precision=precision
    )


@cache
def _log_choice(kind: str, name: str) -> None:
    _log.info("backend 'auto' uses %r for %s", name, kind)


def _check(
    transition: Transition,
    q: Tensor,
    v: Tensor,
    write: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    b, t, h = transition.batch_shape
    if b == 0 or t == 0 or h == 0:
        raise ValueError(
            f"a recurrence needs at least one sequence, one token and one head, got B = {b}, T = {t}, H = {h}"
        )
    if isinstance(transition, Householder):
        n, key_dim = transition.k.shape[2], transition.k.shape[4]
        if v.shape[:-1] != (b, t, n, h) or v.ndim != 5:
            raise ValueError(f"v must be [B, T, N, H, V] = {(b, t, n, h, 'V')} to go with k, got {tuple(v.shape)}")
        if write is not None:
            raise ValueError("a Householder transition writes along its own keys: leave out `write`")
    else:
        key_dim, value_dim = _dimensions(transition, q, v)
        if key_dim == 0:
            raise ValueError(f"a state needs at least one key channel, got K = 0 from q {tuple(q.shape)}")
        if v.shape != (b, t, h, value_dim):
            raise ValueError(f"v must be [B, T, H, V] = {(b, t, h, value_dim)} to go with it, got {tuple(v.shape)}")
        if write is None or write.shape != (b, t, h, key_dim):
            got = "None" if write is None else tuple(write.shape)
            raise ValueError(f"write must be [B, T, H, K] = {(b, t, h, key_dim)} to go with it, got {got}")
    if q.shape != (b, t, h, key_dim):
        raise ValueError(
            f"q must be [B, T, H, K] = {(b, t, h, key_dim)} to go with the transition, got {tuple(q.shape)}"
        )
    if v.shape[-1] == 0:
        raise ValueError(f"a state needs at least one value channel, got v {tuple(v.shape)}")
    states = b
    if cu_seqlens is not None:
        check_packing(b, t, cu_seqlens)
        states = len(cu_seqlens) - 1
    if initial_state is not None and initial_state.shape != (states, h, key_dim, v.shape[-1]):
        raise ValueError(f"initial_state must be {(states, h, key_dim, v.shape[-1])}, got {tuple(initial_state.shape)}")
    given = {"q": q, "v": v, "write": write, "initial_state": initial_state, **transition.tensors()}
    for name, x in given.items():
        if x is None:
            continue
        if not x.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"all tensors must be on one device: q is on {q.device}, {name} on {x.device}")


def _dimensions(transition: Transition, q: Tensor, v: Tensor) -> tuple[int, int]:
    """(K, V) as the transition has them; what it leaves open is taken from `q` and `v`."""
    value_dim = v.shape[-1] if v.ndim else 0
    if isinstance(transition, Discretized):
        return transition.A.shape[1], transition.A.shape[2]
    if isinstance(transition, LowRank):
        return transition.u.shape[-1], value_dim
    if isinstance(transition, Diagonal):
        return transition.decay.shape[3] if transition.decay.ndim == 4 else (q.shape[-1] if q.ndim else 0), value_dim
    raise ValueError(f"no operation is known for the transition {type(transition).__name__}")


def check_packing(b: int, t: int, cu_seqlens: Tensor) -> None:
    """Raises ValueError unless `cu_seqlens` cuts one row of T tokens into sequences."""
    if b != 1:
        raise ValueError(f"packed sequences lie in one row: B must be 1 with cu_seqlens, got {b}")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or cu_seqlens.is_floating_point() or cu_seqlens.dtype == torch.bool:
        raise ValueError(
            f"cu_seqlens must be a vector of at least two integers, got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
    packing = packing_of(cu_seqlens)
    if not packing.ordered or packing.boundaries[-1] != t:
        raise ValueError(f"cu_seqlens must run from 0 to T = {t} without decreasing, got {packing.boundaries[:8]}")


def _find_backends() -> tuple[Backend, ...]:
    modules = (importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__))
    found = [module.BACKEND for module in modules if hasattr(module, "BACKEND")]
    return tuple(sorted(found, key=lambda backend: -backend.priority))


_BACKENDS = _find_backends()
_DECODERS = tuple(backend for backend in _BACKENDS if backend.decodes)
