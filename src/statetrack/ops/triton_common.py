"""What the Triton backends share: why one can't run here, the operands of the tensor cores, and launch options.

Triton is imported by the first call of a kernel, not with the package. Tile sizes come from tables, so nothing is tuned
at run time.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from statetrack.ops import triton_ahead
from statetrack.ops.triton_assembler import use_newer_assembler

HAS_TRITON = find_spec("triton") is not None
LARGEST_KEY = 256
"""The most key channels of a state whose tiles fit a multiprocessor; value channels are cut."""

# "auto" takes kernels that have been checked and timed on a card, before the chunked backends (priority 10), and leaves
# others to those who ask for them. What passes in Triton's interpreter need not be what the compiler and the assembler
# make of it: `python -m benchmarks.ops accuracy` and `pytest -m gpu tests/ops` are the checks.
ON_REQUEST = 5
CHECKED_ON_A_CARD = 20

# Of segments of time that are scanned at once: fewer don't pay, nor do shorter ones (in chunks). Measured on an H100
# for Householder products.
_FEWEST_SEGMENTS = 4
_SHORTEST_SEGMENT = 8


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@contextmanager
def assuming_a_gpu() -> Iterator[None]:
    """Lets "auto" choose as on a GPU, for tensors without numbers (`FakeTensorMode`): to see what a GPU would keep."""
    global _assuming_a_gpu
    before, _assuming_a_gpu = _assuming_a_gpu, True
    try:
        yield
    finally:
        _assuming_a_gpu = before


_assuming_a_gpu = False


def unavailable(*tensors: Tensor | None) -> str | None:
    """Why triton can't compute with these tensors here, or None where it can."""
    given = [x for x in tensors if x is not None]
    device = given[0].device
    if not _assuming_a_gpu:
        if not HAS_TRITON:
            return "the package triton is not installed"
        if device.type != "cuda" and not interpreted():
            return f"triton serves tensors on a CUDA device, not on {device} (or anywhere with TRITON_INTERPRET=1)"
    if any(x.dtype == torch.float64 for x in given):
        return "backend 'triton' computes in float32 and does not serve float64"
    return None


def check_inputs(q: Tensor, v: Tensor, *others: Tensor | None) -> None:
    """Raises ValueError for what `supports`, which sees the transition alone, can't know."""
    if any(x is not None and x.dtype == torch.float64 for x in (q, v, *others)):
        raise ValueError(
            "backend 'triton' computes in float32: give q, v, write and initial_state in float32 or a shorter dtype"
        )
    if q.shape[-1] > LARGEST_KEY:
        raise ValueError(f"backend 'triton' serves keys of up to {LARGEST_KEY} channels, got {q.shape[-1]}")


def kernels(*modules: str) -> Any:
    """The functions of `kernels/<module>.py`, in one namespace; imports triton."""
    found = _kernels(*modules)
    return triton_ahead.visitors(found) if triton_ahead.is_visited() else found


_preparing = threading.Lock()


@cache
def _kernels(*modules: str) -> Any:
    found: dict[str, Any] = {}
    for module in modules:
        found |= vars(import_module(f"statetrack.ops.kernels.{module}"))
    with _preparing:  # or two threads that need the same kernels first would wrap them twice
        for kernel in found.values():
            use_newer_assembler(kernel)
            triton_ahead.compile_ahead(kernel)
    return SimpleNamespace(**found)


@dataclass(frozen=True)
class Launch:
    """Launch options of one kernel, and the width of its tiles along the dimension that the kernel cuts."""

    block: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}

    @property
    def by_thread(self) -> dict[str, int]:
        """Of a kernel whose threads have `EACH` channels for themselves, and no channel is another's too."""
        threads = 32 * self.num_warps
        return {"THREADS": threads, "EACH": self.block // threads, **self.options}


def power_of_two(x: int, least: int = 16) -> int:
    """The smallest tile that holds x numbers; a tensor core takes no fewer than 16."""
    return max(least, 1 << (x - 1).bit_length())


def operand_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of the tensor cores' operands: bfloat16 if all inputs are, else float32, whose products are tf32x3."""
    return torch.bfloat16 if all(x.dtype == torch.bfloat16 for x in tensors) else torch.float32


def processors(device: torch.device) -> int:
    """The number of multiprocessors, which also those tensors have that stand for others in `triton_ahead`."""
    if device.type == "meta" and triton_ahead.is_visited():
        device = torch.device("cuda", torch.cuda.current_device())
    return multiprocessors(device)


@cache
def multiprocessors(device: torch.device) -> int:
    """The same, of a device that is not "meta"."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def segments(chunks: int, programs: int, device: torch.device) -> tuple[int, int]:
    """How many segments the chunks are cut into, to be scanned at once, and how many chunks each has.

    Segments cost a scan two or three times the work, so there is only one where programs fill the device by themselves.

    Args:
        programs: that walk through one segment each.
    """
    count = processors(device) // programs
    if count < _FEWEST_SEGMENTS:
        return 1, chunks
    length = max(_SHORTEST_SEGMENT, -(-chunks // count))
    # A backward finds the length again from the number of segments.
    count = -(-chunks // length)
    return count, -(-chunks // count)


def join_segments(maps: Tensor, ends: Tensor, border: Tensor | None, *, reverse: bool) -> Tensor:
    """The states between segments, [rows, segments, V, K].

    Args:
        maps: the segments' transitions, transposed, [rows, segments, K, K], or [rows, segments, K] if diagonal.
        ends: what a state of zeros becomes in each segment, [rows, segments, V, K].
        border: the state [B, H, K, V] before the first segment, or with `reverse` its gradient after the last.
    """
    rows, count, value_dim, key_dim = ends.shape
    diagonal = maps.ndim == 3
    block_v = min(16, power_of_two(value_dim))
    borders = torch.empty_like(ends)
    kernels("segments").join_segments[(rows, -(-value_dim // block_v))](
        maps, ends, border, borders, count,
        K=key_dim, V=value_dim, BK=power_of_two(key_dim), BV=block_v,
        DIAGONAL=diagonal, BORDER=border is not None, REVERSE=reverse, num_warps=4, num_stages=1,
    )  # fmt: skip
    return borders


def sum_parts(parts: Tensor, like: Tensor) -> Tensor:
    """The sum of the parts [R, count, ...], float32, of a gradient that has the shape and dtype of `like`.

    PyTorch's own sum over an axis that is not the last one has one thread for each number of a gradient this small.
    """
    total = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    sets, count, numbers = parts.shape[0], parts.shape[1], parts.shape[2:].numel()
    if total.numel():
        with torch.cuda.device_of(parts):
            kernels("parts").sum_parts[(-(-numbers // _SUMMED), sets)](
                parts, total, count, N=numbers, BP=256, BN=_SUMMED, num_warps=8
            )
    return total


_SUMMED = 16
"""Numbers of a gradient that a program sums: few, as programs are few; 64 bytes, which memory is read in."""


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def as_float32(x: Tensor) -> Tensor:
    return x.to(torch.float32).contiguous()
