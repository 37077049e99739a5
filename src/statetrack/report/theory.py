"""Pages about theory: an automaton with its eggbox diagram, and the spectra of a certified model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from markupsafe import Markup

from statetrack.automata import Automaton
from statetrack.automata.monoid import transition_monoid
from statetrack.files import atomic_write
from statetrack.theory.requirements import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from statetrack.theory.certify import Certificate, Spectrum
    from statetrack.theory.requirements import Analysis

MOST_STATES = 30
"""Larger automata are not drawn."""

MOST_CELLS = 900
"""D-classes with more H-classes are counted and not drawn."""

MOST_EGGS = 12

MOST_HEADS = 48
"""Of larger models the first heads are drawn."""


def write_analysis(name: str, analysis: Analysis, path: Path | str) -> None:
    """Writes a page: the facts, the requirements, a drawing of the minimal automaton, its eggbox diagram.

    Raises:
        OSError: if the page can't be written.
    """
    from statetrack.report import canvas

    facts = [
        ("states", f"{analysis.states:,}"),
        ("transition monoid", "not enumerated" if analysis.monoid_size is None else f"{analysis.monoid_size:,}"),
        ("star-free", "yes" if analysis.aperiodic else "no"),
        ("groups", ", ".join(group.name for group in analysis.groups) or "none"),
        ("solvable", "yes" if analysis.solvable else "no"),
        ("primes", ", ".join(map(str, analysis.primes)) or "none"),
    ]
    if analysis.plan is not None:
        facts.append(("compiled", f"{counted(analysis.plan.num_layers, 'layer')}: {analysis.plan.why}"))
    sections: list[dict[str, Any]] = [
        {"title": "What it is", "rows": facts},
        {
            "title": "What it needs",
            "header": ("what", "value", "", "theorem", "assumption", "why"),
            "rows": [
                (r.quantity.replace("_", " "), r.value, r.kind, r.theorem, r.assumption, r.sentence)
                for r in analysis.requirements
            ],
        },
    ]
    if len(analysis.letters) <= MOST_STATES:
        sections.append(
            {
                "title": "What its letters do",
                "header": ("letter", "kind", "states moved", "rank of I - A", "repeated, it goes round"),
                "rows": [
                    (f.name, f.kind, f.moved, f.rank, f"{f.period} states" if f.period > 1 else "nothing")
                    for f in analysis.letters
                ],
            }
        )
    if analysis.states <= MOST_STATES:
        width, height = (545, 420) if analysis.states <= 4 else (805, 620)
        svg = canvas.inline_svg(
            partial(draw_automaton, automaton=analysis.automaton),
            width,
            height,
            margins=(0, 0, 0, 0),
            prefix="automaton",
            label=f"The minimal automaton of {name}, with {analysis.states} states.",
        )
        text = "The arrow from outside leads to the start; states with another output than 0 are filled."
        sections.append({"title": "The minimal automaton", "text": text, "svg": Markup(svg), "width": width})
    if analysis.monoid_size is not None:
        sections.append(
            {
                "title": "Eggbox diagram",
                "text": "A box for each D-class of the transition monoid, rows for R-classes, columns for L-classes; a "
                "cell has the number of elements of an H-class, with a star where they are a group.",
                "eggs": eggboxes(analysis.automaton),
            }
        )
    write_sections(path, name, sections)


def write_certificate(name: str, certificate: Certificate, path: Path | str) -> None:
    """Writes a page: what a model can't do, and the eigenvalues of its layers and of products of tokens.

    Raises:
        OSError: if the page can't be written.
    """
    from statetrack.report import canvas

    rows = []
    found = heads(certificate)
    for number, ((layer, head), spectra) in enumerate(found.items()):
        if number == MOST_HEADS:
            break
        cells = []
        for tokens in sorted({s.tokens for s in spectra}):
            shown = [s for s in spectra if s.tokens == tokens]
            bound = next((s for s in shown if s.scope == "sound bound"), None)
            best = next((s for s in shown if s is not bound), None)  # the strongest scope comes first
            what = "one token" if tokens == 1 else f"products of {tokens} tokens"
            svg = canvas.inline_svg(
                partial(
                    draw_disc,
                    values=() if best is None else best.values,
                    region=() if bound is None else bound.values,
                    color=canvas.MODEL_COLORS[min(tokens, len(canvas.MODEL_COLORS)) - 1],
                ),
                210,
                210,
                margins=(2, 2, 2, 2),
                prefix=f"disc{number}-{tokens}",
                label=f"Eigenvalues of layer {layer}, head {head}, {what}, in the unit disc.",
            )
            lines = [f"{what}: {describe(s)}" if s is best else describe(s) for s in (best, bound) if s is not None]
            cells.append({"svg": Markup(svg), "lines": lines})
        rows.append({"name": f"layer {layer}, head {head}", "cells": cells})
    claims = [(c.sentence, c.scope, c.theorem, c.assumption) for c in certificate.claims]
    nothing = certificate.note or "No theorem here rules anything out."
    left_out = "" if len(found) <= MOST_HEADS else f" The first {MOST_HEADS} of {len(found)} heads are drawn."
    sections = [
        {
            "title": "What it can never do",
            "text": "" if claims else nothing,
            "header": ("", "scope", "theorem", "assumption"),
            "rows": claims,
        },
        {
            "title": "Eigenvalues",
            "text": "In the complex plane, of the transition matrices of single tokens and of products of two and "
            "three in a row. A point on the left end of the axis flips the state, one on the circle and off the axis "
            "turns it: modulo m counts what turns by a whole part of the circle. Nothing that lies inside the circle "
            "lasts. Where the norms of the weights bound what any input can do, the shaded region holds it." + left_out,
            "discs": rows,
        },
    ]
    write_sections(path, name, sections)


def heads(certificate: Certificate) -> dict[tuple[int, int], list[Spectrum]]:
    """The spectra of each layer and head, the strongest scope first."""
    found: dict[tuple[int, int], list[Spectrum]] = {}
    for spectrum in certificate.spectra:
        found.setdefault((spectrum.layer, spectrum.head), []).append(spectrum)
    return found


def describe(spectrum: Spectrum) -> str:
    """Scope, lowest real part, horizon and distance of beta from 2, as a caption has them."""
    parts = [f"lowest {spectrum.lowest:.4g}"]
    if spectrum.horizon is not None:
        parts.append(f"flips or turns last {spectrum.lasting()}")
    if spectrum.beta_gap is not None:
        parts.append(f"beta {spectrum.beta_gap:.2g} from 2")
    return f"{spectrum.scope}: " + ", ".join(parts)


def eggboxes(automaton: Automaton) -> list[dict[str, Any]]:
    """The D-classes of the transition monoid, those of large images first: a caption, and cells by R- and L-class."""
    monoid = transition_monoid(automaton)
    if monoid is None:
        return []
    green = monoid.green
    rank = np.array([len(np.unique(element)) for element in monoid.elements])
    idempotent = np.zeros(len(monoid), dtype=bool)
    idempotent[monoid.idempotents] = True
    eggs = []
    for d in sorted(range(green.d_class.max() + 1), key=lambda d: -rank[green.d_class == d].max()):
        members = np.flatnonzero(green.d_class == d)
        rows, row = np.unique(green.r_class[members], return_inverse=True)
        columns, column = np.unique(green.l_class[members], return_inverse=True)
        caption = (
            f"{counted(len(members), 'element')} with {counted(int(rank[members[0]]), 'image')}, {len(rows)} R x "
            f"{len(columns)} L, {counted(idempotent[members].sum(), 'idempotent')}"
        )
        cells = []
        if len(rows) * len(columns) <= MOST_CELLS:
            sizes = np.zeros((len(rows), len(columns)), dtype=np.int64)
            np.add.at(sizes, (row, column), 1)
            groups = np.zeros_like(sizes, dtype=bool)
            groups[row[idempotent[members]], column[idempotent[members]]] = True
            cells = [
                [{"size": int(size), "group": bool(is_group)} for size, is_group in zip(*pair, strict=True)]
                for pair in zip(sizes, groups, strict=True)
            ]
        eggs.append({"caption": caption, "cells": cells})
        if len(eggs) == MOST_EGGS:
            break
    return eggs


def draw_automaton(axes: Axes, automaton: Automaton) -> None:
    """Draws states on a circle and an arrow for each pair of states that letters join."""
    from statetrack.report import canvas

    count = automaton.num_states
    angles = [math.pi / 2 + 2 * math.pi * state / count for state in range(count)]
    places = [(math.cos(angle), math.sin(angle)) for angle in angles] if count > 1 else [(0.0, 0.0)]
    radius = min(0.16, 1.6 / max(count, 4))
    names = automaton.letter_names or tuple(map(str, range(automaton.num_letters)))
    labels: dict[tuple[int, int], list[str]] = {}
    for state, row in enumerate(automaton.transitions.tolist()):
        for letter, following in enumerate(row):
            labels.setdefault((state, following), []).append(names[letter])
    for (state, following), letters in labels.items():
        text = ", ".join(letters[:4]) + (", ..." if len(letters) > 4 else "")
        if state == following:
            at = _draw_loop(axes, places[state], angles[state], radius)
        else:
            # Two arrows between the same states bend apart.
            bend = 0.18 if (following, state) in labels else 0.0
            at = _draw_arrow(axes, places[state], places[following], radius, bend)
        ground = {"facecolor": canvas.PAPER, "edgecolor": "none", "boxstyle": "square,pad=0.15"}
        axes.text(*at, text, ha="center", va="center", color=canvas.INK, fontsize=10, bbox=ground, zorder=3)
    for state, (x, y) in enumerate(places):
        filled = int(automaton.outputs[state]) != 0
        axes.add_patch(_circle((x, y), radius, canvas.WASH if filled else canvas.PAPER, canvas.INK))
        axes.text(x, y, str(state), ha="center", va="center", color=canvas.INK, zorder=4)
    x, y = places[automaton.start]
    axes.annotate(
        "",
        xy=(x - radius, y),
        xytext=(x - 2.4 * radius, y),
        arrowprops={"arrowstyle": "-|>", "color": canvas.INK, "shrinkA": 0, "shrinkB": 0},
    )
    axes.set(xlim=(-2.05, 2.05), ylim=(-1.58, 1.58), aspect="equal")  # labels need room at the sides
    axes.set_axis_off()


_Point = tuple[float, float]


def _draw_arrow(axes: Axes, begin: _Point, end: _Point, radius: float, bend: float) -> _Point:
    """An arrow between two states, bent to its right; returns where its label goes."""
    dx, dy = end[0] - begin[0], end[1] - begin[1]
    control = ((begin[0] + end[0]) / 2 + bend * dy, (begin[1] + end[1]) / 2 - bend * dx)

    def at(t: float) -> _Point:
        x, y = ((1 - t) ** 2 * a + 2 * t * (1 - t) * c + t**2 * b for a, c, b in zip(begin, control, end, strict=True))
        return x, y

    # From rim to rim: the part of the curve outside both circles.
    outside = [t / 200 for t in range(201) if min(math.dist(at(t / 200), state) for state in (begin, end)) >= radius]
    _arrow_along(axes, [at(t) for t in outside])
    # Nearer to where it comes from, so that the labels of arrows that cross in the middle keep apart.
    return at(0.42)


def _draw_loop(axes: Axes, place: _Point, angle: float, radius: float) -> _Point:
    """An arrow from a state to itself, on the side away from the centre; returns where its label goes."""

    def at(distance: float, turn: float) -> np.ndarray:
        return np.array(place) + distance * radius * np.array([math.cos(angle + turn), math.sin(angle + turn)])

    points = [at(1, -0.5), at(3.4, -0.6), at(3.4, 0.6), at(1, 0.5)]
    curve = []
    for t in np.linspace(0, 1, 60):
        weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3)
        x, y = np.tensordot(weights, points, 1)
        curve.append((float(x), float(y)))
    _arrow_along(axes, curve)
    # The text is wider than high, so that beside a state it has to stand farther out than above or below one.
    x, y = at(2.7 + 0.6 * abs(math.cos(angle)), 0)
    return float(x), float(y)


def _arrow_along(axes: Axes, points: list[_Point]) -> None:
    from statetrack.report import canvas

    axes.plot(*zip(*points, strict=True), color=canvas.MUTED, linewidth=1, zorder=1)
    tip = {"arrowstyle": "-|>", "color": canvas.MUTED, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", xy=points[-1], xytext=points[-4], arrowprops=tip)


def draw_disc(
    axes: Axes, values: Sequence[tuple[float, float]], region: Sequence[tuple[float, float]] = (), color: str = ""
) -> None:
    """Draws eigenvalues in the unit disc, on top of a region that holds those of all inputs."""
    from statetrack.report import canvas

    axes.add_patch(_circle((0, 0), 1, canvas.PAPER, canvas.RULE))
    axes.plot([-1, 1], [0, 0], color=canvas.RULE, linewidth=1, zorder=3)
    axes.plot([0, 0], [-1, 1], color=canvas.RULE, linewidth=1, zorder=3)
    if region:
        x, y = zip(*region, strict=True)
        axes.fill(x, y, facecolor=canvas.WASH, edgecolor=canvas.MUTED, linewidth=1, zorder=2)
        axes.plot(x, y, color=canvas.MUTED, linewidth=1 if any(y) else 4, alpha=0.5, zorder=3)
    if values:
        x, y = zip(*values, strict=True)
        axes.plot(x, y, "o", color=color or canvas.MODEL_COLORS[0], markersize=5, alpha=0.6, zorder=4)
    axes.set(xlim=(-1.08, 1.08), ylim=(-1.08, 1.08), aspect="equal")
    axes.set_axis_off()


def _circle(centre: tuple[float, float], radius: float, face: str, edge: str) -> Any:
    from matplotlib.patches import Circle

    return Circle(centre, radius, facecolor=face, edgecolor=edge, linewidth=1, zorder=2)


def write_sections(path: Path | str, title: str, sections: list[dict[str, Any]]) -> None:
    """Writes a page of sections, each with a title and any of a text, a drawing, a table; one file, no script."""
    from statetrack.report import canvas

    empty = dict.fromkeys(("text", "svg", "width", "header"), "") | dict.fromkeys(("rows", "eggs", "discs"), ())
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    file = resources.files("statetrack").joinpath("templates", "theory.html.jinja")
    template = environment.from_string(file.read_text(encoding="utf-8"))
    page = template.render(title=title, sections=[empty | section for section in sections], palette=canvas.PALETTE)
    atomic_write(path, page)
