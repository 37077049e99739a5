"""What a backend is, and what backends that compute padded rows share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from statetrack.transition import Transition


class Run(Protocol):
    """Arguments and results as in `statetrack.ops.linear_recurrence`, already checked."""

    def __call__(
        self,
        transition: Transition,
        q: Tensor,
        v: Tensor,
        write: Tensor | None,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        /,
    ) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Backend:
    """One way to compute the recurrence.

    Attributes:
        name: what `backend=` calls it; files for different transitions share a name ("chunked").
        supports: why the backend can't serve a transition, or None where it can.
        run: the computation.
        priority: "auto" takes the highest among those that support the transition.
        min_length: "auto" leaves shorter sequences to others.
    """

    name: str
    supports: Callable[[Transition], str | None]
    run: Run
    priority: int = 0
    min_length: int = 1
