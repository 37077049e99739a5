"""Low-rank transitions on one CPU thread, ours and others: RWKV-7 and KDA; to results/cpu_low_rank.json.

RWKV-7's recurrence takes q, u, w, write, v and a decay for each channel, all [B, T, H, K]; KDA (Kimi-Linear) takes q,
k, v, such a decay, and beta [B, T, H]. Keys have length 1. All rules take float32 and return o. The peers are
flash-linear-attention's pure-torch recurrences and chunked forms, loaded from their files alone, as the rest of that
package needs a GPU compiler, and for KDA also the functions which transformers uses without that compiler. Peers want
the logarithm of a decay, so decays are in [0.5, 1] and their logarithms are made before the clock starts. The chunked
forms have the chunk size that is best for them. Times are CPU times of one thread, interleaved, medians.
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

from benchmarks.common import ROOT, environment, interleaved_cpu_times, write_results
from statetrack.ops import linear_recurrence
from statetrack.transition import Householder, LowRank

Rule = Callable[..., Tensor]


@dataclass(frozen=True)
class Shape:
    b: int
    t: int
    h: int
    k: int
    rounds: int

    def __str__(self) -> str:
        return f"B{self.b} T{self.t} H{self.h} K{self.k}"


SHAPES = (Shape(8, 2048, 4, 64, rounds=3), Shape(32, 256, 4, 32, rounds=7))


def rwkv7(q: Tensor, v: Tensor, u: Tensor, w: Tensor, write: Tensor, decay: Tensor) -> Tensor:
    return linear_recurrence(LowRank(decay, u, w), q * q.shape[-1] ** -0.5, v, write=write, backend="chunked")[0]


def kda(normalize: bool, q: Tensor, v: Tensor, k: Tensor, beta: Tensor, decay: Tensor) -> Tensor:
    transition = Householder(k.unsqueeze(2), beta.unsqueeze(2), decay, normalize)
    return linear_recurrence(transition, q * q.shape[-1] ** -0.5, v.unsqueeze(2), backend="chunked")[0]


@cache
def _fla(path: str) -> ModuleType:
    package = importlib.util.find_spec("fla")
    if package is None or not package.submodule_search_locations:
        sys.exit("low_rank compares with flash-linear-attention: pip install '.[benchmark]', or make benchmark")
    name = "fla_" + path.replace("/", "_").removesuffix(".py")
    spec = importlib.util.spec_from_file_location(name, f"{package.submodule_search_locations[0]}/ops/{path}")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fla_rwkv7(
    function: str, options: dict[str, int], q: Tensor, v: Tensor, u: Tensor, w: Tensor, write: Tensor, log_decay: Tensor
) -> Tensor:
    # They add the outer product of alpha and beta where we subtract that of w and u.
    q, v, u, w, write, log_decay = (x.transpose(1, 2) for x in (q, v, -u, w, write, log_decay))
    dplr = getattr(_fla("generalized_delta_rule/dplr/naive.py"), function)
    return dplr(q, write, v, w, u, log_decay, **options)[0].transpose(1, 2)


def fla_kda(
    function: str, options: dict[str, int], q: Tensor, v: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor
) -> Tensor:
    return getattr(_fla("kda/naive.py"), function)(q, k, v, log_decay, beta, **options)[0]


def transformers_kda(
    function: str, options: dict[str, int], q: Tensor, v: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor
) -> Tensor:
    from transformers.models.kimi_linear import modeling_kimi_linear

    function_ = getattr(modeling_kimi_linear, function)
    function_ = getattr(function_, "__wrapped__", function_)  # where it is installed, a kernel would take its place
    return function_(q, k, v, log_decay, beta, initial_state=None, output_final_state=False, **options)[0]


RULES: dict[str, dict[str, Rule]] = {
    "RWKV-7": {
        "statetrack": rwkv7,
        "flash-linear-attention, recurrent": partial(fla_rwkv7, "dplr_recurrence", {}),
        "flash-linear-attention, chunked": partial(fla_rwkv7, "dplr_chunkwise", {"chunk_size": 16}),
    },
    "KDA": {
        "statetrack": partial(kda, False),
        "statetrack, normalize": partial(kda, True),
        "flash-linear-attention, recurrent": partial(fla_kda, "naive_recurrent_kda", {}),
        "flash-linear-attention, chunked": partial(fla_kda, "naive_chunk_kda", {"chunk_size": 16}),
        "transformers, recurrent": partial(transformers_kda, "recurrent_kimi_delta_attention", {}),
        "transformers, chunked": partial(transformers_kda, "chunk_kimi_delta_attention", {"chunk_size": 16}),
    },
}


def make_inputs(model: str, shape: Shape, *, log_decay: bool) -> list[Tensor]:
    """q, v, then u, w, write or k, beta, and the decay or its logarithm last; all require gradients."""
    generator = torch.Generator().manual_seed(0)
    size = shape.b, shape.t, shape.h, shape.k

    def unit() -> Tensor:
        return torch.nn.functional.normalize(torch.randn(size, generator=generator), dim=-1)

    q, v = (torch.randn(size, generator=generator) for _ in range(2))
    if model == "RWKV-7":
        w, write = unit(), unit()
        keys = [w * torch.rand(size, generator=generator), w, write]
    else:
        keys = [unit(), 2 * torch.rand(size[:-1], generator=generator)]
    decay = 0.5 + 0.5 * torch.rand(size, generator=generator)
    return [x.requires_grad_() for x in (q, v, *keys, decay.log() if log_decay else decay)]


def make_call(model: str, name: str, shape: Shape, *, backward: bool) -> Callable[[], list[Tensor]]:
    """A function that returns o and, with `backward`, the gradients of all inputs for a fixed gradient of o."""
    rule = RULES[model][name]
    inputs = make_inputs(model, shape, log_decay=not name.startswith("statetrack"))
    d_o = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1))

    def call() -> list[Tensor]:
        with torch.set_grad_enabled(backward):
            o = rule(*inputs)
        return [o, *torch.autograd.grad(o, inputs, d_o)] if backward else [o]

    return call


def check(model: str) -> None:
    """Everything that is timed computes the same; gradients with respect to the decay itself."""
    shape = Shape(2, 64, 2, 32, rounds=1)
    decay = make_inputs(model, shape, log_decay=False)[-1]
    expected = make_call(model, "statetrack", shape, backward=True)()
    expected[-1] = expected[-1] * decay
    for name in RULES[model]:
        if name == "statetrack, normalize":
            continue  # keys have length 1 but for rounding, yet its gradient of k is another
        results = make_call(model, name, shape, backward=True)()
        if name.startswith("statetrack"):
            results[-1] = results[-1] * decay
        for actual, right in zip(results, expected, strict=True):
            error = ((actual - right).norm() / right.norm()).item()
            if not error < 1e-4:
                raise AssertionError(f"{name} and statetrack differ by {error:.1e} in {model}")


def main() -> None:
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for model, rules in RULES.items():
        check(model)
        for shape in SHAPES:
            calls: dict[str, Callable[[], object]] = {
                name: make_call(model, name, shape, backward=True) for name in rules
            }
            times = interleaved_cpu_times(calls, rounds=shape.rounds)
            ours = times["statetrack"]["median_ms"]
            for name, measured in times.items():
                row = {
                    "model": model,
                    "shape": str(shape),
                    "pass": "forward + backward",
                    "rule": name,
                    "median_ms": round(measured["median_ms"], 3),
                    "best_ms": round(measured["best_ms"], 3),
                    "times_as_long_as_statetrack": round(measured["median_ms"] / ours, 2),
                }
                rows.append(row)
                print(
                    f"{model:7} {row['shape']:18} {name:34} {row['median_ms']:>10.1f} ms"
                    f" {row['times_as_long_as_statetrack']:>7.2f} times statetrack",
                    flush=True,
                )
    results = {
        "what": "CPU time of one thread, float32, forward + backward, medians of interleaved rounds",
        "settings": {"shapes": [asdict(shape) for shape in SHAPES]},
        "environment": environment(["fla-core", "transformers"]),
        "results": rows,
    }
    write_results(ROOT / "results" / "cpu_low_rank.json", results)


if __name__ == "__main__":
    main()
