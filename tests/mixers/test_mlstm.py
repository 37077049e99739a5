"""mLSTM with its native range against the implementation in transformers, on the same weights."""

import pytest
import torch

from statetrack import MLSTM
from statetrack.mixers.mlstm import _stabilizers


def original(d_model, num_heads, qk_dim_factor, v_dim_factor):
    modeling = pytest.importorskip("transformers.models.xlstm.modeling_xlstm", reason="compares with transformers")
    from transformers.models.xlstm.configuration_xlstm import xLSTMConfig

    if modeling.external_xlstm:
        pytest.skip("compares with the layer in transformers, which steps aside for the package xlstm")
    config = xLSTMConfig(
        hidden_size=d_model,
        num_heads=num_heads,
        qk_dim_factor=qk_dim_factor,
        v_dim_factor=v_dim_factor,
        chunk_size=16,
        mode="train",
        return_last_states=True,
        autocast_kernel_dtype="float32",
    )
    return modeling.xLSTMLayer(config)


@pytest.mark.parametrize(("num_heads", "qk_dim_factor", "v_dim_factor"), [(4, 0.5, 1.0), (2, 1.0, 0.5)])
def test_outputs_and_gradients_equal_those_of_transformers(num_heads, qk_dim_factor, v_dim_factor):
    torch.manual_seed(0)
    theirs = original(16, num_heads, qk_dim_factor, v_dim_factor)
    ours = MLSTM(
        16,
        eigenvalue_range=(0, 1),
        num_heads=num_heads,
        head_dim=int(16 * qk_dim_factor) // num_heads,
        value_dim=int(16 * v_dim_factor) // num_heads,
    )
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    ours.load_state_dict(theirs.state_dict())
    x, weights = torch.randn(2, 48, 16), torch.randn(2, 48, 16)
    expected, actual = theirs(x)[0], ours(x)
    assert (actual - expected).norm() <= 1e-5 * expected.norm()
    (expected * weights).sum().backward()
    (actual * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert gradients.keys() == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        # Scaling all input gates alike hardly changes h: the gradient of their bias is what larger numbers leave when
        # they cancel, in their code as in ours.
        scale = gradients["igate_preact.weight" if name == "igate_preact.bias" else name].norm()
        assert (parameter.grad - gradients[name]).norm() <= 2e-5 * scale, name


def test_the_widened_range_is_that_of_the_paper():
    """2 f - 1 in place of the forget gate f: a loop written out from the parameters, without any stabilizer."""
    torch.manual_seed(0)
    mixer = MLSTM(6, num_heads=1, gate_gain=3, input_bias=0, forget_bias=0, output_norm=False).double()
    with torch.no_grad():
        for gate in (mixer.fgate_preact, mixer.igate_preact):
            gate.weight.normal_()
    x = torch.randn(1, 11, 6, dtype=torch.float64)
    q, k, v = mixer.q(x[0]) * 3**-0.5, mixer.k(x[0]), mixer.v(x[0])
    f = 2 * torch.sigmoid(15 * torch.tanh(3 * mixer.fgate_preact(x[0]) / 15)) - 1
    i = torch.exp(15 * torch.tanh(mixer.igate_preact(x[0]) / 15))
    assert f.min() < 0
    memory, normalizer, outputs = torch.zeros(3, 6, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), []
    for t in range(11):
        memory = f[t] * memory + i[t] * k[t][:, None] * v[t]
        normalizer = f[t] * normalizer + i[t] * k[t]
        outputs.append(q[t] @ memory / max(abs(q[t] @ normalizer), 1))
    expected = mixer.out_proj(torch.stack(outputs) * torch.sigmoid(mixer.ogate_preact(x[0])))
    assert torch.allclose(mixer(x)[0], expected, rtol=1e-4)


def test_the_stabilizer_in_parallel_is_the_recursion():
    torch.manual_seed(0)
    forget, log_input = 2 * torch.rand(2, 30, 3).double() - 1, 5 * torch.randn(2, 30, 3).double()
    forget[0, 7], forget[1, 9], m = 0, 1, torch.randn(2, 3).double()
    before, after, last = _stabilizers(forget, log_input, m, None)
    for t in range(30):
        assert torch.allclose(before[:, t], m)
        m = torch.maximum(forget[:, t].abs().log().clamp(min=-80) + m, log_input[:, t])
        assert torch.allclose(after[:, t], m)
    assert torch.allclose(last, m)


@pytest.mark.parametrize("gate", [-1.0, 0.0, 1.0])
def test_gradients_are_finite_where_the_forget_gate_is_at_an_end_or_0(gate):
    torch.manual_seed(0)
    mixer = MLSTM(8, num_heads=1, forget_bias=0, input_bias=0, gate_soft_cap=40)
    with torch.no_grad():
        mixer.fgate_preact.bias.fill_(1000 * gate)
    x = torch.randn(2, 40, 8, requires_grad=True)
    assert (mixer.transition(x).decay == gate).all()
    mixer(x).square().sum().backward()
    for parameter in (x, *mixer.parameters()):
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "2 num_heads = 6 must divide d_model = 16"),
        ({"gate_soft_cap": 0}, "gate_soft_cap must be a positive number"),
        ({"forget_bias": float("nan")}, "biases must be finite"),
    ],
)
def test_a_wrong_option_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MLSTM(16, **options)
