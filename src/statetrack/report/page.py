"""The page: what was trained, what came out, and what the eigenvalues have to do with it."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup, escape

from statetrack.files import atomic_write
from statetrack.report.record import Group, Record, group, percent, short_length, true_minus
from statetrack.report.spectrum import describe
from statetrack.report.tables import seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from statetrack.report.figures import Style

Draw = Callable[["Axes"], None]

# matplotlib is imported where figures are drawn: it takes half a second, and who only makes records needs none.


@dataclass(frozen=True)
class ReportTable:
    """A table of the page's own, above the tasks.

    Attributes:
        title: its heading.
        text: a paragraph above it; empty for none.
        header: of its columns.
        rows: a cell of text for each column.
    """

    title: str
    text: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def write_report(
    records: Iterable[Record],
    path: Path | str,
    *,
    title: str,
    headline: str | None = None,
    criterion: str = "",
    descriptions: Mapping[str, str] | None = None,
    provenance: Mapping[str, str] | None = None,
    tables: Sequence[ReportTable] = (),
) -> None:
    """Writes one HTML page that needs no network, no font and no script; it follows the reader's light or dark scheme.

    Sections for which the records have no data (eigenvalues, learning curves) are left out.

    Args:
        records: what to show; runs that failed are shown as failed.
        path: the page; replaced whole or not at all.
        title: of the page.
        headline: what came out, in one sentence; None to have it counted from the records.
        criterion: when a run counts as solved, such as "99.9% right at length 256".
        descriptions: task -> what it asks, in a sentence.
        provenance: how the records were made, as `provenance()` gives it.
        tables: what to show above the tasks.

    Raises:
        ValueError: if there are no records.
        OSError: if the page can't be written.
    """
    groups = _groups(records)
    from statetrack.report import canvas, figures

    drawn = itertools.count()

    def svg(draw: Draw, width: float, height: float, margins: tuple[float, float, float, float], label: str) -> Markup:
        prefix = f"figure{next(drawn)}"
        return Markup(canvas.inline_svg(draw, width, height, margins=margins, prefix=prefix, label=label))

    styles = figures.model_styles(groups)
    page = _template().render(
        title=title,
        headline=headline or count_headline(groups),
        criterion=criterion,
        tasks=[_task(members, styles, svg, (descriptions or {}).get(task, "")) for task, members in _by_task(groups)],
        key=svg(figures.draw_key, 260, 212, (0, 0, 0, 0), "An eigenvalue of 1 keeps, 0 forgets, −1 flips."),
        swatch=lambda model: svg(partial(figures.draw_swatch, style=styles[model]), 36, 12, (0, 0, 0, 0), ""),
        provenance=dict(provenance or {}),
        tables=tables,
        has_spectra=any(g.representative() for g in groups),
        longest_training=max(record.train_lengths[1] for g in groups for record in g.records),
        longest=max((length for g in groups for length in g.lengths), default=0),
        products=any(g.names_factors for g in groups),
        palette=canvas.PALETTE,
    )
    atomic_write(path, page)


def write_figure(records: Iterable[Record], path: Path | str, *, task: str | None = None) -> None:
    """Writes the main figure alone, as `.svg` or `.png`: accuracy against length, and the eigenvalues beside it.

    Args:
        records: what to show.
        path: its ending decides the format; replaced whole or not at all.
        task: the only task to show; None for a row for each.

    Raises:
        ValueError: for another ending, no records, or a task that no record has.
        OSError: if it can't be written.
    """
    kind = Path(path).suffix.removeprefix(".")
    if kind not in ("svg", "png"):
        raise ValueError(f"a figure is written as .svg or .png, not as {Path(path).name!r}")
    groups = _groups(records)
    tasks = [members for name, members in _by_task(groups) if task in (None, name)]
    if not tasks:
        raise ValueError(f"no record has the task {task!r}; the tasks are {', '.join(dict(_by_task(groups)))}")
    from statetrack.report import canvas, figures

    draw = partial(figures.draw_summary, tasks=tasks, styles=figures.model_styles(groups))
    atomic_write(path, canvas.save_figure((15, 3.9 * len(tasks)), draw, kind))


def count_headline(groups: Sequence[Group]) -> str:
    """The outcome in one sentence, counted from the records."""
    groups = [g for g in groups if g.judged]
    if not groups:
        return "No run was judged yet."
    task = groups[0].task if len({g.task for g in groups}) == 1 else "their task"

    def runs(members: Sequence[Group]) -> str:
        return f"{sum(g.solved for g in members)} of {sum(g.judged for g in members)}"

    signed = [g for g in groups if g.eigenvalue_range is not None and g.eigenvalue_range.lo < 0]
    others = [g for g in groups if g.eigenvalue_range is not None and g.eigenvalue_range.lo >= 0]
    if signed and others:
        kept = " or ".join(dict.fromkeys(g.range_text for g in others))
        return (
            f"With eigenvalues allowed below zero, {runs(signed)} runs solved {task}; "
            f"with eigenvalues kept to {kept}, {runs(others)} did."
        )
    if len(groups) == groups[0].judged == 1:
        return f"{true_minus(groups[0].model)} {'solved' if groups[0].solved else 'did not solve'} {task}."
    return f"{runs(groups)} runs solved {task}."


def _task(groups: Sequence[Group], styles: Mapping[str, Style], svg: Any, description: str) -> dict[str, Any]:
    """What the template shows of one task; `svg` draws a figure."""
    from statetrack.report import figures

    name = groups[0].task
    lengths = sorted({length for g in groups for length in g.lengths})
    accuracy, wide, narrow = partial(figures.draw_accuracy, groups=groups, styles=styles), None, None
    if any(g.median_accuracy(length) is not None for g in groups for length in lengths):
        label = f"Accuracy against sequence length on {name}; the table has the numbers."
        room = 50 + 7 * max(len(g.model) for g in groups)
        wide = svg(partial(accuracy, labels=True), 860, 370, (46, room, 46, 10), label)
        narrow = svg(partial(accuracy, labels=False), 380, 300, (42, 12, 44, 8), label)
    curves = {}
    for quantity in ("accuracy", "loss"):
        if any(math.isfinite(getattr(point, quantity)) for g in groups for r in g.records for point in r.history):
            draw = partial(figures.draw_history, groups=groups, styles=styles, quantity=quantity)
            label = f"{quantity.capitalize()} against training step on {name}."
            curves[quantity] = svg(draw, 450, 250, (46, 14, 44, 8), label)
    pictured = [(g, record) for g in groups if (record := g.representative()) is not None]
    tokens = figures.spectrum_tokens(record for _, record in pictured)
    spectra = []
    for g, record in pictured:
        draw, caption = partial(figures.draw_spectrum, record=record, tokens=tokens), describe(record)
        label = f"Eigenvalues of {g.model} in the unit disc. {caption}"
        height = 206 + (18 * len(tokens) + 24 if tokens else 0)
        disc = svg(draw, 250, height, (0, 0, 2, 2), label)
        spectra.append({"group": g, "seed": record.seed, "caption": caption, "svg": disc})
    return {
        "name": name,
        "description": description,
        "groups": groups,
        "lengths": lengths,
        "several_seeds": any(len(g.records) > 1 for g in groups),
        "reasons": any(g.explanation or g.failures for g in groups),
        "wide": wide,
        "narrow": narrow,
        "curves": curves,
        "spectra": spectra,
        "tokens": tokens,
    }


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "percent": percent,
        "short": short_length,
        "seconds": seconds,
        "minus": true_minus,
        "code": _code,
    }
    file = resources.files("statetrack").joinpath("templates", "report.html.jinja")
    return environment.from_string(file.read_text(encoding="utf-8"))


def _code(text: str) -> Markup:
    """Text with what stands in backticks as code."""
    return Markup(re.sub("`([^`]*)`", r"<code>\1</code>", str(escape(text))))


def _groups(records: Iterable[Record]) -> list[Group]:
    groups = group(records)
    if not groups:
        raise ValueError("a report needs at least one record")
    return groups


def _by_task(groups: Sequence[Group]) -> list[tuple[str, list[Group]]]:
    return [(task, [g for g in groups if g.task == task]) for task in dict.fromkeys(g.task for g in groups)]
