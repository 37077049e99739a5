"""Pre-training throughput on the machine at hand: tokens a second, MFU and peak memory of presets, on made-up tokens.

    python -m benchmarks.pretraining --presets deltanet-125m --micro-batch-size 16 --out results/scaling/one.json
    torchrun --standalone --nproc_per_node 8 -m benchmarks.pretraining --presets deltanet-125m --parallelism ddp fsdp

A step is that of `statetrack pretrain`: forward, backward, sum over processes, clipping, guard, optimizer. Scaling is
weak: every process has `--micro-batch-size` sequences a step, whatever their number; one size, or one for each preset.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import environment, write_results
from statetrack.data import PackedBatch
from statetrack.model import LanguageModel
from statetrack.pretraining.config import DataConfig, ExecutionConfig, PretrainConfig, PretrainingConfig
from statetrack.pretraining.flops import peak_flops, training_flops_per_token
from statetrack.pretraining.guard import StepGuard, guarded_step
from statetrack.pretraining.held_out import batch_loss
from statetrack.pretraining.optimizers import OptimizerConfig, build_optimizer
from statetrack.pretraining.parallel import ParallelModel
from statetrack.pretraining.presets import preset
from statetrack.pretraining.processes import Processes, processes


def measure(
    name: str, micro_batch_size: int, parallelism: Any, options: argparse.Namespace, own: Processes
) -> dict[str, Any]:
    """The times from the end of a training step to that of the next, those of the first `warmup` steps left out."""
    torch.manual_seed(0)
    config = PretrainConfig(
        model=preset(name, vocab_size=options.vocab_size),
        data=DataConfig(
            directory="",
            sequence_length=options.sequence_length,
            batch_size=micro_batch_size * own.size,
            separate_documents=False,
        ),
        training=PretrainingConfig(steps=options.steps, precision=options.precision),
        optimizer=OptimizerConfig(name=options.optimizer),
        execution=ExecutionConfig(
            parallelism=parallelism,
            activation_checkpointing=options.activation_checkpointing,
            compile=options.compile,
        ),
    )
    model = LanguageModel(config.model)
    num_parameters = model.num_parameters()
    parallel = ParallelModel(model, own, config.execution, options.precision)
    optimizer, guard = build_optimizer(model, config.optimizer), StepGuard(config.training, own.device)
    cuda = own.device.type == "cuda"
    draws = torch.Generator().manual_seed(own.rank)
    shape = (1, micro_batch_size * options.sequence_length)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    ends = [_now(own)]
    totals: list[torch.Tensor] = []
    for _ in range(options.warmup + options.steps):
        ids = torch.randint(config.model.vocab_size, shape, generator=draws)
        batch = PackedBatch(ids, ids.roll(-1, 1), torch.tensor([0, shape[1]]))
        with parallel.accumulating(last=True):
            loss = batch_loss(parallel, batch, config)
            loss.backward()
        total = own.mean(loss.detach())
        guarded_step(optimizer, guard.accepts(total, parallel.clip_gradients(1.0)))
        optimizer.zero_grad(set_to_none=True)
        # Nobody waits for a GPU between steps, as in training.
        ends.append(_now(own))
        totals.append(total)
    losses = [total.item() for total in totals]
    times = [one.elapsed_time(other) / 1000 if cuda else other - one for one, other in itertools.pairwise(ends)]
    seconds = statistics.median(times[options.warmup :])
    rate = shape[1] * own.size / seconds
    flops, peak = training_flops_per_token(config.model, options.sequence_length), peak_flops(own.device)
    return {
        "preset": name,
        "parameters": num_parameters,
        "processes": own.size,
        "micro_batch_size": micro_batch_size,
        "parallelism": parallel.parallelism,
        "seconds_per_step": seconds,
        "all_seconds": times,
        "tokens_per_second": rate,
        "flops_per_token": flops,
        "mfu": None if peak is None else flops * rate / (peak * own.size),
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9 if cuda else None,
        "losses": losses,
    }


def _now(own: Processes) -> Any:
    """Seconds, or on a GPU an event, which is over once what was asked for before it is."""
    if own.device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["deltanet-125m"])
    parser.add_argument("--micro-batch-size", type=int, nargs="+", default=[16], help="sequences of a process and step")
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--parallelism", nargs="+", choices=["auto", "none", "ddp", "fsdp"], default=["auto"])
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw")
    parser.add_argument("--activation-checkpointing", type=int, default=0)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--steps", type=int, default=20, help="timed, besides those of --warmup")
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, default=Path("results/scaling/pretraining.json"))
    options = parser.parse_args()
    sizes = options.micro_batch_size * (len(options.presets) if len(options.micro_batch_size) == 1 else 1)
    if len(sizes) != len(options.presets):
        parser.error(f"--micro-batch-size takes one number or one for each of the {len(options.presets)} presets")
    with processes(options.device) as own:
        results = []
        for name, size in zip(options.presets, sizes, strict=True):
            for parallelism in options.parallelism:
                results.append(measure(name, size, parallelism, options, own))
                if own.device.type == "cuda":
                    gc.collect()
                    torch.cuda.empty_cache()  # or the next one's peak would meet memory in pieces
        device = torch.cuda.get_device_name() if own.device.type == "cuda" else "cpu"
        if own.is_first:
            settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
            write_results(
                options.out,
                {"environment": environment(["triton"]) | {"device": device}, "options": settings, "results": results},
            )
            for result in results:
                mfu = "" if result["mfu"] is None else f", MFU {result['mfu']:.1%}, {result['peak_memory_gb']:.1f} GB"
                print(f"{result['preset']} on {own.size}: {result['tokens_per_second']:,.0f} tokens/s{mfu}")


if __name__ == "__main__":
    main()
