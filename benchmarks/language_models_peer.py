"""The DeltaNet of flash-linear-attention, trained as `statetrack.pretraining.loop` trains ours: the same batches,
optimizer, schedule, clipping and precision, in a plain loop.

Its loss leaves out the last token of each sequence, since it shifts the labels itself.
"""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from statetrack import seeds
from statetrack.data import PackedBatches, PackedTokens
from statetrack.language_models.causal import TransformersModel
from statetrack.mixers.deltanet import DeltaNetConfig
from statetrack.pretraining.config import PretrainConfig
from statetrack.pretraining.flops import peak_flops, training_flops_per_token
from statetrack.pretraining.guard import StepGuard, guarded_step
from statetrack.pretraining.loop import PretrainProgress
from statetrack.pretraining.optimizers import build_optimizer, learning_rate_factor, set_learning_rate
from statetrack.pretraining.processes import Processes


def installed() -> bool:
    """Whether its models can run here: the package flash-linear-attention, beside fla-core, and a GPU."""
    if not torch.cuda.is_available() or importlib.util.find_spec("fla") is None:
        return False
    return importlib.util.find_spec("fla.models") is not None


def build(settings: PretrainConfig) -> Any:
    """Its model of the sizes of ours.

    Raises:
        ValueError: for a model that is no DeltaNet.
    """
    ours, mixer = settings.model, settings.model.mixer
    if not isinstance(mixer, DeltaNetConfig):
        raise ValueError(f"the peer is a DeltaNet, got {ours.mixer_name}")
    models = importlib.import_module("fla.models")
    return models.DeltaNetForCausalLM(
        models.DeltaNetConfig(
            hidden_size=ours.d_model,
            num_heads=mixer.num_heads,
            num_hidden_layers=ours.num_layers,
            intermediate_size=ours.mlp_hidden_size(),
            vocab_size=ours.vocab_size,
            norm_eps=ours.norm_eps,
            tie_word_embeddings=ours.tie_embeddings,
            allow_neg_eigval=mixer.eigenvalue_range.lo < 0,
            use_cache=False,
            fuse_cross_entropy=True,
        )
    )


def train(
    settings: PretrainConfig,
    own: Processes,
    *,
    on_progress: Callable[[PretrainProgress], None],
    should_stop: Callable[[], bool],
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """The model, and lines of metrics as `pretrain` writes them; MFU by the operations of our model of these sizes."""
    training, length = settings.training, settings.data.sequence_length
    torch.manual_seed(int(seeds.generator("initial weights", training.seed).initial_seed()))
    model: Any = build(settings).to(own.device)
    bf16 = training.precision == "bfloat16"
    if bf16:  # as ours: the sum over the blocks has the dtype of the embeddings
        embeddings: Any = model.get_input_embeddings()
        embeddings.register_forward_hook(lambda module, inputs, output: output.bfloat16())
    optimizer, guard = build_optimizer(model, settings.optimizer), StepGuard(training, own.device)
    batches = iter(
        PackedBatches(
            PackedTokens(settings.data.directory, "train"),
            sequence_length=length,
            batch_size=settings.data.batch_size,
            seed=training.seed,
            shares=settings.data.shares or None,
        ).loader(settings.execution.num_workers, pin_memory=own.device.type == "cuda")
    )
    flops, peak = training_flops_per_token(settings.model, length), peak_flops(own.device)
    metrics: list[dict[str, Any]] = []
    began = since = time.perf_counter()
    counted = 0
    for step in range(1, training.steps + 1):
        total = torch.zeros((), device=own.device)
        parts = next(batches).split(settings.micro_batches(1))
        for part in parts:
            ids = part.to(own.device, non_blocking=True).ids.view(-1, length)
            with torch.autocast(own.device.type, torch.bfloat16, enabled=bf16):
                loss = model(input_ids=ids, labels=ids).loss / len(parts)
            loss.backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(model.parameters(), training.gradient_clip or float("inf"))
        factor = learning_rate_factor(step - 1, training.steps, settings.schedule)
        set_learning_rate(optimizer, factor)
        guarded_step(optimizer, guard.accepts(total, norm))
        optimizer.zero_grad(set_to_none=True)
        stopping = should_stop()
        if step % settings.execution.log_every == 0 or step == training.steps or stopping:
            value, norm_value, skipped = total.item(), norm.item(), int(guard.state["skipped"].item())
            now = time.perf_counter()
            rate = (step - counted) * settings.tokens_per_step / (now - since)
            since, counted = now, step
            progress = PretrainProgress(
                step=step,
                steps=training.steps,
                tokens=step * settings.tokens_per_step,
                loss=value,
                gradient_norm=norm_value,
                learning_rate=settings.optimizer.learning_rate * factor,
                tokens_per_second=round(rate, 1),
                mfu=None if peak is None else round(flops * rate / peak, 4),
                memory_gb=round(torch.cuda.max_memory_allocated() / 1e9, 3) if own.device.type == "cuda" else None,
                skipped=skipped,
                seconds=round(now - began, 3),
            )
            metrics.append(asdict(progress))
            on_progress(progress)
        if stopping:
            break
    return model, metrics


class Windows(TransformersModel):
    """The model judged without its cache: what goes before a piece in its window is read again."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.tokens_at_once = 2**16  # larger pieces, so that less is read again

    def losses(self, ids: Tensor, labels: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        seen = ids if state is None else torch.cat([state, ids], 1)
        logits = self.model(input_ids=seen, use_cache=False, logits_to_keep=ids.shape[1]).logits
        losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
        return losses.view(labels.shape), seen

    def _check_carries(self) -> None:
        """Nothing is carried but the tokens."""
