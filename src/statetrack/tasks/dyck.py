"""Well-nested brackets of any depth, the Dyck language: what needs a stack."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from statetrack.tasks.bounded_dyck import CLOSING, OPENING
from statetrack.tasks.task import Batch, EndlessTask, Stream, TaskFamily, check_length, check_stream, read_numbers

DESCRIPTION = "K kinds of brackets, nested without limit; the label is the kind that must close next, 0 if none is open"


@dataclass(frozen=True, kw_only=True)
class Dyck(EndlessTask):
    """Prefixes of Dyck words: after every token one closes or opens with equal chances, and opens if none is open.

    The depth is the distance from 0 of a random walk, and so grows like the square root of the length. Tokens are the
    K opening brackets, then the K closing ones.

    Attributes:
        kinds: K, of brackets.
    """

    name: str = field(init=False)
    description: str = DESCRIPTION
    vocab_size: int = field(init=False)
    num_labels: int = field(init=False)
    chance: float = field(init=False)
    kinds: int

    def __post_init__(self) -> None:
        values = {
            "name": f"dyck:{self.kinds}",
            "vocab_size": 2 * self.kinds,
            "num_labels": self.kinds + 1,
            "chance": 1 / self.kinds,  # in the long run some bracket is open
        }
        for key, value in values.items():
            object.__setattr__(self, key, value)

    @property
    def token_names(self) -> tuple[str, ...]:
        return tuple(OPENING[: self.kinds] + CLOSING[: self.kinds])

    @property
    def algebraic_class(self) -> str:
        return f"context-free: {'bicyclic' if self.kinds == 1 else 'polycyclic'} monoid, infinite"

    @property
    def num_generators(self) -> int:
        return 2 * self.kinds

    def stream(self, batch_size: int, generator: torch.Generator, device: torch.device | str | None = None) -> Stream:
        check_stream(batch_size, generator, device)
        return _DyckStream(self.kinds, batch_size, generator)


class _Brackets(NamedTuple):
    """Brackets in order of the level that they open or close, and in order of time within a level.

    Opening and closing ones alternate within a level, so that the last of a level that is open is the one that opened
    it.

    Attributes:
        keys: level * span + time, in increasing order: int64 [B, N].
        kinds: of the brackets in that order, int64 [B, N].
        span: more than any time.
    """

    keys: Tensor
    kinds: Tensor
    span: int

    def opened(self, levels: Tensor, times: Tensor | int) -> Tensor:
        """The kind of the bracket that last opened the levels, open at the times: int64 as `levels`."""
        found = torch.searchsorted(self.keys, levels * self.span + times, right=True) - 1
        return self.kinds.gather(1, found.clamp(min=0))


class _DyckStream(Stream):
    """Brackets on and on; between segments the open ones are kept."""

    def __init__(self, kinds: int, batch_size: int, generator: torch.Generator) -> None:
        self._kinds = kinds
        self._generator = generator
        self._walk = torch.zeros(batch_size, dtype=torch.int64, device=generator.device)
        self._brackets: _Brackets | None = None

    def next(self, length: int) -> Batch:
        check_length(length)
        there, kinds, walk = self._generator.device, self._kinds, self._walk
        stack = self._stack()
        # Drawn time first, so that the numbers of a segment follow those of the one before.
        draws = torch.randint(2 * kinds, (length, len(walk)), generator=self._generator, device=there).T
        path = torch.cat([walk[:, None], walk[:, None] + (draws >= kinds).long().mul(2).sub(1).cumsum(1)], 1)
        depths = path.abs()
        before, after = depths[:, :-1], depths[:, 1:]

        # The open brackets stand for all that was before, at time 0.
        span = length + 1
        levels = torch.arange(1, stack.shape[1] + 1, device=there).expand_as(stack)
        times = torch.arange(1, span, device=there)
        keys, order = torch.cat([levels * span, torch.maximum(before, after) * span + times], 1).sort(1)
        brackets = _Brackets(keys, torch.cat([stack, draws % kinds], 1).gather(1, order), span)

        closing = brackets.opened(before, times - 1)
        ids = torch.where(after > before, draws % kinds, kinds + closing)
        labels = torch.where(after > 0, brackets.opened(after, times.expand_as(after)) + 1, 0)
        self._walk, self._brackets = path[:, -1].clone(), brackets
        return Batch(ids, labels)

    def _stack(self) -> Tensor:
        """The kinds of the open brackets from the outermost on, [B, depth]; beyond a sequence's own depth anything."""
        if self._brackets is None:
            return self._walk.new_zeros(len(self._walk), 0)
        levels = torch.arange(1, int(self._walk.abs().max()) + 1, device=self._walk.device)
        return self._brackets.opened(levels.repeat(len(self._walk), 1), self._brackets.span - 1)


def _make(argument: str) -> Dyck:
    (kinds,) = read_numbers(argument, "dyck", {"K": (1, len(OPENING))}, "2")
    return Dyck(kinds=kinds)


TASK = TaskFamily(name="dyck", argument="K", description=DESCRIPTION, example="dyck:2", make=_make)
