"""What the benchmarks share: the machine's description, interleaved timing, peak memory, and the JSON they write."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]


def environment(packages: list[str]) -> dict[str, Any]:
    """Where numbers come from: machine, versions of Python, torch and `packages` (None if absent), git commit."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "packages": {name: _version(name) for name in packages},
        "commit": _commit(),
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def interleaved_cpu_times(
    functions: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 1
) -> dict[str, dict[str, Any]]:
    """Times functions in turn, `rounds` times each, by the CPU time of this process.

    With one thread this is the time the work took whatever else ran on the machine. Taking turns gives every function
    the same mixture of quiet and busy moments.

    Returns:
        For every name the best and the median in milliseconds, and all times in the order they were taken.
    """
    for function in functions.values():
        for _ in range(warmup):
            function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.process_time()
            function()
            times[name].append((time.process_time() - start) * 1e3)
    return {
        name: {"best_ms": min(all_ms), "median_ms": statistics.median(all_ms), "all_ms": all_ms}
        for name, all_ms in times.items()
    }


def peak_memory_mb(prepare: Callable[..., Callable[[], object]], *args: Any) -> float:
    """How far a call raises the peak of a fresh process's resident memory, in MB (10^6 bytes).

    `prepare(*args)` returns the function that is measured; inputs which it holds are not counted. It must be picklable,
    that is, a function of a module, and must not need more memory for a moment than it holds in the end.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_raise_of_peak, prepare, args).result()


@cache
def fla(path: str) -> ModuleType:
    """A module of flash-linear-attention's `fla/ops`, such as "gla/naive"; without the package the benchmark ends."""
    if (module := fla_if_installed(path)) is None:
        sys.exit("this compares with flash-linear-attention: pip install '.[benchmark]', or make benchmark")
    return module


def fla_if_installed(path: str) -> ModuleType | None:
    """The same from its file alone, as the package as a whole needs Triton; None where it is not installed."""
    package = importlib.util.find_spec("fla")
    if package is None or not package.submodule_search_locations:
        return None
    file = Path(package.submodule_search_locations[0], "ops", f"{path}.py")
    spec = importlib.util.spec_from_file_location(f"fla_{path.replace('/', '_')}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_results(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


def kept_runs(
    doc: str | None, file: Path, table: Callable[[list[dict[str, Any]]], str]
) -> tuple[Path, list[dict[str, Any]]]:
    """The command line of a benchmark that keeps each of its runs in a file: the file, and the runs that are in it.

    With `--table` it prints their table and ends.

    Args:
        doc: for `--help`.
        file: where they are unless `--out` says otherwise.
        table: of the runs.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the table of what is there")
    parser.add_argument("--out", type=Path, default=file, help="the file of results")
    options = parser.parse_args()
    runs = json.loads(options.out.read_text())["results"] if options.out.exists() else []
    if options.table:
        print(table(runs))
        sys.exit()
    return options.out, runs


def _raise_of_peak(prepare: Callable[..., Callable[[], object]], args: tuple[Any, ...]) -> float:
    torch.set_num_threads(1)
    function = prepare(*args)
    before = _peak_mb()
    # The result is kept until the peak is read: returned tensors count.
    result = function()
    after = _peak_mb()
    del result
    return after - before


def _peak_mb() -> float:
    # On Linux `getrusage` also counts the process that this one was started from.
    status = Path("/proc/self/status")
    if status.exists():
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(peak.split()[1]) * 1024 / 1e6
    # macOS reports bytes, others KiB.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of this tree, with `-dirty` after it where files differ from it; None outside a repository."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return described.stdout.strip() or None
