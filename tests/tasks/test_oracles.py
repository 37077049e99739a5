"""Labels against evaluators that have nothing in common with ours: Python's eval and exec, re, SymPy, python-chess."""

import contextlib
import io
import re
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
from sympy.combinatorics import Permutation
from sympy.combinatorics.named_groups import AlternatingGroup

from statetrack.automata.algebra import algebraic_class
from statetrack.tasks import IGNORE, get_task
from statetrack.tasks.automaton_task import AutomatonTask
from statetrack.tasks.bounded_dyck import CLOSING, OPENING
from statetrack.tasks.star_free import LANGUAGES
from statetrack.theory.requirements import analyze


def words(name, batch_size, length, seed=0):
    """Pairs (names of the tokens, labels) of sequences of a task."""
    task = get_task(name)
    ids, labels = task.sample(batch_size, length, torch.Generator().manual_seed(seed))
    return [
        ([task.token_names[i] for i in row], answers)
        for row, answers in zip(ids.tolist(), labels.tolist(), strict=True)
    ]


ARITHMETIC = [
    ("modular_arithmetic:5", 5),
    ("modular_arithmetic:5:+-", 5),
    ("modular_arithmetic:7:*", 7),
    ("modular_arithmetic_brackets:5", 5),
    ("modular_arithmetic_brackets:5:+-", 5),
    ("modular_arithmetic_brackets:2:+*", 2),
]


@pytest.mark.parametrize(("name", "modulus"), ARITHMETIC)
def test_arithmetic_is_what_python_makes_of_it(name, modulus):
    task = get_task(name)
    for length in filter(task.fits, (2, 3, 4, 5, 6, 7, 8, 9, 10, 15, 40, 101)):
        for tokens, labels in words(name, 40, length, seed=length):
            text = "".join(tokens)
            assert text[-1] == "="
            assert set(labels[:-1]) <= {IGNORE}
            assert labels[-1] == eval(text[:-1]) % modulus
            assert ("(" in text) <= ("brackets" in name)


@pytest.mark.parametrize(("name", "modulus"), ARITHMETIC)
def test_parts_of_expressions_are_labelled_with_what_python_makes_of_them(name, modulus):
    task = get_task(name)
    for length in filter(task.fits, (2, 3, 4, 5, 6, 7, 8, 10, 15, 40, 101)):
        ids, labels = task.with_parts().sample(20, length, torch.Generator().manual_seed(length))
        whole = task.sample(20, length, torch.Generator().manual_seed(length))
        assert torch.equal(ids, whole.ids)
        assert torch.equal(labels[:, -1], whole.labels[:, -1])
        for row, answers in zip(ids.tolist(), labels.tolist(), strict=True):
            tokens = [task.token_names[i] for i in row]
            ends = ends_of_parts(tokens) if "brackets" in name else {i: 0 for i, t in enumerate(tokens) if t.isdigit()}
            assert {place for place, label in enumerate(answers) if label != IGNORE} == {*ends, length - 1}
            for end, start in ends.items():
                assert answers[end] == eval("".join(tokens[start : end + 1])) % modulus


def ends_of_parts(tokens):
    """Where the subexpressions of an expression with brackets end, and where each begins."""
    ends, opened = {}, []
    for place, token in enumerate(tokens):
        if token == "(":
            opened.append(place)
        elif token == ")":
            ends[place] = opened.pop()
        elif token.isdigit():
            # A sign stands at the beginning or behind a bracket or an operator, and `(d)` and `(-d)` are one part.
            start = place - (tokens[place - 1 : place] == ["-"] and (place < 2 or tokens[place - 2] in "(+-*"))
            if not (start and tokens[start - 1] == "(" and tokens[place + 1] == ")"):
                ends[place] = start
    return ends


def test_digits_and_operators_without_brackets_are_uniform():
    counts = Counter("".join(token) for tokens, _ in words("modular_arithmetic:5", 2000, 40) for token in tokens[:-1])
    assert {token: counts[token] / 40_000 for token in "01234"} == pytest.approx(dict.fromkeys("01234", 0.2), abs=0.01)
    assert {token: counts[token] / 38_000 for token in "+-*"} == pytest.approx(dict.fromkeys("+-*", 1 / 3), abs=0.01)


def parts(text):
    """The left side, the operator and the right side of an operation in brackets; None for d, -d, (d) and (-d)."""
    if re.fullmatch(r"-?\d|\(-?\d\)", text):
        return None
    depth = 0
    for place, letter in enumerate(text):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if depth == 1 and letter in "+-*" and text[place - 1] not in "(+-*":
            return text[1:place], letter, text[place + 1 : -1]
    raise AssertionError(f"{text} is no expression of ours")


def test_expressions_with_brackets_follow_the_grammar_and_its_distribution():
    """All lengths of the left side are equally likely, all operators and all digits, at every depth."""
    left_lengths, operators, digits, leaves = Counter(), Counter(), Counter(), Counter()
    for tokens, _ in words("modular_arithmetic_brackets:5", 3000, 17):
        queue = ["".join(tokens[:-1])]
        assert len(queue[0]) == 16
        for text in queue:  # grows while it is read
            if (found := parts(text)) is None:
                digits[re.sub(r"\D", "", text)] += 1
                leaves[len(text)] += 1
                continue
            left, operator, right = found
            if len(text) == 16:
                left_lengths[len(left)] += 1
            operators[operator] += 1
            queue += [left, right]
    for counts, values in ((left_lengths, range(1, 13)), (operators, "+-*"), (digits, "01234")):
        assert set(counts) == set(values)
        assert [counts[value] / counts.total() for value in values] == pytest.approx(
            [1 / len(values)] * len(values), abs=0.02
        )
    assert set(leaves) == {1, 2, 3, 4}


@pytest.mark.parametrize("variables", [3, 4, 5])
def test_programs_print_what_python_prints(variables):
    kinds = Counter()
    for length in (3, 4, 7, 11, 12, 30, 80):
        for tokens, labels in words(f"code_evaluation:{variables}", 25, length, seed=length):
            source, printed = "".join(tokens), io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(source, {name: value for value, name in enumerate("abcde"[:variables])})
            assert set(labels[:-1]) <= {IGNORE}
            assert labels[-1] == int(printed.getvalue())
            kinds.update(
                "branch" if line.startswith("if ") else "swap" if "," in line else "assign" if line else "empty"
                for line in source.splitlines()[:-1]
            )
    assert set(kinds) == {"branch", "swap", "assign", "empty"}


@pytest.mark.parametrize("variables", [3, 5])
def test_lines_of_programs_are_labelled_with_what_python_assigns_in_them(variables):
    task = get_task(f"code_evaluation:{variables}")
    lines = 0
    for length in (3, 7, 8, 40, 97):
        ids, labels = task.with_parts().sample(20, length, torch.Generator().manual_seed(length))
        same = task.sample(20, length, torch.Generator().manual_seed(length))
        assert torch.equal(ids, same.ids)
        assert torch.equal(labels[:, -1], same.labels[:, -1])
        for tokens, answers in zip([[task.token_names[i] for i in row] for row in ids], labels.tolist(), strict=True):
            values = {name: value for value, name in enumerate("abcde"[:variables])}
            wanted, line = [], []
            for token in tokens[:-3]:
                line.append(token)
                wanted.append(IGNORE)
                if token == "\n" and len(line) > 1:
                    exec("".join(line), values)
                    wanted[-1] = values[line[5 if line[0] == "if " else 0]]
                    lines += 1
                line = [] if token == "\n" else line
            assert answers[:-1] == [*wanted, IGNORE, IGNORE]
    assert lines > 300


def test_programs_have_the_promised_mixture_of_statements():
    # The beginning of a program is not yet cut by its end.
    first = Counter(
        "branch" if (line := "".join(tokens).splitlines()[0]).startswith("if ")
        else "swap" if "," in line
        else "constant" if line[-1].isdigit()
        else "copy"
        for tokens, _ in words("code_evaluation:4", 4000, 30)
    )  # fmt: skip
    shares = {kind: count / 4000 for kind, count in first.items()}
    assert shares == pytest.approx({"swap": 1 / 2, "branch": 1 / 4, "constant": 1 / 8, "copy": 1 / 8}, abs=0.025)


@pytest.mark.parametrize(
    ("name", "limit"), [("dyck:1", None), ("dyck:3", None), ("bounded_dyck:2,3", 3), ("bounded_dyck:1,4", 4)]
)
def test_brackets_close_what_a_stack_says(name, limit):
    deepest, opened = 0, []
    for tokens, labels in words(name, 60, 300):
        stack = []
        for token, label in zip(tokens, labels, strict=True):
            if 0 < len(stack) < (limit or 10**9):
                opened.append(token in OPENING)
            if token in OPENING:
                stack.append(OPENING.index(token))
            else:
                assert stack.pop() == CLOSING.index(token)
            assert label == (stack[-1] + 1 if stack else 0)
            deepest = max(deepest, len(stack))
    assert deepest == limit if limit else deepest > 25
    assert sum(opened) / len(opened) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("name", LANGUAGES)
def test_words_of_star_free_languages_can_be_completed(name):
    """The label says which letters may follow and whether the word may end; `re` knows what may."""
    expression, _ = LANGUAGES[name]
    task = get_task(f"star_free:{name}")
    assert isinstance(task, AutomatonTask)
    letters, facts = task.token_names, {}
    for tokens, labels in words(task.name, 20, 14):
        for end, label in enumerate(labels, 1):
            word = "".join(tokens[:end])
            may = tuple(completable(expression, word + letter, letters) for letter in letters)
            assert facts.setdefault(label, (may, bool(re.fullmatch(expression, word)))) == (
                may,
                bool(re.fullmatch(expression, word)),
            )
    assert len(set(facts.values())) == len(facts)
    assert analyze(task.automaton).aperiodic


def completable(expression, word, letters):
    """Whether a few more letters make a word of the language; those of ours need no more than close the brackets."""
    tails = ["", *letters, "0"] if "a" not in letters or "c" in letters else ["b" * n for n in range(15)]
    return any(re.fullmatch(expression, word + tail) for tail in tails)


def test_even_pairs_counts_changes_of_letter():
    for tokens, labels in words("even_pairs", 50, 60):
        for end in (1, 2, 5, 31, 60):
            assert labels[end - 1] == (sum(a != b for a, b in pairwise(tokens[:end])) % 2 == 0)


def test_the_flip_flop_keeps_what_was_written_last():
    for tokens, labels in words("flip_flop", 50, 60):
        for end, label in enumerate(labels, 1):
            assert label == next((int(token) for token in reversed(tokens[:end]) if token != "keep"), 0)


def test_cycle_navigation_adds_up():
    for tokens, labels in words("cycle_navigation:7", 50, 60):
        steps = [{"stay": 0, "+1": 1, "-1": -1}[token] for token in tokens]
        assert labels == [sum(steps[:end]) % 7 for end in range(1, 61)]


def test_products_since_the_last_reset_are_sympys():
    elements = [Permutation(images) for images in sorted(p.array_form for p in AlternatingGroup(4).elements)]
    names = get_task("group:A4").token_names
    for tokens, labels in words("group_with_resets:A4", 10, 60):
        running = Permutation(3)
        for token, label in zip(tokens, labels, strict=True):
            factor: Any = Permutation(3) if token == "reset" else elements[names.index(token)]
            running = factor if token == "reset" else running * factor
            assert elements[label] == running


@pytest.mark.parametrize("tokens_each", [2, 4])
def test_fillers_give_time_and_change_nothing(tokens_each):
    plain = get_task("group:S4:swaps").sample(6, 30, torch.Generator().manual_seed(3))
    task = get_task(f"group:S4:swaps:{tokens_each}")
    paced = task.sample(6, 30 * tokens_each, torch.Generator().manual_seed(3))
    assert torch.equal(paced.ids[:, ::tokens_each], plain.ids)
    assert torch.equal(paced.labels[:, tokens_each - 1 :: tokens_each], plain.labels)
    fillers = torch.arange(30 * tokens_each) % tokens_each != 0
    assert (paced.ids[:, fillers] == task.vocab_size - 1).all()
    assert (paced.labels != IGNORE).sum() == plain.labels.numel()


@pytest.mark.parametrize(
    "name", ["permutation_reset:6,3,1,0", "permutation_reset:9,2,3,7", "permutation_reset:4,2,0,1"]
)
def test_random_automata_permute_and_reset(name):
    states, permutations, resets, _ = map(int, name.partition(":")[2].split(","))
    task = get_task(name)
    assert isinstance(task, AutomatonTask)
    images = [len(set(column)) for column in task.automaton.transitions.T.tolist()]
    assert images == [states] * permutations + [1] * resets
    other = get_task(f"permutation_reset:{states},{permutations},{resets},99")
    assert isinstance(other, AutomatonTask)
    assert task.automaton != other.automaton


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("parity", "abelian group"),
        ("modular_addition:6", "abelian group"),
        ("cycle_navigation:5", "abelian group"),
        ("group:Z2^3", "abelian group"),
        ("group:D5", "solvable group"),
        ("group:Q8", "solvable group"),
        ("group:S4", "solvable group"),
        ("group:A4xZ5", "solvable group"),
        ("group:(1 2),(1 2 3)", "solvable group"),
        ("group:A5:6", "non-solvable group"),
        ("group_with_resets:S3", "solvable monoid"),
        ("group_with_resets:A5:generators", "non-solvable monoid"),
        ("even_pairs", "aperiodic monoid"),
        ("flip_flop", "aperiodic monoid"),
        ("bounded_dyck:2,3", "aperiodic monoid"),
        ("star_free:d12", "aperiodic monoid"),
        ("regex:(aa)*b", "solvable monoid"),
        ("permutation_reset:6,3,1,0", "non-solvable monoid"),
    ],
)
def test_the_algebraic_class_is_the_theorys(name, expected):
    task = get_task(name)
    assert isinstance(task, AutomatonTask)
    assert task.algebraic_class == algebraic_class(task.automaton) == expected
    analysis = analyze(task.automaton)
    hidden = "solvable" if analysis.solvable else "non-solvable"
    described = "aperiodic" if analysis.aperiodic else hidden
    assert expected.split()[0] in (described, "abelian")
    assert analysis.group == expected.endswith("group")
    assert (expected == "abelian group") == (analysis.group and abelian(task))


def abelian(task):
    table, letters = task.automaton.transitions, range(task.automaton.num_letters)
    return all(torch.equal(table[table[:, a], b], table[table[:, b], a]) for a in letters for b in letters)


def test_arithmetic_without_brackets_is_a_solvable_monoid():
    assert get_task("modular_arithmetic:5").algebraic_class == "solvable monoid"
    assert get_task("modular_arithmetic:5:+-").algebraic_class == "abelian group"


@pytest.mark.parametrize(("letters", "count"), [("2", 2), ("6", 6), ("60", 60), ("generators", 2), ("3-cycles", 21)])
def test_a5_comes_with_2_6_or_60_generators(letters, count):
    task = get_task(f"group:A5:{letters}")
    assert (task.num_generators, task.vocab_size, task.num_labels) == (count, count, 60)


class Board:
    """Pieces on squares, and what moves do to them: castling, taking in passing and queens included; no other rules."""

    def __init__(self):
        back = ["rook", "knight", "bishop", "queen", "king", "bishop", "knight", "rook"]
        self.pieces = {f"{file}{rank}": "pawn" for file in "abcdefgh" for rank in "27"}
        self.pieces |= {f"{file}{rank}": piece for file, piece in zip("abcdefgh", back, strict=True) for rank in "18"}

    def move(self, source, target):
        piece = self.pieces.pop(source)
        if piece == "king" and abs(ord(source[0]) - ord(target[0])) == 2:
            corner, beside = ("h", "f") if target[0] == "g" else ("a", "d")
            self.pieces[beside + source[1]] = self.pieces.pop(corner + source[1])
        if piece == "pawn" and source[0] != target[0] and target not in self.pieces:
            del self.pieces[target[0] + source[1]]
        self.pieces[target] = "queen" if piece == "pawn" and target[1] in "18" else piece
        return piece


def test_pieces_are_where_a_board_has_them():
    pytest.importorskip("chess")
    kinds = ("pawn", "knight", "bishop", "rook", "queen", "king")
    moved = Counter()
    for tokens, labels in words("chess_tracking:120,40,0", 40, 239):
        board = Board()
        for ply in range(119):
            piece = board.move(tokens[2 * ply], tokens[2 * ply + 1])
            assert labels[2 * ply] == kinds.index(piece)
            assert labels[2 * ply + 1] == IGNORE
            moved[piece] += 1
    assert set(moved) == set(kinds)


def test_chess_games_are_legal_and_every_first_move_occurs():
    chess = pytest.importorskip("chess")
    openings = set()
    for tokens, _ in words("chess_tracking:30,200,5", 400, 59):
        board = chess.Board()
        openings.add((tokens[0], tokens[1]))
        for source, target in zip(tokens[::2], tokens[1::2], strict=False):
            move = chess.Move.from_uci(source + target)
            if board.piece_type_at(move.from_square) == chess.PAWN and target[1] in "18":
                move.promotion = chess.QUEEN
            assert move in board.legal_moves
            board.push(move)
    assert len(openings) == 20
    assert get_task("chess_tracking:30,200,5") != get_task("chess_tracking:30,200,6")


def test_without_the_chess_package_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "chess", None)
    task = get_task("chess_tracking:31,1,987")
    for ask in (lambda: task.chance, lambda: task.sample(1, 5, torch.Generator())):
        with pytest.raises(ValueError, match=r'needs the package chess.*pip install "statetrack\[chess\]"'):
            ask()
