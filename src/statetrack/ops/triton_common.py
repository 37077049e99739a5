"""What the Triton backends share: why one can't run here, the operands of the tensor cores, and launch options.

Triton is imported by the first call of a kernel, not with the package. Tile sizes come from tables, so nothing is tuned
at run time.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

HAS_TRITON = find_spec("triton") is not None
LARGEST_KEY = 256
"""The most key channels of a state whose tiles fit a multiprocessor; value channels are cut."""

# "auto" leaves transitions to the chunked backends (priority 10) as long as a kernel has passed under Triton's
# interpreter alone: that does not show what the compiler makes of it, and Triton 3.4 to 3.7 is known to miscompile
# kernels like these on Hopper. `python -m benchmarks.ops_gpu_accuracy` on a card is the check; a kernel that has passed
# it there gets CHECKED_ON_A_CARD.
INTERPRETED_ONLY = 5
CHECKED_ON_A_CARD = 20


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable(*tensors: Tensor | None) -> str | None:
    """Why triton can't compute with these tensors here, or None where it can.

    On the device meta nothing is computed: there "auto" chooses as on a GPU, so that one can ask what a GPU would keep.
    """
    given = [x for x in tensors if x is not None]
    device = given[0].device
    if not HAS_TRITON and device.type != "meta":
        return "the package triton is not installed"
    if device.type not in ("cuda", "meta") and not interpreted():
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


@dataclass(frozen=True)
class Launch:
    """Launch options of one kernel, and the width of its tiles along the dimension that the kernel cuts."""

    block: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def power_of_two(x: int, least: int = 16) -> int:
    """The smallest tile that holds x numbers; a tensor core takes no fewer than 16."""
    return max(least, 1 << (x - 1).bit_length())


def operand_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of the tensor cores' operands: bfloat16 if all inputs are, else float32, whose products are tf32x3."""
    return torch.bfloat16 if all(x.dtype == torch.bfloat16 for x in tensors) else torch.float32


@cache
def processors(device: torch.device) -> int:
    """The number of multiprocessors."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def as_float32(x: Tensor) -> Tensor:
    return x.to(torch.float32).contiguous()
