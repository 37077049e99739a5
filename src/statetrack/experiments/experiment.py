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
of a sweep may also replace the mixer or the list as a whole, with `mixer = ...`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from typing import Any

from statetrack.config import RunConfig, TrainingConfig, from_data, read_mixers, run_config
from statetrack.mixers import MixerConfig


@dataclass(frozen=True, kw_only=True)
class ExperimentRun:
    """One training run of an experiment and where it is judged.

    Attributes:
        config: the run.
        lengths: positions of the labels that are judged.
        winner_lengths: further positions, judged only if the run solved its task.
        explanation: why such a model can or can't do the task, in a few words.
    """

    config: RunConfig
    lengths: tuple[int, ...]
    winner_lengths: tuple[int, ...] = ()
    explanation: str = ""

    @property
    def name(self) -> str:
        """A name for directories and progress lines: `parity-deltanet[-1,1]n1-seed0`, or `...+attention-seed0`."""
        mixers = "+".join(_mixer_name(mixer) for mixer in self.config.model.mixer_pattern)
        return "-".join([self.config.task.replace(":", "_"), mixers, f"seed{self.config.training.seed}"])


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A titled list of runs."""

    title: str
    runs: tuple[ExperimentRun, ...]


@dataclass(frozen=True, kw_only=True)
class _RunTable:
    """A `[[run]]` of an experiment file."""

    task: str
    mixer: dict[str, Any] | list[dict[str, Any]]
    lengths: list[int]
    winner_lengths: list[int] = field(default_factory=list)
    explanation: str = ""
    model: dict[str, Any] = field(default_factory=dict)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sweep: list[dict[str, Any]] = field(default_factory=lambda: [{}])


@dataclass(frozen=True, kw_only=True)
class _File:
    title: str
    run: list[dict[str, Any]]
    seeds: list[int] = field(default_factory=lambda: [0])
    shared: dict[str, Any] = field(default_factory=dict)


def load_experiment(name: str, seeds: list[int] | None = None) -> Experiment:
    """The experiment in the file `<name>.toml` of this folder, with its own seeds or with others."""
    text = resources.files("statetrack.experiments").joinpath(f"{name}.toml").read_text(encoding="utf-8")
    return read_experiment(tomllib.loads(text), seeds)


def read_experiment(data: Mapping[str, Any], seeds: list[int] | None = None) -> Experiment:
    """An experiment from the contents of its file.

    Raises:
        ValueError: for unknown or missing keys and for options that a config refuses.
    """
    file = from_data(_File, data)
    tables = [from_data(_RunTable, _laid_over(file.shared, table)) for table in file.run]
    runs = [run for table in tables for run in _expand(table, seeds or file.seeds)]
    names = [run.name for run in runs]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"two runs of an experiment have the name {repeated[0]}: repeated seeds, or models alike in name"
        )
    return Experiment(title=file.title, runs=tuple(runs))


def _laid_over(shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """`own`, and what it leaves open from `shared`; tables are laid over tables."""
    both = {**shared, **own}
    for key in shared.keys() & own.keys():
        if isinstance(shared[key], Mapping) and isinstance(own[key], Mapping):
            both[key] = {**shared[key], **own[key]}
    return both


def _expand(table: _RunTable, seeds: list[int]) -> Iterator[ExperimentRun]:
    for changes in table.sweep:
        options = {key: value for key, value in changes.items() if key not in ("explanation", "mixer")}
        mixer = read_mixers(_with_options(changes.get("mixer", table.mixer), options))
        for seed in seeds:
            yield ExperimentRun(
                config=run_config(table.task, mixer, table.model, replace(table.training, seed=seed)),
                lengths=tuple(table.lengths),
                winner_lengths=tuple(table.winner_lengths),
                explanation=changes.get("explanation", table.explanation),
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
