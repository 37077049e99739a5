"""Floating-point operations of training a language model, and what a card could do at best: the two parts of MFU.

Model FLOPs utilization (MFU, arXiv 2204.02311) counts what the model asks for, not what its code does: activations that
are computed a second time, and the second time over of a chunked backward, don't count.
"""

from __future__ import annotations

import re

import torch

from statetrack.mixers import Mixer
from statetrack.model import LanguageModel, ModelConfig
from statetrack.transition import Discretized, Householder, LowRank

CHUNK = 64
"""Micro-steps of a chunk, as the kernels have it; the recurrences' operations are counted for it."""

# Dense bf16 matrix products with float32 sums, from the makers' data sheets: the first name that a card's has in it.
_PEAKS = (
    (r"GB200|GB300", 2.5e15),
    (r"B200|B300", 2.25e15),
    (r"H100 PCIe", 756e12),
    (r"H100 NVL", 835e12),
    (r"H100|H200|H800|GH200", 989.4e12),
    (r"H20\b", 148e12),
    (r"A100|A800", 312e12),
    (r"A10G", 70e12),
    (r"A10\b", 125e12),
    (r"A40\b", 149.7e12),
    (r"A30\b", 165e12),
    (r"RTX 6000 Ada", 364.2e12),
    (r"RTX A6000", 154.8e12),
    (r"L40S", 362e12),
    (r"L40\b", 181e12),
    (r"L4\b", 121e12),
    (r"RTX 5090", 209.5e12),
    (r"RTX 4090", 165.2e12),
    (r"RTX 3090\b", 71e12),
    (r"MI355X", 2.5e15),
    (r"MI325X|MI300X", 1307.4e12),
    (r"MI250X", 383e12),
    (r"MI250\b", 362.1e12),
)


def training_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Operations of the forward and the backward pass for a token, a multiplication and an addition being two.

    `3 (2 N + R)`: the backward pass has two products for each of the forward's. N is the number of parameters that meet
    every token: all but the embeddings and learned initial states, and the output layer also where that is the
    embeddings. R is what the mixers' recurrences add in the forward pass, for each head with a state of K x V numbers:

    - Householder products (the DeltaNet family) of N_h factors a token, in chunks of C = 64 factors as in
      `statetrack.ops.chunked_householder`. For each factor `2 C K` for k k^T, `C V` for the substitution, `4 K V` for
      what reads the state and what is written to it; for each token `2 C K + 2 C V` for (q k^T) u and `2 K V` for what
      the query reads;
    - diagonal and low-rank transitions (GLA, Mamba-2, RWKV), in chunks of C tokens: `2 C (K + V) + 4 K V`, and with a
      low-rank part `2 C (2 K + V) + 4 K V` more;
    - Mamba's selective scan, which is no matrix product: `7 K V` (step times A, exponential, decay times state, step
      times input along the write key, sum, and two for the read-out);
    - attention: `4 K` for every token that is seen, (T + 1) / 2 on average, or the window;
    - LSTMs: nothing, the recurrence is made of parameters.

    Args:
        config: the model's config.
        sequence_length: T, tokens of a sequence; C is at most T.
    """
    if sequence_length < 1:
        raise ValueError(f"sequence_length must be at least 1, got {sequence_length}")
    with torch.device("meta"):
        model = LanguageModel(config)
        recurrences = sum(_recurrence(m, config, sequence_length) for m in model.modules() if isinstance(m, Mixer))
    return 6.0 * parameters_per_token(model) + 3.0 * recurrences


def parameters_per_token(model: LanguageModel) -> int:
    """N, the parameters that meet every token: without embeddings and learned initial states, with the output layer."""
    embeddings = 0 if model.head is None else model.embedding.weight.numel()
    mixers = [module for module in model.modules() if isinstance(module, Mixer)]
    states = sum(p.numel() for mixer in mixers for p in mixer.initial_state_parameters())
    return model.num_parameters() - embeddings - states


def peak_flops(device: torch.device | str) -> float | None:
    """The dense bf16 operations a second that a device's maker promises; None for a CPU and for cards not known."""
    device = torch.device(device)
    return card_peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def card_peak_flops(name: str) -> float | None:
    """`peak_flops` of a card by the name that `torch.cuda.get_device_name` gives, `NVIDIA H100 80GB HBM3`."""
    return next((peak for pattern, peak in _PEAKS if re.search(rf"\b(?:{pattern})", name)), None)


def _recurrence(mixer: Mixer, config: ModelConfig, length: int) -> float:
    """R of a mixer: operations of the forward pass for a token."""
    if (own := mixer.recurrence_flops(length)) is not None:
        return own
    state = mixer.init_state(1).get("recurrence")
    if state is None:
        return 0.0
    transition = mixer.transition(torch.zeros(1, 1, config.d_model))
    _, heads, K, V = state.shape
    chunk = min(CHUNK, length)
    if isinstance(transition, Householder):
        factors = transition.k.shape[2]
        C = min(CHUNK, factors * length)
        return heads * (factors * (2 * C * K + C * V + 4 * K * V) + 2 * C * (K + V) + 2 * K * V)
    if isinstance(transition, Discretized):
        return heads * 7 * K * V
    products = 2 * chunk * (K + V) + 4 * K * V
    if isinstance(transition, LowRank):
        products += 2 * chunk * (2 * K + V) + 4 * K * V
    return heads * products
