"""The results as a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.table import Table
from rich.text import Text

from statetrack.report.record import Group, Record, group, percent, short_length


def table(records: Iterable[Record]) -> Table:
    """A row for each model and task: median accuracy by length, seeds that solved it, median training time, and why.

    Where some of the seeds that did not fail were not judged at a length, the number of those that were stands beside
    the median. A seed that failed counts among the seeds, and its reason stands below the model. With five lengths the
    table fits a terminal of 80 columns.
    """
    groups = group(records)
    lengths = sorted({length for g in groups for length in g.lengths})
    result = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    result.add_column("model")
    for length in lengths:
        result.add_column(short_length(length), justify="right", no_wrap=True)
    result.add_column("solved", justify="right", no_wrap=True)
    result.add_column("train", justify="right", no_wrap=True)
    task = None
    for g in groups:
        if g.task != task:
            if task is not None:
                result.add_section()
            result.add_row(Text(g.task, style="bold underline"))
            task = g.task
        result.add_row(_model(g), *(_accuracy(g, length) for length in lengths), _solved(g), Text(seconds(g)))
    return result


def seconds(g: Group) -> str:
    """The median training time of a group, in seconds or minutes; a dash if there is none."""
    time = g.train_seconds
    if time is None:
        return "–"
    return f"{time:.1f} s" if time < 10 else f"{time:.0f} s" if time < 600 else f"{time / 60:.0f} min"


def _model(g: Group) -> Text:
    cell = Text(g.model, style="bold")
    if g.explanation:
        cell.append(f"\n{g.explanation}", style="not bold")
    for record in g.failures:
        cell.append(f"\nseed {record.seed} failed: {record.failed}", style="not bold red")
    return cell


def _accuracy(g: Group, length: int) -> Text:
    cell = Text(percent(g.median_accuracy(length)))
    if (judged := g.partly_judged(length)) is not None:
        cell.append(f" ({judged})")
    return cell


def _solved(g: Group) -> Text:
    # Green and red of the terminal's own palette are legible on dark and on light; yellow and grey often are not.
    style = "" if not g.judged else "green" if g.solved == g.judged else "red" if g.solved == 0 else ""
    return Text(g.solved_text, style=style)
