"""Training steps on one GPU beside flash-linear-attention's models: the rows of `python -m benchmarks.ops training`.

The language models of 340M and 1.3B parameters of arXiv 2411.12537 (24 layers, heads of 128, SwiGLU of 8/3 the width,
a vocabulary of 32,000, sequences of 2,048 tokens) with eigenvalues in [-1, 1], as DeltaNet and as DeltaProduct with
n = 2: forward, backward and AdamW in bfloat16 autocast over float32 weights. The median step, the peak memory of all,
and tokens a second; the peer is its model of the same sizes with its own fused norms, MLPs and cross-entropy.
"""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from statetrack.mixers.deltanet import DeltaNetConfig, DeltaProductConfig
from statetrack.model import LanguageModel, ModelConfig

_MIB = 2**20
_VOCABULARY = 32_000
_LENGTH = 2048
_LAYERS = 24
_WARMUP, _STEPS = 3, 10


@dataclass(frozen=True)
class TrainingRow:
    name: str
    width: int
    mlp: int
    batch: int
    n: int = 1

    @property
    def heads(self) -> int:
        return self.width // 128


ROWS = [
    TrainingRow("train-340m", 1024, 2816, 8),
    TrainingRow("train-340m-product2", 1024, 2816, 8, n=2),
    TrainingRow("train-1.3b", 2048, 5632, 4),
    TrainingRow("train-1.3b-product2", 2048, 5632, 4, n=2),
]


def measure(row: TrainingRow, *, with_peer: bool) -> dict[str, Any]:
    """Time, memory and tokens a second of a training step, of our model and with the peer of its."""
    result: dict[str, Any] = {
        "row": row.name, "model": "DeltaNet" if row.n == 1 else f"DeltaProduct n={row.n}", "B": row.batch, "T": _LENGTH,
        "d_model": row.width, "layers": _LAYERS, "heads": row.heads, "n": row.n,
        "peer": "flash-linear-attention" if with_peer else None,
    }  # fmt: skip
    makers: dict[str, Callable[[TrainingRow], tuple[nn.Module, Loss]]] = {"ours": _ours}
    if with_peer:
        makers["peer"] = _peer
    for name, make in makers.items():
        torch.manual_seed(0)
        model, loss = make(row)
        result[f"{name}_parameters"] = sum(x.numel() for x in model.parameters())
        ms, mib = _time(model, loss, row.batch)
        result |= {f"{name}_ms": ms, f"{name}_mib": mib, f"{name}_tokens_per_s": row.batch * _LENGTH / ms * 1e3}
        del model, loss
        torch.cuda.empty_cache()
    if with_peer:
        result["ratio"] = result["peer_ms"] / result["ours_ms"]
    return result


Loss = Callable[[Tensor], Tensor]
"""ids [B, T + 1] -> the mean cross-entropy of the next token."""


def _ours(row: TrainingRow) -> tuple[nn.Module, Loss]:
    options: dict[str, Any] = {
        "num_heads": row.heads,
        "head_dim": 128,
        "eigenvalue_range": (-1, 1),
        "backend": "triton",
    }
    mixer = DeltaNetConfig(**options) if row.n == 1 else DeltaProductConfig(**options, num_householder=row.n)
    config = ModelConfig(
        vocab_size=_VOCABULARY,
        d_model=row.width,
        num_layers=_LAYERS,
        mlp_size=row.mlp,
        tie_embeddings=True,
        mixer=mixer,
    )
    model = LanguageModel(config).cuda()

    def loss(ids: Tensor) -> Tensor:
        return model(ids[:, :-1], labels=ids[:, 1:])

    return model, loss


def _peer(row: TrainingRow) -> tuple[nn.Module, Loss]:
    models = importlib.import_module("fla.models")
    options: dict[str, Any] = {
        "hidden_size": row.width, "num_heads": row.heads, "intermediate_size": row.mlp, "num_hidden_layers": _LAYERS,
        "vocab_size": _VOCABULARY, "tie_word_embeddings": True, "allow_neg_eigval": True, "use_cache": False,
        "fuse_cross_entropy": True,
    }  # fmt: skip
    if row.n == 1:
        config = models.DeltaNetConfig(**options)
    else:
        options |= {"head_dim": 128, "expand_v": 1.0, "num_householder": row.n}
        config = models.GatedDeltaProductConfig(**options, use_forget_gate=False, use_output_gate=False)
    model = importlib.import_module("transformers").AutoModelForCausalLM.from_config(config).cuda()

    def loss(ids: Tensor) -> Tensor:
        # Its labels are shifted inside.
        return model(input_ids=ids[:, :-1], labels=ids[:, :-1]).loss

    return model, loss


def _time(model: nn.Module, loss: Loss, batch: int) -> tuple[float, float]:
    """The median milliseconds of a step, and the peak MiB of weights, optimizer, activations and gradients."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.01, fused=True)
    ids = torch.randint(_VOCABULARY, (batch, _LENGTH + 1), device="cuda")
    times = []
    for step in range(_WARMUP + _STEPS):
        if step == _WARMUP:
            torch.cuda.reset_peak_memory_stats()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        with torch.autocast("cuda", torch.bfloat16):
            value = loss(ids)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        end.record()
        torch.cuda.synchronize()
        if step >= _WARMUP:
            times.append(begin.elapsed_time(end))
    return statistics.median(times), torch.cuda.max_memory_allocated() / _MIB


def line(row: dict[str, Any]) -> str:
    text = (
        f"{row['row']:22s} {row['ours_ms']:8.1f} ms {row['ours_mib']:7.0f} MiB {row['ours_tokens_per_s']:8.0f} tokens/s"
    )
    if row["peer"]:
        text += (
            f"   {row['peer']} {row['peer_ms']:8.1f} ms {row['peer_mib']:7.0f} MiB "
            f"{row['peer_tokens_per_s']:8.0f} tokens/s   {row['ratio']:.2f}x"
        )
    return text
