"""The one model: token ids -> embedding -> blocks of (mixer, MLP) -> logits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from statetrack.layers import GatedMLP, ReLUMLP, RMSNorm
from statetrack.mixers.deltanet import DeltaNetConfig
from statetrack.mixers.mixer import Mixer, MixerConfig, State
from statetrack.transition import Transition

ModelState = list[State]
"""The memory of a model between two calls: the state of each layer's mixer."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and parts of a `LanguageModel`.

    Attributes:
        vocab_size: number of token ids.
        output_size: number of output classes; vocab_size if None.
        d_model: D, the model dimension.
        num_layers: blocks.
        mlp_ratio: hidden width of each block's MLP over d_model; 0 leaves the MLPs out.
        mlp: the kind of MLP: "gated" (SwiGLU) or "relu".
        mlp_depth: hidden layers of a relu MLP; a gated one has one.
        block_norm: RMS-normalize what each mixer and each MLP reads. Compiled models, whose activations are exact
            integers, go without.
        final_norm: RMS-normalize what the output layer reads.
        norm_eps: epsilon of the RMS norms.
        mixer: the token mixer of every block.
    """

    vocab_size: int
    output_size: int | None = None
    d_model: int = 128
    num_layers: int = 2
    mlp_ratio: float = 0.0
    mlp: Literal["gated", "relu"] = "gated"
    mlp_depth: int = 1
    block_norm: bool = True
    final_norm: bool = True
    norm_eps: float = 1e-5
    mixer: MixerConfig = field(default_factory=DeltaNetConfig)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "output_size", "d_model", "num_layers", "mlp_depth"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if not 0 <= self.mlp_ratio < float("inf"):
            raise ValueError(f"mlp_ratio must be 0 (no MLP) or positive, got {self.mlp_ratio}")
        if self.mlp not in ("gated", "relu"):
            raise ValueError(f"mlp must be gated or relu, got {self.mlp!r}")
        if self.mlp == "gated" and self.mlp_depth != 1:
            raise ValueError(f"mlp_depth = {self.mlp_depth} needs mlp = relu; a gated MLP has one hidden layer")
        if not 0 < self.norm_eps < 1:
            raise ValueError(f"norm_eps must be a small positive number, got {self.norm_eps}")


class Block(nn.Module):
    """`x + mixer(norm(x))`, then `x + mlp(norm(x))` where there is an MLP."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.mixer_norm = _norm(config, config.block_norm)
        self.mixer: Mixer = config.mixer.build(config.d_model)
        self.mlp = None
        if config.mlp_ratio:
            self.mlp_norm = _norm(config, config.block_norm)
            hidden_size = max(1, round(config.mlp_ratio * config.d_model))
            if config.mlp == "gated":
                self.mlp = GatedMLP(config.d_model, hidden_size)
            else:
                self.mlp = ReLUMLP(config.d_model, hidden_size, config.mlp_depth)

    def forward(self, x: Tensor, state: State | None, cu_seqlens: Tensor | None) -> tuple[Tensor, State]:
        y, state = self.mixer.scan(self.mixer_norm(x), state, cu_seqlens)
        x = x + y
        if self.mlp is not None:
            x = x + self.mlp(self.mlp_norm(x))
        return x, state


def _norm(config: ModelConfig, present: bool) -> nn.Module:
    return RMSNorm(config.d_model, eps=config.norm_eps) if present else nn.Identity()


class LanguageModel(nn.Module):
    """Token ids [B, T] -> logits [B, T, output_size], one class for every mixer.

    `forward` computes the logits of whole sequences; `scan` carries a state from one piece of a sequence to the next;
    `step` takes one token at a time. All three compute the same function.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = _norm(config, config.final_norm)
        self.head = nn.Linear(config.d_model, config.output_size or config.vocab_size, bias=False)

    def init_state(self, batch_size: int) -> ModelState:
        """The state before the first token."""
        return [block.mixer.init_state(batch_size) for block in self._blocks()]

    def forward(self, ids: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        return self.scan(ids, None, cu_seqlens)[0]

    def scan(
        self,
        ids: Tensor,
        state: ModelState | None = None,
        cu_seqlens: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, ModelState]:
        """Logits and the state after the last token.

        Args:
            ids: token ids [B, T].
            state: the state after the tokens before; None at the start of a sequence.
            cu_seqlens: integer boundaries [S + 1] of S sequences packed along T; then B = 1 and states have S rows.
            positions: compute the logits at these positions [P] only (integers in 0..T-1); None for all of them.

        Raises:
            ValueError: if ids is not an integer tensor [B, T] with B, T >= 1 and entries in 0..vocab_size-1.
        """
        self._check(ids)
        x = self.embedding(ids)
        after: ModelState = []
        for index, block in enumerate(self._blocks()):
            x, layer_state = block(x, None if state is None else state[index], cu_seqlens)
            after.append(layer_state)
        if positions is not None:
            x = x[:, positions]
        return self.head(self.norm(x)), after

    def step(self, ids: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        """One token: ids [B] -> logits [B, output_size] and the next state."""
        logits, state = self.scan(ids.unsqueeze(-1), state)
        return logits.squeeze(1), state

    @torch.no_grad()
    def transitions(self, ids: Tensor) -> list[Transition | None]:
        """The state-transition matrices of every layer on the sequences ids [B, T]; None for a layer without any."""
        self._check(ids)
        x = self.embedding(ids)
        transitions = []
        for block in self._blocks():
            transitions.append(block.mixer.transition(block.mixer_norm(x)))
            x, _ = block(x, None, None)
        return transitions

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def _blocks(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]

    def _check(self, ids: Tensor) -> None:
        if ids.ndim != 2 or ids.numel() == 0 or ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(f"ids must be an integer tensor [B, T] with B, T >= 1, got {ids.dtype} {tuple(ids.shape)}")
        # On a GPU the check would wait for the device at every call; there the embedding itself refuses with an
        # assertion.
        if ids.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = torch.aminmax(ids)
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(
                    f"token ids must lie in 0..{self.config.vocab_size - 1} for this model, got {int(low)}..{int(high)}"
                )
