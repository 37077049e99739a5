"""Keeps what a finished demo found: results/demo.json, and the README's figure docs/demo.svg.

    make demo && .venv/bin/python -m benchmarks.demo [--runs runs/demo]

The numbers are those of the demo's summary.json; machine and versions are those of this process, so run it where the
demo ran.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.common import ROOT, environment, write_results
from statetrack.experiments import load_experiment
from statetrack.records import record_of_run
from statetrack.report import read_summary, write_figure
from statetrack.runs import RunDirectory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/demo"), help="the directory of a finished demo")
    options = parser.parse_args()

    experiment = load_experiment("demo")
    records = [record_of_run(RunDirectory(options.runs / "runs" / run.name)) for run in experiment.runs]
    summary_file = options.runs / "summary.json"
    summary = read_summary(summary_file)
    if [(r.task, r.mixer, r.seed, r.accuracy) for r in summary] != [
        (r.task, r.mixer, r.seed, r.accuracy) for r in records
    ]:
        raise SystemExit(f"{options.runs} holds a summary of other runs than its own: run the demo again")
    write_figure(records, ROOT / "docs" / "demo.svg")
    write_results(
        ROOT / "results" / "demo.json",
        {
            "what": "summary.json of `make demo`; train_seconds are wall-clock, with as many runs at once as cores",
            "environment": environment(["statetrack"]),
            "seeds": sorted({record.seed for record in summary}),
            "records": json.loads(summary_file.read_text(encoding="utf-8")),
        },
    )


if __name__ == "__main__":
    main()
