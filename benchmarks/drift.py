"""How long trained and compiled models stay right, with and without stabilization; to results/theory/drift.json.

Trains S3, S4 and A5 on several seeds and judges every model at up to 100,000 tokens, in float32 and bfloat16: as it is,
with normalization by the rounded key left out, with other corrections that one may think of, and stabilized. The runs
stay in a directory, where an interrupted benchmark finds them again.

    python -m benchmarks.drift train --runs /tmp/drift-runs
    python -m benchmarks.drift measure --runs /tmp/drift-runs
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import ROOT, environment, write_results
from statetrack import DeltaNet, DeltaProductConfig, EigenvalueRange, LanguageModel
from statetrack.automata import group_automaton
from statetrack.config import RunConfig, TrainingConfig, run_config
from statetrack.evaluation import evaluate
from statetrack.mixers.mixer import Widening
from statetrack.model import ModelState, Tracker
from statetrack.runs import RunDirectory
from statetrack.stabilize import StabilizedModel
from statetrack.tasks import get_task
from statetrack.theory.construct import compile
from statetrack.theory.verify import verify
from statetrack.training import train

LENGTHS = (512, 4_096, 32_768, 100_000)
SHORT = LENGTHS[:2]
WINDOW = 32
"""The answers to so many tokens, up to each length, are judged."""

SEQUENCES = 8
DTYPES = (torch.float32, torch.bfloat16)
RESULTS = ROOT / "results" / "theory" / "drift.json"


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
            eigenvalue_range=EigenvalueRange(-1, 1), num_householder=recipe.num_householder, num_heads=8, conv_size=0,
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


def accuracy(model: Tracker, task: str, lengths: tuple[int, ...] = LENGTHS) -> dict[str, float]:
    """The share of right answers among the last `WINDOW` up to each length, in `SEQUENCES` fresh sequences."""
    judged = [length - back for length in lengths for back in range(WINDOW)]
    found = {r.length: r.accuracy for r in evaluate(model, get_task(task), judged, sequences=SEQUENCES)}
    return {str(length): round(sum(found[length - back] for back in range(WINDOW)) / WINDOW, 4) for length in lengths}


class Scaled(StabilizedModel):
    """Restores the norm of each head's state, or all its singular values, to what they are after 40 tokens."""

    def __init__(self, model: LanguageModel, interval: int, *, only_norm: bool) -> None:
        super().__init__(model, interval)
        letters = model.config.vocab_size
        ids = torch.randint(letters, (256, 40), generator=torch.Generator().manual_seed(0))
        self.only_norm = only_norm
        self.reference = torch.linalg.svdvals(model.scan(ids)[1][0]["recurrence"]).mean(0)

    def correct(self, state: ModelState) -> ModelState:
        u, values, v = torch.linalg.svd(state[0]["recurrence"], full_matrices=False)
        if self.only_norm:
            values = values * (self.reference.norm(dim=-1) / values.norm(dim=-1)).unsqueeze(-1)
        else:
            values = self.reference.expand_as(values)
        return [{"recurrence": (u * values.unsqueeze(-2)) @ v}]


class NearestCoordinates(StabilizedModel):
    """Sets the state on the known one whose coordinates, not whose answers, are nearest."""

    def correct(self, state: ModelState) -> ModelState:
        known = self.known.state[0]["recurrence"].flatten(1)
        return self.known.select(torch.cdist(state[0]["recurrence"].flatten(1), known).argmin(1))


@contextmanager
def rounded_beta(tolerance: float) -> Iterator[None]:
    """Gates of beta that are so near to 0 or 1 are 0 or 1: eigenvalues of exactly 1 and -1."""
    original = Widening.householder_beta

    def rounded(self: Widening, gate: Tensor) -> Tensor:
        gate = torch.where(gate < tolerance, 0.0, torch.where(gate > 1 - tolerance, 1.0, gate))
        return original(self, gate)

    Widening.householder_beta = rounded
    try:
        yield
    finally:
        Widening.householder_beta = original


def others(model: LanguageModel, task: str) -> dict[str, Any]:
    """What does not help, or not always: up to 4,096 tokens, in float32 but for the last two."""

    def judge(tracker: Tracker) -> dict[str, float]:
        return accuracy(tracker, task, SHORT)

    found: dict[str, Any] = {}
    for tolerance in (0.01, 0.1, 0.5):
        with rounded_beta(tolerance):
            found[f"beta rounded within {tolerance:g}"] = judge(model)
    found["norm of the state restored"] = judge(Scaled(model, 64, only_norm=True))
    found["singular values restored"] = judge(Scaled(model, 64, only_norm=False))
    found["nearest by coordinates"] = judge(NearestCoordinates(model))
    small = _in(model, torch.bfloat16)
    found["bfloat16, beta normalized by the rounded key"] = judge(small)
    for block in small.blocks:
        mixer = block.mixer
        assert isinstance(mixer, DeltaNet)
        mixer.config = replace(mixer.config, normalize=False)
    found["bfloat16, not normalized"] = judge(small)
    return found


def measured(model: LanguageModel, task: str) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for dtype in DTYPES:
        there = _in(model, dtype)
        stabilized = StabilizedModel(there)
        single = StabilizedModel(there, 1, known=stabilized.known)
        proof = verify(single, group_automaton(task.removeprefix("group:")))
        row[str(dtype).removeprefix("torch.")] = {
            "plain": accuracy(there, task),
            "stabilized": accuracy(stabilized, task),
            "interval": stabilized.interval,
            "states": len(stabilized.known),
            "proved_with_interval_1": proof.exact,
        }
    return row


def _in(model: LanguageModel, dtype: torch.dtype) -> LanguageModel:
    copy = LanguageModel(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.to(dtype).eval()


def measure_all(runs: Path) -> None:
    """Judges what has been trained, seed by seed; rows that are in the file already stay."""
    rows = json.loads(RESULTS.read_text())["results"] if RESULTS.exists() else {}
    jobs: dict[str, Callable[[], dict[str, Any]]] = {}
    names = sorted(configs(), key=lambda name: name.partition("-")[2])
    for name in names:
        task = f"group:{name.partition('-')[0]}"
        if (runs / name / "model.safetensors").exists():
            jobs[name] = lambda name=name, task=task: measured(RunDirectory(runs / name).load_model(), task)
    for task in RECIPES:
        name = task.removeprefix("group:")
        jobs[f"{name} compiled"] = lambda name=name, task=task: measured(compile(group_automaton(name)), task)
        jobs[f"{name}-0, other corrections"] = lambda name=name, task=task: others(
            RunDirectory(runs / f"{name}-0").load_model(), task
        )
    for name, job in jobs.items():
        if name in rows:
            continue
        rows[name] = job()
        print(name, json.dumps(rows[name]), flush=True)
        what = (
            f"share of right answers among the last {WINDOW} up to a length, in {SEQUENCES} sequences, as the model "
            "is and stabilized with the interval that it chooses"
        )
        write_results(RESULTS, {"what": what, "environment": environment(["numpy"]), "results": rows})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["train", "measure"])
    parser.add_argument("--runs", type=Path, required=True, help="directory of the trained models")
    parser.add_argument("--only", default="", help="train runs whose name starts so, such as A5 or S4-0")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.part == "train":
        train_all(options.runs, options.only)
    else:
        measure_all(options.runs)


if __name__ == "__main__":
    main()
