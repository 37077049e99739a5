"""What a token costs when text is generated: time and memory against the length of what was read before.

A recurrent model carries a state of one size, so that both stay as they are at any length; a Transformer carries the
keys and values of all tokens, and reads them for every new one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from statetrack.language_models.causal import CausalModel, RecurrentModel, TransformersModel

_PIECE = 512
"""Tokens of the context that are read at once, which bounds the memory of activations."""

_WARMUP = 3
"""Tokens before those that count."""

_HEAD_DIM = 64
"""Channels of a head of the Transformer beside."""


@dataclass(frozen=True)
class GenerationCost:
    """What one generated token costs.

    Attributes:
        length: tokens that were read before.
        seconds: of a token, the median.
        state_bytes: what is carried from token to token, with the weights not counted.
    """

    length: int
    seconds: float
    state_bytes: int

    @property
    def tokens_per_second(self) -> float:
        return 1 / max(self.seconds, 1e-12)

    def to_data(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self) | {"tokens_per_second": self.tokens_per_second}


@torch.no_grad()
def generation_costs(
    models: Sequence[CausalModel],
    length: int,
    *,
    tokens: int = 32,
    clock: Callable[[], float] = time.perf_counter,
) -> list[GenerationCost]:
    """What a token after `length` others costs each of some models, in one row, the likeliest token taken always.

    The models take turns after each token, so that whatever else the machine does is the same for all. The first
    tokens, in which a GPU's kernels may be compiled, are not counted.

    Args:
        models: models on one device.
        length: tokens of the context; made-up ones, as their cost does not depend on which they are.
        tokens: how many tokens the median is of.
        clock: tells the time; on a GPU its work is waited for.

    Raises:
        ValueError: for a length or number of tokens below 1, or more than a model has positions for.
    """
    for name, value in (("length", length), ("tokens", tokens)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    decoders, last, sizes = [], [], []
    for model in models:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(model.vocab_size, (1, length), generator=generator).to(model.device)
        state, end = None, torch.tensor([0], device=model.device)
        for piece in ids.split(_PIECE, 1):
            # Of the logits of a context those of one position are enough, and it is all the same which.
            _, state = model.scan(piece, state, end)
        decoders.append(model.decoder(state))
        last.append(ids[:, -1])
        sizes.append(decoders[-1].state_bytes())
    times: list[list[float]] = [[] for _ in models]
    for turn in range(_WARMUP + tokens):
        for index, model in enumerate(models):
            _finish(model.device)
            begin = clock()
            last[index] = decoders[index](last[index]).argmax(-1)
            _finish(model.device)
            if turn >= _WARMUP:
                times[index].append(clock() - begin)
    return [GenerationCost(length, statistics.median(own), size) for own, size in zip(times, sizes, strict=True)]


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def transformer_beside(model: CausalModel) -> CausalModel | None:
    """transformers' Llama with the width and depth of a model and as many parameters, untrained.

    None where there is nothing to compare: the model is a Transformer or none of ours, its width has no even head, or
    transformers is not installed.
    """
    if not isinstance(model, RecurrentModel):
        return None
    config = model.model.config
    width, layers = config.d_model, config.num_layers
    if width % 2 or all(mixer.name == "attention" for mixer in config.mixer_pattern):
        return None
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ModuleNotFoundError:
        return None
    weight = model.model.output_weight
    outside = config.vocab_size * width * (1 if config.tie_embeddings else 2)
    head = next(size for size in range(min(_HEAD_DIM, width), width + 1) if width % size == 0 and size % 2 == 0)
    # A block of it has 4 width^2 parameters in its attention, and three times width x size in its MLP.
    size = max(width, round(((model.num_parameters - outside) / layers - 4 * width**2) / (3 * width)))
    llama: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=width,
            intermediate_size=size,
            num_hidden_layers=layers,
            num_attention_heads=width // head,
            tie_word_embeddings=config.tie_embeddings,
            max_position_embeddings=2**20,
        )
    )
    return TransformersModel(llama.to(weight.device, weight.dtype))
