"""Everything that is said of an automaton against brute force that shares no code with the package."""

import itertools
import json
import re

import numpy as np
import pytest
import torch
from automata.fa.dfa import DFA
from automata.fa.nfa import NFA
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from statetrack.automata import Automaton
from statetrack.cli import main
from statetrack.theory.construct import STRATEGIES, ConstructionError, compile
from statetrack.theory.requirements import analyze
from statetrack.theory.verify import verify


@st.composite
def tables(draw, most_states=4, most_letters=3):
    """Transitions as lists, and outputs."""
    states = draw(st.integers(1, most_states))
    letters = draw(st.integers(1, most_letters))
    state = st.integers(0, states - 1)
    rows = draw(st.lists(st.lists(state, min_size=letters, max_size=letters), min_size=states, max_size=states))
    return rows, draw(st.lists(st.integers(0, 2), min_size=states, max_size=states))


def automaton_of(rows, outputs):
    return Automaton(torch.tensor(rows), 0, torch.tensor(outputs))


# The analysis


def residuals(rows, outputs):
    """Of every state that can be reached, what it says after all short words; equal ones are equivalent states."""
    words = [word for length in range(len(rows) + 1) for word in itertools.product(range(len(rows[0])), repeat=length)]

    def after(state, word):
        for letter in word:
            state = rows[state][letter]
        return state

    reached = {after(0, word) for word in words}
    return {state: tuple(outputs[after(state, word)] for word in words) for state in reached}


def quotient(rows, outputs):
    """The transition functions of the letters on classes of equivalent states."""
    said = residuals(rows, outputs)
    classes = sorted(set(said.values()))
    member = {c: next(state for state in said if said[state] == c) for c in classes}
    return [
        tuple(classes.index(said[rows[member[c]][letter]]) for c in classes) for letter in range(len(rows[0]))
    ], len(classes)


def then(f, g):
    return tuple(g[x] for x in f)


def closure(letters, states):
    identity = tuple(range(states))
    monoid, fresh = {identity}, {identity}
    while fresh:
        fresh = {then(f, letter) for f in fresh for letter in letters} - monoid
        monoid |= fresh
    return monoid


def group_orders(monoid):
    """The orders of the maximal subgroups: around each idempotent e the elements with an inverse beside it."""
    orders = set()
    for e in monoid:
        if then(e, e) != e:
            continue
        local = [m for m in monoid if then(e, m) == m == then(m, e)]
        orders.add(sum(any(then(m, n) == e == then(n, m) for n in local) for m in local))
    return orders - {1}


def prime_factors(number):
    return {p for p in range(2, number + 1) if number % p == 0 and all(p % q for q in range(2, p))}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(tables())
def test_the_analysis_of_random_automata(table):
    letters, states = quotient(*table)
    monoid = closure(letters, states)
    analysis = analyze(automaton_of(*table))
    assert (analysis.states, analysis.monoid_size) == (states, len(monoid))
    orders = group_orders(monoid)
    assert {group.order for group in analysis.groups} == orders
    assert analysis.aperiodic == (not orders)
    assert set(analysis.primes) == {p for order in orders for p in prime_factors(order)}
    assert analysis.group == all(sorted(letter) == list(range(states)) for letter in letters)
    assert analysis.solvable  # the smallest group that is not has 60 elements, and four states have at most 24
    idempotents = [e for e in monoid if then(e, e) == e]
    obstructed = any(then(then(e, f), e) != then(f, e) for e in idempotents for f in idempotents)
    assert (analysis.one_layer_obstruction is not None) == obstructed
    assert analysis.plan is not None
    assert analysis.plan.num_layers > 1 or not obstructed
    if analysis.plan.num_layers > 1:
        assert analysis.plan.num_layers == states - 1


@settings(max_examples=25, deadline=None, derandomize=True)
@given(tables(most_states=5, most_letters=2))
def test_beyond_the_limit_the_primes_are_the_same(table):
    letters, states = quotient(*table)
    orders = group_orders(closure(letters, states))
    analysis = analyze(automaton_of(*table), monoid_limit=1)
    assert set(analysis.primes) == {p for order in orders for p in prime_factors(order)}
    assert analysis.aperiodic == (not orders)


# Expressions


def expressions():
    leaves = st.sampled_from(["a", "b", "(a|b)", "ab"])
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.builds("({}|{})".format, inner, inner),
            st.builds("{}{}".format, inner, inner),
            st.builds("({})*".format, inner),
            st.builds("({})?".format, inner),
        ),
        max_leaves=6,
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(expressions())
def test_expressions_accept_what_python_accepts_and_are_minimal(expression):
    automaton = Automaton.from_regex(expression, "ab")
    for length in range(6):
        for word in map("".join, itertools.product("ab", repeat=length)):
            assert automaton.accepts(word) == bool(re.fullmatch(expression, word)), word
    dfa = DFA.from_nfa(NFA.from_regex(expression, input_symbols={"a", "b"})).to_complete().minify()
    assert automaton.num_states == len(dfa.states)


# Compiled models, read from the run directory alone


class Reader:
    """A run directory of `exact_deltaproduct`, stepped through in NumPy, float64."""

    def __init__(self, path):
        config = json.loads((path / "config.json").read_text())["model"]
        assert config["mixer"]["name"] == "exact_deltaproduct"
        assert config["norm_placement"] == "none"
        self.mixer, self.layers = config["mixer"], config["num_layers"]
        self.has_mlp, self.depth = config["mlp_ratio"] > 0, config["mlp_depth"]
        self.weights = {name: w.astype(np.float64) for name, w in load_file(path / "model.safetensors").items()}

    def start(self):
        m = self.mixer
        return [np.zeros((m["num_heads"], m["head_dim"], m["value_dim"])) for _ in range(self.layers)]

    def step(self, states, letter):
        x, after = self.weights["embedding.weight"][letter], []
        for layer, state in enumerate(states):
            y, state = self.mix(f"blocks.{layer}.mixer.", x, state)
            after.append(state)
            x = x + y
            if self.has_mlp:
                name = f"blocks.{layer}.mlp."
                h = x
                for i in range(self.depth):
                    w = self.weights[f"{name}hidden.{i}.weight"]
                    h = np.maximum(w @ h + self.weights[f"{name}hidden.{i}.bias"], 0)
                x = x + self.weights[f"{name}down_proj.weight"] @ h
        return int(np.argmax(self.weights["head.weight"] @ x)), after

    def mix(self, name, x, state):
        m = self.mixer
        shape = (m["num_householder"], m["num_heads"])
        k = (self.weights[f"{name}k_proj.weight"] @ x).reshape(*shape, -1)
        v = (self.weights[f"{name}v_proj.weight"] @ x).reshape(*shape, -1)
        lo, _ = m["eigenvalue_range"]
        beta = (1 - lo) * np.clip(self.weights[f"{name}b_proj.weight"] @ x, 0, 1).reshape(shape)
        before, state = state, state.copy()
        for j, h in itertools.product(*map(range, shape)):
            if (norm := k[j, h] @ k[j, h]) > 0:
                state[h] += beta[j, h] / norm * np.outer(k[j, h], v[j, h] - k[j, h] @ state[h])
        query = self.weights[f"{name}query"]
        reads = [np.einsum("hk,hkv->hv", query, s) for s in ([state, before] if m["read_before"] else [state])]
        return self.weights[f"{name}o_proj.weight"] @ np.concatenate([r.ravel() for r in reads]), state


def errors(reader, rows, outputs, most=3000):
    """Wrong answers over all states that can be reached of the model and the automaton together."""
    start = (reader.start(), 0)
    seen, queue, wrong = set(), [start], 0
    while queue:
        states, position = queue.pop()
        for letter in range(len(rows[0])):
            answer, after = reader.step(states, letter)
            following = rows[position][letter]
            wrong += answer != outputs[following]
            key = (following, *(np.round(s, 6).tobytes() for s in after))
            if key not in seen:
                seen.add(key)
                queue.append((after, following))
        assert len(seen) < most
    return wrong


@pytest.mark.parametrize("strategy", ["auto", "exclusion", "holonomy"])
@pytest.mark.parametrize(
    "rows",
    [
        [[1, 0], [2, 1], [0, 0]],
        [[1, 1, 0], [2, 0, 0], [3, 2, 2], [0, 3, 3]],
        [[1, 0], [2, 0], [3, 1], [3, 3]],
        [[2, 1], [2, 0], [3, 3], [0, 3], [1, 2]],
        [[1, 0], [0, 1]],
    ],
)
def test_a_checker_that_reads_the_run_directory_alone_finds_no_error(rows, strategy, tmp_path):
    outputs = list(range(len(rows)))
    (tmp_path / "automaton.json").write_text(json.dumps({"transitions": rows, "outputs": outputs}))
    language = ["--automaton", str(tmp_path / "automaton.json")]
    assert main(["compile", *language, "--strategy", strategy, "--out", str(tmp_path / "run")]) == 0
    reader = Reader(tmp_path / "run")
    assert errors(reader, rows, outputs) == 0
    # And it would find one.
    assert errors(reader, rows, [1, *outputs[1:]]) > 0


@settings(max_examples=20, deadline=None, derandomize=True)
@given(tables(most_states=5))
def test_random_automata_compile_exactly_or_are_refused(table):
    automaton = automaton_of(*table)
    for strategy in STRATEGIES:
        try:
            model = compile(automaton, strategy=strategy)
        except ConstructionError:
            assert strategy == "one_layer"
            continue
        assert verify(model, automaton, mode="exhaustive").exact
