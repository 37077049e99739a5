"""Tries launch options of the Triton kernels at rows of `benchmarks.ops_gpu` on this GPU; to runs/kernel_tuning.json.

Nothing is tuned when a model runs: what this finds is written by hand into the tables of `ops/triton_*.py`. Kernel by
kernel the table's entry and its neighbours (half and twice the block and the warps, other stages) take part in the
whole op, forward or with its backward, and the fastest stays for the next kernel. What does not fit on a processor is
passed over; so is what gives other results than the table's entry.

    python -m benchmarks.kernel_tuning --rows d256 gla-wide --minutes 5
    python -m benchmarks.kernel_tuning --rows wide gated --kernels gradients --set _KEYS=64
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import ops_gpu
from benchmarks.common import ROOT, environment, write_results
from statetrack.ops.triton_common import Launch, power_of_two

_OPS = {
    "delta rule": "householder", "simple GLA": "diagonal", "GLA": "diagonal", "selective scan": "discretized",
    "RWKV-7": "low_rank", "KDA": "low_rank",
}  # fmt: skip
_TOLERANCE = 1e-2


class Tables:
    """Launch options of one op by kernel, at one size of keys: entries of its tables, or constants of its module."""

    def __init__(self, op: str, key_dim: int) -> None:
        self._module = importlib.import_module(f"statetrack.ops.triton_{op}")
        self._table = getattr(self._module, "_TABLE", None)
        self._size = max(64, power_of_two(key_dim))
        self.kernels = list(self._table) if self._table else ["_FORWARD", "_BACKWARD"]

    def __getitem__(self, kernel: str) -> Launch:
        return self._table[kernel][self._size] if self._table else getattr(self._module, kernel)

    def __setitem__(self, kernel: str, launch: Launch) -> None:
        if self._table:
            self._table[kernel][self._size] = launch
        else:
            setattr(self._module, kernel, launch)


def neighbours(launch: Launch) -> Iterator[Launch]:
    """The launch itself, and those with one or two of its numbers changed."""
    for block in (launch.block, launch.block // 2, 2 * launch.block):
        for warps in (launch.num_warps, launch.num_warps // 2, 2 * launch.num_warps):
            for stages in (launch.num_stages, *(x for x in (1, 2, 3) if x != launch.num_stages)):
                changed = (block != launch.block) + (warps != launch.num_warps) + (stages != launch.num_stages)
                if changed <= 2 and block >= 4 and 1 <= warps <= 8:
                    yield Launch(block, warps, stages)


def tune(row: ops_gpu.Row, kernels: list[str], constants: dict[str, str], deadline: float) -> list[dict[str, Any]]:
    tables = Tables(_OPS[row.kind], row.d)
    calls = {backward: ops_gpu.call(row, backward=backward) for backward in (False, True)}
    results = []
    for kernel in tables.kernels:
        if kernels and not any(part in kernel.lower() for part in kernels):
            continue
        if _OPS[row.kind] == "householder" and kernel in _not_run(row):
            continue
        backward = "backward" in kernel.lower() or "gradients" in kernel or kernel == "scale_within"
        before, best, expected = tables[kernel], (float("inf"), tables[kernel]), None
        for launch in neighbours(before):
            if time.monotonic() > deadline:
                break
            tables[kernel] = launch
            try:
                found = _flat(calls[backward]())
                expected = found if expected is None else expected
                right = bool((found - expected).norm() <= _TOLERANCE * expected.norm())
                ms = ops_gpu.median_ms(calls[backward])
            except Exception as error:  # what a compiler or a launch refuses is what is being asked
                torch.cuda.synchronize()
                print(f"{row.name} {kernel} {launch}: {type(error).__name__}", flush=True)
                continue
            results.append(
                {"row": row.name, "kernel": kernel, **constants, "launch": vars(launch), "ms": ms, "right": right}
            )
            print(f"{row.name} {kernel} {launch}: {ms:.3f} ms{'' if right else ', WRONG'}", flush=True)
            if right:
                best = min(best, (ms, launch), key=lambda item: item[0])
        tables[kernel] = best[1]
        print(f"{row.name} {kernel}: best {best[1]}, the table has {before}", flush=True)
    return results


def _not_run(row: ops_gpu.Row) -> set[str]:
    """Entries for the delta rule that the row makes no use of."""
    return {
        "gradients" if row.gated else "gradients_decay",
        "scan_backward" if row.precision == "high" else "scan_backward_high",
    }


def _flat(result: Any) -> torch.Tensor:
    tensors = result if isinstance(result, tuple) else (result,)
    return torch.cat([x.float().flatten() for x in tensors])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", required=True, choices=[row.name for row in ops_gpu.ROWS])
    parser.add_argument("--kernels", nargs="*", default=[], help="parts of names of kernels; all if none")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=NUMBER", help="constants of the backend's module, for this run"
    )
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "kernel_tuning.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("tuning needs a CUDA device")
    deadline = time.monotonic() + 60 * options.minutes
    results: list[dict[str, Any]] = []
    constants = dict(setting.split("=") for setting in options.set)
    for row in (row for row in ops_gpu.ROWS if row.name in options.rows):
        for name, number in constants.items():
            setattr(importlib.import_module(f"statetrack.ops.triton_{_OPS[row.kind]}"), name, int(number))
        results += tune(row, options.kernels, constants, deadline)
        here = {"environment": environment(["triton"]), "device": torch.cuda.get_device_name(), "rows": results}
        write_results(options.output, here)


if __name__ == "__main__":
    main()
