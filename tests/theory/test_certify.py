"""Certificates: what they must say, and what they must not be fooled into saying."""

import dataclasses
import json
import math

import pytest
import torch
from torch import Tensor

from statetrack import LanguageModel, ModelConfig, mixer_config
from statetrack.automata import Automaton, group_automaton
from statetrack.experiments import load_experiment
from statetrack.mixers import mixer_configs
from statetrack.mixers.mixer import WidenedMixerConfig
from statetrack.theory import certify as module
from statetrack.theory.certify import certify
from statetrack.theory.construct import compile
from statetrack.training import train
from statetrack.transition import Diagonal, Discretized, Householder, LowRank


def model(name, layers=1, **options):
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=3, d_model=16, num_layers=layers, mixer=mixer_config(name)(**options))
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


@pytest.mark.parametrize("name", ["deltanet", "gated_deltanet", "kda", "deltaproduct"])
def test_keys_that_are_normalized_as_in_the_originals_rest_in_0_to_1_and_are_not_judged_from_minus_1(name):
    """Rounded keys may be a little longer than 1, which takes an eigenvalue below 0 and leaves it far from -1."""
    narrow = certify(model(name, layers=2, eigenvalue_range=(0, 1), normalize=False))
    (claim,) = [claim for claim in narrow.claims if claim.capability == "parity"]
    assert (claim.scope, claim.theorem) == ("architecture", "unit modulus (ours)")
    assert certify(model(name, layers=2, eigenvalue_range=(-1, 1), normalize=False)).claims == ()


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
    dense: Tensor = parity.transitions(data)[0].map_tokens(Tensor.double).dense()
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


# Every mixer there is

ALL = sorted(mixer_configs())


def kind(name):
    """The type of the transition of a mixer; of those that turn with the position, "rotary"."""
    config = mixer_config(name)()
    return "rotary" if config.rotary_positions else type(config.build(16).transition(torch.zeros(1, 1, 16)))


KINDS = {name: kind(name) for name in ALL}
NO_TRANSITION = {name for name in ALL if KINDS[name] is type(None)}
DIAGONAL = {name for name in ALL if KINDS[name] in (Diagonal, Discretized)}
HOUSEHOLDER = {name for name in ALL if KINDS[name] is Householder}
NO_THEOREM = {name for name in ALL if KINDS[name] is LowRank}
"""Matrices that are no contractions: their eigenvalues are only measured."""


def scrambled(name, layers=1, scale=4.0, **options):
    """A model whose gates are all over the place, as training may leave them."""
    made = model(name, layers, **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for block in made._blocks():
            for parameter in block.mixer.eigenvalue_parameters():
                parameter.normal_(0, scale)
    return made


def test_the_sets_above_have_the_mixers_that_are_known():
    assert {"attention", "lstm", "slstm"} <= NO_TRANSITION
    assert {"gla", "mamba", "mamba2", "mlstm", "rwkv6"} <= DIAGONAL
    assert {"deltanet", "deltaproduct", "exact_deltaproduct", "gated_deltaproduct", "kda"} <= HOUSEHOLDER
    assert (KINDS["retnet"], KINDS["rwkv7"]) == ("rotary", LowRank)


def test_every_mixer_has_a_certificate_that_is_json():
    for name in ALL:
        certificate = certify(model(name))
        data = json.loads(json.dumps(certificate.data()))
        assert len(data["structures"]) == 1
        assert bool(data["spectra"]) == (name not in NO_TRANSITION)
        assert str(certificate)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("name", sorted(DIAGONAL | HOUSEHOLDER))
def test_a_range_from_0_to_1_rules_parity_out_whatever_the_weights_are(name, layers):
    certificate = certify(scrambled(name, layers, eigenvalue_range=(0, 1)))
    (claim,) = [claim for claim in certificate.claims if claim.capability == "parity"]
    assert (claim.scope, claim.theorem) == ("architecture", "T1")
    for spectrum in certificate.spectra:  # the theorem is about these
        if spectrum.scope == "measured" and spectrum.tokens == 1:
            assert spectrum.lowest >= -1e-4
            assert spectrum.imaginary <= 1e-4  # nearly defective matrices in float32


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("name", sorted(DIAGONAL | HOUSEHOLDER))
def test_a_range_from_minus_1_does_not_once_gates_reach_down(name, layers):
    certificate = certify(scrambled(name, layers, eigenvalue_range=(-1, 1)))
    assert min(s.lowest for s in certificate.spectra if s.scope == "measured") < -0.5
    assert not certificate.rules_out("parity")
    assert "cannot solve parity" not in str(certificate)


@pytest.mark.parametrize("name", sorted(DIAGONAL))
def test_a_lower_end_that_is_learned_is_no_range_from_0(name):
    opened = scrambled(name, eigenvalue_range=(0, 1), learn_lower_end=True)
    assert all(claim.scope != "architecture" for claim in certify(opened).claims if claim.capability == "parity")


@pytest.mark.parametrize("name", sorted(NO_TRANSITION))
def test_no_theorem_speaks_of_attention_and_lstms_nor_of_hybrids_with_them(name):
    alone = certify(model(name, layers=2))
    narrow = mixer_config("deltanet")(eigenvalue_range=(0, 1))
    config = ModelConfig(vocab_size=3, d_model=16, num_layers=4, mixer=(narrow, mixer_config(name)()))
    hybrid = certify(LanguageModel(config).eval())
    for certificate in (alone, hybrid):
        assert certificate.claims == ()
        assert "no theorem" in certificate.note
        assert "cannot" not in str(certificate)
    assert {s.layer for s in hybrid.spectra} == {0, 2}


def test_a_hybrid_of_linear_layers_is_ruled_out_only_if_all_of_them_are():
    narrow, wide = (mixer_config("deltanet")(eigenvalue_range=ends) for ends in ((0, 1), (-1, 1)))
    diagonal = mixer_config("gla")(eigenvalue_range=(0, 1))

    def certificate(*mixers):
        return certify(LanguageModel(ModelConfig(vocab_size=3, d_model=16, num_layers=2, mixer=mixers)).eval())

    assert certificate(narrow, diagonal).rules_out("parity")
    assert not certificate(narrow, wide).rules_out("parity")
    assert certificate(mixer_config("retnet")(), narrow).rules_out("parity")


def test_of_rwkv7_nothing_is_claimed_whatever_its_range():
    for ends in ((-1, 1), (0, 1), (-0.4548, 1)):
        assert certify(scrambled("rwkv7", eigenvalue_range=ends, scale=1.0)).claims == ()


def test_retention_turns_with_the_position_and_comes_to_rest():
    """Theorem 1 is about matrices that depend on the token; here the argument about moduli speaks."""
    (parity, counting) = certify(model("retnet")).claims
    assert (parity.capability, parity.theorem) == ("parity", "unit modulus (ours)")
    assert counting.capability == "counting modulo m"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("kda", {"num_householder": 2}),
        ("deltaproduct", {"num_householder": 3}),
        ("gated_deltaproduct", {"num_householder": 4}),
        ("exact_deltaproduct", {"num_householder": 3}),
        ("homogeneous_deltaproduct", {"num_householder": 3}),
    ],
)
def test_three_matrices_in_0_to_1_are_left_to_the_argument_about_moduli(name, options):
    """With a decay for each channel there is one matrix more: two Householder factors are then three."""
    certificate = certify(scrambled(name, eigenvalue_range=(0, 1), **options))
    (claim,) = [claim for claim in certificate.claims if claim.capability == "parity"]
    assert claim.theorem == "unit modulus (ours)"


ONE_TOKEN = HOUSEHOLDER | {"gla", "mamba", "mamba2"}


@pytest.mark.parametrize("name", sorted(ONE_TOKEN | NO_TRANSITION | NO_THEOREM | {"mlstm", "retnet", "rwkv6"}))
def test_the_first_letter_is_only_denied_to_layers_that_see_the_current_token_alone(name):
    config = mixer_config(name)()
    fields = {field.name for field in dataclasses.fields(config)}
    certificate = certify(model(name, **({"conv_size": 0} if "conv_size" in fields else {})))
    assert certificate.rules_out("first letter") == (name in ONE_TOKEN)
    if "conv_size" in fields:
        assert not certify(model(name, conv_size=4)).rules_out("first letter")


@pytest.mark.parametrize("name", [name for name in ALL if issubclass(mixer_config(name), WidenedMixerConfig)])
def test_a_sound_bound_holds_what_is_measured(name):
    certificate = certify(scrambled(name, layers=2, scale=1.0))
    bounds = {(s.layer, s.head): s for s in certificate.spectra if s.scope == "sound bound"}
    assert len(bounds) == (0 if name in NO_THEOREM else len({(s.layer, s.head) for s in certificate.spectra}))
    for s in certificate.spectra:
        if s.scope != "sound bound" and s.tokens == 1 and bounds:
            bound = bounds[s.layer, s.head]
            assert bound.lowest <= s.lowest + 1e-6
            assert bound.largest >= s.largest - 1e-6
            assert bound.imaginary >= s.imaginary - 1e-6
            if s.beta_gap is not None:
                assert bound.beta_gap == pytest.approx(min(bound.beta_gap, s.beta_gap), abs=1e-6)


def test_a_large_vocabulary_is_measured_and_not_tabled(monkeypatch):
    scopes = {s.scope for s in certify(model("deltanet", conv_size=0)).spectra}
    monkeypatch.setattr(module, "MOST_TOKENS", 2)
    certificate = certify(model("deltanet", conv_size=0))
    assert {s.scope for s in certificate.spectra} == scopes - {"vocabulary, exact"}
    assert certificate.rules_out("first letter")  # that is about the architecture


def test_weights_that_keep_a_wide_range_above_0_rule_parity_out_by_a_sound_bound():
    """With a convolution no table over the vocabulary exists, and the norms of the weights do."""
    timid = model("mamba2", layers=2)
    with torch.no_grad():
        for block in timid._blocks():
            block.mixer.A_log.fill_(0.0)
    claims = [claim for claim in certify(timid).claims if claim.capability == "parity"]
    assert [(claim.scope, claim.theorem) for claim in claims] == [("sound bound", "T1")]
    with torch.no_grad():
        timid.blocks[1].mixer.dt_bias.add_(5)
    assert not certify(timid).rules_out("parity")


def test_a_bound_on_beta_is_a_bound_on_how_long_a_flip_lasts():
    for s in certify(model("deltanet")).spectra:
        if s.scope == "sound bound":
            assert s.beta_gap is not None
            assert s.lowest == pytest.approx(s.beta_gap - 1)
            assert s.horizon == pytest.approx(math.log(module.FADED) / math.log(1 - s.beta_gap))
    saturated = model("deltanet")
    with torch.no_grad():
        saturated.blocks[0].mixer.b_proj.weight.fill_(100.0)
    bounds = [s for s in certify(saturated).spectra if s.scope == "sound bound"]
    assert {(s.lowest, s.beta_gap, s.horizon) for s in bounds} == {(-1.0, 0.0, math.inf)}


@pytest.mark.parametrize("steps", [40, pytest.param(None, marks=pytest.mark.slow)])
def test_what_the_demo_trains(steps):
    """Every model of the demo in [0, 1] can't solve parity, and of none in [-1, 1] is that said."""
    runs = [run for run in load_experiment("demo", [0]).runs if run.config.task == "parity"]
    assert len(runs) == 4
    for run in runs:
        training = run.config.training
        training = dataclasses.replace(training, steps=steps or training.steps)
        trained = train(dataclasses.replace(run.config, training=training)).model.eval()
        certificate = certify(trained)
        narrow = run.config.model.mixer.eigenvalue_range.lo == 0
        assert certificate.rules_out("parity") == narrow
        assert ("cannot solve parity" in str(certificate)) == narrow
