"""Long sequences without drift: every so many tokens, the state is set back on one that the model knows from short words.

A trained model tracks a state by matrices that are nearly, not exactly, those of a finite machine. Each token adds a
small error, and no matrix of norm 1 takes one away: they add up until an answer is wrong, and so are the ones after it.
`learn_states` finds the states that short words lead to and that the model's own answers tell apart; a
`StabilizedModel` replaces its recurrent state by the nearest of them every `interval` tokens. Only the model is asked:
it takes no labels and no automaton.

The search goes through all words, shortest first, and merges states that give the same answers to what may come next,
as the extraction of automata from recurrent networks does (Omlin and Giles, 1996; arXiv 1711.09576). With an interval
of 1 the model is the machine that was found, and `theory.verify` may prove it right at every length. With a longer
interval the recurrence does the work, and the correction undoes what has drifted in `interval` tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from statetrack import seeds
from statetrack.model import LanguageModel, ModelConfig, ModelState

INTERVAL = 256
"""Tokens from one correction to the next."""

LENGTH = 40
"""Length of the random words that the states found must explain."""

AGREEMENT = 0.99
"""Share of the model's answers on these words that they must explain."""

MAX_STATES = 2_000
MAX_QUESTIONS = 4_096
"""Words of next letters that a state may be asked for its answers to."""

_SAMPLES = 256
_ROWS = 8_192


class StabilizationError(ValueError):
    """A model that can't be stabilized, and why."""


@dataclass(frozen=True, eq=False)
class KnownStates:
    """States that short words lead to, one for each set of answers; the first is the one before any token.

    Attributes:
        state: that of the model after the shortest word that leads to each, with n rows.
        questions: all words of `depth` letters, int64 [letters^depth, depth].
        logits: those of each state at every letter of every question: float32 [n, F].
        transitions: the state that each letter leads to, int64 [n, letters].
        answers: the class that the model says at each letter in each state, int64 [n, letters].
        agreement: share of the model's answers on random words of `LENGTH` letters that this machine gives as well.
    """

    state: ModelState
    questions: Tensor
    logits: Tensor
    transitions: Tensor
    answers: Tensor
    agreement: float

    def __len__(self) -> int:
        return len(self.logits)

    @property
    def depth(self) -> int:
        """How many next letters tell the states apart."""
        return self.questions.shape[1]

    def nearest(self, model: LanguageModel, state: ModelState) -> Tensor:
        """The known state whose logits on the questions are nearest to those of each row of a state: int64 [B].

        States are compared by what the output layer can see of them. Their own coordinates are a poor measure: heads
        that no answer depends on are free to hold anything, such as the last few tokens.
        """
        logits = _logits(model, state, self.questions)
        return torch.cdist(logits, self.logits, compute_mode="use_mm_for_euclid_dist").argmin(1)

    def select(self, rows: Tensor) -> ModelState:
        """The known states of these numbers, as a state with one row for each."""
        return _select(self.state, rows)


@torch.inference_mode()
def learn_states(model: LanguageModel) -> KnownStates:
    """The states that the answers of a model tell apart, found by asking it alone.

    States are asked for their answers to one next letter, and if the machine that results does not explain the model's
    answers to random words, to two, and so on.

    Args:
        model: in evaluation mode.

    Raises:
        StabilizationError: if the state grows with the number of tokens, as that of attention does; if there are more
            than `MAX_STATES` states; or if they do not explain the model's answers: it then is wrong on short words
            too, or it has learned something else than a finite machine.
    """
    model_state = model.init_state(1)
    letters = model.config.vocab_size
    device = model.embedding.weight.device
    one = model.scan(torch.zeros(1, 1, dtype=torch.long, device=device), model_state)[1]
    if _shapes(one) != _shapes(model_state):
        raise StabilizationError(
            "the state of this model grows with every token, so that there is no finite set of states to keep it on; "
            "stabilize models without attention"
        )
    why = ""
    for depth in range(1, 64):
        if depth > 1 and letters**depth > MAX_QUESTIONS:
            break
        found = _search(model, depth)
        if found is None:
            why = f"short words lead it to more than {MAX_STATES:,} states that answer differently"
            break  # deeper questions tell apart what these do
        if found.agreement >= AGREEMENT:
            return found
        why = f"the {len(found)} states found explain {found.agreement:.1%} of its answers to words of {LENGTH} letters"
        if letters == 1 and depth >= MAX_STATES:
            break
    raise StabilizationError(f"this model is no finite machine on short words: {why}; train it further")


def _search(model: LanguageModel, depth: int) -> KnownStates | None:
    """Breadth first; None if there are more than `MAX_STATES` states."""
    letters, device = model.config.vocab_size, model.embedding.weight.device
    alphabet = torch.arange(letters, device=device)
    questions = torch.cartesian_prod(*[alphabet] * depth).view(-1, depth)
    classes = model.output_size

    def signatures(logits: Tensor) -> list[bytes]:
        return [row.tobytes() for row in logits.unflatten(1, (-1, classes)).argmax(-1).int().cpu().numpy()]

    frontier = model.init_state(1)
    frontier_logits = _logits(model, frontier, questions)
    number = {signatures(frontier_logits)[0]: 0}
    states, logits, transitions = [frontier], [frontier_logits], []
    while len(frontier_logits):
        count = len(frontier_logits)
        following = _after(model, frontier, alphabet)
        their_logits = _logits(model, following, questions)
        fresh, targets = [], []
        for row, signature in enumerate(signatures(their_logits)):
            if signature not in number:
                number[signature] = len(number)
                fresh.append(row)
            targets.append(number[signature])
        if len(number) > MAX_STATES:
            return None
        transitions.append(torch.tensor(targets, device=device).view(count, letters))
        rows = torch.tensor(fresh, dtype=torch.long, device=device)
        frontier, frontier_logits = _select(following, rows), their_logits[rows]
        states.append(frontier)
        logits.append(frontier_logits)
    state = [{name: torch.cat([s[i][name] for s in states]) for name in states[0][i]} for i in range(len(states[0]))]
    all_logits, table = torch.cat(logits), torch.cat(transitions)
    # The first letter of the questions runs slowest: every letter's first occurrence is a stride away from the next.
    first = all_logits.view(len(table), letters, -1, depth, classes)[:, :, 0, 0].argmax(-1)
    return KnownStates(state, questions, all_logits, table, first, _agreement(model, table, first))


def _agreement(model: LanguageModel, transitions: Tensor, answers: Tensor) -> float:
    """How often a machine gives the answers of a model, on random words."""
    random = seeds.generator("words that states must explain", 0)
    ids = torch.randint(transitions.shape[1], (_SAMPLES, LENGTH), generator=random).to(transitions.device)
    said = model.scan(ids)[0].argmax(-1)
    position, right = torch.zeros_like(ids[:, 0]), 0
    for letter, answer in zip(ids.unbind(1), said.unbind(1), strict=True):
        right += int((answers[position, letter] == answer).sum())
        position = transitions[position, letter]
    return right / ids.numel()


def _after(model: LanguageModel, state: ModelState, alphabet: Tensor) -> ModelState:
    """The state after each letter, for each row of a state: row times letters rows, the letter runs fastest."""
    count, letters = _count(state), len(alphabet)
    rows = torch.arange(count, device=alphabet.device).repeat_interleave(letters)
    parts = []
    for part in rows.split(_ROWS):
        offset = sum(_count(done) for done in parts)
        ids = alphabet[torch.arange(offset, offset + len(part), device=alphabet.device) % letters]
        parts.append(model.scan(ids.unsqueeze(1), _select(state, part))[1])
    return [{name: torch.cat([p[i][name] for p in parts]) for name in layer} for i, layer in enumerate(parts[0])]


def _logits(model: LanguageModel, state: ModelState, questions: Tensor) -> Tensor:
    """The logits at every letter of every question, for each row of a state: float32 [B, F]."""
    parts = []
    step = max(1, _ROWS // len(questions))
    for rows in torch.arange(_count(state), device=questions.device).split(step):
        ids = questions.repeat(len(rows), 1)
        logits, _ = model.scan(ids, _select(state, rows.repeat_interleave(len(questions))))
        parts.append(logits.float().reshape(len(rows), -1))
    if not parts:
        return torch.empty(0, questions.numel() * model.output_size, device=questions.device)
    return torch.cat(parts)


def _count(state: ModelState) -> int:
    return len(next(iter(state[0].values())))


def _shapes(state: ModelState) -> list[dict[str, torch.Size]]:
    return [{name: tensor.shape for name, tensor in layer.items()} for layer in state]


def _select(state: ModelState, rows: Tensor) -> ModelState:
    return [{name: tensor[rows] for name, tensor in layer.items()} for layer in state]


class StabilizedModel:
    """A model that is set back on a state that it knows every `interval` tokens; it takes the place of the model.

    Its state is that of the model and, last, the tokens since each row was corrected, so that sequences may be read in
    segments of any length.

    Attributes:
        model: the model.
        known: the states that it is kept on.
        interval: tokens from one correction to the next.

    Args:
        model: in evaluation mode.
        known: what `learn_states` found for it, in the same dtype; None to find it now.
        interval: tokens from one correction to the next, short enough for the model to be right in between, wherever it
            starts: at most the length up to which it is.

    Raises:
        StabilizationError: see `learn_states`.
        ValueError: for an interval below 1.
    """

    def __init__(self, model: LanguageModel, known: KnownStates | None = None, *, interval: int = INTERVAL) -> None:
        if interval < 1:
            raise ValueError(f"the interval of corrections must be at least 1 token, got {interval}")
        self.model = model
        self.known = learn_states(model) if known is None else known
        self.interval = interval

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    def init_state(self, batch_size: int) -> ModelState:
        """The state before the first token."""
        since = torch.zeros(batch_size, dtype=torch.long, device=self.model.embedding.weight.device)
        return [*self.model.init_state(batch_size), {"since": since}]

    def scan(
        self, ids: Tensor, state: ModelState | None = None, *, positions: Tensor | None = None
    ) -> tuple[Tensor, ModelState]:
        """Logits and the state after the last token; the arguments are those of `LanguageModel.scan`."""
        *inner, counter = self.init_state(len(ids)) if state is None else state
        since, length = counter["since"], ids.shape[1]
        if positions is None:
            positions = torch.arange(length, device=ids.device)
        logits = self.model.output_weight.new_empty(len(ids), len(positions), self.model.output_size)
        done = 0
        while done < length:
            size = min(self.interval - int(since.max()), length - done)
            here = ((positions >= done) & (positions < done + size)).nonzero().squeeze(1)
            piece, inner = self.model.scan(ids[:, done : done + size], inner, positions=positions[here] - done)
            logits[:, here] = piece.to(logits.dtype)
            since = since + size
            due = (since == self.interval).nonzero().squeeze(1)
            if len(due):
                inner = self._corrected(inner, due)
                since = since.index_fill(0, due, 0)
            done += size
        return logits, [*inner, {"since": since}]

    def step(self, ids: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        """One token: ids [B] -> logits [B, output_size] and the next state."""
        logits, state = self.scan(ids.unsqueeze(-1), state)
        return logits.squeeze(1), state

    def _corrected(self, state: ModelState, rows: Tensor) -> ModelState:
        known = self.known.select(self.known.nearest(self.model, _select(state, rows)))
        return [
            {name: tensor.index_copy(0, rows, replacement[name].to(tensor.dtype)) for name, tensor in layer.items()}
            for layer, replacement in zip(state, known, strict=True)
        ]
