"""How long the first training steps of a small model take on this GPU where no kernel has been compiled yet.

For every mixer a process of its own with an empty folder for compiled kernels: import, model, and then one training
step of 2 layers (d = 128, batch 256, 40 tokens, bfloat16 autocast), a second step, and a step of 255 tokens, which must
compile nothing anew. With --peer also flash-linear-attention's DeltaNet.

    python -m benchmarks.cold_start                    # all mixers; to results/ops/h100-cold-start.json
    python -m benchmarks.cold_start --mixers deltanet

The exit status is 1 if a first step takes longer than 10 seconds.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import ROOT, environment, write_results

MIXERS = (
    *("deltanet", "gated_deltanet", "deltaproduct", "kda"),
    *("gla", "retnet", "mamba", "mamba2", "mlstm", "rwkv6", "rwkv7"),
)
PEER = "flash-linear-attention: deltanet"
LIMIT = 10.0
"""Seconds of a first step."""
_STEPS = ((256, 40), (256, 40), (256, 255), (128, 255))


def measure(name: str) -> dict[str, Any]:
    """Seconds of every step of `_STEPS`, in this process."""
    torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    begin = time.perf_counter()
    model = _peer() if name == PEER else _ours(name)
    optimizer = torch.optim.AdamW(model.parameters())
    seconds = [time.perf_counter() - begin]
    for shape in _STEPS:
        ids = torch.randint(2, shape, device="cuda")
        begin = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(ids)
        nn.functional.cross_entropy(logits.float().flatten(0, 1), ids.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return {
        "mixer": name, "model_s": seconds[0], "first_step_s": seconds[1], "second_step_s": seconds[2],
        "longer_step_s": seconds[3], "smaller_batch_step_s": seconds[4],
        "kernels": len(list(Path(os.environ["TRITON_CACHE_DIR"]).glob("*/*.cubin"))),
    }  # fmt: skip


def _ours(name: str) -> nn.Module:
    from_data = importlib.import_module("statetrack.config").from_data
    models = importlib.import_module("statetrack.model")
    mixer = {"name": name, "backend": "triton"}
    config = from_data(models.ModelConfig, {"vocab_size": 4, "d_model": 128, "num_layers": 2, "mixer": mixer})
    return models.LanguageModel(config).cuda()


def _peer() -> nn.Module:
    config = importlib.import_module("fla.models").DeltaNetConfig(
        hidden_size=128, num_heads=4, num_hidden_layers=2, vocab_size=4, allow_neg_eigval=True, use_cache=False
    )
    model = importlib.import_module("transformers").AutoModelForCausalLM.from_config(config).cuda()

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor) -> Tensor:
            return self.model(ids).logits

    return Logits()


def in_a_process(name: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.cold_start", "--here", name],
            cwd=ROOT,
            env=os.environ | {"TRITON_CACHE_DIR": folder},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        return {"mixer": name, "error": done.stderr.strip().splitlines()[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", nargs="*", default=list(MIXERS))
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "ops" / "h100-cold-start.json")
    parser.add_argument("--here", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measure(options.here)))
        return 0
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device")
    rows = []
    for name in [*options.mixers, *([PEER] if options.peer else [])]:
        rows.append(in_a_process(name))
        print(json.dumps(rows[-1]), flush=True)
        results = {
            "what": "seconds of the first training steps with no compiled kernels: 2 layers, d 128, batch 256",
            "environment": environment(["triton", "fla-core"]), "device": torch.cuda.get_device_name(), "rows": rows,
        }  # fmt: skip
        write_results(options.output, results)
    ours = [row for row in rows if row["mixer"] != PEER]
    return int(not all(row.get("first_step_s", LIMIT + 1) <= LIMIT for row in ours))


if __name__ == "__main__":
    raise SystemExit(main())
