"""Operations of a training step, against PyTorch's own counter."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from statetrack.mixers import mixer_configs
from statetrack.model import LanguageModel, ModelConfig
from statetrack.pretraining.flops import (
    CHUNK,
    card_peak_flops,
    parameters_per_token,
    peak_flops,
    training_flops_per_token,
)
from statetrack.pretraining.presets import preset

B, T = 2, 128


def model_config(name, **options):
    return ModelConfig(vocab_size=1000, d_model=256, num_layers=2, mlp_ratio=2, mixer=mixer_configs()[name](**options))


def counted(config):
    """The operations a token of the forward pass that PyTorch counts; recurrences are opaque to it."""
    with torch.device("meta"):
        model, ids = LanguageModel(config), torch.zeros(B, T, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            model(ids)
    return model, counter.get_total_flops() / (B * T)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["deltanet", "gated_deltanet", "deltaproduct", "mamba"])
def test_the_linear_layers_are_those_that_pytorch_counts(name, tied):
    config = ModelConfig(
        vocab_size=1000, d_model=256, num_layers=2, mlp_ratio=2, tie_embeddings=tied, mixer=mixer_configs()[name]()
    )
    model, flops = counted(config)
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    linear += model.output_weight.numel() if tied else 0
    assert flops == 2 * linear
    recurrence = training_flops_per_token(config, T) - training_flops_of_parameters(model)
    assert recurrence > 0
    # Norms, decays and the like are parameters too, but few.
    assert training_flops_of_parameters(model) == pytest.approx(3 * flops, rel=0.02)


def training_flops_of_parameters(model):
    embeddings = 0 if model.config.tie_embeddings else model.embedding.weight.numel()
    return 6 * (model.num_parameters() - embeddings)


def test_a_learned_initial_state_meets_no_token():
    config = model_config("homogeneous_deltaproduct", value_dim=512)
    model, flops = counted(config)
    states = sum(block.mixer.initial_state.numel() for block in model._blocks())
    assert states == 2 * 4 * 64 * 512
    assert parameters_per_token(model) == model.num_parameters() - model.embedding.weight.numel() - states
    assert 2 * parameters_per_token(model) == pytest.approx(flops, rel=0.02)


@pytest.mark.parametrize("factors", [1, 2])
def test_the_products_of_a_chunk_of_reflections(factors):
    """One chunk of the delta rule, written out; the substitution, which PyTorch doesn't count, is C V a factor."""
    heads, K, C = 4, 64, CHUNK
    config = model_config("deltaproduct", num_householder=factors, num_heads=heads)
    V, tokens = K, C // factors
    k, v, q = torch.zeros(heads, C, K), torch.zeros(heads, C, V), torch.zeros(heads, tokens, K)
    state = torch.zeros(heads, K, V)
    with FlopCounterMode(display=False) as counter:
        gram, u = k @ k.mT, v - k @ state
        o, after = q @ state + (q @ k.mT) @ u, state + k.mT @ u
    assert (gram.shape, o.shape, after.shape) == ((heads, C, C), (heads, tokens, V), (heads, K, V))
    recurrence = counter.get_total_flops() / tokens + heads * factors * C * V
    with torch.device("meta"):
        model = LanguageModel(config)
    added = training_flops_per_token(config, T) - training_flops_of_parameters(model)
    assert added == pytest.approx(3 * config.num_layers * recurrence)


@pytest.mark.parametrize("window", [None, 16])
def test_attention_is_counted_for_the_tokens_that_it_sees(window):
    config = model_config("attention", num_heads=4, window=window)
    with torch.device("meta"):
        model = LanguageModel(config)
    added = training_flops_per_token(config, T) - training_flops_of_parameters(model)
    seen = (T + 1) / 2 if window is None else window
    assert added == pytest.approx(3 * config.num_layers * 2 * 2 * 256 * seen)


@pytest.mark.parametrize("name", sorted(mixer_configs()))
def test_every_mixer_has_a_count_that_grows_only_where_attention_looks_further(name):
    config = model_config(name)
    short, long = (training_flops_per_token(config, length) for length in (256, 1024))
    assert short > 0
    assert (long > short) == (name == "attention")


def test_a_length_of_0_is_refused():
    with pytest.raises(ValueError, match="sequence_length must be at least 1, got 0"):
        training_flops_per_token(model_config("deltanet"), 0)


def test_large_models_take_about_six_operations_a_parameter():
    config = preset("deltanet-1.3b", vocab_size=32_000)
    assert training_flops_per_token(config, 2048) == pytest.approx(6 * 1.3e9, rel=0.05)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA B200", 2.25e15),
        ("Tesla T4", None),
    ],
)
def test_peaks_by_the_names_of_cards(name, peak):
    assert card_peak_flops(name) == peak


def test_a_cpu_has_no_peak():
    assert peak_flops("cpu") is None


def test_a_card_is_asked_for_its_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"NVIDIA {'H100 PCIe' if device.index else 'L4'}")
    assert peak_flops("cuda:1") == 756e12
