"""sLSTM's recurrence on a GPU: one Triton kernel goes through all tokens forwards, and one backwards.

In PyTorch a token is a dozen launches each way; here all of T is one, and R and the states never leave the chip.
`kernels/slstm.py` has the kernels. Arguments and results are those of the operators in `statetrack.ops.slstm`, but that
`gates` are [4, G B, T, H, N] and have what h adds to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from statetrack.ops.triton_common import contiguous, kernels, power_of_two, sum_parts, unavailable

LARGEST_HEAD = 64
"""The most channels of a head: R is 16 N^2 bytes, which a multiprocessor must hold."""
_NARROW_HEAD = 32  # up to which four warps have the registers for it
_ROWS = 16  # of a program: as many as a tensor core takes at least, for as many programs as possible
# The gradients of R and of the bias are summed over tiles of so many tokens, in so many parts of a head at most.
_TOKENS, _MOST_PARTS = 32, 16


def supports(inputs: Sequence[Tensor], recurrent: Tensor) -> str | None:
    """Why the kernels can't take these tensors, or None where they can."""
    if reason := unavailable(*inputs, recurrent):
        return reason
    if recurrent.dtype != torch.float32:
        return f"the kernels of sLSTM compute in float32, not {recurrent.dtype}"
    if recurrent.shape[-2] > LARGEST_HEAD:
        return f"the kernels of sLSTM serve heads of up to {LARGEST_HEAD} channels, not {recurrent.shape[-2]}"
    return None


def forward(
    z: Tensor, i: Tensor, f: Tensor, o: Tensor,
    bias: Tensor, recurrent: Tensor, h: Tensor, c: Tensor, n: Tensor, m: Tensor, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    results = empty_states(z, i, f, o, bias, recurrent, h, c, n, m, save)
    *states, tape = results
    with torch.cuda.device_of(recurrent):
        arguments, constants = _sizes(z, recurrent)
        _kernels().forward[(recurrent.shape[0] * recurrent.shape[1], _programs(z, recurrent))](
            *_contiguous(z, i, f, o, bias, recurrent, h, c, n, m), *states, tape[0] if save else None, *arguments,
            **constants, BB=_ROWS, SAVE=save,
        )  # fmt: skip
    return results


def empty_states(
    z: Tensor, i: Tensor, f: Tensor, o: Tensor,
    bias: Tensor, recurrent: Tensor, h: Tensor, c: Tensor, n: Tensor, m: Tensor, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    states = [recurrent.new_empty(z.shape) for _ in range(4)]
    return states[0], states[1], states[2], states[3], [recurrent.new_empty(4, *z.shape)] if save else []


def backward(
    gates: Tensor, recurrent: Tensor, h_start: Tensor, c_start: Tensor, n_start: Tensor, m_start: Tensor,
    h: Tensor, c: Tensor, n: Tensor, m: Tensor, d_h: Tensor, d_c: Tensor | None, d_n: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    groups, heads, size, width = recurrent.shape
    d_inputs = [h.new_empty(h.shape, dtype=dtype) for _ in range(4)]
    d_starts = [h_start.new_empty(h_start.shape) for _ in range(3)]
    d_gates = torch.empty_like(gates)
    tokens = h.shape[0] // groups * h.shape[1]
    count = min(_MOST_PARTS, -(-tokens // _TOKENS))
    parts = h.new_empty(groups * heads, count, size + 1, width)
    with torch.cuda.device_of(recurrent):
        arguments, constants = _sizes(h, recurrent)
        _kernels().backward[(groups * heads, _programs(h, recurrent))](
            gates, *_contiguous(recurrent, c_start, n_start, m_start, h, c, n, m, d_h, d_c, d_n),
            *d_inputs, d_gates, *d_starts, *arguments,
            **constants, BB=_ROWS, C=d_c is not None, NORMALIZER=d_n is not None,
        )  # fmt: skip
        _kernels().parameters[(groups * heads, count, 4)](
            *_contiguous(h_start, h),
            d_gates,
            parts,
            *arguments,
            BP=_TOKENS,
            **constants | ({"num_warps": 2} if size <= _NARROW_HEAD else {}),
        )
    sums = sum_parts(parts, h.new_empty(groups, heads, size + 1, width))
    d_recurrent, d_bias = (x.clone(memory_format=torch.contiguous_format) for x in sums.split([size, 1], 2))
    return (
        *(d_inputs[0], d_inputs[1], d_inputs[2], d_inputs[3]),
        *(d_bias.squeeze(2), d_recurrent),
        *(d_starts[0], d_starts[1], d_starts[2]),
    )


def _kernels() -> Any:
    return kernels("slstm")


def _programs(x: Tensor, recurrent: Tensor) -> int:
    """Of one head, for the rows of one group of `x` [G B, T, H, N]."""
    return -(-x.shape[0] // recurrent.shape[0] // _ROWS)


def _sizes(x: Tensor, recurrent: Tensor) -> tuple[tuple[int, ...], dict[str, Any]]:
    """The last arguments of every kernel, and the constants that all have, for `x` [G B, T, H, N]."""
    groups, heads, size, _ = recurrent.shape
    constants = {"N": size, "BN": power_of_two(size), "PRECISION": "tf32x3"}
    options = {"num_warps": 4 if size <= _NARROW_HEAD else 8, "num_stages": 1}
    return (x.shape[1], heads, x.shape[0] // groups, x.shape[0]), constants | options


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [contiguous(x) for x in tensors]
