"""`LanguageModel` as transformers sees it: its config, its cache and the causal LM, each a thin layer.

Nothing is computed here. The config has the fields of `ModelConfig`, the cache holds a `ModelState`, and the model
calls `LanguageModel.scan`; what it adds is the conventions of transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from statetrack.model import LanguageModel, ModelConfig, ModelState, owned
from statetrack.plain import from_data, to_data

# transformers makes configs without arguments; this is then the number of bytes.
_DEFAULT_VOCAB_SIZE = 256


class StatetrackConfig(PreTrainedConfig):
    """The fields of `ModelConfig` as plain data, beside those that every config of transformers has.

    A mixer is a table with its name and its options, or a list of such tables, the pattern of a hybrid; all of them are
    written to config.json, so that no model depends on the defaults of a version. `hidden_size`, `num_hidden_layers`
    and `tie_word_embeddings` are other names for `d_model`, `num_layers` and `tie_embeddings`.

    Args:
        options: fields of `ModelConfig`, also a mixer's config as it is; fields of `PreTrainedConfig`; `use_cache`.

    Raises:
        ValueError: for values that `ModelConfig` refuses, or an output_size other than vocab_size: a causal language
            model predicts its own tokens.
    """

    model_type = "statetrack"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers wants lists and dicts)
    attribute_map = {  # noqa: RUF012
        "hidden_size": "d_model",
        "num_hidden_layers": "num_layers",
        "tie_word_embeddings": "tie_embeddings",
    }

    def __init__(self, **options: Any) -> None:
        named = {self.attribute_map.get(name, name): value for name, value in options.items()}
        own = {f.name: named.pop(f.name) for f in fields(ModelConfig) if f.name in named}
        model = from_data(ModelConfig, {"vocab_size": _DEFAULT_VOCAB_SIZE, **own})
        for name, value in to_data(_causal(model)).items():
            setattr(self, name, value)
        self.use_cache = named.pop("use_cache", True)
        super().__init__(**named)

    @classmethod
    def of(cls, config: ModelConfig, **options: Any) -> StatetrackConfig:
        """The config of a model; the options are other fields of `PreTrainedConfig`."""
        return cls(**to_data(config), **options)

    def to_model_config(self) -> ModelConfig:
        """The `ModelConfig` with the same fields."""
        return _causal(from_data(ModelConfig, {f.name: getattr(self, f.name) for f in fields(ModelConfig)}))


def _causal(config: ModelConfig) -> ModelConfig:
    if config.output_size not in (None, config.vocab_size):
        raise ValueError(
            f"a causal language model predicts its own tokens: output_size must be vocab_size = {config.vocab_size} or "
            f"None, got {config.output_size}"
        )
    return replace(config, output_size=None)


class StateCache(Cache):
    """What `generate` carries from token to token: the states of all layers, of constant size but for attention.

    Attributes:
        state: the state after the tokens so far, None before the first.
        seen_tokens: how many positions were read, padding included.
        in_place: a token without gradients overwrites the tensors of the state, which are then the cache's own.
            `generate` makes such caches; in others every token makes new tensors, and older ones stay as they were.

    Args:
        in_place: see above.
    """

    def __init__(self, *, in_place: bool = False) -> None:
        super().__init__(layers=[])
        self.state: ModelState | None = None
        self.seen_tokens = 0
        self.in_place = in_place

    def __repr__(self) -> str:
        return f"StateCache(layers={len(self)}, seen_tokens={self.seen_tokens}, bytes={self.num_bytes()})"

    def __len__(self) -> int:
        return 0 if self.state is None else len(self.state)

    @property
    def batch_size(self) -> int:
        """Rows of the states; -1 before the first token."""
        return -1 if self.state is None else next(len(tensor) for layer in self.state for tensor in layer.values())

    @property
    def is_initialized(self) -> bool:
        return self.state is not None

    @property
    def is_croppable(self) -> bool:
        return False

    def num_bytes(self) -> int:
        """The memory that the states take."""
        return sum(tensor.nbytes for layer in self.state or [] for tensor in layer.values())

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen_tokens

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1  # no limit

    def reset(self) -> None:
        self.state, self.seen_tokens = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda tensor: tensor[indices.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def crop(self, tokens_to_remove: int) -> None:
        """A state has no way back.

        Raises:
            ValueError: if any token is to be removed.
        """
        if tokens_to_remove:
            raise ValueError("the state of a recurrent model can't forget its last tokens; keep a copy of the cache")

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.state is not None:
            self.state = [{name: function(tensor) for name, tensor in layer.items()} for layer in self.state]


class StatetrackForCausalLM(PreTrainedModel, GenerationMixin):
    """The causal language model of every mixer and hybrid; `model` is the `LanguageModel` in it.

    Args:
        config: its config.
        model: a `LanguageModel` of this config, which is used as it is; None for a new one.
    """

    config_class = StatetrackConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _is_stateful = True
    _supports_sdpa = True
    _no_split_modules = ["Block"]  # noqa: RUF012

    def __init__(self, config: StatetrackConfig, model: LanguageModel | None = None) -> None:
        super().__init__(config)
        self.model = LanguageModel(config.to_model_config()) if model is None else model
        self.gradient_checkpointing = False
        for parameter in self.model.parameters():
            if not parameter.is_meta:  # `LanguageModel` has initialized it
                parameter._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]
        self.post_init()

    @classmethod
    def of(cls, model: LanguageModel, **options: Any) -> StatetrackForCausalLM:
        """The causal language model around a `LanguageModel`, which shares its weights.

        Args:
            model: the model.
            options: other fields of the config, such as `eos_token_id`.
        """
        return cls(cls.config_class.of(model.config, **options), model)  # pyright: ignore

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cu_seq_lens_q: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, with labels the loss, and the cache after the last token.

        Args:
            input_ids: token ids [B, T].
            attention_mask: [B, T], or [B, P + T] after P tokens in the cache; 0 at padding, which may be anywhere,
                moves no state and has the logits 0.
            position_ids: [B, T]; without mask and cache, a row may hold several sequences, each of which starts at a 0
                (`DataCollatorWithFlattening`): there the state is reset. Otherwise positions are ignored.
            past_key_values: a `StateCache`, which is updated in place.
            inputs_embeds: [B, T, D] in place of input_ids.
            labels: [B, T], the tokens themselves; -100 where there is no loss. They are shifted here.
            use_cache: return the cache; by default as the config says, and not in training.
            logits_to_keep: compute the logits of the last so many tokens only, or at these positions; 0 for all.
            cu_seq_lens_q: boundaries [S + 1] of S sequences packed along T; then B is 1.
            kwargs: `num_items_in_batch` and other arguments of the loss.

        Raises:
            ValueError: for arguments that don't go together, a cache that isn't a `StateCache`, or a mask with another
                shape.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of the two")
        if past_key_values is not None and not isinstance(past_key_values, StateCache):
            raise ValueError(
                f"the cache of this model is a StateCache, which `generate` makes by itself; got a "
                f"{type(past_key_values).__name__}"
            )
        for name in ("output_hidden_states", "output_attentions"):
            if kwargs.pop(name, None):
                raise ValueError(f"{name} is not supported: blocks return their output and their state")
        if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError("labels need the logits of all tokens; leave logits_to_keep out")

        x = inputs_embeds if input_ids is None else input_ids
        assert x is not None
        cache = past_key_values
        mask = _mask(attention_mask, x.shape[1], 0 if cache is None else cache.seen_tokens)
        cu_seqlens = cu_seq_lens_q
        if cu_seqlens is None and position_ids is not None and attention_mask is None and cache is None:
            cu_seqlens = _boundaries(position_ids, x.shape[0], x.shape[1])
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        if cu_seqlens is not None:
            if cache is not None:
                raise ValueError("packed sequences can't go on from a cache: give them without past_key_values")
            use_cache = False
        if use_cache and cache is None:
            cache = StateCache()

        before = None if cache is None else cache.state
        in_place = cache is not None and cache.in_place and not torch.is_grad_enabled()
        if in_place and before is not None and mask is None and x.shape[1] == 1:
            logits, after = self.model.step_(x.squeeze(1), before).unsqueeze(1), before
            if isinstance(logits_to_keep, Tensor):
                logits = logits[:, logits_to_keep]
        else:
            logits, after = self._scan(x, before, cu_seqlens, mask, logits_to_keep)
            if in_place and after is not None:
                after = owned(after)
        if cache is not None:
            cache.state = after
            cache.seen_tokens += x.shape[1]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)  # pyright: ignore[reportArgumentType]

    def _scan(
        self,
        x: Tensor,
        state: ModelState | None,
        cu_seqlens: Tensor | None,
        mask: Tensor | None,
        logits_to_keep: int | Tensor,
    ) -> tuple[Tensor, ModelState | None]:
        b, t = x.shape[:2]
        positions = None
        if isinstance(logits_to_keep, Tensor):
            positions = logits_to_keep
        elif logits_to_keep:
            positions = torch.arange(max(0, t - logits_to_keep), t, device=x.device)
        if mask is not None and not mask.any():  # the first chunk of a prompt that was padded on the left
            kept = t if positions is None else len(positions)
            return self.model.embedding.weight.new_zeros(b, kept, self.model.output_size), state
        if cu_seqlens is not None and b > 1:
            logits = self.model.scan(x.reshape(1, b * t, *x.shape[2:]), None, cu_seqlens)[0].reshape(b, t, -1)
            return (logits if positions is None else logits[:, positions]), None
        return self.model.scan(x, state, cu_seqlens, positions, mask)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        assert isinstance(value, nn.Embedding)
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Linear:
        """The output layer; with tied embeddings one that is made for the occasion around the shared weight."""
        if self.model.head is not None:
            return self.model.head
        weight = self.model.embedding.weight
        head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        head.weight = weight
        return head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Sets the output layer; tied embeddings have none of their own, and follow `set_input_embeddings`."""
        assert isinstance(new_embeddings, nn.Linear)
        if self.model.head is not None:
            self.model.head = new_embeddings

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        embedding = super().resize_token_embeddings(*args, **kwargs)
        self.model.config = replace(self.model.config, vocab_size=embedding.num_embeddings, output_size=None)
        return embedding

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Initializes the parameters that a checkpoint lacks, such as lower ends that its training did not learn.

        A mixer initializes its parameters itself, when it is made; so they come from a model that is made anew.
        """
        missing = {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if not getattr(parameter, "_is_hf_initialized", False)
        }
        if missing:
            with torch.device("cpu"):
                initial = dict(LanguageModel(self.model.config).named_parameters())
            for name, parameter in missing.items():
                parameter.copy_(initial[name])

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        self.gradient_checkpointing = enable
        self.model.checkpoint_blocks(gradient_checkpointing_func if enable else None, every_n_layers)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation = {generation_config.cache_implementation!r} is for attention; the state of "
                "this model is its cache: leave it out"
            )
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = StateCache(in_place=True)


def _mask(attention_mask: Tensor | None, length: int, seen: int) -> Tensor | None:
    """The mask of the last `length` tokens; None if all of them are tokens."""
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2 or attention_mask.shape[1] not in (length, seen + length):
        raise ValueError(
            f"attention_mask must be [B, {length}]" + (f" or [B, {seen + length}]" if seen else "") + ", 0 at padding, "
            f"got {tuple(attention_mask.shape)}"
        )
    mask = attention_mask[:, -length:] != 0
    # Packing costs more than the question, most of all for the single tokens of decoding.
    return None if mask.all() else mask


def _boundaries(position_ids: Tensor, b: int, t: int) -> Tensor | None:
    """The boundaries of the sequences in rows [B, T], one row after the other; None if each row is one sequence."""
    starts = position_ids.expand(b, t) == 0
    starts = torch.cat([torch.ones_like(starts[:, :1]), starts[:, 1:]], 1).flatten().nonzero().squeeze(1)
    return None if len(starts) == b else nn.functional.pad(starts, (0, 1), value=b * t)
