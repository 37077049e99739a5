"""How far the Triton kernels are from the float64 step loop on this GPU: the cases of `benchmarks.ops accuracy`.

Inputs are bfloat16, beta, decays and A float32, and keys of length 1 as rounded; all is compared with the float64 step
loop on the same, already rounded inputs: the output, the final state and every gradient, by |actual - exact| / |exact|
in the Euclidean norm. `recurrence` is the same error of the step loop that accumulates in float32 and, like the
kernels, returns results in the dtypes of the inputs: most of it is the rounding of results to bfloat16.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from statetrack.ops import Precision, linear_recurrence
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


def one_exact_key(beta: Callable[[Tensor], Tensor], t: int) -> Arguments:
    """One key of 64 entries 1/8 or -1/8, whose length is 1 in bfloat16 too: a reflection without `normalize`."""
    arguments = random_keys(beta, t)
    signs = arguments["k"][:, :1].sign()
    key = torch.where(torch.arange(signs.shape[-1], device=signs.device) < 64, signs / 8, 0.0)
    return arguments | {"k": key.expand_as(arguments["k"]).contiguous()}


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
    """One case: what is computed, from what, and the largest error that passes.

    With high precision errors may also be no more than 1.5 times those of the step loop in float32.
    """

    op: str
    make: Callable[[], Arguments]
    normalize: bool = False
    eigenvalue_range: tuple[float, float] = (-1, 1)
    limit: float = 5e-3
    precision: Precision = "default"

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
SWEEP = (512, 2048, 8192, 32_768)
"""Lengths of the figure of error against T."""
for _t in SWEEP:
    CASES[f"parity bits on an exact key, T = {_t}"] = _householder(partial(one_exact_key, bits, _t))
    CASES[f"random keys, beta = 2, T = {_t}"] = _householder(
        partial(random_keys, partial(torch.full_like, fill_value=2), _t)
    )
_HIGH = [
    *("random keys, beta = sigmoid", "random keys, beta = 2 sigmoid", "random keys, beta = 2"),
    *("one key, beta = 2", "one key, beta = 1.9", "one key, parity bits", "decays 0, 1, -1", "n = 2", "K 256, V 256"),
    *(
        "one key, parity bits, 65,536 tokens",
        "one decay a head",
        "one decay a channel",
        "RWKV-7",
        "a reflection for ever",
    ),
]
CASES |= {f"{name}, high precision": replace(CASES[name], precision="high") for name in _HIGH}
_LONG = 10_000
"""From so many tokens on outputs and states alone: a float64 loop with gradients would not fit."""


def run(
    problem: Problem, arguments: Arguments, backend: str, *, gradients: bool, precision: Precision = "default"
) -> dict[str, Tensor]:
    inputs = {name: x.detach().clone().requires_grad_(gradients) for name, x in arguments.items()}
    with torch.set_grad_enabled(gradients):
        o, state = linear_recurrence(
            problem.transition(inputs), inputs["q"], inputs["v"], write=inputs.get("write"),
            initial_state=inputs["initial_state"], backend=backend, precision=precision,
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


def has_peer(problem: Problem, arguments: Arguments) -> bool:
    """Whether flash-linear-attention's chunk_delta_rule computes the same function."""
    return problem.op == "householder" and not problem.normalize and "decay" not in arguments


def measure(case: str, *, with_peer: bool) -> list[dict[str, Any]]:
    """The rows of one case: for every tensor our error, the peer's where it computes the same, and the recurrence's."""
    problem = CASES[case]
    arguments = problem.make()
    gradients = arguments["q"].shape[1] < _LONG
    exact = run(problem, {name: x.double() for name, x in arguments.items()}, "reference", gradients=gradients)
    ours = errors(run(problem, arguments, "triton", gradients=gradients, precision=problem.precision), exact)
    recurrence = errors(run(problem, arguments, "reference", gradients=gradients), exact)
    theirs = errors(peer(arguments), exact) if with_peer and has_peer(problem, arguments) else {}
    return [
        {
            "op": problem.op, "case": case, "tensor": tensor, "T": arguments["q"].shape[1],
            "ours": error, "peer": theirs.get(tensor), "recurrence": recurrence.get(tensor),
            "limit": _limit(problem, tensor, recurrence),
        }
        for tensor, error in ours.items()
    ]  # fmt: skip


def _limit(problem: Problem, tensor: str, recurrence: dict[str, float]) -> float:
    if problem.precision == "default":
        return problem.limit
    # States and the gradients of gates are float32, in which the recurrence has next to no error; they may have that of
    # a rounded output.
    return min(problem.limit, 1.5 * max(recurrence[tensor], recurrence["o"]))


def passes(row: dict[str, Any]) -> bool:
    # `<=`, because NaN compares as false.
    return row["ours"] <= row["limit"]


def line(rows: list[dict[str, Any]]) -> str:
    """One case in a line."""
    ours = {row["tensor"]: row["ours"] for row in rows}
    worst = max((error for name, error in ours.items() if name.startswith("gradient")), default=float("nan"))
    text = f"{rows[0]['op']:11} {rows[0]['case']:48} o {ours['o']:.1e} state {ours['final state']:.1e}"
    text += f" worst gradient {worst:.1e}"
    if rows[0]["peer"] is not None:
        text += f"   peer: o {rows[0]['peer']:.1e}"
    wrong = [f"{row['tensor']} {row['ours']:.1e} > {row['limit']:.1e}" for row in rows if not passes(row)]
    return text + (f"   TOO LARGE: {', '.join(wrong)}" if wrong else "")
