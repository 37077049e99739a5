"""Compiled models: proved exact where their states can be enumerated, and wrong where the theory says they must be."""

import itertools
import time

import numpy as np
import pytest
import torch
from automaton_examples import dyck, full

from statetrack import Householder, linear_recurrence
from statetrack.automata import Automaton, group_automaton
from statetrack.mixers.exact_deltaproduct import ExactDeltaProduct
from statetrack.theory import construct
from statetrack.theory.construct import ConstructionError, compile, definite_length, plan, reflections
from statetrack.theory.verify import count_errors, verify


def random_automaton(seed):
    generator = torch.Generator().manual_seed(seed)
    states, letters = (int(torch.randint(1, most, (), generator=generator)) for most in (8, 4))
    transitions = torch.randint(states, (states, letters), generator=generator)
    return Automaton(transitions, 0, torch.randint(3, (states,), generator=generator))


# Three turn, and four merge into one of them in one step.
FORGETFUL = Automaton(
    torch.tensor([[1, 0], [2, 1], [0, 2], [4, 0], [5, 0], [6, 0], [3, 0]]), 3, torch.arange(7), ("turn", "merge")
)
GROUPS = ["Z2", "Z3", "Z4", "Z7", "Z12", "S3", "S4", "D5", "Q8", "A5", "S5", "Z2xZ2xS3"]
EXPRESSIONS = ["(ab)*", "a*b*", "a(a|b)*", "(a|b)*abb", "(a|b)*a(a|b)(a|b)", "(aa)*", "(a|b)*aba(a|b)*", "a"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", GROUPS)
def test_groups_are_exact_at_every_length_in_one_layer(name, dtype):
    automaton = group_automaton(name)
    model = compile(automaton, dtype=dtype)
    assert model.config.num_layers == 1
    assert verify(model, automaton, mode="exhaustive").exact
    assert count_errors(model, automaton, words=2, length=300) == (0, None)


@pytest.mark.parametrize("strategy", ["auto", "exclusion", "holonomy"])
@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_expressions_are_exact_at_every_length(expression, strategy):
    automaton = Automaton.from_regex(expression)
    model = compile(automaton, strategy=strategy, dtype=torch.bfloat16)
    assert verify(model, automaton, mode="exhaustive").exact
    assert count_errors(model, automaton, words=2, length=200) == (0, None)


@pytest.mark.parametrize("seed", range(20))
def test_random_automata_are_exact_by_every_strategy(seed):
    automaton = random_automaton(seed)
    for strategy in ("auto", "exclusion", "holonomy"):
        proof = verify(compile(automaton, strategy=strategy, dtype=torch.bfloat16), automaton, mode="exhaustive")
        assert proof.exact, proof


def test_all_maps_of_five_states_take_four_levels_and_every_order_of_exclusion_is_reached():
    automaton = full(5)
    model = compile(automaton)
    assert model.config.num_layers == 4
    proof = verify(model, automaton, mode="exhaustive")
    assert proof.exact
    assert proof.states == 120


@pytest.mark.parametrize(
    ("automaton", "layers", "exclusion_layers"),
    [(full(4), 3, 3), (FORGETFUL, 2, 6), (group_automaton("S4", "two"), 1, 23), (dyck(4), 5, 5)],
)
def test_holonomy_has_a_layer_for_each_height(automaton, layers, exclusion_layers):
    assert plan(automaton, "exclusion").num_layers == exclusion_layers
    model = compile(automaton, strategy="holonomy")
    assert model.config.num_layers == layers == plan(automaton, "holonomy").num_layers
    assert verify(model, automaton, mode="exhaustive").exact


@pytest.mark.parametrize(
    ("automaton", "strategy", "factors"),
    [
        (group_automaton("S5"), "representation", 4),
        (group_automaton("S5", "swaps"), "representation", 1),
        (group_automaton("Z8"), "representation", 4),
        (Automaton.from_regex("(ab)*"), "states", 2),
        (dyck(4), "states", 5),
        (Automaton.from_regex("(a|b)*a(a|b)(a|b)"), "definite", 3),
        (full(3), "exclusion", 3),
    ],
)
def test_the_ladder_takes_the_step_that_theory_allows(automaton, strategy, factors):
    chosen = plan(automaton)
    assert (chosen.strategy, chosen.num_householder) == (strategy, factors)
    assert (chosen.num_layers == 1) == (strategy != "exclusion")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_in_pairs_run_a_group_in_the_ordinary_mixer(dtype):
    automaton = group_automaton("S5", "generators")
    model = compile(automaton, keys="pair", dtype=dtype)
    assert model.config.mixer.name == "deltaproduct"
    assert count_errors(model, automaton, words=2, length=3000) == (0, None)
    state = model.scan(torch.randint(2, (1, 2000), generator=torch.Generator().manual_seed(0)))[1]
    recurrence = state[0]["recurrence"]
    assert torch.equal(recurrence, recurrence.round())  # no drift at all


def test_reflections_multiply_to_the_matrix_and_are_as_few_as_its_rank():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        images = torch.randperm(6, generator=generator).numpy()
        signs = (torch.randint(2, (6,), generator=generator) * 2 - 1).numpy()
        matrix = torch.zeros(6, 6, dtype=torch.float64)
        for axis in range(6):
            matrix[images[axis], axis] = float(signs[axis])
        product = torch.eye(6, dtype=torch.float64)
        keys = reflections(images, signs)
        for key in keys:
            k = torch.from_numpy(key).double()
            product = product - 2 / (k @ k) * torch.outer(k, k @ product)
        assert torch.equal(product, matrix)
        assert len(keys) == torch.linalg.matrix_rank(torch.eye(6, dtype=torch.float64) - matrix)


def test_how_many_last_letters_decide():
    assert definite_length(Automaton.from_regex("(a|b)*abb").transitions.numpy()) == 3
    assert definite_length(Automaton.from_regex("(aa)*").transitions.numpy()) is None


@pytest.mark.parametrize("letters", [2, 10])
def test_thousands_of_states_are_refused_in_seconds(letters):
    generator = torch.Generator().manual_seed(0)
    table = torch.stack([torch.randperm(2000, generator=generator) for _ in range(letters)], 1)
    begun = time.process_time()
    with pytest.raises(ConstructionError, match="2,000 states, and integers above 256"):
        compile(Automaton(table, 0, torch.arange(2000)))
    assert time.process_time() - begun < 10


@pytest.mark.parametrize(
    ("automaton", "options", "message"),
    [
        (full(3), {"strategy": "one_layer"}, "the exclusion cascade has 2 layers"),
        (full(3), {"strategy": "clever"}, "the strategies are auto, one_layer, exclusion"),
        (full(3), {"keys": "pair"}, "keys in pairs serve groups"),
        (full(3), {"strategy": "exclusion", "keys": "pair"}, "use raw keys"),
        (full(3), {"keys": "odd"}, "keys must be raw or pair"),
        (full(300), {}, "300 states, and integers above 256"),
        (group_automaton("Z7xA5"), {"strategy": "holonomy"}, "a level of the holonomy decomposition has 420 tiles"),
        (full(3), {"strategy": "holonomy", "keys": "pair"}, "use raw keys"),
        (full(12), {"strategy": "holonomy"}, "more than 2,048 sets.*the exclusion cascade has 11 layers"),
    ],
)
def test_what_can_not_be_compiled_is_refused_with_the_nearest_that_can(automaton, options, message):
    with pytest.raises(ValueError, match=message):
        compile(automaton, **options)


def test_models_of_an_impractical_size_are_refused(monkeypatch):
    monkeypatch.setattr(construct, "MAX_PARAMETERS", 1000)
    with pytest.raises(ConstructionError, match="parameters in 4 layers, more than the 1,000"):
        compile(full(5))
    with pytest.raises(ConstructionError, match="the exclusion cascade has 4 layers and smaller ones"):
        compile(full(5), strategy="holonomy")


def test_compiling_draws_nothing_at_random():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = compile(full(3))
    assert torch.equal(torch.get_rng_state(), before)
    for a, b in zip(first.parameters(), compile(full(3)).parameters(), strict=True):
        assert torch.equal(a, b)


# Negative controls


def test_a_cascade_that_hands_on_the_state_after_the_update_fails():
    """The proof of theorem 4 as printed: levels that see the state after the update can't know the action."""
    automaton = full(4)
    model = compile(automaton)
    with torch.no_grad():
        for block in model._blocks():
            assert isinstance(block.mixer, ExactDeltaProduct)
            weight = block.mixer.o_proj.weight  # its columns: what is read after the update, and before
            weight[weight[:, 1].nonzero().item()] = weight[weight[:, 0].nonzero().item()]
    assert verify(compile(automaton), automaton, mode="words", words=4, length=200).errors == 0
    assert verify(model, automaton, mode="words", words=4, length=200).errors > 0


def test_keys_of_unit_length_in_bfloat16_drift_without_normalization():
    """S5 with the keys (e_i - e_j) / sqrt 2, the points valued 1 to 5: half a value off before 2,000 tokens."""
    steps = 2000
    automaton = group_automaton("S5")
    images = [[int(point) for point in element] for element in itertools.permutations(range(5))]
    factors = [reflections(np.array(image)) for image in images]
    assert len(factors) == automaton.num_letters
    keys = torch.zeros(1, steps, 4, 1, 5)
    for step, letter in enumerate(torch.randint(120, (steps,), generator=torch.Generator().manual_seed(0)).tolist()):
        for slot, key in enumerate(factors[letter]):
            keys[0, step, slot, 0] = torch.from_numpy(key)
    beta, v, q = torch.full(keys.shape[:-1], 2.0), torch.zeros_like(keys), torch.eye(5)[0].expand(1, steps, 1, 5)

    def end(k, normalize):
        transition = Householder(k.bfloat16(), beta, normalize=normalize)
        return linear_recurrence(transition, q, v, initial_state=torch.eye(5)[None, None])[1]

    raw = end(keys, True)
    assert torch.equal(raw.sort(-1).values[..., :-1], torch.zeros_like(raw[..., :-1]))  # still a permutation, exactly
    error = torch.arange(1.0, 6) @ (raw - end(keys * 2**-0.5, False))[0, 0]
    assert error.abs().max() >= 0.5
