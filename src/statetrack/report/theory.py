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

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from statetrack.theory.certify import Certificate, Spectrum
    from statetrack.theory.requirements import Analysis

MOST_STATES = 30
"""Larger automata are not drawn."""

MOST_CELLS = 900
"""D-classes with more H-classes are counted and not drawn."""

MOST_EGGS = 12


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
        facts.append(("compiled", f"{analysis.plan.num_layers} layers: {analysis.plan.why}"))
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
    if analysis.states <= MOST_STATES:
        svg = canvas.inline_svg(
            partial(draw_automaton, automaton=analysis.automaton),
            620,
            620,
            margins=(0, 0, 0, 0),
            prefix="automaton",
            label=f"The minimal automaton of {name}, with {analysis.states} states.",
        )
        text = "The arrow from outside leads to the start; states with another output than 0 are filled."
        sections.append({"title": "The minimal automaton", "text": text, "svg": Markup(svg)})
    if analysis.monoid_size is not None:
        sections.append(
            {
                "title": "Eggbox diagram",
                "text": "A box for each D-class of the transition monoid, rows for R-classes, columns for L-classes; a "
                "cell has the number of elements of an H-class, with a star where they are a group.",
                "eggs": eggboxes(analysis.automaton),
            }
        )
    _write(path, name, sections)


def write_certificate(name: str, certificate: Certificate, path: Path | str) -> None:
    """Writes a page: what a model can't do, and the eigenvalues of its layers and of products of tokens.

    Raises:
        OSError: if the page can't be written.
    """
    from statetrack.report import canvas

    discs = []
    for number, spectrum in enumerate(certificate.spectra):
        caption = _caption(spectrum)
        svg = canvas.inline_svg(
            partial(draw_disc, values=spectrum.values),
            230,
            230,
            margins=(4, 4, 4, 4),
            prefix=f"disc{number}",
            label=f"Eigenvalues in the unit disc. {caption}",
        )
        discs.append({"svg": Markup(svg), "caption": caption})
    claims = [(c.sentence, c.scope, c.theorem, c.assumption) for c in certificate.claims]
    nothing = certificate.note or "No theorem here rules anything out."
    sections = [
        {
            "title": "What it can never do",
            "text": "" if claims else nothing,
            "header": ("", "scope", "theorem", "assumption"),
            "rows": claims,
        },
        {
            "title": "Eigenvalues",
            "text": "Of the transition matrices of single tokens, and of products of two and three tokens in a row.",
            "discs": discs,
        },
    ]
    _write(path, name, sections)


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
            f"{len(members):,} elements with {rank[members[0]]} images, {len(rows)} R x {len(columns)} L, "
            f"{int(idempotent[members].sum())} idempotents"
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
        x, y = places[state]
        if state == following:
            scale = 1 + 1.6 * radius
            loop = (x * scale, y * scale) if count > 1 else (x, y + 1.6 * radius)
            axes.plot(
                [loop[0] + radius * 0.8 * math.cos(t) for t in np.linspace(0, 2 * math.pi, 40)],
                [loop[1] + radius * 0.8 * math.sin(t) for t in np.linspace(0, 2 * math.pi, 40)],
                color=canvas.MUTED,
                linewidth=1,
                zorder=1,
            )
            at = (loop[0] * 1.12, loop[1] * 1.12) if count > 1 else (x, loop[1] + 1.2 * radius)
        else:
            end = places[following]
            axes.annotate(
                "",
                xy=end,
                xytext=(x, y),
                arrowprops={
                    "arrowstyle": "-|>",
                    "connectionstyle": "arc3,rad=0.18",
                    "color": canvas.MUTED,
                    "shrinkA": radius * 210,
                    "shrinkB": radius * 210,
                },
            )
            # Beside the middle, on the side to which the arrow bends.
            dx, dy = end[0] - x, end[1] - y
            at = ((x + end[0]) / 2 + 0.13 * dy, (y + end[1]) / 2 - 0.13 * dx)
        axes.text(*at, text, ha="center", va="center", color=canvas.INK, fontsize=10)
    for state, (x, y) in enumerate(places):
        filled = int(automaton.outputs[state]) != 0
        axes.add_patch(_circle((x, y), radius, canvas.WASH if filled else canvas.PAPER, canvas.INK))
        axes.text(x, y, str(state), ha="center", va="center", color=canvas.INK)
    x, y = places[automaton.start]
    axes.annotate(
        "",
        xy=(x - radius, y),
        xytext=(x - 2.4 * radius, y),
        arrowprops={"arrowstyle": "-|>", "color": canvas.INK, "shrinkA": 0, "shrinkB": 0},
    )
    axes.set(xlim=(-1.5, 1.5), ylim=(-1.5, 1.5), aspect="equal")
    axes.set_axis_off()


def draw_disc(axes: Axes, values: Sequence[tuple[float, float]]) -> None:
    """Draws eigenvalues in the unit disc."""
    from statetrack.report import canvas

    axes.add_patch(_circle((0, 0), 1, canvas.WASH, canvas.RULE))
    axes.plot([-1, 1], [0, 0], color=canvas.RULE, linewidth=1)
    x, y = zip(*values, strict=True)
    axes.plot(x, y, "o", color=canvas.MODEL_COLORS[0], markersize=4, alpha=0.6)
    axes.set(xlim=(-1.08, 1.08), ylim=(-1.08, 1.08), aspect="equal")
    axes.set_axis_off()


def _circle(centre: tuple[float, float], radius: float, face: str, edge: str) -> Any:
    from matplotlib.patches import Circle

    return Circle(centre, radius, facecolor=face, edgecolor=edge, linewidth=1, zorder=2)


def _caption(spectrum: Spectrum) -> str:
    tokens = "one token" if spectrum.tokens == 1 else f"products of {spectrum.tokens} tokens"
    return f"layer {spectrum.layer}, head {spectrum.head}, {tokens} ({spectrum.scope})"


def _write(path: Path | str, title: str, sections: list[dict[str, Any]]) -> None:
    from statetrack.report import canvas

    empty = dict.fromkeys(("text", "svg", "header"), "") | dict.fromkeys(("rows", "eggs", "discs"), ())
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    file = resources.files("statetrack").joinpath("templates", "theory.html.jinja")
    template = environment.from_string(file.read_text(encoding="utf-8"))
    page = template.render(title=title, sections=[empty | section for section in sections], palette=canvas.PALETTE)
    atomic_write(path, page)
