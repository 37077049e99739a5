"""sLSTM's recurrence on one GPU, the Triton kernels beside PyTorch's token by token; to results/ops/h100-slstm.json.

A row is a shape: the median times of a forward and of a forward with its backward, the memory floor (gates and states
read and written once), and the largest relative error of the states and gradients against the operator in float64.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import ROOT, environment, write_results
from benchmarks.decode import copy_bandwidth
from statetrack.ops.slstm import slstm

# T, H, B, N
SHAPES = [(40, 4, 256, 32), (256, 4, 256, 32), (256, 4, 64, 64), (2048, 4, 16, 64)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "ops" / "h100-slstm.json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device")
    bandwidth = copy_bandwidth(torch.device("cuda"))
    results: dict[str, Any] = {
        "environment": environment(["triton"]),
        "device": torch.cuda.get_device_name(),
        "copy_bytes_per_second": bandwidth,
        "rows": [],
    }
    for shape in SHAPES:
        results["rows"].append(row := _measure(*shape, bandwidth))
        print(row, flush=True)
        write_results(arguments.output, results)


def _measure(t: int, h: int, b: int, n: int, bandwidth: float) -> dict[str, Any]:
    generator = torch.Generator("cuda").manual_seed(0)
    gates = torch.randn(t, h, b, 4 * n, generator=generator, device="cuda")
    recurrent = torch.randn(h, n, 4 * n, generator=generator, device="cuda") / n**0.5
    zeros = torch.zeros(h, b, n, device="cuda")
    inputs = [gates, recurrent, zeros, zeros.clone(), zeros.clone(), torch.full_like(zeros, -torch.inf)]
    exact = _results([x.double() for x in inputs], "torch")
    row: dict[str, Any] = {"T": t, "H": h, "B": b, "N": n}
    number = t * h * b * n * 4  # bytes of one number for each channel and token
    floors = {"fwd": 8 * number, "fwd+bwd": 8 * number + (4 + 4 + 1 + 4) * number}
    for backend in ("triton", "torch"):
        computed = _results(inputs, backend)
        row[f"{backend}_error"] = max(
            float((a.double() - e).norm() / e.norm().clamp(min=1e-30)) for a, e in zip(computed, exact, strict=True)
        )
        row[f"{backend}_fwd_ms"] = _time(lambda backend=backend: _forward(inputs, backend))
        row[f"{backend}_fwd+bwd_ms"] = _time(lambda backend=backend: _results(inputs, backend))
    return row | {f"floor_{name}_ms": size / bandwidth * 1e3 for name, size in floors.items()}


@torch.no_grad()
def _forward(inputs: list[Tensor], backend: str) -> Tensor:
    return slstm(inputs[0], inputs[1], tuple(inputs[2:]), backend)[0]


def _results(inputs: list[Tensor], backend: str) -> list[Tensor]:
    """The outputs, and the gradients of gates and R for weights that are the same for all."""
    gates, recurrent = (x.detach().requires_grad_() for x in inputs[:2])
    h = slstm(gates, recurrent, tuple(inputs[2:]), backend)[0]
    weights = torch.linspace(-1, 1, h.numel(), device=h.device, dtype=h.dtype).view_as(h)
    return [h.detach(), *torch.autograd.grad(h, (gates, recurrent), weights)]


def _time(call: Callable[[], object]) -> float:
    return importlib.import_module("triton.testing").do_bench(call, warmup=25, rep=100, return_mode="median")


if __name__ == "__main__":
    main()
