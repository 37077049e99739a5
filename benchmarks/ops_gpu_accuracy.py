"""How far the Triton kernels are from the float64 step loop on this GPU; to results/ops/h100-accuracy.json.

Inputs are bfloat16, beta, decays and A float32, and keys of length 1 as rounded; all is compared with the float64 step
loop on the same, already rounded inputs: the output, the final state and every gradient, by |actual - exact| / |exact|
in the Euclidean norm. `recurrence` is the same error of the step loop in float32, what no reordering can be blamed for.
An error above its case's limit, or one that is not a number, is marked, and the exit status is then 1.

A kernel that has passed under Triton's interpreter alone is not chosen by `backend="auto"`. To check all on a card:

    python -m benchmarks.ops_gpu_accuracy --ops diagonal low_rank discretized    # values and gradients: what is wrong
    python -m pytest -m gpu tests/ops                                            # sizes, dtypes, torch.compile
    python -m benchmarks.ops_gpu_accuracy                                        # the whole table, with the delta rule
    python -m benchmarks.ops_gpu --rows gla-wide simple-wide scan-wide rwkv-b8   # times; add --peer for the others'

What passes gets the priority CHECKED_ON_A_CARD in its backend's file. `--peer` adds flash-linear-attention's
chunk_delta_rule (outputs only; its autotuning takes a while) where it computes the same function, that is without
`normalize` and decay.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import ROOT, environment, write_results
from statetrack.ops import linear_recurrence
from statetrack.transition import Diagonal, Discretized, EigenvalueRange, Householder, LowRank, Transition

Arguments = dict[str, Tensor]


def random_keys(beta: Callable[[Tensor], Tensor], t: int = 2048, n: int = 1, k: int = 128, v: int = 128) -> Arguments:
    generator = torch.Generator("cuda").manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    b, h = 1, 4
    return {
        "q": (torch.nn.functional.normalize(randn(b, t, h, k), dim=-1) / k**0.5).bfloat16(),
        "k": torch.nn.functional.normalize(randn(b, t, n, h, k), dim=-1).bfloat16(),
        "v": randn(b, t, n, h, v).bfloat16(),
        "beta": beta(randn(b, t, n, h)),
        "initial_state": randn(b, h, k, v),
    }


def one_key(beta: Callable[[Tensor], Tensor], t: int = 2048) -> Arguments:
    arguments = random_keys(beta, t)
    return arguments | {"k": arguments["k"][:, :1].expand_as(arguments["k"]).contiguous()}


def signed_decay(arguments: Arguments) -> Arguments:
    """Decays that are exactly 0, 1 or -1, the 0 rarely."""
    generator = torch.Generator("cuda").manual_seed(1)
    b, t, h, _ = arguments["q"].shape
    kind = torch.rand(b, t, h, generator=generator, device="cuda")
    return arguments | {"decay": torch.where(kind < 0.01, 0.0, torch.where(kind < 0.5, 1.0, -1.0))}


def bits(x: Tensor) -> Tensor:
    return 2.0 * (x > 0)


def diagonal(decay: str, t: int = 2048, k: int = 128, v: int = 128, *, special: bool = False) -> Arguments:
    """Decays of either sign, most of them near 1 in size; `special` ones are exactly 0, 1 or -1, the 0 rarely."""
    generator = torch.Generator("cuda").manual_seed(0)
    b, h = 1, 4

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    shape = (b, t, h, k) if decay == "channel" else (b, t, h)
    kind, size = torch.rand(shape, generator=generator, device="cuda"), torch.sigmoid(randn(*shape) + 3)
    decays = torch.where(kind < 0.5, size, -size)
    if special:
        decays = torch.where(kind < 0.01, 0.0, torch.where(kind < 0.5, 1.0, -1.0))
    return {
        "q": (randn(b, t, h, k) / k**0.5).bfloat16(),
        "write": torch.nn.functional.normalize(randn(b, t, h, k), dim=-1).bfloat16(),
        "v": randn(b, t, h, v).bfloat16(),
        "decay": decays,
        "initial_state": randn(b, h, k, v),
    }


def discretized(t: int = 1024, channels: int = 256, keys: int = 16, *, lower_end: bool = False) -> Arguments:
    """Step sizes of which a tenth are 0 and a tenth so large that the decay is the range's lower end."""
    generator = torch.Generator("cuda").manual_seed(0)
    b, h = 2, 1

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    kind, dt = torch.rand(b, t, h, channels, generator=generator, device="cuda"), randn(b, t, h, channels)
    dt = torch.where(kind < 0.1, 0.0, torch.where(kind > 0.9, 1e4, torch.nn.functional.softplus(dt - 3)))
    arguments = {
        "dt": dt.bfloat16(),
        "A": -torch.arange(1.0, keys + 1, device="cuda").view(1, keys, 1).repeat(h, 1, channels),
        "q": randn(b, t, h, keys).bfloat16(),
        "write": randn(b, t, h, keys).bfloat16(),
        "v": randn(b, t, h, channels).bfloat16(),
        "initial_state": randn(b, h, keys, channels),
    }
    return arguments | ({"lower_end": -torch.sigmoid(randn(h, channels))} if lower_end else {})


def low_rank(t: int = 2048, k: int = 64, v: int = 64, *, special: bool = False) -> Arguments:
    """RWKV-7: w has length 1, and u is w times a number for each channel below the decay."""
    arguments = diagonal("channel", t, k, v, special=special)
    generator = torch.Generator("cuda").manual_seed(3)
    w = torch.nn.functional.normalize(torch.randn(1, t, 4, k, generator=generator, device="cuda"), dim=-1)
    gate = torch.rand(1, t, 4, k, generator=generator, device="cuda")
    return arguments | {"w": w.bfloat16(), "u": (w * gate).bfloat16()}


def low_rank_reflection(t: int = 2048, decay: float = 1.0) -> Arguments:
    """decay (I - 2 k k^T), one key for ever, which also is what values are written along."""
    arguments = low_rank(t)
    key = arguments["w"][:, :1].double()
    exact = (2 / key.square().sum(-1, keepdim=True)).float() * arguments["w"][:, :1].float()
    u = (decay * exact).expand(arguments["u"].shape).contiguous()
    w = arguments["w"][:, :1].expand(u.shape).contiguous()
    return arguments | {"w": w, "u": u, "write": u, "decay": torch.full_like(arguments["decay"], decay)}


@dataclass(frozen=True)
class Problem:
    """One case: what is computed, from what, and the largest error that passes."""

    op: str
    make: Callable[[], Arguments]
    normalize: bool = False
    eigenvalue_range: tuple[float, float] = (-1, 1)
    limit: float = 5e-3

    def transition(self, x: Arguments) -> Transition:
        if self.op == "householder":
            return Householder(x["k"], x["beta"], x.get("decay"), self.normalize)
        if self.op == "discretized":
            return Discretized(x["dt"], x["A"], EigenvalueRange.of(self.eigenvalue_range), x.get("lower_end"))
        if self.op == "low_rank":
            return LowRank(x["decay"], x["u"], x["w"])
        return Diagonal(x["decay"])


def _channels(arguments: Arguments) -> Arguments:
    """The same with a decay for each channel."""
    return arguments | {"decay": diagonal("channel", arguments["q"].shape[1], arguments["q"].shape[3])["decay"]}


_householder = partial(Problem, "householder", limit=1e-2)
CASES: dict[str, Problem] = {
    "random keys, beta = sigmoid": _householder(lambda: random_keys(torch.sigmoid)),
    "random keys, beta = 2 sigmoid": _householder(lambda: random_keys(lambda x: 2 * x.sigmoid())),
    "random keys, beta = 2": _householder(lambda: random_keys(lambda x: torch.full_like(x, 2))),
    "one key, beta = 2": _householder(lambda: one_key(lambda x: torch.full_like(x, 2)), True),
    "one key, beta = 1.9": _householder(lambda: one_key(lambda x: torch.full_like(x, 1.9)), True),
    "one key, parity bits": _householder(lambda: one_key(bits), True),
    "decays 0, 1, -1": _householder(lambda: signed_decay(random_keys(lambda x: 2 * x.sigmoid())), True),
    "n = 2": _householder(lambda: random_keys(lambda x: 2 * x.sigmoid(), 1024, n=2), True),
    "n = 3, decays 0, 1, -1": _householder(
        lambda: signed_decay(random_keys(lambda x: 2 * x.sigmoid(), 511, n=3)), True
    ),
    "n = 16": _householder(lambda: random_keys(lambda x: 2 * x.sigmoid(), 128, n=16), True),
    "K 40, V 72": _householder(lambda: random_keys(lambda x: 2 * x.sigmoid(), 1000, k=40, v=72), True),
    "K 256, V 256": _householder(lambda: random_keys(lambda x: 2 * x.sigmoid(), 1000, k=256, v=256), True),
    "one key, beta = 2, 65,536 tokens": _householder(lambda: one_key(lambda x: torch.full_like(x, 2), 65_536), True),
    "one key, parity bits, 65,536 tokens": _householder(lambda: one_key(bits, 65_536), True),
    "a decay for each channel": _householder(lambda: _channels(random_keys(lambda x: 2 * x.sigmoid(), 1000)), True),
    "a decay for each channel, n = 2": _householder(
        lambda: _channels(random_keys(lambda x: 2 * x.sigmoid(), 500, n=2)), True
    ),
    "one decay a head": Problem("diagonal", lambda: diagonal("head")),
    "one decay a head, 0, 1, -1": Problem("diagonal", lambda: diagonal("head", special=True)),
    "one decay a head, K 40, V 72": Problem("diagonal", lambda: diagonal("head", 1000, 40, 72)),
    "one decay a head, K 256, V 256": Problem("diagonal", lambda: diagonal("head", 1000, 256, 256)),
    "one decay a channel": Problem("diagonal", lambda: diagonal("channel")),
    "one decay a channel, 0, 1, -1": Problem("diagonal", lambda: diagonal("channel", special=True)),
    "one decay a channel, K 40, V 72": Problem("diagonal", lambda: diagonal("channel", 1000, 40, 72)),
    "one decay a channel, K 256, V 256": Problem("diagonal", lambda: diagonal("channel", 1000, 256, 256)),
    "one decay a head, 65,536 tokens": Problem("diagonal", lambda: diagonal("head", 65_536, special=True)),
    "range [0, 1]": Problem("discretized", discretized, eigenvalue_range=(0, 1)),
    "range [-1, 1]": Problem("discretized", discretized),
    "a lower end for each channel": Problem("discretized", lambda: discretized(lower_end=True)),
    "odd sizes": Problem("discretized", lambda: discretized(999, 72, 5)),
    "RWKV-7": Problem("low_rank", low_rank),
    "RWKV-7, decays 0, 1, -1": Problem("low_rank", lambda: low_rank(500, special=True)),
    "RWKV-7, K 40, V 72": Problem("low_rank", lambda: low_rank(1000, 40, 72)),
    "RWKV-7, K 128, V 128": Problem("low_rank", lambda: low_rank(1000, 128, 128)),
    "a reflection for ever": Problem("low_rank", low_rank_reflection),
    "a reflection and -1 for ever": Problem("low_rank", lambda: low_rank_reflection(decay=-1.0)),
    "a reflection for ever, 65,536 tokens": Problem("low_rank", lambda: low_rank_reflection(65_536), limit=2e-2),
}
_LONG = 10_000
"""From so many tokens on outputs and states alone: a float64 loop with gradients would not fit."""


def run(problem: Problem, arguments: Arguments, backend: str, *, gradients: bool) -> dict[str, Tensor]:
    inputs = {name: x.detach().clone().requires_grad_(gradients) for name, x in arguments.items()}
    with torch.set_grad_enabled(gradients):
        o, state = linear_recurrence(
            problem.transition(inputs), inputs["q"], inputs["v"], write=inputs.get("write"),
            initial_state=inputs["initial_state"], backend=backend,
        )  # fmt: skip
    results = {"o": o, "final state": state}
    if gradients:
        generator = torch.Generator("cuda").manual_seed(2)
        weights = [torch.randn(x.shape, generator=generator, device="cuda").bfloat16().to(x.dtype) for x in (o, state)]
        computed = torch.autograd.grad([o, state], list(inputs.values()), weights)
        results |= {f"gradient of {name}": g for name, g in zip(inputs, computed, strict=True)}
    return {name: x.detach() for name, x in results.items()}


def peer(arguments: Arguments) -> dict[str, Tensor]:
    chunk_delta_rule = importlib.import_module("fla.ops.delta_rule").chunk_delta_rule
    k, v, beta = (arguments[name][:, :, 0] for name in ("k", "v", "beta"))
    with torch.no_grad():
        o, state = chunk_delta_rule(
            q=arguments["q"], k=k, v=v, beta=beta.bfloat16(), scale=1.0,
            initial_state=arguments["initial_state"], output_final_state=True,
        )  # fmt: skip
    return {"o": o, "final state": state}


def errors(actual: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    return {
        name: ((x.double() - exact[name]).norm() / exact[name].norm()).item()
        for name, x in actual.items()
        if exact[name].norm() > 0
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ops = sorted({problem.op for problem in CASES.values()})
    parser.add_argument("--ops", nargs="*", default=ops, choices=ops)
    parser.add_argument("--peer", action="store_true", help="also flash-linear-attention")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "ops" / "h100-accuracy.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device")
    rows: list[dict[str, Any]] = []
    failed = False
    for case, problem in CASES.items():
        if problem.op not in options.ops:
            continue
        arguments = problem.make()
        gradients = arguments["q"].shape[1] < _LONG
        exact = run(problem, {name: x.double() for name, x in arguments.items()}, "reference", gradients=gradients)
        ours = errors(run(problem, arguments, "triton", gradients=gradients), exact)
        single = {name: x.float() for name, x in arguments.items()}
        recurrence = errors(run(problem, single, "reference", gradients=gradients), exact)
        comparable = problem.op == "householder" and not problem.normalize and "decay" not in arguments
        theirs = errors(peer(arguments), exact) if options.peer and comparable else {}
        for tensor, error in ours.items():
            rows.append(
                {
                    "op": problem.op, "case": case, "tensor": tensor, "T": arguments["q"].shape[1],
                    "ours": error, "peer": theirs.get(tensor), "recurrence": recurrence.get(tensor),
                    "limit": problem.limit,
                }
            )  # fmt: skip
        # `not <=`, because NaN compares as false.
        wrong = [f"{name} {error:.1e}" for name, error in ours.items() if not error <= problem.limit]
        failed = failed or bool(wrong)
        worst = max((e for name, e in ours.items() if name.startswith("gradient")), default=float("nan"))
        line = f"{problem.op:11} {case:38} o {ours['o']:.1e} state {ours['final state']:.1e} worst gradient {worst:.1e}"
        print(line + (f"   ABOVE {problem.limit:g}: {', '.join(wrong)}" if wrong else ""), flush=True)
        write_results(
            options.output,
            {
                "what": "relative errors against the float64 step loop on the same bfloat16 inputs; peer is "
                "flash-linear-attention's chunk_delta_rule",
                "environment": environment(["triton", "fla-core"]),
                "device": torch.cuda.get_device_name(),
                "seed": 0,
                "rows": rows,
            },
        )
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
