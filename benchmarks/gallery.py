"""The pictures of docs/theory.md, one for each tool, made by the tools themselves; to docs/images/.

python -m benchmarks.gallery [analyze] [compile] [certify]
"""

from __future__ import annotations

import sys

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from benchmarks.common import ROOT
from benchmarks.theory import full
from statetrack.automata import Automaton
from statetrack.experiments import load_experiment
from statetrack.files import atomic_write
from statetrack.report import canvas
from statetrack.report.theory import describe, draw_automaton, draw_disc, eggboxes, heads
from statetrack.theory.certify import Certificate, Spectrum, certify
from statetrack.theory.construct import compile
from statetrack.training import train

EXPRESSION = "(ab)*"
LEVELS_OF = 5
WORD = 36


def analyze_picture(figure: Figure) -> None:
    """The minimal automaton of an expression, and the eggbox diagram of its transition monoid."""
    left, right = figure.subplots(1, 2, width_ratios=(1.3, 1))
    automaton = Automaton.from_regex(EXPRESSION)
    draw_automaton(left, automaton)
    left.set(xlim=(-1.4, 1.75), ylim=(-1.0, 1.3))
    left.set_title(f"the minimal automaton of {EXPRESSION}", fontsize=10)
    right.set_axis_off()
    right.set(xlim=(-0.6, 2.6), ylim=(4.9, -0.2), aspect="equal")
    right.set_title("its transition monoid, in Green's boxes", fontsize=10)
    top = 0.0
    for egg in eggboxes(automaton):
        for row in egg["cells"]:
            for column, cell in enumerate(row):
                face = canvas.WASH if cell["group"] else canvas.PAPER
                right.add_patch(Rectangle((column, top), 1, 1, facecolor=face, edgecolor=canvas.MUTED))
                text = f"{cell['size']}{'*' if cell['group'] else ''}"
                right.text(column + 0.5, top + 0.5, text, ha="center", va="center", color=canvas.INK)
            top += 1
        top += 0.35


@torch.inference_mode()
def compile_picture(figure: Figure) -> None:
    """What the levels of a compiled cascade hold while it reads a word: the states that each excludes."""
    automaton = full(LEVELS_OF)
    model = compile(automaton)
    letters = torch.randint(automaton.num_letters, (WORD,), generator=torch.Generator().manual_seed(1))
    excluded_at_start = [state for state in range(LEVELS_OF) if state != automaton.start]
    state = model.init_state(1)
    rows: list[list[int]] = [[] for _ in range(LEVELS_OF)]
    for letter in letters:
        logits, state = model.step(letter.unsqueeze(0), state)
        for level, layer in enumerate(state):
            unit = layer["recurrence"][0, 0, :, 0].clone()
            unit[excluded_at_start[level]] += 1  # a head holds the difference from where it starts
            rows[level].append(int(unit.argmax()))
        rows[-1].append(int(logits.argmax()))
    assert rows[-1] == automaton.run(letters.unsqueeze(0))[0].tolist()
    axes = figure.add_axes((0.16, 0.16, 0.82, 0.68))
    for row, states in enumerate(rows):
        y = row + (0.4 if row == LEVELS_OF - 1 else 0)
        for time, value in enumerate(states):
            color = canvas.TOKEN_COLORS[value]
            axes.add_patch(Rectangle((time, y), 0.94, 0.9, facecolor=color, edgecolor="none", alpha=0.85))
            axes.text(time + 0.47, y + 0.47, str(value), ha="center", va="center", color=canvas.PAPER, fontsize=8)
    names = [f"layer {level}: not" for level in range(LEVELS_OF - 1)]
    axes.set_yticks([*(level + 0.45 for level in range(LEVELS_OF - 1)), LEVELS_OF - 0.15], [*names, "so the state is"])
    axes.set_xticks([time + 0.47 for time in range(WORD)], ["cxm"[letter] for letter in letters.tolist()])
    axes.set(xlim=(0, WORD), ylim=(LEVELS_OF + 0.5, -0.1), xlabel="letters: c cycle, x exchange, m merge")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(f"all maps of {LEVELS_OF} states in {LEVELS_OF - 1} compiled layers", fontsize=10)


def certify_picture(figure: Figure) -> None:
    """The certificates of three models that the demo trains: one head of each that lasts the longest."""
    runs = {run.name: run for run in load_experiment("demo", [0]).runs}
    chosen = {
        "parity, DeltaNet in [0, 1]": "parity-deltanet[0,1]n1-seed0",
        "parity, DeltaNet in [-1, 1]": "parity-deltanet[-1,1]n1-seed0",
        "S3, two reflections": "group_S3-deltaproduct[-1,1]n2-seed0",
    }
    figures = figure.subplots(2, 3)
    figure.subplots_adjust(left=0.02, right=0.98, top=0.92, bottom=0.1, hspace=0.45, wspace=0.1)
    for column, (title, name) in enumerate(chosen.items()):
        certificate = certify(train(runs[name].config).model.eval())
        assert certificate.rules_out("parity") == ("[0,1]" in name)
        one, two = _most_lasting(certificate)
        verdict = "cannot solve parity (T1)" if certificate.rules_out("parity") else "parity is not ruled out"
        _disc(figures[0, column], one, f"{title}\n{verdict}")
        _disc(figures[1, column], two, "products of two tokens")


def _most_lasting(certificate: Certificate) -> tuple[Spectrum, Spectrum]:
    """Of the head whose flips or turns by the largest angle last the longest: every token, and products of two."""

    def lasting(spectra: list[Spectrum]) -> tuple[bool, float]:
        exact = next(s for s in spectra if s.scope == "vocabulary, exact")
        return max(abs(y) for _, y in exact.values) > 0.1, -exact.lowest

    spectra = max(heads(certificate).values(), key=lasting)
    return next(s for s in spectra if s.scope == "vocabulary, exact"), next(s for s in spectra if s.tokens == 2)


def _disc(axes: Axes, spectrum: Spectrum, title: str) -> None:
    draw_disc(axes, spectrum.values, color=canvas.MODEL_COLORS[spectrum.tokens - 1])
    axes.set_title(title, fontsize=9)
    caption = describe(spectrum).replace(", flips", "\nflips").replace(", beta", "\nbeta")
    axes.text(0, -1.18, caption, ha="center", va="top", fontsize=7.5, color=canvas.MUTED)


PICTURES = {
    "analyze": (analyze_picture, (7.0, 3.4)),
    "compile": (compile_picture, (8.6, 2.6)),
    "certify": (certify_picture, (7.4, 6.4)),
}


def main() -> None:
    for name in sys.argv[1:] or PICTURES:
        draw, size = PICTURES[name]
        path = ROOT / "docs" / "images" / f"{name}.svg"
        path.parent.mkdir(exist_ok=True)
        atomic_write(path, canvas.save_figure(size, draw, "svg"))
        print(f"wrote {path.relative_to(ROOT)}, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
