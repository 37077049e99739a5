"""Group automata against SymPy's own multiplication, known orders and the group axioms."""

import math
import random
import subprocess
import sys
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sympy.combinatorics import Permutation, PermutationGroup
from sympy.combinatorics.group_constructs import DirectProduct
from sympy.combinatorics.named_groups import AlternatingGroup, CyclicGroup, DihedralGroup, SymmetricGroup

from statetrack.automata import Automaton, group_automaton
from statetrack.automata.groups import LETTERS, MAX_ELEMENTS

SYMPY = {
    "Z2": CyclicGroup(2),
    "Z7": CyclicGroup(7),
    "S2": SymmetricGroup(2),
    "S3": SymmetricGroup(3),
    "S4": SymmetricGroup(4),
    "S5": SymmetricGroup(5),
    "A3": AlternatingGroup(3),
    "A4": AlternatingGroup(4),
    "A5": AlternatingGroup(5),
    "D3": DihedralGroup(3),
    "D4": DihedralGroup(4),
    "D9": DihedralGroup(9),
    "S3xZ4": DirectProduct(SymmetricGroup(3), CyclicGroup(4)),
    "Z2xZ2xS3": DirectProduct(CyclicGroup(2), CyclicGroup(2), SymmetricGroup(3)),
    "A4xD3": DirectProduct(AlternatingGroup(4), DihedralGroup(3)),
}
ORDERS = {
    "Z60": 60,
    "S5": 120,
    "S6": 720,
    "A5": 60,
    "A6": 360,
    "D3": 6,
    "D11": 22,
    "Q8": 8,
    "A5xZ9": 540,
    "Z2xZ2xS3": 24,
}


def sorted_elements(group: PermutationGroup) -> list[Permutation]:
    return sorted(cast("list[Permutation]", group.elements), key=lambda element: element.array_form)


def names(automaton: Automaton) -> tuple[str, ...]:
    assert automaton.state_names is not None
    return automaton.state_names


@pytest.mark.parametrize("name", SYMPY)
def test_products_are_sympys(name):
    # In SymPy's direct product the factors act on points of their own, first factor first, so that the lexicographic
    # order of the whole is that of the pairs.
    elements = sorted_elements(SYMPY[name])
    table = group_automaton(name).transitions
    assert table.shape == (len(elements), len(elements))
    random_source = random.Random(0)
    for _ in range(400):
        a, b = random_source.randrange(len(elements)), random_source.randrange(len(elements))
        assert elements[table[a, b]] == elements[a] * elements[b]


def test_a_word_of_permutations_multiplies_from_left_to_right():
    elements = sorted_elements(SYMPY["S4"])
    letters = torch.randint(24, (1, 30), generator=torch.Generator().manual_seed(0))
    running = Permutation(3)
    expected = []
    for letter in letters[0].tolist():
        running = running * elements[letter]
        expected.append(elements.index(running))
    assert group_automaton("S4").labels(letters)[0].tolist() == expected


@pytest.mark.parametrize(("name", "order"), ORDERS.items())
def test_orders_and_axioms(name, order):
    automaton = group_automaton(name)
    table, numbers = automaton.transitions, torch.arange(order)
    assert table.shape == (order, order)
    assert automaton.start == 0
    assert torch.equal(automaton.outputs, numbers)
    assert torch.equal(table[0], numbers), "element 0 is neutral from the left"
    assert torch.equal(table[:, 0], numbers), "and from the right"
    assert torch.equal(table.sort(0).values, numbers[:, None].expand(order, order)), "letters permute the states"
    assert torch.equal(table.sort(1).values, numbers.expand(order, order)), "a b = a c only for b = c"
    a, b, c = torch.randint(order, (3, 5000), generator=torch.Generator().manual_seed(0))
    assert torch.equal(table[table[a, b], c], table[a, table[b, c]]), "products are associative"
    assert automaton.is_permutation_automaton


def test_the_largest_group_is_built():
    assert math.factorial(7) == MAX_ELEMENTS
    automaton = group_automaton("Z5040")
    assert automaton.num_states == 5040
    assert automaton.transitions[5000, 4000] == 3960


@pytest.mark.slow
def test_s7_is_built():
    automaton = group_automaton("S7")
    assert automaton.num_states == 5040
    assert automaton.is_permutation_automaton


def test_the_element_k_of_a_cyclic_group_is_k():
    numbers = torch.arange(12)
    automaton = group_automaton("Z12")
    assert torch.equal(automaton.transitions, (numbers[:, None] + numbers) % 12)
    assert automaton.letter_names == tuple(map(str, range(12)))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(["Z2", "Z3", "S3", "A4", "D4", "Q8"]), min_size=2, max_size=3))
def test_products_act_on_every_factor_by_itself(factors):
    automaton = group_automaton("x".join(factors))
    tables = [group_automaton(factor).transitions for factor in factors]
    sizes = tuple(len(table) for table in tables)
    assert automaton.num_states == math.prod(sizes)
    a, b = torch.randint(automaton.num_states, (2, 200), generator=torch.Generator().manual_seed(0))
    product = torch.unravel_index(automaton.transitions[a, b], sizes)
    for table, left, right, both in zip(
        tables, torch.unravel_index(a, sizes), torch.unravel_index(b, sizes), product, strict=True
    ):
        assert torch.equal(table[left, right], both)


def test_q8_is_the_quaternion_group():
    table = group_automaton("Q8").transitions
    orders = []
    for element in range(8):
        power, order = element, 1
        while power:
            power, order = int(table[power, element]), order + 1
        orders.append(order)
    # One element of order 2 and six of order 4 tell it from the four other groups with eight elements.
    assert sorted(orders) == [1, 2, 4, 4, 4, 4, 4, 4]


@pytest.mark.parametrize(
    ("name", "letters", "count"),
    [
        ("S5", "all", 120),
        ("S5", "generators", 2),
        ("S5", "swaps", 11),
        ("S5", "3-cycles", 31),
        ("A5", "3-cycles", 21),
        ("A5xZ9", "generators", 3),
        ("Z2xS3", "swaps", 5),
        ("Q8", "generators", 2),
    ],
)
def test_letters_may_be_some_of_the_elements(name, letters, count):
    whole, automaton = group_automaton(name), group_automaton(name, letters)
    assert automaton.num_letters == count
    assert automaton.num_states == automaton.num_outputs == whole.num_states
    # What a letter does to the identity says which element it is.
    assert torch.equal(automaton.transitions, whole.transitions[:, automaton.transitions[0]])
    assert automaton.letter_names == tuple(names(whole)[element] for element in automaton.transitions[0])
    assert automaton.reachable().all()


@pytest.mark.parametrize(("letters", "moved"), [("swaps", {0, 2}), ("3-cycles", {0, 2, 3})])
def test_letters_are_chosen_by_the_points_that_they_move(letters, moved):
    elements = sorted_elements(SYMPY["S4"])
    chosen = group_automaton("S4", letters).transitions[0].tolist()
    assert {len(elements[element].support()) for element in chosen} == moved
    assert len(chosen) == sum(len(element.support()) in moved for element in elements)


def test_generators_are_sympys():
    elements = sorted_elements(SYMPY["A4"])
    chosen = group_automaton("A4", "generators").transitions[0].tolist()
    assert [elements[element] for element in chosen] == SYMPY["A4"].generators


def test_names_are_cycles():
    assert names(group_automaton("S3")) == ("()", "(1 2)", "(0 1)", "(0 1 2)", "(0 2 1)", "(0 2)")
    assert names(group_automaton("Z2xS3"))[6:8] == ("1,()", "1,(1 2)")
    assert names(group_automaton("D4"))[2] == "(0 1)(2 3)"
    for name, element in zip(names(group_automaton("S4")), sorted_elements(SYMPY["S4"]), strict=True):
        cycles = [list(map(int, cycle.split())) for cycle in name.strip("()").split(")(") if cycle]
        assert Permutation(cycles, size=4) == element


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "unknown group ''; groups are Z, S, A or D with a number, Q8, and products"),
        ("M11", r"unknown group 'M11'; groups are .* such as S3, A5, D4, A5xZ9 or Z2\^4"),
        ("S", "unknown group 'S'; groups are"),
        ("S03", "unknown group 'S03'; groups are"),
        ("S3x", "unknown group 'S3x'; groups are"),
        ("s3", "unknown group 's3'; did you mean 'S3'"),
        ("a5Xz9", "unknown group 'a5Xz9'; did you mean 'A5xZ9'"),
        ("Z1", "groups Z start with Z2, as smaller ones have one element only; got Z1"),
        ("S1", "groups S start with S2"),
        ("A2", "groups A start with A3"),
        ("D2", "groups D start with D3, as D1 is Z2 and D2 is Z2xZ2; got D2"),
        ("S8", "the group S8 has more than 5,040 elements"),
        ("Z5041", "the group Z5041 has more than 5,040 elements"),
        ("D2521", "the group D2521 has more than 5,040 elements"),
        ("S5040", "the group S5040 has more than 5,040 elements"),
        ("Z99999999999999999999", "the group Z9+ has more than 5,040 elements"),
        ("S6xZ8", "the group S6xZ8 has more than 5,040 elements"),
    ],
)
def test_what_is_no_group_of_ours_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        group_automaton(name)


def test_letters_that_do_not_exist_or_do_not_generate_are_refused():
    with pytest.raises(ValueError, match=f"unknown letters 'swap' of a group; they may be {', '.join(LETTERS)}"):
        group_automaton("S3", "swap")
    with pytest.raises(
        ValueError, match="the letters 'swaps' reach only 1 of the 60 elements of A5; 'all' and 'generators'"
    ):
        group_automaton("A5", "swaps")


def test_importing_leaves_sympy_and_automata_lib_out():
    code = (
        "import sys, torch; print('sympy' in sys.modules); import statetrack.automata, statetrack.tasks as t;"
        "t.get_task('parity'); t.list_tasks(); print(*sorted({'sympy', 'automata'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    with_torch, loaded = result.stdout.splitlines()
    # torch itself imports SymPy now and then; only what comes on top of it counts.
    if with_torch == "True":
        pytest.skip("importing torch imports SymPy")
    assert not loaded
