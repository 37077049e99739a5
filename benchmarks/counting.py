"""How counting modulo 3 is made to last: two ways for lengths to grow in training, with and without a rate that falls.

    python -m benchmarks.counting          # trains what is missing, an hour of a core: results/cpu/counting.json
    python -m benchmarks.counting --table  # prints docs/recipe.md's table

One layer of DeltaProduct (two reflections a token) and two of DeltaNet, these also with twice the heads and a learned
bias on the logit of beta that starts at 1; 32 channels, eigenvalues in [-1, 1], 2,000 steps of 8 sequences. All
curricula read about as many tokens; one model is trained for twice as long as well. Whether a wrong answer is drift or
a mistake is asked in two ways: how far the right class is ahead of the others at each length, and whether the model is
right once it is set back on its own states (`statetrack.stabilize`). Seeds are other ones than those that settings were
chosen on (2001 to 2003). Finished runs are in the file of results at once.
"""

from __future__ import annotations

import json
import time
from typing import Any

import torch

from benchmarks.common import ROOT, environment, kept_runs
from statetrack import LanguageModel, seeds
from statetrack.config import RunConfig, TrainingConfig, read_mixers, run_config
from statetrack.evaluation import evaluate
from statetrack.files import atomic_write
from statetrack.runs import TrainingError
from statetrack.stabilize import MARGIN, StabilizationError, StabilizedModel
from statetrack.tasks import get_task
from statetrack.training import train_together

RESULTS = ROOT / "results" / "cpu" / "counting.json"
TASK = "modular_addition:3"
SEEDS = (3001, 3002, 3003)
LENGTHS = (256, 1_000, 2_000, 4_000, 10_000)
SEQUENCES = 256
FEWEST = 64
"""Tokens from one correction to the next, at least, for a stabilized model to be judged; else it takes an hour."""

SHARED: dict[str, Any] = {
    "steps": 2000,
    "batch_size": 8,
    "learning_rate": 1e-2,
    "warmup": 0.02,
    "decay": 0.95,
    "decay_shape": "linear",
    "weight_decay": 0.0,
    "beta1": 0.8,
    "beta2": 0.95,
    "z_loss": 0.3,
    "log_every": 500,
}
_HEADS = {"num_heads": 4, "conv_size": 0, "activation": "identity", "output_norm": False, "beta_gain": 4.0}
LONGER_MODEL = "DeltaNet, 2 layers, 8 heads, bias on beta"
"""The one model that is trained for twice as long as well: in `SHARED`'s steps it learns to count, but not to last."""

MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "DeltaProduct, 1 layer": ({"name": "deltaproduct", "num_householder": 2, **_HEADS}, 1),
    "DeltaNet, 2 layers": ({"name": "deltanet", **_HEADS}, 2),
    LONGER_MODEL: ({"name": "deltanet", **_HEADS, "num_heads": 8, "beta_bias": 1.0}, 2),
}
"""The mixer and the number of layers."""

_GROWING = {"min_length": 8, "max_length": 1024, "curriculum": 1.0}
CURRICULA: dict[str, dict[str, Any]] = {
    "linear, 128 to 512": {"min_length": 128, "max_length": 512, "curriculum": 0.5},
    "linear, falling": {**_GROWING, "curriculum_shape": "linear", "curriculum_learning_rate_power": 0.5},
    "doubling": {**_GROWING, "curriculum_shape": "doubling"},
    "doubling, falling": {**_GROWING, "curriculum_shape": "doubling", "curriculum_learning_rate_power": 0.5},
}
"""What their training has beside `SHARED`."""

LONGER = "doubling, falling, 4,000 steps"


def rows() -> list[tuple[str, str]]:
    """Models and curricula, in the order of the table."""
    return [(model, curriculum) for model in MODELS for curriculum in CURRICULA] + [(LONGER_MODEL, LONGER)]


def training(curriculum: str) -> dict[str, Any]:
    if curriculum == LONGER:
        return {**training("doubling, falling"), "steps": 2 * SHARED["steps"]}
    return {**SHARED, **CURRICULA[curriculum]}


def configs(model: str, curriculum: str) -> list[RunConfig]:
    """The runs of a row, one for each seed."""
    mixer, layers = MODELS[model]
    sizes = {"d_model": 32, "num_layers": layers, "final_norm": False}
    return [
        run_config(
            TASK,
            read_mixers({**mixer, "eigenvalue_range": [-1, 1]}),
            sizes,
            TrainingConfig(**training(curriculum), seed=seed),
        )
        for seed in SEEDS
    ]


def run(model: str, curriculum: str) -> list[dict[str, Any]]:
    """Trains the seeds of a row as one model and judges each: rows of the results."""
    members = configs(model, curriculum)
    began = time.process_time()
    outcomes = train_together(members)
    seconds = (time.process_time() - began) / len(members)
    rows = []
    for config, outcome in zip(members, outcomes, strict=True):
        row = {"model": model, "curriculum": curriculum, "seed": config.training.seed, "cpu_seconds": round(seconds, 1)}
        judged = {"failed": str(outcome)} if isinstance(outcome, TrainingError) else judge(outcome.model)
        rows.append({**row, **judged})
    return rows


def judge(model: LanguageModel) -> dict[str, Any]:
    """Accuracy and margin at each length, and the accuracy at the longest of the model set back on its states."""
    task = get_task(TASK)
    accuracy = {str(one.length): one.accuracy for one in evaluate(model, task, LENGTHS, sequences=SEQUENCES)}
    judged: dict[str, Any] = {"accuracy": accuracy, "margin": margins(model)}
    if accuracy[str(LENGTHS[-1])] < 1:
        try:
            stabilized = StabilizedModel(model)
            judged["interval"] = stabilized.interval
            judged["stabilized"] = (
                evaluate(stabilized, task, LENGTHS[-1:], sequences=SEQUENCES)[0].accuracy
                if stabilized.interval >= FEWEST
                else f"drifts within {2 * MARGIN * stabilized.interval} tokens"
            )
        except StabilizationError as error:
            judged["stabilized"] = str(error)
    return judged


@torch.inference_mode()
def margins(model: LanguageModel) -> dict[str, float]:
    """By how much the logit of the right class is ahead of the best other one: the median over sequences."""
    at = torch.tensor(LENGTHS) - 1
    ids, labels = get_task(TASK).sample(64, LENGTHS[-1], seeds.generator("margins of counting", 0))
    logits, _ = model.scan(ids, positions=at)
    right = labels[:, at].unsqueeze(-1)
    others = logits.scatter(-1, right, -torch.inf).amax(-1)
    ahead = (logits.gather(-1, right).squeeze(-1) - others).median(0).values
    return {str(length): round(float(value), 2) for length, value in zip(LENGTHS, ahead, strict=True)}


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: the accuracy of each seed at some of the lengths."""
    shown = (256, 1_000, 10_000)
    lines = [
        "| model | curriculum | " + " | ".join(f"{n:,}" for n in shown) + " | stabilized, 10,000 |",
        "|---" * (3 + len(shown)) + "|",
    ]
    for model, curriculum in rows():
        members = [row for row in results if (row["model"], row["curriculum"]) == (model, curriculum)]
        if not members:
            continue
        cells = [", ".join(_cell(row.get("accuracy", {}).get(str(n))) for row in members) for n in shown]
        cells.append(", ".join(_cell(row.get("stabilized")) for row in members if "stabilized" in row))
        lines.append(f"| {model} | {curriculum} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(accuracy: float | str | None) -> str:
    """Cut off, so that 1.000 is every answer; a dash where nothing was judged."""
    return f"{int(1000 * accuracy) / 1000:.3f}" if isinstance(accuracy, float) else "-"


def main() -> None:
    out, results = kept_runs(__doc__, RESULTS, table)
    torch.set_num_threads(1)
    provenance = environment(["statetrack"])
    done = {(row["model"], row["curriculum"]) for row in results}
    for model, curriculum in rows():
        if (model, curriculum) in done:
            continue
        results += run(model, curriculum)
        print(json.dumps(results[-len(SEEDS) :], indent=1), flush=True)
        content = {
            "what": f"the share of {SEQUENCES} sequences of {TASK} whose label at a length a model says",
            "environment": provenance,
            "seeds": {"chosen on": [2001, 2002, 2003], "reported": SEEDS},
            "training": SHARED,
            "curricula": CURRICULA | {LONGER: training(LONGER)},
            "results": results,
        }
        atomic_write(out, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
