"""The delta rule on one CPU thread: ours, a step loop, flash-linear-attention; to results/cpu_delta_rule.json.

All take q, k [B, T, H, K], v [B, T, H, K] and beta [B, T, H] in float32, with keys of length 1 and beta in [0, 2], and
return o. The peer is flash-linear-attention's pure-torch `delta_rule_chunkwise`, loaded from its file alone, as the
rest of that package needs a GPU compiler; it is given the chunk size that is best for it of those that divide T. The
step loop is what one writes first: two batched matrix products a token, autograd for the backward. Times are CPU times
of one thread, interleaved.

The floor is the time of the matrix products that a chunk of 32 tokens can't do without, at the rate of a large float32
matrix product. Peak memory is what the process needs at most beyond inputs and results (o, and the gradients).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import ROOT, environment, fla, interleaved_cpu_times, peak_memory_mb, write_results
from statetrack.ops import linear_recurrence
from statetrack.transition import Householder

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    b: int
    t: int
    h: int
    k: int
    rounds: int
    peer_chunk: int

    def __str__(self) -> str:
        return f"B{self.b} T{self.t} H{self.h} K{self.k}"


SHAPES = (
    Shape(8, 2048, 4, 64, rounds=7, peer_chunk=32),
    Shape(32, 256, 4, 32, rounds=15, peer_chunk=16),
    Shape(256, 40, 4, 32, rounds=15, peer_chunk=8),
)


def statetrack(normalize: bool, q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    transition = Householder(k.unsqueeze(2), beta.unsqueeze(2), normalize=normalize)
    return linear_recurrence(transition, q * q.shape[-1] ** -0.5, v.unsqueeze(2), backend="chunked")[0]


def step_loop(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    b, t, h, dim = k.shape
    q, k, v = (x.transpose(1, 2).reshape(b * h, t, dim) for x in (q * dim**-0.5, k, v))
    beta = beta.transpose(1, 2).reshape(b * h, t, 1)
    state, outputs = q.new_zeros(b * h, dim, dim), []
    for q_t, k_t, v_t, beta_t in zip(*(x.unsqueeze(2).unbind(1) for x in (q, k, v, beta)), strict=True):
        u = beta_t * torch.baddbmm(v_t, k_t, state, alpha=-1)
        state = torch.baddbmm(state, k_t.mT, u)
        outputs.append(torch.bmm(q_t, state))
    return torch.cat(outputs, 1).view(b, h, t, dim).transpose(1, 2)


def peer(chunk: int, q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return (
        fla("delta_rule/naive").delta_rule_chunkwise(q, k, v, beta.transpose(1, 2), chunk_size=chunk)[0].transpose(1, 2)
    )


def rules(shape: Shape) -> dict[str, Rule]:
    return {
        "statetrack": partial(statetrack, False),
        "statetrack, normalize": partial(statetrack, True),
        "step loop": step_loop,
        "flash-linear-attention": partial(peer, shape.peer_chunk),
    }


def make_inputs(shape: Shape) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape.b, shape.t, shape.h, shape.k, generator=generator) for _ in range(3))
    beta = 2 * torch.rand(shape.b, shape.t, shape.h, generator=generator)
    return [x.requires_grad_() for x in (q, torch.nn.functional.normalize(k, dim=-1), v, beta)]


def make_call(name: str, shape: Shape, *, backward: bool) -> Callable[[], list[Tensor]]:
    """A function that returns o and, with `backward`, the gradients of all inputs for a fixed gradient of o."""
    inputs, rule = make_inputs(shape), rules(shape)[name]
    d_o = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1))

    def call() -> list[Tensor]:
        with torch.set_grad_enabled(backward):
            o = rule(*inputs)
        return [o, *torch.autograd.grad(o, inputs, d_o)] if backward else [o]

    return call


def check(shape: Shape) -> None:
    """Everything that is timed computes the same."""
    expected = make_call("step loop", shape, backward=True)()
    for name in ("statetrack", "flash-linear-attention"):
        for actual, right in zip(make_call(name, shape, backward=True)(), expected, strict=True):
            error = ((actual - right).norm() / right.norm()).item()
            if not error < 1e-4:
                raise AssertionError(f"{name} and the step loop differ by {error:.1e} at {shape}")


def flops_per_second() -> float:
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    out = torch.empty_like(a)
    best_ms = interleaved_cpu_times({"gemm": lambda: torch.mm(a, b, out=out)}, rounds=20)["gemm"]["best_ms"]
    return 2 * 1024**3 / best_ms * 1e3


def floor_flops(shape: Shape, *, backward: bool, chunk: int = 32) -> float:
    """Operations of the matrix products of a chunk, per token and head: 3 with the state and 3 within the chunk forward
    (K K^T, Q K^T and the solve count for one triangle each), and about twice as many backward."""
    with_state, within = 3 * 2 * shape.k**2, 5 * chunk * shape.k
    forward = shape.b * shape.t * shape.h * (with_state + within)
    return 3 * forward if backward else forward


def extra_peak_mb(name: str, shape: Shape) -> float:
    """The peak of a forward and backward beyond its inputs and results, in MB."""
    results_mb = sum(x.numel() * x.element_size() for x in [*make_inputs(shape), make_inputs(shape)[0]]) / 1e6
    return peak_memory_mb(partial(make_call, backward=True), name, shape) - results_mb


def main() -> None:
    torch.set_num_threads(1)
    rate = flops_per_second()
    rows = []
    for shape in SHAPES:
        check(shape)
        for what, backward in {"forward": False, "forward + backward": True}.items():
            calls: dict[str, Callable[[], object]] = {
                name: make_call(name, shape, backward=backward) for name in rules(shape)
            }
            times = interleaved_cpu_times(calls, rounds=shape.rounds)
            floor_ms = floor_flops(shape, backward=backward) / rate * 1e3
            for name, measured in times.items():
                median = measured["median_ms"]
                row = {
                    "shape": str(shape),
                    "pass": what,
                    "rule": name,
                    "median_ms": round(median, 3),
                    "best_ms": round(measured["best_ms"], 3),
                    "times_as_fast_as_fla": round(times["flash-linear-attention"]["median_ms"] / median, 2),
                    "times_as_fast_as_step_loop": round(times["step loop"]["median_ms"] / median, 2),
                    "times_the_floor": round(median / floor_ms, 1),
                }
                rows.append(row)
                print(
                    f"{row['shape']:18} {what:18} {name:23} {row['median_ms']:>9.2f} ms"
                    f" {row['times_as_fast_as_fla']:>6.2f}x fla {row['times_as_fast_as_step_loop']:>6.2f}x loop"
                    f" {row['times_the_floor']:>5.1f} floors",
                    flush=True,
                )
    memory = {name: round(extra_peak_mb(name, SHAPES[0])) for name in rules(SHAPES[0])}
    print(f"extra peak memory, forward + backward at {SHAPES[0]}, MB: {memory}")
    results: dict[str, Any] = {
        "what": "CPU time of one thread, float32, medians of interleaved rounds",
        "settings": {"shapes": [asdict(shape) for shape in SHAPES]},
        "environment": environment(["fla-core"]),
        "flops_per_second": round(rate),
        "results": rows,
        "extra_peak_mb": {"shape": str(SHAPES[0]), **memory},
    }
    write_results(ROOT / "results" / "cpu_delta_rule.json", results)


if __name__ == "__main__":
    main()
