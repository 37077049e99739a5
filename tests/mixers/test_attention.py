"""Attention against the layers of Llama and OLMo 2 in transformers, on the same weights."""

import pytest
import torch
from torch.nn import functional as F

from statetrack import Attention, mixer_config

transformers = pytest.importorskip("transformers", reason="compares with transformers")

SIZES = {"hidden_size": 24, "num_attention_heads": 4, "rms_norm_eps": 1e-5}


def llama(key_heads):
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    config = LlamaConfig(**SIZES, num_key_value_heads=key_heads, attn_implementation="eager")
    return LlamaAttention(config, layer_idx=0), LlamaRotaryEmbedding(config)


def olmo2(key_heads):
    from transformers.models.olmo2.configuration_olmo2 import Olmo2Config
    from transformers.models.olmo2.modeling_olmo2 import Olmo2Attention, Olmo2RotaryEmbedding

    config = Olmo2Config(**SIZES, num_key_value_heads=key_heads, attn_implementation="eager")
    return Olmo2Attention(config, layer_idx=0), Olmo2RotaryEmbedding(config)


def banded(length, window):
    """The mask that is added to the scores: 0 at the last `window` tokens up to each, else minus infinity."""
    distance = torch.arange(length)[:, None] - torch.arange(length)
    return torch.zeros(length, length).masked_fill((distance < 0) | (distance >= window), -torch.inf)


@pytest.mark.parametrize(("original", "qk_norm"), [(llama, False), (olmo2, True)])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("window", [None, 2, 5])
def test_outputs_and_gradients_equal_those_of_transformers(original, qk_norm, key_heads, window):
    torch.manual_seed(0)
    theirs, rotary = original(key_heads)
    ours = Attention(24, num_key_value_heads=key_heads, qk_norm=qk_norm, window=window)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours.load_state_dict(theirs.state_dict())
    x, weights = torch.randn(2, 37, 24), torch.randn(2, 37, 24)
    positions = rotary(x, torch.arange(37)[None])
    expected, _ = theirs(x, position_embeddings=positions, attention_mask=banded(37, window or 37))
    actual = ours(x)
    assert torch.allclose(actual, expected, atol=1e-5, rtol=1e-5)
    (expected * weights).sum().backward()
    (actual * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        a, b = parameter.grad, gradients[name]
        assert a is not None, name
        assert b is not None, name
        assert (a - b).norm() <= 1e-5 * b.norm(), name


def test_the_cache_holds_every_token_of_every_row_at_its_position():
    torch.manual_seed(0)
    mixer = Attention(8, num_heads=2).double()
    x = torch.randn(1, 7, 8, dtype=torch.float64)
    _, state = mixer.scan(x, None, torch.tensor([0, 5, 7]))
    assert state["length"].tolist() == [5, 2]
    _, state = mixer.scan(x[:, :2].expand(2, 2, 8), state)
    assert state["length"].tolist() == [7, 4]
    _, alone = mixer.scan(torch.cat([x[:, 5:], x[:, :2]], 1))
    assert torch.allclose(state["k"][1, :4], alone["k"][0])
    assert torch.allclose(state["v"][1, :4], alone["v"][0])


def test_attention_has_no_transition_and_no_range():
    mixer = Attention(8)
    assert mixer.transition(torch.randn(1, 3, 8)) is None
    assert mixer.config.spectrum() is None
    with pytest.raises(ValueError, match="attention has no eigenvalue_range: "):
        Attention(8, eigenvalue_range=(-1, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "num_heads = 3 must divide d_model = 8"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3 must divide num_heads = 4"),
        ({"head_dim": 3}, "head_dim must be even"),
        ({"window": 0}, "window of attention must be a positive integer"),
        ({"rope_theta": 0.0}, "rope_theta must be a positive number"),
    ],
)
def test_a_wrong_option_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        mixer_config("attention")(**options).build(8)


LENGTHS = [300, 2, 31, 5, 120, 9, 14, 77, 1, 40]  # as rows of the longest they would have five times the tokens


@pytest.mark.parametrize("window", [None, 16])
def test_attention_hardly_pads_documents(window, monkeypatch):
    attend, calls = F.scaled_dot_product_attention, []

    def counted(q, *args, **kwargs):
        calls.append(q.shape[0] * q.shape[2])
        return attend(q, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    mixer = Attention(8, num_heads=2, window=window)
    mixer(torch.randn(1, sum(LENGTHS), 8), torch.tensor([0, *LENGTHS]).cumsum(0))
    assert sum(LENGTHS) <= sum(calls) <= 1.5 * sum(LENGTHS)
