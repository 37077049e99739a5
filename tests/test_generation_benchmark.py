"""The benchmark of generation: what it says of memory is what it claims of the models."""

import torch

from benchmarks.generation import measure, models


def test_a_state_keeps_its_size_and_a_cache_grows():
    made = models(64, 1, 32, "cpu", torch.float32)
    short, long = (measure(made, length, "cpu", 1) for length in (8, 24))
    for name in ("deltanet", "mamba"):
        assert long[name]["state_mb"] == short[name]["state_mb"] > 0
    for name in ("attention", "llama (transformers)"):
        # Keys and values of 64 numbers each, of four bytes, for each token.
        assert round(1e6 * (long[name]["state_mb"] - short[name]["state_mb"]), -3) == 8000
    assert all(row["ms_per_token"] > 0 for row in (*short.values(), *long.values()))
