"""RWKV-6 with its native range against the authors' package, as recorded by tests/fixtures/record_rwkv.py."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from statetrack import RWKV6

RECORDED = load_file(Path(__file__).parents[1] / "fixtures" / "rwkv6.safetensors")

# Ours by the package's names. Its matrices are used as x @ W, ours as x @ W^T.
MATRICES = {f"{c}w": f"{c}_proj.weight" for c in "rkvgo"} | {"tm_w1": "mix_down.weight"}
MATRICES |= {"td_w1": "w_map.down.weight", "td_w2": "w_map.up.weight"}
OTHERS = {"x_maa": "mix_x", "tm_w2": "mix_up", "t_decay": "w_map.bias", "t_first": "bonus"}
OTHERS |= {"lx_w": "o_norm.weight", "lx_b": "o_norm.bias"}


def as_ours(kind, mixer):
    theirs = {key.removeprefix(f"{kind}."): x for key, x in RECORDED.items() if key.startswith(f"{kind}.")}
    ours = {"mix": torch.stack([theirs.pop(f"{c}_maa") for c in "wkvrg"])}
    ours |= {name: theirs.pop(key).T for key, name in MATRICES.items()}
    ours |= {name: theirs.pop(key) for key, name in OTHERS.items()}
    assert not theirs
    return {name: ours.pop(name).reshape(parameter.shape) for name, parameter in mixer.named_parameters()}


def layer(**options):
    mixer = RWKV6(12, num_heads=3, shift_rank=5, decay_rank=5, **options)
    mixer.load_state_dict(as_ours("weight", mixer))
    return mixer


def relative(actual, expected):
    return (actual - expected).norm() / expected.norm()


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_outputs_states_and_gradients_equal_those_of_the_published_layer(backend):
    mixer = layer(eigenvalue_range=(0, 1), backend=backend)
    y, state = mixer.scan(RECORDED["x"].unsqueeze(0))
    assert relative(y[0], RECORDED["y"]) < 1e-5
    assert relative(state["recurrence"][0], RECORDED["state"]) < 1e-5
    ((y[0] * RECORDED["d_y"]).sum() + (state["recurrence"][0] * RECORDED["d_state"]).sum()).backward()
    expected = as_ours("gradient", mixer)
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None, name
        assert relative(parameter.grad, expected[name]) < 1e-5, name


@pytest.mark.parametrize("eigenvalue_range", [(-1, 1), (-0.5, 0.9)])
def test_the_widened_range_is_a_map_of_the_decay(eigenvalue_range):
    low, high = eigenvalue_range
    x = torch.randn(2, 9, 12)
    native = layer(eigenvalue_range=(0, 1)).transition(x).decay
    assert torch.allclose(layer(eigenvalue_range=eigenvalue_range).transition(x).decay, low + (high - low) * native)


def test_the_state_is_read_before_its_update():
    """One head of one channel with all gates and norms left out, against the sum written out."""
    torch.manual_seed(0)
    mixer = RWKV6(1, num_heads=1, output_norm=False, output_gate=False).double()
    with torch.no_grad():
        mixer.mix_x.zero_()
        mixer.mix.zero_()
        mixer.mix_up.zero_()
    x = torch.randn(1, 6, 1, dtype=torch.float64)
    a = mixer.transition(x).decay.flatten().tolist()
    r, k, v = (projection(x).flatten().tolist() for projection in (mixer.r_proj, mixer.k_proj, mixer.v_proj))
    state, outputs = 0.0, []
    for t in range(6):
        outputs.append(r[t] * (state + mixer.bonus.item() * k[t] * v[t]))
        state = a[t] * state + k[t] * v[t]
    y, end = mixer.scan(x)
    assert torch.allclose(y.flatten(), mixer.o_proj.weight.item() * torch.tensor(outputs, dtype=torch.float64))
    assert end["recurrence"].item() == pytest.approx(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "num_heads = 5 must divide d_model = 12"),
        ({"shift_rank": 0}, "shift_rank of rwkv6 must be a positive integer"),
        ({"eigenvalue_range": (-2, 1)}, "-1 <= lo < hi <= 1"),
    ],
)
def test_a_wrong_option_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RWKV6(12, **options)
