"""Every operation on one CPU thread beside others' pure PyTorch of the same; to results/cpu/ops.json.

    python -m benchmarks.cpu_ops [--only NAME] [--out results/cpu/ops.json]

All rows are float32. At two training shapes a call is a forward and a backward with the gradients of all inputs, at the
decode shape one token that moves a state, without gradients. Inputs are the same for all, gates as logarithms where the
peers want them so, and what is timed is checked to compute the same. Times are CPU times of one thread, in turns. The
peers are flash-linear-attention's pure-torch functions, loaded from their files alone as the rest of that package needs
a GPU compiler; `transformers`' torch paths; and mambapy. Rows named "layer" are whole mixers, projections included.

Then, for ours alone: the peak memory of a forward and backward against T with its slope, and the time for each token
from T = 1,024 to 65,536.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.common import ROOT, environment, fla, interleaved_cpu_times, peak_memory_mb, write_results
from statetrack import Mamba, Mamba2
from statetrack.ops import linear_recurrence
from statetrack.transition import Diagonal, Discretized, Householder, LowRank

Inputs = dict[str, Tensor]
Function = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Shape:
    b: int
    t: int
    h: int
    k: int
    rounds: int

    def __str__(self) -> str:
        return f"B{self.b} T{self.t} H{self.h} K{self.k}"


TRAINING = (Shape(8, 2048, 4, 64, rounds=3), Shape(32, 256, 4, 32, rounds=7))
DECODE = Shape(8, 1, 4, 64, rounds=300)
MEMORY_LENGTHS = (1024, 2048, 4096, 8192)
TIME_LENGTHS = (1024, 4096, 16384, 65536)


@dataclass(frozen=True)
class Operation:
    """One operation, by ours and by peers, as functions of named inputs.

    Attributes:
        name: of its rows.
        inputs: makes the inputs.
        ours: the output.
        peers: the same by others.
        decode: the same for a single token that moves a state; empty for no such row.
    """

    name: str
    inputs: Callable[[Shape], Inputs]
    ours: Function
    peers: dict[str, Function]
    decode: dict[str, Function]


def make_inputs(shape: Shape, *, gate: str = "none", low_rank: bool = False, beta: bool = False) -> Inputs:
    """q, k of length 1, v [B, T, H, K], what is asked for, and for one token the state [B, H, K, K]."""
    generator = torch.Generator().manual_seed(0)
    sizes = shape.b, shape.t, shape.h, shape.k

    def unit() -> Tensor:
        return nn.functional.normalize(torch.randn(sizes, generator=generator), dim=-1)

    made = {"q": unit(), "k": unit(), "v": torch.randn(sizes, generator=generator)}
    if beta:
        made["beta"] = torch.rand(sizes[:3], generator=generator)
    if gate != "none":
        made["g"] = -0.1 * torch.rand(sizes if gate == "channel" else sizes[:3], generator=generator)
    if low_rank:
        made["w"] = unit()
        made["u"] = made["w"] * torch.rand(*sizes[:3], 1, generator=generator)
    if shape.t == 1:
        made["state"] = torch.randn(shape.b, shape.h, shape.k, shape.k, generator=generator)
    return made


def scan_inputs(shape: Shape) -> Inputs:
    """Mamba's: as many channels as the other operations have numbers a token, with 16 states each."""
    generator = torch.Generator().manual_seed(0)
    b, t, d, n = shape.b, shape.t, shape.h * shape.k, 16
    made = {
        "dt": torch.rand(b, t, d, generator=generator) * 0.1,
        "x": torch.randn(b, t, d, generator=generator),
        "A": -torch.arange(1.0, n + 1).repeat(d, 1),
        "B": torch.randn(b, t, n, generator=generator),
        "C": torch.randn(b, t, n, generator=generator),
    }
    if t == 1:
        made["state"] = torch.randn(b, 1, n, d, generator=generator)
        made["A transposed"] = made["A"].T.contiguous()  # a fixed parameter where nothing is trained: as each wants it
    return made


def layer_inputs(shape: Shape) -> Inputs:
    return {"x": torch.randn(shape.b, shape.t, shape.h * shape.k, generator=torch.Generator().manual_seed(0))}


# Ours. The peers scale queries by 1 / sqrt(K) themselves.


def _scaled(q: Tensor) -> Tensor:
    return q * q.shape[-1] ** -0.5


def householder(i: Inputs) -> Tensor:
    decay = i["g"].exp() if "g" in i else None
    transition = Householder(i["k"].unsqueeze(2), i["beta"].unsqueeze(2), decay)
    return linear_recurrence(transition, _scaled(i["q"]), i["v"].unsqueeze(2), initial_state=i.get("state"))[0]


def diagonal(i: Inputs) -> Tensor:
    transition = Diagonal(i["g"].exp())
    return linear_recurrence(transition, _scaled(i["q"]), i["v"], write=i["k"], initial_state=i.get("state"))[0]


def low_rank(i: Inputs) -> Tensor:
    transition = LowRank(i["g"].exp(), i["u"], i["w"])
    return linear_recurrence(transition, _scaled(i["q"]), i["v"], write=i["k"], initial_state=i.get("state"))[0]


def selective_scan(range_: tuple[float, float], i: Inputs) -> Tensor:
    a = i["A transposed"] if "A transposed" in i else i["A"].T
    transition = Discretized(i["dt"].unsqueeze(2), a.unsqueeze(0), range_)  # pyright: ignore[reportArgumentType]
    q, write, v = i["C"].unsqueeze(2), i["B"].unsqueeze(2), (i["dt"] * i["x"]).unsqueeze(2)
    return linear_recurrence(transition, q, v, write=write, initial_state=i.get("state"))[0].squeeze(2)


# Theirs.


def _transposed(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


def fla_delta_rule(name: str, i: Inputs, **options: Any) -> Tensor:
    function = getattr(fla("delta_rule/naive"), name)
    inputs = _transposed(i["q"], i["k"], i["v"], i["beta"])
    return function(*inputs, **_initial(i), **options)[0].transpose(1, 2)


def _initial(i: Inputs) -> dict[str, Tensor]:
    return {"initial_state": i["state"]} if "state" in i else {}


def transformers_gated_delta_rule(name: str, i: Inputs) -> Tensor:
    function = getattr(importlib.import_module("transformers.models.qwen3_next.modeling_qwen3_next"), name)
    function = getattr(function, "__wrapped__", function)  # else a kernel would take its place where one is installed
    return function(i["q"], i["k"], i["v"], g=i["g"], beta=i["beta"], output_final_state=True, **_initial(i))[0]


def fla_kda(name: str, i: Inputs) -> Tensor:
    return getattr(fla("kda/naive"), name)(i["q"], i["k"], i["v"], i["g"], i["beta"], **_initial(i))[0]


def fla_simple_gla(name: str, i: Inputs) -> Tensor:
    options = {} if name == "naive_parallel_simple_gla" else _initial(i)
    return getattr(fla("simple_gla/naive"), name)(i["q"], i["k"], i["v"], i["g"], **options)[0]


def fla_gla(i: Inputs) -> Tensor:
    return fla("gla/naive").naive_recurrent_gla(i["q"], i["k"], i["v"], i["g"], **_initial(i))[0]


def fla_dplr(name: str, i: Inputs) -> Tensor:
    inputs = _transposed(i["q"], i["k"], i["v"], -i["w"], i["u"], i["g"])
    return getattr(fla("generalized_delta_rule/dplr/naive"), name)(*inputs, **_initial(i))[0].transpose(1, 2)


def mambapy(i: Inputs) -> Tensor:
    from mambapy.pscan import pscan  # pyright: ignore[reportMissingImports]

    decay = torch.exp(i["dt"].unsqueeze(-1) * i["A"])
    written = i["dt"].unsqueeze(-1) * i["B"].unsqueeze(2) * i["x"].unsqueeze(-1)
    return (pscan(decay, written) @ i["C"].unsqueeze(-1)).squeeze(3)


def mambapy_step(i: Inputs) -> Tensor:
    """One token, as mambapy's `MambaBlock.ssm_step` writes it."""
    dt, x = i["dt"][:, 0], i["x"][:, 0]
    decay = torch.exp(dt.unsqueeze(-1) * i["A"])
    state = decay * i["state"][:, 0].mT + dt.unsqueeze(-1) * i["B"] * x.unsqueeze(-1)
    return (state @ i["C"].mT).squeeze(2).unsqueeze(1)


@cache
def _layers(name: str, d_model: int) -> tuple[nn.Module, nn.Module]:
    """Our layer, native range, and `transformers`' with the same weights."""
    torch.manual_seed(0)
    if name == "mamba":
        from transformers.models.mamba.configuration_mamba import MambaConfig
        from transformers.models.mamba.modeling_mamba import MambaMixer

        theirs, ours = MambaMixer(MambaConfig(hidden_size=d_model), 0), Mamba(d_model, eigenvalue_range=(0, 1))
    else:
        from transformers.models.mamba2.configuration_mamba2 import Mamba2Config
        from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

        sizes: dict[str, Any] = {"num_heads": d_model // 32, "head_dim": 64, "state_size": 64, "n_groups": 1}
        theirs = Mamba2Mixer(Mamba2Config(hidden_size=d_model, **sizes), 0)
        ours = Mamba2(d_model, eigenvalue_range=(0, 1), **sizes)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def our_layer(name: str, i: Inputs) -> Tensor:
    return _layers(name, i["x"].shape[-1])[0](i["x"])


def their_layer(name: str, i: Inputs) -> Tensor:
    return _layers(name, i["x"].shape[-1])[1](i["x"])


FLA, HF = "flash-linear-attention", "transformers"
OPERATIONS = (
    Operation(
        "delta rule",
        partial(make_inputs, beta=True),
        householder,
        {f"{FLA} delta_rule_chunkwise": partial(fla_delta_rule, "delta_rule_chunkwise")},
        {f"{FLA} delta_rule_recurrence": partial(fla_delta_rule, "delta_rule_recurrence")},
    ),
    Operation(
        "gated delta rule, decay a head",
        partial(make_inputs, beta=True, gate="head"),
        householder,
        {f"{HF} torch_chunk_gated_delta_rule": partial(transformers_gated_delta_rule, "torch_chunk_gated_delta_rule")},
        {
            f"{HF} torch_recurrent_gated_delta_rule": partial(
                transformers_gated_delta_rule, "torch_recurrent_gated_delta_rule"
            )
        },
    ),
    Operation(
        "gated delta rule, decay a channel",
        partial(make_inputs, beta=True, gate="channel"),
        householder,
        {f"{FLA} naive_chunk_kda": partial(fla_kda, "naive_chunk_kda")},
        {f"{FLA} naive_recurrent_kda": partial(fla_kda, "naive_recurrent_kda")},
    ),
    Operation(
        "linear attention, decay a head",
        partial(make_inputs, gate="head"),
        diagonal,
        {
            f"{FLA} naive_chunk_simple_gla": partial(fla_simple_gla, "naive_chunk_simple_gla"),
            f"{FLA} naive_parallel_simple_gla": partial(fla_simple_gla, "naive_parallel_simple_gla"),
        },
        {f"{FLA} naive_recurrent_simple_gla": partial(fla_simple_gla, "naive_recurrent_simple_gla")},
    ),
    Operation(
        "linear attention, decay a channel",
        partial(make_inputs, gate="channel"),
        diagonal,
        {f"{FLA} naive_recurrent_gla": fla_gla},
        {f"{FLA} naive_recurrent_gla": fla_gla},
    ),
    Operation(
        "low rank",
        partial(make_inputs, gate="channel", low_rank=True),
        low_rank,
        {f"{FLA} dplr_chunkwise": partial(fla_dplr, "dplr_chunkwise")},
        {f"{FLA} dplr_recurrence": partial(fla_dplr, "dplr_recurrence")},
    ),
    Operation(
        "selective scan",
        scan_inputs,
        partial(selective_scan, (0, 1)),
        {"mambapy pscan": mambapy},
        {"mambapy step": mambapy_step},
    ),
)
LAYERS = (
    Operation(
        "mamba layer",
        layer_inputs,
        partial(our_layer, "mamba"),
        {f"{HF} MambaMixer": partial(their_layer, "mamba")},
        {},
    ),
    Operation(
        "mamba2 layer",
        layer_inputs,
        partial(our_layer, "mamba2"),
        {f"{HF} Mamba2Mixer": partial(their_layer, "mamba2")},
        {},
    ),
)
# `transformers`' torch path of Mamba takes memory and time quadratic in T.
LAYER_SHAPES = (Shape(2, 512, 4, 32, rounds=3), Shape(8, 128, 4, 32, rounds=5))


def training_call(function: Function, operation: Operation, shape: Shape) -> Callable[[], list[Tensor]]:
    """Forward and backward: the output and the gradients of all inputs."""
    inputs = {name: x.requires_grad_() for name, x in operation.inputs(shape).items()}
    gradient: list[Tensor] = []

    def call() -> list[Tensor]:
        o = function(inputs)
        if not gradient:
            gradient.append(torch.randn(o.shape, generator=torch.Generator().manual_seed(1)))
        return [o, *torch.autograd.grad(o, list(inputs.values()), gradient[0])]

    return call


def decode_call(function: Function, operation: Operation) -> Callable[[], list[Tensor]]:
    inputs = operation.inputs(DECODE)

    def call() -> list[Tensor]:
        with torch.no_grad():
            return [function(inputs)]

    return call


def measure(operation: Operation, calls: dict[str, Callable[[], list[Tensor]]], shape: Shape, what: str) -> list[Any]:
    """Times ours and its peers after checking that all compute the same."""
    expected = calls["statetrack"]()
    for name, call in calls.items():
        for actual, right in zip(call(), expected, strict=True):
            error = ((actual - right).norm() / right.norm()).item()
            if not error < 1e-3:
                raise AssertionError(f"{name} and statetrack differ by {error:.1e} for {operation.name} at {shape}")
    times = interleaved_cpu_times(calls, rounds=shape.rounds, warmup=0)  # the check has warmed them up
    ours = times.pop("statetrack")["median_ms"]
    fastest = min(times.values(), key=lambda measured: measured["median_ms"])
    rows = []
    for name, measured in times.items():
        row = {
            "op": operation.name,
            "shape": str(shape),
            "pass": what,
            "ours_ms": round(ours, 3),
            "peer": name,
            "peer_ms": round(measured["median_ms"], 3),
            "ratio": round(measured["median_ms"] / ours, 2),
            "fastest_peer": measured is fastest,
        }
        rows.append(row)
        print(f"{row['op']:34} {row['shape']:18} {what:8} {ours:>9.2f} ms {row['ratio']:>7.2f}x {name}", flush=True)
    return rows


def peak_call(name: str, length: int) -> Callable[[], list[Tensor]]:
    operation = next(o for o in OPERATIONS if o.name == name)
    return training_call(operation.ours, operation, Shape(1, length, 4, 64, rounds=1))


def memory_row(operation: Operation) -> dict[str, Any]:
    """Peak memory of a forward and backward, results included, by T, and the line through it."""
    peaks = [peak_memory_mb(peak_call, operation.name, length) for length in MEMORY_LENGTHS]
    lengths = torch.tensor([[length / 1024, 1.0] for length in MEMORY_LENGTHS], dtype=torch.float64)
    measured = torch.tensor(peaks, dtype=torch.float64).unsqueeze(1)
    slope, offset = torch.linalg.lstsq(lengths, measured).solution.flatten().tolist()
    worst = (
        ((lengths @ torch.tensor([[slope], [offset]], dtype=torch.float64) - measured).abs() / measured).max().item()
    )
    return {
        "op": operation.name,
        "shape": "B1 H4 K64",
        "peak_mb": {length: round(peak, 1) for length, peak in zip(MEMORY_LENGTHS, peaks, strict=True)},
        "mb_for_1024_tokens": round(slope, 2),
        "largest_deviation_from_the_line": round(worst, 3),
    }


def time_row(operation: Operation) -> dict[str, Any]:
    """Microseconds of a forward and backward for each token, by T."""
    result = {}
    for length in TIME_LENGTHS:
        call = training_call(operation.ours, operation, Shape(1, length, 4, 64, rounds=3))
        measured = interleaved_cpu_times({"ours": call}, rounds=3)["ours"]["median_ms"]
        result[length] = round(measured / length * 1e3, 3)
    return {"op": operation.name, "shape": "B1 H4 K64", "us_for_each_token": result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="measure the operations whose name contains this")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "cpu" / "ops.json")
    options = parser.parse_args()
    torch.set_num_threads(1)

    def chosen(operations: tuple[Operation, ...]) -> list[Operation]:
        return [o for o in operations if options.only is None or options.only in o.name]

    rows: list[Any] = []
    for operations, shapes in ((chosen(OPERATIONS), TRAINING), (chosen(LAYERS), LAYER_SHAPES)):
        for operation in operations:
            for shape in shapes:
                functions = {"statetrack": operation.ours, **operation.peers}
                calls = {name: training_call(function, operation, shape) for name, function in functions.items()}
                rows += measure(operation, calls, shape, "fwd+bwd")
            if operation.decode:
                functions = {"statetrack": operation.ours, **operation.decode}
                calls = {name: decode_call(function, operation) for name, function in functions.items()}
                rows += measure(operation, calls, DECODE, "decode")
    memory = [memory_row(operation) for operation in chosen(OPERATIONS)]
    by_length = [time_row(operation) for operation in chosen(OPERATIONS)]
    write_results(
        options.out,
        {
            "what": "CPU time of one thread, float32, medians of interleaved rounds; ratio = peer_ms / ours_ms",
            "environment": environment(["statetrack", "fla-core", "transformers", "mambapy"]),
            "seed": 0,
            "rows": rows,
            "memory": memory,
            "time_by_length": by_length,
        },
    )
    table = Table("operation", "MB for 1,024 tokens", *(f"us/token, T = {length:,}" for length in TIME_LENGTHS))
    for m, t in zip(memory, by_length, strict=True):
        table.add_row(m["op"], str(m["mb_for_1024_tokens"]), *(str(us) for us in t["us_for_each_token"].values()))
    Console().print(table)


if __name__ == "__main__":
    main()
