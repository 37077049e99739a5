"""The figure of `benchmarks.language_models`: loss curves, and perplexity against how far the state is carried."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.language_models_tables import title

_SMOOTH = 0.7
"""The share of the mean so far in a curve's moving average: batches differ more than models do."""


def draw(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws the runs into an SVG: training on the left, a domain in each panel beside."""
    domains = list(dict.fromkeys(domain for record in records for domain in record["held_out"]))
    figure = Figure(figsize=(5 * (1 + len(domains)), 4), layout="constrained")
    training, *panels = figure.subplots(1, 1 + len(domains), squeeze=False)[0]
    for number, record in enumerate(records):
        style = "-" if record["by"] == "statetrack" else "--"
        look = {"color": f"C{number}", "linestyle": style, "linewidth": 1.2}
        tokens, losses = zip(*record["loss"], strict=True)
        training.plot([count / 1e6 for count in tokens], smoothed(losses), label=title(record), **look)
        for axes, domain in zip(panels, domains, strict=True):
            points = sorted((int(length), value) for length, value in record["held_out"].get(domain, {}).items())
            if points:
                axes.plot(*zip(*points, strict=True), marker=".", **look)
    training.set(xlabel="million tokens", ylabel="loss of training, nats a token, smoothed", xscale="log")
    training.legend(fontsize=6)
    for axes, domain in zip(panels, domains, strict=True):
        axes.set(xlabel="tokens the state is carried over", ylabel="perplexity", title=f"{domain}, held out")
        axes.set_xscale("log", base=2)
    for axes in (training, *panels):
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "statetrack"}):
        figure.savefig(path, metadata={"Date": None})


def smoothed(values: Sequence[float]) -> list[float]:
    """The moving average that begins with the first value."""
    result: list[float] = []
    for value in values:
        result.append(value if not result else _SMOOTH * result[-1] + (1 - _SMOOTH) * value)
    return result
