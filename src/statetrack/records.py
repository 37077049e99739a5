"""Run directories -> records: what the tables and pages of `statetrack.report` are made of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from statetrack.config import RunConfig
from statetrack.evaluation import measure_eigenvalues, solved
from statetrack.mixers import MixerConfig
from statetrack.model import LanguageModel
from statetrack.report import Record
from statetrack.report.record import HistoryPoint
from statetrack.runs import RunDirectory
from statetrack.tasks import get_task


def record_of_run(directory: RunDirectory, *, explanation: str = "") -> Record:
    """What a trained run amounted to: its learning curve, its last evaluation if it had one, its measured eigenvalues.

    Raises:
        RunError: if the directory can't be used.
    """
    config, model = directory.read_config(), directory.load_model()
    evaluation = directory.read_evaluation()
    accuracy = {int(length): share for length, share in evaluation.get("accuracy", {}).items()}
    task = get_task(config.task)
    chance = evaluation.get("chance")  # that of the task it was judged on, as accuracies are
    eigenvalues = measure_eigenvalues(model, task)
    return Record(
        **facts(config, task.chance if chance is None else chance),
        num_parameters=model.num_parameters(),
        train_seconds=directory.train_seconds(),
        train_device=directory.train_device(),
        solved=solved(accuracy),
        accuracy=accuracy,
        accuracy_sequences={int(length): count for length, count in evaluation.get("sequences", {}).items()},
        explanation=explanation,
        history=_history(directory),
        token_eigenvalues={task.token_names[token]: tuple(values) for token, values in eigenvalues.items()},
        origin=evaluation.get("origin", {}),
    )


def record_of_failure(directory: RunDirectory, reason: str, *, explanation: str = "") -> Record:
    """A run that broke down, why, and its learning curve until then.

    Raises:
        RunError: if its config can't be read.
    """
    config = directory.read_config()
    return Record(
        **facts(config, get_task(config.task).chance),
        num_parameters=LanguageModel(config.model).num_parameters(),
        failed=reason,
        explanation=explanation,
        history=_history(directory),
        origin=directory.failure_origin(),
    )


def _history(directory: RunDirectory) -> tuple[HistoryPoint, ...]:
    return tuple(HistoryPoint(m["step"], m["loss"], m["accuracy"]) for m in directory.read_metrics())


def facts(config: RunConfig, chance: float) -> dict[str, Any]:
    """What a record has from the config of its run."""
    mixers, training = config.model.mixer_pattern, config.training
    ranges = _different(mixers, "eigenvalue_range")
    layers = config.model.num_layers
    variant = ["" if layers == 1 else f"{layers} layers"]
    if len(ranges) > 1:
        variant.append("eigenvalues in " + " and ".join(f"[{range_}]" for range_ in ranges))
    return {
        "task": config.task,
        "mixer": config.model.mixer_name,
        "eigenvalue_range": ranges[0] if len(ranges) == 1 else None,
        "num_householder": max(_different(mixers, "num_householder"), default=None),
        "seed": training.seed,
        "steps": training.steps,
        "chance": chance,
        "train_lengths": (training.min_length, training.max_length),
        "variant": ", ".join(filter(None, variant)),
    }


def _different(mixers: Iterable[MixerConfig], option: str) -> list[Any]:
    """The values of an option, each once, among the mixers that have it."""
    return list(dict.fromkeys(getattr(mixer, option) for mixer in mixers if hasattr(mixer, option)))
