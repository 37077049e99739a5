"""What evaluation asks of a language model, whoever made it: logits, and a state that is handed from piece to piece."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from statetrack.generation import Decoder
from statetrack.mixers import mixer_configs
from statetrack.model import LanguageModel
from statetrack.plain import to_data
from statetrack.pretrained import from_pretrained, sources
from statetrack.pretrained.files import read_config

_CHECK_TOKENS = 24
_CHECK_TOLERANCE = 0.05

_TOKENS = 2**13
"""Tokens whose activations are in memory at once, at most."""

_LOGITS = 2**26
"""Logits that are in memory at once, at most, where a model returns them all."""


class TokenDecoder(Protocol):
    """A model that goes on from a state: token ids [B] -> logits [B, vocab_size], one token of every row a call."""

    def __call__(self, ids: Tensor) -> Tensor: ...

    def state_bytes(self) -> int:
        """The memory of what is carried from token to token."""
        ...


class CausalModel(ABC):
    """A causal language model in evaluation mode.

    Attributes:
        title: what people call it, such as `DeltaNet [-1, 1]`.
        vocab_size: how many token ids it reads.
        num_parameters: of the model; embeddings that are tied count once.
        constant_memory: whether the state has one size at all lengths.
        config: the config as plain data.
        device: where it is.
        tokens_at_once: how many tokens one call should have at most, for the sake of memory.
    """

    title: str
    vocab_size: int
    num_parameters: int
    constant_memory: bool
    config: Mapping[str, Any]
    device: torch.device
    tokens_at_once: int = _TOKENS

    @abstractmethod
    def scan(self, ids: Tensor, state: Any = None, positions: Tensor | None = None) -> tuple[Tensor, Any]:
        """Logits [B, T, vocab_size], or [B, P, vocab_size] at `positions` [P], and the state after the last token.

        Args:
            ids: token ids [B, T].
            state: what the call before returned, which may be changed; None at the start.
            positions: integers in 0..T-1, rising; None for all.

        Raises:
            ValueError: for more tokens than the model has positions for.
        """

    @abstractmethod
    def losses(self, ids: Tensor, labels: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """The cross-entropy of the labels [B, T] in nats, float32 or better, without gradients, and the state.

        Args:
            ids: token ids [B, T].
            labels: the tokens that follow, [B, T].
            state: as for `scan`.

        Raises:
            ValueError: as `scan`.
        """

    @abstractmethod
    def decoder(self, state: Any) -> TokenDecoder:
        """What generates text after the tokens of a state, which must not be used any more; without gradients."""


class RecurrentModel(CausalModel):
    """A `LanguageModel` that predicts its own tokens.

    Raises:
        ValueError: if its outputs are not its tokens.
    """

    def __init__(self, model: LanguageModel) -> None:
        config = model.config
        if model.output_size != config.vocab_size:
            raise ValueError(
                f"this model reads {config.vocab_size} tokens and answers with {model.output_size} labels; a language "
                "model predicts its own tokens"
            )
        self.model = model.eval()
        self.vocab_size = config.vocab_size
        self.num_parameters = model.num_parameters()
        self.constant_memory = all(mixer.name != "attention" for mixer in config.mixer_pattern)
        self.config = to_data(config)
        self.device = model.output_weight.device
        self.title = _title(model)

    def scan(self, ids: Tensor, state: Any = None, positions: Tensor | None = None) -> tuple[Tensor, Any]:
        return self.model.scan(ids, state, positions=positions)

    def losses(self, ids: Tensor, labels: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        return self.model.scan_losses(ids, labels, state)

    def decoder(self, state: Any) -> TokenDecoder:
        return Decoder(self.model, state)


def _title(model: LanguageModel) -> str:
    """`DeltaNet [-1, 1]`; of a hybrid each mixer once, `DeltaNet [-1, 1] + Softmax attention`."""
    names = []
    for mixer in model.config.mixer_pattern:
        parts = [mixer_configs()[mixer.name].title]
        if (eigenvalues := getattr(mixer, "eigenvalue_range", None)) is not None:
            parts.append(f"[{eigenvalues.lo:g}, {eigenvalues.hi:g}]")
        if (factors := getattr(mixer, "num_householder", 1)) > 1:
            parts.append(f"n={factors}")
        names.append(" ".join(parts))
    return " + ".join(dict.fromkeys(names))


class TransformersModel(CausalModel):
    """A causal language model of transformers, with whatever it keeps as `past_key_values` for its state.

    Raises:
        ValueError: if its logits depend on how a sequence is cut into pieces: some models forget their state when more
            than one token follows it.
    """

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        self.vocab_size = model.get_input_embeddings().num_embeddings
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.constant_memory = False
        self.config = model.config.to_diff_dict()
        self.device = model.device
        self.title = type(model).__name__.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
        self.tokens_at_once = max(1, min(_TOKENS, _LOGITS // self.vocab_size))
        self._check_carries()

    def scan(self, ids: Tensor, state: Any = None, positions: Tensor | None = None) -> tuple[Tensor, Any]:
        try:
            outputs = self.model(input_ids=ids, past_key_values=state, use_cache=True)
        except IndexError:
            raise ValueError(
                f"{self.title} has no position for a token that far from the start; ask for shorter lengths"
            ) from None
        logits = outputs.logits
        return logits if positions is None else logits[:, positions], getattr(outputs, "past_key_values", None)

    @torch.no_grad()
    def losses(self, ids: Tensor, labels: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        logits, state = self.scan(ids, state)
        losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
        return losses.view(labels.shape), state

    def decoder(self, state: Any) -> TokenDecoder:
        return _CachedDecoder(self, state)

    @torch.no_grad()
    def _check_carries(self) -> None:
        ids = torch.arange(_CHECK_TOKENS, device=self.device).unsqueeze(0) % self.vocab_size
        whole, _ = self.scan(ids)
        half = _CHECK_TOKENS // 2
        _, state = self.scan(ids[:, :half])
        expected = whole[:, half:].float()
        if state is not None:
            error = (self.scan(ids[:, half:], state)[0].float() - expected).norm()
            if error <= _CHECK_TOLERANCE * (expected - expected.mean(-1, keepdim=True)).norm():
                return
        raise ValueError(
            f"{self.title} of transformers does not carry its state over pieces of several tokens, so that long texts "
            "can't be read piece by piece"
        )


class _CachedDecoder:
    """A model of transformers and its cache."""

    def __init__(self, model: TransformersModel, state: Any) -> None:
        self.model, self.state = model, state

    def __call__(self, ids: Tensor) -> Tensor:
        logits, self.state = self.model.scan(ids.unsqueeze(1), self.state)
        return logits.squeeze(1)

    def state_bytes(self) -> int:
        return _num_bytes(self.state)


def _num_bytes(value: Any) -> int:
    """Of all tensors in a cache of transformers, which are attributes of its layers or its own."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        return sum(map(_num_bytes, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(_num_bytes, value))
    return _num_bytes(vars(value)) if type(value).__module__.startswith("transformers.") else 0


def model_directory(path: Path | str) -> Path:
    """The directory that transformers loads: of a run of `statetrack pretrain` its `model/`, else the path itself."""
    inner = Path(path) / "model"
    return inner if (inner / "config.json").is_file() else Path(path)


def is_language_model(path: Path | str) -> bool:
    """Whether a directory holds a language model, rather than a run of `statetrack train` or nothing at all."""
    file = model_directory(path) / "config.json"
    return file.is_file() and "model_type" in read_config(file.parent)


def load_causal_model(
    path: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> CausalModel:
    """The language model of a directory.

    Args:
        path: a run of `statetrack pretrain`, or a directory as `save_pretrained` of transformers writes it.
        device: where it goes.
        dtype: dtype of the weights; None for that of the files.

    Raises:
        ValueError: if there is no language model that can be read, as a sentence.
    """
    directory = model_directory(path)
    config = read_config(directory)
    if "model_type" not in config:
        raise ValueError(f"{path} holds no language model: its config.json has no model_type")
    if config["model_type"] in sources():
        return RecurrentModel(from_pretrained(directory, dtype=dtype).to(device))
    try:
        from transformers import AutoModelForCausalLM
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"a model of the type {config['model_type']!r} needs transformers, which comes with: "
            "pip install 'statetrack[hf]'",
            name="transformers",
        ) from None
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True, dtype=dtype or "auto")
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{directory} can't be read by transformers: {' '.join(str(error).split())}") from None
    return TransformersModel(model.to(device))
