"""The figures: accuracy by length, learning curves, and eigenvalues in the unit disc."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator, PercentFormatter

from statetrack.report.canvas import INK, MODEL_COLORS, MUTED, PAPER, RULE, TOKEN_COLORS, WASH
from statetrack.report.record import Group, Record, short_length, true_minus
from statetrack.report.spectrum import ComplexArray, as_complex
from statetrack.transition import EigenvalueRange

MARKERS = {"o": 7.0, "s": 6.4, "D": 6.0, "^": 7.8, "v": 7.8, "P": 8.0, "X": 8.0}
"""Markers and the sizes at which they look equally large."""

MAX_POINTS = 700
"""Points drawn for one spectrum; more would make the page heavy and show nothing more."""

MAX_TOKENS = len(TOKEN_COLORS)
"""With more tokens than this, points are not coloured by token."""


@dataclass(frozen=True)
class Style:
    """How a model is drawn throughout a report: with solid lines if its range reaches below 0, else with dashes."""

    color: str
    marker: str
    dashes: tuple[float, ...] | None

    @property
    def linestyle(self) -> Any:
        return (0, self.dashes) if self.dashes else "-"


def model_styles(groups: Iterable[Group]) -> dict[str, Style]:
    """A style for each model name, in the order of first appearance."""
    styles: dict[str, Style] = {}
    for g in groups:
        if g.model not in styles:
            index = len(styles)
            solid = g.eigenvalue_range is not None and g.eigenvalue_range.lo < 0
            dashed = sum(style.dashes is not None for style in styles.values())
            dashes = None if solid else ((4.0, 2.2), (1.3, 1.7))[dashed % 2]
            marker = list(MARKERS)[index % len(MARKERS)]
            styles[g.model] = Style(MODEL_COLORS[index % len(MODEL_COLORS)], marker, dashes)
    return styles


def draw_accuracy(ax: Axes, groups: Sequence[Group], styles: Mapping[str, Style], *, labels: bool) -> None:
    """Accuracy against length of one task: a thin line for each seed, a thick one for their median.

    Args:
        ax: where to draw.
        groups: the models of one task.
        styles: of all models.
        labels: name the models beside the ends of their lines.
    """
    records = [record for g in groups for record in g.records]
    chance = records[0].chance
    lengths = sorted({length for g in groups for length in g.lengths})
    ax.set_xscale("log")
    ax.set_ylim(_lowest_shown(chance, (value for record in records for value in record.accuracy.values())), 1.035)
    right = _training_lengths(ax, records, lengths)
    ax.axhline(chance, color=MUTED, linewidth=1, dashes=(4, 3), zorder=1)
    ends = [(right, chance, f"chance {100 * chance:.3g}%", MUTED)]
    if not labels:
        ax.annotate(
            ends[0][2], (0, chance), (4, -4), ("axes fraction", "data"), "offset points",
            va="top", color=MUTED, fontsize=10.5,
        )  # fmt: skip
    for rank, g in enumerate(groups):
        style = styles[g.model]
        for record in g.records:
            points = sorted((length, value) for length, value in record.accuracy.items() if np.isfinite(value))
            if len(g.records) > 1 and points:
                ax.plot(*zip(*points, strict=True), color=style.color, linewidth=0.9, alpha=0.45, zorder=2)
        medians = [(length, m) for length in g.lengths if (m := g.median_accuracy(length)) is not None]
        if not medians:
            continue
        # Models often coincide, at chance or at 100%: the ones drawn later are thinner, so that those below show.
        below = min(len(groups) - 1 - rank, 3)
        ax.plot(
            *zip(*medians, strict=True), color=style.color, linestyle=style.linestyle, marker=style.marker,
            linewidth=2 + 0.7 * below, markersize=MARKERS[style.marker] + 1.2 * below,
            markeredgecolor=PAPER, markeredgewidth=0.8, zorder=3 + 0.1 * rank, clip_on=False,
        )  # fmt: skip
        ends.append((*medians[-1], true_minus(g.model), style.color))
    _length_axis(ax, lengths)
    ax.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.grid(axis="y", color=RULE, linewidth=0.6)
    ax.spines["left"].set_visible(False)
    ax.set_xlabel("sequence length (log scale)")
    if labels:
        label_ends(ax, ends)


def _training_lengths(ax: Axes, records: Sequence[Record], lengths: Sequence[int]) -> float:
    """Sets the range of lengths that the axis shows and shades those of training; returns the right end."""
    shortest, longest = min(r.train_lengths[0] for r in records), max(r.train_lengths[1] for r in records)
    left, right = min([shortest, *lengths]) / 1.12, max([longest * 1.5, *(length * 1.15 for length in lengths)])
    room = 76 / ax.bbox.width  # that the words take, as a share of the axis
    inside = np.log(longest / shortest) > room * np.log(right / left)
    if inside:
        at, align = (shortest * longest) ** 0.5, "center"
    else:
        left = min(left, shortest / (right / shortest) ** (room / (1 - room)))
        at, align = shortest / (right / left) ** 0.015, "right"
    ax.set_xlim(left, right)
    least = (right / left) ** 0.004  # half the width of the band if one length is all there is
    ax.axvspan(shortest / least, longest * least, color=WASH, linewidth=0, zorder=0)
    # Two texts rather than two lines: on the page, only single lines stay aligned in whatever font the reader has.
    words = f"{shortest:,}–{longest:,}" if shortest < longest else f"{longest:,}"
    middle = (1 + records[0].chance) / 2
    for offset, text in ((8, "trained on"), (-8, words)):
        ax.annotate(text, (at, middle), (0, offset), textcoords="offset points", ha=align, va="center", color=MUTED)
    return right


def _lowest_shown(chance: float, accuracies: Iterable[float]) -> float:
    """The lower end of an axis of accuracies: a little below chance, or below the worst where that is lower."""
    worst = min((value for value in accuracies if np.isfinite(value)), default=chance)
    return max(0.0, min(chance - 0.12, worst - 0.03))


def _length_axis(ax: Axes, lengths: Sequence[int]) -> None:
    left, right = ax.get_xlim()
    room = 30 / (ax.bbox.width or 1)  # of a tick's label, as a share of the axis
    shown: list[int] = []
    for length in lengths:
        if not shown or np.log(length / shown[-1]) / np.log(right / left) > room:
            shown.append(length)
    ax.xaxis.set_major_locator(FixedLocator(shown))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short_length(round(x))))
    ax.xaxis.set_minor_locator(NullLocator())


def label_ends(ax: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Puts names at the right edge, moved apart where they would overlap, each with dots to where its line ends.

    Args:
        ax: where to draw, with its final limits.
        ends: where the lines end (x, y), their names and their colours.
    """
    bottom, top = ax.get_ylim()
    height = 17 / ax.bbox.height * (top - bottom)
    ordered = sorted(ends, key=lambda end: -end[1])
    positions = spread([y for _, y, _, _ in ordered], height, bottom, top)
    for (x, y, name, color), position in zip(ordered, positions, strict=True):
        dots = {"arrowstyle": "-", "color": color, "linewidth": 0.9, "linestyle": (0, (0.8, 2.2))}
        ax.annotate(
            name, xy=(x, y), xycoords="data", xytext=(1.035, (position - bottom) / (top - bottom)),
            textcoords="axes fraction", va="center", color=color, fontsize=11.5, annotation_clip=False,
            arrowprops={**dots, "relpos": (0, 0.5), "shrinkA": 3, "shrinkB": 6},
        )  # fmt: skip


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions near the wanted ones (in falling order), at least `gap` apart, in [low, high] where there is room."""
    positions: list[float] = []
    for value in wanted:
        positions.append(min(value, positions[-1] - gap) if positions else min(value, high))
    floor = low
    for index in reversed(range(len(positions))):
        if positions[index] >= floor:
            break
        positions[index] = floor
        floor += gap
    return positions


def draw_history(ax: Axes, groups: Sequence[Group], styles: Mapping[str, Style], quantity: str) -> None:
    """The learning curves of one task, `quantity` ("loss" or "accuracy") against the optimizer step.

    Thin lines are seeds, thick ones their median over those that did not fail; a cross ends the line of one that did.
    """
    positive = [np.inf, 0.0]
    for rank, g in enumerate(groups):
        style = styles[g.model]
        curves = [(record, curve) for record in g.records if len(curve := _curve(record, quantity))]
        for record, curve in curves:
            ax.plot(curve[:, 0], curve[:, 1], color=style.color, linewidth=0.8, alpha=0.4, zorder=2)
            if record.failed is not None:
                ax.plot(*curve[-1], "x", color=style.color, markersize=6, markeredgewidth=1.5, zorder=3 + rank)
            values = curve[curve[:, 1] > 0, 1]
            positive = [min(positive[0], values.min(initial=np.inf)), max(positive[1], values.max(initial=0))]
        if finished := [curve for record, curve in curves if record.failed is None]:
            steps, median = _median_curve(finished)
            ax.plot(steps, median, color=style.color, linestyle=style.linestyle, linewidth=1.9, zorder=3 + rank)
    if quantity == "accuracy":
        chance = groups[0].records[0].chance
        ax.axhline(chance, color=MUTED, linewidth=1, dashes=(4, 3), zorder=1)
        seen = (point.accuracy for g in groups for record in g.records for point in record.history)
        ax.set_ylim(_lowest_shown(chance, seen), 1.035)
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    elif positive[1] > 30 * positive[0]:
        ax.set_yscale("log")
        ax.set_ylim(bottom=max(positive[0], 1e-7) / 1.5)
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _power_of_ten(y)))
        ax.yaxis.set_minor_formatter(NullFormatter())
    else:
        ax.set_ylim(bottom=0)
    ax.grid(axis="y", color=RULE, linewidth=0.6)
    ax.spines["left"].set_visible(False)
    ax.set_xlim(left=0)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    ax.set_xlabel("training step")


_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _power_of_ten(value: float) -> str:
    """`10⁻³` as plain text: mathematics set by matplotlib would bring its own fonts along."""
    exponent = round(np.log10(value))
    return f"{value:g}" if exponent >= -2 else "10" + str(exponent).translate(_SUPERSCRIPT)


def _curve(record: Record, quantity: str, points: int = 160) -> np.ndarray:
    """[at most `points`, 2]: step and value; longer histories are averaged over neighbours."""
    values = np.array([(point.step, getattr(point, quantity)) for point in record.history], dtype=np.float64)
    if len(values) == 0 or not np.isfinite(values[:, 1]).any():
        return np.empty((0, 2))
    return np.array([part.mean(0) for part in np.array_split(values, min(points, len(values)))])


def _median_curve(curves: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and the median over seeds at those that every seed has reached; seeds may be logged at different steps."""
    steps = np.unique(np.concatenate([curve[:, 0] for curve in curves]))
    steps = steps[(steps >= max(c[0, 0] for c in curves)) & (steps <= min(c[-1, 0] for c in curves))]
    return steps, np.median([np.interp(steps, curve[:, 0], curve[:, 1]) for curve in curves], axis=0)


def draw_spectrum(ax: Axes, record: Record, tokens: Sequence[str]) -> None:
    """Eigenvalues in the complex plane, with the unit circle, the declared range, and -1, 0 and +1 marked.

    Below, the real parts once more, a row for each token: eigenvalues of several tokens often coincide.

    Args:
        ax: where to draw.
        record: a record with eigenvalues.
        tokens: the tokens that have a colour, in the order of their colours; none draws all points alike.
    """
    _plane(ax, record.eigenvalue_range)
    scale = _panel_scale(ax)
    rows = [(token, record.token_eigenvalues.get(token, ()), TOKEN_COLORS[i]) for i, token in enumerate(tokens)]
    if not tokens:
        rows = [("", record.eigenvalues, INK)]
    points: dict[str, Any] = {"alpha": 0.8, "linewidths": 0, "clip_on": False}
    # Eigenvalues of several tokens often coincide: the points of one token lie on larger ones of the token before.
    for index, (_, pairs, color) in enumerate(rows):
        z = thin(as_complex(pairs), MAX_POINTS // len(rows))
        crowd = min(1.0, max(0.15, 150 / max(1, len(z))))
        area = (100 - 50 * index / max(1, len(rows) - 1)) * scale**2 * crowd
        ax.scatter(z.real, z.imag, s=area, c=color, zorder=4 + index, **points)
    if not tokens:
        ax.set_ylim(-1.12, 1.12)
        return
    step, first = 0.2, -1.42
    ax.text(-1.12, first + 0.21, "token", ha="right", va="center", color=MUTED, fontsize=11 * scale)
    for index, (token, pairs, color) in enumerate(rows):
        y = first - step * index
        ax.plot([-1, 1], [y, y], color=RULE, linewidth=0.8, zorder=1)
        real = thin(as_complex(pairs).real.astype(np.complex128), 60).real
        ax.scatter(real, np.full_like(real, y), s=34 * scale**2, c=color, zorder=3, **points)
        name = token if len(token) <= 5 else f"{token[:4]}…"
        ax.text(-1.12, y, name, ha="right", va="center", color=color, fontsize=12 * scale)
    ax.set_ylim(first - step * (len(rows) - 0.4), 1.12)


def draw_swatch(ax: Axes, style: Style) -> None:
    """A bit of a model's line with its marker, for legends."""
    ax.axis("off")
    ax.set(xlim=(0, 1), ylim=(0, 1))
    ax.plot([0.02, 0.98], [0.5, 0.5], color=style.color, linestyle=style.linestyle, linewidth=2)
    ax.plot(
        [0.5], [0.5], style.marker, color=style.color, markersize=MARKERS[style.marker],
        markeredgecolor=PAPER, markeredgewidth=0.8,
    )  # fmt: skip


def draw_key(ax: Axes) -> None:
    """What an eigenvalue does to the state, by where it lies: the legend of `draw_spectrum`."""
    _plane(ax, None)
    for x, word in ((1, "keep"), (0, "forget"), (-1, "flip")):
        ax.plot([x], [0], "o", color=INK, markersize=6, zorder=4, clip_on=False)
        ax.text(x - 0.08 * x, 0.15, word, ha={1: "right", 0: "center", -1: "left"}[x], color=INK, fontsize=12)
    angle = np.exp(2j * np.pi / 3)
    for z in (angle, angle.conjugate()):
        ax.plot([z.real], [z.imag], "o", color=INK, markersize=6, zorder=4)
    ax.text(angle.real + 0.12, angle.imag - 0.02, "rotate", va="center", color=INK, fontsize=12)
    ax.set_ylim(-1.12, 1.12)


def _plane(ax: Axes, declared: EigenvalueRange | None) -> None:
    """The unit disc, with a bar over the declared range."""
    ax.set_aspect("equal")
    ax.axis("off")
    ax.set_xlim(-1.32, 1.32)
    ax.add_patch(Circle((0, 0), 1, facecolor=WASH, edgecolor=MUTED, linewidth=1.1, zorder=0))
    ax.plot([-1, 1], [0, 0], color=RULE, linewidth=0.9, zorder=1)
    ax.plot([0, 0], [-1, 1], color=RULE, linewidth=0.9, zorder=1)
    if declared is not None:
        ax.plot([declared.lo, declared.hi], [0, 0], color=RULE, linewidth=6, solid_capstyle="butt", zorder=1.5)
    for x, y, text, side in ((-1.1, 0, "−1", "right"), (0, -0.17, "0", "center"), (1.1, 0, "+1", "left")):
        ax.plot([round(x)] * 2, [-0.07, 0.07], color=MUTED, linewidth=1.1, zorder=2, clip_on=False)
        ax.text(x, y, text, ha=side, va="center", color=MUTED, fontsize=12 * _panel_scale(ax))


def _panel_scale(ax: Axes) -> float:
    """How much smaller than on the page a panel of eigenvalues is."""
    return min(1.0, max(0.8, float(ax.bbox.width) / 230))


def thin(points: ComplexArray, limit: int) -> ComplexArray:
    """Of complex points those that can be told apart in a figure, at most `limit`; the outermost always among them."""
    _, first = np.unique(np.round(points * 100), return_index=True)
    distinct = points[np.sort(first)]
    if len(distinct) <= limit:
        return distinct
    extremes = {int(f(part)) for part in (distinct.real, distinct.imag) for f in (np.argmin, np.argmax)}
    rest = np.random.default_rng(0).permutation([i for i in range(len(distinct)) if i not in extremes])
    return distinct[np.sort([*extremes, *rest[: max(0, limit - len(extremes))]])]


def spectrum_tokens(records: Iterable[Record]) -> list[str]:
    """The tokens that get a colour: all that the records tell apart, or none if they are too many."""
    tokens = list(dict.fromkeys(token for record in records for token in record.token_eigenvalues))
    return tokens if len(tokens) <= MAX_TOKENS else []


def draw_summary(figure: Figure, tasks: Sequence[Sequence[Group]], styles: Mapping[str, Style]) -> None:
    """For each task a row: accuracy against length, and beside it the eigenvalues of every model that has some."""
    for row, groups in enumerate(tasks):
        height, bottom = 1 / len(tasks), 1 - (row + 1) / len(tasks)
        pictures = [(g, record) for g in groups if (record := g.representative()) is not None]
        ax = figure.add_axes((0.04, bottom + 0.15 * height, 0.29, 0.7 * height))
        draw_accuracy(ax, groups, styles, labels=True)
        ax.set_title(groups[0].task, loc="left", color=INK, fontsize=15, fontweight="bold", pad=12)
        tokens = spectrum_tokens(record for _, record in pictures)
        columns = max(3, min(4, len(pictures)))
        lines = -(-len(pictures) // columns)
        for index, (g, record) in enumerate(pictures):
            line, column = divmod(index, columns)
            width, cell = 0.525 / columns, 0.97 * height / lines
            left, low = 0.475 + (column + 0.06) * width, bottom + 0.03 * height + (lines - 1 - line) * cell
            ax = figure.add_axes((left, low, 0.88 * width, cell * 0.8))
            draw_spectrum(ax, record, tokens)
            name, _, rest = true_minus(g.model).partition(" [")
            ax.set_title(f"{name}\n[{rest}" if rest else name, color=styles[g.model].color, fontsize=12, pad=5)
