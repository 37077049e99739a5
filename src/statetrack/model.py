"""The one model: token ids -> embedding -> blocks of (mixer, MLP) -> logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from statetrack.cross_entropy import IGNORE, linear_cross_entropy
from statetrack.layers import GatedMLP, ReLUMLP, RMSNorm, ShortConvolution
from statetrack.mixers.deltanet import DeltaNetConfig
from statetrack.mixers.mixer import Mixer, MixerConfig, State, overwrite
from statetrack.ops.packing import on_host, pack, unpack
from statetrack.ops.step import in_place_steps
from statetrack.transition import Transition, accumulated

ModelState = list[State]
"""The memory of a model between two calls: the state of each layer's mixer."""


def owned(state: ModelState) -> ModelState:
    """A copy of a state in memory of its own, which `LanguageModel.step_` may overwrite.

    It also lets go of the activations of whole prompts, of which some states are views.
    """
    return [{name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in x.items()} for x in state]


class Tracker(Protocol):
    """What evaluation and verification ask of a model: a `LanguageModel`, or what takes the place of one."""

    @property
    def config(self) -> ModelConfig: ...

    def init_state(self, batch_size: int) -> ModelState: ...

    def scan(
        self, ids: Tensor, state: ModelState | None = None, *, positions: Tensor | None = None
    ) -> tuple[Tensor, ModelState]: ...

    def step(self, ids: Tensor, state: ModelState) -> tuple[Tensor, ModelState]: ...


Mixers = MixerConfig | tuple[MixerConfig, ...]
"""One mixer for every layer, or a pattern of mixers that is repeated over the layers."""

Checkpoint = Callable[..., tuple[Tensor, State]]
"""Calls its first argument with the others and keeps none of the activations in between for the backward pass."""

NormPlacement = Literal["before", "after", "none"]
"""Whether a block normalizes what its mixer and its MLP read, or what they add to the residual stream, or nothing."""

NormPlacements = NormPlacement | tuple[NormPlacement, ...]
"""One placement for every layer, or a pattern that is repeated over the layers."""


MAX_SIZE, MAX_LAYERS = 2**31 - 1, 10_000
"""Larger sizes and deeper models are refused before anything is as large or takes as long."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and parts of a `LanguageModel`.

    Attributes:
        vocab_size: number of token ids.
        output_size: number of output classes; vocab_size if None.
        d_model: D, the model dimension.
        num_layers: blocks.
        mlp_ratio: hidden width of each block's MLP over d_model; 0 leaves the MLPs out.
        mlp_size: that hidden width itself, in place of mlp_ratio; None for mlp_ratio.
        mlp: the kind of MLP: "gated" (SwiGLU) or "relu".
        mlp_depth: hidden layers of a relu MLP; a gated one has one.
        final_norm: RMS-normalize what the output layer reads.
        norm_eps: epsilon of the RMS norms.
        norm_placement: RMS-normalize what the mixers and MLPs read ("before"), what they return ("after"), or neither
            ("none": compiled models, whose activations are exact integers); a tuple is a pattern that is repeated over
            the layers, as with `mixer`.
        residual_in_float32: keep the sum over the blocks in float32 where the weights have fewer bits.
        tie_embeddings: the output layer is the transposed embedding, which begins with the standard deviation 0.02;
            output_size must then be vocab_size.
        initializer_range: standard deviation of the normal distribution from which embeddings, linear layers and short
            convolutions start. That of the layers that write to the residual stream, the last ones of mixers and MLPs,
            is divided by the root of how many of them there are (as in GPT-2, Radford et al. 2019). Layers that a
            mixer defines the start of (`Mixer.own_start`) keep it. None for PyTorch's and each mixer's own, which
            suits small models of tasks; language models learn far faster from 0.02 (docs/pretrain.md).
        mixer: the token mixer of every block; or a tuple of them, a hybrid: the pattern is repeated over the layers,
            and its length divides num_layers.
    """

    vocab_size: int
    output_size: int | None = None
    d_model: int = 128
    num_layers: int = 2
    mlp_ratio: float = 0.0
    mlp_size: int | None = None
    mlp: Literal["gated", "relu"] = "gated"
    mlp_depth: int = 1
    final_norm: bool = True
    norm_eps: float = 1e-5
    norm_placement: NormPlacements = "before"
    residual_in_float32: bool = False
    tie_embeddings: bool = False
    initializer_range: float | None = None
    mixer: Mixers = field(default_factory=DeltaNetConfig)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "output_size", "d_model", "num_layers", "mlp_size", "mlp_depth"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
            if value is not None and value > (most := MAX_LAYERS if name == "num_layers" else MAX_SIZE):
                raise ValueError(f"{name} must be at most {most:,}, got {value:,}")
        if not 0 <= self.mlp_ratio < float("inf"):
            raise ValueError(f"mlp_ratio must be 0 (no MLP) or positive, got {self.mlp_ratio}")
        if self.mlp not in ("gated", "relu"):
            raise ValueError(f"mlp must be gated or relu, got {self.mlp!r}")
        if self.mlp == "gated" and self.mlp_depth != 1:
            raise ValueError(f"mlp_depth = {self.mlp_depth} needs mlp = relu; a gated MLP has one hidden layer")
        if self.initializer_range is not None and not 0 < self.initializer_range <= 1:
            raise ValueError(
                f"initializer_range must be a standard deviation in (0, 1], or None, got {self.initializer_range}"
            )
        if not 0 < self.norm_eps < 1:
            raise ValueError(f"norm_eps must be a small positive number, got {self.norm_eps}")
        if self.mlp_ratio * self.d_model > MAX_SIZE:
            raise ValueError(f"mlp_ratio * d_model must be at most {MAX_SIZE:,}, got {self.mlp_ratio} * {self.d_model}")
        if self.mlp_size is not None and self.mlp_ratio:
            raise ValueError(f"give mlp_ratio or mlp_size, not both; got {self.mlp_ratio} and {self.mlp_size}")
        if self.tie_embeddings and self.output_size not in (None, self.vocab_size):
            raise ValueError(
                f"tied embeddings need output_size = vocab_size = {self.vocab_size}, got output_size = "
                f"{self.output_size}"
            )
        for name in ("mixer", "norm_placement"):
            pattern = getattr(self, name)
            if not isinstance(pattern, (tuple, list)):
                continue
            if not pattern or self.num_layers % len(pattern):
                raise ValueError(
                    f"a pattern of {len(pattern)} values for {name} can't be repeated over num_layers = "
                    f"{self.num_layers}; its length must divide the number of layers"
                )
            # Patterns that say the same thing are the same config: the shortest of them.
            length = next(n for n in range(1, len(pattern) + 1) if _repeats(pattern, n))
            object.__setattr__(self, name, pattern[0] if length == 1 else tuple(pattern[:length]))
        for mixer in self.mixer_pattern:
            if not isinstance(mixer, MixerConfig):
                raise ValueError(f"mixer must be the config of a mixer or a tuple of configs, got {mixer!r}")
        placements = self.norm_placement if isinstance(self.norm_placement, tuple) else (self.norm_placement,)
        for placement in placements:
            if placement not in get_args(NormPlacement):
                raise ValueError(f"norm_placement must be before, after or none, got {placement!r}")
            if placement == "none" and self.residual_in_float32:
                raise ValueError(
                    "residual_in_float32 needs norms: they bring what a mixer reads to the dtype of its weights"
                )

    @property
    def mixer_pattern(self) -> tuple[MixerConfig, ...]:
        """The mixers of a pattern, in order; of one element where every layer has the same."""
        return self.mixer if isinstance(self.mixer, tuple) else (self.mixer,)

    @property
    def mixer_name(self) -> str:
        """The name of the mixer, or those of the pattern: `deltanet+attention`."""
        return "+".join(mixer.name for mixer in self.mixer_pattern)

    def layer_mixers(self) -> tuple[MixerConfig, ...]:
        """The mixer of each layer."""
        return self.mixer_pattern * (self.num_layers // len(self.mixer_pattern))

    def layer_norm_placements(self) -> tuple[NormPlacement, ...]:
        """The placement of the norms of each layer."""
        placements = self.norm_placement if isinstance(self.norm_placement, tuple) else (self.norm_placement,)
        return placements * (self.num_layers // len(placements))

    def mlp_hidden_size(self) -> int:
        """The hidden width of each block's MLP; 0 for none."""
        if self.mlp_size is not None:
            return self.mlp_size
        return max(1, round(self.mlp_ratio * self.d_model)) if self.mlp_ratio else 0


def _repeats(pattern: Sequence[object], length: int) -> bool:
    """Whether a pattern is its first `length` values again and again."""
    whole, rest = divmod(len(pattern), length)
    return not rest and list(pattern) == list(pattern[:length]) * whole


class Block(nn.Module):
    """`x + mixer(norm(x))`, then `x + mlp(norm(x))` where there is an MLP; with norms "after", `x + norm(mixer(x))`.

    Args:
        config: the model's config.
        layer: number of the block, from 0.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        placement = config.layer_norm_placements()[layer]
        self.checkpoint: Checkpoint | None = None
        self.norm_after = placement == "after"
        self.residual_in_float32 = config.residual_in_float32
        self.mixer_norm = _norm(config, placement != "none")
        self.mixer: Mixer = config.layer_mixers()[layer].build(config.d_model)
        self.mlp = None
        if size := config.mlp_hidden_size():
            self.mlp_norm = _norm(config, placement != "none")
            if config.mlp == "gated":
                self.mlp = GatedMLP(config.d_model, size)
            else:
                self.mlp = ReLUMLP(config.d_model, size, config.mlp_depth)

    def forward(self, x: Tensor, state: State | None, cu_seqlens: Tensor | None) -> tuple[Tensor, State]:
        if self.checkpoint is not None and torch.is_grad_enabled():
            return self.checkpoint(self._forward, x, state, cu_seqlens)
        return self._forward(x, state, cu_seqlens)

    def _forward(self, x: Tensor, state: State | None, cu_seqlens: Tensor | None) -> tuple[Tensor, State]:
        x, read = self._add_and_read(x, None, self.mixer_norm)
        y, state = self.mixer.scan(read, state, cu_seqlens)
        y = self.mixer_norm(y) if self.norm_after else y
        if self.mlp is None:
            return self._add(x, y), state
        x, read = self._add_and_read(x, y, self.mlp_norm)
        y = self.mlp(read)
        return self._add(x, self.mlp_norm(y) if self.norm_after else y), state

    def mixer_input(self, x: Tensor) -> Tensor:
        """What the mixer reads of the residual stream."""
        return self._read(self.mixer_norm, x)

    def mixer_input_scale(self) -> Tensor | None:
        """A scale [D]: whatever the mixer reads is `scale * u` with |u| <= 1. None without a norm before the mixer."""
        if self.norm_after or not isinstance(self.mixer_norm, RMSNorm):
            return None
        weight = self.mixer_norm.weight
        # Inputs and logits are rounded to the dtype of the weights, which may lengthen them by a little.
        return weight.detach().abs() * (len(weight) ** 0.5 * (1 + 4 * torch.finfo(weight.dtype).eps))

    def _add_and_read(self, x: Tensor, y: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
        """The residual stream with `y` added to it, and what is read of it."""
        if self.residual_in_float32 and y is not None:
            x = accumulated(x)
        # Of a stream in float32 beside shorter weights the norm reads a shorter copy.
        copies = self.residual_in_float32 and isinstance(norm, RMSNorm) and x.dtype != norm.weight.dtype
        if isinstance(norm, RMSNorm) and not self.norm_after and not copies:
            return norm.of_sum(x, y)
        x = x if y is None else self._add(x, y)
        return x, self._read(norm, x)

    def _read(self, norm: nn.Module, x: Tensor) -> Tensor:
        if self.residual_in_float32 and isinstance(norm, RMSNorm):
            x = x.to(norm.weight.dtype)
        return x if self.norm_after else norm(x)

    def _add(self, x: Tensor, y: Tensor) -> Tensor:
        return (accumulated(x) if self.residual_in_float32 else x) + y


def _norm(config: ModelConfig, present: bool) -> nn.Module:
    return RMSNorm(config.d_model, eps=config.norm_eps) if present else nn.Identity()


class LanguageModel(nn.Module):
    """Token ids [B, T] -> logits [B, T, output_size], one class for every mixer.

    `forward` computes the logits of whole sequences, or with labels their loss; `scan` and `scan_losses` carry a state
    from one piece of a sequence to the next; `step` takes one token at a time. All compute the same function.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = _norm(config, config.final_norm)
        # Tied embeddings are one parameter with one name, so that checkpoints hold it once.
        self.head = None if config.tie_embeddings else nn.Linear(config.d_model, self.output_size, bias=False)
        if config.tie_embeddings:
            # Of deviation 1 as usual, their products with normalized activations would have the deviation sqrt(D): the
            # first loss would be far above that of a uniform guess, ln(vocab_size).
            nn.init.normal_(self.embedding.weight, std=0.02)
        if config.initializer_range is not None:
            self._start(config.initializer_range)

    @torch.no_grad()
    def _start(self, deviation: float) -> None:
        """Draws the weights that `initializer_range` is for."""
        writers: set[nn.Module] = set()
        own: set[nn.Module] = set()
        for block in self._blocks():
            writers.add(block.mixer.get_submodule(block.mixer.output_layer))
            if block.mlp is not None:
                writers.add(block.mlp.down_proj)
            kept = [getattr(block.mixer, name) for name in block.mixer.own_start]  # None for a layer that is left out
            own.update(module for layer in kept if layer is not None for module in layer.modules())
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding, ShortConvolution)) and module not in own:
                share = len(writers) ** -0.5 if module in writers else 1.0
                nn.init.normal_(module.weight, std=deviation * share)

    def init_state(self, batch_size: int) -> ModelState:
        """The state before the first token."""
        return [block.mixer.init_state(batch_size) for block in self._blocks()]

    def forward(
        self,
        ids: Tensor,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        labels: Tensor | None = None,
        z_loss: float = 0.0,
    ) -> Tensor:
        """Logits [B, T, output_size], or the mean cross-entropy of labels, for which the logits are never whole.

        Args:
            ids: as for `scan`, and so are cu_seqlens and mask.
            cu_seqlens: boundaries of packed sequences.
            mask: False at padding, whose labels are ignored.
            labels: integers [B, T], the right answer after each token (of a language model the next one), or -100.
            z_loss: weight of the squared logsumexp of the logits in the loss, see `linear_cross_entropy`.
        """
        if labels is None:
            return self.scan(ids, None, cu_seqlens, mask=mask)[0]
        if mask is not None:
            labels = labels.masked_fill(~mask, IGNORE)
            labels, _ = pack(labels, mask)
        x, _ = self._scan_blocks(ids, None, cu_seqlens, mask, states=False)
        return linear_cross_entropy(self._output_input(x), self.output_weight, labels, z_loss=z_loss)

    @torch.no_grad()
    def scan_losses(self, ids: Tensor, labels: Tensor, state: ModelState | None = None) -> tuple[Tensor, ModelState]:
        """The cross-entropy of each label [B, T], without gradients, and the state after the last token.

        Args:
            ids: token ids [B, T].
            labels: integers [B, T], the right answer after each token, or -100, where the loss is 0.
            state: the state after the tokens before; None at the start of a sequence.
        """
        x, after = self._scan_blocks(ids, state, None, None)
        return linear_cross_entropy(self._output_input(x), self.output_weight, labels, reduction="none"), after

    def scan(
        self,
        ids: Tensor,
        state: ModelState | None = None,
        cu_seqlens: Tensor | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, ModelState]:
        """Logits and the state after the last token.

        Args:
            ids: token ids [B, T], or the embeddings [B, T, D] of tokens in their place, floating-point.
            state: the state after the tokens before; None at the start of a sequence.
            cu_seqlens: integer boundaries [S + 1] of S sequences packed along T; then B = 1 and states have S rows.
                Best on the CPU wherever the model is: one on a GPU is read once a call, which waits for the GPU.
            positions: compute the logits at these positions [P] only (integers in 0..T-1); None for all of them.
            mask: bool [B, T], True at tokens and False at padding, which may be anywhere and hold any integers. Padding
                has the logits 0, no token sees it, and the state is the one after the last token of each row.

        Raises:
            ValueError: if ids is not an integer tensor [B, T] with B, T >= 1 and entries in 0..vocab_size-1, nor
                embeddings; if the mask does not fit, has no token at all, or comes with cu_seqlens.
        """
        x, after = self._scan_blocks(ids, state, cu_seqlens, mask)
        if positions is None:
            logits = self.logits(x)
            return (logits if mask is None else unpack(logits, mask)), after
        if mask is not None:
            x = unpack(x, mask)  # norm and output layer have no bias: the logits of 0 are 0
        return self.logits(x[:, positions]), after

    def _scan_blocks(
        self,
        ids: Tensor,
        state: ModelState | None,
        cu_seqlens: Tensor | None,
        mask: Tensor | None,
        *,
        states: bool = True,
    ) -> tuple[Tensor, ModelState]:
        """What the last block returns, of padded rows the tokens as `pack` has them, and the state; as `scan`.

        Without `states` each layer's is let go at once: those of attention hold all tokens.
        """
        embedded = ids.ndim == 3 and ids.is_floating_point()
        if not embedded:
            self._check_shape(ids)
        elif ids.numel() == 0 or ids.shape[2] != self.config.d_model:
            raise ValueError(
                f"embeddings must be [B, T, D] with B, T >= 1 and D = {self.config.d_model}, got {tuple(ids.shape)}"
            )
        if mask is not None:
            if cu_seqlens is not None:
                raise ValueError("give cu_seqlens for packed sequences or a mask for padded ones, not both")
            ids, cu_seqlens = pack(ids, mask)
        if cu_seqlens is not None:
            cu_seqlens = on_host(cu_seqlens)  # all layers read it
        if embedded:
            x = ids
        else:
            self._check_entries(ids)
            x = self.embedding(ids)
        after: ModelState = []
        for index, block in enumerate(self._blocks()):
            x, layer_state = block(x, None if state is None else state[index], cu_seqlens)
            if states:
                after.append(layer_state)
        return x, after

    def step(self, ids: Tensor, state: ModelState, mask: Tensor | None = None) -> tuple[Tensor, ModelState]:
        """One token: ids [B] -> logits [B, output_size] and the next state.

        Args:
            ids: token ids [B].
            state: the state after the tokens before.
            mask: bool [B]; rows where it is False have the logits 0 and keep their state.
        """
        if mask is not None:
            if mask.shape != ids.shape:
                raise ValueError(f"the mask of a step must be [B] = {tuple(ids.shape)}, got {tuple(mask.shape)}")
            if mask.dtype == torch.bool and not mask.any():
                return self.embedding.weight.new_zeros(len(ids), self.output_size), state
            mask = mask.unsqueeze(-1)
        logits, state = self.scan(ids.unsqueeze(-1), state, mask=mask)
        return logits.squeeze(1), state

    def step_(self, ids: Tensor, state: ModelState) -> Tensor:
        """`step` without gradients, after which `state` is the next one: its tensors are overwritten where they lie.

        So nothing is allocated for the state, and a CUDA graph of the call can be replayed. Only the keys and values
        of attention, which grow, are replaced. `owned` makes a state that nobody else sees.

        Args:
            ids: token ids [B], or the embeddings [B, D] of tokens in their place.
            state: the state after the tokens before.

        Returns:
            Logits [B, output_size].
        """
        with in_place_steps():
            logits, after = self.scan(ids.unsqueeze(1), state)
            for layer, layer_after in zip(state, after, strict=True):
                overwrite(layer, layer_after)
        return logits.squeeze(1)

    @torch.no_grad()
    def transitions(self, ids: Tensor) -> list[Transition | None]:
        """The state-transition matrices of every layer on the sequences ids [B, T]; None for a layer without any."""
        self._check_shape(ids)
        self._check_entries(ids)
        x = self.embedding(ids)
        transitions = []
        for block in self._blocks():
            transitions.append(block.mixer.transition(block.mixer_input(x)))
            x, _ = block(x, None, None)
        return transitions

    def checkpoint_blocks(self, checkpoint: Checkpoint | None, every: int = 1) -> None:
        """Computes the activations inside blocks again in the backward pass instead of keeping them.

        Args:
            checkpoint: `functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)`, or a function like
                it; None to keep the activations of all blocks again.
            every: 1 for every block, n for every nth one; the others keep theirs.

        Raises:
            ValueError: if `every` is less than 1.
        """
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        for index, block in enumerate(self._blocks()):
            block.checkpoint = None if index % every else checkpoint

    def logits(self, x: Tensor) -> Tensor:
        """The final norm and the output layer: [..., output_size] from what the last block returns, [..., D]."""
        return F.linear(self._output_input(x), self.output_weight)

    def _output_input(self, x: Tensor) -> Tensor:
        """What the output layer reads, from what the last block returns."""
        x = self.norm(x)
        return x.to(self.output_weight.dtype) if self.config.residual_in_float32 else x

    @property
    def output_size(self) -> int:
        """Number of output classes."""
        return self.config.output_size or self.config.vocab_size

    @property
    def output_weight(self) -> Tensor:
        """The matrix [output_size, D] of the output layer, the embedding's where the two are tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def _blocks(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]

    def _check_shape(self, ids: Tensor) -> None:
        if ids.ndim != 2 or ids.numel() == 0 or ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(f"ids must be an integer tensor [B, T] with B, T >= 1, got {ids.dtype} {tuple(ids.shape)}")

    def _check_entries(self, ids: Tensor) -> None:
        # On a GPU the check would wait for the device at every call; there the embedding itself refuses with an
        # assertion.
        if ids.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = torch.aminmax(ids)
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(
                    f"token ids must lie in 0..{self.config.vocab_size - 1} for this model, got {int(low)}..{int(high)}"
                )


def check_backends(model: LanguageModel) -> None:
    """Raises ValueError where a mixer's config names a backend that is unknown or can't compute it on its device."""
    if any(getattr(mixer, "backend", "auto") != "auto" for mixer in model.config.mixer_pattern):
        with torch.no_grad():
            model(torch.zeros(1, 2, dtype=torch.int64, device=model.embedding.weight.device))
