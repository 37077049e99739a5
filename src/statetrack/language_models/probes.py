"""State tracking in words: questions with a few answers, of which a language model should find the right one likeliest.

The truth is that of `statetrack.tasks`. Every question follows from its probe, length, seed and number alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from statetrack import seeds
from statetrack.data.tokenizer import TextTokenizer
from statetrack.files import atomic_write
from statetrack.language_models.causal import CausalModel
from statetrack.tasks import get_task
from statetrack.tasks.automaton_task import AutomatonTask

EXAMPLE_LENGTH = 16
"""Letters of the worked examples before each question, one for each of its first two answers."""

GROUP = "statetrack_probes"
"""The name under which lm-eval runs all of them."""

_BATCH_TOKENS = 2**14
_LOGITS = 2**26
_BALLS = ("red", "green", "blue")
_SWAPS = {"()": None, "(0 1)": (0, 1), "(1 2)": (1, 2), "(0 2)": (0, 2)}


@dataclass(frozen=True)
class Question:
    """A question: its text, its answers as they follow on the text, and which is right."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Probe:
    """A kind of question.

    Attributes:
        name: on the command line.
        title: for people.
        task: the task whose sequences it puts into words.
        choices: the answers.
        word: puts the tokens [T] of a sequence, and its last label, into words; also draws what is asked.
    """

    name: str
    title: str
    task: str
    choices: tuple[str, ...]
    word: Callable[[list[int], int, torch.Generator], tuple[str, int]]

    @property
    def chance(self) -> float:
        """How often guessing is right."""
        return 1 / len(self.choices)

    def questions(self, length: int, count: int, seed: int = 0) -> list[Question]:
        """Questions about sequences of `length` letters, behind two worked examples.

        Raises:
            ValueError: for a count below 1 or a length that the task doesn't have.
        """
        if count < 1:
            raise ValueError(f"questions must be at least 1, got {count}")
        drawn = self._draw(length, count, seeds.generator(f"probe {self.name}", seed, length))
        examples = self._draw(EXAMPLE_LENGTH, 64, seeds.generator(f"probe {self.name} examples", seed))
        shown = [next(example for example in examples if example[1] == answer) for answer in (0, 1)]
        opening = "".join(f"{text}{self.choices[answer]}\n\n" for text, answer in shown)
        return [Question(opening + text, self.choices, answer) for text, answer in drawn]

    def _draw(self, length: int, count: int, random: torch.Generator) -> list[tuple[str, int]]:
        batch = get_task(self.task).sample(count, length, random)
        last = batch.labels[:, -1].tolist()
        return [self.word(ids, label, random) for ids, label in zip(batch.ids.tolist(), last, strict=True)]


def _parity(ids: list[int], label: int, random: torch.Generator) -> tuple[str, int]:
    return f"Bits: {' '.join(map(str, ids))}\nThe number of ones is", label


def _boxes(ids: list[int], label: int, random: torch.Generator) -> tuple[str, int]:
    # The state of the task is a permutation; what lies in the boxes is the same said of three things.
    names = get_task("group:S3:swaps").token_names
    moves = [_SWAPS[names[letter]] for letter in ids]
    words = ["wait" if move is None else f"swap {move[0] + 1} {move[1] + 1}" for move in moves]
    box = int(torch.randint(3, (1,), generator=random))
    text = f"Box 1 holds red, box 2 green, box 3 blue.\n{'; '.join(words)}.\nBox {box + 1} holds"
    return text, _arrangements()[label][box]


def _arrangements() -> dict[int, tuple[int, ...]]:
    """What lies in the three boxes in each state of the word problem of S3, the letters read as swaps of two boxes."""
    task = get_task("group:S3:swaps")
    assert isinstance(task, AutomatonTask)
    automaton, names = task.automaton, task.token_names
    found: dict[int, tuple[int, ...]] = {automaton.start: (0, 1, 2)}
    waiting = [automaton.start]
    while waiting:
        state = waiting.pop()
        for letter, following in enumerate(automaton.transitions[state].tolist()):
            if following not in found:
                balls, swap = list(found[state]), _SWAPS[names[letter]]
                if swap is not None:
                    balls[swap[0]], balls[swap[1]] = balls[swap[1]], balls[swap[0]]
                found[following] = tuple(balls)
                waiting.append(following)
    return {int(automaton.outputs[state]): balls for state, balls in found.items()}


def _code(ids: list[int], label: int, random: torch.Generator) -> tuple[str, int]:
    names = get_task("code_evaluation:3").token_names
    lines = [line for line in "".join(names[token] for token in ids).split("\n") if line]
    return "\n".join(["a,b,c=0,1,2", *lines, "# prints"]), label


_PROBES = {
    probe.name: probe
    for probe in (
        Probe("parity", "parity of bits", "parity", (" even", " odd"), _parity),
        Probe(
            "s3", "three boxes, two swapped at a time (S3)", "group:S3:swaps", tuple(f" {b}" for b in _BALLS), _boxes
        ),
        Probe("code", "what a Python program prints", "code_evaluation:3", (" 0", " 1", " 2"), _code),
    )
}


def list_probes() -> tuple[Probe, ...]:
    """All probes."""
    return tuple(_PROBES.values())


def get_probe(name: str) -> Probe:
    """The probe of a name.

    Raises:
        ValueError: if there is none.
    """
    if name not in _PROBES:
        raise ValueError(f"unknown probe {name!r}; the probes are {', '.join(_PROBES)}")
    return _PROBES[name]


@dataclass(frozen=True)
class ProbeResult:
    """The accuracy of one probe at one length.

    Attributes:
        probe: its name.
        length: letters of the task.
        accuracy: share of the questions whose right answer has the highest likelihood.
        stderr: its standard error.
        chance: how often guessing is right.
        commonest: how often the answer is right that is right most often.
        questions: how many.
    """

    probe: str
    length: int
    accuracy: float
    stderr: float
    chance: float
    commonest: float
    questions: int

    def to_data(self) -> dict[str, Any]:
        return asdict(self)


def evaluate_probes(
    model: CausalModel,
    tokenizer: TextTokenizer,
    lengths: Iterable[int],
    *,
    probes: Sequence[str] | None = None,
    questions: int = 64,
    seed: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[ProbeResult]:
    """Asks a model all questions; without tuning, behind two worked examples.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        lengths: letters of the sequences.
        probes: their names; None for all.
        questions: how many for each probe and length.
        seed: of the questions.
        on_progress: called with the probes and lengths done and those in all.

    Raises:
        ValueError: for an unknown probe, or a length that a probe doesn't have.
    """
    chosen = list_probes() if probes is None else [get_probe(name) for name in probes]
    grid = [(probe, length) for probe in chosen for length in sorted(set(lengths))]
    asked = [probe.questions(length, questions, seed) for probe, length in grid]
    results = []
    for done, ((probe, length), these) in enumerate(zip(grid, asked, strict=True), 1):
        scores = log_likelihoods(model, tokenizer, these)
        share = sum(max(range(len(s)), key=s.__getitem__) == q.answer for q, s in zip(these, scores, strict=True))
        accuracy, answers = share / questions, [question.answer for question in these]
        results.append(
            ProbeResult(
                probe=probe.name,
                length=length,
                accuracy=accuracy,
                stderr=(accuracy * (1 - accuracy) / max(1, questions - 1)) ** 0.5,
                chance=probe.chance,
                commonest=max(map(answers.count, answers)) / questions,
                questions=questions,
            )
        )
        on_progress(done, len(grid))
    return results


@torch.inference_mode()
def log_likelihoods(model: CausalModel, tokenizer: TextTokenizer, questions: Sequence[Question]) -> list[list[float]]:
    """log p(answer | separator, text) of each answer of each question, in nats.

    As lm-eval does: text and answer are tokenized together, and the answer is what comes after the tokens of the text.
    """
    prompts = [ids.tolist() for ids in tokenizer.encode(question.prompt for question in questions)]
    pairs = [(i, choice) for i, question in enumerate(questions) for choice in question.choices]
    whole = [ids.tolist() for ids in tokenizer.encode(questions[i].prompt + choice for i, choice in pairs)]
    # What has to be read is the same for answers of one token.
    rows: dict[tuple[int, ...], list[tuple[int, int, int]]] = {}
    totals = [0.0] * len(pairs)
    for pair, ((i, _), ids) in enumerate(zip(pairs, whole, strict=True)):
        context, answer = [tokenizer.separator, *prompts[i]], ids[len(prompts[i]) :]
        read = tuple(context + answer[:-1])
        rows.setdefault(read, []).extend((pair, len(context) - 1 + at, token) for at, token in enumerate(answer))
    ordered = sorted(rows, key=len)
    while ordered:
        most = max(1, _BATCH_TOKENS // len(ordered[-1]))
        batch, ordered = ordered[-most:], ordered[:-most]
        _score(model, [(row, rows[row]) for row in batch], totals)
    scores = iter(totals)
    return [[next(scores) for _ in question.choices] for question in questions]


def _score(model: CausalModel, batch: list[tuple[tuple[int, ...], list[tuple[int, int, int]]]], totals: list[float]):
    """Adds to the totals of answers the log-likelihoods of their tokens.

    Rows are padded behind their end, which no token before it sees, and read in pieces.
    """
    length = max(len(row) for row, _ in batch)
    ids = torch.tensor([row + (0,) * (length - len(row)) for row, _ in batch], device=model.device)
    asked = sorted({at for _, tokens in batch for _, at, _ in tokens})
    piece = max(1, min(length, max(16, min(_BATCH_TOKENS, _LOGITS // model.vocab_size)) // len(batch)))
    state = None
    for begin in range(0, length, piece):
        here = [at for at in asked if begin <= at < begin + piece]
        # One position is computed where none is asked for, as models want at least one.
        places = torch.tensor(here or [begin], device=model.device) - begin
        logits, state = model.scan(ids[:, begin : begin + piece], state, places)
        likely = logits.float().log_softmax(-1)
        for row, (_, tokens) in enumerate(batch):
            for pair, at, token in tokens:
                if begin <= at < begin + piece:
                    totals[pair] += float(likely[row, here.index(at), token])


def write_lm_eval_tasks(
    directory: Path | str,
    lengths: Iterable[int],
    *,
    probes: Sequence[str] | None = None,
    questions: int = 64,
    seed: int = 0,
) -> list[str]:
    """Writes the same questions as tasks of lm-eval: a YAML and a JSON Lines file for each probe and length.

    The YAML files name the JSON Lines by their absolute paths, as lm-eval wants them: write them anew where the
    directory has moved.

    Returns:
        The names of the tasks; `statetrack_probes` is the group of all.

    Raises:
        ValueError: as `evaluate_probes`.
    """
    chosen = list_probes() if probes is None else [get_probe(name) for name in probes]
    grid = [(probe, length) for probe in chosen for length in sorted(set(lengths))]
    asked = [probe.questions(length, questions, seed) for probe, length in grid]
    place = Path(directory).resolve()
    place.mkdir(parents=True, exist_ok=True)
    names = []
    for (probe, length), these in zip(grid, asked, strict=True):
        name = f"statetrack_{probe.name}_{length}"
        rows = place / f"{name}.jsonl"
        atomic_write(rows, "".join(json.dumps(asdict(question)) + "\n" for question in these))
        atomic_write(
            place / f"{name}.yaml",
            f"task: {name}\n"
            "dataset_path: json\n"
            f"dataset_kwargs: {json.dumps({'data_files': {'test': str(rows)}})}\n"
            "test_split: test\n"
            "output_type: multiple_choice\n"
            'doc_to_text: "{{prompt}}"\n'
            'doc_to_choice: "{{choices}}"\n'
            'doc_to_target: "{{answer}}"\n'
            'target_delimiter: ""\n'
            "num_fewshot: 0\n"
            "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
            "metadata:\n  version: 1\n",
        )
        names.append(name)
    members = "".join(f"  - {name}\n" for name in names)
    atomic_write(place / f"{GROUP}.yaml", f"group: {GROUP}\ntask:\n{members}")
    return names
