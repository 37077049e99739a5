"""One sequence over the ranks of a process group: each has a piece of it in time, and hands the state on to the next.

    with split_in_time(model, group):
        logits, state = model.scan(local_piece(ids, group))     # rank r has the r-th piece

Rank r computes layer l of its piece when it has the state of that layer from rank r - 1, which then computes layer
l + 1: the ranks go through the model as a wave, L + R - 1 steps for L layers and R ranks where L would do. Only states
travel, a few per layer and in both directions, whatever the length. Nothing is approximated: results are those of one
process that goes from piece to piece, and so are gradients, for every mixer whose state has a constant size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from statetrack.mixers.mixer import Mixer, State
from statetrack.model import Block, LanguageModel
from statetrack.transition import accumulation_dtype


def local_piece(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """This rank's piece of a tensor [B, T, ...]: T is cut into as many pieces as there are ranks, equal to one token.

    Raises:
        ValueError: if there are fewer tokens than ranks.
    """
    ranks = dist.get_world_size(group)
    if x.shape[1] < ranks:
        raise ValueError(f"a sequence over {ranks} ranks needs at least a token for each of them, got {x.shape[1]}")
    return x.tensor_split(ranks, 1)[dist.get_rank(group)]


@torch.no_grad()
def sum_gradients(model: LanguageModel, group: dist.ProcessGroup | None = None) -> None:
    """Adds up the gradients of the parameters over the ranks; before, each rank has those of its own tokens' losses."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad, group=group)


@contextmanager
def split_in_time(model: LanguageModel, group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Inside, `model` takes the rank's piece of every sequence and gets the states before it from the rank before.

    All ranks of the group make the same calls of `forward` or `scan`, each with the batch size of the others; a state
    may be given on the first rank alone, and the one that the last rank returns is that after the whole sequence. Each
    rank's loss is that of its own tokens; all ranks call `backward`, in or after the block.

    Args:
        model: the same weights on every rank.
        group: the ranks, in the order of their pieces; None for all of them.

    Raises:
        ValueError: if a mixer's state grows with the tokens (attention), or activations are checkpointed.
    """
    blocks = [block for block in model.blocks if isinstance(block, Block)]
    for block in blocks:
        if block.mixer.growing:
            raise ValueError(
                "a sequence with attention can't be split in time: its state is all tokens; use mixers whose state has "
                "a constant size"
            )
        if block.checkpoint is not None:
            raise ValueError(
                "a sequence split in time needs its activations: a block computed again would ask for its state again; "
                "turn checkpoint_blocks off"
            )
    link = _Link(group)
    try:
        for block in blocks:
            block.mixer.scan = _HandingOn(block.mixer, link)  # pyright: ignore[reportAttributeAccessIssue]
        yield
    finally:
        for block in blocks:
            vars(block.mixer).pop("scan", None)
        link.finish()


class _Link:
    """Messages to the rank before and the rank after, in the order in which they are sent."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group, rank, ranks = group, dist.get_rank(group), dist.get_world_size(group)
        self.previous = None if rank == 0 else self._global(rank - 1)
        self.next = None if rank == ranks - 1 else self._global(rank + 1)
        self._sent: list[tuple[dist.Work, Tensor]] = []

    def send(self, x: Tensor, to: int) -> None:
        self.finish()
        work = dist.isend(x, to, self.group)
        assert work is not None
        self._sent.append((work, x))  # the tensor must live until it has arrived

    def receive(self, into: Tensor, source: int) -> None:
        dist.recv(into, source, self.group)

    def finish(self) -> None:
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()

    def _global(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)


class _HandingOn:
    """Takes the place of a mixer's `scan`."""

    def __init__(self, mixer: Mixer, link: _Link) -> None:
        self.scan, self.init_state, self.link = mixer.scan, mixer.init_state, link

    def __call__(self, x: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, State]:
        if cu_seqlens is not None:
            raise ValueError("packed or padded sequences can't be split in time: give one sequence a row, without mask")
        link, start = self.link, self.init_state(len(x))
        if link.previous is not None:
            if state is not None:
                raise ValueError("a sequence that is split in time takes its initial state on the first rank alone")
            state = self._receive(start, link.previous)
        y, after = self.scan(x, state)
        if link.next is not None:
            y = self._send(y, {name: after[name].to(tensor.dtype) for name, tensor in start.items()}, link.next)
        return y, after

    def _receive(self, like: State, source: int) -> State:
        """A state with the shapes and dtypes of `like`."""
        state: State = {}
        for floating, names in _by_kind(like).items():
            size = sum(like[name].numel() for name in names)
            buffer = like[names[0]].new_empty(size, dtype=_message_dtype(like, names))
            if floating and torch.is_grad_enabled():
                # Something must ask for a gradient, or there would be no backward that sends it.
                anchor = buffer.new_empty(0, requires_grad=True)
                buffer = _Receive.apply(anchor, buffer, self.link, source)
                assert isinstance(buffer, Tensor)
            else:
                self.link.receive(buffer, source)
            parts = buffer.split([like[name].numel() for name in names])
            state |= {name: x.view_as(like[name]).to(like[name].dtype) for name, x in zip(names, parts, strict=True)}
        return state

    def _send(self, y: Tensor, state: State, to: int) -> Tensor:
        for floating, names in _by_kind(state).items():
            dtype = _message_dtype(state, names)
            buffer = torch.cat([state[name].reshape(-1).to(dtype) for name in names])
            if floating and torch.is_grad_enabled():
                sent = _Send.apply(y, buffer, self.link, to)
                assert isinstance(sent, Tensor)
                y = sent
            else:
                self.link.send(buffer, to)
        return y


def _by_kind(state: State) -> dict[bool, list[str]]:
    """The names of the floating-point tensors, and of the others, where there are any."""
    kinds: dict[bool, list[str]] = {}
    for name, tensor in state.items():
        kinds.setdefault(tensor.is_floating_point(), []).append(name)
    return kinds


def _message_dtype(state: State, names: list[str]) -> torch.dtype:
    tensors = [state[name] for name in names]
    return accumulation_dtype(*tensors) if tensors[0].is_floating_point() else torch.long


class _Receive(torch.autograd.Function):
    """A message from the rank before; its gradient goes back there."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, buffer: Tensor, link: _Link, source: int) -> Tensor:
        ctx.link, ctx.source = link, source
        link.receive(buffer, source)
        ctx.mark_dirty(buffer)
        return buffer

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        ctx.link.send(grad_outputs[0].contiguous(), ctx.source)
        return None, None, None, None


class _Send(torch.autograd.Function):
    """Sends a message to the rank after, and passes `y` on; the gradient of the message comes from there.

    The message itself is no output, so `y` is what the backward comes through.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, buffer: Tensor, link: _Link, to: int) -> Tensor:
        ctx.link, ctx.to = link, to
        ctx.message = buffer.shape, buffer.dtype, buffer.device
        link.send(buffer.detach(), to)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        shape, dtype, device = ctx.message
        gradient = torch.empty(shape, dtype=dtype, device=device)
        ctx.link.receive(gradient, ctx.to)
        return grad_outputs[0], gradient, None, None
