"""`statetrack reproduce --merge`: the results of a grid that was run in parts, on several machines, put together."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from statetrack.config import RunConfig, from_data, to_data
from statetrack.evaluation import solved
from statetrack.experiments import Experiment, ExperimentRun
from statetrack.model import LanguageModel
from statetrack.records import facts
from statetrack.report import Record
from statetrack.tasks import get_task

_OLD_IDENTITY = (
    *("task", "mixer", "eigenvalue_range", "num_householder", "layers", "seed", "protocol", "variant"),
    *("learning_rate", "steps", "precision"),
)
"""What tells the lines of a summary.json apart that were written before they had the config of their run."""

OF_THE_FILE = "of the file; that of the run was not written down"


@dataclass(frozen=True)
class Line:
    """What a summary.json has of a run of a grid.

    Attributes:
        record: without learning curve and eigenvalues.
        old: the line as it is, if it is from before lines had configs; None if its config is that of the run.
    """

    record: Record
    old: Mapping[str, Any] | None

    @property
    def worth(self) -> tuple[bool, bool]:
        """Of two lines of a run the one that is worth more counts: done before failed, then with a config before
        without."""
        return self.record.failed is None, self.old is None


@dataclass(frozen=True)
class Results:
    """What a summary.json has of a grid.

    Attributes:
        path: the file.
        lines: of the runs that have ended, by their index in the grid.
        others: how many more of its lines are of ended runs: of none of the grid, of one with another config, or of one
            that has a line already.
    """

    path: Path
    lines: Mapping[int, Line]
    others: int


def identity(run: ExperimentRun) -> dict[str, Any]:
    """What the line of a run says of its config and of how it is judged, as JSON has it."""
    judged = {
        "task": run.judged_task or run.config.task,
        "lengths": [*run.lengths],
        "winner_lengths": [*run.winner_lengths],
        "sequences": run.sequences,
        "whole": run.whole,
        "chance": run.chance,
    }
    return {"name": run.name, "config": to_data(run.config), "judged": judged}


def read_results(source: Path, experiment: Experiment, lines: Sequence[Mapping[str, Any]]) -> Results:
    """What a directory with a summary.json, or such a file, has of a grid.

    Args:
        source: the directory or file.
        experiment: the grid.
        lines: for each run of the grid its line of a summary.json.

    Raises:
        ValueError: if there is no such file, or it is none that `statetrack reproduce` wrote.
    """
    path = source / "summary.json" if source.is_dir() else source
    summary = _read(path)
    origins = summary.get("origins")
    whole = {name: value for name, value in summary["provenance"].items() if name != "Command"}
    found: dict[int, Line] = {}
    others = 0
    for line in summary["runs"]:
        if line["state"] == "missing":
            continue
        matches = [index for index, run in enumerate(experiment.runs) if _is_of(line, run, lines[index])]
        if len(matches) != 1 or ("config" not in line and summary["title"] != experiment.title):
            others += 1
            continue
        if origins is None:
            origin = {**whole, "Note": OF_THE_FILE}
        else:
            origin = origins[line["origin"]] if "origin" in line else {}
        (index,) = matches
        read = Line(_record(experiment.runs[index], line, origin), None if "config" in line else line)
        others += index in found
        if index not in found or read.worth > found[index].worth:
            found[index] = read
    return Results(path, found, others)


def _read(path: Path) -> dict[str, Any]:
    """A summary.json of which as much is sure as this file relies on."""
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} can't be read ({error.strerror}); name directories that reproduce wrote") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); name directories that reproduce wrote") from None
    for key, kind in {"title": str, "provenance": dict, "runs": list}.items():
        if not isinstance(summary, dict) or type(summary.get(key)) is not kind:
            raise ValueError(f"{path} is no summary.json that reproduce wrote: it has no {key}")
    origins = summary.get("origins", [])
    if type(origins) is not list or not all(map(_is_origin, [*origins, summary["provenance"]])):
        raise ValueError(f"{path} is no summary.json that reproduce wrote: see where it was made")
    for place, line in enumerate(summary["runs"]):
        if not _is_line(line, len(origins)):
            raise ValueError(f"{path} is no summary.json that reproduce wrote: see line {place} of its runs")
    return summary  # type: ignore[no-any-return]


def _is_origin(origin: Any) -> bool:
    return isinstance(origin, dict) and all(isinstance(value, str) for value in origin.values())


def _is_line(line: Any, origins: int) -> bool:
    if not isinstance(line, dict) or line.get("state") not in ("missing", "done", "failed"):
        return False
    if "origin" in line and (type(line["origin"]) is not int or not 0 <= line["origin"] < origins):
        return False
    if not isinstance(line.get("config", {}), dict) or not isinstance(line.get("failed"), str | None):
        return False
    shares = _shares(line)
    if not isinstance(shares, dict) or not all(re.fullmatch(r"\d+", length) for length in shares):
        return False
    numbers = (line.get("seconds"), line.get("scaled_accuracy"), *shares.values())
    return all(isinstance(x, float | int | None) for x in numbers)


def _shares(line: Mapping[str, Any]) -> Any:
    """Accuracies by length, under the name of whichever measure the grid has."""
    return line.get("sequence_accuracy", line.get("accuracy", {}))


def _is_of(line: Mapping[str, Any], run: ExperimentRun, ours: Mapping[str, Any]) -> bool:
    if "config" not in line:
        return all(key in line and line[key] == ours[key] for key in _OLD_IDENTITY)
    if line.get("name") != ours["name"] or line.get("judged") != ours["judged"]:
        return False
    try:  # a field that was added since has its default value, as the run had
        return from_data(RunConfig, line["config"]) == run.config
    except ValueError:
        return False


def _record(run: ExperimentRun, line: Mapping[str, Any], origin: Mapping[str, str]) -> Record:
    with torch.device("meta"):
        num_parameters = LanguageModel(run.config.model).num_parameters()
    accuracy = {int(length): share for length, share in _shares(line).items()}
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
