"""Generation against the length of what was read: time of a token and memory of the state, beside a Transformer's.

`python -m benchmarks.generation` on a CPU; `--device cuda` on a GPU. Models have the same width, depth and MLP. Each
reads a context of the length, in pieces; then single tokens are decoded after it, models in turns, ours by
`statetrack.generation.Decoder`, as `statetrack generate` does. On a CPU the time is CPU time of one thread, on a GPU
wall time between synchronizations; medians. Memory is the bytes of what is carried from token to token. transformers'
Llama is used as it is, with its dynamic cache.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import ROOT, environment, write_results
from statetrack import AttentionConfig, DeltaNetConfig, LanguageModel, MambaConfig, ModelConfig
from statetrack.language_models.causal import CausalModel, RecurrentModel, TransformersModel
from statetrack.language_models.generation_costs import generation_costs


def models(d_model: int, num_layers: int, vocab_size: int, device: str, dtype: torch.dtype) -> dict[str, CausalModel]:
    heads = d_model // 64
    mixers = {
        "deltanet": DeltaNetConfig(num_heads=heads, eigenvalue_range=(-1, 1)),  # pyright: ignore[reportArgumentType]
        "mamba": MambaConfig(eigenvalue_range=(-1, 1)),  # pyright: ignore[reportArgumentType]
        "attention": AttentionConfig(num_heads=heads),
    }
    made: dict[str, CausalModel] = {}
    for name, mixer in mixers.items():
        config = ModelConfig(
            vocab_size=vocab_size, d_model=d_model, num_layers=num_layers, mlp_size=3 * d_model, mixer=mixer
        )
        made[name] = RecurrentModel(LanguageModel(config).to(device, dtype))
    from transformers import LlamaConfig, LlamaForCausalLM

    llama: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=d_model,
            intermediate_size=3 * d_model,
            num_hidden_layers=num_layers,
            num_attention_heads=heads,
        )
    )
    made["llama (transformers)"] = TransformersModel(llama.to(device, dtype))
    return made


def measure(made: dict[str, CausalModel], length: int, device: str, rounds: int) -> dict[str, dict[str, float]]:
    clock = time.process_time if device == "cpu" else time.perf_counter
    costs = generation_costs(list(made.values()), length, tokens=rounds, clock=clock)
    return {
        name: {
            "ms_per_token": round(1e3 * cost.seconds, 4),
            "tokens_per_second": round(cost.tokens_per_second, 1),
            "state_mb": round(cost.state_bytes / 1e6, 3),
        }
        for name, cost in zip(made, costs, strict=True)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--lengths", default="256,1024,4096,8192")
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "cpu" / "generation.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    made = models(options.d_model, options.layers, options.vocab, options.device, getattr(torch, options.dtype))
    rows: dict[str, dict[str, dict[str, float]]] = {name: {} for name in made}
    for length in map(int, options.lengths.split(",")):
        for name, row in measure(made, length, options.device, options.rounds).items():
            rows[name][str(length)] = row
            print(f"{name:22} {length:>7}  {row['ms_per_token']:8.3f} ms/token  {row['state_mb']:9.3f} MB", flush=True)
    write_results(
        options.out,
        {
            "what": "time of one decoded token after a context, and memory of what is carried; batch 1, medians",
            "settings": {key: value for key, value in vars(options).items() if key != "out"},
            "parameters": {name: model.num_parameters for name, model in made.items()},
            "accelerator": torch.cuda.get_device_name() if options.device != "cpu" else None,
            "environment": environment(["transformers"]),
            "results": rows,
        },
    )


if __name__ == "__main__":
    main()
