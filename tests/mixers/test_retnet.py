"""RetNet against flash-linear-attention's parallel form, with the rotary positions of transformers."""

import pytest
import torch
from fla_naive import assert_alike, naive
from torch import nn
from torch.nn import functional as F

from statetrack import RetNet, RetNetConfig
from statetrack.config import read_mixer


def layer_with(retention, mixer, x):
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama", reason="compares with transformers")
    b, t, _ = x.shape
    q, k, v = (
        projection(x).view(b, t, mixer.config.num_heads, -1).transpose(1, 2)
        for projection in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    )
    frequencies = 10000.0 ** -(torch.arange(0, q.shape[-1], 2) / q.shape[-1])
    angles = torch.arange(t)[None, :, None] * torch.cat([frequencies, frequencies])
    q, k = modeling.apply_rotary_pos_emb(q, k, angles.cos(), angles.sin())
    o = retention(q, k, v).transpose(1, 2)
    norm = nn.GroupNorm(o.shape[2], o.shape[2] * o.shape[3])
    norm.weight, norm.bias = mixer.g_norm.weight, mixer.g_norm.bias
    o = norm(o.reshape(b * t, -1)).view(b, t, -1)
    return mixer.o_proj(o * F.silu(mixer.g_proj(x)))


@pytest.mark.parametrize("options", [{}, {"num_heads": 2, "head_dim": 6, "value_dim": 5}])
def test_outputs_and_gradients_equal_those_of_flash_linear_attention(options):
    torch.manual_seed(0)
    retention, mixer = naive("retention").naive_retention, RetNet(16, **options)
    with torch.no_grad():
        for parameter in mixer.g_norm.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(2, 37, 16, requires_grad=True)
    assert_alike(mixer, lambda x: layer_with(retention, mixer, x), x, mixer)


def test_positions_far_out_are_as_exact_as_the_first_ones():
    """The output norm apart, retention depends on distances between tokens alone."""
    mixer, x = RetNet(16), torch.randn(1, 20, 16)
    state = mixer.init_state(1)
    expected, _ = mixer.scan(x, state)
    actual, after = mixer.scan(x, state | {"position": torch.tensor([1_000_000])})
    assert torch.allclose(actual, expected, atol=1e-5)
    assert after["position"].tolist() == [1_000_020]


def test_decays_are_those_of_the_paper():
    transition = RetNet(16).transition(torch.randn(2, 3, 16))
    assert torch.equal(transition.decay, torch.tensor([31 / 32, 63 / 64, 127 / 128, 255 / 256]).expand(2, 3, 4))


@pytest.mark.parametrize(
    "make",
    [
        lambda: RetNet(16, eigenvalue_range=(-1, 1)),
        lambda: RetNet(16, learn_lower_end=True),
        lambda: read_mixer({"name": "retnet", "eigenvalue_range": [-1, 1]}),
    ],
)
def test_a_range_is_refused_and_the_reason_given(make):
    with pytest.raises(
        ValueError, match="fixed positive numbers that depend on no token, so there is no gate to widen"
    ):
        make()
    assert RetNetConfig().spectrum().lo > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "num_heads = 3 must divide d_model = 16"),
        ({"head_dim": 5}, "rotary positions need an even head_dim, got 5"),
        ({"rotary_base": -1}, "rotary_base must be a positive number"),
        ({"gate": True}, "unknown option gate for retnet"),
    ],
)
def test_a_wrong_option_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RetNet(16, **options)
