"""A little prepared text, and tiny models that are pre-trained on it."""

import copy

import pytest

from statetrack.data import PrepareConfig, TextSource, prepare
from statetrack.pretraining.config import config_of


@pytest.fixture(scope="session")
def text_data(tmp_path_factory):
    place = tmp_path_factory.mktemp("pretraining")
    for name, words in (("code", "x = x + 1\n"), ("prose", "one and one are two. ")):
        (place / name).mkdir()
        for index in range(30):
            (place / name / f"{index:02d}.txt").write_text(f"{words}{index} " * (index % 7 + 2))
    sources = [TextSource(name, str(place / name)) for name in ("code", "prose")]
    prepare(sources, place / "data", PrepareConfig(tokenizer="bytes", held_out=0.2))
    return place / "data"


@pytest.fixture(scope="session")
def tables_of_all(text_data):
    """The config of a run of seconds, as plain data."""
    return {
        "model": {
            "d_model": 16,
            "num_layers": 2,
            "mlp_ratio": 2.0,
            "mixer": {"name": "gated_deltanet", "num_heads": 2},
        },
        "data": {"directory": str(text_data), "sequence_length": 24, "batch_size": 4},
        "training": {"steps": 6},
        "optimizer": {"learning_rate": 3e-3},
        "schedule": {"warmup_steps": 2},
        "execution": {"log_every": 1, "checkpoint_every": 2, "evaluate_every": 0, "evaluation_sequences": 4},
    }


@pytest.fixture
def tables(tables_of_all):
    """A config of its own for each test, which may change it."""
    return copy.deepcopy(tables_of_all)


@pytest.fixture
def config(tables):
    return config_of(tables, 257)
