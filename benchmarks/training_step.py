"""One training step of small models, beside a plain PyTorch loop on a CPU and flash-linear-attention's on a GPU.

    python -m benchmarks.training_step                    # one CPU thread: results/cpu/training.json
    python -m benchmarks.training_step --device cuda      # results/training/<device>.json
    python -m benchmarks.training_step --device cuda --peer   # also flash-linear-attention; autotunes for two minutes
    python -m benchmarks.training_step --device cuda --in-turn   # the models of `statetrack reproduce formal-languages`

A step is all of it: drawing the batch, forward, backward, clipping, AdamW and its learning rate. Ours is the loop of
`statetrack train`. The plain loop has the same models (`benchmarks.plain_models`, same weights, and checked here to
give the same logits), data from a Python loop over sequences, AdamW and the scheduler as PyTorch makes them by default,
and reads the loss at every step.
"""

from __future__ import annotations

import argparse
import importlib
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import plain_models
from benchmarks.common import ROOT, environment, fla, interleaved_cpu_times, write_results
from benchmarks.plain_models import PlainDeltaNet, PlainModel
from statetrack import LanguageModel, mixer_config
from statetrack.config import RunConfig, TrainingConfig, run_config
from statetrack.experiments import load_experiment
from statetrack.precision import PrecisionOnTask
from statetrack.training_step import TrainingStep, make_optimizer

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

STEPS = 100_000
"""So many that learning rates stay in their rise, where no model breaks down."""


@dataclass(frozen=True)
class Case:
    """A model and its batches."""

    mixer: str
    d_model: int
    batch_size: int
    layers: int = 2
    length: int = 40

    @property
    def name(self) -> str:
        factors = " n=2" if self.mixer == "deltaproduct" else ""
        return f"{self.mixer}{factors}, {self.layers} layers, d={self.d_model}, B={self.batch_size}, T={self.length}"

    def config(self, shortest: int | None = None, precision: PrecisionOnTask = "float32") -> RunConfig:
        """Lengths from the shortest to the case's own; all of its own for None."""
        training = TrainingConfig(
            steps=STEPS,
            batch_size=self.batch_size,
            min_length=shortest or self.length,
            max_length=self.length,
            precision=precision,
        )
        sizes = {"d_model": self.d_model, "num_layers": self.layers}
        options = {} if self.mixer in ("slstm", "attention") else {"eigenvalue_range": (-1, 1)}
        return run_config("parity", mixer_config(self.mixer)(**options), sizes, training)


CPU_CASES = [
    Case(mixer, d_model, batch_size)
    for mixer in ("deltanet", "deltaproduct", "mamba", "mlstm")
    for d_model, batch_size in ((64, 64), (64, 256), (128, 64), (128, 256))
]
GPU_CASES = [Case(mixer, 128, 256) for mixer in ("deltanet", "deltaproduct", "mamba", "mlstm", "slstm", "attention")]


def our_steps(config: RunConfig, seeds: Sequence[int], *, fixed: bool, device: str) -> TrainingStep:
    configs = [replace(config, training=replace(config.training, seed=seed)) for seed in seeds]
    models = []
    for seed in seeds:
        torch.manual_seed(seed)
        models.append(LanguageModel(config.model).to(device).train())
    optimizers = [make_optimizer(model, config.training) for model in models]
    return TrainingStep(configs, models, optimizers, fixed=fixed)


def plain_loop(case: Case, model: nn.Module, device: str = "cpu", autocast: bool = False) -> Iterator[float]:
    """Yields the loss of one step after the other."""
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (0.1 * STEPS)))
    draw = random.Random(0)
    while True:
        rows, answers = [], []
        for _ in range(case.batch_size):
            bits = [draw.randint(0, 1) for _ in range(case.length)]
            parity, labels = 0, []
            for bit in bits:
                parity ^= bit
                labels.append(parity)
            rows.append(bits)
            answers.append(labels)
        ids, targets = torch.tensor(rows, device=device), torch.tensor(answers, device=device)
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            logits = model(ids)
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        yield loss.item()


def plain_model(config: RunConfig, rule: Rule | None = None) -> PlainModel:
    """The plain model with the weights of ours; checked to have the same logits."""
    torch.manual_seed(0)
    ours, plain = LanguageModel(config.model), PlainModel(config.model)
    plain.load_state_dict(ours.state_dict())
    for module in plain.modules():
        if rule is not None and isinstance(module, PlainDeltaNet):
            module.rule = rule
    ids = torch.randint(config.model.vocab_size, (4, config.training.max_length))
    with torch.no_grad():
        torch.testing.assert_close(plain(ids), ours(ids), rtol=1e-3, atol=1e-3)
    return plain


def chunkwise(length: int) -> Rule:
    """flash-linear-attention's delta rule in chunks, in pure PyTorch, with the longest chunks up to 20 that fit."""
    rule = fla("delta_rule/naive").delta_rule_chunkwise
    chunk = max(size for size in range(1, 21) if length % size == 0)
    return lambda q, k, v, beta: rule(q, k, v, beta, chunk)[0]


def cpu_row(case: Case, rounds: int) -> dict[str, Any]:
    """Medians of CPU time of one thread, in milliseconds a step."""
    config = case.config()
    step = our_steps(config, [0], fixed=False, device="cpu")
    count = iter(range(STEPS))
    loops = {name: plain_loop(case, plain_model(config)) for name in ("plain", "indexed")}
    if case.mixer == "deltanet":
        loops["chunkwise"] = plain_loop(case, plain_model(config, chunkwise(case.length)))

    def plain(name: str) -> float:
        plain_models.token_by_token = name == "indexed"
        return next(loops[name])

    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: step(next(count)),
        "plain loop": lambda: plain("plain"),
        "plain loop, indexed token by token": lambda: plain("indexed"),
    }
    if "chunkwise" in loops:
        calls["plain model, flash-linear-attention's delta_rule_chunkwise"] = lambda: plain("chunkwise")
    times = {name: value["median_ms"] for name, value in interleaved_cpu_times(calls, rounds=rounds).items()}
    ratios = {name: value / times["ours"] for name, value in times.items() if name != "ours"}
    return {"case": case.name, "median_ms": times, "times_as_fast_as": ratios}


Steps = Callable[[int], None]
"""Takes so many steps."""


def gpu_times(loops: dict[str, Steps], *, rounds: int, steps: int) -> dict[str, float]:
    """Medians of the wall-clock time of a step, in milliseconds: `steps` at once, and wait for the device."""
    times: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(rounds):
        for name, loop in loops.items():
            times[name].append(gpu_seconds(loop, steps) / steps * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def gpu_seconds(loop: Steps, steps: int) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    loop(steps)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def our_loop(step: TrainingStep) -> Steps:
    count = iter(range(STEPS))

    def loop(steps: int) -> None:
        with step.context():
            for _ in range(steps):
                step(next(count))

    return loop


def gpu_row(
    case: Case, seeds: Sequence[int], shortest: int, precisions: Sequence[PrecisionOnTask], *, peer: bool
) -> dict[str, Any]:
    """Ours eager, and captured in each precision, of one and several seeds at once, for lengths drawn from the shortest
    to the case's own."""
    loops: dict[str, Steps] = {}
    first = {}
    variants = [("ours, eager", seeds[:1], case.config(shortest), False)]
    for precision in precisions:
        captured = "ours, captured" if precision == "float32" else f"ours, captured, {precision}"
        config = case.config(shortest, precision)
        variants.append((captured, seeds[:1], config, True))
        variants += [(f"{captured}, {n} seeds", seeds[:n], config, True) for n in (3, len(seeds))]
    for name, chosen, config, fixed in variants:
        loops[name] = our_loop(our_steps(config, chosen, fixed=fixed, device="cuda"))
        # So many that every length has come three times and all graphs are there.
        first[name] = gpu_seconds(loops[name], 10 if not fixed else 10 if shortest == case.length else 400)
    if peer and case.mixer == "deltanet":
        theirs = plain_loop(case, FLAModel(case), "cuda", autocast=True)

        def peer_loop(steps: int) -> None:
            for _ in range(steps):
                next(theirs)

        loops["flash-linear-attention"] = peer_loop
        first["flash-linear-attention"] = gpu_seconds(loops["flash-linear-attention"], 5)
    times = gpu_times(loops, rounds=5, steps=40)
    by_seed = {name: value / _seeds(name) for name, value in times.items()}
    return {"case": case.name, "lengths": [shortest, case.length], "median_ms": times, "ms_a_seed": by_seed,
            "first_steps_seconds": first}  # fmt: skip


def formal_language_table() -> tuple[list[str], int]:
    """The released protocol's models, and the steps of a seed of each: of parity, and of arithmetic in two forms.

    A mixer that is there twice has either range, which costs the same.
    """
    runs = [run.config for run in load_experiment("formal-languages", [0]).runs if not run.recipe]
    mixers = [run.model.mixer_name for run in runs if run.task == "parity"]
    return mixers, sum(run.training.steps for run in runs) // len(mixers)


def in_turn_rows(
    mixers: Sequence[str], table_steps: int, shortest: int, seeds: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Steps of the table's models, several seeds together in bfloat16, alone and in turn as grids take them."""
    cases = {case.mixer: case for case in GPU_CASES}
    groups = [
        our_steps(cases[mixer].config(shortest, "bfloat16"), seeds, fixed=True, device="cuda") for mixer in mixers
    ]
    counts = [iter(range(STEPS)) for _ in groups]

    def in_turn(members: Sequence[int]) -> Steps:
        def loop(steps: int) -> None:
            for _ in range(steps):
                for index in members:
                    with groups[index].turn():
                        groups[index](next(counts[index]))

        return loop

    for index in range(len(groups)):
        in_turn([index])(400)  # so many that all graphs are there
    for most in (1, 2, 4):
        lots = [range(len(groups))[start : start + most] for start in range(0, len(groups), most)]
        times = gpu_times({str(members): in_turn(members) for members in lots}, rounds=5, steps=80)
        total = sum(times.values())
        yield {
            "in_turn": most,
            "lengths": [shortest, cases["deltanet"].length],
            "seeds": len(seeds),
            "median_ms": [{"of": [mixers[i] for i in members], "ms": times[str(members)]} for members in lots],
            "ms_a_seed": total / len(groups) / len(seeds),
            "table_minutes": total * table_steps * 3 / len(seeds) / 60_000,
        }


def profile(case: Case, seeds: Sequence[int], precision: PrecisionOnTask, device: str) -> str:
    """The operations of five steps that take the device longest, as a table."""
    loop = our_loop(our_steps(case.config(precision=precision), seeds, fixed=False, device=device))
    loop(5)
    with torch.profiler.profile() as profiler:
        loop(5)
    column = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=column, row_limit=30, max_name_column_width=60)


def _seeds(name: str) -> int:
    return int(name.split(", ")[-1].split()[0]) if name.endswith("seeds") else 1


class FLAModel(nn.Module):
    """DeltaNet from flash-linear-attention's parts, put together as its own layer does; bfloat16 by autocast."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.embedding = nn.Embedding(2, case.d_model)
        self.blocks = nn.ModuleList(FLADeltaNet(case.d_model) for _ in range(case.layers))
        self.norm, self.head = nn.RMSNorm(case.d_model), nn.Linear(case.d_model, 2, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x))


class FLADeltaNet(nn.Module):
    def __init__(self, d_model: int, heads: int = 4) -> None:
        super().__init__()
        modules = importlib.import_module("fla.modules")
        self.rule = importlib.import_module("fla.ops.delta_rule").chunk_delta_rule
        self.heads = heads
        self.norm = modules.RMSNorm(d_model)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(d_model, d_model, bias=False) for _ in range(3))
        self.b_proj, self.o_proj = nn.Linear(d_model, heads, bias=False), nn.Linear(d_model, d_model, bias=False)
        self.q_conv, self.k_conv, self.v_conv = (
            modules.ShortConvolution(d_model, 4, activation="silu") for _ in range(3)
        )
        self.o_norm = modules.RMSNorm(d_model // heads)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        projected = (
            conv(projection(x))[0].unflatten(-1, (self.heads, -1))
            for conv, projection in (
                (self.q_conv, self.q_proj),
                (self.k_conv, self.k_proj),
                (self.v_conv, self.v_proj),
            )
        )
        q, k, v = (y.to(torch.bfloat16) for y in projected)
        beta = 2 * self.b_proj(x).sigmoid()
        o = self.rule(q, k, v, beta.to(torch.bfloat16), use_qk_l2norm_in_kernel=True)[0]
        return self.o_proj(self.o_norm(o).flatten(2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=7, help="how often each loop is timed")
    parser.add_argument("--cases", default="", help="only cases with this in their name")
    parser.add_argument("--peer", action="store_true", help="on a GPU: also flash-linear-attention's DeltaNet")
    parser.add_argument(
        "--precisions", nargs="+", choices=get_args(PrecisionOnTask), default=get_args(PrecisionOnTask),
        help="on a GPU: of the captured steps; a profile is of the first one",
    )  # fmt: skip
    parser.add_argument("--profile", type=int, metavar="SEEDS", help="only say where the steps of so many seeds go")
    parser.add_argument("--in-turn", action="store_true", help="on a GPU: only what grids do, several models in turn")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    if options.in_turn and not on_gpu:
        parser.error("models take turns on a GPU alone; give --device cuda too")
    if not on_gpu:
        torch.set_num_threads(1)
    rows, console = [], Console()
    if options.in_turn:
        mixers, table_steps = formal_language_table()
        for row in in_turn_rows(mixers, table_steps, 3, range(3)):
            rows.append(row)
            shown = {name: round(row[name], 3) for name in ("ms_a_seed", "table_minutes")}
            console.print(f"{row['in_turn']} in turn", shown)
        what = (
            "wall-clock time of a step of each of some models in turn, 80 steps at once; ms_a_seed is the share of a "
            f"model and seed, table_minutes what {table_steps:,} steps, of parity, of all {len(mixers)} models with 3 "
            "seeds take"
        )
        _write(options.out or ROOT / "results/training/gpu-in-turn.json", what, rows, on_gpu=True)
        return
    for case in GPU_CASES if on_gpu else CPU_CASES:
        if options.cases not in case.name:
            continue
        if options.profile:
            table = profile(case, range(options.profile), options.precisions[0], options.device)
            console.print(case.name, table, soft_wrap=True)
            continue
        made = (
            [gpu_row(case, range(8), shortest, options.precisions, peer=options.peer) for shortest in (case.length, 3)]
            if on_gpu
            else [cpu_row(case, options.rounds)]
        )
        rows += made
        for row in made:
            console.print(case.name, row.get("lengths", ""), {k: round(v, 2) for k, v in row["median_ms"].items()})
    if options.profile:
        return
    what = (
        "wall-clock time of a training step, 40 at once; ms_a_seed is its share for each of the seeds that it trains"
        if on_gpu
        else "CPU time of a training step of one thread, the loops taking turns"
    )
    out = options.out or ROOT / "results" / ("training/gpu.json" if on_gpu else "cpu/training.json")
    _write(out, what, rows, on_gpu=on_gpu)
    names = list(rows[0]["median_ms"]) if rows else []
    table = Table("case", *(f"{name}, ms" for name in names))
    for row in rows:
        table.add_row(row["case"], *(f"{row['median_ms'].get(name, float('nan')):.2f}" for name in names))
    console.print(table)


def _write(out: Path, what: str, rows: Sequence[dict[str, Any]], *, on_gpu: bool) -> None:
    device = torch.cuda.get_device_name() if on_gpu else "cpu"
    packages = ["statetrack", "fla-core", *(["triton"] if on_gpu else [])]
    write_results(out, {"what": what, "environment": environment(packages) | {"device": device}, "results": rows})


if __name__ == "__main__":
    main()
