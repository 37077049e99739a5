"""Transition monoids against GAP's numbers and the closed forms of full transformation monoids."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from automaton_examples import dyck, full

from statetrack.automata import Automaton, automaton_from_json, automaton_to_json, group_automaton, read_automaton
from statetrack.automata import monoid as module
from statetrack.automata.monoid import image_groups, transition_monoid
from statetrack.automata.representations import smallest_representation


@pytest.mark.parametrize(
    ("automaton", "elements", "d", "h", "idempotents"),
    [(full(3), 27, 3, 13, 10), (full(4), 256, 4, 71, 41), (dyck(4), 56, 6, 56, 16)],
)
def test_gap_counts_the_same(automaton, elements, d, h, idempotents):
    monoid = transition_monoid(automaton)
    assert len(monoid) == elements
    assert monoid.green.d_class.max() + 1 == d
    assert monoid.green.h_class.max() + 1 == h
    assert len(monoid.idempotents) == idempotents


@pytest.mark.parametrize(
    ("name", "letters"),
    [("S4", "all"), ("Z60", "all"), pytest.param("A5xZ9", "all", marks=pytest.mark.slow), ("S5", "swaps")],
)
def test_a_group_with_many_letters_is_enumerated_by_a_few_of_them_with_the_same_result(name, letters):
    automaton = group_automaton(name, letters)
    table = automaton.transitions.numpy()
    whole, found = module._enumerate(table, 1000), transition_monoid(automaton)
    assert whole is not None
    for other in (found, module._enumerate_group(table, 1000), module._regular_group(table, 1000)):
        for field in ("elements", "parents", "last_letters", "right", "levels"):
            assert np.array_equal(getattr(other, field), getattr(whole, field))
    assert found.green.h_class.max() == 0
    assert transition_monoid(automaton, limit=len(found) - 1) is None


def test_a_group_that_acts_on_fewer_states_than_it_has_elements_is_not_its_own_table():
    square = np.array([[1, 2, 3, 0], [0, 3, 2, 1], [1, 0, 3, 2], [2, 3, 0, 1]]).T  # rotations and reflections
    pairs = np.array([[1, 0, 3, 2]]).T  # no word leads from one pair to the other
    for table in (square, pairs, np.concatenate([square, square], 1)):
        assert module._regular_group(table, 1000) is None
    letters = torch.tensor([np.random.default_rng(i).permutation(5).tolist() for i in range(20)]).T.contiguous()
    assert len(transition_monoid(Automaton(letters, 0, torch.arange(5))) or ()) == 120


def test_words_products_and_the_left_graph_are_the_definition():
    automaton = full(3)
    monoid = transition_monoid(automaton)
    for element in range(len(monoid)):
        word = torch.tensor([monoid.word(element)], dtype=torch.int64)
        for state in range(3):
            reached = automaton.run(word, state)[0, -1] if word.numel() else state
            assert reached == monoid.elements[element, state]
        for letter in range(3):
            number = monoid.right[0, letter]
            assert monoid.left[element, letter] == monoid.products[number, element]
            assert monoid.right[element, letter] == monoid.products[element, number]


def test_beyond_the_limit_there_is_no_monoid_but_there_are_the_groups_on_images():
    assert transition_monoid(full(5), limit=3124) is None
    assert len(transition_monoid(full(5), limit=3125)) == 3125
    assert [len(group.states) for group in image_groups(full(5))] == [5, 4, 3, 2]
    with pytest.raises(ValueError, match="more than 3 sets"):
        image_groups(full(5), limit=3)


@pytest.mark.parametrize(
    ("name", "degrees", "reflections"),
    [
        ("Z2", [1], 1),
        ("Z4", [2], 2),
        ("Z8", [4], 4),
        ("Z60", [2, 3, 5], 4),
        ("S3", [3], 2),
        ("S4", [3], 2),
        ("Q8", [4], 4),
        ("S5", [5], 4),
        ("A5xZ9", [5, 9], 8),
    ],
)
def test_small_representations_are_homomorphisms_and_faithful(name, degrees, reflections):
    products = group_automaton(name).transitions.numpy()
    letters = range(len(products))
    found = smallest_representation(products, list(letters))
    assert sorted(r.degree for r in found) == degrees
    assert max(r.reflections(list(letters)) for r in found) == reflections
    assert frozenset.intersection(*(r.kernel for r in found)) == {0}
    for r in found:
        for g, h in torch.randint(len(products), (30, 2), generator=torch.Generator().manual_seed(0)).tolist():
            assert (r.images[h][r.images[g]] == r.images[products[g, h]]).all()
            assert (r.signs[g] * r.signs[h][r.images[g]] == r.signs[products[g, h]]).all()


# Where automata come from


@pytest.mark.parametrize("expression", ["(ab)*", "a*b*", "(a|b)*abb", "((a|b)(a|b)(a|b))*", "a(b|ab)*b?"])
def test_minimal_automata_have_the_size_of_automata_libs(expression):
    from automata.fa.dfa import DFA
    from automata.fa.nfa import NFA

    dfa = DFA.from_nfa(NFA.from_regex(expression), minify=True)
    automaton = Automaton.from_regex(expression)
    assert automaton.num_states == len(dfa.to_complete().minify().states)
    for word in ["", "ab", "abab", "aabb", "babb", "aba", "bbb"]:
        assert automaton.accepts(word) == dfa.accepts_input(word)


def test_minimizing_merges_what_no_word_tells_apart_and_drops_what_no_word_reaches():
    automaton = Automaton(torch.tensor([[1, 2], [0, 2], [2, 0], [0, 0]]), 0, torch.tensor([1, 1, 0, 1]), ("a", "b"))
    small = automaton.minimized()
    assert small.num_states == 2
    words = torch.randint(2, (5, 40), generator=torch.Generator().manual_seed(0))
    assert torch.equal(small.labels(words), automaton.labels(words))
    assert small.minimized() == small
    assert replace(small, outputs=small.outputs.clone()).minimized() == small


def test_minimizing_numbers_states_in_the_order_in_which_they_are_met():
    generator = torch.Generator().manual_seed(0)
    for outputs in (2, 3, 40):
        table = torch.randint(40, (40, 3), generator=generator)
        automaton = Automaton(table, 7, torch.randint(outputs, (40,), generator=generator))
        small, met = automaton.minimized(), [0]
        for state in met:
            met += [s for s in dict.fromkeys(small.transitions[state].tolist()) if s not in met]
        assert met == list(range(small.num_states))
        words = torch.randint(3, (20, 50), generator=generator)
        assert torch.equal(small.labels(words), automaton.labels(words))


@pytest.mark.parametrize(
    ("expression", "alphabet", "message"),
    [
        ("(ab", None, r"'\(' at place 1 is not closed; add '\)'"),
        ("ab)", None, r"'\)' at place 3 closes nothing"),
        ("a{2,1}", None, r"\{2,1\} asks for at least 2 and at most 1 repetitions; write \{1,2\}$"),
        ("a{x}", None, r"'\{' at place 2 begins no number of repetitions; write \{2\}, \{1,2\} or \{2,\}"),
        ("a{,}", None, "begins no number of repetitions"),
        ("a{-1,2}", None, "begins no number of repetitions"),
        ("a{99999999}", None, "repeat at most 10,000 times"),
        ("((a{100}){100}){2}", None, "more than 10,000 letters; write a shorter one"),
        (10_001 * "a", None, "more than 10,000 letters; write a shorter one"),
        ("b|[ab", None, r"the class '\[ab' has no end; write '\[ab\]'"),
        ("a]", None, r"'\]' at place 2 closes nothing"),
        ("[z-a]", None, "the range z-a runs backwards; write a-z$"),
        (r"[b-\a]", None, "runs backwards"),
        ("[]", None, r"the class \[\] is empty"),
        ("[^]", None, "is empty"),
        ("*a", None, r"'\*' at place 1 has nothing before it to repeat"),
        ("b(?a)", None, "'\\?' at place 3 has nothing before it"),
        ("a|", None, r"'\|' at its end has nothing on its right; write \(\)"),
        ("(a|)b", None, r"'\|' before '\)' at place 4 has nothing on its right"),
        ("a&|b", None, r"'\|' at place 3 has nothing on its left"),
        (r"\d", None, r"no class here; write the letters out, such as \[0-9\]"),
        ("a\\", None, "a backslash at its end quotes nothing"),
        ("a|c", "ab", "its letter 'c' is not in the alphabet 'ab'"),
        ("[a-c]", "ab", "its letter 'c' is not in the alphabet 'ab'"),
        ("()", None, "names no letters"),
        ("ab", "", "single characters"),
        ("ab", ["ab"], "single characters"),
    ],
)
def test_what_is_no_expression_is_refused(expression, alphabet, message):
    with pytest.raises(ValueError, match=message):
        Automaton.from_regex(expression, alphabet)


@pytest.mark.parametrize(
    ("expression", "letters"),
    [("a{1,2}b{,3}", "ab"), ("[a-c]", "abc"), (r"\(a\)", "()a"), (r"[\na-]", "\n-a"), ("[^b]c", "bc"), ("a b", " ab")],
)
def test_the_letters_of_an_expression_are_those_that_it_names(expression, letters):
    assert Automaton.from_regex(expression).letter_names == tuple(sorted(letters))


def test_json_of_both_kinds_is_read(tmp_path):
    automaton = Automaton.from_regex("a*b*")
    assert automaton_from_json(automaton_to_json(automaton)) == automaton
    file = tmp_path / "dfa.json"
    file.write_text(
        '{"states": ["p", "q"], "input_symbols": ["a"], "transitions": {"p": {"a": "q"}}, '
        '"initial_state": "p", "final_states": ["q"]}'
    )
    assert read_automaton(file).transitions.tolist() == [[1], [2], [2]]
    assert automaton_from_json('{"transitions": [[1], [0]], "accepting": [1]}').outputs.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "an automaton is a JSON object"),
        ('{"transitions": [[0]], "outputs": [0], "alphabet": "a"}', "unknown key alphabet"),
        ('{"transitions": [[0]]}', "needs transitions, and either outputs or accepting"),
        ('{"transitions": [[0], [1, 1]], "outputs": [0, 0]}', "transitions must be a list of lists of integers"),
        ('{"initial_state": "p"}', "a DFA needs"),
        ("", "not valid JSON"),
        ("[]", "an automaton is a JSON object"),
        ("[" * 100_000, "nested too deep"),
        ("{}", "needs transitions"),
        ('{"transitions": [[0, 1], [1]], "outputs": [0, 1]}', "all as long"),
        ('{"transitions": [[0, 1], [1, true]], "outputs": [0, 1]}', "integers"),
        ('{"transitions": [[0, 1.0], [1, 0]], "outputs": [0, 1]}', "integers"),
        ('{"transitions": [[0, 2], [1, 0]], "outputs": [0, 1]}', "states from 0 to 1"),
        ('{"transitions": [[0, 1], [1, 0]], "outputs": [0, 1], "start": true}', "start must be the number of a state"),
        ('{"transitions": [[0, 1], [1, 0]], "outputs": [0, 1000000000000]}', "labels from 0 to 65,535"),
        ('{"transitions": [[0, 1], [1, 0]], "accepting": 1}', "accepting must be a list"),
        ('{"transitions": [[0, 1], [1, 0]], "accepting": null}', "accepting must be a list"),
        ('{"transitions": [[0, 1], [1, 0]], "accepting": [2]}', "states from 0 to 1"),
        ('{"transitions": [[0, 1], [1, 0]], "outputs": [0, 1], "colour": 1}', "unknown key colour"),
        ('{"initial_state": "p"}', "is missing"),
        (
            '{"states": ["p"], "input_symbols": ["a"], "transitions": {"p": {"a": "q"}}, "initial_state": "p", '
            '"final_states": []}',
            "not the arguments of automata-lib's DFA",
        ),
        (
            '{"states": ["p"], "input_symbols": ["a"], "transitions": {}, "initial_state": "p", "final_states": [], '
            '"colour": 1}',
            "unknown key colour",
        ),
    ],
)
def test_json_of_no_automaton_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        automaton_from_json(text)


def test_generators_are_read_in_cycle_notation():
    automaton = group_automaton("S5", "(1 2),(1 2 3 4 5)")
    assert automaton.letter_names == ("(1 2)", "(1 2 3 4 5)")
    # Written from 0 they are SymPy's generators of S5, in the other order.
    assert torch.equal(automaton.transitions.flip(1), group_automaton("S5", "generators").transitions)
    assert group_automaton("(1 2),(1 2 3)").num_states == 6
    with pytest.raises(ValueError, match="have no point in common"):
        group_automaton("S3", "(1 2)(2 3)")
    with pytest.raises(ValueError, match="is not an element of A5"):
        group_automaton("A5", "(1 2)")
