"""One token of decoding beside its memory floor; to results/decode/h100.json.

A row is a model at a batch size: the time of a token as `statetrack.generation.Decoder` computes it (on a GPU a replay
of a CUDA graph; the state is overwritten) and as `LanguageModel.step` does (a new state, no graph), the relative error
of the first logits between the two, and the floor: the bytes of all weights that a token reads and twice those of the
state, at the device's own copy bandwidth. Random weights: no number depends on them.

    python -m benchmarks.decode --backend triton            # on a GPU: 1.3B parameters in bfloat16, 1 and 64 rows
    python -m benchmarks.decode --size tiny --batches 1 4   # anywhere
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import ROOT, environment, write_results
from statetrack import LanguageModel, ModelConfig, mixer_config
from statetrack.generation import Decoder
from statetrack.model import ModelState

# Options of the model and of its mixer. The large ones have the shapes of the published models of 1.3B parameters.
SIZES: dict[str, dict[str, Any]] = {
    "1.3b": {"vocab_size": 32_000, "d_model": 2048, "num_layers": 24, "mlp_size": 5632},
    "tiny": {"vocab_size": 256, "d_model": 64, "num_layers": 2, "mlp_size": 128},
}
MODELS: dict[str, dict[str, Any]] = {
    "deltanet": {"head_dim": 128},
    "gated_deltanet": {"head_dim": 128},
    "deltaproduct": {"head_dim": 128},
    "kda": {"head_dim": 128},
    "gla": {"num_heads": 4},
    "mamba2": {"num_heads": 64, "state_size": 128},
    "rwkv7": {"head_dim": 64},
    "mamba": {},
}


def build(name: str, size: str, backend: str, device: torch.device, dtype: torch.dtype) -> LanguageModel:
    options = dict(MODELS[name])
    shape = dict(SIZES[size])
    if size == "tiny":
        options = {option: min(value, 16) for option, value in options.items()}
    if "head_dim" in options:
        options["num_heads"] = shape["d_model"] // options["head_dim"]
    if name == "mamba":  # twice the layers, and no MLPs
        shape["num_layers"] *= 2
        del shape["mlp_size"]
    config = mixer_config(name)
    if "backend" in {field.name for field in fields(config)}:
        options["backend"] = backend
    with torch.device(device):
        model = LanguageModel(ModelConfig(mixer=config(**options), **shape))
    return model.to(dtype).eval()


def floor_bytes(model: LanguageModel, state: ModelState, batch: int) -> int:
    """Bytes that a token of `batch` rows reads and writes at least: of the embedding only the rows of its ids."""
    embedding = model.embedding.weight
    weights = sum(x.nbytes for x in model.parameters() if x is not embedding or model.head is None)
    states = sum(x.nbytes for layer in state for x in layer.values())
    return weights + batch * embedding.shape[1] * embedding.element_size() + 2 * states


def milliseconds(call: Callable[[], object], device: torch.device, *, calls: int, rounds: int) -> float:
    """The median over the rounds of the mean time of a call: the device's time on a GPU, else CPU time."""
    times = []
    for _ in range(rounds + 1):  # the first warms up
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(calls):
                call()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / calls)
        else:
            begin = time.process_time()
            for _ in range(calls):
                call()
            times.append((time.process_time() - begin) * 1e3 / calls)
    return statistics.median(times[1:])


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written in a second by a large copy."""
    source = torch.zeros(2**31 if device.type == "cuda" else 2**28, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / (milliseconds(lambda: target.copy_(source), device, calls=3, rounds=5) * 1e-3)


@torch.no_grad()
def measure(
    model: LanguageModel, name: str, batch: int, bandwidth: float, *, calls: int, rounds: int
) -> dict[str, Any]:
    device = model.output_weight.device
    ids = torch.randint(model.config.vocab_size, (3, batch), device=device)
    state = model.init_state(batch)
    for token in ids[:2]:
        state = model.step(token, state)[1]
    decoder = Decoder(model, state)
    expected, state = model.step(ids[2], state)
    error = _relative_error(decoder(ids[2]), expected)
    needed = floor_bytes(model, state, batch)
    floor = needed / bandwidth * 1e3
    decode = milliseconds(lambda: decoder(ids[0]), device, calls=calls, rounds=rounds)
    # Each call goes on from the same state, which keeps what it makes from piling up.
    functional = milliseconds(lambda: model.step(ids[0], state), device, calls=calls, rounds=rounds)
    return {
        "model": name, "parameters": model.num_parameters(), "batch": batch, "dtype": str(model.output_weight.dtype),
        "state_bytes": sum(x.nbytes for layer in state for x in layer.values()), "floor_bytes": needed,
        "floor_ms": floor, "decoder_ms": decode, "decoder_over_floor": decode / floor, "step_ms": functional,
        "tokens_per_second": batch / decode * 1e3, "graph": decoder._graph is not None, "error": error,
    }  # fmt: skip


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    expected = expected.double()
    return float((actual.double() - expected).norm() / expected.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--size", default="1.3b", choices=list(SIZES))
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 64])
    parser.add_argument("--backend", default="auto", help="of the recurrence; `triton` takes its kernels for one token")
    parser.add_argument("--calls", type=int, default=50, help="tokens of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "decode" / "h100.json")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    bandwidth = copy_bandwidth(device)
    results: dict[str, Any] = {
        "environment": environment(["triton"]),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "backend": arguments.backend,
        "copy_bytes_per_second": bandwidth,
        "rows": [],
    }
    for name in arguments.models:
        model = build(name, arguments.size, arguments.backend, device, dtype)
        for batch in arguments.batches:
            row = measure(model, name, batch, bandwidth, calls=arguments.calls, rounds=arguments.rounds)
            results["rows"].append(row)
            print(
                f"{name:15s} {row['parameters'] / 1e9:6.3f}B batch {batch:3d} decoder {row['decoder_ms']:8.3f} ms "
                f"({row['decoder_over_floor']:5.2f} x floor {row['floor_ms']:.3f} ms) step {row['step_ms']:8.3f} ms "
                f"error {row['error']:.1e}",
                flush=True,
            )
            write_results(arguments.output, results)


if __name__ == "__main__":
    main()
