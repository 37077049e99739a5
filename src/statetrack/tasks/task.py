"""What a task is, and what its batches are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from statetrack.cross_entropy import IGNORE as IGNORE  # what its users know as a part of a task


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
    """Sequences with a known right answer, drawn on the device that a model is on.

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
    @abstractmethod
    def algebraic_class(self) -> str:
        """What kind of monoid the tokens generate.

        For a finite automaton "aperiodic monoid", or "abelian", "solvable" or "non-solvable group", or "solvable" or
        "non-solvable monoid" for one with groups in it, after what `automata.algebra` says of its minimal automaton.
        Otherwise in the task's own words.
        """

    @property
    @abstractmethod
    def num_generators(self) -> int | None:
        """How many different maps of the states single tokens (or statements) make; None where there is no such set."""

    @property
    def token_names(self) -> tuple[str, ...]:
        """A name for each token, for people."""
        return tuple(str(token) for token in range(self.vocab_size))

    def fits(self, length: int) -> bool:
        """Whether there are sequences of so many tokens, with a label at the end."""
        return length >= 1

    def with_parts(self) -> Task:
        """The same task, with a label also wherever a part of a sequence ends that has a value, to learn from.

        Raises:
            ValueError: if its sequences have no such parts.
        """
        raise ValueError(f"sequences of the task {self.name} have no parts with labels of their own")

    @abstractmethod
    def sample(
        self, batch_size: int, length: int, generator: torch.Generator, device: torch.device | str | None = None
    ) -> Batch:
        """A batch of fresh sequences.

        Args:
            batch_size: B, how many sequences.
            length: T, how many tokens each has.
            generator: decides the tokens.
            device: where the batch is; it must be the generator's, which None stands for.

        Raises:
            ValueError: for a batch size below 1, a length that no sequence has, or another device than the generator's.
        """


@dataclass(frozen=True)
class EndlessTask(Task):
    """A task whose sequences go on for ever, so that they can be read in segments, in constant memory."""

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
        needs: a package beyond those of statetrack that sampling needs, as `import` spells it; empty if none.
    """

    name: str
    argument: str
    description: str
    example: str
    make: Callable[[str], Task]
    needs: str = ""

    @property
    def syntax(self) -> str:
        """Such as `modular_addition:M`."""
        return f"{self.name}:{self.argument}" if self.argument else self.name


def check_stream(batch_size: int, generator: torch.Generator, device: torch.device | str | None) -> None:
    """What every task refuses."""
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
    """What every stream and every sample refuses."""
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")


def check_fits(task: Task, length: int) -> None:
    """What the `sample` of a task refuses that has sequences of some lengths only."""
    check_length(length)
    if not task.fits(length):
        near = [n for n in range(max(1, length - 64), length + 65) if task.fits(n)]
        nearest = sorted(sorted(near, key=lambda n: abs(n - length))[:2])
        raise ValueError(f"the task {task.name} has no sequences of {length} tokens; near are {nearest}")


def read_numbers(argument: str, name: str, bounds: Mapping[str, tuple[int, int]], example: str) -> list[int]:
    """The numbers in a task's argument, such as the 6, 3 and 0 of "6,3,0".

    Args:
        argument: what stands after the colon.
        name: of the task, for the message.
        bounds: the least and the largest value of each number, by its name.
        example: an argument that is right.

    Raises:
        ValueError: unless it is as many whole numbers within their bounds.
    """
    parts = [part.strip() for part in argument.split(",")]
    if len(parts) == len(bounds) and all(part.isascii() and part.isdecimal() and len(part) < 10 for part in parts):
        numbers = [int(part) for part in parts]
        if all(low <= number <= high for number, (low, high) in zip(numbers, bounds.values(), strict=True)):
            return numbers
    wanted = ", ".join(f"{key} from {low} to {high}" for key, (low, high) in bounds.items())
    raise ValueError(f"{name}:{','.join(bounds)} takes {wanted}, such as {example}; got {argument!r}")
