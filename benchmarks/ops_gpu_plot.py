"""The figure of `python -m benchmarks.ops plot`: time and error of the delta rule against T, ours and the peer's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Points = list[tuple[int, float]]


def draw(speed: list[dict[str, Any]], accuracy: list[dict[str, Any]], path: Path) -> None:
    """Draws the rows `sweep-*` and the cases named "..., T = ..." into an SVG."""
    panels = 1 + any(row["row"].startswith("sweep-") for row in speed)  # times only where there are some
    figure = Figure(figsize=(5 * panels, 4), layout="constrained")
    times, errors = figure.subplots(1, panels, squeeze=False)[0][[0, -1]]
    for which, style in (("fwd", "-"), ("fwd+bwd", "--")):
        rows = [row for row in speed if row["row"].startswith("sweep-") and row["pass"] == which]
        for name, colour in (("ours", "C0"), ("peer", "C1")):
            points = [(row["T"], row[f"{name}_ms"]) for row in rows if row.get(f"{name}_ms") is not None]
            _line(times, points, f"{_LABELS[name]}, {_PASSES[which]}", colour, style)
        _line(times, [(row["T"], row["floor_ms"]) for row in rows], f"memory floor, {_PASSES[which]}", "0.6", style)
    if panels == 2:
        times.set(xlabel="T", ylabel="milliseconds", title="delta rule, B 1, H 16, D 128, bfloat16")
    for start, style in (("random keys, beta = 2", "-"), ("parity bits on an exact key", "--")):
        rows = [row for row in accuracy if row["case"].startswith(f"{start}, T = ") and row["tensor"] == "o"]
        for name, colour in (("ours", "C0"), ("peer", "C1"), ("recurrence", "0.6")):
            points = [(row["T"], row[name]) for row in rows if row.get(name) is not None]
            _line(errors, points, f"{_LABELS[name]}: {start}", colour, style)
    errors.set(xlabel="T", ylabel="relative error of o", title="against float64 on the same inputs")
    for axes in (times, errors):
        axes.set(xscale="log", yscale="log")
        axes.grid(alpha=0.3)
        if axes.get_lines():
            axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "statetrack"}):
        figure.savefig(path, metadata={"Date": None})


_LABELS = {"ours": "statetrack", "peer": "flash-linear-attention", "recurrence": "float32 step loop"}
_PASSES = {"fwd": "forward", "fwd+bwd": "with backward"}


def _line(axes: Axes, points: Points, label: str, colour: str, style: str) -> None:
    if points:
        ts, values = zip(*sorted(points), strict=True)
        axes.plot(ts, values, style, color=colour, marker=".", label=label)
