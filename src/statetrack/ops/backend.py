"""What a backend is, and how its functions become operators that torch.compile leaves alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from statetrack.ops.triton_ahead import Then, foreseen
from statetrack.transition import Transition

Forward = TypeVar("Forward", bound=Callable[..., Any])


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
        run_high: the computation where `precision` is "high"; None if `run` rounds to nothing shorter than float32.
    """

    name: str
    supports: Callable[[Transition], str | None]
    run: Run
    priority: int = 0
    min_length: int = 1
    decodes: bool = False
    run_high: Run | None = None


def with_signature(forward: Forward) -> Forward:
    """Has the `forward` of an `autograd.Function` with a `setup_context` carry its signature.

    PyTorch asks `inspect.signature` for it at every call, which finds it there, or else makes it anew.
    """
    forward.__signature__ = inspect.signature(forward)  # pyright: ignore[reportFunctionMemberAccess]
    return forward


def wants_gradient(*inputs: Tensor | None) -> bool:
    """Whether autograd is on and any of the tensors takes part in it."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def distinct(inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The tensors, with a view of its own for each that is there a second time.

    Of one tensor given twice to an autograd function, torch.compile of torch 2.11 loses a gradient without a word, and
    that of torch 2.13 refuses it.
    """
    found: list[Tensor | None] = []
    for x in inputs:
        again = x is not None and any(x is other for other in found)
        found.append(x.view_as(x) if x is not None and again else x)
    return found


class _Refusal(torch.autograd.Function):
    """Hands on `count` gradients, which are then functions of the tensors after them, and refuses to derive them."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tensors[:count]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> Any:
        raise RuntimeError(
            "gradients of gradients are not computed by this backend: ask for them with backend='reference'"
        )


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates the backward of an autograd function that is written by hand: differentiating it again is an error.

    The gradients themselves may be asked for with `create_graph=True`; only a derivative of theirs raises RuntimeError.
    """

    @wraps(backward)
    def once(ctx: Any, *grad_outputs: Tensor | None) -> Any:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return backward(ctx, *grad_outputs)
        with torch.no_grad():
            gradients = backward(ctx, *grad_outputs)
        sources = [x for x in (*ctx.saved_tensors, *grad_outputs) if x is not None and x.requires_grad]
        return _Refusal.apply(len(gradients), *gradients, *sources) if sources else gradients

    return once


def register_operator(
    name: str,
    function: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    mutates: tuple[str, ...] = (),
    then: Then | None = None,
) -> Callable[..., Any]:
    """Makes an operator of a function, which torch.compile then takes for one opaque call that it traces around.

    `torch.library.custom_op` would do the same, but its first call imports torch's compiler: a second, and 70 MB.

    Args:
        name: of the operator, below `torch.ops.statetrack`.
        function: computes; its annotations become the operator's schema.
        fake: returns empty tensors with the shapes and dtypes of the results, for the same arguments.
        mutates: names of the arguments that the function overwrites.
        then: calls the function of the operator's backward, given the results and the arguments; of use to Triton
            kernels, which are then compiled before they are needed.
    """
    qualified = f"statetrack::{name}"
    torch.library.define(qualified, torch.library.infer_schema(function, mutates_args=mutates))
    computes = function if then is None else foreseen(function, then)
    torch.library.impl(qualified, "CompositeExplicitAutograd", computes)
    torch.library.register_fake(qualified, fake)
    return getattr(torch.ops.statetrack, name).default
