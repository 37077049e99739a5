"""Checkpoints that transformers wrote: logits and every gradient are those of transformers."""

import json

import pytest
import torch
from checkpoints import change, change_weights, close, run, save
from safetensors.torch import load_file
from transformers import (
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OlmoHybridConfig,
    OlmoHybridForCausalLM,
)

from statetrack import EigenvalueRange, from_pretrained
from statetrack.pretrained import sources

SIZES = {"vocab_size": 29, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}


def mamba(**options):
    return MambaForCausalLM(MambaConfig(**{**SIZES, **options}))


def mamba2(**options):
    options = {"num_heads": 4, "head_dim": 8, "n_groups": 2, "chunk_size": 8, **options}
    return Mamba2ForCausalLM(Mamba2Config(**{**SIZES, **options}))


def olmo(**options):
    sizes = {"vocab_size": 29, "hidden_size": 16, "num_hidden_layers": 4, "intermediate_size": 20, "pad_token_id": None}
    return OlmoHybridForCausalLM(OlmoHybridConfig(**{**sizes, "num_attention_heads": 2, "eos_token_id": 2, **options}))


def biased(model):
    """The same with biases that are not 0, as they are at first."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj.bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


ROPE = {"rope_type": "default", "rope_theta": 5000.0}
MODELS = {
    "olmo_hybrid": lambda: olmo(rms_norm_eps=1e-3, num_hidden_layers=2),
    "olmo_hybrid, others": lambda: olmo(
        num_hidden_layers=3,
        layer_types=["full_attention", "linear_attention", "linear_attention"],
        num_attention_heads=4,
        num_key_value_heads=2,
        linear_num_key_heads=2,
        linear_key_head_dim=6,
        linear_value_head_dim=4,
        linear_allow_neg_eigval=False,
        linear_conv_kernel_dim=3,
        tie_word_embeddings=True,
        rope_parameters=ROPE,
    ),
    "mamba": lambda: mamba(),
    "mamba, others": lambda: mamba(
        expand=1, time_step_rank=3, conv_kernel=2, tie_word_embeddings=False, layer_norm_epsilon=1e-3
    ),
    "mamba, other biases": lambda: biased(mamba(use_bias=True, use_conv_bias=False)),
    "mamba2, other biases": lambda: biased(mamba2(use_bias=True, use_conv_bias=False, layer_norm_epsilon=1e-3)),
    "mamba2": lambda: mamba2(),
    "mamba2, others": lambda: mamba2(tie_word_embeddings=True, time_step_limit=(0.3, 0.9), n_groups=1, conv_kernel=3),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_those_of_transformers(name, tmp_path):
    original = MODELS[name]()
    model = from_pretrained(save(original, tmp_path))
    ids = torch.randint(29, (3, 21))
    expected = run(lambda ids: original(ids, use_cache=False).logits, original, ids)
    assert close(run(model, model, ids), expected)
    theirs = dict(original.named_parameters())
    rows = sources()[original.config.model_type].rows(model.config, theirs)
    assert len(rows) >= len(theirs) - 1  # the output layer is not among them
    ours = dict(model.named_parameters())
    for row in rows:
        expected_gradient = torch.cat([theirs[their].grad for their in row.theirs])
        assert close(torch.cat([ours[our].grad for our in row.ours]), expected_gradient), row
    if not model.config.tie_embeddings:
        assert close(model.head.weight.grad, original.lm_head.weight.grad)


@pytest.mark.parametrize("make", [mamba, mamba2, olmo])
def test_a_loaded_model_decodes_step_by_step(make, tmp_path):
    original = make()
    model = from_pretrained(save(original, tmp_path))
    ids, state, outputs = torch.randint(29, (2, 9)), model.init_state(2), []
    with torch.no_grad():
        for token in ids.unbind(1):
            y, state = model.step(token, state)
            outputs.append(y)
        assert close(torch.stack(outputs, 1), original(ids, use_cache=False).logits)


def test_half_precision_is_kept_and_the_residual_is_not(tmp_path):
    original = mamba(residual_in_fp32=True).bfloat16()
    model = from_pretrained(save(original, tmp_path))
    ids = torch.randint(29, (2, 9))
    assert model.config.residual_in_float32
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert close(model(ids).float(), original(ids, use_cache=False).logits.float(), 0.02)
    wide = from_pretrained(tmp_path, dtype=torch.float64)
    assert {p.dtype for p in wide.parameters()} == {torch.float64}


def test_a_step_size_limit_may_be_written_in_either_way(tmp_path):
    save(mamba2(), tmp_path)
    for limit in ([0.0, float("inf")], [0.0, {"__float__": "Infinity"}]):
        change(tmp_path, time_step_limit=limit)
        assert from_pretrained(tmp_path).config.mixer.dt_max is None


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (mamba, {"use_bias": 2}, "use_bias = 2 is not supported here, only True or False"),
        (mamba, {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported here, only 'silu' or 'swish'"),
        (mamba, {"expand": 1.01}, "expand . 1 must be a positive integer"),
        (mamba, {"hidden_size": "16"}, "hidden_size must be a positive integer, got '16'"),
        (mamba, {"expand": float("inf")}, "expand . 1 must be a positive integer, got expand = inf"),
        (mamba, {"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon must be a small positive number, got '1e-5'"),
        (olmo, {"rms_norm_eps": "1e-6"}, "rms_norm_eps must be a small positive number, got '1e-6'"),
        (olmo, {"layer_types": [["linear_attention"]] * 4}, "layer_types must say linear_attention or full_attention"),
        (olmo, {"rope_parameters": "default"}, "rope_parameters must hold a positive rope_theta, got 'default'"),
        (olmo, {"rope_parameters": {**ROPE, "rope_theta": "5e3"}}, "rope_parameters must hold a positive rope_theta"),
        (mamba, {"vocab_size": None}, "vocab_size must be a positive integer, got None"),
        (mamba, {"state_size": 5}, "misshapen backbone.layers.0.mixer.x_proj.weight"),
        (mamba, {"quantization_config": {"bits": 4}}, "unknown option quantization_config"),
        (mamba2, {"time_step_limit": [1]}, "time_step_limit must be two numbers"),
        (olmo, {"attention_bias": True}, "attention_bias = True is not supported"),
        (olmo, {"layer_types": ["linear_attention"]}, "layer_types must say .* for each of the 4 layers"),
        (olmo, {"layer_types": ["sliding_attention"] * 4}, "layer_types must say linear_attention or full_attention"),
        (olmo, {"rope_parameters": {**ROPE, "rope_type": "yarn"}}, "rope_type = 'yarn' is not supported"),
        (
            olmo,
            {"linear_conv_kernel_dim": 3},
            r"q_conv1d.weight \(16, 1, 4\) instead of \(16, 1, 3\)",
        ),
        (mamba2, {"n_groups": 3}, "n_groups = 3 must divide num_heads = 4"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(make, options, message, tmp_path):
    save(make(), tmp_path)
    change(tmp_path, **options)
    with pytest.raises(ValueError, match=message) as caught:
        from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_hybrid_is_widened_where_it_has_eigenvalues(tmp_path):
    native = from_pretrained(save(olmo(linear_allow_neg_eigval=False), tmp_path))
    assert native.config.mixer_name == "gated_deltanet+gated_deltanet+gated_deltanet+attention"
    assert native.config.norm_placement == ("before", "before", "before", "after")
    wide = from_pretrained(tmp_path, eigenvalue_range=(-1, 1))
    ranges = [getattr(mixer, "eigenvalue_range", None) for mixer in wide.config.layer_mixers()]
    assert ranges == [EigenvalueRange(-1, 1)] * 3 + [None]
    preserved, ids = from_pretrained(tmp_path, widening="preserve"), torch.randint(29, (2, 9))
    assert torch.allclose(preserved(ids), native(ids), atol=1e-6)
    assert not torch.allclose(wide(ids), native(ids), atol=1e-3)


def test_the_names_of_the_modules_of_transformers_are_read_as_well(tmp_path):
    original = olmo()
    written = from_pretrained(save(original, tmp_path))
    assert not set(original.state_dict()) <= set(load_file(tmp_path / "model.safetensors"))
    change_weights(tmp_path, lambda tensors: original.state_dict())
    model = from_pretrained(tmp_path)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in written.state_dict().items())
    # Three convolutions of their own sizes, as they are published.
    sizes, name = (12, 12, 24), "model.layers.0.linear_attn.conv1d.weight"
    pieces = dict(zip("qkv", original.state_dict()[name].split(sizes), strict=True))
    own = {f"model.layers.0.linear_attn.{x}_conv1d.weight": piece for x, piece in pieces.items()}
    change_weights(tmp_path, lambda tensors: {k: v for k, v in tensors.items() if k != name} | own)
    model = from_pretrained(tmp_path)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in written.state_dict().items())
    change_weights(tmp_path, lambda tensors: original.state_dict())
    change_weights(tmp_path, lambda tensors: {**tensors, name: torch.ones(57, 1, 4)})
    with pytest.raises(ValueError, match=r"misshapen .*conv1d.weight \(57, 1, 4\) instead of \(\d+, 1, 4\)$"):
        from_pretrained(tmp_path)


def test_the_config_of_a_checkpoint_is_plain_json(tmp_path):
    save(mamba2(), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "mamba2"
