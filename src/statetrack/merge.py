"""`statetrack reproduce --merge`: the results of a grid that was run in parts, on several machines, put together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

from statetrack.evaluation import solved
from statetrack.experiments import ExperimentRun
from statetrack.model import LanguageModel
from statetrack.records import facts
from statetrack.report import Record
from statetrack.tasks import get_task

_IDENTITY = (
    *("task", "mixer", "eigenvalue_range", "num_householder", "layers", "seed", "protocol", "variant"),
    *("learning_rate", "steps", "precision"),
)
"""What tells the lines of a summary.json apart that were written before they had a name and a fingerprint."""


@dataclass(frozen=True)
class Merged:
    """What a summary.json has of a grid.

    Attributes:
        path: the file.
        records: of the runs that are done, by their index in the grid, without learning curves and eigenvalues.
        old: of them those from before lines had a fingerprint, as they are: nobody knows whether the grid is the same.
        others: how many of its lines are of no run of the grid, or of one with another config.
    """

    path: Path
    records: Mapping[int, Record]
    old: Mapping[int, Mapping[str, Any]]
    others: int


def fingerprint(run: ExperimentRun) -> str:
    """A few characters that runs of another config, or judged otherwise, don't have.

    Fields with their default values have no part in it: those that are added later change nothing.
    """
    chosen = [_chosen(run.config), run.judged_task, run.whole]
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:12]


def read_results(source: Path, runs: Sequence[ExperimentRun], lines: Sequence[Mapping[str, Any]]) -> Merged:
    """What a directory with a summary.json, or such a file, has of a grid.

    Args:
        source: the directory or file.
        runs: the grid.
        lines: for each run of the grid its line of a summary.json.

    Raises:
        ValueError: if there is no such file, or it is none that `statetrack reproduce` wrote.
    """
    path = source / "summary.json" if source.is_dir() else source
    records: dict[int, Record] = {}
    old: dict[int, Mapping[str, Any]] = {}
    others = 0
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        whole = {name: value for name, value in summary["provenance"].items() if name != "Command"}
        for line in summary["runs"]:
            if line["state"] == "missing":
                continue
            found = [index for index, ours in enumerate(lines) if _is_of(line, ours)]
            others += not found
            for index in found:
                origin = summary["origins"][line["origin"]] if "origin" in line else whole
                records[index] = _record(runs[index], line, origin)
                if "config" not in line:
                    old[index] = line
    except OSError as error:
        raise ValueError(f"{path} can't be read ({error.strerror}); name directories that reproduce wrote") from None
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{path} is no summary.json that reproduce wrote ({type(error).__name__}: {error})") from None
    return Merged(path, records, old, others)


def _chosen(config: Any) -> Any:
    """A config as JSON has it, without the fields that have their default values."""
    if isinstance(config, (tuple, list)):
        return [_chosen(value) for value in config]
    if not is_dataclass(config):
        return config
    values = {f.name: getattr(config, f.name) for f in fields(config) if f.default is MISSING or _differs(config, f)}
    return {"is": type(config).__name__} | {name: _chosen(value) for name, value in values.items()}


def _differs(config: Any, field: Any) -> bool:
    return getattr(config, field.name) != field.default


def _is_of(line: Mapping[str, Any], ours: Mapping[str, Any]) -> bool:
    keys = ("name", "config") if "config" in line else _IDENTITY
    return all(line[key] == ours[key] for key in keys if key in line)


def _record(run: ExperimentRun, line: Mapping[str, Any], origin: Mapping[str, str]) -> Record:
    with torch.device("meta"):
        num_parameters = LanguageModel(run.config.model).num_parameters()
    shares = line.get("sequence_accuracy", line.get("accuracy", {}))
    accuracy = {int(length): share for length, share in shares.items()}
    seconds = line.get("seconds")
    return Record(
        **facts(run.config, get_task(run.judged_task or run.config.task).chance),
        num_parameters=num_parameters,
        train_seconds=seconds,
        train_device=None if seconds is None else "cuda" if "gpu_seconds" in line else "cpu",
        solved=solved(accuracy),
        accuracy=accuracy,
        failed=line.get("failed"),
        explanation=run.explanation,
        origin=dict(origin),
    )
