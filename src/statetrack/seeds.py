"""Random streams that don't depend on what was drawn before, so that a run can go on from any step."""

from __future__ import annotations

import zlib

import numpy as np
import torch


def generator(purpose: str, *key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator determined by what it is for and by a key, such as ("training data", seed, step).

    Streams with different purposes or keys are independent. The key's numbers are non-negative.
    """
    sequence = np.random.SeedSequence([zlib.crc32(purpose.encode()), *key])
    return torch.Generator(device).manual_seed(int(sequence.generate_state(1, np.uint64)[0]) >> 1)
