"""What each choice of the demo's recipe is worth: one at a time is made differently, on seeds that no choice has seen.

    python -m benchmarks.ablation run --budget-minutes 60    # trains what is missing: results/cpu/ablation.json
    python -m benchmarks.ablation draw                       # docs/images/ablation-*.svg; prints docs/recipe.md's table

`ablation.toml` has the models and the choices. Every finished run is in the file of results at once, and the same
command goes on; `run --seeds 12` adds seeds. All values of one seed come before the next seed, so that an ablation that
stops early compares fewer seeds and not fewer choices. Everything runs in one process with one thread.

A model is judged on the last `WINDOW` answers up to each length, in `SEQUENCES` sequences. Its failure horizon is the
longest of the lengths up to which at least `FAILING` of the answers are right, at that length and at all shorter ones.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.common import ROOT, environment
from statetrack.config import RunConfig, TrainingConfig, from_data, read_mixers, run_config, to_data
from statetrack.evaluation import SOLVED_ACCURACY, evaluate, measure_eigenvalues
from statetrack.experiments import load_experiment
from statetrack.files import atomic_write
from statetrack.model import LanguageModel
from statetrack.report import canvas
from statetrack.tasks import get_task
from statetrack.training import TrainingError, train

CHOICES = Path(__file__).with_suffix(".toml")
RESULTS = ROOT / "results" / "cpu" / "ablation.json"
IMAGES = ROOT / "docs" / "images"

LENGTHS = (10, 16, 25, 40, 64, 100, 160, 256, 400, 640, 1_000, 1_600, 2_500, 4_000, 6_400, 10_000)
REPORTED = (40, 256, 1_000, 10_000)
WINDOW = 16
SEQUENCES = 64
FAILING = 0.9
FIRST_SEED = 3000
ENOUGH_SEEDS = 5
"""Values with fewer seeds are in the results, but neither in the table nor in the figures."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A run of the experiment whose recipe is ablated; `run` is its name without the seed.

    Attributes:
        name: in results and options.
        title: in tables and figures.
        run: its name in the experiment, without the seed.
        experiment: the experiment that has it, if it isn't that of the plan.
        training: in what its recipe was trained otherwise when it was ablated.
    """

    name: str
    title: str
    run: str
    experiment: str | None = None
    training: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Value:
    """One way to make a choice: options laid over those of the recipe.

    Attributes:
        label: in tables and figures.
        models: names of the models that it is for; None for those of the choice.
        mixer, model, training: options of the three configs.
        other_mixer: `mixer` is a mixer of its own, of which none of the recipe's options is kept.
        decay_eigenvalues: whether weight decay also takes what `Mixer.eigenvalue_parameters` keeps from it.
    """

    label: str
    models: list[str] | None = None
    mixer: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    other_mixer: bool = False
    decay_eigenvalues: bool = False


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A choice of the recipe and its values; `models` are the names of those that have it, None for all of the plan's
    experiment."""

    name: str
    title: str
    values: list[Value]
    models: list[str] | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The contents of `ablation.toml`; `experiment` has the runs of the models that name no experiment."""

    experiment: str
    model: list[Model]
    choice: list[Choice]

    def values(self, choice: Choice, model: Model) -> list[Value]:
        """The values of a choice for a model; none if the model doesn't have the choice."""
        everywhere = choice.models or [other.name for other in self.model if other.experiment is None]
        return [value for value in choice.values if model.name in (value.models or everywhere)]


@dataclass(frozen=True)
class Variant:
    """A model with one choice made differently, or the recipe itself.

    Attributes:
        model: the model.
        config: the whole config, with the seed 0.
        changes: what differs from the recipe, as plain data; empty for the recipe.
    """

    model: Model
    config: RunConfig
    changes: dict[str, Any]


def read_plan(text: str) -> Plan:
    """Reads the contents of an `ablation.toml`.

    Raises:
        ValueError: for unknown keys, and for models that a choice names but the file doesn't have.
    """
    plan = from_data(Plan, tomllib.loads(text))
    known = {model.name for model in plan.model}
    for choice in plan.choice:
        named = {name for part in (choice, *choice.values) for name in part.models or ()}
        if named - known:
            unknown, there = (", ".join(sorted(names)) for names in (named - known, known))
            raise ValueError(f"the choice {choice.name} names the model {unknown}; there are {there}")
    return plan


def recipes(plan: Plan) -> dict[str, RunConfig]:
    """The recipe of each model as it was ablated, by the model's name, with the seed 0."""
    names = {model.name: model.experiment or plan.experiment for model in plan.model}
    runs = {
        (name, run.name.removesuffix("-seed0")): run.config
        for name in set(names.values())
        for run in load_experiment(name, [0]).runs
    }
    configs = {model.name: runs[names[model.name], model.run] for model in plan.model}
    return {
        model.name: replace(configs[model.name], training=replace(configs[model.name].training, **model.training))
        for model in plan.model
    }


def variant(model: Model, recipe: RunConfig, value: Value) -> Variant:
    """The recipe with a value in place of its own."""
    kept = {} if value.other_mixer else to_data(recipe.model.mixer)
    mixer = read_mixers({**kept, **value.mixer})
    sizes = {key: data for key, data in to_data(recipe.model).items() if key != "mixer"} | value.model
    training = from_data(TrainingConfig, {**to_data(recipe.training), **value.training})
    config = run_config(recipe.task, mixer, sizes, training)
    return Variant(model, config, _changes(recipe, config, value.decay_eigenvalues))


def variants(plan: Plan) -> list[Variant]:
    """Every variant once, model by model, the recipe of each first."""
    found: dict[str, Variant] = {}
    of_models = recipes(plan)
    for model in plan.model:
        recipe = of_models[model.name]
        values = [Value(label="recipe"), *(v for choice in plan.choice for v in plan.values(choice, model))]
        for one in (variant(model, recipe, value) for value in values):
            found.setdefault(_key(model.name, one.changes), one)
    return list(found.values())


def run_variant(one: Variant, seed: int) -> dict[str, Any]:
    """Trains a variant from a seed and judges it: a row of the results."""
    data = to_data(one.config)
    config = from_data(RunConfig, {**data, "training": {**data["training"], "seed": seed}})
    began = time.process_time()
    row: dict[str, Any] = {"seed": seed, "accuracy": {}, "horizon": 0}
    try:
        with decayed_eigenvalues(config) if one.changes.get("decay_eigenvalues") else nullcontext():
            model = train(config).model
    except TrainingError as error:
        return {**row, "failed": str(error), "cpu_seconds": round(time.process_time() - began, 2)}
    seconds = time.process_time() - began
    accuracy = judge(model, config.task, LENGTHS)
    eigenvalues = [z for pairs in measure_eigenvalues(model, get_task(config.task)).values() for z in pairs]
    return {
        "seed": seed,
        "accuracy": {str(length): round(accuracy[length], 4) for length in REPORTED if length in accuracy},
        "horizon": horizon(accuracy),
        "lowest_real_part": min(x for x, _ in eigenvalues),
        "largest_modulus": round(max(math.hypot(*z) for z in eigenvalues), 4),
        "cpu_seconds": round(seconds, 2),
    }


def judge(model: LanguageModel, task: str, lengths: Sequence[int]) -> dict[int, float]:
    """The share of right answers among the last `WINDOW` up to each length."""
    windows = {length: range(max(0, length - WINDOW) + 1, length + 1) for length in lengths}
    asked = {position for window in windows.values() for position in window}
    found = {r.length: r.accuracy for r in evaluate(model, get_task(task), asked, sequences=SEQUENCES)}
    return {length: statistics.fmean(found[position] for position in window) for length, window in windows.items()}


def horizon(accuracy: Mapping[int, float]) -> int:
    """The longest length up to which at least `FAILING` of the answers are right at every length; 0 for none."""
    longest = 0
    for length in sorted(accuracy):
        if accuracy[length] < FAILING:
            break
        longest = length
    return longest


def run(
    plan: Plan,
    seeds: Sequence[int],
    path: Path,
    *,
    only: Callable[[Variant], bool] = lambda one: True,
    until: float = math.inf,
) -> None:
    """Adds the runs that the file of results lacks, each as soon as it is finished, until the time `until`.

    Raises:
        ValueError: if the file has results of another recipe.
    """
    provenance = environment(["statetrack"])
    of_models = recipes(plan)
    wanted = {name: to_data(recipe) for name, recipe in of_models.items()}
    results = json.loads(path.read_text()) if path.exists() else {"recipes": wanted, "results": []}
    # Options that are younger than the file have their defaults there.
    there = {name: from_data(RunConfig, recipe) for name, recipe in results["recipes"].items() if name in wanted}
    if any(recipe != of_models[name] for name, recipe in there.items()):
        raise ValueError(f"{path} has the ablation of another recipe; move it away to ablate the one of today")
    rows = {_key(row["model"], row["changes"]): row for row in results["results"]}
    every = variants(plan)
    for one in every:
        new = {"model": one.model.name, "changes": one.changes, "seeds": []}
        rows.setdefault(_key(one.model.name, one.changes), new)
    for seed in seeds:
        for one in filter(only, every):
            row = rows[_key(one.model.name, one.changes)]
            if any(done["seed"] == seed for done in row["seeds"]):
                continue
            if time.time() > until:
                return
            row["seeds"].append(run_variant(one, seed))
            print(one.model.name, json.dumps(one.changes), json.dumps(row["seeds"][-1]), flush=True)
            what = (
                "the recipes of models (`recipes` has the configs) with one choice made differently: the share of "
                f"right answers among the last {WINDOW} up to a length in {SEQUENCES} sequences, and the longest of "
                f"the lengths {', '.join(map(str, LENGTHS))} up to which it stays at {FAILING} or above; CPU seconds "
                "of training"
            )
            content = {"what": what, "environment": provenance, "recipes": wanted, "results": list(rows.values())}
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, json.dumps(content, indent=1) + "\n")


def right(row: Mapping[str, Any], length: int) -> str:
    """`7/8`: how many seeds of a row of results are right at a length."""
    count = sum(run["accuracy"].get(str(length), 0) >= SOLVED_ACCURACY for run in row["seeds"])
    return f"{count}/{len(row['seeds'])}"


def median_horizon(row: Mapping[str, Any]) -> str:
    """The median failure horizon of a row of results, which is at least that where it is the longest length judged."""
    median = statistics.median_low(run["horizon"] for run in row["seeds"])
    return f"< {LENGTHS[0]}" if median == 0 else f"{median:,}"


def shown(plan: Plan, results: Mapping[str, Any]) -> Iterator[tuple[Choice, Model, list[tuple[Value, dict[str, Any]]]]]:
    """For each choice and each model that has it: the values and their rows of results.

    Values with fewer than `ENOUGH_SEEDS` are left out, and so is a choice that leaves fewer than two to compare.
    """
    rows = {_key(r["model"], r["changes"]): r for r in results["results"] if len(r["seeds"]) >= ENOUGH_SEEDS}
    of_models = recipes(plan)
    for choice in plan.choice:
        for model in plan.model:
            found = [
                (value, row)
                for value in plan.values(choice, model)
                if (row := rows.get(_key(model.name, variant(model, of_models[model.name], value).changes)))
            ]
            if len(found) >= 2:
                yield choice, model, found


def table(plan: Plan, results: Mapping[str, Any]) -> str:
    """Markdown: for each value and model the seeds right at 256 and at 10,000 tokens and the median failure horizon."""
    compared = list(shown(plan, results))
    models = [model for model in plan.model if any(model is other for _, other, _ in compared)]
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for choice, model, found in compared:
        for value, row in found:
            text = f"{right(row, 256)}, {right(row, 10_000)}, {median_horizon(row)}"
            cells.setdefault((choice.name, value.label), {})[model.name] = text if row["changes"] else f"**{text}**"
    lines = [
        "| choice | value | " + " | ".join(model.title for model in models) + " |",
        "|---" * (2 + len(models)) + "|",
    ]
    for (choice, label), found in cells.items():
        lines.append(f"| `{choice}` | {label} | " + " | ".join(found.get(m.name, "") for m in models) + " |")
    return "\n".join(lines)


def draw_choice(figure: Figure, panels: Sequence[tuple[Model, list[tuple[Value, dict[str, Any]]]]], title: str) -> None:
    """A panel for each model: the failure horizon of every seed, their median, and how many are right at 10,000."""
    figure.suptitle(title, fontsize=11.5, color=canvas.INK, x=0.012, ha="left", y=0.975)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    figure.subplots_adjust(left=0.085, right=0.995, top=0.79, bottom=0.2, wspace=0.06)
    for index, (ax, (model, found)) in enumerate(zip(axes, panels, strict=True)):
        _draw_panel(ax, found, canvas.MODEL_COLORS[_COLORS[model.name]])
        ax.set_title(model.title, fontsize=10.5, color=canvas.INK, loc="left")
        if index == 0:
            ax.set_ylabel("right up to length", fontsize=10)
            ax.text(-0.02, -0.2, "at 10,000:", transform=ax.transAxes, ha="right", color=canvas.MUTED, fontsize=8)


_COLORS = {"deltanet": 0, "mamba": 1, "deltaproduct": 2, "a5": 3}
_BELOW = 4.0
"""Where models are drawn that fail at the shortest length."""


def _draw_panel(ax: Axes, found: Sequence[tuple[Value, dict[str, Any]]], color: str) -> None:
    ax.set_yscale("log")
    ax.set(ylim=(_BELOW / 1.3, 14_000), xlim=(-0.55, len(found) - 0.45))
    ax.axhline(40, color=canvas.MUTED, linewidth=0.9, dashes=(4, 3), zorder=1)
    for x, (_, row) in enumerate(found):
        if not row["changes"]:
            ax.axvspan(x - 0.5, x + 0.5, color=canvas.WASH, linewidth=0, zorder=0)
        horizons = [max(run["horizon"], _BELOW) for run in row["seeds"]]
        for value in set(horizons):
            count = horizons.count(value)
            places = [x + 0.09 * (i - (count - 1) / 2) for i in range(count)]
            ax.plot(places, [value] * count, "o", color=color, markersize=4.2, alpha=0.85, markeredgewidth=0, zorder=3)
        median = statistics.median_low(horizons)
        ax.plot([x - 0.42, x + 0.42], [median, median], color=color, linewidth=1.4, alpha=0.55, zorder=2)
    names = [f"{value.label}\n{right(row, 10_000)}" for value, row in found]
    ax.set_xticks(range(len(found)), names, fontsize=9.5)
    ax.tick_params(axis="x", length=0)
    ax.yaxis.set_major_locator(FixedLocator([_BELOW, 10, 40, 100, 1_000, 10_000]))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}" if y > _BELOW else "fails"))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.grid(axis="y", color=canvas.RULE, linewidth=0.6)
    ax.tick_params(axis="y", labelsize=9.5)
    ax.spines["left"].set_visible(False)


def draw(plan: Plan, results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Writes a figure for each choice; returns the files."""
    found: dict[str, list[tuple[Model, list[tuple[Value, dict[str, Any]]]]]] = {}
    for choice, model, values in shown(plan, results):
        found.setdefault(choice.name, []).append((model, values))
    files = []
    folder.mkdir(parents=True, exist_ok=True)
    for choice in plan.choice:
        if panels := found.get(choice.name):
            files.append(folder / f"ablation-{choice.name.replace('_', '-')}.svg")
            picture = canvas.save_figure((8.6, 2.9), lambda f, p=panels, t=choice.title: draw_choice(f, p, t), "svg")
            atomic_write(files[-1], picture)
    return files


def decayed_eigenvalues(config: RunConfig) -> Any:
    """Weight decay as on every other matrix, also on those that decide on eigenvalues."""
    kind = type(config.model.mixer_pattern[0].build(config.model.d_model))
    return mock.patch.object(kind, "eigenvalue_parameters", return_value=[])


def _changes(recipe: RunConfig, config: RunConfig, decay_eigenvalues: bool) -> dict[str, Any]:
    before, after = to_data(recipe), to_data(config)
    pairs = {
        "mixer": (before["model"].pop("mixer"), after["model"].pop("mixer")),
        "model": (before["model"], after["model"]),
        "training": (before["training"], after["training"]),
    }
    found: dict[str, Any] = {}
    for part, (old, new) in pairs.items():
        if different := {key: value for key, value in new.items() if key not in old or old[key] != value}:
            found[part] = different
    return found | ({"decay_eigenvalues": True} if decay_eigenvalues else {})


def _key(model: str, changes: Mapping[str, Any]) -> str:
    return f"{model} {json.dumps(changes, sort_keys=True)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["run", "draw"])
    parser.add_argument("--seeds", type=int, default=8, help=f"how many, from {FIRST_SEED} on")
    parser.add_argument("--models", nargs="+", help="run only these models")
    parser.add_argument("--choices", nargs="+", help="run only these choices, and the recipe")
    parser.add_argument("--budget-minutes", type=float, default=math.inf, help="stop cleanly after so long")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the file of results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    plan = read_plan(CHOICES.read_text(encoding="utf-8"))
    if options.part == "run":
        seeds = range(FIRST_SEED, FIRST_SEED + options.seeds)
        until = time.time() + 60 * options.budget_minutes
        part = replace(plan, choice=[c for c in plan.choice if not options.choices or c.name in options.choices])
        run(part, seeds, options.out, only=lambda v: not options.models or v.model.name in options.models, until=until)
        return
    results = json.loads(options.out.read_text())
    for file in draw(plan, results, IMAGES):
        print(f"wrote {file.relative_to(ROOT)}, {file.stat().st_size:,} bytes")
    print(table(plan, results))


if __name__ == "__main__":
    main()
