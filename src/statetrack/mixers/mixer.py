"""What a token mixer is: the interface that every file of this folder implements."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar, get_type_hints

import torch
from torch import Tensor, nn

from statetrack.fields import check_types
from statetrack.mixers.bounds import FactorBounds
from statetrack.ops import check_packing
from statetrack.ops.packing import pack, unpack
from statetrack.ops.step import in_place_steps
from statetrack.transition import EigenvalueRange, Transition, accumulated

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
    absent: ClassVar[Mapping[str, str]] = {}
    """Options that one may look for here in vain, each with the sentence that says why there is none."""
    rotary_positions: ClassVar[bool] = False
    """Whether queries and keys turn with the position, which is as if `A_t` turned the state."""
    vmaps: ClassVar[bool] = True
    """Whether `torch.func.vmap` can make one call of several modules, and so one training of several runs."""

    @abstractmethod
    def build(self, d_model: int) -> Mixer:
        """The module for a model dimension D."""

    def spectrum(self) -> EigenvalueRange | None:
        """The interval that holds the eigenvalues of every `A_t` of this mixer, all of them real.

        None where nothing is promised: the mixer has no transition, or its eigenvalues may be complex, or are only
        measured.
        """
        return None

    def reads_before_update(self) -> bool:
        """Whether the output of a token depends on the state before its update as well as on the one after it."""
        return False

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for option in fields(self):
            if hints[option.name] is EigenvalueRange:
                object.__setattr__(self, option.name, EigenvalueRange.of(getattr(self, option.name)))
        check_types(self, self.name)


@dataclass(frozen=True, kw_only=True)
class WidenedMixerConfig(MixerConfig):
    """Options of every mixer with gates that can be widened.

    Attributes:
        eigenvalue_range: range of the eigenvalues.
        learn_lower_end: make the lower end of the range a parameter, one number for each head, that starts at the lower
            end of `eigenvalue_range` and is kept in [-1, 0]. With the range 0,1 the function is the native one at
            first, and training may open the range.
    """

    eigenvalue_range: EigenvalueRange = field(default=EigenvalueRange(-1, 1))
    learn_lower_end: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.learn_lower_end and self.eigenvalue_range.lo > 0:
            raise ValueError(
                f"a lower end that is learned starts in [-1, 0], but eigenvalue_range starts at "
                f"{self.eigenvalue_range.lo:g}"
            )

    def gate_range(self) -> EigenvalueRange:
        """The range that the gates may reach: `eigenvalue_range`, or from -1 on if its lower end is learned."""
        return EigenvalueRange(-1, self.eigenvalue_range.hi) if self.learn_lower_end else self.eigenvalue_range


class Widening(nn.Module):
    """Maps gates in [0, 1] to an eigenvalue range, whose lower end is a number or a parameter for each head.

    Attributes:
        lower_end: parameter [H], float32; None unless the config says `learn_lower_end`. It is used as clamped to
            [-1, 0]; gradients pass the clamp, so that an end which an optimizer has pushed out finds its way back.

    Args:
        config: the mixer's config.
        heads: H.
    """

    def __init__(self, config: WidenedMixerConfig, heads: int) -> None:
        super().__init__()
        self.range = config.eigenvalue_range
        start = torch.full((heads,), self.range.lo)
        self.lower_end = nn.Parameter(start) if config.learn_lower_end else None

    def current_lower_end(self) -> Tensor | None:
        """The learned lower ends [H], in [-1, 0], float32 or better; None if the range is fixed."""
        if self.lower_end is None:
            return None
        free = accumulated(self.lower_end)
        return free + (free.clamp(-1, 0) - free).detach()

    def forward(self, gate: Tensor) -> Tensor:
        """Eigenvalues from gates [..., H] in [0, 1]."""
        return self.range.widen(gate, self.current_lower_end())

    def householder_beta(self, gate: Tensor) -> Tensor:
        """`beta` from gates [..., H] in [0, 1]."""
        return self.range.householder_beta(gate, self.current_lower_end())

    def removal(self, gate: Tensor, decay: float) -> Tensor:
        """What is taken from decays in [decay, 1], from gates [..., H] in [0, 1]; see `EigenvalueRange.removal`."""
        return self.range.removal(gate, decay, self.current_lower_end())


Config = TypeVar("Config", bound=MixerConfig)


class Mixer(nn.Module, ABC):
    """Token mixing [B, T, D] -> [B, T, D], causal, with a state that takes the place of the tokens before.

    `forward` is a drop-in layer; `scan` is the same with the state handed in and out; `step` takes one token. All three
    compute the same function.
    """

    output_layer: ClassVar[str] = "o_proj"
    """The name of the linear layer whose output `scan` returns."""
    own_start: ClassVar[tuple[str, ...]] = ()
    """Names of the layers whose initial weights are part of the mixer's definition, which `initializer_range` of the
    model leaves as they are."""
    growing: ClassVar[bool] = False
    """Whether the state grows with the tokens."""

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

    def initial_state_parameters(self) -> list[Tensor]:
        """The parameters that are the state before the first token: no token is multiplied by them."""
        return []

    def recurrence_flops(self, length: int) -> float | None:
        """Operations of the forward pass for a token, on average over a sequence of `length`, beside those of the
        parameters; None for those of its transition (`statetrack.pretraining.flops`)."""
        return None

    def starting_state(self, x: Tensor, state: State | None, cu_seqlens: Tensor | None) -> State:
        """What `scan` starts from: the state given, or the one before the first token, for each row or packed sequence.

        Raises:
            ValueError: for boundaries `cu_seqlens` that are not those of sequences packed in `x` [B, T, D].
        """
        if cu_seqlens is not None:
            check_packing(x.shape[0], x.shape[1], cu_seqlens)
        if state is not None:
            return state
        return self.init_state(x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1)

    def factor_bounds(self, scale: Tensor) -> FactorBounds | None:
        """What every `A_t` is made of for all inputs `x = scale * u` with |u| <= 1, whatever their order.

        Args:
            scale: [D].

        Returns:
            None where nothing is known: for a mixer without a transition, or with one that is no product of symmetric
            matrices.
        """
        return None

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Outputs [B, T, D]; `mask` is as in `scan_padded`."""
        _check_input(x, "B", "T")
        if mask is None:
            return self.scan(x, None, cu_seqlens)[0]
        if cu_seqlens is not None:
            raise ValueError("give cu_seqlens for packed sequences or a mask for padded ones, not both")
        return self.scan_padded(x, mask)[0]

    def scan_padded(self, x: Tensor, mask: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """`scan` of rows with padding anywhere, which neither moves the state nor is seen by any token.

        Args:
            x: [B, T, D].
            mask: bool [B, T], True at tokens, False at padding.
            state: as in `scan`.

        Returns:
            Outputs [B, T, D], 0 at padding; and the state after the last token of each row.
        """
        _check_input(x, "B", "T")
        packed, cu_seqlens = pack(x, mask)
        y, state = self.scan(packed, state, cu_seqlens)
        return unpack(y, mask), state

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One token: `x` [B, D] -> y [B, D] and the next state."""
        _check_input(x, "B")
        y, state = self.scan(x.unsqueeze(1), state)
        return y.squeeze(1), state

    def step_(self, x: Tensor, state: State) -> Tensor:
        """`step` without gradients, after which `state` is the next one: its tensors are overwritten where they lie.

        Only those that change their size or dtype, such as a cache that grows, are replaced.
        """
        _check_input(x, "B")
        with in_place_steps():
            y, after = self.scan(x.unsqueeze(1), state)
            overwrite(state, after)
        return y.squeeze(1)


def overwrite(state: State, after: State) -> None:
    """Makes `state` the one after a token, in the memory that it has where the sizes allow it."""
    for name, tensor in after.items():
        old = state[name]
        if (old.shape, old.dtype) != (tensor.shape, tensor.dtype):
            state[name] = tensor
        elif tensor is not old:
            old.copy_(tensor)


def _check_input(x: Tensor, *axes: str) -> None:
    """Raises ValueError unless `x` has these axes, none of them empty, and channels, in floating-point numbers."""
    if x.ndim != len(axes) + 1 or 0 in x.shape or not x.is_floating_point():
        shape = f"[{', '.join(axes)}, D] with {', '.join(axes)} >= 1"
        raise ValueError(f"x must be a floating-point tensor {shape}, got {x.dtype} {tuple(x.shape)}")


def with_options(default: type[Config], config: Config | None, options: dict[str, Any]) -> Config:
    """The config a module was given, or one made of keyword options; never both."""
    if config is not None:
        if options:
            raise ValueError(f"give a config or options, not both; got options {', '.join(sorted(options))}")
        return config
    known = [field.name for field in fields(default)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        refuse_absent(default, options)
        raise ValueError(f"unknown option {', '.join(unknown)} for {default.name}; the options are {', '.join(known)}")
    return default(**options)


def refuse_absent(config: type[MixerConfig], options: Iterable[str]) -> None:
    """Raises ValueError, with the reason, if one of the options is among those that a config is known not to have."""
    for option in options:
        if option in config.absent:
            raise ValueError(config.absent[option])


def half_head_sizes(num_heads: int, head_dim: int | None, value_dim: int | None, d_model: int) -> tuple[int, int]:
    """(K, V) for a model dimension D, where by default queries and keys have half the size of values, D / num_heads.

    Raises:
        ValueError: if num_heads doesn't divide the sizes that are left open.
    """
    if (head_dim is None and d_model % (2 * num_heads)) or (value_dim is None and d_model % num_heads):
        raise ValueError(
            f"2 num_heads = {2 * num_heads} must divide d_model = {d_model}, or head_dim and value_dim must be given "
            "beside it"
        )
    return head_dim or d_model // (2 * num_heads), value_dim or d_model // num_heads


def require_conv_size(size: int) -> None:
    """Raises ValueError unless a short convolution may have this size, or 0 for none."""
    if not isinstance(size, int) or isinstance(size, bool) or (size != 0 and size < 2):
        raise ValueError(f"conv_size must be 0 (no convolution) or at least 2, got {size!r}")


def require_positive(config: MixerConfig, *names: str) -> None:
    """Raises ValueError unless the named options are integers of at least 1, or None where that is their default."""
    for name in names:
        value = getattr(config, name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{name} of {config.name} must be a positive integer, got {value!r}")


def require_positive_number(config: MixerConfig, *names: str) -> None:
    """Raises ValueError unless the named options are finite numbers above 0."""
    for name in names:
        value = getattr(config, name)
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be a positive number, got {value}")


def split_heads(config: Any, d_model: int) -> int:
    """`head_dim` of a config with `num_heads` and `head_dim`, which is d_model / num_heads where it is None.

    Raises:
        ValueError: if it is None and num_heads doesn't divide d_model.
    """
    if config.head_dim is None and d_model % config.num_heads:
        raise ValueError(
            f"num_heads = {config.num_heads} must divide d_model = {d_model}, or head_dim must be given beside it"
        )
    return config.head_dim or d_model // config.num_heads
