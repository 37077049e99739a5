"""The presets have the sizes that they say."""

import math
from dataclasses import replace

import pytest
import torch

from statetrack.model import LanguageModel
from statetrack.pretraining.presets import REFERENCE_VOCABULARY, preset, presets
from statetrack.transition import EigenvalueRange

MIXERS = ("deltanet", "gated_deltanet", "deltaproduct", "mamba")
SIZES = {"10m": 10e6, "30m": 30e6, "125m": 125e6, "340m": 340e6, "1.3b": 1.3e9}


def test_every_mixer_comes_in_every_size():
    assert [(p.name, p.parameters) for p in presets()] == [(f"{m}-{s}", n) for m in MIXERS for s, n in SIZES.items()]


@pytest.mark.parametrize("stated", presets(), ids=lambda stated: stated.name)
def test_the_number_of_parameters_is_the_stated_one(stated):
    with torch.device("meta"):
        model = LanguageModel(preset(stated.name, vocab_size=REFERENCE_VOCABULARY))
    without = model.num_parameters() - model.embedding.weight.numel()
    assert (model.num_parameters() if stated.with_embeddings else without) == pytest.approx(stated.parameters, rel=0.05)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("eigenvalue_range", [(0, 1), (-1, 1)])
def test_both_ranges_and_the_mixer_of_the_name(mixer, eigenvalue_range):
    config = preset(f"{mixer}-10m", vocab_size=99, eigenvalue_range=eigenvalue_range)
    assert config.mixer.name == mixer
    assert config.mixer.eigenvalue_range == EigenvalueRange.of(eigenvalue_range)
    assert config.vocab_size == 99
    assert preset(f"{mixer}-10m", vocab_size=99).mixer.eigenvalue_range == EigenvalueRange(-1, 1)


@pytest.mark.parametrize(
    ("name", "sizes"), [("deltanet-340m", (1024, 24, 8)), ("deltanet-1.3b", (2048, 24, 16)), ("mamba-340m", (1024, 48))]
)
def test_the_sizes_of_the_paper(name, sizes):
    config = preset(name, vocab_size=REFERENCE_VOCABULARY)
    assert (config.d_model, config.num_layers) == sizes[:2]
    assert getattr(config.mixer, "num_heads", None) == (sizes[2] if len(sizes) > 2 else None)


def test_deltaproduct_has_two_factors():
    assert preset("deltaproduct-340m", vocab_size=99).mixer.num_householder == 2


@pytest.mark.parametrize("name", ["deltanet-7b", "deltanet", "340m", "lstm-340m", ""])
def test_unknown_names_are_refused_with_the_list(name):
    with pytest.raises(ValueError, match=r"unknown preset .*deltanet-10m, .*mamba-1\.3b"):
        preset(name, vocab_size=99)


def test_a_range_that_the_mixer_can_not_have_is_refused():
    with pytest.raises(ValueError, match="range"):
        preset("deltanet-10m", vocab_size=99, eigenvalue_range=(-1, 0.5))


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("eigenvalue_range", [(0, 1), (-1, 1)])
@pytest.mark.parametrize("name", ["deltanet-10m", "gated_deltanet-10m", "deltaproduct-10m", "mamba-10m"])
def test_the_first_loss_is_near_that_of_a_uniform_guess(name, eigenvalue_range, tied):
    ids = torch.randint(257, (1, 129))
    config = preset(name, vocab_size=257, eigenvalue_range=eigenvalue_range)
    logits = LanguageModel(replace(config, tie_embeddings=tied))(ids[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits[0], ids[0, 1:]).item()
    assert loss == pytest.approx(math.log(257), rel=0.07)
