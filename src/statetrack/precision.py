"""How precisely matrix products are computed in training, beside weights that are float32 in any case."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Precision = Literal["float32", "bfloat16"]
"""Of matrix products and activations; bfloat16 is by autocast."""

PrecisionOnTask = Literal["float32", "tf32", "bfloat16"]
"""The same, and TF32: float32 numbers, of which a GPU multiplies the first 11 bits."""


def check_precision(precision: str, kinds: Any = Precision) -> None:
    """Raises ValueError unless `precision` is one of the words of `kinds`."""
    if precision not in get_args(kinds):
        *words, last = get_args(kinds)
        raise ValueError(f"precision must be {', '.join(words)} or {last}, got {precision!r}")


def check_device(precision: str, device: torch.device) -> None:
    """Raises ValueError where a device can't compute with a precision."""
    if precision == "tf32" and device.type != "cuda":
        raise ValueError(f"precision = tf32 needs an NVIDIA GPU, and this is training on {device}; choose float32")
    if precision == "bfloat16" and device.type not in _HAVE_AUTOCAST:
        raise ValueError(f"precision = bfloat16 needs autocast, which PyTorch lacks on {device}; choose float32")
    if precision != "float32" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        raise ValueError(
            f"precision = {precision} needs a GPU of compute capability 8.0, and {torch.cuda.get_device_name(device)} "
            "is older; choose float32"
        )


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """What a forward pass happens in: matrix products in bfloat16 if that is the precision.

    Weights are rounded anew wherever they are used. A copy that is kept would be as old as a CUDA graph, or as the
    outermost autocast around this one.
    """
    if precision != "bfloat16":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)


@contextmanager
def products(precision: str) -> Iterator[None]:
    """What forward and backward passes happen in: float32 products in TF32 if that is the precision.

    PyTorch knows this setting for the whole process only: it is as before once the block ends, and holds for other
    threads until then. A captured CUDA graph keeps the one under which it was captured.
    """
    if precision != "tf32":
        yield
        return
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "tf32"
    try:
        yield
    finally:
        settings.fp32_precision = before


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products of `x`: that of autocast where it is on, else its own."""
    # Autocast leaves float64 alone.
    return torch.get_autocast_dtype(x.device.type) if autocasts(x) and x.dtype != torch.float64 else x.dtype


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on where `x` is."""
    return x.device.type in _HAVE_AUTOCAST and torch.is_autocast_enabled(x.device.type)


# Looked up once: torch.compile of torch 2.11 can't trace the question.
_HAVE_AUTOCAST = frozenset(d for d in ("cpu", "cuda", "mps", "xpu", "hpu") if torch.amp.is_autocast_available(d))
