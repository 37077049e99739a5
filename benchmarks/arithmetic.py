"""A look at modular arithmetic at a CPU's size, ahead of `statetrack reproduce arithmetic` on a GPU.

    python -m benchmarks.arithmetic          # trains what is missing: results/cpu/arithmetic.json
    python -m benchmarks.arithmetic --table  # prints docs/recipe.md's table

Modulo 3 with 2 layers of 32 channels, 1,500 steps of 32 expressions of at most 12 tokens, two seeds; modulo 5 with 2
layers of 64, 2,000 steps of 64 expressions of at most 20, one seed. Finished runs are in the file of results at once.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from benchmarks.common import ROOT, environment, kept_runs
from statetrack.config import TrainingConfig, read_mixers, run_config
from statetrack.evaluation import evaluate
from statetrack.files import atomic_write
from statetrack.tasks import get_task
from statetrack.training import train

RESULTS = ROOT / "results" / "cpu" / "arithmetic.json"
SEQUENCES = 512

SHARED = {"warmup": 0.05, "decay": 0.5, "decay_shape": "linear", "weight_decay": 0.1, "beta2": 0.95, "z_loss": 0.01}
SIZES: dict[str, dict[str, Any]] = {
    "3": {
        "seeds": [0, 1],
        "d_model": 32,
        "num_heads": 2,
        "lengths": [12, 24, 48],
        "training": {"steps": 1500, "batch_size": 32, "min_length": 2, "max_length": 12, "learning_rate": 4e-3},
    },
    "5": {
        "seeds": [0],
        "d_model": 64,
        "num_heads": 4,
        "lengths": [20, 40, 80],
        "training": {"steps": 2000, "batch_size": 64, "min_length": 2, "max_length": 20, "learning_rate": 2e-3},
    },
}
"""By the modulus."""

ANSWER: dict[str, Any] = {}
PARTS = {"part_labels": True}
GROWING = {"part_labels": True, "curriculum": 0.5}
ROWS: list[tuple[str, str, dict[str, Any]]] = [
    ("modular_arithmetic:3", "deltanet", ANSWER),
    ("modular_arithmetic:3", "deltanet", PARTS),
    ("modular_arithmetic:3", "deltaproduct", PARTS),
    ("modular_arithmetic:3", "gated_deltanet", ANSWER),
    ("modular_arithmetic:3", "gated_deltanet", PARTS),
    ("modular_arithmetic:3", "gated_deltanet", GROWING),
    ("modular_arithmetic:3", "gated_deltaproduct", PARTS),
    ("modular_arithmetic_brackets:3", "gated_deltanet", ANSWER),
    ("modular_arithmetic_brackets:3", "gated_deltanet", PARTS),
    ("modular_arithmetic:5", "deltanet", PARTS),
    ("modular_arithmetic:5", "gated_deltanet", ANSWER),
    ("modular_arithmetic:5", "gated_deltanet", PARTS),
    ("modular_arithmetic:5", "gated_deltanet", GROWING),
    ("modular_arithmetic:5", "gated_deltaproduct", PARTS),
    ("modular_arithmetic:5", "gated_deltaproduct", GROWING),
]
"""Task, mixer with eigenvalues in [-1, 1], and what its training has beside `SHARED`."""


def run(task: str, mixer: str, changes: dict[str, Any], seed: int) -> dict[str, Any]:
    """Trains a model and judges it: a row of the results."""
    size = SIZES[task.rpartition(":")[2]]
    training = TrainingConfig(**SHARED, **size["training"], **changes, seed=seed, log_every=250)
    options = {"name": mixer, "eigenvalue_range": [-1, 1], "num_heads": size["num_heads"]}
    config = run_config(task, read_mixers(options), {"d_model": size["d_model"], "num_layers": 2}, training)
    model = train(config).model
    accuracy = evaluate(model, get_task(task), size["lengths"], sequences=SEQUENCES)
    return {
        "task": task,
        "mixer": mixer,
        "training": changes,
        "seed": seed,
        "accuracy": {str(result.length): round(result.accuracy, 3) for result in accuracy},
    }


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: the accuracy of each seed at the longest training length and at twice and four times that."""
    lines = ["| task | model | labels | at the longest trained | twice | four times |", "|---" * 6 + "|"]
    for task, mixer, changes in ROWS:
        found = [r for r in results if (r["task"], r["mixer"], r["training"]) == (task, mixer, changes)]
        if not found:
            continue
        longest = SIZES[task.rpartition(":")[2]]["training"]["max_length"]
        cells = [", ".join(f"{r['accuracy'][str(n * longest)]:.2f}" for r in found) for n in (1, 2, 4)]
        labels = ("answer and parts" if changes else "answer") + ", curriculum" * ("curriculum" in changes)
        lines.append(f"| `{task}` | `{mixer}` | {labels} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    out, results = kept_runs(__doc__, RESULTS, table)
    torch.set_num_threads(1)
    provenance = environment(["statetrack"])
    done = [(r["task"], r["mixer"], r["training"], r["seed"]) for r in results]
    for task, mixer, changes in ROWS:
        for seed in SIZES[task.rpartition(":")[2]]["seeds"]:
            if (task, mixer, changes, seed) in done:
                continue
            results.append(run(task, mixer, changes, seed))
            print(json.dumps(results[-1]), flush=True)
            what = f"the share of {SEQUENCES} expressions of a length whose value a model says"
            content = {"what": what, "environment": provenance, "results": results}
            atomic_write(out, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
