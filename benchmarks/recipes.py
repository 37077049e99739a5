"""Do the recipes hold on seeds that no choice has seen? Trains an experiment on fresh ones and reports every seed.

    python -m benchmarks.recipes                          # the demo's winners, twenty seeds: results/recipes.json
    python -m benchmarks.recipes --experiment parity --models all --seeds 5 --out results/cpu/parity.json

Writes for each task and model the seeds that are right at each length, the measured eigenvalues of the trained
transition matrices, and training times, which are wall-clock seconds of one thread with as many runs at once as there
are workers.
"""

from __future__ import annotations

import argparse
import math
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
    parser.add_argument("--experiment", default="demo", help="an experiment of src/statetrack/experiments")
    parser.add_argument("--seeds", type=int, default=20, help="how many seeds")
    parser.add_argument("--first", type=int, default=1000, help="the first seed; choose one that no choice has seen")
    parser.add_argument(
        "--models", choices=["winners", "all"], default="winners", help="leave out the models that fail"
    )
    parser.add_argument("--sequences", type=int, default=256, help="judged at every length")
    parser.add_argument("--workers", type=int, help="runs at the same time; one for each core if left out")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "recipes.json")
    options = parser.parse_args()

    seeds = list(range(options.first, options.first + options.seeds))
    loaded = load_experiment(options.experiment, seeds)
    runs = [run for run in loaded.runs if options.models == "all" or not _fails(run.config.model.mixer)]
    # A million tokens would take most of the time; the demo itself goes that far.
    judged = tuple(replace(run, winner_lengths=(), sequences=options.sequences) for run in runs)
    experiment = Experiment(title=loaded.title, runs=judged)
    console = Console()

    def show(event: object) -> None:
        if (record := getattr(event, "record", None)) is not None:
            console.print(_name(record), "seed", record.seed, {n: round(a, 3) for n, a in record.accuracy.items()})

    with tempfile.TemporaryDirectory() as directory:
        records = run_experiment(experiment, Path(directory), workers=options.workers, on_event=show)
    assert records is not None
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(_name(record), []).append(record)
    results = [_summary(name, members) for name, members in groups.items()]
    write_results(
        options.out,
        {
            "what": f"the recipes of the experiment {options.experiment!r} on unseen seeds: a seed counts as right "
            f"at a length if its accuracy there is at least {SOLVED_ACCURACY}; {options.sequences} sequences",
            "environment": environment(["statetrack"]),
            "seeds": seeds,
            "results": results,
        },
    )
    lengths = sorted({length for run in runs for length in run.lengths})
    table = Table("model", "seeds", *(f"right at {n:,}" for n in lengths), "lowest eigenvalue", "median s", "max s")
    for row in results:
        right = [str(row["seeds_right"].get(n, 0)) for n in lengths]
        table.add_row(
            row["model"],
            str(row["seeds"]),
            *right,
            f"{row['eigenvalues']['lowest_real_part']:.4f}",
            f"{row['median_seconds']:.1f}",
            f"{row['max_seconds']:.1f}",
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
    eigenvalues = [z for record in records for z in record.eigenvalues]
    return {
        "model": name,
        "seeds": len(records),
        "seeds_right": {n: sum(r.accuracy.get(n, 0) >= SOLVED_ACCURACY for r in records) for n in lengths},
        "eigenvalues": {
            "lowest_real_part": min((z[0] for z in eigenvalues), default=float("nan")),
            "largest_modulus": max((math.hypot(*z) for z in eigenvalues), default=float("nan")),
        },
        "median_seconds": statistics.median(times) if times else float("nan"),
        "max_seconds": max(times, default=float("nan")),
        "failed": {record.seed: record.failed for record in records if record.failed is not None},
        "accuracy": {record.seed: dict(record.accuracy) for record in records},
    }


if __name__ == "__main__":
    main()
