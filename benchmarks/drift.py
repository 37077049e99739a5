"""How long trained and compiled models stay right, with and without stabilization; to results/theory/drift.json.

Trains S3, S4 and A5 on several seeds and judges every model at up to 100,000 tokens, in float32 and bfloat16: as it is,
with normalization by the rounded key left out, with other corrections that one may think of, and stabilized. The runs
stay in a directory, where an interrupted benchmark finds them again.

    python -m benchmarks.drift train --runs /tmp/drift-runs
    python -m benchmarks.drift measure --runs /tmp/drift-runs
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from statetrack import DeltaProductConfig
from statetrack.config import RunConfig, TrainingConfig, run_config
from statetrack.runs import RunDirectory
from statetrack.training import train


@dataclass(frozen=True)
class Recipe:
    """What differs between the groups.

    Attributes:
        seeds: how many runs.
        d_model: D.
        num_householder: N.
        training: the training; its seed is replaced.
    """

    seeds: int
    d_model: int
    num_householder: int
    training: TrainingConfig


# S3 is the demo's recipe. Larger groups are learned from words of mixed lengths, short ones among them, with a smaller
# learning rate and less weight decay; they were not learned from words of 40 letters alone.
_S3 = TrainingConfig(
    steps=500, batch_size=32, min_length=40, max_length=40, learning_rate=1e-2, warmup=0.05, decay=0.5,
    decay_shape="linear", weight_decay=1.0, beta1=0.8, beta2=0.95, z_loss=0.1,
)  # fmt: skip
_S4 = replace(_S3, steps=1500, batch_size=64, min_length=1, max_length=16, learning_rate=5e-3, weight_decay=0.1)
_A5 = replace(_S4, steps=3000, max_length=20)
RECIPES = {
    "group:S3": Recipe(4, 32, 2, _S3),
    "group:S4": Recipe(3, 64, 2, _S4),
    "group:A5": Recipe(3, 96, 4, _A5),
}


def configs() -> dict[str, RunConfig]:
    """The runs, by the names of their directories."""
    found = {}
    for task, recipe in RECIPES.items():
        mixer = DeltaProductConfig(
            eigenvalue_range=(-1, 1), num_householder=recipe.num_householder, num_heads=8, conv_size=0,
            activation="identity", output_norm=False, beta_gain=4.0,
        )  # fmt: skip
        model = {"d_model": recipe.d_model, "num_layers": 1, "final_norm": False}
        for seed in range(recipe.seeds):
            name = f"{task.removeprefix('group:')}-{seed}"
            found[name] = run_config(task, mixer, model, replace(recipe.training, seed=seed))
    return found


def train_all(runs: Path, only: str) -> None:
    for name, config in configs().items():
        if name.startswith(only):
            result = train(config, RunDirectory(runs / name))
            print(f"{name}: {result.step} steps, {result.seconds:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["train", "measure"])
    parser.add_argument("--runs", type=Path, required=True, help="directory of the trained models")
    parser.add_argument("--only", default="", help="train runs whose name starts so, such as A5 or S4-0")
    options = parser.parse_args()
    torch.set_num_threads(1)
    train_all(options.runs, options.only)


if __name__ == "__main__":
    main()
