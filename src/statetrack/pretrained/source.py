"""What a source of checkpoints is: the interface that every file of this folder implements."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from statetrack.model import ModelConfig


class CheckpointError(ValueError):
    """A checkpoint that can't be used, and why."""


class Options:
    """The options in a checkpoint's config.json, which remembers what was asked for.

    Args:
        data: the contents of the file.
        source: where they come from, for messages.
    """

    def __init__(self, data: Mapping[str, Any], source: str) -> None:
        self.data, self.source = data, source
        self.asked: set[str] = set()

    def get(self, name: str, default: Any) -> Any:
        """The value of an option; the default of the original where it is left out."""
        self.asked.add(name)
        return self.data.get(name, default)

    def size(self, name: str, default: int | None = None) -> int:
        """The value of an option that is a positive integer and must be there unless it has a default.

        Raises:
            CheckpointError: if it is not.
        """
        value = self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"{self.source}: {name} must be a positive integer, got {value!r}")
        return value

    def small(self, name: str, default: float) -> float:
        """The value of an option that is a small positive number, such as an epsilon.

        Raises:
            CheckpointError: if it is not.
        """
        value = self.get(name, default)
        if not isinstance(value, (int, float)) or not 0 < value < 1:
            raise CheckpointError(f"{self.source}: {name} must be a small positive number, got {value!r}")
        return value

    def product(self, factor: str, size: int, default: float) -> int:
        """`size` times the option `factor`, as a whole number.

        Raises:
            CheckpointError: if it is none.
        """
        value = self.get(factor, default)
        result = value * size if isinstance(value, (int, float)) and math.isfinite(value) else 0
        if result < 1 or result != round(result):
            raise CheckpointError(
                f"{self.source}: {factor} * {size} must be a positive integer, got {factor} = {value!r}"
            )
        return round(result)

    def require(self, name: str, allowed: Collection[Any], default: Any) -> Any:
        """The value of an option of which only some values are supported.

        Raises:
            CheckpointError: naming the option and the values that are supported.
        """
        value = self.get(name, default)
        if value not in allowed:
            known = " or ".join(map(repr, allowed))
            raise CheckpointError(f"{self.source}: {name} = {value!r} is not supported here, only {known}")
        return value

    def refuse_others(self, ignored: Collection[str]) -> None:
        """Refuses options that nobody asked for, unless they are known to leave the function alone or are switched off.

        An option that this package doesn't know might change what the weights mean.

        Raises:
            CheckpointError: naming them.
        """
        unknown = [
            f"{name} = {value!r}"
            for name, value in self.data.items()
            if name not in self.asked and name not in ignored and name not in _GENERAL and value not in (None, False)
        ]
        if unknown:
            raise CheckpointError(f"{self.source}: unknown option {', '.join(unknown)}, which may change the function")


@dataclass(frozen=True)
class Rows:
    """Tensors of a checkpoint that together have the rows of tensors of the model: one below the other they are equal.

    Attributes:
        theirs: names in the checkpoint; several share the rows as `chunk_lengths` says.
        ours: names in the model.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]


def chunk_lengths(length: int, chunks: int) -> list[int]:
    """The lengths into which `torch.chunk` cuts: equal ones, but for the last where that doesn't work out."""
    size = -(-length // chunks)
    return [max(0, min(size, length - size * chunk)) for chunk in range(chunks)]


def renamed(theirs: str, ours: str, names: Mapping[str, str]) -> list[Rows]:
    """Tensors that are the same but for their names.

    Args:
        theirs: what their names begin with.
        ours: what our names begin with.
        names: the rest of their names -> the rest of ours.
    """
    return [Rows((theirs + their,), (ours + our,)) for their, our in names.items()]


class Source(ABC):
    """Checkpoints of one `model_type`: how their config and their names of weights translate."""

    model_type: ClassVar[str]
    """The `model_type` in config.json; the key of the registry."""

    ignored: ClassVar[Iterable[str]] = ()
    """Options that leave the function of a trained model alone: initial values, kernels, caches."""

    head: ClassVar[str] = "lm_head.weight"
    """The output layer in the checkpoint; with tied embeddings it is left out, or equal to the embedding."""

    @abstractmethod
    def config(self, options: Options, weights: Mapping[str, Tensor]) -> ModelConfig:
        """The model.

        Args:
            options: the config of the checkpoint.
            weights: its tensors, for layouts that the config does not tell.

        Raises:
            CheckpointError: naming an option whose value is not supported.
        """

    @abstractmethod
    def rows(self, config: ModelConfig, weights: Mapping[str, Tensor]) -> list[Rows]:
        """Where each parameter comes from, the output layer left out, for the model that `config` returned."""

    def unused(self, config: ModelConfig, weights: Mapping[str, Tensor]) -> set[str]:
        """Names of tensors that checkpoints have and their own code doesn't use."""
        return set()


# What the config of any model of transformers may hold; it concerns tokenizers, generation, losses and file formats.
_GENERAL = frozenset(
    {
        "_attn_implementation_autoset",
        "_name_or_path",
        "architectures",
        "auto_map",
        "bos_token_id",
        "chunk_size_feed_forward",
        "decoder_start_token_id",
        "diversity_penalty",
        "dtype",
        "early_stopping",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "is_decoder",
        "label2id",
        "length_penalty",
        "max_length",
        "max_position_embeddings",
        "min_length",
        "model_type",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "prefix",
        "problem_type",
        "pruned_heads",
        "repetition_penalty",
        "return_dict",
        "sep_token_id",
        "task_specific_params",
        "temperature",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torch_dtype",
        "transformers_version",
        "typical_p",
        "use_cache",
    }
)
