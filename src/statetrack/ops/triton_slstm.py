"""sLSTM's recurrence on a GPU: one Triton kernel goes through all tokens forwards, and one backwards.

In PyTorch a token is a dozen launches each way; here all of T is one, and R and the states never leave the chip.
`kernels/slstm.py` has the kernels. Arguments and results are those of the operators in `statetrack.ops.slstm`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from statetrack.ops.triton_common import kernels, power_of_two, unavailable

_LARGEST_HEAD = 64
"""The most channels of a head: R is 16 N^2 bytes, which a multiprocessor must hold."""
_ROWS = 16  # of a program: as many as a tensor core takes at least, for as many programs as possible


def supports(gates: Tensor, recurrent: Tensor) -> str | None:
    """Why the kernels can't take these tensors, or None where they can."""
    if reason := unavailable(gates, recurrent):
        return reason
    if gates.dtype != torch.float32 or recurrent.dtype != torch.float32:
        return f"the kernels of sLSTM compute in float32, not {gates.dtype}"
    if recurrent.shape[1] > _LARGEST_HEAD:
        return f"the kernels of sLSTM serve heads of up to {_LARGEST_HEAD} channels, not {recurrent.shape[1]}"
    return None


def forward(
    gates: Tensor, recurrent: Tensor, h: Tensor, c: Tensor, n: Tensor, m: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    states = [gates.new_empty(gates.shape[0], *h.shape) for _ in range(4)]
    _launch("forward", gates, recurrent, h, c, n, m, *states)
    return states[0], states[1], states[2], states[3]


def backward(
    gates: Tensor,
    recurrent: Tensor,
    h_start: Tensor,
    c_start: Tensor,
    n_start: Tensor,
    m_start: Tensor,
    h: Tensor,
    c: Tensor,
    n: Tensor,
    m: Tensor,
    d_h: Tensor,
    d_c: Tensor,
    d_n: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    d_gates = gates.new_empty(gates.shape)
    d_starts = [gates.new_empty(x.shape) for x in (h_start, c_start, n_start)]
    h_before = torch.cat([h_start.unsqueeze(0), h[:-1]])
    seen = gates + h_before @ recurrent
    _launch("backward", seen, recurrent, c_start, n_start, m_start, h, c, n, m, d_h, d_c, d_n, d_gates, *d_starts)
    d_recurrent = torch.einsum("thbn,thbm->hnm", h_before, d_gates)
    return d_gates, d_recurrent, d_starts[0], d_starts[1], d_starts[2]


def _kernels() -> Any:
    return kernels("slstm")


def _launch(kernel: str, gates: Tensor, *tensors: Tensor) -> None:
    length, heads, batch, width = gates.shape
    with torch.cuda.device_of(gates):
        getattr(_kernels(), kernel)[(heads, -(-batch // _ROWS))](
            gates.contiguous(), *(x.contiguous() for x in tensors), length, heads, batch,
            N=width // 4, BN=power_of_two(width // 4), BB=_ROWS, PRECISION="tf32x3", num_warps=4, num_stages=1,
        )  # fmt: skip
