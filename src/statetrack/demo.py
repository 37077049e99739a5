"""`statetrack demo`: trains models that can and can't track a state, and shows why in a table and on a page."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from statetrack.evaluation import SOLVED_ACCURACY, SOLVED_LENGTH
from statetrack.experiments import Experiment, RunEvent, load_experiment, run_experiment
from statetrack.progress import describe
from statetrack.report import Record, provenance, table, write_report, write_summary
from statetrack.runs import RunDirectory
from statetrack.tasks import get_task
from statetrack.transition import EigenvalueRange


def run_demo(
    out: Path,
    *,
    workers: int | None = None,
    seeds: list[int] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Runs the demo; writes `summary.json` and `report.html` below `out`.

    Returns:
        Whether it came to its end; False if it was told to stop, and then the same call goes on.
    """
    summary, page = out / "summary.json", out / "report.html"
    experiment = load_experiment("demo", seeds)
    if summary.exists():  # a finished demo: this is a new one
        for run in experiment.runs:
            if RunDirectory(out / "runs" / run.name).exists():
                shutil.rmtree(out / "runs" / run.name)
        summary.unlink()
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    with _Board(experiment, console) as board:
        records = run_experiment(
            experiment, out / "runs", workers=workers, on_event=board.show, should_stop=should_stop
        )
    if records is None:
        return False
    if len(records) < len(experiment.runs):
        raise RuntimeError(
            f"another process trains runs of the demo in {out}; wait for it, or choose another directory"
        )
    console.print(table(records))
    write_report(
        records,
        page,
        title=experiment.title,
        headline=_headline(records),
        criterion=f"{SOLVED_ACCURACY:.1%} right at length {SOLVED_LENGTH}",
        descriptions={record.task: get_task(record.task).description for record in records},
        provenance=provenance(),
    )
    write_summary(records, summary)
    console.print(f"\nThe page to look at: {page}    The numbers: {summary}")
    return True


def _headline(records: list[Record]) -> str:
    """What came out, counted from the records."""

    def count(task: str, **facts: object) -> str:
        chosen = [
            r for r in records if r.task == task and all(getattr(r, key) == value for key, value in facts.items())
        ]
        return f"{sum(record.solved for record in chosen)} of {len(chosen)}"

    wide, narrow = EigenvalueRange(-1, 1), EigenvalueRange(0, 1)
    return (
        f"Trained on at most 40 tokens and judged on {SOLVED_LENGTH}: of the models with eigenvalues in [0, 1], "
        f"{count('parity', eigenvalue_range=narrow)} learned parity, and of those with [−1, 1], "
        f"{count('parity', eigenvalue_range=wide)}. The group S3 was learned by {count('group:S3', num_householder=1)} "
        f"models with one reflection a token, and by {count('group:S3', num_householder=2)} with two."
    )


class _Board:
    """One line a run: what it is doing, step, loss, accuracy, time left. Without a terminal, a line when a run ends."""

    def __init__(self, experiment: Experiment, console: Console) -> None:
        self._console = console
        self._names = [run.name for run in experiment.runs]
        self._lines = ["waiting"] * len(self._names)
        self._done = 0
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None

    def __enter__(self) -> _Board:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, event: RunEvent) -> None:
        if event.progress is not None:
            left = f"{event.progress.seconds_left:.0f} s left" if event.progress.seconds_left >= 1 else ""
            self._lines[event.run] = f"{describe(event.progress)}  {left}"
        elif event.evaluated is not None:
            self._lines[event.run] = f"evaluating {event.evaluated:.0%}"
        elif event.record is not None:
            record, self._done = event.record, self._done + 1
            if record.failed is not None:
                line = f"[red]failed: {record.failed}"
            else:
                accuracies = "  ".join(f"{length:,}: {value:.3f}" for length, value in record.accuracy.items())
                line = f"{'[green]solved' if record.solved else 'not solved'}  accuracy at {accuracies}"
            self._lines[event.run] = line
            if self._live is None:
                name = self._names[event.run]
                self._console.print(f"[{self._done}/{len(self._names)}] ", name, "  ", line, sep="", highlight=False)
        if self._live is not None:
            self._live.update(self._render())

    def _render(self) -> Group:
        grid = Table.grid(padding=(0, 2))
        for name, line in zip(self._names, self._lines, strict=True):
            grid.add_row(Text(name), Text.from_markup(line) if line != "waiting" else Text(line, style="dim"))
        return Group(grid, Text(f"{self._done} of {len(self._names)} runs finished", style="bold"))
