"""GLA with its native range against flash-linear-attention's step loops, the widened range against one of our own."""

import pytest
import torch
from fla_naive import assert_alike, naive
from torch.nn import functional as F

from statetrack import GLA


def layer_with(recurrence, mixer, x):
    """The layer of flash-linear-attention around its function for the recurrence, which takes log decays."""
    b, t, _ = x.shape
    q, k, v = (
        projection(x).view(b, t, mixer.config.num_heads, -1)
        for projection in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    )
    log_decay = F.logsigmoid(mixer.gk_proj[1](mixer.gk_proj[0](x))) / 16
    o = recurrence(q, k, v, log_decay if mixer.config.decay == "head" else log_decay.view_as(k))[0]
    o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-5) * mixer.g_norm.weight
    return mixer.o_proj(o.flatten(2) * F.silu(mixer.g_proj(x)))


@pytest.mark.parametrize("options", [{}, {"num_heads": 2, "head_dim": 5, "value_dim": 3, "rank": 4}])
@pytest.mark.parametrize("decay", ["channel", "head"])
def test_outputs_and_gradients_equal_those_of_flash_linear_attention(options, decay):
    torch.manual_seed(0)
    recurrence = (
        naive("gla").naive_recurrent_gla if decay == "channel" else naive("simple_gla").naive_recurrent_simple_gla
    )
    mixer = GLA(16, eigenvalue_range=(0, 1), decay=decay, **options)
    with torch.no_grad():
        mixer.gk_proj[1].weight.mul_(20)  # so that gates are not all near 1
        mixer.g_norm.weight.add_(0.1 * torch.randn_like(mixer.g_norm.weight))
    x = torch.randn(2, 37, 16, requires_grad=True)
    assert_alike(mixer, lambda x: layer_with(recurrence, mixer, x), x, mixer)


def test_the_widened_range_is_that_of_the_paper():
    """2 g - 1 in place of the gate g: a loop written out from the parameters."""
    torch.manual_seed(0)
    mixer = GLA(
        6, num_heads=1, head_dim=4, value_dim=3, rank=2, gate_normalizer=1, gate_gain=3, eigenvalue_range=(-1, 1)
    ).double()
    x = torch.randn(1, 11, 6, dtype=torch.float64)
    q, k, v = mixer.q_proj(x[0]), mixer.k_proj(x[0]), mixer.v_proj(x[0])
    assert mixer.g_norm is not None
    assert mixer.g_proj is not None
    down, up, bias = mixer.gk_proj.parameters()
    g = torch.sigmoid(3 * (x[0] @ down.T @ up.T + bias))
    assert (2 * g - 1).min() < 0
    state, outputs = torch.zeros(4, 3, dtype=torch.float64), []
    for t in range(11):
        state = (2 * g[t] - 1)[:, None] * state + k[t][:, None] * v[t]
        outputs.append(q[t] @ state / 2)
    o = torch.stack(outputs)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.g_norm.weight
    assert torch.allclose(mixer(x)[0], mixer.o_proj(o * F.silu(mixer.g_proj(x[0]))))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "2 num_heads = 6 must divide d_model = 16"),
        ({"decay": "scalar"}, "decay must be channel or head"),
        ({"gate_normalizer": 0}, "gate_normalizer must be a positive number"),
        ({"gate_gain": float("inf")}, "gate_gain must be a positive number"),
    ],
)
def test_a_wrong_option_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GLA(16, **options)
