"""Automata against step-by-step evaluation, automata-lib's DFAs and plain arithmetic."""

import copy
import pickle
import random

import pytest
import torch
from automata.fa.dfa import DFA
from hypothesis import given, settings
from hypothesis import strategies as st

from statetrack.automata import Automaton
from statetrack.automata import automaton as module
from statetrack.automata.prefixes import Prefixes
from statetrack.tasks import get_task

PARITY = Automaton(torch.tensor([[0, 1], [1, 0]]), 0, torch.tensor([0, 1]), ("0", "1"), ("even", "odd"))
LONG = module.DIRECT_LENGTH + 1


def random_automaton(states: int, letters: int, seed: int = 0) -> Automaton:
    generator = torch.Generator().manual_seed(seed)
    return Automaton(
        transitions=torch.randint(states, (states, letters), generator=generator),
        start=states - 1,
        outputs=torch.randint(3, (states,), generator=generator),
    )


def words(automaton: Automaton, batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(automaton.num_letters, (batch, length), generator=torch.Generator().manual_seed(seed))


def states_by_definition(automaton: Automaton, letters: torch.Tensor, starts: list[int]) -> list[list[int]]:
    table = automaton.transitions.tolist()
    result = []
    for word, state in zip(letters.tolist(), starts, strict=True):
        visited = []
        for letter in word:
            state = table[state][letter]
            visited.append(state)
        result.append(visited)
    return result


# Evaluation


@pytest.mark.parametrize("length", [0, 1, 2, 40, LONG - 1, LONG, LONG + 1, 289, 290, 1009, 4096, 4097, 8193])
@pytest.mark.parametrize(("states", "letters", "batch"), [(1, 1, 1), (2, 2, 3), (7, 3, 2)])
def test_run_is_the_definition_at_every_length(states, letters, batch, length):
    automaton = random_automaton(states, letters)
    ids = words(automaton, batch, length)
    result = automaton.run(ids)
    assert result.dtype == torch.int64
    assert result.is_contiguous()
    assert result.tolist() == states_by_definition(automaton, ids, [automaton.start] * batch)


def test_a_long_word_is_read_in_blocks_and_one_with_many_states_letter_by_letter(monkeypatch):
    calls = []
    monkeypatch.setattr(
        Automaton, "_run_blocks", lambda self, letters, start, states: calls.append(letters.shape) or states.zero_()
    )
    small, large = random_automaton(2, 2), random_automaton(module.BLOCKED_WORK["cpu"] + 1, 2)
    small.run(words(small, 1, module.DIRECT_LENGTH))
    large.run(words(large, 1, LONG))
    assert calls == []
    small.run(words(small, 1, LONG))
    assert calls == [(LONG, 1)]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_blocks_agree_with_steps(data):
    automaton = random_automaton(
        data.draw(st.integers(1, 9)), data.draw(st.integers(1, 4)), data.draw(st.integers(0, 99))
    )
    batch, length = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 700))
    ids = words(automaton, batch, length).T.contiguous()
    start = words(random_automaton(1, automaton.num_states), 1, batch)[0]
    by_steps, by_blocks = torch.full_like(ids, -1), torch.full_like(ids, -1)
    automaton._run_steps(ids, start, by_steps)
    automaton._run_blocks(ids, start, by_blocks)
    assert torch.equal(by_blocks, by_steps)


@pytest.mark.parametrize("length", [1, 2, 3, 40, 64, 65, LONG, 8193])
@pytest.mark.parametrize(
    ("automaton", "elements", "cyclic"),
    [
        (PARITY, 2, True),
        (get_task("modular_addition:7").automaton, 7, True),
        (Automaton.from_group("A4"), 12, False),
        (Automaton.from_group("Z2xZ2"), 4, False),
        (Automaton.from_regex("(ab|ba)*"), None, False),
        (random_automaton(3, 2, seed=3), None, False),
        (random_automaton(1, 1), 1, True),
    ],
)
def test_words_read_as_products_agree_with_steps(automaton, elements, cyclic, length, monkeypatch):
    monkeypatch.setitem(module.SCANNED_ELEMENTS, "cpu", 128)
    prefixes = Prefixes.of(automaton, 128)
    assert prefixes is not None
    assert (prefixes.products is None) == cyclic
    assert elements in (None, prefixes.num_elements)
    calls = []
    run = Prefixes.run
    monkeypatch.setattr(Prefixes, "run", lambda self, *inputs: calls.append(1) or run(self, *inputs))
    ids, starts = words(automaton, 3, length), words(random_automaton(1, automaton.num_states), 1, 3)[0]
    expected = torch.empty(length, 3, dtype=torch.int64)
    automaton._run_steps(ids.T.contiguous(), starts, expected)
    assert torch.equal(copy.copy(automaton).run(ids, starts), expected.T)
    assert len(calls) == (0 if length == 1 else -(-length // module.WINDOW))


def test_automata_of_large_monoids_are_not_read_as_products():
    automaton = Automaton.from_group("S5")
    assert Prefixes.of(automaton, 119) is None
    assert Prefixes.of(automaton, 120) is not None


@pytest.mark.parametrize("length", [5, LONG])
def test_run_starts_where_it_is_told(length):
    automaton = random_automaton(5, 2)
    ids = words(automaton, 3, length)
    assert automaton.run(ids, 2).tolist() == states_by_definition(automaton, ids, [2, 2, 2])
    starts = torch.tensor([4, 0, 1], dtype=torch.int32)
    assert automaton.run(ids, starts).tolist() == states_by_definition(automaton, ids, [4, 0, 1])


@pytest.mark.parametrize("cut", [1, 100, LONG, 5000])
def test_segments_agree_with_the_whole(cut):
    automaton = random_automaton(6, 3)
    ids = words(automaton, 2, 6000)
    first = automaton.run(ids[:, :cut])
    second = automaton.run(ids[:, cut:], first[:, -1])
    assert torch.equal(torch.cat([first, second], 1), automaton.run(ids))


def test_labels_are_the_outputs_of_the_states():
    automaton = random_automaton(5, 2)
    ids = words(automaton, 3, 50)
    outputs = automaton.outputs.tolist()
    expected = [[outputs[state] for state in row] for row in automaton.run(ids).tolist()]
    assert automaton.labels(ids).tolist() == expected
    assert automaton.labels(ids, 2).tolist() == [[outputs[s] for s in row] for row in automaton.run(ids, 2).tolist()]


def test_a_million_letters_of_parity_are_their_cumulative_sum():
    ids = words(PARITY, 2, 1_000_000)
    assert torch.equal(PARITY.run(ids), ids.cumsum(1) % 2)


def test_letters_of_any_integer_type_and_layout_are_read():
    ids = words(PARITY, 4, 30)
    expected = PARITY.run(ids)
    assert torch.equal(PARITY.run(ids.to(torch.uint8)), expected)
    assert torch.equal(PARITY.run(ids.repeat_interleave(2, 1)[:, ::2]), expected)


# The value object


def test_sizes_and_reachability():
    automaton = Automaton(torch.tensor([[1, 0], [1, 1], [0, 2]]), 0, torch.tensor([0, 3, 1]))
    assert (automaton.num_states, automaton.num_letters, automaton.num_outputs) == (3, 2, 4)
    assert automaton.reachable().tolist() == [True, True, False]
    assert not automaton.is_permutation_automaton
    assert PARITY.is_permutation_automaton
    assert repr(automaton) == "Automaton(3 states, 2 letters, 4 outputs)"


def test_equality_is_by_value():
    same = Automaton(
        torch.tensor([[0, 1], [1, 0]], dtype=torch.int32), 0, torch.tensor([0, 1]), ("0", "1"), ("even", "odd")
    )
    assert same == PARITY
    assert hash(same) == hash(PARITY)
    assert pickle.loads(pickle.dumps(PARITY)) == PARITY
    assert copy.deepcopy(PARITY) == PARITY
    others = [
        Automaton(PARITY.transitions, 1, PARITY.outputs, PARITY.letter_names, PARITY.state_names),
        Automaton(PARITY.transitions.flip(1), 0, PARITY.outputs, PARITY.letter_names, PARITY.state_names),
        Automaton(PARITY.transitions, 0, PARITY.outputs.flip(0), PARITY.letter_names, PARITY.state_names),
        Automaton(PARITY.transitions, 0, PARITY.outputs, ("a", "b"), PARITY.state_names),
        Automaton(PARITY.transitions, 0, PARITY.outputs),
    ]
    assert all(other != PARITY for other in others)
    assert PARITY != "parity"


def test_the_tables_are_copies_and_the_fields_can_not_be_set():
    transitions = torch.tensor([[0, 1], [1, 0]])
    automaton = Automaton(transitions, 0, torch.tensor([0, 1]))
    transitions.zero_()
    assert automaton.transitions.tolist() == [[0, 1], [1, 0]]
    with pytest.raises(AttributeError, match="cannot assign"):
        automaton.start = 1  # pyright: ignore[reportAttributeAccessIssue]


def test_to_the_same_device_is_the_same_object():
    assert PARITY.to("cpu") is PARITY
    assert PARITY.to(torch.device("cpu")) is PARITY


TABLE, OUTPUTS = torch.tensor([[0, 1], [1, 0]]), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[0, 1], [1, 0]], 0, OUTPUTS), r"transitions must be an integer tensor \[states, letters\], got \[\[0, 1\]"),
        ((TABLE.float(), 0, OUTPUTS), r"transitions must be an integer tensor .* got torch.float32 \[2, 2\]"),
        ((TABLE.bool(), 0, OUTPUTS), "transitions must be an integer tensor .* got torch.bool"),
        ((TABLE[0], 0, OUTPUTS), r"transitions must be .* got torch.int64 \[2\]"),
        ((TABLE[:, :0], 0, OUTPUTS), "at least one state and one letter, got 2 and 0"),
        ((TABLE[:0], 0, OUTPUTS), "at least one state and one letter, got 0 and 2"),
        ((TABLE + 1, 0, OUTPUTS), "transitions must lead to states from 0 to 1, got 1 to 2"),
        ((TABLE - 1, 0, OUTPUTS), "transitions must lead to states from 0 to 1, got -1 to 0"),
        ((TABLE, 2, OUTPUTS), "start must be a state from 0 to 1, got 2"),
        ((TABLE, -1, OUTPUTS), "start must be a state from 0 to 1, got -1"),
        ((TABLE, 0.0, OUTPUTS), r"start must be a state from 0 to 1, got 0\.0"),
        ((TABLE, 0, OUTPUTS[None]), r"outputs must be an integer tensor \[states\], got torch.int64 \[1, 2\]"),
        ((TABLE, 0, OUTPUTS[:1]), "outputs must give each of the 2 states a label, got 1 labels"),
        ((TABLE, 0, OUTPUTS - 1), "outputs must be labels from 0 on, got -1"),
        ((TABLE, 0, OUTPUTS, ("a",)), "letter_names must name each of the 2 letters, got 1 names"),
        ((TABLE, 0, OUTPUTS, ("a", "a")), "letter_names must be distinct"),
        ((TABLE, 0, OUTPUTS, None, ("s", "t", "u")), "state_names must name each of the 2 states, got 3 names"),
    ],
)
def test_what_is_no_automaton_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Automaton(*arguments)


@pytest.mark.parametrize(
    ("letters", "start", "message"),
    [
        ([[0, 1]], None, r"letters must be an integer tensor \[B, T\], got \[\[0, 1\]\]"),
        (torch.tensor([0, 1]), None, r"letters must be an integer tensor \[B, T\], got torch.int64 \[2\]"),
        (torch.tensor([[0.0]]), None, "letters must be an integer tensor .* got torch.float32"),
        (torch.tensor([[0, 2]]), None, "letters must be from 0 to 1, got 0 to 2"),
        (torch.tensor([[-1, 1]]), None, "letters must be from 0 to 1, got -1 to 1"),
        (torch.tensor([[0, 1]]), 2, "start must be from 0 to 1, got 2 to 2"),
        (torch.tensor([[0, 1]]), torch.tensor([0, 1]), "start must have one state for each of the 1 words, got 2"),
        (
            torch.tensor([[0, 1]]),
            torch.tensor([[0]]),
            r"start must be an integer tensor \[B\], got torch.int64 \[1, 1\]",
        ),
        (
            torch.zeros(1, 2, dtype=torch.int64, device="meta"),
            None,
            "letters on meta can't be read by an automaton on cpu",
        ),
    ],
)
def test_words_that_can_not_be_read_are_refused(letters, start, message):
    with pytest.raises(ValueError, match=message):
        PARITY.run(letters, start)


# Languages


def random_dfa(seed: int, *, partial: bool) -> DFA:
    random_source = random.Random(seed)
    states = [f"q{index}" for index in range(random_source.randint(1, 8))]
    letters = random_source.sample("abcd", random_source.randint(1, 3))
    return DFA(
        states=set(states),
        input_symbols=set(letters),
        transitions={
            state: {
                letter: random_source.choice(states)
                for letter in letters
                if not partial or random_source.random() < 0.7
            }
            for state in states
        },
        initial_state=random_source.choice(states),
        final_states={state for state in states if random_source.random() < 0.5},
        allow_partial=partial,
    )


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_automata_lib_accepts_the_same_words(seed, partial):
    dfa = random_dfa(seed, partial=partial)
    automaton = Automaton.from_dfa(dfa)
    letters = words(automaton, 60, 12, seed)
    labels = automaton.labels(letters)
    names = sorted(dfa.input_symbols)
    assert automaton.letter_names == tuple(names)
    for row, row_labels in zip(letters.tolist(), labels.tolist(), strict=True):
        word = "".join(names[letter] for letter in row)
        expected = [dfa.accepts_input(word[:length]) for length in range(len(word) + 1)]
        assert [bool(label) for label in row_labels] == expected[1:]
        assert [automaton.accepts(word[:length]) for length in (0, 3)] == [expected[0], expected[3]]
        assert automaton.accepts(row) == expected[-1]


def test_a_dfa_keeps_its_names_loses_what_no_word_reaches_and_gains_a_trap():
    dfa = DFA(
        states={"start", "end", "lost"},
        input_symbols={"b", "a"},
        transitions={"start": {"a": "end"}, "end": {"b": "end"}, "lost": {"a": "start"}},
        initial_state="start",
        final_states={"end"},
        allow_partial=True,
    )
    assert Automaton.from_dfa(dfa) == Automaton(
        torch.tensor([[1, 2], [2, 1], [2, 2]]), 0, torch.tensor([0, 1, 0]), ("a", "b"), ("start", "end", "trap")
    )


def test_a_complete_dfa_gains_no_trap_even_if_a_state_is_called_none():
    dfa = DFA(
        states={None, 1},
        input_symbols={"a"},
        transitions={None: {"a": 1}, 1: {"a": None}},
        initial_state=None,
        final_states={1},
    )
    automaton = Automaton.from_dfa(dfa)
    assert automaton.transitions.tolist() == [[1], [0]]
    assert automaton.state_names == ("None", "1")


def test_a_dfa_without_letters_is_refused():
    dfa = DFA(states={0}, input_symbols=set(), transitions={0: {}}, initial_state=0, final_states=set())
    with pytest.raises(ValueError, match="at least one letter, and this DFA has no input symbols"):
        Automaton.from_dfa(dfa)


def test_accepts_refuses_unknown_letters_and_automata_of_other_outputs():
    with pytest.raises(ValueError, match=r"unknown letter 'x'; the letters are 0 to 1, named 0, 1$"):
        PARITY.accepts("01x")
    with pytest.raises(ValueError, match="unknown letter 2; the letters are 0 to 1"):
        PARITY.accepts([0, 2])
    nameless = Automaton(PARITY.transitions, 0, PARITY.outputs)
    with pytest.raises(ValueError, match=r"unknown letter '0'; the letters are 0 to 1, without names$"):
        nameless.accepts("0")
    with pytest.raises(
        ValueError, match="only an automaton with outputs 0 and 1 accepts words; this one has 3 outputs"
    ):
        Automaton(PARITY.transitions, 0, torch.tensor([0, 2])).accepts("")


# Devices


@pytest.mark.gpu
@pytest.mark.parametrize("length", [40, 5000])
def test_a_gpu_gives_the_same_states(length):
    automaton = random_automaton(9, 3)
    ids = words(automaton, 3, length)
    there = automaton.to("cuda")
    assert there == automaton
    assert automaton.to("cuda") is there
    states = there.run(ids.to(there.device))
    assert states.device == there.device
    assert torch.equal(states.cpu(), automaton.run(ids))
    with pytest.raises(ValueError, match="letters on cpu can't be read by an automaton on cuda"):
        there.run(ids)
