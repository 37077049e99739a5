"""`statetrack reproduce`: a published experiment again, with our numbers beside theirs, or a grid of one's own."""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from statetrack.experiments import Experiment, ExperimentRun, Publication, RunEvent, list_experiments, run_experiment
from statetrack.experiments.runner import finished_records, forget_failures
from statetrack.files import atomic_write
from statetrack.merge import Line, identity, read_results
from statetrack.mixers import mixer_configs
from statetrack.progress import describe
from statetrack.report import Record, ReportTable, provenance, write_report
from statetrack.report.record import percent
from statetrack.tasks import get_task

HORIZON_ACCURACY = 0.9
"""The failure horizon is the longest length at which so many sequences are right, and at all shorter ones."""

PROTOCOLS = {
    "paper": "the paper's text",
    "released": "the code released with the paper",
    "ours": "a protocol of our own",
}


def reproductions() -> dict[str, dict[str, Any]]:
    """The contents of the experiment files that reproduce a publication, by name."""
    return {name: data for name, data in list_experiments().items() if "published" in data}


@dataclass(frozen=True)
class Outcome:
    """One run of the grid and, if it came to its end, what it amounted to.

    Attributes:
        run: the run.
        record: its record; None if it was not reached.
        old: its line of a summary.json from before lines had configs, where the record is made of that.
    """

    run: ExperimentRun
    record: Record | None
    old: Mapping[str, Any] | None = None

    @property
    def model(self) -> str:
        """The model as tables call it: `DeltaNet [-1, 1], 2 layers`, and the variant if it is one."""
        config = self.run.config.model
        mixers = []
        for mixer in config.mixer_pattern:
            factors = getattr(mixer, "num_householder", None)
            range_ = getattr(mixer, "eigenvalue_range", None)
            parts = [mixer_configs()[mixer.name].title, f"[{range_.lo:g}, {range_.hi:g}]" if range_ else ""]
            mixers.append(" ".join(filter(None, [*parts, f"n = {factors}" if (factors or 1) > 1 else ""])))
        layers = f"{config.num_layers} layer{'s' * (config.num_layers > 1)}"
        return ", ".join(filter(None, [" + ".join(mixers), layers, self.run.variant]))

    @property
    def judged(self) -> bool:
        return self.record is not None and self.record.failed is None

    @property
    def failed(self) -> bool:
        return self.record is not None and self.record.failed is not None

    def scaled_accuracy(self) -> float | None:
        """(accuracy - chance) / (1 - chance), on average over the lengths; None if the run was not judged."""
        if self.record is None or not self.record.accuracy:
            return None if self.old is None else self.old.get("scaled_accuracy")
        chance = get_task(self.run.config.task).chance if self.run.chance is None else self.run.chance
        return (statistics.mean(self.record.accuracy.values()) - chance) / (1 - chance)

    def horizon(self) -> int:
        """The longest length up to which enough sequences are right; 0 if none."""
        longest = 0
        for length, share in sorted((self.record.accuracy if self.record else {}).items()):
            if share < HORIZON_ACCURACY:
                break
            longest = length
        return longest

    def data(self, publication: Publication) -> dict[str, Any]:
        """A line of summary.json."""
        if self.old is not None:
            return dict(self.old)
        config, record = self.run.config, self.record
        mixers = config.model.mixer_pattern
        range_ = getattr(mixers[0], "eigenvalue_range", None)
        line = {
            **identity(self.run),
            "task": config.task,
            "mixer": config.model.mixer_name,
            "eigenvalue_range": None if range_ is None else [range_.lo, range_.hi],
            "num_householder": getattr(mixers[0], "num_householder", None),
            "layers": config.model.num_layers,
            "seed": config.training.seed,
            "protocol": "ours" if self.run.recipe else publication.protocol,
            "variant": self.run.variant,
            "learning_rate": config.training.learning_rate,
            "steps": config.training.steps,
            "precision": config.training.precision,
            "state": "missing" if record is None else "failed" if self.failed else "done",
        }
        if record is not None:
            line |= {"seconds": record.train_seconds, "failed": record.failed}
            if record.train_device == "cuda":
                line["gpu_seconds"] = record.train_seconds
            shares = {str(length): share for length, share in record.accuracy.items()}
            if publication.measure == "scaled_accuracy":
                line |= {"scaled_accuracy": self.scaled_accuracy(), "accuracy": shares}
            else:
                line |= {publication.measure: shares, "horizon": self.horizon()}
        return line


def chosen_runs(experiment: Experiment, only: str | None) -> list[int]:
    """Which runs of a grid have a name with a match of the regular expression `only`; all of them if it is None.

    Raises:
        ValueError: if it is no regular expression, or no run has such a name.
    """
    try:
        pattern = re.compile(only or "")
    except re.error as error:
        raise ValueError(f"only must be a regular expression, got {only!r}: {error}") from None
    chosen = [index for index, run in enumerate(experiment.runs) if pattern.search(run.name)]
    if not chosen:
        names = ", ".join(sorted({run.name for run in experiment.runs})[:3])
        raise ValueError(f"no run has a name with a match of {only!r}; names are such as {names}")
    return chosen


def run_reproduction(
    experiment: Experiment,
    out: Path,
    *,
    only: str | None = None,
    workers: int | None = None,
    devices: Sequence[str] = ("cpu",),
    budget_minutes: float | None = None,
    retry_failed: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Outcome]:
    """Runs what is left of a grid; writes `summary.json`, `table.md` and `report.html` below `out`.

    Finished and failed runs are not repeated and half-finished ones go on, so that the same call again continues. What
    is written says which runs are missing, and which failed and why.

    Args:
        experiment: the grid.
        out: the directory of the results.
        only: train those runs alone whose names have a match of this regular expression; None for all. What is
            written has the whole grid.
        workers: as of `run_experiment`.
        devices: as of `run_experiment`.
        budget_minutes: stop, with checkpoints, after so many minutes of wall-clock time; None for no limit.
        retry_failed: let runs that have failed go on from their last checkpoints.
        should_stop: asked a few times a second; on True it stops as well.

    Returns:
        The outcome of each run, in the experiment's order.

    Raises:
        ValueError: if `only` chooses nothing, or `out` has results without runs.
    """
    chosen = chosen_runs(experiment, only)
    refuse_results_without_runs(out)
    out.mkdir(parents=True, exist_ok=True)
    if retry_failed:
        forget_failures(experiment, out / "runs")
    began = time.monotonic()
    say = partial(Console().print, highlight=False, markup=False, soft_wrap=True)
    records: dict[int, Record] = {}
    shown: dict[int, int] = {}

    def stop() -> bool:
        late = budget_minutes is not None and time.monotonic() - began > 60 * budget_minutes
        return late or should_stop()

    def show(event: RunEvent) -> None:
        index = chosen[event.run]
        name = experiment.runs[index].name
        if event.record is not None:
            records[index] = event.record
            state = f"failed: {event.record.failed}" if event.record.failed is not None else "done"
            say(f"[{len(records)}/{len(chosen)}] {name}  {state}")
        elif event.progress is not None and (tenth := 10 * event.progress.step // event.progress.steps) > shown.get(
            index, 0
        ):
            shown[index] = tenth
            say(f"{name}  {describe(event.progress)}")

    part = replace(experiment, runs=tuple(experiment.runs[index] for index in chosen))
    run_experiment(part, out / "runs", workers=workers, devices=devices, on_event=show, should_stop=stop)
    # The table has the whole grid, so also what earlier calls have finished of the runs that this one did not choose.
    records |= finished_records(experiment, out / "runs", set(range(len(experiment.runs))) - records.keys())
    return write_results(experiment, records, out)


def refuse_results_without_runs(out: Path) -> None:
    """Raises ValueError if a directory has results without their runs, merged ones or a copy: they would be lost."""
    try:
        lines = json.loads((out / "summary.json").read_text(encoding="utf-8"))["runs"]
        ended = any(line["state"] != "missing" for line in lines)
    except (OSError, ValueError, TypeError, KeyError):  # there are none, or nothing to lose
        return
    if ended and not (out / "runs").exists():
        raise ValueError(f"{out} has results without their runs, which would be lost; choose another --out")


def merge_results(experiment: Experiment, out: Path, sources: Sequence[Path]) -> list[Outcome]:
    """Puts together what several directories have of a grid, and writes it as `run_reproduction` does; trains nothing.

    Of a run that several have the last counts, but one that is done before one that failed, and of those one whose line
    has a config before one without.

    Args:
        experiment: the grid.
        out: a directory for these results alone, or with earlier ones that are among the sources.
        sources: directories with a summary.json, or such files.

    Returns:
        The outcome of each run, in the experiment's order.

    Raises:
        ValueError: if a source can't be read, none has a run of the grid, or `out` has runs, or other results than
            those put together.
    """
    publication = experiment.published
    own = out / "summary.json"
    known = {(source / own.name if source.is_dir() else source).resolve() for source in sources}
    if (out / "runs").exists() or (own.exists() and own.resolve() not in known):
        raise ValueError(f"{out} has results of its own, which would be lost; choose another --out")
    lines = [Outcome(run, None).data(publication) for run in experiment.runs]
    found: dict[int, Line] = {}
    say = partial(Console().print, highlight=False, markup=False, soft_wrap=True)
    for source in sources:
        results = read_results(source, experiment, lines)
        old = sum(line.old is not None for line in results.lines.values())
        words = [f"{len(results.lines)} of {len(experiment.runs)} runs"]
        words += [f"{old} of them without a config, which nobody can compare"] if old else []
        words += [f"{results.others} are left out: of other configs, or none of the grid"] if results.others else []
        say(f"{results.path}: {'; '.join(words)}")
        if results.others and results.path.resolve() == own.resolve():
            raise ValueError(f"{out} has results that are left out, which would be lost; choose another --out")
        found |= {index: line for index, line in results.lines.items() if _counts(line, found.get(index))}
    if not found:
        raise ValueError(
            f"no run of {experiment.title!r} has ended in {', '.join(map(str, sources)) or 'no directory'}"
        )
    out.mkdir(parents=True, exist_ok=True)
    outcomes = [
        Outcome(run, found[index].record, found[index].old) if index in found else Outcome(run, None)
        for index, run in enumerate(experiment.runs)
    ]
    _write(experiment, outcomes, out, merged=True)
    return outcomes


def _counts(line: Line, before: Line | None) -> bool:
    return before is None or line.worth >= before.worth


def write_results(experiment: Experiment, records: Mapping[int, Record], out: Path) -> list[Outcome]:
    """Writes `summary.json`, `table.md` and, once a run has ended, `report.html`.

    Args:
        experiment: the grid.
        records: of the runs that are done, by their index in the experiment.
        out: the directory of the results.

    Returns:
        The outcome of each run, in the experiment's order.
    """
    outcomes = [Outcome(run, records.get(index)) for index, run in enumerate(experiment.runs)]
    _write(experiment, outcomes, out)
    return outcomes


def _write(experiment: Experiment, outcomes: Sequence[Outcome], out: Path, *, merged: bool = False) -> None:
    title, publication = experiment.title, experiment.published
    origin, origins = provenance(), _origins(outcomes)
    lines = [outcome.data(publication) for outcome in outcomes]
    for outcome, line in zip(outcomes, lines, strict=True):
        line.pop("origin", None)
        if outcome.record is not None and outcome.record.origin:
            line["origin"] = origins.index(outcome.record.origin)
    head = {
        "title": title, "source": publication.source, "provenance": origin, "origins": origins,
    }  # fmt: skip
    atomic_write(out / "summary.json", _a_line_each(head, "runs", lines))
    tables = comparison(publication, outcomes)
    if origins and (merged or len(origins) > 1):
        tables.append(_where_made(origins, outcomes))
    atomic_write(out / "table.md", _markdown(title, tables, origin))
    ended = sum(outcome.record is not None for outcome in outcomes)
    failed = sum(outcome.failed for outcome in outcomes)
    headline = f"{ended} of {len(outcomes)} runs have ended" + (f", {failed} of them in failure" if failed else "")
    if ended:
        shown = _on_the_page(publication, outcomes)
        measured = "whole sequences" if publication.measure == "sequence_accuracy" else "labels"
        write_report(
            shown,
            out / "report.html",
            title=title,
            headline=f"{headline}. Accuracies below are shares of {measured}.",
            descriptions={record.task: get_task(record.task).description for record in shown},
            provenance=origin,
            tables=tables,
        )


def _a_line_each(head: Mapping[str, Any], name: str, items: Sequence[Mapping[str, Any]]) -> str:
    """JSON of an object whose last entry is a list, with a line for each item."""
    start = json.dumps(head, indent=1).removesuffix("\n}")
    return f'{start},\n "{name}": [\n' + ",\n".join(f"  {json.dumps(item)}" for item in items) + "\n ]\n}\n"


def _origins(outcomes: Sequence[Outcome]) -> list[Mapping[str, str]]:
    """Where runs were made, each place and day once."""
    origins: list[Mapping[str, str]] = []
    for outcome in outcomes:
        if outcome.record is not None and outcome.record.origin and outcome.record.origin not in origins:
            origins.append(outcome.record.origin)
    return origins


def _where_made(origins: Sequence[Mapping[str, str]], outcomes: Sequence[Outcome]) -> ReportTable:
    """How many runs were made where, by which commit and when."""
    header = tuple(dict.fromkeys(name for origin in origins for name in origin))
    made = [outcome.record.origin for outcome in outcomes if outcome.record is not None]
    rows = [(str(made.count(origin)), *(origin.get(name, "") for name in header)) for origin in origins]
    if unknown := made.count({}):
        rows.append((str(unknown), "not written down", *("",) * (len(header) - 1)))
    text = "The machines that judged the runs when they were done; below is the one that wrote this."
    return ReportTable("Where the runs were made", text, ("runs", *(name.lower() for name in header)), rows)


def _on_the_page(publication: Publication, outcomes: Sequence[Outcome]) -> list[Record]:
    """The records of what has ended, of several learning rates only those of the best, and recipes told apart."""
    records = []
    for members in _by_row(outcomes).values():
        plain = [outcome for outcome in members if not outcome.run.recipe]
        rate, _ = _best_learning_rate(plain, _summarize(publication))
        for outcome in members:
            run, record = outcome.run, outcome.record
            own = f"{run.config.training.learning_rate:g}"
            if record is None or (run.tuned and own != rate):
                continue
            parts = [record.variant, run.variant, f"learning rate {own}" * run.tuned, "our recipe" * run.recipe]
            records.append(replace(record, variant=", ".join(filter(None, parts))))
    return records


def comparison(publication: Publication, outcomes: Sequence[Outcome]) -> list[ReportTable]:
    """Ours beside theirs, a row for each model and task; in what the protocols differ, and our recipe from them.

    Runs by our own recipe have a column of their own. Of several learning rates the one with the best median counts.
    """
    summarize = _summarize(publication)
    compared = any(outcome.run.published for outcome in outcomes)
    recipes = any(outcome.run.recipe for outcome in outcomes)
    tuned = any(outcome.run.tuned for outcome in outcomes)
    by_length = publication.measure != "scaled_accuracy"
    rows = []
    for (task, model), members in _by_row(outcomes).items():
        plain, recipe = ([o for o in members if o.run.recipe == own] for own in (False, True))
        rate, best = _best_learning_rate(plain, summarize)
        published = next((o.run.published for o in members if o.run.published), {})
        seeds = [_seeds(plain, by_length)] if plain else []
        seeds += [f"recipe {_seeds(recipe, by_length)}"] if recipe else []
        rows.append(
            (
                *(task, model, _shown(best)),
                *((_theirs(published),) if compared else ()),
                *((_shown(summarize(recipe)),) if recipes else ()),
                *((rate,) if tuned else ()),
                "; ".join(seeds),
            )
        )
    header = (
        *("task", "model", "ours" if compared or publication.source else "reached"),
        *(("published",) if compared else ()),
        *(("our recipe",) if recipes else ()),
        *(("learning rate",) if tuned else ()),
        "seeds",
    )
    longest = f"The longest length up to which {HORIZON_ACCURACY:.0%} of"
    measured = {
        "scaled_accuracy": "Scaled accuracy, (accuracy - chance) / (1 - chance), on average over the lengths",
        "accuracy": f"{longest} answers are right",
        "sequence_accuracy": f"{longest} sequences are right throughout",
    }
    text = f"{measured[publication.measure]}: best / median of the seeds."
    if publication.source:
        text += f" Published: {publication.source}. Ours follows {PROTOCOLS[publication.protocol]}."
    if by_length:
        text += " Beside the seeds that are done stands how many of them last: "
        text += f"{HORIZON_ACCURACY:.0%} right at every length."
    if any(outcome.failed for outcome in outcomes):
        text += " A run that failed counts as 0."
    if recipes:
        text += " Our recipe: models trained in our own way in place of that protocol."
    if tuned:
        text += " Of the learning rates the one with the best median counts."
    tables = [ReportTable("Ours and theirs" if compared else "Results", text, header, rows)]
    if by_length and any(outcome.record for outcome in outcomes):
        tables.append(_by_length(publication, outcomes))
    for title, of, sentences in (
        ("Where the protocols differ" if compared else "How it is done", "ours", publication.differences),
        ("What our recipe does otherwise", "our recipe", publication.recipe if recipes else []),
    ):
        if sentences:
            tables.append(ReportTable(title, "", (of,), [(sentence,) for sentence in sentences]))
    return tables


def _by_length(publication: Publication, outcomes: Sequence[Outcome]) -> ReportTable:
    """Accuracy against length, the median of the seeds, a row for each model and task, of recipes and the protocol."""
    rows = []
    for (task, model), members in _by_row(outcomes).items():
        for recipe in (False, True):
            records = [o.record for o in members if o.run.recipe == recipe and o.record is not None]
            if records:
                lengths = sorted({length for record in records for length in record.accuracy})
                medians = [f"{length:,}: {_median_accuracy(records, length)}" for length in lengths]
                rows.append((task, model + ", our recipe" * recipe, ", ".join(medians) or percent(None)))
    of = "right answers" if publication.measure == "accuracy" else "sequences that are right throughout"
    text = f"The share of {of}, the median of the seeds, at each length."
    return ReportTable("Accuracy by length", text, ("task", "model", "length: accuracy"), rows)


def _median_accuracy(records: Sequence[Record], length: int) -> str:
    """Runs that failed count as 0."""
    shares = [0.0 if record.failed is not None else record.accuracy.get(length) for record in records]
    return percent(statistics.median(share for share in shares if share is not None))


def _by_row(outcomes: Sequence[Outcome]) -> dict[tuple[str, str], list[Outcome]]:
    """The outcomes of each task and model."""
    rows: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        rows.setdefault((outcome.run.config.task, outcome.model), []).append(outcome)
    return rows


def _summarize(publication: Publication) -> Callable[[Sequence[Outcome]], Summary]:
    return _scaled if publication.measure == "scaled_accuracy" else _lengths


Summary = tuple[float, float] | None
"""The best and the median over seeds, those that failed included; None if no seed has come to its end."""


def _best_learning_rate(
    members: Sequence[Outcome], summarize: Callable[[Sequence[Outcome]], Summary]
) -> tuple[str, Summary]:
    """The learning rate with the best median, then the best best, in words, and what it reached."""
    by_rate: dict[float, list[Outcome]] = {}
    for outcome in members:
        by_rate.setdefault(outcome.run.config.training.learning_rate, []).append(outcome)
    reached = {rate: best for rate, group in by_rate.items() if (best := summarize(group)) is not None}
    if not reached:
        return "–", None
    rate = max(reached, key=lambda rate: (reached[rate][1], reached[rate][0]))
    return f"{rate:g}", reached[rate]


def _scaled(members: Sequence[Outcome]) -> Summary:
    reached = [0.0 if outcome.failed else outcome.scaled_accuracy() for outcome in members]
    values = [value for value in reached if value is not None]
    return (max(values), statistics.median(values)) if values else None


def _lengths(members: Sequence[Outcome]) -> Summary:
    values = [outcome.horizon() for outcome in members if outcome.record is not None]
    return (max(values), statistics.median_low(values)) if values else None


def _shown(summary: Summary) -> str:
    if summary is None:
        return "–"
    return " / ".join(f"{value:,}" if isinstance(value, int) else f"{value:z.3f}" for value in summary)


def _theirs(published: Mapping[str, Any]) -> str:
    if "text" in published:
        return str(published["text"])
    return " / ".join(f"{published[key]:.3f}" for key in ("best", "median") if key in published) or "–"


def _seeds(members: Sequence[Outcome], by_length: bool) -> str:
    """How many are done; of them how many, judged by length, last up to the longest, and how many failed."""
    done = sum(outcome.record is not None for outcome in members)
    lasting = sum(outcome.judged and outcome.horizon() >= max(outcome.run.lengths) for outcome in members)
    failed = sum(outcome.failed for outcome in members)
    words = [f"{done} of {len(members)}"]
    words += [f"{lasting} lasts" if lasting == 1 else f"{lasting} last"] if by_length and done else []
    return ", ".join(words + ([f"{failed} failed"] if failed else []))


def _markdown(title: str, tables: Sequence[ReportTable], origin: Mapping[str, str]) -> str:
    parts = [f"# {title}"]
    for table in tables:
        parts += [f"## {table.title}", *([table.text] if table.text else [])]
        lines = [table.header, ["---"] * len(table.header), *table.rows]
        parts.append("\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines))
    made = "\n".join(f"- {name}: {value}" for name, value in origin.items())
    return "\n\n".join([*parts, "## How it was made", made]) + "\n"
