"""What the compiler makes of the Triton kernels for a Hopper GPU, on any machine: registers, spills, shared memory.

Triton compiles for a card that isn't there, with the assembler in its wheel. Every kernel of an op's forward and
backward is compiled with the launch options that the op itself would use, and nothing is run: this shows that a kernel
fits on the chip, and looks for traces of two mistakes that assemblers have made (`benchmarks.machine_code`). It doesn't
show that a kernel is right, which `benchmarks.ops accuracy` and `pytest -m gpu tests/ops` do on a card.

    python -m benchmarks.kernel_resources --ops diagonal low_rank
    python -m benchmarks.kernel_resources --ops householder --sizes 16x64 256x128

The exit status is 1 if a kernel does not fit on a multiprocessor, or if there is such a trace.
"""

from __future__ import annotations

import argparse
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

from benchmarks import machine_code
from statetrack.ops import Precision, triton_ahead, triton_common, triton_slstm
from statetrack.ops.slstm import slstm as slstm_states
from statetrack.ops.triton_ahead import Visit
from statetrack.transition import Diagonal, Discretized, EigenvalueRange, Householder, LowRank, Transition

SHARED_MEMORY = 227 * 1024
"""The most that a program may have on Hopper, in bytes."""
_REGISTERS = 65_536
Case = tuple[Transition | EigenvalueRange | None, dict[str, torch.Tensor]]
"""A transition and the other arguments of the recurrence, a range and those of `triton_selective.selective_scan`, or
None and those of `slstm`."""


def householder(
    dtype: torch.dtype, k: int, v: int, *, n: int = 1, gated: bool = False, b: int = 1, t: int = 2048
) -> Case:
    decay = torch.rand(b, t, 2) if gated else None
    transition = Householder(torch.randn(b, t, n, 2, k).to(dtype), torch.rand(b, t, n, 2), decay, normalize=True)
    return transition, {"q": torch.randn(b, t, 2, k).to(dtype), "v": torch.randn(b, t, n, 2, v).to(dtype)}


def diagonal(dtype: torch.dtype, k: int, v: int, *, by_channel: bool, b: int = 1, t: int = 2048) -> Case:
    return Diagonal(torch.rand(b, t, 2, *([k] if by_channel else []))), _written(dtype, k, v, b, t)


def discretized(dtype: torch.dtype, k: int, v: int, *, lower_end: bool = False, b: int = 1, t: int = 2048) -> Case:
    k, v = 16, 256
    low = -torch.rand(2, v) if lower_end else None
    transition = Discretized(torch.rand(b, t, 2, v).to(dtype), -torch.rand(2, k, v), EigenvalueRange(-1, 1), low)
    return transition, _written(dtype, k, v, b, t)


def low_rank(dtype: torch.dtype, k: int, v: int, *, b: int = 1, t: int = 2048) -> Case:
    transition = LowRank(torch.rand(b, t, 2, k), *torch.randn(2, b, t, 2, k).to(dtype).unbind())
    return transition, _written(dtype, k, v, b, t)


def selective(dtype: torch.dtype, k: int, v: int, *, lower_end: bool = False, b: int = 1, t: int = 2048) -> Case:
    k, v = 16, 256
    inputs = {name: torch.randn(b, t, v).to(dtype) for name in ("u", "raw")}
    inputs |= {name: torch.randn(b, t, k).to(dtype) for name in ("write", "q")}
    # As in a layer, the gate is a part of a wider projection.
    inputs |= {"z": torch.randn(b, t, 2 * v).to(dtype)[..., v:], "A": -torch.rand(k, v)}
    inputs |= {name: torch.rand(v) for name in ("bias", "D", *(["lower_end"] if lower_end else []))}
    return EigenvalueRange(-1, 1), inputs


def slstm(dtype: torch.dtype, k: int, v: int, *, b: int = 1, t: int = 2048) -> Case:
    n = min(k, triton_slstm.LARGEST_HEAD)
    inputs = {name: torch.randn(b, t, 2, n).to(dtype) for name in "zifo"}
    inputs |= {"bias": torch.randn(2, 4 * n), "recurrent": torch.randn(2, n, 4 * n)}
    return None, inputs | {name: torch.rand(b, 2, n) for name in "hcnm"}


def _written(dtype: torch.dtype, k: int, v: int, b: int, t: int) -> dict[str, torch.Tensor]:
    return {name: torch.randn(b, t, 2, size).to(dtype) for name, size in (("q", k), ("v", v), ("write", k))}


OPS: dict[str, list[Callable[..., Case]]] = {
    "householder": [householder, functools.partial(householder, gated=True), functools.partial(householder, n=2)],
    "diagonal": [functools.partial(diagonal, by_channel=False), functools.partial(diagonal, by_channel=True)],
    "discretized": [discretized, functools.partial(discretized, lower_end=True)],
    "low_rank": [low_rank],
    "selective": [selective, functools.partial(selective, lower_end=True)],
    "slstm": [slstm],
}


def compiled(
    case: Case, op: str, *, processors: int = 1, precision: Precision = "default"
) -> Iterator[tuple[str, Any, float]]:
    """(name, compiled kernel, seconds) of every kernel that a forward and its backward launch."""
    results: dict[tuple[str, int], tuple[str, Any, float]] = {}

    def compile_one(name: str, function: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        start = time.perf_counter()
        kernel = function.warmup(*arguments, grid=(1,), **options)
        results.setdefault((name, id(kernel)), (name, kernel, time.perf_counter() - start))

    launches(case, op, compile_one, processors=processors, precision=precision)
    yield from results.values()


def keys(case: Case, op: str, *, processors: int = 1) -> set[tuple[str, str]]:
    """What triton tells compiled kernels apart by, (name, key), for every launch of a forward and its backward.

    Calls with the same keys share their kernels. Nothing is compiled.
    """
    found: set[tuple[str, str]] = set()

    launches(case, op, lambda *launch: found.add(key_of(*launch)), processors=processors)
    return found


def key_of(name: str, function: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[str, str]:
    """The same of one launch: its kernel's name, and what triton tells compiled kernels of that apart by."""
    *_, bind = function.device_caches[0]
    _, specialization, others = bind(*arguments, **options)
    return name, repr((specialization, others))


def launches(case: Case, op: str, visit: Visit, *, processors: int = 1, precision: Precision = "default") -> None:
    """Runs an op without and with a gradient, and visits its launches in place of making them.

    Args:
        case: the transition and the other arguments, on a CPU.
        op: of which `ops/triton_<op>.py` has the kernels.
        visit: is called with every launch.
        processors: of the device that isn't there; with many, time is cut into segments.
        precision: as in `linear_recurrence`.
    """
    backend = importlib.import_module(f"statetrack.ops.triton_{op}")
    transition, inputs = case
    with (
        mock.patch.object(triton_common, "interpreted", return_value=True),
        mock.patch.object(triton_common, "multiprocessors", return_value=processors),
        triton_ahead.visited(visit),
    ):
        stand_in_for_hopper()
        inputs = {name: x.requires_grad_() for name, x in inputs.items()}
        for save in (False, True):
            with torch.set_grad_enabled(save):
                o, state = _run(backend, transition, inputs, precision)
        (o.float().sum() + state.sum()).backward()


def stand_in_for_hopper() -> None:
    """Lets Triton, in the rest of this process, compile for a Hopper GPU that isn't there."""
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    importlib.import_module("triton").runtime.driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 0
        )
    )


def _run(
    module: Any, transition: Transition | EigenvalueRange | None, inputs: dict[str, torch.Tensor], precision: Precision
) -> tuple[torch.Tensor, torch.Tensor]:
    if transition is None:
        parts, states = ([inputs[name] for name in names] for names in ("zifo", "hcnm"))
        h, c, _, _ = slstm_states(parts, inputs["bias"], inputs["recurrent"], states, "triton")
        return h, c
    if isinstance(transition, EigenvalueRange):
        optional = {"lower_end": None, "initial_state": None}
        return module.selective_scan(**optional | inputs, eigenvalue_range=transition)  # type: ignore[no-any-return]
    run = (precision == "high" and module.BACKEND.run_high) or module.BACKEND.run
    return run(transition, inputs["q"], inputs["v"], inputs.get("write"), None, None)  # type: ignore[no-any-return]


def _inspect(kernel: Any, *tool: str) -> str:
    """What one of the tools in Triton's wheel, given with its options, prints of a kernel."""
    tools = Path(importlib.import_module("triton").__path__[0]) / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [tools / tool[0], *tool[1:], file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def mistakes(kernel: Any) -> list[str]:
    """Traces of the assembler's mistakes in a kernel's machine code, as sentences."""
    text = _inspect(kernel, "nvdisasm", "-c")
    return [*machine_code.unwritten(text), *machine_code.overwritten(text)]


def resources(kernel: Any) -> dict[str, int]:
    """Registers a thread, bytes of its stack (spills), shared memory, and programs that fit on a multiprocessor."""
    text = _inspect(kernel, "cuobjdump", "--dump-resource-usage")
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    shared = kernel.metadata.shared
    by_registers = _REGISTERS // (found["REG"] * kernel.metadata.num_warps * 32)
    by_memory = SHARED_MEMORY // max(1, shared + 1024)
    return {
        "registers": found["REG"], "stack": found["STACK"] + found["LOCAL"], "shared": shared,
        "programs": min(by_registers, by_memory),
    }  # fmt: skip


def parse_size(text: str) -> tuple[int, int]:
    """Channels of keys and of values, of KxV, or of one number for both."""
    try:
        numbers = [int(x) for x in text.split("x")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"must be one size or KEYSxVALUES, as in 64 or 16x64, got {text!r}")
    return numbers[0], numbers[-1]


def parse_launch(text: str) -> tuple[str, triton_common.Launch]:
    """(kernel, options) of KERNEL=BLOCK,WARPS,STAGES."""
    kernel, _, numbers = text.partition("=")
    try:
        block, num_warps, num_stages = map(int, numbers.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be KERNEL=BLOCK,WARPS,STAGES, got {text!r}") from None
    return kernel, triton_common.Launch(block, num_warps, num_stages)


def replace_launches(op: str, launches: dict[str, triton_common.Launch]) -> None:
    """Puts launch options into an op's tables, for every size of key."""
    backend = importlib.import_module(f"statetrack.ops.triton_{op}")
    names = ("_TABLE", "_TABLE_FLOAT32", "_TABLE_NARROW")
    for table in (getattr(backend, name) for name in names if hasattr(backend, name)):
        for kernel, launch in launches.items():
            if kernel in table:
                table[kernel] = dict.fromkeys(table[kernel], launch)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="*", default=list(OPS), choices=list(OPS))
    sizes = [(64, 64), (128, 128), (256, 256)]
    parser.add_argument("--sizes", nargs="*", type=parse_size, default=sizes, help="of keys and values: 64, or 16x64")
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "float32"])
    parser.add_argument("--processors", type=int, default=1, help="of the device: with 132, time is cut into segments")
    parser.add_argument("--precision", default="default", choices=["default", "high"])
    parser.add_argument(
        "--launch",
        nargs="*",
        default=[],
        type=parse_launch,
        help="KERNEL=BLOCK,WARPS,STAGES in place of the table's",
    )
    options = parser.parse_args()
    fine = True
    for op in options.ops:
        replace_launches(op, dict(options.launch))
        for make in OPS[op]:
            for dtype in options.dtypes:
                for k, v in options.sizes:
                    case = make(getattr(torch, dtype), k, v)
                    for name, kernel, seconds in compiled(
                        case, op, processors=options.processors, precision=options.precision
                    ):
                        found, wrong = resources(kernel), mistakes(kernel)
                        fine = fine and found["programs"] > 0 and not wrong
                        print(
                            f"{op} {_label(make):18} {dtype:9} {f'{k}x{v}':7} {name:20} "
                            f"warps {kernel.metadata.num_warps} registers {found['registers']:3} "
                            f"stack {found['stack']:5} shared {found['shared'] / 1024:5.1f} KiB "
                            f"programs {found['programs']} ({seconds:.1f} s)",
                            *(f"WRONG: {sentence}" for sentence in wrong),
                            sep="\n  ",
                            flush=True,
                        )

    return int(not fine)


def _label(make: Callable[..., Case]) -> str:
    return ",".join(f"{name}={value}" for name, value in getattr(make, "keywords", {}).items())


if __name__ == "__main__":
    raise SystemExit(main())
