"""Does the demo's recipe hold on seeds that no choice has seen? Trains it on twenty and reports every one.

    python -m benchmarks.recipes [--seeds 20] [--first 1000]

Writes results/recipes.json: for each task and model the seeds that are right at each length, and training times, which
are wall-clock seconds of one thread with as many runs at once as there are cores.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common import ROOT, environment, write_results
from statetrack import EigenvalueRange
from statetrack.evaluation import SOLVED_ACCURACY
from statetrack.experiments import Experiment, load_experiment, run_experiment
from statetrack.report import Record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20, help="how many seeds")
    parser.add_argument("--first", type=int, default=1000, help="the first seed; choose one that no choice has seen")
    parser.add_argument(
        "--models", choices=["winners", "all"], default="winners", help="leave out the models that fail"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "recipes.json")
    options = parser.parse_args()

    seeds = list(range(options.first, options.first + options.seeds))
    demo = load_experiment("demo", seeds)
    runs = [run for run in demo.runs if options.models == "all" or not _fails(run.config.model.mixer)]
    # A million tokens would take most of the time; the demo itself goes that far.
    experiment = Experiment(title=demo.title, runs=tuple(replace(run, winner_lengths=()) for run in runs))
    console = Console()

    def show(event: object) -> None:
        if (record := getattr(event, "record", None)) is not None:
            console.print(_name(record), "seed", record.seed, {n: round(a, 3) for n, a in record.accuracy.items()})

    with tempfile.TemporaryDirectory() as directory:
        records = run_experiment(experiment, Path(directory), on_event=show)
    assert records is not None
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(_name(record), []).append(record)
    results = [_summary(name, members) for name, members in groups.items()]
    write_results(
        options.out,
        {
            "what": "the demo's recipes on unseen seeds: a seed counts as right at a length if its accuracy there is "
            f"at least {SOLVED_ACCURACY}; 512 sequences, 32 at 10,000",
            "environment": environment(["statetrack"]),
            "seeds": seeds,
            "results": results,
        },
    )
    table = Table("model", "seeds", *(f"right at {n:,}" for n in (40, 256, 1000, 10000)), "median s", "max s")
    for row in results:
        right = [str(row["seeds_right"].get(n, 0)) for n in (40, 256, 1000, 10000)]
        table.add_row(
            row["model"], str(row["seeds"]), *right, f"{row['median_seconds']:.1f}", f"{row['max_seconds']:.1f}"
        )
    console.print(table)


def _fails(mixer: object) -> bool:
    """Whether the demo shows this model because it can't do the task."""
    narrow = getattr(mixer, "eigenvalue_range", None) == EigenvalueRange(0, 1)
    return narrow or (getattr(mixer, "name", "") == "deltaproduct" and getattr(mixer, "num_householder", 0) == 1)


def _name(record: Record) -> str:
    factors = f" n={record.num_householder}" if record.mixer == "deltaproduct" else ""
    return f"{record.task} {record.mixer} [{record.eigenvalue_range}]{factors}"


def _summary(name: str, records: list[Record]) -> dict[str, Any]:
    lengths = sorted({length for record in records for length in record.accuracy})
    times = [record.train_seconds for record in records if record.train_seconds is not None]
    return {
        "model": name,
        "seeds": len(records),
        "seeds_right": {n: sum(r.accuracy.get(n, 0) >= SOLVED_ACCURACY for r in records) for n in lengths},
        "median_seconds": statistics.median(times) if times else float("nan"),
        "max_seconds": max(times, default=float("nan")),
        "failed": {record.seed: record.failed for record in records if record.failed is not None},
        "accuracy": {record.seed: dict(record.accuracy) for record in records},
    }


if __name__ == "__main__":
    main()
