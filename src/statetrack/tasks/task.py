"""What a task is, and what its batches are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

IGNORE = -100
"""The label of a position at which nothing is asked."""


class Batch(NamedTuple):
    """Sequences and what a model should say about them.

    Attributes:
        ids: tokens, int64 [B, T].
        labels: the right answer after each token, or `IGNORE`: int64 [B, T].
    """

    ids: Tensor
    labels: Tensor


class Stream(ABC):
    """A batch of endless sequences, read one segment after the other."""

    @abstractmethod
    def next(self, length: int) -> Batch:
        """The next `length` tokens of every sequence, and their labels.

        Raises:
            ValueError: for a length below 1.
        """


@dataclass(frozen=True)
class Task(ABC):
    """Sequences of any length with a known right answer, drawn on the device that a model is on.

    Attributes:
        name: what `get_task` makes the same task from.
        description: one sentence for people.
        vocab_size: tokens are 0 to vocab_size - 1.
        num_labels: labels are 0 to num_labels - 1, or `IGNORE`.
        chance: the accuracy of the best answer that is the same for every long sequence.
    """

    name: str
    description: str
    vocab_size: int
    num_labels: int
    chance: float

    @property
    def token_names(self) -> tuple[str, ...]:
        """A name for each token, for people."""
        return tuple(str(token) for token in range(self.vocab_size))

    @abstractmethod
    def stream(self, batch_size: int, generator: torch.Generator, device: torch.device | str | None = None) -> Stream:
        """Endless sequences that continue from segment to segment; segments have the distribution of one long sample.

        Args:
            batch_size: how many sequences.
            generator: decides the tokens.
            device: where the batches are; it must be the generator's, which None stands for.

        Raises:
            ValueError: for a batch size below 1, or another device than the generator's.
        """

    def sample(
        self, batch_size: int, length: int, generator: torch.Generator, device: torch.device | str | None = None
    ) -> Batch:
        """A batch of fresh sequences: the first segment of a `stream`.

        Raises:
            ValueError: as `stream` and `Stream.next`.
        """
        return self.stream(batch_size, generator, device).next(length)


@dataclass(frozen=True)
class TaskFamily:
    """The tasks that one file of this folder makes.

    Attributes:
        name: what stands before the colon.
        argument: what stands after it, such as "M"; empty if nothing does.
        description: one sentence for people.
        example: a name that `get_task` takes.
        make: the task for an argument (empty if there is none); raises ValueError for a wrong one.
    """

    name: str
    argument: str
    description: str
    example: str
    make: Callable[[str], Task]

    @property
    def syntax(self) -> str:
        """Such as `modular_addition:M`."""
        return f"{self.name}:{self.argument}" if self.argument else self.name


def check_stream(batch_size: int, generator: torch.Generator, device: torch.device | str | None) -> None:
    """What every `Task.stream` refuses."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if device is None:
        return
    device, there = torch.device(device), generator.device
    if device.type != there.type or device.index not in (None, there.index):
        raise ValueError(
            f"a generator on {there} can't draw sequences on {device}; make one with torch.Generator({str(device)!r})"
        )


def check_length(length: int) -> None:
    """What every `Stream.next` refuses."""
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
