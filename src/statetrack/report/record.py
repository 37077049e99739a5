"""Records of runs, and groups of records that differ in their seed alone."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from statetrack.files import atomic_write
from statetrack.mixers import mixer_configs
from statetrack.transition import EigenvalueRange

Eigenvalues = tuple[tuple[float, float], ...]
"""(real part, imaginary part) of each."""


class HistoryPoint(NamedTuple):
    """A line of the learning curve: the loss and the accuracy of the training batch of a step."""

    step: int
    loss: float
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class Record:
    """What one run amounted to, also if it failed. Sequences and mappings of JSON (lists, string keys) are accepted.

    Attributes:
        task: name of the task.
        mixer: name of the token mixer; of a hybrid the names of its pattern, `deltanet+attention`.
        eigenvalue_range: range of the eigenvalues; None for a mixer without a transition matrix, and for a hybrid whose
            mixers have different ones.
        num_householder: Householder factors for each token, the most of a hybrid's; None for a mixer that has none.
        seed: seed of the run.
        steps: optimizer steps.
        num_parameters: of the model.
        chance: accuracy of guessing.
        train_lengths: shortest and longest training sequence.
        train_seconds: training time; None if the run failed before it could be told, or does not say.
        train_device: the kind of device that it was trained on, "cuda" or "cpu"; None if that is not known.
        solved: whether the run counts as having solved its task.
        accuracy: length -> accuracy on fresh sequences, NaN where it could not be computed.
        accuracy_sequences: length -> how many sequences were judged.
        failed: why the run broke down; None if it didn't.
        explanation: why such a model can or can't do the task, in a few words, with the theorem.
        variant: what else tells this model from others of the report, such as "2 layers".
        history: the learning curve.
        eigenvalues: a sample of the eigenvalues of the trained transition matrices, on fresh data.
        token_eigenvalues: the same by input token; then `eigenvalues` may be left out.
        origin: where and from what the run was made, as `provenance` gives it; empty if that was not written down.
    """

    task: str
    mixer: str
    eigenvalue_range: EigenvalueRange | None = None
    num_householder: int | None = None
    seed: int
    steps: int
    num_parameters: int
    chance: float
    train_lengths: tuple[int, int]
    train_seconds: float | None = None
    train_device: str | None = None
    solved: bool = False
    accuracy: Mapping[int, float] = field(default_factory=dict)
    accuracy_sequences: Mapping[int, int] = field(default_factory=dict)
    failed: str | None = None
    explanation: str = ""
    variant: str = ""
    history: tuple[HistoryPoint, ...] = ()
    eigenvalues: Eigenvalues = ()
    token_eigenvalues: Mapping[str, Eigenvalues] = field(default_factory=dict)
    origin: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        if self.eigenvalue_range is not None:
            put("eigenvalue_range", EigenvalueRange.of(self.eigenvalue_range))
        put("train_lengths", tuple(self.train_lengths))
        put("accuracy", {int(length): _number(value) for length, value in self.accuracy.items()})
        put("accuracy_sequences", {int(length): int(count) for length, count in self.accuracy_sequences.items()})
        put("history", tuple(_history_point(point) for point in self.history))
        tokens = {str(token): _pairs(values) for token, values in self.token_eigenvalues.items()}
        put("token_eigenvalues", tokens)
        put("eigenvalues", _pairs(self.eigenvalues) or tuple(pair for values in tokens.values() for pair in values))
        for length, value in self.accuracy.items():
            if not (math.isnan(value) or 0 <= value <= 1):
                raise ValueError(f"an accuracy must lie in [0, 1] or be NaN, got {value} at length {length}")
        if self.failed is not None and self.solved:
            raise ValueError(f"a run that failed ({self.failed}) can't have solved its task")

    @property
    def judged(self) -> bool:
        """Whether there is anything to say about success: it was evaluated, or it failed."""
        return self.failed is not None or not all(math.isnan(value) for value in self.accuracy.values())

    def to_data(self) -> dict[str, Any]:
        """The record as JSON has it: lists, string keys, null for NaN."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        if self.eigenvalue_range is not None:
            data["eigenvalue_range"] = [self.eigenvalue_range.lo, self.eigenvalue_range.hi]
        for name in ("accuracy", "accuracy_sequences"):
            data[name] = {str(length): value for length, value in data[name].items()}
        data["history"] = [point._asdict() for point in self.history]
        return _without_nan(data)

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Record:
        """Reads what `to_data` gave.

        Raises:
            ValueError: for unknown or missing keys, or values that a record refuses.
        """
        known = {f.name for f in fields(cls)}
        required = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
        if unknown := sorted(data.keys() - known):
            raise ValueError(f"unknown key {', '.join(unknown)} in a record; the keys are {', '.join(sorted(known))}")
        if missing := sorted(required - data.keys()):
            raise ValueError(f"a record needs the key {', '.join(missing)}")
        return cls(**data)


def write_summary(records: Iterable[Record], path: Path | str) -> None:
    """Writes `summary.json`, atomically: a list of records without their learning curves and eigenvalues."""
    light = [replace(record, history=(), eigenvalues=(), token_eigenvalues={}).to_data() for record in records]
    for data in light:
        del data["history"], data["eigenvalues"], data["token_eigenvalues"]
    atomic_write(path, json.dumps(light, indent=2, allow_nan=False) + "\n")


def read_summary(path: Path | str) -> list[Record]:
    """Reads what `write_summary` wrote.

    Raises:
        ValueError: if the file is not a list of records; the sentence names it.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(data, list) or not all(isinstance(entry, dict) for entry in data):
            raise ValueError("a summary is a list of records")
        return [Record.from_data(entry) for entry in data]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a summary: {error}") from None


@dataclass(frozen=True)
class Group:
    """The records of one model on one task: the same in everything but the seed.

    Attributes:
        records: by rising seed.
        names_factors: the model's name says how many Householder factors it has, since other models have others.
    """

    records: tuple[Record, ...]
    names_factors: bool = False

    @property
    def task(self) -> str:
        return self.records[0].task

    @property
    def mixer(self) -> str:
        """The mixer as people write it, or those of a hybrid with a plus between them."""
        known = mixer_configs()
        return " + ".join(known[name].title if name in known else name for name in self.records[0].mixer.split("+"))

    @property
    def eigenvalue_range(self) -> EigenvalueRange | None:
        return self.records[0].eigenvalue_range

    @property
    def range_text(self) -> str:
        return "" if (r := self.eigenvalue_range) is None else f"[{r.lo:g}, {r.hi:g}]"

    @property
    def num_householder(self) -> int | None:
        return self.records[0].num_householder

    @property
    def variant(self) -> str:
        return self.records[0].variant

    @property
    def model(self) -> str:
        """A name such as `DeltaNet [-1, 1] n=2`; the same on every task."""
        factors = f"n={self.num_householder or 1}" if self.names_factors else ""
        name = " ".join(part for part in (self.mixer, self.range_text, factors) if part)
        return f"{name}, {self.variant}" if self.variant else name

    @property
    def explanation(self) -> str:
        return next((record.explanation for record in self.records if record.explanation), "")

    @property
    def failures(self) -> tuple[Record, ...]:
        return tuple(record for record in self.records if record.failed is not None)

    @property
    def solved(self) -> int:
        """How many seeds solved the task; those that failed did not."""
        return sum(record.solved for record in self.records)

    @property
    def judged(self) -> int:
        """How many seeds were evaluated or failed; the others have neither solved the task nor missed it."""
        return sum(record.judged for record in self.records)

    @property
    def solved_text(self) -> str:
        """`2/3`; a dash if no seed was judged."""
        return f"{self.solved}/{self.judged}" if self.judged else "–"

    @property
    def train_seconds(self) -> float | None:
        """Median over the seeds that did not fail."""
        times = [r.train_seconds for r in self.records if r.failed is None and r.train_seconds is not None]
        return statistics.median(times) if times else None

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(sorted({length for record in self.records for length in record.accuracy}))

    def accuracies(self, length: int) -> list[float]:
        """The accuracies at a length of the seeds that have one."""
        values = [record.accuracy.get(length, math.nan) for record in self.records]
        return [value for value in values if not math.isnan(value)]

    def median_accuracy(self, length: int) -> float | None:
        values = self.accuracies(length)
        return statistics.median(values) if values else None

    def partly_judged(self, length: int) -> int | None:
        """The number of seeds with an accuracy at a length, if it is some of those that did not fail but not all."""
        judged = len(self.accuracies(length))
        return judged if 0 < judged < len(self.records) - len(self.failures) else None

    def representative(self) -> Record | None:
        """Of the seeds with eigenvalues, the one in the middle by accuracy, so that no picture shows the luckiest."""
        candidates = [record for record in self.records if record.eigenvalues]
        if not candidates:
            return None
        shared = set.intersection(*(set(record.accuracy) for record in candidates))
        length = max(shared, default=None)
        if length is None:
            return candidates[0]
        ranked = sorted(candidates, key=lambda record: (-_or_zero(record.accuracy[length]), record.seed))
        return ranked[(len(ranked) - 1) // 2]


def group(records: Iterable[Record]) -> list[Group]:
    """Groups records by model and task, in the order in which they first appear."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    records = list(records)
    products = {record.mixer for record in records if (record.num_householder or 1) > 1}
    for r in records:
        key = (r.task, r.mixer, r.eigenvalue_range, r.num_householder or 1, r.variant)
        groups.setdefault(key, []).append(r)
    return [
        Group(tuple(sorted(members, key=lambda record: record.seed)), names_factors=members[0].mixer in products)
        for members in groups.values()
    ]


def percent(accuracy: float | None) -> str:
    """`99.9%`; `100%` for exactly 1 and never by rounding; a dash for None and NaN."""
    if accuracy is None or math.isnan(accuracy):
        return "–"
    return "100%" if accuracy == 1 else f"{min(accuracy * 100, 99.9):.1f}%"


def short_length(length: int) -> str:
    """`256`, `1k`, `10k`, `1M`; lengths that are not round thousands stay as they are, with a comma."""
    for unit, suffix in ((1_000_000, "M"), (1_000, "k")):
        if length >= unit and length % unit == 0:
            return f"{length // unit}{suffix}"
    return f"{length:,}"


def true_minus(text: str) -> str:
    """Text with typographic minus signs in front of its numbers."""
    return re.sub(r"(?<![\w-])-(?=\d)", "−", text)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _or_zero(value: float) -> float:
    return 0.0 if math.isnan(value) else value


def _history_point(point: Mapping[str, Any] | Sequence[Any]) -> HistoryPoint:
    step, loss, accuracy = (
        (point["step"], point.get("loss"), point.get("accuracy")) if isinstance(point, Mapping) else point
    )
    return HistoryPoint(int(step), _number(loss), _number(accuracy))


def _pairs(values: Iterable[Sequence[float]]) -> Eigenvalues:
    pairs = tuple((float(real), float(imaginary)) for real, imaginary in values)
    if not all(math.isfinite(real) and math.isfinite(imaginary) for real, imaginary in pairs):
        raise ValueError("eigenvalues must be finite; a model whose transition matrices are not has failed")
    return pairs


def _without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return value
