"""Checkpoints of flash-linear-attention: recorded models (tests/fixtures/fla), layouts, and what is refused."""

import shutil

import pytest
import torch
from checkpoints import FLA, change, change_weights, close
from safetensors.torch import load_file

from statetrack import EigenvalueRange, from_pretrained
from statetrack.pretrained import CheckpointError

RECORDED = sorted(path.name for path in FLA.iterdir() if (path / "logits.safetensors").exists())


def copy(name, tmp_path):
    return shutil.copytree(FLA / name, tmp_path / name)


def test_each_model_was_recorded():
    assert {"delta_net", "gated_deltanet", "gated_deltaproduct"} <= set(RECORDED)


@pytest.mark.parametrize("name", RECORDED)
def test_logits_are_those_that_fla_computed(name):
    recorded = load_file(FLA / name / "logits.safetensors")
    with torch.no_grad():
        assert close(from_pretrained(FLA / name)(recorded["ids"]), recorded["logits"])


def older(tensors, factors):
    """The weights of DeltaProduct in the layout of its paper's time."""
    renamed = {}
    for name, tensor in tensors.items():
        head, _, last = name.rpartition(".attn.")
        part = last.removesuffix(".weight")
        if part in ("k_proj", "v_proj", "b_proj", "k_conv1d", "v_conv1d"):
            for factor, piece in enumerate(tensor.chunk(factors)):
                renamed[f"{head}.attn.{part}s.{factor}.weight"] = piece.clone()
        elif part == "q_conv1d":
            for factor in range(factors):  # the others are never read
                renamed[f"{head}.attn.q_conv1ds.{factor}.weight"] = tensor + factor
        else:
            renamed[name] = tensor
    return renamed


def test_the_older_layout_of_deltaproduct_is_read(tmp_path):
    path = copy("gated_deltaproduct", tmp_path)
    today = from_pretrained(path)
    factors = today.config.mixer.num_householder
    assert factors > 1
    options = {"use_decay_gate": today.config.mixer.name == "gated_deltaproduct", "use_gate": True}
    change(path, use_forget_gate=None, use_output_gate=None, use_linear_projs=True, **options)
    change_weights(path, lambda tensors: older(tensors, factors))
    old = from_pretrained(path)
    assert old.config == today.config
    assert all(torch.equal(tensor, old.state_dict()[name]) for name, tensor in today.state_dict().items())

    change_weights(path, lambda tensors: {k: v for k, v in tensors.items() if "layers.0.attn.k_projs.1" not in k})
    with pytest.raises(CheckpointError, match=r"missing model.layers.0.attn.k_projs.1.weight$"):
        from_pretrained(path)


@pytest.mark.parametrize("name", RECORDED)
@pytest.mark.parametrize(("negative", "lo"), [(True, -1), (False, 0), (None, 0)])
def test_the_range_is_that_of_the_checkpoint(name, negative, lo, tmp_path):
    path = copy(name, tmp_path)
    change(path, allow_neg_eigval=negative)
    assert from_pretrained(path).config.mixer.eigenvalue_range == EigenvalueRange(lo, 1)
    assert from_pretrained(path, eigenvalue_range=(-0.5, 1)).config.mixer.eigenvalue_range == EigenvalueRange(-0.5, 1)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("delta_net", {"attn": {"layers": [1], "num_heads": 2}}, "attn = .* puts attention between the layers"),
        ("delta_net", {"qk_activation": "elu"}, "qk_activation = 'elu' is not supported here, only 'silu'"),
        ("delta_net", {"qk_norm": "sum"}, "qk_norm = 'sum' is not supported here, only 'l2'"),
        ("delta_net", {"use_beta": False}, "use_beta = False is not supported here, only True"),
        ("delta_net", {"hidden_act": "relu"}, "hidden_act = 'relu' is not supported"),
        ("delta_net", {"conv_bias": True}, "unknown option conv_bias = True"),
        ("delta_net", {"expand_k": 0.3}, "expand_k . 12 must be a positive integer, got expand_k = 0.3"),
        ("delta_net", {"num_heads": 5}, "num_heads = 5 must divide hidden_size times expand_k and expand_v"),
        ("delta_net", {"use_short_conv": False}, "extra model.layers.0.attn.k_conv1d.weight"),
        ("gated_deltanet", {"output_gate_activation": "relu"}, "output_gate_activation = 'relu' is not supported"),
        ("gated_deltanet", {"num_v_heads": 3}, "num_value_heads must be a multiple of num_heads = 2, got 3"),
        ("gated_deltanet", {"attnres_block_size": 2}, "unknown option attnres_block_size = 2"),
        ("gated_deltaproduct", {"skip_householder_values": True}, "skip_householder_values = True is not supported"),
        ("gated_deltaproduct", {"use_linear_projs": False}, "use_linear_projs = False is not supported"),
        ("gated_deltaproduct", {"use_beta_conv": True}, "unknown option use_beta_conv = True"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(name, options, message, tmp_path):
    path = copy(name, tmp_path)
    change(path, **options)
    with pytest.raises(ValueError, match=message) as caught:
        from_pretrained(path)
    assert "\n" not in str(caught.value)


def test_the_width_of_the_mlp_follows_the_rule_of_fla(tmp_path):
    path = copy("delta_net", tmp_path)
    change(path, intermediate_size=None, hidden_ratio=4)
    with pytest.raises(CheckpointError, match=r"mlp.gate_proj.weight \(\d+, 12\) instead of \(256, 12\)"):
        from_pretrained(path)
