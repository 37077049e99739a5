"""Configs as plain data, read strictly."""

import dataclasses
import json

import pytest

from statetrack import mixer_config
from statetrack.config import RunConfig, TrainingConfig, from_data, run_config, to_data


def make(**training):
    return run_config("parity", mixer_config("deltanet")(), {"d_model": 16}, TrainingConfig(**training))


def test_a_run_survives_plain_data():
    config = make(steps=7, learning_rate=0.5)
    assert from_data(RunConfig, to_data(config)) == config


def test_a_hybrid_is_a_list_of_tables():
    mixers = (mixer_config("deltanet")(num_heads=2), mixer_config("mamba")())
    options = {"d_model": 16, "num_layers": 4, "norm_placement": ["before", "after"]}
    config = run_config("parity", mixers, options, TrainingConfig())
    data = to_data(config)
    assert [table["name"] for table in data["model"]["mixer"]] == ["deltanet", "mamba"]
    assert json.loads(json.dumps(data)) == data
    assert from_data(RunConfig, data) == config
    assert config.model.layer_mixers() == mixers * 2


def test_whole_numbers_do_for_numbers():
    data = to_data(make())
    data["training"]["learning_rate"] = 1
    assert from_data(RunConfig, data).training.learning_rate == 1.0


def changed(path, value):
    data = to_data(make())
    *parents, last = path.split(".")
    inner = data
    for parent in parents:
        inner = inner[parent]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("task", None, "task"),
        ("task", "paritty", "paritty"),
        ("steps", 3, "unknown key steps; the keys here are task, model, training"),
        ("training.step", 3, "unknown key step"),
        ("training.steps", "many", "training.steps"),
        ("training.steps", True, "training.steps"),
        ("training.steps", 0, "steps must be at least 1, got 0"),
        ("training.min_length", 50, "min_length = 50 must not exceed max_length = 40"),
        ("training.curriculum", 1.5, r"curriculum must lie in \[0, 1\], got 1.5"),
        ("training.curriculum_shape", "halving", "curriculum_shape must be linear or doubling, got 'halving'"),
        ("training.curriculum_shape", "doubling", "curriculum_shape = 'doubling' needs a curriculum; set curriculum"),
        ("training.curriculum_learning_rate_power", 0.5, "curriculum_learning_rate_power = 0.5 needs a curriculum"),
        ("training.curriculum_learning_rate_power", -1, "curriculum_learning_rate_power must be 0 or positive, got -1"),
        ("training.part_labels", True, "sequences of the task parity have no parts with labels of their own"),
        ("training.max_length", 0, "max_length must be at least 1"),
        ("training.learning_rate", -1, "learning_rate must be a positive number"),
        ("training.decay", 0.95, "decay must lie in"),
        ("training.decay_shape", "step", "decay_shape"),
        ("training.beta2", 1, r"beta2 must lie in \[0, 1\)"),
        ("training.z_loss", -1, "z_loss must be 0 or positive"),
        ("training.seed", -1, "seed must lie in"),
        ("model.mixer", "deltanet", "a mixer is a table with a name"),
        ("model.mixer", ["deltanet"], "a mixer is a table with a name"),
        ("model.mixer", [{"name": "deltanet"}, {"name": "mamba"}, {"name": "mamba"}], "3 values for mixer"),
        ("model.norm_placement", "inside", "norm_placement"),
        ("model.mixer.name", "deltanut", "did you mean 'deltanet'"),
        ("model.mixer.heads", 4, "unknown key heads"),
        ("model.mixer.eigenvalue_range", [1, -1], "-1 <= lo < hi <= 1"),
        ("model.mixer.eigenvalue_range", [1], "two numbers"),
        ("model.vocab_size", 9, "the task parity has 2 tokens and 2 labels"),
    ],
)
def test_wrong_data_is_refused_in_one_sentence(path, value, message):
    with pytest.raises(ValueError, match=message) as caught:
        from_data(RunConfig, changed(path, value))
    assert "\n" not in str(caught.value)


def test_every_field_is_documented():
    for config in (RunConfig, TrainingConfig):
        for field in dataclasses.fields(config):
            assert f"{field.name}: " in (config.__doc__ or "")
