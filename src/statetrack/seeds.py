"""Random streams that don't depend on what was drawn before, so that a run can go on from any step."""

from __future__ import annotations

import zlib

import numpy as np
import torch


def number(purpose: str, *key: int) -> int:
    """A seed determined by what it is for and by a key, such as ("training data", seed, step).

    Streams with different purposes or keys are independent. The key's numbers are non-negative.
    """
    sequence = np.random.SeedSequence([zlib.crc32(purpose.encode()), *key])
    return int(sequence.generate_state(1, np.uint64)[0]) >> 1


def generator(purpose: str, *key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose seed is `number` of the same purpose and key."""
    return torch.Generator(device).manual_seed(number(purpose, *key))
