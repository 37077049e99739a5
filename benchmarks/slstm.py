"""sLSTM's recurrence on one GPU, the Triton kernels beside PyTorch's token by token; to results/ops/h100-slstm.json.

A row is a shape: the median times of a forward and of a forward with its backward, the memory floor (inputs and outputs
read and written once), and the largest relative error of h and the gradients against the operator in float64.
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

# B, T, H, N, dtype of the inputs
SHAPES = [
    (256, 40, 4, 32, torch.bfloat16),
    (256, 40, 4, 32, torch.float32),
    (256, 256, 4, 32, torch.bfloat16),
    (64, 256, 4, 64, torch.bfloat16),
    (16, 2048, 4, 64, torch.bfloat16),
]


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


def _measure(b: int, t: int, h: int, n: int, dtype: torch.dtype, bandwidth: float) -> dict[str, Any]:
    generator = torch.Generator("cuda").manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    inputs = [randn(b, t, h, n).to(dtype) for _ in range(4)]
    zeros = torch.zeros(b, h, n, device="cuda")
    state = [zeros, zeros.clone(), zeros.clone(), torch.full_like(zeros, -torch.inf)]
    tensors = [*inputs, randn(h, 4 * n), randn(h, n, 4 * n) / n**0.5, *state]
    exact = _results([x.double() for x in tensors], "torch")
    row: dict[str, Any] = {"B": b, "T": t, "H": h, "N": n, "dtype": str(dtype).removeprefix("torch.")}
    numbers, size = b * t * h * n, inputs[0].element_size()
    # Of every channel and token: four inputs and h; then these, the gradient of h, and those of the inputs.
    floors = {"fwd": numbers * (4 * size + 4), "fwd+bwd": numbers * (4 * size + 4 + 4 * size + 4 + 4 + 4 * size)}
    for backend in ("triton", "torch"):
        computed = _results(tensors, backend)
        row[f"{backend}_error"] = max(
            float((a.double() - e).norm() / e.norm().clamp(min=1e-30)) for a, e in zip(computed, exact, strict=True)
        )
        row[f"{backend}_fwd_ms"] = _time(lambda backend=backend: _forward(tensors, backend))
        row[f"{backend}_fwd+bwd_ms"] = _time(lambda backend=backend: _results(tensors, backend))
    return row | {f"floor_{name}_ms": size / bandwidth * 1e3 for name, size in floors.items()}


@torch.no_grad()
def _forward(tensors: list[Tensor], backend: str) -> Tensor:
    return slstm(tensors[:4], tensors[4], tensors[5], tensors[6:], backend)[0]


def _results(tensors: list[Tensor], backend: str) -> list[Tensor]:
    """The outputs, and the gradients of inputs, bias and R for weights that are the same for all."""
    leaves = [x.detach().requires_grad_() for x in tensors[:6]]
    h = slstm(leaves[:4], leaves[4], leaves[5], tensors[6:], backend)[0]
    weights = torch.linspace(-1, 1, h.numel(), device=h.device, dtype=h.dtype).view_as(h)
    return [h.detach(), *torch.autograd.grad(h, leaves, weights)]


def _time(call: Callable[[], object]) -> float:
    return importlib.import_module("triton.testing").do_bench(call, warmup=25, rep=100, return_mode="median")


if __name__ == "__main__":
    main()
