"""Mamba-2 with its native range against the implementation in transformers, on the same weights."""

import pytest
import torch
from torch.nn import functional as F

from statetrack import Mamba2

transformers = pytest.importorskip("transformers", reason="compares with transformers")


def original(d_model, **options):
    from transformers.models.mamba2.configuration_mamba2 import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    options = {"num_heads": 4, "state_size": 64, "n_groups": 1, "expand": 2, "conv_size": 4} | options
    limit = (options.pop("dt_min", 0.0), options.pop("dt_max", float("inf")))
    config = Mamba2Config(
        hidden_size=d_model,
        head_dim=options["expand"] * d_model // options["num_heads"],
        conv_kernel=options.pop("conv_size"),
        time_step_limit=limit,
        chunk_size=16,
        num_hidden_layers=1,
        **options,
    )
    return Mamba2Mixer(config, layer_idx=0)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_heads": 6, "state_size": 5, "n_groups": 3, "expand": 3, "conv_size": 3, "dt_min": 0.02, "dt_max": 0.06}],
)
def test_outputs_and_gradients_equal_those_of_transformers(options):
    torch.manual_seed(0)
    theirs, ours = original(16, **options), Mamba2(16, eigenvalue_range=(0, 1), **options)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours.load_state_dict(theirs.state_dict())
    x, weights = torch.randn(2, 37, 16), torch.randn(2, 37, 16)
    expected, actual = theirs(x), ours(x)
    assert (actual - expected).norm() <= 1e-5 * expected.norm()
    (expected * weights).sum().backward()
    (actual * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert gradients.keys() == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        actual, expected = parameter.grad, gradients[name]
        assert actual is not None, name
        assert expected is not None, name
        assert (actual - expected).norm() <= 1e-5 * expected.norm(), name


def test_the_widened_range_is_that_of_the_paper():
    """2 exp(dt A) - 1 in place of exp(dt A), everything else as it was: a loop written out from the parameters."""
    torch.manual_seed(0)
    mixer = Mamba2(6, num_heads=2, state_size=3, conv_size=0, eigenvalue_range=(-1, 1)).double()
    x = torch.randn(1, 11, 6, dtype=torch.float64)
    z, u, write, read, r = mixer.in_proj(x[0]).split([12, 12, 3, 3, 2], -1)
    u, write, read = F.silu(u).view(11, 2, 6), F.silu(write), F.silu(read)
    dt, a = F.softplus(r + mixer.dt_bias), -mixer.A_log.exp()
    state, outputs = torch.zeros(2, 6, 3, dtype=torch.float64), []
    for t in range(11):
        decay = 2 * torch.exp(dt[t] * a) - 1
        state = decay[:, None, None] * state + (dt[t, :, None] * u[t])[:, :, None] * write[t]
        outputs.append((state @ read[t] + mixer.D[:, None] * u[t]).flatten())
    y = torch.stack(outputs) * F.silu(z)
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight
    assert torch.allclose(mixer(x)[0], mixer.out_proj(y))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "must be expand \\* d_model = 32, got num_heads = 5"),
        ({"head_dim": 4}, "must be expand \\* d_model = 32, got num_heads = 4, head_dim = 4"),
        ({"n_groups": 3}, "n_groups = 3 must divide num_heads = 4"),
        ({"dt_min": 0.2, "dt_max": 0.1}, "0 <= dt_min < dt_max"),
        ({"gate_gain": 0.0}, "gate_gain must be a positive number"),
    ],
)
def test_a_wrong_option_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Mamba2(16, **options)
