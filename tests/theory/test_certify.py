"""Certificates: what they must say, and what they must not be fooled into saying."""

import json
import math

import pytest
import torch
from torch import Tensor

from statetrack import LanguageModel, ModelConfig, mixer_config
from statetrack.automata import Automaton, group_automaton
from statetrack.theory import certify as module
from statetrack.theory.certify import certify
from statetrack.theory.construct import compile


def model(name, layers=1, **options):
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=3, d_model=12, num_layers=layers, mixer=mixer_config(name)(**options))
    return LanguageModel(config).eval()


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("conv_size", [0, 4])
@pytest.mark.parametrize("name", ["deltanet", "gated_deltanet", "deltaproduct", "mamba"])
def test_parity_is_ruled_out_with_eigenvalues_from_0_to_1_and_not_from_minus_1(name, conv_size, layers):
    narrow = certify(model(name, layers, eigenvalue_range=(0, 1), conv_size=conv_size))
    (claim,) = [claim for claim in narrow.claims if claim.capability == "parity"]
    assert (claim.scope, claim.theorem) == ("architecture", "T1")
    assert "cannot solve parity" in str(narrow)
    wide = certify(model(name, layers, eigenvalue_range=(-1, 1), conv_size=conv_size))
    assert not wide.rules_out("parity")
    assert "cannot solve parity" not in str(wide)


def test_three_factors_in_0_to_1_are_left_to_the_argument_about_moduli_and_not_to_theorem_1():
    certificate = certify(model("deltaproduct", eigenvalue_range=(0, 1), num_householder=3))
    (claim,) = [claim for claim in certificate.claims if claim.capability == "parity"]
    assert claim.theorem == "unit modulus (ours)"


def test_a_widened_decay_is_seen():
    assert not certify(model("gated_deltanet", eigenvalue_range=(0, 1), decay_range=(-1, 1))).rules_out("parity")


def test_diagonal_models_count_to_powers_of_two_only_and_two_reflections_to_anything():
    assert "divides 4" in str(certify(model("mamba", layers=2)))
    assert certify(model("deltanet", layers=1)).rules_out("counting modulo m")
    assert not certify(model("deltanet", layers=2)).rules_out("counting modulo m")
    assert not certify(model("deltaproduct", layers=1)).rules_out("counting modulo m")


def test_a_short_convolution_and_a_second_layer_lift_the_obstruction_to_one_layer():
    assert certify(model("deltanet", conv_size=0)).rules_out("first letter")
    assert not certify(model("deltanet", conv_size=2)).rules_out("first letter")
    assert not certify(model("deltanet", layers=2, conv_size=0)).rules_out("first letter")


def test_of_a_layer_without_a_transition_no_theorem_speaks(monkeypatch):
    without = model("deltanet", layers=2, eigenvalue_range=(0, 1))
    monkeypatch.setattr(without.blocks[1].mixer, "transition", lambda *args, **options: None)
    certificate = certify(without)
    assert certificate.claims == ()
    assert "no theorem" in str(certificate)


@pytest.mark.parametrize("automaton", [group_automaton("S3"), group_automaton("Z4"), Automaton.from_regex("a*b*")])
def test_a_compiled_model_is_not_ruled_out_and_lasts_for_ever(automaton):
    certificate = certify(compile(automaton))
    assert not certificate.rules_out("parity")
    assert max(s.horizon for s in certificate.spectra if s.horizon is not None) == math.inf
    assert min(s.beta_gap for s in certificate.spectra if s.beta_gap is not None) == 0


def test_the_spectra_are_those_of_the_matrices_and_of_their_products():
    parity = model("deltaproduct", num_householder=2, conv_size=0)
    data = torch.tensor([[0, 1, 2, 0, 1]])
    certificate = certify(parity, data)
    dense: Tensor = parity.transitions(data)[0].dense().double()
    for tokens in (1, 2, 3):
        products = []
        for begin in range(5 - tokens + 1):
            product = torch.eye(dense.shape[-1], dtype=torch.float64)
            for step in range(tokens):
                product = dense[0, begin + step, 1] @ product
            products.append(torch.linalg.eigvals(product))
        values = torch.cat(products)
        (spectrum,) = [s for s in certificate.spectra if (s.head, s.tokens, s.scope) == (1, tokens, "measured")]
        assert spectrum.lowest == pytest.approx(float(values.real.min()), abs=1e-9)
        assert spectrum.imaginary == pytest.approx(float(values.imag.abs().max()), abs=1e-9)


def test_the_horizon_is_where_an_eigenvalue_has_faded():
    assert math.log(module.FADED) / math.log(0.99) == pytest.approx(552, abs=0.5)
    json.dumps(certify(model("mamba")).data())
