"""Checkpoints that transformers wrote: logits and every gradient are those of transformers."""

import json

import pytest
import torch
from checkpoints import change, close, run, save
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

from statetrack import from_pretrained
from statetrack.pretrained import sources

SIZES = {"vocab_size": 29, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}


def mamba(**options):
    return MambaForCausalLM(MambaConfig(**{**SIZES, **options}))


def mamba2(**options):
    options = {"num_heads": 4, "head_dim": 8, "n_groups": 2, "chunk_size": 8, **options}
    return Mamba2ForCausalLM(Mamba2Config(**{**SIZES, **options}))


MODELS = {
    "mamba": lambda: mamba(),
    "mamba, others": lambda: mamba(
        expand=1, time_step_rank=3, conv_kernel=2, tie_word_embeddings=False, layer_norm_epsilon=1e-3
    ),
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
    rows = sources()[original.config.model_type].rows(model.config, theirs.keys())
    assert len(rows) >= len(theirs) - 1  # the output layer is not among them
    ours = dict(model.named_parameters())
    for row in rows:
        expected_gradient = torch.cat([theirs[their].grad for their in row.theirs])
        assert close(torch.cat([ours[our].grad for our in row.ours]), expected_gradient), row
    if not model.config.tie_embeddings:
        assert close(model.head.weight.grad, original.lm_head.weight.grad)


@pytest.mark.parametrize("make", [mamba, mamba2])
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
        (mamba, {"use_bias": True}, "use_bias = True is not supported here, only False"),
        (mamba, {"use_conv_bias": False}, "use_conv_bias = False is not supported"),
        (mamba, {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported here, only 'silu' or 'swish'"),
        (mamba, {"expand": 1.01}, "expand . 1 must be a positive integer"),
        (mamba, {"hidden_size": "16"}, "hidden_size must be a positive integer, got '16'"),
        (mamba, {"vocab_size": None}, "vocab_size must be a positive integer, got None"),
        (mamba, {"state_size": 5}, "misshapen backbone.layers.0.mixer.x_proj.weight"),
        (mamba, {"quantization_config": {"bits": 4}}, "unknown option quantization_config"),
        (mamba2, {"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon = 1e-06 is not supported"),
        (mamba2, {"time_step_limit": [1]}, "time_step_limit must be two numbers"),
        (mamba2, {"n_groups": 3}, "n_groups = 3 must divide num_heads = 4"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(make, options, message, tmp_path):
    save(make(), tmp_path)
    change(tmp_path, **options)
    with pytest.raises(ValueError, match=message) as caught:
        from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_config_of_a_checkpoint_is_plain_json(tmp_path):
    save(mamba2(), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "mamba2"
