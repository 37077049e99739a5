"""The delta rule and DeltaProduct on one GPU beside flash-linear-attention; to results/ops/h100.json.

Every row is one op at one shape in bfloat16: keys of length 1 and beta in [0, 2], the median time of a forward and of a
forward with its backward, the peak memory beyond what is allocated before the call, and the memory floor, that is
inputs read once and outputs written once at the device's own copy bandwidth. `--peer` also times flash-linear-attention
in the same process; its autotuning takes about 100 s an op and shape, so choose rows with `--rows`.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import ROOT, environment, write_results
from statetrack.ops import linear_recurrence
from statetrack.transition import Householder

_MIB = 2**20


@dataclass(frozen=True)
class Row:
    """One op at one shape: `n` factors a token, with a decay or without."""

    name: str
    b: int
    t: int
    h: int
    d: int
    n: int = 1
    gated: bool = False

    @property
    def op(self) -> str:
        gated = "gated " if self.gated else ""
        return f"{gated}delta rule" if self.n == 1 else f"{gated}DeltaProduct"


ROWS = [
    Row("wide", 1, 8192, 96, 128),
    Row("gated", 1, 8192, 96, 128, gated=True),
    Row("product2", 1, 8192, 96, 128, n=2),
    Row("product2-gated", 1, 8192, 96, 128, n=2, gated=True),
    Row("product3", 1, 8192, 96, 128, n=3),
    Row("long", 1, 65536, 8, 128),
    Row("b2", 2, 16384, 16, 128),
    Row("b4", 4, 2048, 16, 128),
    Row("b4-wide", 4, 4096, 64, 128),
    Row("d256", 8, 2048, 32, 256),
    Row("d64", 8, 1024, 8, 64),
    Row("small-40", 256, 40, 4, 32),
    Row("small-64", 256, 64, 4, 32),
    Row("small-255", 256, 255, 4, 32),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", default=[row.name for row in ROWS], help="names of rows")
    parser.add_argument("--peer", nargs="*", default=[], help="names of rows at which the peer is timed too")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "ops" / "h100.json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device")
    bandwidth = _copy_bandwidth()
    results = {
        "environment": environment(["triton", "fla-core"]),
        "device": torch.cuda.get_device_name(),
        "copy_bytes_per_second": bandwidth,
        "rows": [],
    }
    # Those with the peer last: if its autotuning outlasts somebody's patience, the other rows are there.
    for row in sorted(ROWS, key=lambda row: row.name in arguments.peer):
        if row.name in arguments.rows or row.name in arguments.peer:
            for result in _measure(row, row.name in arguments.peer, bandwidth):
                results["rows"].append(result)
                print(_line(result), flush=True)
            write_results(arguments.output, results)


def _measure(row: Row, with_peer: bool, bandwidth: float) -> list[dict[str, Any]]:
    inputs = _inputs(row)
    leaves = [x for x in inputs.values() if x.requires_grad]
    out = inputs["v"].numel() // row.n * inputs["v"].element_size()
    read = sum(x.numel() * x.element_size() for x in leaves)
    # The backward reads the inputs and the gradient of o, and writes as much as the inputs.
    floors = {"fwd": (read + out) / bandwidth * 1e3, "fwd+bwd": (3 * read + 2 * out) / bandwidth * 1e3}
    functions: dict[str, Callable[[dict[str, Tensor]], Tensor]] = {"ours": _ours}
    if with_peer:
        functions["peer"] = _peer(row)
    rows = []
    for which, floor in floors.items():
        result: dict[str, Any] = {
            "op": row.op, "B": row.b, "T": row.t, "H": row.h, "D": row.d, "n": row.n, "pass": which, "floor_ms": floor,
            "peer": "flash-linear-attention" if with_peer else None,
        }  # fmt: skip
        for name, function in functions.items():
            call = _call(function, inputs, leaves, backward=which != "fwd")
            result[f"{name}_ms"], result[f"{name}_mib"] = _time(call), _peak_mib(call)
        if with_peer:
            result["ratio"] = result["peer_ms"] / result["ours_ms"]
        rows.append(result)
    return rows


def _inputs(row: Row) -> dict[str, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    b, t, h, d, n = row.b, row.t, row.h, row.d, row.n
    inputs = {
        "q": (torch.nn.functional.normalize(randn(b, t, h, d), dim=-1) / d**0.5).bfloat16(),
        "k": torch.nn.functional.normalize(randn(b, t, n, h, d), dim=-1).bfloat16(),
        "v": randn(b, t, n, h, d).bfloat16(),
        "beta": 2 * torch.sigmoid(randn(b, t, n, h)),
    }
    if row.gated:
        inputs["decay"] = torch.sigmoid(randn(b, t, h) + 3)
    return {name: x.requires_grad_() for name, x in inputs.items()}


def _ours(inputs: dict[str, Tensor]) -> Tensor:
    transition = Householder(inputs["k"], inputs["beta"], inputs.get("decay"), normalize=True)
    return linear_recurrence(transition, inputs["q"], inputs["v"], backend="triton")[0]


def _peer(row: Row) -> Callable[[dict[str, Tensor]], Tensor]:
    if row.n > 1:
        function = importlib.import_module("fla.ops.gated_delta_product").chunk_gated_delta_product
    elif row.gated:
        function = importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    else:
        function = importlib.import_module("fla.ops.delta_rule").chunk_delta_rule
    if row.gated:
        # It refuses its gated backward with this triton, whose result may be wrong; for its time alone it may run.
        vars(importlib.import_module("fla.ops.common.chunk_o"))["TRITON_ABOVE_3_7_1"] = True

    def call(inputs: dict[str, Tensor]) -> Tensor:
        k, v, beta = (inputs[name].flatten(1, 2) for name in ("k", "v", "beta"))
        options: dict[str, Any] = {"scale": 1.0}
        if row.n > 1:
            options |= {"num_householder": row.n, "g": None}
        if row.gated:
            options["g"] = inputs["decay"].log()
        return function(q=inputs["q"], k=k, v=v, beta=beta.bfloat16(), **options)[0]

    return call


def _call(
    function: Callable[[dict[str, Tensor]], Tensor], inputs: dict[str, Tensor], leaves: list[Tensor], *, backward: bool
) -> Callable[[], object]:
    if not backward:

        def forward() -> object:
            with torch.no_grad():
                return function(inputs)

        return forward
    d_o = torch.randn(inputs["q"].shape, device="cuda").bfloat16()
    return lambda: torch.autograd.grad(function(inputs), leaves, d_o)


def _time(call: Callable[[], object]) -> float:
    """The median time in milliseconds; the L2 cache is cleared between calls."""
    return importlib.import_module("triton.testing").do_bench(call, warmup=50, rep=200, return_mode="median")


def _peak_mib(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    del result
    return (torch.cuda.max_memory_allocated() - before) / _MIB


def _copy_bandwidth() -> float:
    """Bytes read and written in a second by a large copy on the device."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (_time(lambda: target.copy_(source)) * 1e-3)


def _line(row: dict[str, Any]) -> str:
    shape = "x".join(str(row[x]) for x in "BTHD")
    text = (
        f"{row['op']:19s} n={row['n']} {shape:16s} {row['pass']:7s} {row['ours_ms']:8.3f} ms {row['ours_mib']:7.0f} MiB"
    )
    if row["peer"]:
        text += f"   {row['peer']} {row['peer_ms']:8.3f} ms {row['peer_mib']:7.0f} MiB   {row['ratio']:.2f}x"
    return f"{text}   floor {row['floor_ms']:.3f} ms"


if __name__ == "__main__":
    main()
