"""An experiment file: a title, seeds, and runs that share options.

    title = "..."
    seeds = [0, 1, 2]

    [[run]]
    task = "parity"
    lengths = [40, 256]              # where the trained model is judged
    winner_lengths = [1000000]       # where it is judged as well if it solved the task
    explanation = "..."              # for each model that a sweep makes: why it can or can't do the task
    model = { d_model = 32 }
    mixer = { name = "deltanet" }
    training = { steps = 300 }
    sweep = [ { eigenvalue_range = [0, 1], explanation = "..." }, { eigenvalue_range = [-1, 1], explanation = "..." } ]

What several runs have in common may stand once, in a table `[shared]` with the same keys; a run's own `model`, `mixer`
and `training` are laid over those tables, key by key, and its other keys replace them.

Every entry of a sweep is the run with those options of its mixer replaced; every seed is a run of its own. A hybrid has
a list of mixers, `mixer = [ { name = "deltanet" }, { name = "mamba" } ]`, which is the pattern of its layers. An entry
of a sweep may also replace the mixer or the list as a whole, with `mixer = ...`, and lay its own `model` and `training`
over the run's. With `learning_rates = [1e-2, 1e-3]` every seed is trained at each of them, and tables show the one with
the best median over seeds. An entry with `recipe = true` is by our own recipe in place of the experiment's protocol: it
has a column of its own beside the same model's. `variant = "three layers"` names what tells an entry from others of the
same mixer. `seeds = [0, 1, 2, 3, 4]` gives an entry other seeds than the experiment's.

A task whose sequences are drawn from a fixed set is judged on another: `judged_task = "chess_tracking:250,500,1"`.

An experiment that others have published says so in a table `[published]` (see `Publication`), and what they measured
stands beside each model as `published = { best = 1.0, median = 0.9 }`, or in words as `published = { text = "..." }`.
`[preset.cpu]` and the like are smaller versions of the whole: `seeds`, and options that are laid over every run; with a
table `recipe` in them, `model` and `training` of that one are laid over the runs by recipe instead. A table `tasks`
names smaller tasks that stand for larger ones, `tasks = { "group:S5" = "group:S3" }`.
"""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

from statetrack.config import RunConfig, TrainingConfig, from_data, read_mixers, run_config
from statetrack.files import read_toml
from statetrack.mixers import MixerConfig


@dataclass(frozen=True, kw_only=True)
class ExperimentRun:
    """One training run of an experiment and where it is judged.

    Attributes:
        config: the run.
        lengths: positions of the labels that are judged.
        judged_task: what it is judged on, if that is not the task it is trained on.
        winner_lengths: further positions, judged only if the run solved its task.
        sequences: how many sequences it is judged on; None for the default of `evaluate`.
        whole: whether all labels up to a position must be right (sequence accuracy).
        chance: what scaled accuracies are scaled by; None for the task's.
        explanation: why such a model can or can't do the task, in a few words.
        published: what others measured for such a model: `best`, `median` or `text`.
        recipe: whether it is by our own recipe in place of the experiment's protocol.
        tuned: whether it is one of several that differ in their learning rate, of which the best counts.
        variant: what tells it from others of the same model, in a few words.
    """

    config: RunConfig
    lengths: tuple[int, ...]
    judged_task: str | None = None
    winner_lengths: tuple[int, ...] = ()
    sequences: int | None = None
    whole: bool = False
    chance: float | None = None
    explanation: str = ""
    published: Mapping[str, Any] = field(default_factory=dict)
    recipe: bool = False
    tuned: bool = False
    variant: str = ""

    @property
    def name(self) -> str:
        """A name for directories and progress lines: `parity-deltanet[-1,1]n1-seed0`, or `...+attention-seed0`.

        `x5` behind the mixers says that there are five layers, where the pattern alone doesn't; the variant, `-recipe`
        and `-lr0.01` tell runs apart that differ in nothing else.
        """
        model = self.config.model
        mixers = "+".join(_mixer_name(mixer) for mixer in model.mixer_pattern)
        layers = "" if model.num_layers == len(model.mixer_pattern) else f"x{model.num_layers}"
        training = self.config.training
        parts = [self.config.task.replace(":", "_"), mixers + layers, "_".join(re.findall(r"[\w.]+", self.variant))]
        parts += ["recipe" if self.recipe else ""]
        parts += [f"lr{training.learning_rate:g}" if self.tuned else "", f"seed{training.seed}"]
        return "-".join(filter(None, parts))


@dataclass(frozen=True, kw_only=True)
class Publication:
    """Where an experiment comes from, and in what ours differs.

    Attributes:
        source: the publication; "" if there is none, and then tables have no sentence on it.
        protocol: which of its protocols the grid follows: "paper", "released" (its code) or "ours".
        measure: "scaled_accuracy", (accuracy - chance) / (1 - chance) on average over the lengths; "accuracy", the
            share of right answers by length; or "sequence_accuracy", the share of sequences that are right throughout,
            by length.
        differences: what is done otherwise here, a sentence each.
        recipe: what the runs by our own recipe do otherwise, a sentence each.
    """

    source: str
    protocol: Literal["paper", "released", "ours"]
    measure: Literal["scaled_accuracy", "accuracy", "sequence_accuracy"]
    differences: list[str] = field(default_factory=list)
    recipe: list[str] = field(default_factory=list)


UNPUBLISHED = Publication(source="", protocol="ours", measure="accuracy")
"""What an experiment has that nobody has published."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A titled list of runs.

    Attributes:
        title: for people.
        runs: in the order of the file.
        published: where it comes from.
    """

    title: str
    runs: tuple[ExperimentRun, ...]
    published: Publication = UNPUBLISHED


@dataclass(frozen=True, kw_only=True)
class _Published:
    """What others measured for a model."""

    best: float | None = None
    median: float | None = None
    text: str | None = None

    def data(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class _RunTable:
    """A `[[run]]` of an experiment file."""

    task: str
    mixer: dict[str, Any] | list[dict[str, Any]]
    lengths: list[int]
    judged_task: str | None = None
    winner_lengths: list[int] = field(default_factory=list)
    sequences: int | None = None
    chance: float | None = None
    explanation: str = ""
    published: _Published = _Published()
    model: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    learning_rates: list[float] = field(default_factory=list)
    sweep: list[dict[str, Any]] = field(default_factory=lambda: [{}])

    def __post_init__(self) -> None:
        if not self.lengths or min(*self.lengths, *self.winner_lengths, self.sequences or 1) < 1:
            raise ValueError(
                f"{self.task} must be judged at lengths, and on sequences, of at least 1; got lengths {self.lengths}, "
                f"winner_lengths {self.winner_lengths} and sequences {self.sequences}"
            )
        if self.chance is not None and not 0 <= self.chance < 1:
            raise ValueError(f"chance must be at least 0 and less than 1, got {self.chance}")


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """What an entry of a sweep may have besides options of its mixer; what it leaves out is the run's."""

    explanation: str | None = None
    mixer: dict[str, Any] | list[dict[str, Any]] | None = None
    model: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    published: _Published | None = None
    recipe: bool = False
    variant: str = ""
    seeds: list[int] | None = None


@dataclass(frozen=True, kw_only=True)
class _Preset:
    """What a preset may have besides keys that are laid over those of every run."""

    seeds: list[int] | None = None
    tasks: dict[str, str] = field(default_factory=dict)
    recipe: dict[str, dict[str, Any]] | None = None


@dataclass(frozen=True, kw_only=True)
class _File:
    title: str
    run: list[dict[str, Any]]
    seeds: list[int] = field(default_factory=lambda: [0])
    shared: dict[str, Any] = field(default_factory=dict)
    preset: dict[str, dict[str, Any]] = field(default_factory=dict)
    published: Publication = UNPUBLISHED


def list_experiments() -> dict[str, dict[str, Any]]:
    """The contents of all experiment files, by name."""
    files = sorted(resources.files("statetrack.experiments").iterdir(), key=lambda file: file.name.partition("."))
    return {
        file.name.removesuffix(".toml"): tomllib.loads(file.read_text(encoding="utf-8"))
        for file in files
        if file.name.endswith(".toml")
    }


def load_experiment(name: str, seeds: list[int] | None = None, preset: str | None = None) -> Experiment:
    """The experiment of a name, or in a file of one's own, with its own seeds or with others.

    Args:
        name: one of `list_experiments`; or the path of a file, which ends in `.toml`.
        seeds: of every model; None for those of the file.
        preset: which of the smaller versions that the file has; None for the whole.

    Raises:
        ValueError: if there is no such experiment, file or preset; if the file is not valid TOML, or has unknown or
            missing keys, or values that a config refuses.
    """
    if name.endswith(".toml"):
        data = read_toml(Path(name))
        try:
            return read_experiment(data, seeds, preset)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    files = list_experiments()
    if name not in files:
        raise ValueError(f"unknown experiment {name!r}; there are {', '.join(files)}")
    return read_experiment(files[name], seeds, preset)


def read_experiment(data: Mapping[str, Any], seeds: list[int] | None = None, preset: str | None = None) -> Experiment:
    """An experiment from the contents of its file.

    Raises:
        ValueError: for unknown or missing keys, for options that a config refuses, and for an unknown preset.
    """
    file = from_data(_File, data)
    if preset is not None and preset not in file.preset:
        raise ValueError(f"unknown preset {preset!r}; this experiment has {', '.join(file.preset) or 'none'}")
    own_keys, smaller = _split(_Preset, file.preset[preset] if preset is not None else {})
    chosen, smaller_tasks = seeds or own_keys.seeds, own_keys.tasks
    smaller_recipe = smaller if own_keys.recipe is None else own_keys.recipe
    whole = file.published.measure == "sequence_accuracy"
    named = [table.get(key) for table in (file.shared, *file.run) for key in ("task", "judged_task")]
    if unknown := [task for task in smaller_tasks if task not in named]:
        raise ValueError(f"the preset {preset} has a smaller task for {unknown[0]}, which no run is of")
    runs = []
    for own in file.run:
        laid = _laid_over(_laid_over(file.shared, own), smaller)
        for key in ("task", "judged_task"):
            if isinstance(task := laid.get(key), str):
                laid[key] = smaller_tasks.get(task, task)
        table = from_data(_RunTable, laid)
        for changes in table.sweep:
            entry, options = _split(_Entry, changes)
            laid_over = smaller_recipe if entry.recipe else smaller
            entry = replace(
                entry,
                model=entry.model and {**entry.model, **laid_over.get("model", {})},
                training=entry.training and {**entry.training, **laid_over.get("training", {})},
            )
            runs += _expand(table, entry, options, chosen or entry.seeds or file.seeds, whole)
    if not runs:
        raise ValueError("there is no run: a grid has at least one [[run]], with seeds, and with entries in its sweep")
    names = [run.name for run in runs]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"two runs of an experiment have the name {repeated[0]}: repeated seeds, or models alike in name"
        )
    published = file.published
    if preset is not None:
        note = (
            f"This is the preset {preset}: {'some smaller tasks, ' if smaller_tasks else ''}smaller models, fewer "
            "steps, and fewer sequences at fewer lengths than in the whole grid, to see the ordering, not the numbers."
        )
        published = replace(published, protocol="ours", differences=[note, *published.differences])
    return Experiment(title=file.title, runs=tuple(runs), published=published)


def _laid_over(shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """`own`, and what it leaves open from `shared`; tables are laid over tables."""
    both = {**shared, **own}
    for key in shared.keys() & own.keys():
        if isinstance(shared[key], Mapping) and isinstance(own[key], Mapping):
            both[key] = {**shared[key], **own[key]}
    return both


Keys = TypeVar("Keys", _Entry, _Preset)


def _split(kind: type[Keys], table: Mapping[str, Any]) -> tuple[Keys, dict[str, Any]]:
    """The keys of a table that are of such a kind, and the others."""
    known = {f.name for f in fields(kind)}
    own = from_data(kind, {key: value for key, value in table.items() if key in known})
    return own, {key: value for key, value in table.items() if key not in known}


def _expand(
    table: _RunTable, entry: _Entry, options: Mapping[str, Any], seeds: list[int], whole: bool
) -> Iterator[ExperimentRun]:
    """The runs of an entry of a sweep, with these options of its mixer."""
    mixer = read_mixers(_with_options(table.mixer if entry.mixer is None else entry.mixer, options))
    model = {**table.model, **entry.model}
    training = from_data(TrainingConfig, {**table.training, **entry.training})
    tuned = bool(table.learning_rates) and not entry.recipe
    rates = table.learning_rates if tuned else [training.learning_rate]
    for rate, seed in itertools.product(rates, seeds):
        yield ExperimentRun(
            config=run_config(table.task, mixer, model, replace(training, seed=seed, learning_rate=rate)),
            lengths=tuple(table.lengths),
            judged_task=table.judged_task,
            winner_lengths=tuple(table.winner_lengths),
            sequences=table.sequences,
            whole=whole,
            chance=table.chance,
            explanation=table.explanation if entry.explanation is None else entry.explanation,
            published=(entry.published or table.published).data(),
            recipe=entry.recipe,
            tuned=tuned,
            variant=entry.variant,
        )


def _with_options(mixer: Any, options: Mapping[str, Any]) -> Any:
    if not options:
        return mixer
    if not isinstance(mixer, Mapping):
        raise ValueError(
            f"a sweep can't say which mixer of a hybrid has the option {', '.join(options)}; give the whole list of "
            "mixers instead"
        )
    return {**mixer, **options}


def _mixer_name(mixer: MixerConfig) -> str:
    range_, factors = getattr(mixer, "eigenvalue_range", None), getattr(mixer, "num_householder", None)
    return mixer.name + (f"[{range_}]" if range_ else "") + (f"n{factors}" if factors else "")
