"""Any automaton is a task: read random letters, say the output of the state after each."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from statetrack.automata import Automaton
from statetrack.automata.algebra import algebraic_class
from statetrack.tasks.task import Batch, EndlessTask, Stream, check_length, check_stream


@dataclass(frozen=True, kw_only=True)
class AutomatonTask(EndlessTask):
    """Tokens are letters of an automaton, drawn independently and uniformly; labels are the outputs after each.

    Attributes:
        automaton: its letters are the tokens, its outputs the labels.
        draws: which letter each of D equally likely draws means in each state, where not all letters are wanted in all
            states: D letters for every state. None if every letter is as likely as every other in every state.
        known_class: the algebraic class, where the maker knows it; otherwise it is computed when it is asked for.
        known_chance: the chance level, where the maker knows it; otherwise it is computed, from a matrix of all states.
    """

    vocab_size: int = field(init=False)
    num_labels: int = field(init=False)
    chance: float = field(init=False)
    automaton: Automaton
    draws: tuple[tuple[int, ...], ...] | None = None
    known_class: str | None = None
    known_chance: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "vocab_size", self.automaton.num_letters)
        object.__setattr__(self, "num_labels", self.automaton.num_outputs)
        chance = _long_run_outputs(self._driver).max() if self.known_chance is None else self.known_chance
        object.__setattr__(self, "chance", float(chance))

    @property
    def algebraic_class(self) -> str:
        return self.known_class or algebraic_class(self.automaton)

    @property
    def num_generators(self) -> int:
        return len(self.automaton.transitions.unique(dim=1).T)

    @property
    def token_names(self) -> tuple[str, ...]:
        return self.automaton.letter_names or super().token_names

    def stream(self, batch_size: int, generator: torch.Generator, device: torch.device | str | None = None) -> Stream:
        check_stream(batch_size, generator, device)
        driver = self._driver.to(generator.device)
        return AutomatonStream(driver, self._letters_on(generator.device), batch_size, generator)

    @cached_property
    def _driver(self) -> Automaton:
        """The automaton that reads draws instead of letters."""
        if self.draws is None:
            return self.automaton
        return Automaton(
            self.automaton.transitions.gather(1, torch.tensor(self.draws)), self.automaton.start, self.automaton.outputs
        )

    def _letters_on(self, device: torch.device) -> Tensor | None:
        """`draws` as a table [states * draws] on a device; a copy is made once for each device and kept."""
        if self.draws is not None and device not in self._letters:
            self._letters[device] = torch.tensor(self.draws, device=device).view(-1)
        return self._letters.get(device)

    @cached_property
    def _letters(self) -> dict[torch.device, Tensor]:
        return {}


class AutomatonStream(Stream):
    """Words that an automaton reads on and on.

    On a CPU the tokens depend on the generator's seed and the number of sequences alone, however they are cut into
    segments. On a GPU they depend on the cuts too, as every draw there starts a new part of the random stream.

    Args:
        driver: what reads the draws.
        letters: the letter that a draw means in a state, int64 [states * draws]; None if a draw is a letter.
        batch_size: how many words.
        generator: decides the draws.
    """

    def __init__(self, driver: Automaton, letters: Tensor | None, batch_size: int, generator: torch.Generator) -> None:
        self._driver = driver
        self._letters = letters
        self._generator = generator
        self._state = torch.full((batch_size,), driver.start, device=driver.device)

    def next(self, length: int) -> Batch:
        check_length(length)
        # Drawn time first, so that the numbers of a segment follow those of the one before.
        draws = torch.randint(
            self._driver.num_letters, (length, len(self._state)), generator=self._generator, device=self._driver.device
        )
        states = self._driver.run_time_first(draws, self._state)
        letters = draws
        if self._letters is not None:
            before = torch.cat([self._state.unsqueeze(0), states[:-1]])
            places = torch.add(draws, before, alpha=self._driver.num_letters)
            letters = self._letters.index_select(0, places.view(-1)).view_as(draws)
        # A copy, as a view of the last row would keep all the rows in memory.
        self._state = states[-1].clone()
        ids = letters.T.contiguous()
        return Batch(ids, self._driver.outputs.index_select(0, states.T.reshape(-1)).view_as(ids))


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
