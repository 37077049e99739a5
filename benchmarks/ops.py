"""The Triton kernels on this GPU: right, how fast beside others', and what that makes of a training step.

    python -m benchmarks.ops                                  # all that has not been measured yet
    python -m benchmarks.ops accuracy --rows '*high*'         # errors against float64; exit status 1 if too large
    python -m benchmarks.ops speed --rows wide d64 --minutes 9
    python -m benchmarks.ops kernels --rows gla-wide          # the time of every kernel
    python -m benchmarks.ops training --rows 'train-340m*' --peer    # without peers
    python -m benchmarks.ops plot                             # from what the files hold; needs no GPU

Writes to <output>/ <card>-accuracy.json, <card>.json (speed), <card>-kernels.json, <card>-training.json, and
<card>.svg, a figure of time and error against T. What a file holds already is not measured again, so that several calls
with --minutes add up; a row without its peer is measured again where --peer asks for the peer. Peers are timed where
their packages are installed; flash-linear-attention tunes itself for about 100 s in every row.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks import ops_gpu, ops_gpu_accuracy, ops_gpu_plot, ops_gpu_training
from benchmarks.common import ROOT, environment, write_results

Rows = list[dict[str, Any]]
_PARTS = ["accuracy", "speed", "kernels", "training", "plot"]
_PEERS = {"flash-linear-attention": "fla", "mamba-ssm": "mamba_ssm"}


@dataclass(frozen=True)
class Part:
    """What one file holds: rows, of which a name stands for one or several.

    Attributes:
        file: its name, after that of the card.
        what: the file says about itself.
        key: the key of a row by which it is named.
        names: of all there are, in the order in which they are measured, and the package that the peer of each needs,
            None where it has none.
        measure: (name, with the peer) -> its rows.
        line: the rows of a name -> a line for the terminal.
    """

    file: str
    what: str
    key: str
    names: dict[str, str | None]
    measure: Callable[[str, bool], Rows]
    line: Callable[[Rows], str]


def parts() -> dict[str, Part]:
    bandwidth: list[float] = []

    def speed(name: str, with_peer: bool) -> Rows:
        if not bandwidth:
            bandwidth.append(ops_gpu.copy_bandwidth())
        return ops_gpu.measure(_named(ops_gpu.ROWS, name), with_peer, bandwidth[0])

    def training(name: str, with_peer: bool) -> Rows:
        row = _named(ops_gpu_training.ROWS, name)
        return [ops_gpu_training.measure(row, with_peer=with_peer)]

    comparable = {name for name, x in ops_gpu_accuracy.CASES.items() if x.op == "householder" and not x.normalize}
    return {
        "accuracy": Part(
            "-accuracy.json",
            "relative errors against the float64 step loop on the same bfloat16 inputs; peer: chunk_delta_rule of "
            "flash-linear-attention; recurrence: the step loop in float32 with results in the dtypes of the inputs",
            "case",
            {name: "fla" if name in comparable else None for name in ops_gpu_accuracy.CASES},
            lambda name, with_peer: ops_gpu_accuracy.measure(name, with_peer=with_peer),
            ops_gpu_accuracy.line,
        ),
        "speed": Part(
            ".json",
            "median milliseconds and peak MiB beyond the inputs, bfloat16; floor_ms: inputs and outputs moved once",
            "row",
            {row.name: _PEERS[row.peer] for row in ops_gpu.ROWS},
            speed,
            lambda rows: "\n".join(map(ops_gpu.line, rows)),
        ),
        "kernels": Part(
            "-kernels.json",
            "milliseconds of every kernel of a call, mean of a few calls by torch's profiler",
            "row",
            dict.fromkeys((row.name for row in ops_gpu.ROWS), None),
            lambda name, with_peer: ops_gpu.kernel_times(_named(ops_gpu.ROWS, name)),
            lambda rows: "\n".join(
                f"{row['row']:16s} {row['pass']:7s} {row['ms']:8.3f} ms {row['kernel']}" for row in rows
            ),
        ),
        "training": Part(
            "-training.json",
            "one training step, bfloat16 autocast over float32 weights, AdamW",
            "row",
            {row.name: "fla" for row in ops_gpu_training.ROWS},
            training,
            lambda rows: "\n".join(map(ops_gpu_training.line, rows)),
        ),
    }


def pending(part: Part, done: Rows, patterns: list[str], peers: list[str], *, again: bool) -> dict[str, bool]:
    """The names still to be measured, and whether with the peer; those with it last, as a peer takes minutes.

    Args:
        done: rows that the file holds.
        patterns: of names to be measured.
        peers: of names to be measured with the peer.
        again: whether or not they are there.
    """
    has_ours = {row[part.key] for row in done}
    has_peer = {row[part.key] for row in done if row.get("peer") is not None}
    todo = {}
    for name, package in part.names.items():
        if not _matches(name, patterns):
            continue
        wanted = package is not None and _matches(name, peers) and find_spec(package) is not None
        if again or name not in has_ours or (wanted and name not in has_peer):
            todo[name] = wanted
    return dict(sorted(todo.items(), key=lambda item: item[1]))


def run(part: Part, todo: dict[str, bool], path: Path, deadline: float) -> tuple[Rows, list[str]]:
    """Measures what is to be done until the deadline, and writes the file after each.

    Returns:
        The rows measured, and the names that are left.
    """
    rows = load(path)
    measured: Rows = []
    left = list(todo)
    for name, with_peer in todo.items():
        if time.monotonic() > deadline:
            break
        here = environment(["triton", "fla-core", "mamba-ssm"])
        try:
            new = [row | {"commit": here["commit"]} for row in part.measure(name, with_peer)]
        except torch.OutOfMemoryError:
            print(f"{name}: the device's memory is too small", flush=True)
            continue
        print(part.line(new), flush=True)
        rows = [row for row in rows if row[part.key] != name] + new
        order = {name: i for i, name in enumerate(part.names)}
        rows.sort(key=lambda row: order.get(row[part.key], len(order)))
        results = {"what": part.what, "environment": here, "device": torch.cuda.get_device_name(), "rows": rows}
        write_results(path, results)
        measured += new
        left.remove(name)
    return measured, left


def load(path: Path) -> Rows:
    """The rows of a file; none if there is no file yet."""
    return json.loads(path.read_text())["rows"] if path.exists() else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "parts", nargs="*", choices=["accuracy", "speed", "kernels", "training", "plot"], help="all if none"
    )
    parser.add_argument("--rows", nargs="*", default=["*"], help="patterns of names of rows and cases")
    parser.add_argument("--peer", nargs="*", default=["*"], help="patterns of those with the peer; none for no peer")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start nothing after so many")
    parser.add_argument("--again", action="store_true", help="also what the files hold already")
    parser.add_argument("--card", default="h100", help="its name, with which the files' names begin")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "ops")
    options = parser.parse_args()
    chosen = options.parts or _PARTS
    if chosen != ["plot"] and not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device")
    deadline = time.monotonic() + 60 * options.minutes
    failed = False
    for name, part in parts().items():
        if name not in chosen:
            continue
        path = options.output / (options.card + part.file)
        todo = pending(part, load(path), options.rows, options.peer, again=options.again)
        measured, left = run(part, todo, path, deadline)
        if name == "accuracy":
            failed = not all(map(ops_gpu_accuracy.passes, measured))
        if left:
            print(f"{name}: not measured: {', '.join(left)}", flush=True)
    if "plot" in chosen:
        speed, accuracy = (load(options.output / (options.card + end)) for end in (".json", "-accuracy.json"))
        ops_gpu_plot.draw(speed, accuracy, options.output / f"{options.card}.svg")
    return int(failed)


def _named(rows: Sequence[Any], name: str) -> Any:
    return next(row for row in rows if row.name == name)


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


if __name__ == "__main__":
    raise SystemExit(main())
