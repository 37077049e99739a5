"""RWKV-7 with its native range against the authors' package, as recorded by tests/fixtures/record_rwkv.py."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from statetrack import RWKV7, EigenvalueRange, mixer_config
from statetrack.mixers.rwkv7 import NATIVE_RANGE, SMALLEST_DECAY

RECORDED = load_file(Path(__file__).parents[1] / "fixtures" / "rwkv7.safetensors")

# Ours by the package's names. Its matrices are used as x @ W, ours as x @ W^T.
NAMES = {f"x_{c}": f"mix.{c}" for c in "rwkvag"} | {f"{c}_": f"{c.lower()}_proj.weight" for c in "RKVO"}
NAMES |= {f"{c}0": f"{c}_map.bias" for c in "wa"} | {f"{c}1": f"{c}_map.down.weight" for c in "wag"}
NAMES |= {f"{c}2": f"{c}_map.up.weight" for c in "wag"} | {name: name for name in ("k_k", "k_a", "r_k")}
NAMES |= {"ln_w": "o_norm.weight", "ln_b": "o_norm.bias"}


def as_ours(kind, mixer):
    shapes = {name: parameter.shape for name, parameter in mixer.named_parameters()}
    theirs = {NAMES[key.split(".")[1]]: value for key, value in RECORDED.items() if key.startswith(f"{kind}.")}
    assert theirs.keys() == shapes.keys()
    return {
        name: (x.T if name[1:].startswith(("_proj", "_map")) and x.ndim == 2 else x).reshape(shapes[name])
        for name, x in theirs.items()
    }


def published_layer():
    mixer = RWKV7(
        12, num_heads=3, decay_rank=5, removal_rank=5, gate_rank=5, eigenvalue_range=NATIVE_RANGE, backend="reference"
    )
    mixer.load_state_dict(as_ours("weight", mixer))
    return mixer


def relative(actual, expected):
    return (actual - expected).norm() / expected.norm()


def test_outputs_states_and_gradients_equal_those_of_the_published_layer():
    mixer = published_layer()
    y, state = mixer.scan(RECORDED["x"].unsqueeze(0))
    assert relative(y[0], RECORDED["y"]) < 1e-5
    assert relative(state["recurrence"][0], RECORDED["state"]) < 1e-5
    ((y[0] * RECORDED["d_y"]).sum() + (state["recurrence"][0] * RECORDED["d_state"]).sum()).backward()
    expected = as_ours("gradient", mixer)
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None, name
        assert relative(parameter.grad, expected[name]) < 1e-5, name


def test_another_range_is_another_function():
    wide = RWKV7(12, num_heads=3, decay_rank=5, gate_rank=5, eigenvalue_range=(-1, 1))
    wide.load_state_dict(published_layer().state_dict())
    assert relative(wide(RECORDED["x"].unsqueeze(0))[0], RECORDED["y"]) > 0.1


@pytest.mark.parametrize("eigenvalue_range", [NATIVE_RANGE, (-1, 1), (0, 1), (0.3, 1)])
def test_along_the_removal_key_the_transition_stays_in_its_range_and_reaches_both_ends(eigenvalue_range):
    torch.manual_seed(0)
    mixer = RWKV7(12, num_heads=3, eigenvalue_range=eigenvalue_range).double()
    low, x = EigenvalueRange.of(eigenvalue_range).lo, torch.randn(2, 50, 12, dtype=torch.float64)
    seen = []
    for decay, removal in ((-30.0, -30.0), (30.0, 30.0), (0.0, 0.0), (2.0, -1.0)):
        with torch.no_grad():
            mixer.w_map.bias.fill_(decay)
            mixer.a_map.bias.fill_(removal)
        transition = mixer.transition(x)
        along = torch.einsum("bthk,bthkl,bthl->bth", transition.w, transition.dense(), transition.w)
        assert along.min() >= low - 1e-7
        assert along.max() <= 1 + 1e-7
        seen.append(along.detach())
        if decay == removal == 30:  # the channels agree, so this is an eigenvalue, and the others are the decay
            eigenvalues = transition.eigenvalues().real
            assert torch.allclose(eigenvalues.amin(-1), torch.full_like(along, low), atol=1e-7)
            assert torch.allclose(eigenvalues.amax(-1), torch.full_like(along, SMALLEST_DECAY), atol=1e-7)
    assert torch.stack(seen).min().item() == pytest.approx(low, abs=1e-7)
    assert torch.stack(seen).max().item() == pytest.approx(1, abs=1e-7)


def test_the_native_range_is_that_of_the_paper():
    assert NATIVE_RANGE.lo == pytest.approx(-0.4548, abs=1e-4)
    assert NATIVE_RANGE.removal(torch.tensor(0.3), SMALLEST_DECAY).item() == pytest.approx(0.3)
    assert mixer_config("rwkv7")().spectrum() is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eigenvalue_range": (-1, 0.5)}, "ends at 1"),
        ({"eigenvalue_range": (0.6, 1)}, r"starts below the smallest decay, 0\.5452"),
        ({"num_heads": 5}, "num_heads = 5 must divide d_model = 12"),
        ({"decay_rank": 0}, "decay_rank of rwkv7 must be a positive integer"),
        ({"removal_gain": -1.0}, "removal_gain must be a positive number"),
    ],
)
def test_a_wrong_option_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RWKV7(12, **options)
