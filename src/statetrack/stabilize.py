"""Long sequences without drift: every so many tokens the state is set back on one that short words lead to.

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
from statetrack.automata import Automaton
from statetrack.model import LanguageModel, ModelConfig, ModelState

MAX_INTERVAL = 256
"""Most tokens from one correction to the next, unless the user says otherwise."""

MARGIN = 4
"""A model must keep to its states for so many times the interval."""

LENGTH = 16
"""Length of the random words that the states found must explain."""

AGREEMENT = 0.99
"""Share of the model's answers on these words that they must explain."""

MAX_DEPTH = 12
MAX_QUESTIONS = 32
"""Words of next letters that a state is asked for its answers to: all of a length, or so many random ones."""

MAX_ANSWERS = 1_000_000
"""Answers that are looked at, at most, to find the states."""

_SAMPLES = 256
_STEADY_SAMPLES = 64
_ROWS = 1_024


class StabilizationError(ValueError):
    """A model that can't be stabilized, and why."""


@dataclass(frozen=True, eq=False)
class KnownStates:
    """States that short words lead to, one for each set of answers; the first is the one before any token.

    Attributes:
        state: that of the model after the shortest word that leads to each, with n rows.
        questions: words of `depth` letters, int64 [Q, depth].
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


@torch.no_grad()
def learn_states(model: LanguageModel) -> KnownStates:
    """The states that the answers of a model tell apart, found by asking it alone.

    States are asked for their answers to one next letter, and if the machine that results does not explain the model's
    answers to random words, to two, and so on.

    Args:
        model: in evaluation mode.

    Raises:
        StabilizationError: if the state grows with the number of tokens, as that of attention does; if finding all
            states takes more than `MAX_ANSWERS`; or if they do not explain the model's answers: it then drifts within a
            few tokens, or it has learned something else than a finite machine.
    """
    start = model.init_state(1)
    _, following = model.scan(torch.zeros(1, 1, dtype=torch.long, device=model.embedding.weight.device), start)
    if _shapes(start) != _shapes(following):
        raise StabilizationError(
            "the state of this model grows with every token, so that there is no finite set of states to keep it on; "
            "stabilize models without attention"
        )
    why = ""
    for depth in range(1, MAX_DEPTH + 1):
        found = _search(model, depth)
        if found is None:  # longer questions tell apart what these do
            why = why or "short words lead it to more states that answer differently than can be looked at"
            break
        if found.agreement >= AGREEMENT:
            return found
        why = f"the {len(found)} states found explain {found.agreement:.1%} of its answers to words of {LENGTH} letters"
    raise StabilizationError(f"this model is no finite machine on short words: {why}; train it further")


@torch.no_grad()
def steady_length(model: LanguageModel, known: KnownStates, *, limit: int = MARGIN * MAX_INTERVAL) -> int:
    """The largest power of 2 up to which a model keeps to its known states on random words; 0 if it never does.

    Up to there all its answers must be those that the known states give, and the state nearest to its own the one that
    the word leads to.

    Args:
        model: in evaluation mode.
        known: what `learn_states` found for it.
        limit: where to stop looking, a power of 2.
    """
    random = seeds.generator("words that a model keeps to its states on", 0)
    letters, device = known.transitions.shape[1], known.transitions.device
    state, reached = model.init_state(_STEADY_SAMPLES), torch.zeros(_STEADY_SAMPLES, dtype=torch.long, device=device)
    length, following = 0, 1
    while following <= limit:
        ids = torch.randint(letters, (_STEADY_SAMPLES, following - length), generator=random).to(device)
        logits, state = model.scan(ids, state)
        answers, reached = _run(known.transitions, known.answers, ids, reached)
        if not torch.equal(logits.argmax(-1), answers) or not torch.equal(known.nearest(model, state), reached):
            break
        length, following = following, 2 * following
    return length


def _search(model: LanguageModel, depth: int) -> KnownStates | None:
    """Breadth first; None if that takes too many answers."""
    letters, device = model.config.vocab_size, model.embedding.weight.device
    questions = _questions(letters, depth).to(device)

    def signatures(logits: Tensor) -> list[bytes]:
        return [row.tobytes() for row in logits.unflatten(1, (-1, model.output_size)).argmax(-1).int().cpu().numpy()]

    frontier = model.init_state(1)
    frontier_logits = _logits(model, frontier, questions)
    number = {signatures(frontier_logits)[0]: 0}
    states, logits, transitions, answers = [frontier], [frontier_logits], [], []
    while rows := len(frontier_logits):
        if len(number) * letters * len(questions) > MAX_ANSWERS:
            return None
        said, following = _after(model, frontier)
        their_logits = _logits(model, following, questions)
        fresh, targets = [], []
        for row, signature in enumerate(signatures(their_logits)):
            if signature not in number:
                number[signature] = len(number)
                fresh.append(row)
            targets.append(number[signature])
        transitions.append(torch.tensor(targets, device=device).view(rows, letters))
        answers.append(said.view(rows, letters))
        chosen = torch.tensor(fresh, dtype=torch.long, device=device)
        frontier, frontier_logits = _select(following, chosen), their_logits[chosen]
        states.append(frontier)
        logits.append(frontier_logits)
    table, machine = torch.cat(transitions), torch.cat(answers)
    return KnownStates(_cat(states), questions, torch.cat(logits), table, machine, _agreement(model, table, machine))


def _questions(letters: int, depth: int) -> Tensor:
    """All words of a length, or where those are too many, random ones: int64 [Q, depth]."""
    if letters**depth <= MAX_QUESTIONS:
        return torch.cartesian_prod(*[torch.arange(letters)] * depth).view(-1, depth)
    random = seeds.generator("questions", depth)
    return torch.randint(letters, (MAX_QUESTIONS, depth), generator=random)


def _agreement(model: LanguageModel, transitions: Tensor, answers: Tensor) -> float:
    """How often a machine gives the answers of a model, on random words."""
    random = seeds.generator("words that states must explain", 0)
    ids = torch.randint(transitions.shape[1], (_SAMPLES, LENGTH), generator=random).to(transitions.device)
    expected, _ = _run(transitions, answers, ids, torch.zeros_like(ids[:, 0]))
    return float((model.scan(ids)[0].argmax(-1) == expected).double().mean())


def _run(transitions: Tensor, answers: Tensor, ids: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """The answers [B, T] of a machine to words [B, T] from states [B], and the states [B] after them."""
    reached = Automaton(transitions, 0, torch.arange(len(transitions), device=ids.device)).run(ids, start)
    before = torch.cat([start.unsqueeze(1), reached[:, :-1]], 1)
    return answers[before, ids], reached[:, -1]


def _after(model: LanguageModel, state: ModelState) -> tuple[Tensor, ModelState]:
    """The answer to each letter and the state after it, for each row of a state; the letter runs fastest."""
    letters, device = model.config.vocab_size, model.embedding.weight.device
    said, parts = [], []
    for rows in torch.arange(_count(state), device=device).split(max(1, _ROWS // letters)):
        ids = torch.arange(letters, device=device).repeat(len(rows)).unsqueeze(1)
        logits, after = model.scan(ids, _select(state, rows.repeat_interleave(letters)))
        said.append(logits[:, 0].argmax(-1))
        parts.append(after)
    return torch.cat(said), _cat(parts)


def _logits(model: LanguageModel, state: ModelState, questions: Tensor) -> Tensor:
    """The logits at every letter of every question, for each row of a state: float32 [B, F]."""
    parts = []
    step = max(1, _ROWS // len(questions))
    for rows in torch.arange(_count(state), device=questions.device).split(step):
        ids = questions.repeat(len(rows), 1)
        logits, _ = model.scan(ids, _select(state, rows.repeat_interleave(len(questions))))
        parts.append(logits.float().reshape(len(rows), -1))
    return torch.cat(parts)


def _count(state: ModelState) -> int:
    return len(next(iter(state[0].values())))


def _shapes(state: ModelState) -> list[dict[str, torch.Size]]:
    return [{name: tensor.shape for name, tensor in layer.items()} for layer in state]


def _cat(states: list[ModelState]) -> ModelState:
    return [{name: torch.cat([state[i][name] for state in states]) for name in x} for i, x in enumerate(states[0])]


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
        interval: tokens from one correction to the next; if None, the model's `steady_length` over `MARGIN`, at least 1
            and at most `MAX_INTERVAL`.
        known: what `learn_states` found for this model, in this dtype; None to find it now.

    Raises:
        StabilizationError: see `learn_states`.
        ValueError: for an interval below 1.
    """

    def __init__(self, model: LanguageModel, interval: int | None = None, *, known: KnownStates | None = None) -> None:
        if interval is not None and interval < 1:
            raise ValueError(f"the interval of corrections must be at least 1 token, got {interval}")
        self.model = model
        self.known = learn_states(model) if known is None else known
        self.interval = interval or max(1, steady_length(model, self.known) // MARGIN)

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    def init_state(self, batch_size: int) -> ModelState:
        """The state before the first token."""
        since = torch.zeros(batch_size, dtype=torch.long, device=self.model.embedding.weight.device)
        return [*self.model.init_state(batch_size), {"since": since}]

    @torch.no_grad()
    def scan(
        self, ids: Tensor, state: ModelState | None = None, *, positions: Tensor | None = None
    ) -> tuple[Tensor, ModelState]:
        """Logits and the state after the last token, without gradients; arguments as those of `LanguageModel.scan`."""
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
                corrected = self.correct(_select(inner, due))
                inner = [
                    {name: x.index_copy(0, due, y[name].to(x.dtype)) for name, x in layer.items()}
                    for layer, y in zip(inner, corrected, strict=True)
                ]
                since = since.index_fill(0, due, 0)
            done += size
        return logits, [*inner, {"since": since}]

    def correct(self, state: ModelState) -> ModelState:
        """The known state nearest to each row of a state of the model."""
        return self.known.select(self.known.nearest(self.model, state))

    def step(self, ids: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        """One token: ids [B] -> logits [B, output_size] and the next state."""
        logits, state = self.scan(ids.unsqueeze(-1), state)
        return logits.squeeze(1), state
