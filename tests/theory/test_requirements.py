"""Analyses against known monoids, groups and the constructions that exist."""

import json
import math
import time

import pytest
import torch
from automaton_examples import full

from statetrack.automata import Automaton, group_automaton
from statetrack.automata.monoid import transition_monoid
from statetrack.theory import requirements
from statetrack.theory.requirements import analyze


@pytest.mark.parametrize(
    ("expression", "states", "size", "aperiodic", "obstructed"),
    [
        ("(ab)*", 3, 6, True, False),
        ("a*b*", 3, 5, True, True),
        ("a(a|b)*", 3, 3, True, True),
        ("(a|b)*abb", 4, 7, True, False),
        ("(aa)*", 2, 2, False, False),
        ("((a|b)(a|b)(a|b))*", 3, 3, False, False),
    ],
)
def test_expressions(expression, states, size, aperiodic, obstructed):
    analysis = analyze(Automaton.from_regex(expression))
    assert (analysis.states, analysis.monoid_size, analysis.aperiodic) == (states, size, aperiodic)
    assert (analysis.one_layer_obstruction is not None) == obstructed
    # Where one layer is impossible, no construction with one layer may exist.
    assert analysis.plan.num_layers > 1 or not obstructed


@pytest.mark.parametrize(
    ("name", "order", "solvable", "primes", "factors"),
    [
        ("S3", 6, True, (2, 3), 2),
        ("Q8", 8, True, (2,), 4),
        ("D4", 8, True, (2,), 2),
        ("S4", 24, True, (2, 3), 2),
        ("A5", 60, False, (2, 3, 5), 4),
        ("S5", 120, False, (2, 3, 5), 4),
    ],
)
def test_groups(name, order, solvable, primes, factors):
    analysis = analyze(group_automaton(name))
    (group,) = analysis.groups
    assert (group.name, group.order, group.solvable, group.primes) == (name, order, solvable, primes)
    assert analysis.group
    assert (analysis.plan.num_layers, analysis.plan.num_householder) == (1, factors)
    assert not analysis.one_layer_obstruction


def test_counting_modulo_5_with_multiplication():
    states = torch.arange(5)
    letters = [(states + k) % 5 for k in range(5)] + [states * k % 5 for k in range(5)]
    analysis = analyze(Automaton(torch.stack(letters, 1), 0, states))
    assert analysis.monoid_size == 25
    assert [group.order for group in analysis.groups] == [20]


def test_the_witness_of_an_obstruction_is_one():
    automaton = full(3)
    analysis = analyze(automaton)
    o = analysis.one_layer_obstruction
    e, f = ([int(letter) for letter in word] for word in (o.e, o.f))

    def after(word):
        return int(analysis.automaton.run(torch.tensor([word]), o.state)[0, -1])

    assert after(e + f + e) != after(f + e)
    for word in (e, f):
        doubled = torch.tensor([word + word, word * 2])[:1]
        for state in range(3):
            once = analysis.automaton.run(torch.tensor([word]), state)[0, -1]
            assert analysis.automaton.run(doubled, state)[0, -1] == once


def test_beyond_the_limit_primes_and_a_witness_are_still_found():
    whole, limited = analyze(full(5)), analyze(full(5), monoid_limit=100)
    assert limited.monoid_size is None
    assert limited.primes == whole.primes == (2, 3, 5)
    assert limited.solvable == whole.solvable == False  # noqa: E712
    assert limited.one_layer_obstruction is not None
    assert [g.name for g in limited.groups] == [g.name for g in whole.groups] == ["S5", "S4", "S3", "Z2"]


@pytest.mark.parametrize(("states", "order"), [(12, 479001600), (100, math.factorial(100))])
def test_symmetric_groups_beyond_the_limit_are_named(states, order):
    generator = torch.Generator().manual_seed(0)
    letters = [(torch.arange(states) + 1) % states, torch.randperm(states, generator=generator)]
    analysis = analyze(Automaton(torch.stack(letters, 1), 0, torch.arange(states)), monoid_limit=1000)
    assert [(g.name, g.order, g.solvable) for g in analysis.groups] == [(f"S{states}", order, False)]
    assert analysis.primes[-1] == {12: 11, 100: 97}[states]
    assert analysis.one_layer_obstruction is None


def test_alternating_groups_beyond_the_limit_are_named():
    states = torch.arange(11)
    cycle, three = (states + 1) % 11, torch.tensor([1, 2, 0, *range(3, 11)])
    analysis = analyze(Automaton(torch.stack([cycle, three], 1), 0, states), monoid_limit=1000)
    assert [(g.name, g.order) for g in analysis.groups] == [("A11", 19958400)]


@pytest.mark.parametrize(
    ("states", "merges", "message"), [(96, True, "too many to analyse"), (1200, False, "too large")]
)
def test_monoids_that_are_out_of_reach_are_refused(states, merges, message):
    generator = torch.Generator().manual_seed(0)
    letters = [torch.randint(states, (states,), generator=generator)] if merges else []
    letters += [torch.randperm(states, generator=generator) for _ in range(2)]
    with pytest.raises(ValueError, match=message):
        analyze(Automaton(torch.stack(letters, 1), 0, torch.arange(states)), monoid_limit=1000)


def test_groups_with_hundreds_of_generators_are_described_in_seconds():
    generator = torch.Generator().manual_seed(1)
    letters = [torch.randint(30, (30,), generator=generator) for _ in range(2)]
    begun = time.process_time()
    analysis = analyze(Automaton(torch.stack(letters, 1), 0, torch.arange(30)))
    assert time.process_time() - begun < 20  # a minute and more with all generators
    names = [g.name for g in analysis.groups]
    assert names[:3] == ["S7", "S6", "S5"]
    assert [name for name, g in zip(names, analysis.groups, strict=True) if not g.solvable] == names[:3]
    assert {"S3", "Z4 x Z3"} <= set(names)


@pytest.mark.parametrize("name", ["Z12", "Q8", "S4", "A4xZ5"])
def test_letters_of_a_group_from_one_cycle_are_what_each_does_to_all_states(name):
    automaton = group_automaton(name).minimized()
    found = requirements._letters(automaton, transition_monoid(automaton))
    assert found == requirements._letters(automaton, None)


def test_requirements_name_the_theorem_for_each_need():
    def needs(automaton):
        return {(r.quantity, r.theorem) for r in analyze(automaton).requirements if r.kind == "necessary"}

    assert needs(Automaton.from_regex("(aa)*")) == {("eigenvalue_range", "T1")}
    three = needs(Automaton.from_regex("(aaa)*"))
    assert ("num_householder", "T2") in three
    assert ("transition", "O3 (ours)") in three
    # Swaps alone have period 2: one reflection a token is enough for S3, and T2 must not say otherwise.
    swaps = needs(group_automaton("S3", "swaps"))
    assert ("num_householder", "T2") not in swaps
    assert ("transition", "arXiv 2404.08819") in needs(group_automaton("S5"))
    assert needs(Automaton.from_regex("(ab)*")) == set()


def test_the_data_are_json():
    data = json.loads(json.dumps(analyze(full(3)).data()))
    assert {"states", "monoid_size", "aperiodic", "group", "solvable", "primes", "requirements"} <= set(data)
    assert data["one_layer_obstruction"]["state"] in (0, 1, 2)
    assert analyze(Automaton.from_regex("(ab)*")).data()["one_layer_obstruction"] is None
