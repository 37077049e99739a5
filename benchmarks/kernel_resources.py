"""What the compiler makes of the Triton kernels for a Hopper GPU, on any machine: registers, spills, shared memory.

Triton compiles for a card that isn't there, with the assembler in its wheel. Every kernel of an op's forward and
backward is compiled with the launch options that the op itself would use, and nothing is run: this shows that a kernel
fits on the chip, not that it is right, which `benchmarks.ops_gpu_accuracy` shows on a card.

    python -m benchmarks.kernel_resources --ops diagonal low_rank

The exit status is 1 if a kernel does not fit on a multiprocessor.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from statetrack.ops import triton_common
from statetrack.transition import Diagonal, Discretized, EigenvalueRange, Householder, LowRank, Transition

SHARED_MEMORY = 227 * 1024
"""The most that a program may have on Hopper, in bytes."""
_REGISTERS = 65_536
Case = tuple[Transition, dict[str, torch.Tensor]]


def householder(dtype: torch.dtype, k: int, v: int, *, n: int = 1, gated: bool = False) -> Case:
    decay = torch.rand(1, 256, 2) if gated else None
    transition = Householder(torch.randn(1, 256, n, 2, k).to(dtype), torch.rand(1, 256, n, 2), decay, normalize=True)
    return transition, {"q": torch.randn(1, 256, 2, k).to(dtype), "v": torch.randn(1, 256, n, 2, v).to(dtype)}


def diagonal(dtype: torch.dtype, k: int, v: int, *, by_channel: bool) -> Case:
    transition = Diagonal(torch.rand(1, 256, 2, *([k] if by_channel else [])))
    return transition, _written(dtype, k, v)


def discretized(dtype: torch.dtype, k: int, v: int, *, lower_end: bool = False) -> Case:
    k, v = 16, 2048
    low = -torch.rand(2, v) if lower_end else None
    transition = Discretized(torch.rand(1, 256, 2, v).to(dtype), -torch.rand(2, k, v), EigenvalueRange(-1, 1), low)
    return transition, _written(dtype, k, v)


def low_rank(dtype: torch.dtype, k: int, v: int) -> Case:
    transition = LowRank(torch.rand(1, 256, 2, k), *torch.randn(2, 1, 256, 2, k).to(dtype).unbind())
    return transition, _written(dtype, k, v)


def _written(dtype: torch.dtype, k: int, v: int) -> dict[str, torch.Tensor]:
    return {name: torch.randn(1, 256, 2, size).to(dtype) for name, size in (("q", k), ("v", v), ("write", k))}


OPS: dict[str, list[Callable[..., Case]]] = {
    "householder": [householder, functools.partial(householder, gated=True), functools.partial(householder, n=2)],
    "diagonal": [functools.partial(diagonal, by_channel=False), functools.partial(diagonal, by_channel=True)],
    "discretized": [discretized, functools.partial(discretized, lower_end=True)],
    "low_rank": [low_rank],
}


def compiled(case: Case, op: str) -> Iterator[tuple[str, Any, float]]:
    """(name, compiled kernel, seconds) of every kernel that a forward and its backward launch."""
    triton = importlib.import_module("triton")
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    driver = SimpleNamespace(
        get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 0
    )
    backend = importlib.import_module(f"statetrack.ops.triton_{op}")
    modules = {"_kernels": op, "_channel_kernels": "channels"}
    results: dict[tuple[str, int], tuple[str, Any, float]] = {}

    def launcher(function: Any, name: str) -> Any:
        class Launcher:
            def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
                def launch(*arguments: Any, **options: Any) -> None:
                    start = time.perf_counter()
                    kernel = function.warmup(*arguments, grid=grid, **options)
                    results.setdefault((name, id(kernel)), (name, kernel, time.perf_counter() - start))

                return launch

        return Launcher()

    transition, inputs = case
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(triton_common, "interpreted", return_value=True))
        for attribute, module in modules.items():
            if hasattr(backend, attribute):
                functions = vars(importlib.import_module(f"statetrack.ops.kernels.{module}"))
                recorder = SimpleNamespace(**{name: launcher(x, name) for name, x in functions.items()})
                stack.enter_context(mock.patch.object(backend, attribute, return_value=recorder))
        triton.runtime.driver.set_active(driver)
        inputs = {name: x.requires_grad_() for name, x in inputs.items()}
        for save in (False, True):
            with torch.set_grad_enabled(save):
                o, state = backend.BACKEND.run(transition, inputs["q"], inputs["v"], inputs.get("write"), None, None)
        (o.float().sum() + state.sum()).backward()
    yield from results.values()


def resources(kernel: Any) -> dict[str, int]:
    """Registers a thread, bytes of its stack (spills), shared memory, and programs that fit on a multiprocessor."""
    tools = Path(importlib.import_module("triton").__path__[0]) / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [tools / "cuobjdump", "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    shared = kernel.metadata.shared
    by_registers = _REGISTERS // (found["REG"] * kernel.metadata.num_warps * 32)
    by_memory = SHARED_MEMORY // max(1, shared + 1024)
    return {
        "registers": found["REG"], "stack": found["STACK"] + found["LOCAL"], "shared": shared,
        "programs": min(by_registers, by_memory),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="*", default=list(OPS), choices=list(OPS))
    parser.add_argument("--sizes", nargs="*", type=int, default=[64, 128, 256], help="of keys and values")
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "float32"])
    options = parser.parse_args()
    all_fit = True
    for op in options.ops:
        for make in OPS[op]:
            for dtype in options.dtypes:
                for size in options.sizes:
                    for name, kernel, seconds in compiled(make(getattr(torch, dtype), size, size), op):
                        found = resources(kernel)
                        all_fit = all_fit and found["programs"] > 0
                        print(
                            f"{op} {_label(make):18} {dtype:9} {size:4} {name:20} warps {kernel.metadata.num_warps} "
                            f"registers {found['registers']:3} stack {found['stack']:5} shared "
                            f"{found['shared'] / 1024:5.1f} KiB programs {found['programs']} ({seconds:.1f} s)",
                            flush=True,
                        )

    return int(not all_fit)


def _label(make: Callable[..., Case]) -> str:
    return ",".join(f"{name}={value}" for name, value in getattr(make, "keywords", {}).items())


if __name__ == "__main__":
    raise SystemExit(main())
