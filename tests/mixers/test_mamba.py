"""Mamba with its native range against the implementation in transformers, on the same weights."""

import pytest
import torch

from statetrack import Mamba

transformers = pytest.importorskip("transformers", reason="compares with transformers")


def original(d_model, **options):
    from transformers.models.mamba.configuration_mamba import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    names = {"state_size": "state_size", "expand": "expand", "conv_size": "conv_kernel", "dt_rank": "time_step_rank"}
    config = MambaConfig(hidden_size=d_model, **{names[name]: value for name, value in options.items()})
    return MambaMixer(config, layer_idx=0)


@pytest.mark.parametrize("options", [{}, {"state_size": 5, "expand": 3, "conv_size": 3, "dt_rank": 4}])
def test_outputs_and_gradients_equal_those_of_transformers(options):
    torch.manual_seed(0)
    theirs, ours = original(16, **options), Mamba(16, eigenvalue_range=(0, 1), **options)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 37, 16)
    weights = torch.randn(2, 37, 16)
    expected, actual = theirs(x), ours(x)
    assert torch.allclose(actual, expected, atol=1e-5, rtol=1e-5)
    (expected * weights).sum().backward()
    (actual * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert gradients.keys() == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        a, b = parameter.grad, gradients[name]
        assert a is not None, name
        assert b is not None, name
        assert (a - b).norm() <= 1e-4 * b.norm(), name


def test_the_widened_range_is_that_of_the_paper():
    """2 exp(dt A) - 1 in place of exp(dt A), everything else as it was: a loop written out from the parameters."""
    torch.manual_seed(0)
    mixer = Mamba(6, state_size=3, conv_size=0, eigenvalue_range=(-1, 1)).double()
    x = torch.randn(1, 11, 6, dtype=torch.float64)
    u, z = mixer.in_proj(x[0]).chunk(2, -1)
    u = torch.nn.functional.silu(u)
    low_rank, write, read = mixer.x_proj(u).split([mixer.dt_rank, 3, 3], -1)
    dt = torch.nn.functional.softplus(mixer.dt_proj(low_rank))
    a = -mixer.A_log.exp()
    state, outputs = torch.zeros(12, 3, dtype=torch.float64), []
    for t in range(11):
        state = (2 * torch.exp(dt[t, :, None] * a) - 1) * state + (dt[t] * u[t])[:, None] * write[t]
        outputs.append(state @ read[t] + mixer.D * u[t])
    expected = mixer.out_proj(torch.stack(outputs) * torch.nn.functional.silu(z))
    assert torch.allclose(mixer(x)[0], expected)
