"""Tasks that are automata: labels against slow evaluation and arithmetic, streams, distribution."""

from dataclasses import replace
from itertools import permutations

import pytest
import torch
from sympy.combinatorics import Permutation
from sympy.combinatorics.named_groups import SymmetricGroup

from statetrack.automata import Automaton, group_automaton
from statetrack.tasks import get_task, list_tasks
from statetrack.tasks.automaton_task import AutomatonTask

NAMES = sorted(
    {family.example for family in list_tasks() if not family.needs}
    | {"group:S5:swaps", "group:A5xZ9", "modular_addition:2"}
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def automaton_of(name: str) -> Automaton:
    task = get_task(name)
    assert isinstance(task, AutomatonTask)
    return task.automaton


@pytest.fixture(params=[task for task in map(get_task, NAMES) if isinstance(task, AutomatonTask)], ids=lambda t: t.name)
def task(request) -> AutomatonTask:
    return request.param


@pytest.mark.parametrize("length", [1, 40, 700])
def test_labels_are_what_a_slow_automaton_says(task, length):
    automaton = task.automaton
    table, outputs = automaton.transitions.tolist(), automaton.outputs.tolist()
    ids, labels = task.sample(5, length, generator())
    for word, answers in zip(ids.tolist(), labels.tolist(), strict=True):
        state = automaton.start
        for letter, answer in zip(word, answers, strict=True):
            state = table[state][letter]
            assert answer == outputs[state]


@pytest.mark.parametrize("cuts", [[1] * 30, [29, 1], [300, 1, 299], [256, 257, 4097], [5000]])
def test_segments_are_the_whole_however_they_are_cut(task, cuts):
    whole = task.sample(3, sum(cuts), generator(5))
    stream = task.stream(3, generator(5))
    segments = [stream.next(length) for length in cuts]
    assert torch.equal(torch.cat([segment.ids for segment in segments], 1), whole.ids)
    assert torch.equal(torch.cat([segment.labels for segment in segments], 1), whole.labels)


def test_streams_do_not_share_their_state(task):
    one, other = task.stream(3, generator(1)), task.stream(3, generator(1))
    one.next(50)
    assert torch.equal(other.next(20).labels, task.sample(3, 20, generator(1)).labels)


def test_tokens_are_uniform_and_independent():
    ids, _ = get_task("modular_addition:3").sample(500, 100, generator())
    pairs = 3 * ids[:, :-1] + ids[:, 1:]
    assert torch.bincount(ids.flatten()) / ids.numel() == pytest.approx([1 / 3] * 3, abs=0.01)
    assert torch.bincount(pairs.flatten()) / pairs.numel() == pytest.approx([1 / 9] * 9, abs=0.01)


def test_parity_counts_the_ones():
    ids, labels = get_task("parity").sample(10, 300, generator())
    assert all(labels[b, t] == sum(ids[b, : t + 1].tolist()) % 2 for b in range(10) for t in range(0, 300, 7))
    assert torch.equal(labels, ids.cumsum(1) % 2)


@pytest.mark.parametrize("modulus", [2, 3, 5, 12, 60, 1000])
def test_modular_addition_is_the_running_sum(modulus):
    task = get_task(f"modular_addition:{modulus}")
    ids, labels = task.sample(8, 300, generator())
    assert torch.equal(labels, ids.cumsum(1) % modulus)
    assert (task.vocab_size, task.num_labels, task.chance) == (modulus, modulus, pytest.approx(1 / modulus))


def test_modular_addition_is_the_word_problem_of_the_cyclic_group():
    assert automaton_of("modular_addition:7") == automaton_of("group:Z7")
    assert get_task("modular_addition:007").name == "modular_addition:7"


def test_group_labels_are_sympys_running_products():
    elements = sorted((Permutation(list(images)) for images in permutations(range(3))), key=lambda p: p.array_form)
    assert set(elements) == set(SymmetricGroup(3).elements)
    ids, labels = get_task("group:S3").sample(4, 20, generator())
    for word, answers in zip(ids.tolist(), labels.tolist(), strict=True):
        running = Permutation(2)
        for letter, answer in zip(word, answers, strict=True):
            running = running * elements[letter]
            assert elements[answer] == running


@pytest.mark.parametrize(
    ("name", "vocabulary", "labels"),
    [
        ("group:S5", 120, 120),
        ("group:S5:swaps", 11, 120),
        ("group:A5:3-cycles", 21, 60),
        ("group:A5xZ9:generators", 3, 540),
    ],
)
def test_group_sizes_and_chance(name, vocabulary, labels):
    task = get_task(name)
    assert (task.name, task.vocab_size, task.num_labels) == (name, vocabulary, labels)
    assert task.chance == pytest.approx(1 / labels)


def automaton_task(transitions, outputs, start=0) -> AutomatonTask:
    automaton = Automaton(torch.tensor(transitions), start, torch.tensor(outputs))
    return AutomatonTask(name="test", description="an automaton", automaton=automaton)


@pytest.mark.parametrize(
    ("transitions", "outputs", "chance"),
    [
        ([[0, 1], [1, 1]], [0, 1], 1.0),  # a 1 is never forgotten: in the long run every word has one
        ([[1, 1], [0, 0]], [0, 1], 0.5),  # two states in turn: the average over time, where no limit exists
        ([[1, 1], [2, 2], [0, 0]], [0, 1, 1], 2 / 3),
        ([[1, 1], [2, 2], [1, 1]], [0, 1, 0], 0.5),  # the same after a state that never comes back
        ([[0, 1], [0, 1]], [0, 1], 0.5),  # the last letter
        ([[0, 1], [0, 2], [0, 2]], [0, 0, 1], 0.75),  # the last two letters are ones
        ([[1, 2], [1, 1], [2, 2]], [0, 1, 2], 0.5),  # the first letter
        ([[0, 1], [1, 0], [2, 2]], [0, 0, 1], 1.0),  # what is out of reach doesn't count
    ],
)
def test_chance_of_automata_that_are_no_groups(transitions, outputs, chance):
    assert automaton_task(transitions, outputs).chance == pytest.approx(chance, abs=1e-9)


def test_a_task_of_any_automaton_samples_it():
    task = automaton_task([[0, 1], [0, 2], [0, 2]], [0, 0, 1])
    ids, labels = task.sample(6, 400, generator())
    assert torch.equal(labels[:, 1:], ids[:, 1:] & ids[:, :-1])
    assert (labels[:, 0] == 0).all()


def test_equal_groups_share_their_tables():
    assert automaton_of("group:S4") is group_automaton("S4")


@pytest.mark.parametrize("name", ["bounded_dyck:2,5", "bounded_dyck:1,1", "bounded_dyck:1,4", "bounded_dyck:3,2"])
def test_a_chance_that_is_known_is_the_one_that_is_computed(name):
    task = get_task(name)
    assert isinstance(task, AutomatonTask)
    assert task.known_chance is not None
    assert task.chance == pytest.approx(replace(task, known_chance=None).chance, abs=1e-9)
