"""Mamba's selective scan on one CPU thread: ours against mambapy's; to results/cpu_selective_scan.json.

All take step sizes dt [B, T, D], inputs x [B, T, D], A [D, N], B and C [B, T, N] in float32 and return y [B, T, D]; N
is the size of a channel's state. mambapy discretizes as its `MambaBlock` does and scans with its `pscan`, in parallel
over time. Times are CPU times of one thread, interleaved. As mambapy allocates much, it is timed in two processes: one
as it comes, and one in which glibc's malloc is told to keep freed memory, as few users do. Ours is timed beside it in
both.

The floor is the time of the exponentials alone, at the rate of `torch.exp2` within a cache: B T D N of them in the
forward, and as many again in a backward that computes the decays once more in place of keeping them. Peak memory is
what the process needs at most beyond inputs and results (y, and the gradients where there is a backward).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import ROOT, environment, interleaved_cpu_times, peak_memory_mb, write_results
from statetrack.ops import linear_recurrence
from statetrack.transition import Discretized, EigenvalueRange

Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    b: int
    t: int
    d: int
    n: int
    rounds: int
    backward: bool = True

    def __str__(self) -> str:
        return f"B{self.b} T{self.t} D{self.d} N{self.n}"


SHAPES = (
    Shape(8, 2048, 256, 16, rounds=7),
    Shape(64, 40, 64, 16, rounds=60),
    Shape(64, 40, 32, 4, rounds=60),
    # A segment of an evaluation on long sequences.
    Shape(32, 4096, 64, 16, rounds=5, backward=False),
)
MALLOC = {
    "default malloc": {},
    "tuned malloc": {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**40)},
}


def statetrack(range_: str, dt: Tensor, x: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    transition = Discretized(dt.unsqueeze(2), A.T.unsqueeze(0), EigenvalueRange.of(range_))
    v = (dt * x).unsqueeze(2)
    o, _ = linear_recurrence(transition, q=C.unsqueeze(2), v=v, write=B.unsqueeze(2), backend="chunked")
    return o.squeeze(2)


def mambapy(dt: Tensor, x: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    from mambapy.pscan import pscan  # pyright: ignore[reportMissingImports]

    decay = torch.exp(dt.unsqueeze(-1) * A)
    written = dt.unsqueeze(-1) * B.unsqueeze(2) * x.unsqueeze(-1)
    return (pscan(decay, written) @ C.unsqueeze(-1)).squeeze(3)


SCANS: dict[str, Scan] = {
    "statetrack": partial(statetrack, "0,1"),
    "statetrack, range [-1, 1]": partial(statetrack, "-1,1"),
    "mambapy": mambapy,
}


def make_inputs(shape: Shape) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    b, t, d, n = shape.b, shape.t, shape.d, shape.n
    dt = torch.rand(b, t, d, generator=generator) * 0.1
    x, B, C = (torch.randn(b, t, size, generator=generator) for size in (d, n, n))
    # Mamba's initial values.
    A = -torch.arange(1.0, n + 1).repeat(d, 1)
    return [z.requires_grad_(shape.backward) for z in (dt, x, A, B, C)]


def make_call(name: str, shape: Shape, *, backward: bool) -> Callable[[], list[Tensor]]:
    """A function that returns y and, with `backward`, the gradients of all inputs for a fixed gradient of y."""
    inputs = make_inputs(shape)
    dy = torch.randn(shape.b, shape.t, shape.d, generator=torch.Generator().manual_seed(1))

    def call() -> list[Tensor]:
        with torch.set_grad_enabled(backward):
            y = SCANS[name](*inputs)
        return [y, *torch.autograd.grad(y, inputs, dy)] if backward else [y]

    return call


def check(shape: Shape) -> None:
    ours, theirs = (make_call(name, shape, backward=shape.backward)() for name in ("statetrack", "mambapy"))
    for actual, expected in zip(ours, theirs, strict=True):
        error = ((actual - expected).norm() / expected.norm()).item()
        if not error < 1e-4:
            raise AssertionError(f"statetrack and mambapy differ by {error:.1e} at {shape}")


def time_shape(shape: Shape) -> dict[str, Any]:
    """Times of all scans at one shape, in this process, by pass."""
    torch.set_num_threads(1)
    passes = {"forward": False, **({"forward + backward": True} if shape.backward else {})}
    return {
        what: interleaved_cpu_times(
            {name: make_call(name, shape, backward=backward) for name in SCANS}, rounds=shape.rounds
        )
        for what, backward in passes.items()
    }


def in_new_process(variables: dict[str, str], function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` in a fresh process with these environment variables, which malloc reads at its start."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(function, *args).result()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def exponentials_per_second() -> float:
    x = -torch.rand(2**17)
    out = torch.empty_like(x)
    repeats = 100

    def exp2() -> None:
        for _ in range(repeats):
            torch.exp2(x, out=out)

    best_ms = interleaved_cpu_times({"exp2": exp2}, rounds=20)["exp2"]["best_ms"]
    return repeats * x.numel() / best_ms * 1e3


def extra_peak_mb(name: str, shape: Shape) -> float:
    """The peak of a forward and backward beyond its inputs and results, in MB."""
    results_mb = sum(z.numel() * z.element_size() for z in make_inputs(shape)) / 1e6
    results_mb += shape.b * shape.t * shape.d * 4 / 1e6
    return peak_memory_mb(partial(make_call, backward=True), name, shape) - results_mb


def main() -> None:
    torch.set_num_threads(1)
    rate = exponentials_per_second()
    rows = []
    for shape in SHAPES:
        check(shape)
        by_malloc = {malloc: in_new_process(variables, time_shape, shape) for malloc, variables in MALLOC.items()}
        for what in by_malloc["default malloc"]:
            passes = 2 if what == "forward + backward" else 1
            floor_ms = passes * shape.b * shape.t * shape.d * shape.n / rate * 1e3
            for malloc, times in by_malloc.items():
                theirs = times[what]["mambapy"]["median_ms"]
                for name, measured in times[what].items():
                    row = {
                        "shape": str(shape),
                        "pass": what,
                        "malloc": malloc,
                        "scan": name,
                        "median_ms": round(measured["median_ms"], 3),
                        "best_ms": round(measured["best_ms"], 3),
                        "times_as_fast_as_mambapy": round(theirs / measured["median_ms"], 2),
                        "times_the_floor": round(measured["median_ms"] / floor_ms, 1),
                    }
                    rows.append(row)
                    print(
                        f"{row['shape']:20} {what:18} {malloc:14} {name:25} {row['median_ms']:>9.2f} ms"
                        f" {row['times_as_fast_as_mambapy']:>6.2f}x {row['times_the_floor']:>6.1f} floors",
                        flush=True,
                    )
    memory = {name: round(extra_peak_mb(name, SHAPES[0])) for name in SCANS}
    print(f"extra peak memory, forward + backward at {SHAPES[0]}, MB: {memory}")
    results = {
        "what": "CPU time of one thread, float32, medians of interleaved rounds",
        "settings": {"shapes": [asdict(shape) for shape in SHAPES], "malloc": MALLOC},
        "environment": environment(["mambapy"]),
        "exponentials_per_second": round(rate),
        "results": rows,
        "extra_peak_mb": {"shape": str(SHAPES[0]), **memory},
    }
    write_results(ROOT / "results" / "cpu_selective_scan.json", results)


if __name__ == "__main__":
    main()
