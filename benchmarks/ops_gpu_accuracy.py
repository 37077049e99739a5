"""How far the Triton kernels are from the float64 step loop on this GPU; to results/ops/h100-accuracy.json.

Inputs are bfloat16, beta float32, and keys of length 1 as rounded; all is compared with the float64 step loop on the
same, already rounded inputs: the output, the final state and every gradient, by |actual - exact| / |exact| in the
Euclidean norm. `recurrence` is the same error of the step loop in float32, what no reordering can be blamed for.
`--peer` adds flash-linear-attention's chunk_delta_rule (outputs only; its autotuning takes a while) where it computes
the same function, that is without `normalize` and decay.
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
from statetrack.ops import linear_recurrence
from statetrack.transition import Householder

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


CASES: dict[str, Callable[[], tuple[Arguments, bool]]] = {
    "random keys, beta = sigmoid": lambda: (random_keys(torch.sigmoid), False),
    "random keys, beta = 2 sigmoid": lambda: (random_keys(lambda x: 2 * x.sigmoid()), False),
    "random keys, beta = 2": lambda: (random_keys(lambda x: torch.full_like(x, 2)), False),
    "one key, beta = 2": lambda: (one_key(lambda x: torch.full_like(x, 2)), True),
    "one key, beta = 1.9": lambda: (one_key(lambda x: torch.full_like(x, 1.9)), True),
    "one key, parity bits": lambda: (one_key(bits), True),
    "decays 0, 1, -1": lambda: (signed_decay(random_keys(lambda x: 2 * x.sigmoid())), True),
    "n = 2": lambda: (random_keys(lambda x: 2 * x.sigmoid(), 1024, n=2), True),
    "n = 3, decays 0, 1, -1": lambda: (signed_decay(random_keys(lambda x: 2 * x.sigmoid(), 511, n=3)), True),
    "n = 16": lambda: (random_keys(lambda x: 2 * x.sigmoid(), 128, n=16), True),
    "K 40, V 72": lambda: (random_keys(lambda x: 2 * x.sigmoid(), 1000, k=40, v=72), True),
    "K 256, V 256": lambda: (random_keys(lambda x: 2 * x.sigmoid(), 1000, k=256, v=256), True),
    "one key, beta = 2, 65,536 tokens": lambda: (one_key(lambda x: torch.full_like(x, 2), 65_536), True),
    "one key, parity bits, 65,536 tokens": lambda: (one_key(bits, 65_536), True),
}
_LONG = 10_000
"""From so many tokens on outputs and states alone: a float64 loop with gradients would not fit."""


def run(arguments: Arguments, normalize: bool, backend: str, *, gradients: bool) -> dict[str, Tensor]:
    inputs = {name: x.detach().clone().requires_grad_(gradients) for name, x in arguments.items()}
    with torch.set_grad_enabled(gradients):
        transition = Householder(inputs["k"], inputs["beta"], inputs.get("decay"), normalize)
        o, state = linear_recurrence(
            transition, inputs["q"], inputs["v"], initial_state=inputs["initial_state"], backend=backend
        )
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="store_true", help="also flash-linear-attention")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "ops" / "h100-accuracy.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device")
    rows: list[dict[str, Any]] = []
    for case, make in CASES.items():
        arguments, normalize = make()
        gradients = arguments["q"].shape[1] < _LONG
        exact = run({name: x.double() for name, x in arguments.items()}, normalize, "reference", gradients=gradients)
        ours = errors(run(arguments, normalize, "triton", gradients=gradients), exact)
        single = {name: x.float() for name, x in arguments.items()}
        recurrence = errors(run(single, normalize, "reference", gradients=gradients), exact)
        theirs = errors(peer(arguments), exact) if options.peer and not normalize else {}
        for tensor, error in ours.items():
            rows.append(
                {
                    "op": "householder", "case": case, "tensor": tensor, "T": arguments["q"].shape[1],
                    "ours": error, "peer": theirs.get(tensor), "recurrence": recurrence.get(tensor),
                }
            )  # fmt: skip
        worst = max((e for name, e in ours.items() if name.startswith("gradient")), default=float("nan"))
        print(f"{case:38} o {ours['o']:.1e} state {ours['final state']:.1e} worst gradient {worst:.1e}", flush=True)
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


if __name__ == "__main__":
    main()
