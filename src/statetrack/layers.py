"""The layers around a recurrence: normalization, short convolution, MLPs. No recurrence here."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

from statetrack.ops import triton_convolution, triton_gate, triton_norm, triton_normalize
from statetrack.ops.backend import wants_gradient, with_signature
from statetrack.ops.chunking import CACHED_NUMBERS
from statetrack.ops.packing import Move, Packing, packing_of, tokens_of
from statetrack.ops.vmapped import is_vmapped, replicas_first, vmapped
from statetrack.precision import autocasts, product_dtype
from statetrack.transition import accumulated


def rms_norm(x: Tensor, weight: Tensor | None, eps: float | None) -> Tensor:
    """`weight x / sqrt(mean(x^2) + eps)` over the last axis, in the dtype of the products after it (`product_dtype`).

    The mean square is taken in float32 or better. Autocast has no part in it: on a GPU it would compute the norm of
    bfloat16 inputs in float32, in passes over memory instead of one kernel, and every linear layer that reads the
    result would cast it again.

    Args:
        x: [..., C].
        weight: [C], rounded to the dtype of x; None for ones.
        eps: added to the mean square; None for the machine epsilon.
    """
    dtype = product_dtype(x)
    if eps is not None and triton_norm.serves(x, weight):
        return triton_norm.add_and_norm(x, None, weight, eps, dtype)[1]
    weight = None if weight is None else weight.to(x.dtype)
    with torch.autocast(x.device.type, enabled=False) if autocasts(x) else nullcontext():
        if is_vmapped():  # PyTorch's own kernels for it on a GPU have no batching rule
            y = vmapped(lambda x: F.rms_norm(x, x.shape[-1:], None, eps), x)
            y = y if weight is None else y * weight
        else:
            y = F.rms_norm(x, x.shape[-1:], weight, eps)
        return y.to(dtype)


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` over the last axis, computed by `rms_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def of_sum(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """`x + y`, or x where y is None, and its norm.

        On a GPU that is one kernel, and so is its backward, which adds the gradients of the sum and of the norm: what
        reads x beside the norm should read the sum that this returns.

        Args:
            x: [..., C].
            y: [..., C].
        """
        if self.eps is not None and (y is None or x.shape == y.shape) and triton_norm.serves(x, y, self.weight):
            like = x if y is None else x.new_empty(0, dtype=torch.promote_types(x.dtype, y.dtype))
            return triton_norm.add_and_norm(x, y, self.weight, self.eps, product_dtype(like))
        total = x if y is None else x + y
        return total, self(total)


JOIN = True
"""Whether linear layers that read the same numbers on a GPU are computed as one product."""

_JOINED_ON = ("cuda",)

_KEPT_BYTES = 2**20
"""Joined weights of fewer bytes are kept for the backward; to join them again would cost more than it saves."""


def joined_product(x: Tensor, *linears: nn.Linear, multiple: int = 1) -> Tensor | None:
    """The outputs of linear layers of one input beside each other, as one product, or None where they are not joined.

    They are on a GPU, where the layers are `torch.nn.Linear` without a bias and nothing stands between them and their
    weights, such as a hook; not in float64, and only where there are as many tokens as outputs, so that a copy of the
    weights is less than what it saves. Under autocast that copy is the cast that there would be anyway, and weights may
    have several dtypes, as those that FSDP gathers in bf16 beside those that it gathers in float32. The compiler, for
    which the number of tokens is no constant, has the layers one by one.

    Args:
        x: [..., D].
        linears: layers with D inputs.
        multiple: of the width, for kernels that read many bytes at once.

    Returns:
        [..., W], zeros behind the outputs, which need a gradient that is finite.
    """
    if not JOIN or x.device.type not in _JOINED_ON or is_vmapped() or torch.compiler.is_compiling():
        return None
    if not all(_is_plain(linear) for linear in linears):
        return None
    weights = [linear.weight for linear in linears]
    dtype = product_dtype(x)
    if dtype == torch.float64 or any(weight.device != x.device for weight in weights):
        return None
    if len({weight.dtype for weight in weights}) > 1 and not torch.is_autocast_enabled(x.device.type):
        return None
    outputs = sum(weight.shape[0] for weight in weights)
    width = -(-outputs // multiple) * multiple
    if x.shape[:-1].numel() < width:
        return None
    if width * x.shape[-1] * dtype.itemsize >= _KEPT_BYTES and any(weight.dtype == dtype for weight in weights):
        return _JoinedProduct.apply(x.to(dtype), width, *weights)
    return F.linear(x.to(dtype), _Join.apply(dtype, width, *weights))


class _Join(torch.autograd.Function):
    """Weights [O, D] beneath each other, in one dtype: [width, D], zeros in the last rows.

    Joined and cast in one pass over memory, and one launch for each dtype that they have.
    """

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, width: int, *weights: Tensor) -> Tensor:
        sizes, dtypes = ctx.shares = [len(weight) for weight in weights], [weight.dtype for weight in weights]
        joined = weights[0].new_empty(width, weights[0].shape[1], dtype=dtype)
        *parts, rest = joined.split([*sizes, width - sum(sizes)])
        for held in set(dtypes):
            places = [part for part, weight in zip(parts, weights, strict=True) if weight.dtype == held]
            values = [weight for weight in weights if weight.dtype == held]
            torch._foreach_copy_(places, values)  # pyright: ignore[reportPrivateImportUsage]
        if len(rest):
            rest.zero_()
        return joined

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        sizes, dtypes = ctx.shares
        return None, None, *_parted(grad_outputs[0], sizes, dtypes, ctx.needs_input_grad[2:])


class _JoinedProduct(torch.autograd.Function):
    """x [..., D] times joined weights, of which some have its dtype already: [..., width].

    What is kept for the backward are these weights, to be joined once more there: a copy beside them would double what
    they take, and would still be there where FSDP frees them between the passes.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, width: int, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, *weights)
        ctx.width = width
        return F.linear(x, _Join.apply(x.dtype, width, *weights))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (d_y,), (x, *weights) = grad_outputs, ctx.saved_tensors
        d_x = d_y @ _Join.apply(x.dtype, ctx.width, *weights) if ctx.needs_input_grad[0] else None
        d_joined = d_y.flatten(0, -2).mT @ x.flatten(0, -2)
        sizes, dtypes = [len(weight) for weight in weights], [weight.dtype for weight in weights]
        return d_x, None, *_parted(d_joined, sizes, dtypes, ctx.needs_input_grad[2:])


def _parted(
    d_joined: Tensor, sizes: list[int], dtypes: list[torch.dtype], needed: Sequence[bool]
) -> Iterator[Tensor | None]:
    """The gradients of weights of so many rows from that of what they were joined to."""
    d_joined = d_joined[: sum(sizes)]
    if len(set(dtypes)) == 1:
        d_joined = d_joined.to(dtypes[0])
    for part, dtype, is_needed in zip(d_joined.split(sizes), dtypes, needed, strict=True):
        yield part.to(dtype) if is_needed else None


def _is_plain(linear: nn.Linear) -> bool:
    """Whether a layer is its weight and nothing else: what adapters, FSDP, pruning or quantization put on it is not."""
    return (
        type(linear) is nn.Linear
        and linear.bias is None
        and type(linear.weight) in (Tensor, nn.Parameter, FakeTensor)
        and _has_no_hooks(linear)
    )


def _has_no_hooks(module: nn.Module) -> bool:
    """Whether calling a module is calling the `forward` of its class."""
    own = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    of_all = (
        torch_module._global_forward_hooks,
        torch_module._global_forward_pre_hooks,
        torch_module._global_backward_hooks,
        torch_module._global_backward_pre_hooks,
    )
    return not any(own) and not any(of_all) and "forward" not in module.__dict__


class ShortConvolution(nn.Module):
    """A causal depthwise convolution over time, [B, T, C] -> [B, T, C], with the last inputs as its state.

    `y_t = sum_i weight[:, i] x_{t - size + 1 + i} + bias`. The state is the last `size - 1` inputs, [B, size - 1, C].

    Args:
        channels: C.
        size: how many tokens an output sees, the current one included; at least 2.
        bias: add a bias for each channel.
    """

    def __init__(self, channels: int, size: int, *, bias: bool = False) -> None:
        super().__init__()
        if size < 2:
            raise ValueError(f"a short convolution sees at least 2 tokens, got {size}; leave it out with a size of 0")
        self.size = size
        bound = size**-0.5
        self.weight = nn.Parameter(torch.empty(channels, 1, size).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound)) if bias else None

    def init_state(self, batch_size: int) -> Tensor:
        return self.weight.new_zeros(batch_size, self.size - 1, self.weight.shape[0])

    def forward(
        self,
        x: Tensor,
        state: Tensor | None,
        cu_seqlens: Tensor | None = None,
        *,
        activation: Literal["silu"] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns the outputs [B, T, C] and the state after the last token.

        Args:
            x: [B, T, C].
            state: [B, size - 1, C], or [S, size - 1, C] for S packed sequences; None for zeros.
            cu_seqlens: boundaries [S + 1] of sequences packed along T (then B = 1); none sees the inputs of another.
            activation: applied to the outputs; on a GPU in the kernel of the convolution.
        """
        if activation not in (None, "silu"):
            raise ValueError(f'the activation of a short convolution must be None or "silu", got {activation!r}')
        silu, past, length = activation == "silu", self.size - 1, x.shape[1]
        if cu_seqlens is None:
            if state is None and length >= past and triton_convolution.serves(x, self.weight, self.bias):
                # Its zeros need no place in memory.
                y = triton_convolution.convolve(x, self.weight, self.bias, padded=True, silu=silu)
                return y, x[:, length - past :]
            state = x.new_zeros(x.shape[0], past, x.shape[2]) if state is None else state.to(x.dtype)
            extended = torch.cat([state, x], 1)
            return self._outputs(extended, silu), extended[:, length:]
        if state is None and triton_convolution.serves(x, self.weight, self.bias):
            places = packing_of(cu_seqlens).make(_convolution_ends, x, past)
            y = triton_convolution.convolve(x, self.weight, self.bias, padded=True, silu=silu, reach=places.reach)
            return y, places.take(x)
        # Every packed sequence gets its own state in front of it, in one longer row; then nothing is special any more.
        places = packing_of(cu_seqlens).make(_convolution_places, x, past)
        extended = x.new_zeros(length + len(places.before), x.shape[2])
        if state is not None:
            extended = extended.index_copy(0, places.before, state.to(x.dtype).flatten(0, 1))
        extended = extended.index_copy(0, places.tokens, x[0])
        outputs = self._outputs(extended[None], silu)
        after = extended.index_select(0, places.after).view(-1, past, x.shape[2])
        return outputs.index_select(1, places.outputs), after

    def _outputs(self, extended: Tensor, silu: bool) -> Tensor:
        """Of the inputs and the size - 1 before them."""
        if triton_convolution.serves(extended, self.weight, self.bias):
            return triton_convolution.convolve(extended, self.weight, self.bias, padded=False, silu=silu)
        weight, length = self.weight.to(extended.dtype), extended.shape[1] - self.size + 1
        if is_vmapped() or (wants_gradient(extended, weight) and not torch.compiler.is_compiling()):
            y = _Taps.apply(extended, weight)
        else:
            y = extended[:, :length] * weight[:, 0, 0]
            for i in range(1, self.size):
                y = y.addcmul(extended[:, i : i + length], weight[:, 0, i])
        y = y if self.bias is None else y + self.bias.to(extended.dtype)
        return F.silu(y) if silu else y


def convolve_together(
    x: Tensor,
    convolutions: Sequence[ShortConvolution],
    passed: Sequence[int],
    cu_seqlens: Tensor | None = None,
    *,
    activation: Literal["silu"] | None = None,
) -> tuple[list[Tensor], list[Tensor]] | None:
    """Convolutions of the channels of one tensor, in one kernel on a GPU; None where they are to be computed alone.

    Args:
        x: [B, T, W]: the inputs of the convolutions, what is passed on, then channels that nobody reads.
        convolutions: up to three, without states before x.
        passed: how many channels each part has that is passed on.
        cu_seqlens: as of a `ShortConvolution`, and so is the activation.
        activation: applied to the outputs.

    Returns:
        The outputs [B, T, C] of each convolution and then the parts passed on; and the states of the convolutions.
    """
    first, sizes = convolutions[0], tuple(conv.weight.shape[0] for conv in convolutions)
    past, length = first.size - 1, x.shape[1]
    if (
        len(convolutions) > 3
        or any(type(conv) is not ShortConvolution or not _has_no_hooks(conv) for conv in convolutions)
        or len({(conv.size, conv.bias is None) for conv in convolutions}) > 1
        or is_vmapped()
        or (cu_seqlens is None and length < past)
        or not triton_convolution.serves(x, *(weight for conv in convolutions for weight in (conv.weight, conv.bias)))
    ):
        return None
    weights: list[Tensor] = [conv.weight for conv in convolutions]
    biases: list[Tensor] = [conv.bias for conv in convolutions if conv.bias is not None]
    ends = None if cu_seqlens is None else packing_of(cu_seqlens).make(_convolution_ends, x, past)
    parts = triton_convolution.convolve_parts(
        x,
        torch.cat(weights),
        torch.cat(biases) if biases else None,
        sizes,
        tuple(passed),
        silu=activation == "silu",
        reach=None if ends is None else ends.reach,
    )
    inputs = x[..., : sum(sizes)]
    after = inputs[:, length - past :] if ends is None else ends.take(inputs)
    return list(parts), list(after.split(sizes, -1))


@dataclass(frozen=True)
class _Ends:
    """Of packed sequences: how many tokens before it each token sees [T], int32; and where the last inputs of each
    sequence lie and whether they are there, [S (size - 1)]."""

    reach: Tensor
    last: Tensor
    there: Tensor
    past: int

    def take(self, x: Tensor) -> Tensor:
        """The state after each sequence, [S, size - 1, C], of the inputs [1, T, C]; zeros before its first token."""
        taken = x[0].index_select(0, self.last)
        return torch.where(self.there.unsqueeze(1), taken, 0).view(-1, self.past, x.shape[2])


def _convolution_ends(packing: Packing, move: Move, past: int) -> _Ends:
    boundaries, lengths = torch.tensor(packing.boundaries), torch.tensor(packing.lengths)
    starts = boundaries[:-1]
    reach = (torch.arange(packing.boundaries[-1]) - torch.repeat_interleave(starts, lengths)).clamp(max=past)
    last = boundaries[1:, None] - past + torch.arange(past)
    there = last >= starts[:, None]
    return _Ends(move(reach.int()), move(last.clamp(min=0).flatten()), move(there.flatten()), past)


@dataclass(frozen=True)
class _Places:
    """Where everything lies in the longer row: the tokens [T] and their outputs, and what is before [S (size - 1)] and
    after each sequence."""

    tokens: Tensor
    outputs: Tensor
    before: Tensor
    after: Tensor


def _convolution_places(packing: Packing, move: Move, past: int) -> _Places:
    boundaries, sequences = torch.tensor(packing.boundaries), torch.arange(len(packing.lengths))
    sequence = torch.repeat_interleave(torch.tensor(packing.lengths))
    outputs = torch.arange(len(sequence)) + past * sequence
    offsets = past * sequences[:, None] + torch.arange(past)
    before, after = boundaries[:-1, None] + offsets, boundaries[1:, None] + offsets
    return _Places(move(outputs + past), move(outputs), move(before.flatten()), move(after.flatten()))


class _Taps(torch.autograd.Function):
    """The sum over the taps [C, 1, size] of a convolution of [B, T + size - 1, C], with few passes over memory.

    In place, which autograd could not differentiate; and on a CPU a few rows at a time, so that only the first tap's
    pass over them has to wait for memory. Both tensors may have a first axis more, of replicas.
    """

    @staticmethod
    @with_signature
    def forward(extended: Tensor, weight: Tensor) -> Tensor:
        taps = _each_tap(weight)
        length = extended.shape[-2] - len(taps) + 1
        y = extended.new_empty(*extended.shape[:-2], length, extended.shape[-1])
        for x, out in _groups(extended, y):
            torch.mul(x[..., :length, :], taps[0], out=out)
            for i, tap in enumerate(taps[1:], 1):
                out.addcmul_(x[..., i : i + length, :], tap)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        (d_y,) = grad_outputs
        extended, weight = ctx.saved_tensors
        taps, length = _each_tap(weight), d_y.shape[-2]
        d_extended, d_taps = torch.empty_like(extended), torch.zeros_like(taps)
        for x, d_x, d_out in _groups(extended, d_extended, d_y):
            torch.mul(d_out, taps[0], out=d_x[..., :length, :])
            d_x[..., length:, :].zero_()
            for i, tap in enumerate(taps[1:], 1):
                d_x[..., i : i + length, :].addcmul_(d_out, tap)
            if _whole(x) and x.numel() * len(taps) <= _WINDOWS:
                windows = x.unfold(-2, len(taps), 1).movedim(-1, 0)
                torch.sum(windows * d_out, (-3, -2), keepdim=True, out=d_taps)
                continue
            product = torch.empty_like(d_out)
            for i, d_tap in enumerate(d_taps):
                d_tap += torch.mul(d_out, x[..., i : i + length, :], out=product).sum((-3, -2), keepdim=True)
        return d_extended, d_taps.movedim(0, -1).reshape(weight.shape)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Tensor) -> tuple[Tensor, int]:
        return _Taps.apply(*replicas_first(info, in_dims, args)), 0


def _each_tap(weight: Tensor) -> Tensor:
    """[..., C, 1, size] as [size, ..., 1, 1, C]; with a stride between its channels a tap would not be vectorized."""
    return weight.squeeze(-2).movedim(-1, 0).contiguous().unsqueeze(-2).unsqueeze(-2)


_WINDOWS = 2**27
"""So many numbers may lie in memory at once for what all taps see."""


def _whole(x: Tensor) -> bool:
    """Whether [B, T, C] is treated in one piece: on a GPU, where calls take the time, and with replicas."""
    return x.device.type != "cpu" or x.ndim > 3


def _groups(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The rows of tensors [B, ..., C] in groups that fit a CPU's cache, or all of them."""
    if _whole(tensors[0]):
        return iter([tensors])
    rows = max(1, CACHED_NUMBERS // 4 // max(1, tensors[0].shape[1:].numel()))
    return zip(*(x.split(rows) for x in tensors), strict=True)


class GatedMLP(nn.Module):
    """`down(silu(gate(x)) * up(x))` (SwiGLU, arXiv 2002.05202), [..., D] -> [..., D].

    Args:
        d_model: D.
        hidden_size: the width in between.
    """

    def __init__(self, d_model: int, hidden_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_model, hidden_size, bias=False)
        self.up_proj = nn.Linear(d_model, hidden_size, bias=False)
        self.down_proj = nn.Linear(hidden_size, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        both = joined_product(x, self.gate_proj, self.up_proj)
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x)) if both is None else gated_halves(both))


def gated(gate: Tensor, x: Tensor, activation: Literal["silu", "sigmoid"] = "silu") -> Tensor:
    """`activation(gate) * x` of two tensors of one shape; on a GPU one kernel."""
    if triton_gate.serves(gate, x):
        return triton_gate.gated(gate, x, silu=activation == "silu")
    return triton_gate.by_operations(gate, x, silu=activation == "silu")


def gated_halves(both: Tensor, activation: Literal["silu", "sigmoid"] = "silu") -> Tensor:
    """`gated` of the two halves of the last axis, [..., 2 C] -> [..., C]; on a GPU one kernel, and one gradient."""
    gate, x = both.chunk(2, -1)
    if triton_gate.serves(gate, x):
        return triton_gate.gated_halves(both, silu=activation == "silu")
    return gated(gate, x, activation)


class ReLUMLP(nn.Module):
    """`W_n relu(... relu(W_0 x + b_0) ...)`, [..., D] -> [..., D], with `depth` hidden layers.

    Unlike the gated MLP it computes with integers exactly, which compiled models rely on.

    Args:
        d_model: D.
        hidden_size: the width of every hidden layer.
        depth: how many hidden layers, at least 1.
    """

    def __init__(self, d_model: int, hidden_size: int, depth: int = 1) -> None:
        super().__init__()
        sizes = [d_model, *[hidden_size] * depth]
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.down_proj = nn.Linear(hidden_size, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.hidden:
            x = F.relu(layer(x))
        return self.down_proj(x)


def l2_normalize(x: Tensor, eps: float = 1e-6, *, scale: float = 1.0) -> Tensor:
    """`scale x / sqrt(|x|^2 + eps)` along the last axis, computed in float32 or better, in the dtype of `x`."""
    if triton_normalize.serves(x):
        return triton_normalize.normalize(x, eps=eps, scale=scale)
    wide = accumulated(x)
    factor = torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)
    return (wide * (factor if scale == 1 else factor * scale)).to(x.dtype)


def unit_vectors(x: Tensor) -> Tensor:
    """`x / |x|` along the last axis, 0 where |x| <= 1e-12; computed in float32 or better, in the dtype of `x`."""
    if triton_normalize.serves(x):
        return triton_normalize.normalize(x, least=1e-24)
    wide = accumulated(x)
    squared_norm = wide.square().sum(-1, keepdim=True)
    directed = squared_norm > 1e-24
    # The inner `where` keeps the infinite derivative at 0 out of the backward. Both are of norms, as vectors are long.
    return (wide * torch.where(directed, torch.rsqrt(torch.where(directed, squared_norm, 1)), 0)).to(x.dtype)


def token_shift(x: Tensor, state: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Every token's predecessor [B, T, D] (RWKV), and the last token [B, D], which is the state.

    Args:
        x: [B, T, D].
        state: the token before the first, [B, D], or [S, D] for S packed sequences; zeros at the start.
        cu_seqlens: boundaries [S + 1] of sequences packed along T (then B = 1); none sees a token of another.
    """
    state = state.to(x.dtype)
    if cu_seqlens is None:
        return torch.cat([state.unsqueeze(1), x[:, :-1]], 1), x[:, -1]
    shifted = F.pad(x[:, :-1], (0, 0, 1, 0))
    places = tokens_of(cu_seqlens, x)
    shifted = shifted.index_copy(1, places.starts, state.index_select(0, places.filled).unsqueeze(0))
    # An empty sequence keeps its state.
    return shifted, torch.where(places.occupied.unsqueeze(1), x[0].index_select(0, places.last), state)


class LowRankMap(nn.Module):
    """`up(activation(down(x))) + bias`, [..., D] -> [..., C] through `rank` channels ("LoRA" in RWKV's papers).

    The result is float32 or better: it is what decays and gates are made of.

    Args:
        d_model: D.
        rank: channels in between.
        size: C.
        activation: applied in between; None for none.
        bias: add a bias.
    """

    def __init__(
        self,
        d_model: int,
        rank: int,
        size: int,
        activation: Callable[[Tensor], Tensor] | None = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.down = nn.Linear(d_model, rank, bias=False)
        self.up = nn.Linear(rank, size, bias=False)
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        low = self.down(x)
        y = accumulated(self.up(low if self.activation is None else self.activation(low)))
        return y if self.bias is None else y + accumulated(self.bias)


def head_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer norm of each head in float32 or better, in the dtype of x: [B, T, H, V] -> [B, T, H V].

    Args:
        x: [B, T, H, V].
        weight, bias: [H V].
        eps: added to the variance.
    """
    weight, bias = accumulated(weight), accumulated(bias)
    if triton_norm.serves(x):
        # PyTorch's group norm has a block of threads for each group, which is long for short heads.
        y = triton_norm.add_and_norm(x, None, None, eps, weight.dtype, center=True)[1].flatten(2) * weight + bias
    else:
        y = F.group_norm(accumulated(x).flatten(0, 1).flatten(1), x.shape[2], weight, bias, eps)
    return y.view(*x.shape[:2], len(weight)).to(x.dtype)


def layer_norm(x: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """`(x - mean) / sqrt(variance + eps)` over the last axis, in a dtype of its own."""
    if triton_norm.serves(x):
        return triton_norm.add_and_norm(x, None, None, eps, dtype, center=True)[1]
    return F.layer_norm(accumulated(x), x.shape[-1:], eps=eps).to(dtype)


class HeadNorm(nn.Module):
    """Layer norm of what each head reads, with a weight and a bias for each channel: [B, T, H, V] -> [B, T, H V].

    It is `torch.nn.GroupNorm` with one group a head, computed in float32 or better, in the dtype of the input.

    Args:
        heads: H.
        size: V.
        eps: added to the variance.
    """

    def __init__(self, heads: int, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(heads * size))
        self.bias = nn.Parameter(torch.zeros(heads * size))

    def forward(self, x: Tensor) -> Tensor:
        return head_norm(x, self.weight, self.bias, self.eps)
