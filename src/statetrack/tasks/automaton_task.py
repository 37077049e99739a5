"""Any automaton is a task: read random letters, say the output of the state after each."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from statetrack.automata import Automaton
from statetrack.tasks.task import Batch, Stream, Task, check_length, check_stream


@dataclass(frozen=True)
class AutomatonTask(Task):
    """Tokens are letters of an automaton, each drawn independently and uniformly; labels are the outputs after each.

    Attributes:
        automaton: its letters are the tokens, its outputs the labels.
    """

    vocab_size: int = field(init=False)
    num_labels: int = field(init=False)
    chance: float = field(init=False)
    automaton: Automaton

    def __post_init__(self) -> None:
        object.__setattr__(self, "vocab_size", self.automaton.num_letters)
        object.__setattr__(self, "num_labels", self.automaton.num_outputs)
        object.__setattr__(self, "chance", float(_long_run_outputs(self.automaton).max()))

    @property
    def token_names(self) -> tuple[str, ...]:
        return self.automaton.letter_names or super().token_names

    def stream(
        self, batch_size: int, generator: torch.Generator, device: torch.device | str | None = None
    ) -> AutomatonStream:
        check_stream(batch_size, generator, device)
        return AutomatonStream(self.automaton.to(generator.device), batch_size, generator)


class AutomatonStream(Stream):
    """Words that an automaton reads on and on.

    On a CPU the tokens depend on the generator's seed and the number of sequences alone, however they are cut into
    segments. On a GPU they depend on the cuts too, as every draw there starts a new part of the random stream.
    """

    def __init__(self, automaton: Automaton, batch_size: int, generator: torch.Generator) -> None:
        self._automaton = automaton
        self._generator = generator
        self._state = torch.full((batch_size,), automaton.start, device=automaton.device)

    def next(self, length: int) -> Batch:
        check_length(length)
        # Drawn time first, so that the numbers of a segment follow those of the one before.
        letters = torch.randint(
            self._automaton.num_letters,
            (length, len(self._state)),
            generator=self._generator,
            device=self._automaton.device,
        )
        states = self._automaton.run_time_first(letters, self._state)
        # A copy, as a view of the last row would keep all the rows in memory.
        self._state = states[-1].clone()
        ids = letters.T.contiguous()
        return Batch(ids, self._automaton.outputs.index_select(0, states.T.reshape(-1)).view_as(ids))


def _long_run_outputs(automaton: Automaton) -> Tensor:
    """How often each output is the right one in long random words: float64 [outputs], its sum is 1."""
    reachable = automaton.reachable()
    if automaton.is_permutation_automaton:
        # Every state has as many ways in as out, so that all reachable ones are visited equally often.
        share = reachable.double() / reachable.sum()
    else:
        share = _long_run_states(automaton.transitions.cpu(), automaton.start)
    return torch.zeros(automaton.num_outputs, dtype=torch.float64).index_add(0, automaton.outputs.cpu(), share.cpu())


def _long_run_states(transitions: Tensor, start: int) -> Tensor:
    """How often each state is visited on average over time: float64 [states].

    Staying put half of the time changes no average but does away with periods, so that the matrix's powers converge.
    """
    states = len(transitions)
    step = torch.zeros(states, states, dtype=torch.float64)
    step.scatter_add_(1, transitions, torch.full(transitions.shape, 1 / transitions.shape[1], dtype=torch.float64))
    power = (torch.eye(states, dtype=torch.float64) + step) / 2
    for _ in range(64):
        square = power @ power
        square /= square.sum(1, keepdim=True)
        if torch.allclose(square, power, rtol=0, atol=1e-14):
            break
        power = square
    return power[start]
