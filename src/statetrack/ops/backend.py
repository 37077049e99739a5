"""What a backend is, and how its functions become operators that torch.compile leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
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
        decodes: it has an algorithm of its own for one token; "auto" replaces those without by the plain formula.
    """

    name: str
    supports: Callable[[Transition], str | None]
    run: Run
    priority: int = 0
    min_length: int = 1
    decodes: bool = False


def wants_gradient(*inputs: Tensor | None) -> bool:
    """Whether autograd is on and any of the tensors takes part in it."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def register_operator(
    name: str, function: Callable[..., Any], fake: Callable[..., Any], *, mutates: tuple[str, ...] = ()
) -> Callable[..., Any]:
    """Makes an operator of a function, which torch.compile then takes for one opaque call that it traces around.

    `torch.library.custom_op` would do the same, but its first call imports torch's compiler: a second, and 70 MB.

    Args:
        name: of the operator, below `torch.ops.statetrack`.
        function: computes; its annotations become the operator's schema.
        fake: returns empty tensors with the shapes and dtypes of the results, for the same arguments.
        mutates: names of the arguments that the function overwrites.
    """
    qualified = f"statetrack::{name}"
    torch.library.define(qualified, torch.library.infer_schema(function, mutates_args=mutates))
    torch.library.impl(qualified, "CompositeExplicitAutograd", function)
    torch.library.register_fake(qualified, fake)
    return getattr(torch.ops.statetrack, name).default
