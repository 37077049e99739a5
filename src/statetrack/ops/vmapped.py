"""What `torch.func.vmap` makes of the recurrences: replicas become more rows or more heads of one call.

A recurrence is independent over batch and heads. So R replicas of it, each with its own inputs, are one recurrence with
R times as many rows where every tensor has a batch axis, which costs nothing, and with R times as many heads where a
tensor has none because it is a parameter (the rates A of Mamba, the recurrent matrices of sLSTM).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from statetrack.ops.backend import with_signature
from statetrack.precision import product_dtype
from statetrack.transition import Discretized, Transition

Recurrence = Callable[[Transition, Tensor, Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor]]


def is_vmapped() -> bool:
    """Whether the caller runs inside a transform of `torch.func`."""
    # autograd.Function asks the same before every call. The compiler has vmapped whatever it traces by itself.
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def vmapped_recurrence(
    recurrence: Recurrence,
    transition: Transition,
    q: Tensor,
    v: Tensor,
    write: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`recurrence` of all replicas at once; shapes are those of one replica."""
    named = transition.tensors()
    given = {"q": q, "v": v, "write": write, "initial_state": initial_state}
    names = [*(name for name, x in given.items() if x is not None), *named]
    # Where heads are, on the first axis of parameters and the third of what there is for every token. None: fold rows.
    heads = {"A": 0, "lower_end": 0, "initial_state": 1} if isinstance(transition, Discretized) else None

    def folded(replicas: int, moved: list[Tensor]) -> tuple[Tensor, Tensor]:
        x = {
            name: tensor.flatten(0, 1) if heads is None else _into_axis(tensor, heads.get(name, 2))
            for name, tensor in zip(names, moved, strict=True)
        }
        whole = replace(transition, **{name: x[name] for name in named})
        o, state = recurrence(whole, x["q"], x["v"], x.get("write"), x.get("initial_state"))
        if heads is None:
            return o.unflatten(0, (replicas, -1)), state.unflatten(0, (replicas, -1))
        return o.unflatten(2, (replicas, -1)).movedim(2, 0), state.unflatten(1, (replicas, -1)).movedim(1, 0)

    inputs = [*(x for x in given.values() if x is not None), *named.values()]
    return _Vmapped.apply(folded, *inputs)  # type: ignore[no-any-return]


def vmapped(function: Callable[..., Any], *inputs: Tensor | None) -> Any:
    """A function of tensors with replicas on their first axis or, if it does the same to all, with any first axes."""
    return _Vmapped.apply(lambda replicas, moved: function(*moved), *inputs)


def vmapped_over_heads(function: Callable[..., Any], axes: list[int], *inputs: Tensor) -> Any:
    """A function of tensors with heads on the axes given, of all replicas at once; heads are axis 1 of its results."""

    def folded(replicas: int, moved: list[Tensor]) -> Any:
        results = function(*(_into_axis(x, axis) for x, axis in zip(moved, axes, strict=True)))
        return tree_map(lambda x: x.unflatten(1, (replicas, -1)).movedim(1, 0), results)

    return _Vmapped.apply(folded, *inputs)


class LinearLayersTogether(TorchFunctionMode):
    """Inside it `F.linear` of replicas is one batched product, whose gradient of the weight is computed in parts.

    That gradient is a sum over all tokens of a batch. For one model cuBLAS divides it among the processors of a GPU;
    for a batch of products it does not: with three models of 128 channels that took half of a training step.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.linear or not is_vmapped():
            return func(*args, **(kwargs or {}))
        return _linear(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    dtype = product_dtype(input)

    def folded(replicas: int, moved: list[Tensor]) -> Tensor:
        x, w = moved
        return _Products.apply(x.flatten(1, -2).to(dtype), w).unflatten(1, x.shape[1:-1])  # type: ignore[no-any-return]

    y: Tensor = _Vmapped.apply(folded, input, weight)
    return y if bias is None else y + bias.to(dtype)


class _Products(torch.autograd.Function):
    """[R, n, I], [R, O, I] -> [R, n, O], in the dtype of the first; autocast must have no part in it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight_dtype, weight = weight.dtype, weight.to(x.dtype)
        ctx.save_for_backward(x, weight)
        return x @ weight.mT

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        (d_y,) = grad_outputs
        x, weight = ctx.saved_tensors
        parts = next(parts for parts in (16, 8, 4, 2, 1) if x.shape[1] % parts == 0)
        d_parts = d_y.unflatten(1, (parts, -1)).mT @ x.unflatten(1, (parts, -1))
        return d_y @ weight, d_parts.sum(1, dtype=ctx.weight_dtype)


def replicas_first(info: Any, in_dims: Sequence[int | None], inputs: Sequence[Tensor | None]) -> list[Any]:
    """What a rule for vmap is given, with the replicas of every tensor on a first axis; None stays."""
    return [
        x if x is None else x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip(inputs, in_dims, strict=True)
    ]


def _into_axis(x: Tensor, axis: int) -> Tensor:
    """[R, ..., H, ...] as [..., R H, ...], where H is the given axis of one replica."""
    return x.movedim(0, axis).flatten(axis, axis + 1)


class _Vmapped(torch.autograd.Function):
    """Calls `folded(R, inputs)` with the replicas of every input on a first axis of their own.

    The rule below is all there is: it runs outside of vmap, where autograd records whatever `folded` does.
    """

    @staticmethod
    @with_signature
    def forward(folded: Any, *inputs: Any) -> Any:
        raise NotImplementedError(
            "of torch.func's transforms the recurrences know vmap alone; use torch.autograd.grad outside of it"
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        raise NotImplementedError  # never reached, but functorch wants it to be there

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        folded, *inputs = args
        results = folded(info.batch_size, replicas_first(info, in_dims[1:], inputs))
        return results, tree_map(lambda _: 0, results)
