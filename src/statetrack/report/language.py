"""The page that compares language models: loss curves, perplexity by length and position, probes, speed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from statetrack.report.record import short_length, true_minus
from statetrack.report.theory import write_sections

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_Line = tuple[str, list[tuple[float, float]]]

WIDTH, HEIGHT = 860, 330
MOST_POINTS = 300


def write_language_report(
    entries: Sequence[Mapping[str, Any]], path: Path | str, *, provenance: Mapping[str, str] | None = None
) -> None:
    """Writes one HTML page that needs nothing but itself.

    Args:
        entries: of each model what `statetrack evaluate` has written, with its `name` and its `history`, the lines of
            metrics with a loss.
        path: the page; replaced whole or not at all.
        provenance: how the page was made.

    Raises:
        ValueError: if there are no entries.
    """
    if not entries:
        raise ValueError("a report needs at least one model")
    names = _names(entries)
    sections: list[dict[str, Any]] = [_models(entries, names)]

    def figure(title: str, text: str, lines: Sequence[_Line], number: str, **axes: Any) -> None:
        drawn = [line for line in lines if line[1]]
        if drawn:
            sections.append({"title": title, "text": text, **_figure(drawn, names, number, title, **axes)})

    curves = [
        (name, _thinned([(m.get("tokens", m.get("step", 0)), m["loss"]) for m in entry["history"]]))
        for name, entry in zip(names, entries, strict=True)
    ]
    figure("Loss in training", "On the batches of training, in nats a token.", curves, "loss", x="tokens", y="loss")
    domains = list(dict.fromkeys(d["domain"] for entry in entries for d in entry["perplexity"]))
    for index, domain in enumerate(domains):
        found = [(n, d) for n, e in zip(names, entries, strict=True) for d in e["perplexity"] if d["domain"] == domain]
        by_length = [(n, [(loss["stop"], loss["perplexity"]) for loss in d["by_length"]]) for n, d in found]
        sections.append(_perplexities(domain, found))
        if any(len(points) > 1 for _, points in by_length):
            figure(
                f"{domain}: by length of the context",
                "Perplexity of the same tokens, the state reset every so many. A line that rises is a model that "
                "breaks where its state is carried further.",
                by_length,
                f"length{index}",
                x="tokens over which the state is carried",
                y="perplexity",
                log=True,
            )
        by_position = [
            (
                n,
                [
                    ((p["start"] * p["stop"]) ** 0.5 if p["start"] else p["stop"] / 2, p["perplexity"])
                    for p in d["by_position"]
                ],
            )
            for n, d in found
        ]
        figure(
            f"{domain}: by position",
            "Perplexity at positions of the longest context, read without a reset.",
            by_position,
            f"position{index}",
            x="position",
            y="perplexity",
            log=True,
        )
    for index, probe in enumerate(dict.fromkeys(p["probe"] for entry in entries for p in entry["probes"])):
        found = [(n, [p for p in e["probes"] if p["probe"] == probe]) for n, e in zip(names, entries, strict=True)]
        chance = next(p["chance"] for _, answers in found for p in answers)
        lines = [(n, [(p["length"], 100 * p["accuracy"]) for p in answers]) for n, answers in found]
        figure(
            f"Probe: {probe}",
            f"Right answers by length, of questions in words; guessing gives {100 * chance:.0f}%.",
            lines,
            f"probe{index}",
            x="letters",
            y="right answers (%)",
            log=True,
            level=100 * chance,
            limits=(0.0, 102.0),
        )
        sections[-1] |= _probe_rows(found)
    sections += _generation(entries, names)
    if provenance:
        sections.append({"title": "How it was made", "header": ("", ""), "rows": list(provenance.items())})
    title = f"{len(entries)} language model{'s' * (len(entries) > 1)}"
    write_sections(path, title, sections)


def _generation(entries: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """Time and memory of a generated token by length, of the models and of the Transformers that stand beside them."""
    found: dict[str, tuple[Mapping[str, Any], str]] = {}
    for name, entry in zip(names, entries, strict=True):
        # Evaluations of earlier versions have none.
        if (generation := entry.get("generation")) is not None:
            own, *beside = generation["models"]
            found[name] = own, generation["device"]
            for model in beside:  # one of the same size stands for several
                title = f"{model['title']}, {model['num_parameters'] / 1e6:.0f} M"
                found.setdefault(title, (model, generation["device"]))
    if not found:
        return []
    lengths = sorted({cost["length"] for model, _ in found.values() for cost in model["costs"]})
    rows = []
    for name, (model, device) in found.items():
        by_length = {cost["length"]: cost for cost in model["costs"]}
        cells = [
            f"{c['tokens_per_second']:,.0f} · {_size(c['state_bytes'])}" if (c := by_length.get(n)) else "–"
            for n in lengths
        ]
        rows.append((_unbroken(name), device, *map(_unbroken, cells)))
    sections: list[dict[str, Any]] = [
        {
            "title": "Generation",
            "text": "Tokens a second, one row, and the memory of what is carried from token to token, after so many "
            "tokens. Weights don't count. Untrained models stand beside: what they cost does not depend on training.",
            "header": ("model", "measured on", *map(short_length, lengths)),
            "rows": rows,
        }
    ]
    figures = (
        ("Generation: speed by length", "tokens_per_second", "tokens a second", 1.0),
        ("Generation: memory by length", "state_bytes", "MB carried from token to token", 1e-6),
    )
    for title, key, label, unit in figures if len(lengths) > 1 else ():
        lines = [
            (name, [(cost["length"], unit * cost[key]) for cost in model["costs"]])
            for name, (model, _) in found.items()
        ]
        drawn = _figure(
            lines, list(dict.fromkeys([*names, *found])), key, title, x="tokens before", y=label, log=True, floor=0.0
        )
        sections.append({"title": title, **drawn})
    return sections


def _size(number: float) -> str:
    """`299 kB`, `33.6 MB`."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:.0f} B"


def _names(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """`DeltaNet [-1, 1]`; with the name of the run where that would not tell models apart."""
    titles = [entry["title"] for entry in entries]
    names = [t if titles.count(t) == 1 else f"{t}, {e['name']}" for t, e in zip(titles, entries, strict=True)]
    return [name if names.count(name) == 1 else f"{name} ({names[:i].count(name) + 1})" for i, name in enumerate(names)]


def _models(entries: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    rows = []
    for entry, name in zip(entries, names, strict=True):
        history = entry["history"]
        last = history[-1] if history else {}
        speeds = sorted(m["tokens_per_second"] for m in history if m.get("tokens_per_second"))
        rows.append(
            (
                _unbroken(name),
                entry["run"],
                f"{entry['num_parameters'] / 1e6:.1f} M",
                f"{last['tokens']:,}" if last.get("tokens") else "–",
                f"{last['loss']:.3f}" if last else "–",
                f"{speeds[len(speeds) // 2]:,.0f}" if speeds else "–",
            )
        )
    header = ("model", "directory", "parameters", "tokens of training", "last loss", "tokens/s, median")
    return {"title": "The models", "header": header, "rows": rows}


def _perplexities(domain: str, found: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    lengths = sorted({loss["stop"] for _, d in found for loss in d["by_length"]})
    rows = []
    for name, d in found:
        by_length = {loss["stop"]: loss for loss in d["by_length"]}
        cells = []
        for length in lengths:
            loss = by_length.get(length)
            error = "" if loss is None or loss["stderr"] is None else f" ± {loss['perplexity'] * loss['stderr']:.2g}"
            cells.append("–" if loss is None else f"{loss['perplexity']:.2f}{error}")
        last = d["by_length"][-1]
        change = "–" if last["change_stderr"] is None else f"{last['change']:+.4f} ± {last['change_stderr']:.4f}"
        bits, tokens = f"{last['bits_per_byte']:.3f}", f"{last['tokens']:,}"
        rows.append((_unbroken(name), *map(_unbroken, cells), bits, _unbroken(change), tokens))
    header = ("model", *(f"at {short_length(n)}" for n in lengths), "bits a byte", "nats, longest - shortest", "tokens")
    text = (
        "Perplexity on held-out text, ± its standard error over stretches of text; all lengths on the same tokens. "
        "Bits a byte, at the longest length, compare models with different tokenizers."
    )
    return {"title": f"{domain}: perplexity", "text": text, "header": header, "rows": rows}


def _probe_rows(found: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]) -> dict[str, Any]:
    lengths = sorted({p["length"] for _, answers in found for p in answers})
    rows = []
    for name, answers in found:
        by_length = {p["length"]: p for p in answers}
        cells = [
            f"{100 * p['accuracy']:.0f}% ± {100 * p['stderr']:.0f}" if (p := by_length.get(n)) else "–" for n in lengths
        ]
        rows.append((_unbroken(name), *map(_unbroken, cells), str(answers[0]["questions"]) if answers else "–"))
    return {"header": ("model", *map(short_length, lengths), "questions"), "rows": rows}


def _unbroken(text: str) -> str:
    """Text with true minus signs that stays in one line of a table."""
    return true_minus(text).replace(" ", "\u00a0")


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means of neighbours where there are more points than a figure shows."""
    points = [(x, y) for x, y in points if math.isfinite(y)]
    size = -(-len(points) // MOST_POINTS) or 1
    pieces = [points[i : i + size] for i in range(0, len(points), size)]
    return [(piece[-1][0], sum(y for _, y in piece) / len(piece)) for piece in pieces]


def _figure(lines: Sequence[_Line], names: Sequence[str], prefix: str, label: str, **axes: Any) -> dict[str, Any]:
    from statetrack.report import canvas

    margins = (62, 20 + 7.2 * max(len(name) for name, _ in lines), 46, 10)
    draw = partial(_draw, lines=lines, names=names, **axes)
    svg = canvas.inline_svg(draw, WIDTH, HEIGHT, margins=margins, prefix=prefix, label=label)
    return {"svg": Markup(svg), "width": WIDTH}


def _draw(
    ax: Axes,
    *,
    lines: Sequence[_Line],
    names: Sequence[str],
    x: str,
    y: str,
    log: bool = False,
    level: float | None = None,
    limits: tuple[float, float] | None = None,
    floor: float | None = None,
) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    from statetrack.report.canvas import MODEL_COLORS, MUTED, PAPER, RULE
    from statetrack.report.figures import label_ends

    if log:
        ax.set_xscale("log")
    if level is not None:
        ax.axhline(level, color=MUTED, linewidth=1, dashes=(4, 3), zorder=1)
    ends = []
    for name, points in lines:
        color = MODEL_COLORS[names.index(name) % len(MODEL_COLORS)]
        marker = "o" if len(points) <= 40 else ""
        ax.plot(
            *zip(*points, strict=True), color=color, linewidth=2, marker=marker, markersize=6, markeredgecolor=PAPER,
            zorder=3,
        )  # fmt: skip
        ends.append((*points[-1], true_minus(name), color))
    if limits is not None:
        ax.set_ylim(*limits)
    if floor is not None:
        ax.set_ylim(bottom=floor)
    if log:
        places = sorted({point[0] for _, points in lines for point in points})
        left, right = places[0] / 1.1, places[-1] * 1.1
        room, shown = 46 / ax.bbox.width * math.log(right / left), []
        for place in places:
            if not shown or math.log(place / shown[-1]) > room:
                shown.append(place)
        ax.set_xlim(left, right)
        ax.xaxis.set_major_locator(FixedLocator(shown))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{round(value):,}"))
        ax.xaxis.set_minor_locator(NullLocator())
    else:
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _amount(value)))
    ax.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    ax.grid(axis="y", color=RULE, linewidth=0.6)
    ax.spines["left"].set_visible(False)
    ax.set_xlabel(f"{x} (log scale)" if log else x)
    ax.set_ylabel(y)
    label_ends(ax, ends)


def _amount(value: float) -> str:
    """`250k`, `1.5M`."""
    for unit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.4g}{suffix}"
    return f"{value:g}"
