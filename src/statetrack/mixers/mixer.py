"""What a token mixer is: the interface that every file of this folder implements."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar, get_type_hints

from torch import Tensor, nn

from statetrack.transition import EigenvalueRange, Transition

State = dict[str, Tensor]
"""The memory of a mixer between two calls: named tensors whose first axis is B (or the packed sequences S)."""


@dataclass(frozen=True, kw_only=True)
class MixerConfig(ABC):
    """The options of a mixer; the only place where their defaults are written.

    A subclass names itself (`name`, the registry key, and `title`, as people write it), says in a line what it is
    (`summary`), and builds its module.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    summary: ClassVar[str]

    @abstractmethod
    def build(self, d_model: int) -> Mixer:
        """The module for a model dimension D."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in fields(self):
            value = getattr(self, field.name)
            if hints[field.name] is EigenvalueRange:
                object.__setattr__(self, field.name, EigenvalueRange.of(value))


Config = TypeVar("Config", bound=MixerConfig)


class Mixer(nn.Module, ABC):
    """Token mixing [B, T, D] -> [B, T, D] with a state of constant size.

    `forward` is a drop-in layer; `scan` is the same with the state handed in and out; `step` takes one token. All three
    compute the same function.
    """

    @abstractmethod
    def init_state(self, batch_size: int) -> State:
        """The state before the first token."""

    @abstractmethod
    def scan(self, x: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, State]:
        """Outputs [B, T, D] and the state after the last token.

        Args:
            x: [B, T, D].
            state: the state after the tokens before; None for none.
            cu_seqlens: integer boundaries [S + 1] of S sequences packed along T; then B = 1 and states have S rows.
        """

    @abstractmethod
    def transition(self, x: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None) -> Transition | None:
        """The state-transition matrices for the inputs `x` [B, T, D]; None for a mixer without any, such as an LSTM."""

    def eigenvalue_parameters(self) -> list[Tensor]:
        """The parameters that decide on the eigenvalues alone; weight decay leaves them out."""
        return []

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        return self.scan(x, None, cu_seqlens)[0]

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One token: `x` [B, D] -> y [B, D] and the next state."""
        y, state = self.scan(x.unsqueeze(1), state)
        return y.squeeze(1), state


def with_options(default: type[Config], config: Config | None, options: dict[str, Any]) -> Config:
    """The config a module was given, or one made of keyword options; never both."""
    if config is not None:
        if options:
            raise ValueError(f"give a config or options, not both; got options {', '.join(sorted(options))}")
        return config
    known = [field.name for field in fields(default)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"unknown option {', '.join(unknown)} for {default.name}; the options are {', '.join(known)}")
    return default(**options)


def require_conv_size(size: int) -> None:
    """Raises ValueError unless a short convolution may have this size, or 0 for none."""
    if size != 0 and size < 2:
        raise ValueError(f"conv_size must be 0 (no convolution) or at least 2, got {size}")


def require_positive(config: MixerConfig, *names: str) -> None:
    """Raises ValueError unless the named options are integers of at least 1, or None where that is their default."""
    for name in names:
        value = getattr(config, name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{name} of {config.name} must be a positive integer, got {value!r}")
