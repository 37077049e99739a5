"""One long sequence, whole on one GPU and split in time over all: the same logits, state and gradients, and how fast.

    torchrun --standalone --nproc_per_node 2 -m benchmarks.long_sequence --out results/scaling/long-sequence.json

Every process computes the whole sequence on its own GPU first, then its piece of it, and compares the two. Everything
is float32 but what the kernels round to TF32.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.common import environment, write_results
from statetrack import LanguageModel, ModelConfig, mixer_config
from statetrack.mixers.mixer import State
from statetrack.pretraining.processes import Processes, processes
from statetrack.split_in_time import local_piece, split_in_time, sum_gradients

_VOCABULARY = 256


def measure(own: Processes, *, tokens: int, width: int, layers: int, rounds: int) -> dict[str, Any]:
    """The differences between the split sequence and the whole one, and the tokens a second of both."""
    torch.manual_seed(0)
    mixer = mixer_config("deltanet")(num_heads=max(1, width // 64))  # pyright: ignore[reportCallIssue]
    config = ModelConfig(vocab_size=_VOCABULARY, d_model=width, num_layers=layers, mlp_ratio=2, mixer=mixer)
    model = LanguageModel(config).to(own.device)
    ids = torch.randint(_VOCABULARY, (1, tokens)).to(own.device)
    labels = ids.roll(-1, 1)

    def train(ids: Tensor, labels: Tensor) -> tuple[Tensor, list[State]]:
        model.zero_grad()
        logits, state = model.scan(ids)
        # Divided by the tokens of the whole sequence: the sum over the pieces is its mean.
        (cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / tokens).backward()
        return logits.detach(), [{name: x.detach() for name, x in layer.items()} for layer in state]

    def split() -> tuple[Tensor, list[State]]:
        with split_in_time(model):
            result = train(local_piece(ids), local_piece(labels))
        sum_gradients(model)
        return result

    whole_logits, whole_state = train(ids, labels)
    expected = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    piece_of_whole = local_piece(whole_logits).clone()
    del whole_logits
    logits, state = split()
    pairs = list(zip(model.parameters(), expected, strict=True))
    found = [p.grad if p.grad is not None else torch.zeros_like(p) for p, _ in pairs]
    wanted = [torch.zeros_like(p) if gradient is None else gradient for p, gradient in pairs]
    errors = {
        "logits": _error([logits], [piece_of_whole]),
        "gradients": _error(found, wanted),
        "worst_gradient": max(_error([a], [b]) for a, b in zip(found, wanted, strict=True)),
    }
    is_last = own.rank == own.size - 1
    errors["state"] = _error(_tensors(state), _tensors(whole_state)) if is_last else 0.0
    del logits, state, whole_state, piece_of_whole
    whole_seconds = _seconds(own, lambda: train(ids, labels), rounds)
    split_seconds = _seconds(own, split, rounds)
    everywhere = {name: _largest(own, value) for name, value in errors.items()}
    return {
        "tokens": tokens,
        "processes": own.size,
        "width": width,
        "layers": layers,
        "errors": everywhere,
        "seconds_whole": whole_seconds,
        "seconds_split": split_seconds,
        "tokens_per_second_whole": tokens / min(whole_seconds),
        "tokens_per_second_split": tokens / min(split_seconds),
        "speedup": min(whole_seconds) / min(split_seconds),
    }


def _tensors(states: Iterable[State]) -> list[Tensor]:
    return [tensor for state in states for tensor in state.values()]


def _error(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The norm of the difference over the norm of what is wanted."""
    difference = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(found, wanted, strict=True))
    size = sum(float(b.double().square().sum()) for b in wanted)
    return (difference / max(size, 1e-30)) ** 0.5


def _largest(own: Processes, value: float) -> float:
    tensor = torch.tensor(value, dtype=torch.float64, device=own.device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor)


def _seconds(own: Processes, action: Callable[[], object], rounds: int) -> list[float]:
    """Wall time of each round, of the slowest process."""
    times = []
    for _ in range(rounds):
        _largest(own, 0.0)  # all begin together
        began = time.perf_counter()
        action()
        if own.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(_largest(own, time.perf_counter() - began))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2**20)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, default=Path("results/scaling/long-sequence.json"))
    options = parser.parse_args()
    with processes(options.device) as own:
        result = measure(own, tokens=options.tokens, width=options.width, layers=options.layers, rounds=options.rounds)
        if own.is_first:
            write_results(options.out, {"environment": environment(["triton"]), "result": result})


if __name__ == "__main__":
    main()
