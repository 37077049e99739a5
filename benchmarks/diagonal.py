"""Linear attention with decays on one CPU thread: ours, a step loop, flash-linear-attention; results/cpu_diagonal.json.

All take q, k, v [B, T, H, K] and decays, [B, T, H] ("head") or [B, T, H, K] ("channel"), in float32, and return o. The
peers are flash-linear-attention's pure-torch functions, each loaded from its file alone, as the rest of that package
needs a GPU compiler: for one decay a head its chunked form (at the chunk size that is best for it), and its quadratic
one where T is short; for one decay a channel its recurrence, as it has no other. They take logarithms, so the decays
are positive here; ours may have any sign and takes the same time. The step loop is what one writes first: batched
matrix products for each token, autograd for the backward. Times are CPU times of one thread, interleaved.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import ROOT, environment, interleaved_cpu_times, peak_memory_mb, write_results
from statetrack.ops import linear_recurrence
from statetrack.transition import Diagonal

Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    decay: str
    b: int
    t: int
    h: int
    k: int
    rounds: int
    peer_chunk: int = 64

    def __str__(self) -> str:
        return f"{self.decay} B{self.b} T{self.t} H{self.h} K{self.k}"


SHAPES = (
    Shape("head", 8, 2048, 4, 64, rounds=7, peer_chunk=128),
    Shape("head", 32, 256, 4, 32, rounds=15, peer_chunk=32),
    Shape("channel", 8, 2048, 4, 64, rounds=2),
    Shape("channel", 32, 256, 4, 32, rounds=5),
)
# The quadratic form keeps some matrices [B, H, T, T].
LONGEST_QUADRATIC = 512
# One sequence of one head after another, to see that time for each token and memory do not depend on T.
LENGTHS = (1024, 4096, 16384, 65536)


def statetrack(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    return linear_recurrence(Diagonal(decay), q * q.shape[-1] ** -0.5, v, write=k, backend="chunked")[0]


def step_loop(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    b, t, h, dim = k.shape
    q, k, v = (x.transpose(1, 2).reshape(b * h, t, dim) for x in (q * dim**-0.5, k, v))
    decay = decay.reshape(b, t, h, -1).transpose(1, 2).reshape(b * h, t, -1)
    state, outputs = q.new_zeros(b * h, dim, dim), []
    for q_t, k_t, v_t, decay_t in zip(*(x.unbind(1) for x in (q, k, v, decay)), strict=True):
        state = torch.baddbmm(decay_t.unsqueeze(2) * state, k_t.unsqueeze(2), v_t.unsqueeze(1))
        outputs.append(torch.bmm(q_t.unsqueeze(1), state))
    return torch.cat(outputs, 1).view(b, h, t, dim).transpose(1, 2)


@cache
def _peer(name: str) -> ModuleType:
    package = importlib.util.find_spec("fla")
    if package is None or not package.submodule_search_locations:
        sys.exit("diagonal compares with flash-linear-attention: pip install '.[benchmark]', or make benchmark")
    path = f"{package.submodule_search_locations[0]}/ops/{name}/naive.py"
    spec = importlib.util.spec_from_file_location(f"fla_{name}_naive", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def peer(chunk: int, q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """flash-linear-attention's best pure-torch function for these decays."""
    if decay.ndim == 4:
        return _peer("gla").naive_recurrent_gla(q, k, v, decay.log())[0]
    return _peer("simple_gla").naive_chunk_simple_gla(q, k, v, decay.log(), chunk_size=chunk)[0]


def quadratic(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """Attention with a [T, T] mask of decays, as flash-linear-attention has it."""
    return _peer("simple_gla").naive_parallel_simple_gla(q, k, v, decay.log())[0]


def attentions(shape: Shape) -> dict[str, Attention]:
    found: dict[str, Attention] = {
        "statetrack": statetrack,
        "step loop": step_loop,
        "flash-linear-attention": partial(peer, shape.peer_chunk),
    }
    if shape.decay == "head" and shape.t <= LONGEST_QUADRATIC:
        found["flash-linear-attention, quadratic"] = quadratic
    return found


def make_inputs(shape: Shape) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape.b, shape.t, shape.h, shape.k, generator=generator) for _ in range(3))
    sizes = (shape.b, shape.t, shape.h) if shape.decay == "head" else k.shape
    decay = torch.sigmoid(3 + torch.randn(sizes, generator=generator))
    return [x.requires_grad_() for x in (q, k, v, decay)]


def make_call(name: str, shape: Shape, *, backward: bool) -> Callable[[], list[Tensor]]:
    """A function that returns o and, with `backward`, the gradients of all inputs for a fixed gradient of o."""
    inputs, attention = make_inputs(shape), attentions(shape)[name]
    d_o = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1))

    def call() -> list[Tensor]:
        with torch.set_grad_enabled(backward):
            o = attention(*inputs)
        return [o, *torch.autograd.grad(o, inputs, d_o)] if backward else [o]

    return call


def check(shape: Shape) -> None:
    """Everything that is timed computes the same."""
    expected = make_call("step loop", shape, backward=True)()
    for name in attentions(shape):
        for actual, right in zip(make_call(name, shape, backward=True)(), expected, strict=True):
            error = ((actual - right).norm() / right.norm()).item()
            if not error < 1e-4:
                raise AssertionError(f"{name} and the step loop differ by {error:.1e} at {shape}")


def compare(shape: Shape) -> list[dict[str, Any]]:
    """The times of everything at one shape, forward, and forward with backward."""
    rows = []
    for what, backward in {"forward": False, "forward + backward": True}.items():
        calls: dict[str, Callable[[], object]] = {
            name: make_call(name, shape, backward=backward) for name in attentions(shape)
        }
        times = interleaved_cpu_times(calls, rounds=shape.rounds)
        for name, measured in times.items():
            median = measured["median_ms"]
            rows.append(
                {
                    "shape": str(shape),
                    "pass": what,
                    "attention": name,
                    "median_ms": round(median, 3),
                    "best_ms": round(measured["best_ms"], 3),
                    "times_as_fast_as_fla": round(times["flash-linear-attention"]["median_ms"] / median, 2),
                    "times_as_fast_as_step_loop": round(times["step loop"]["median_ms"] / median, 2),
                }
            )
    return rows


def extra_peak_mb(name: str, shape: Shape) -> float:
    """The peak of a forward and backward beyond its inputs and results, in MB."""
    results_mb = sum(x.numel() * x.element_size() for x in [*make_inputs(shape), make_inputs(shape)[0]]) / 1e6
    return peak_memory_mb(partial(make_call, backward=True), name, shape) - results_mb


def lengths(decay: str) -> list[dict[str, Any]]:
    """Time for each token, and memory, of a forward and backward at every length."""
    shapes = [Shape(decay, 1, t, 4, 64, rounds=3) for t in LENGTHS]
    calls: dict[str, Callable[[], object]] = {
        str(shape.t): make_call("statetrack", shape, backward=True) for shape in shapes
    }
    times = interleaved_cpu_times(calls, rounds=3)
    return [
        {
            "shape": str(shape),
            "us_per_token": round(times[str(shape.t)]["median_ms"] * 1e3 / shape.t, 2),
            "extra_peak_mb": round(extra_peak_mb("statetrack", shape), 1),
        }
        for shape in shapes
    ]


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for shape in SHAPES:
        check(shape)
        compared = compare(shape)
        for row in compared:
            print(
                f"{row['shape']:26} {row['pass']:18} {row['attention']:33} {row['median_ms']:>9.2f} ms"
                f" {row['times_as_fast_as_fla']:>7.2f}x fla {row['times_as_fast_as_step_loop']:>6.2f}x loop",
                flush=True,
            )
        rows += compared
    by_length = [row for decay in ("head", "channel") for row in lengths(decay)]
    for row in by_length:
        print(f"{row['shape']:26} {row['us_per_token']:>7.2f} us a token {row['extra_peak_mb']:>8.1f} MB", flush=True)
    results: dict[str, Any] = {
        "what": "CPU time of one thread, float32, medians of interleaved rounds",
        "settings": {"shapes": [asdict(shape) for shape in SHAPES], "lengths": LENGTHS},
        "environment": environment(["fla-core"]),
        "results": rows,
        "by_length": by_length,
    }
    write_results(ROOT / "results" / "cpu_diagonal.json", results)


if __name__ == "__main__":
    main()
