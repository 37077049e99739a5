"""Analysis, compilation and verification: seconds, and errors in 1,000,000 tokens; to results/theory/.

`speed` takes the CPU time of one thread of what the command line does. `exactness` compiles automata, proves them right
by enumerating the states of the model, and reads one random word of 1,000,000 tokens in bfloat16 through the same
operations as training does: the groups of the task list, and the automata of the tests (up to 12 states), which
`COLLECTION` repeats. Its rows are written as they come, so that a run that is cut off loses none: --resume goes on.

    python -m benchmarks.theory speed
    python -m benchmarks.theory exactness [--resume]
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.common import ROOT, environment, write_results
from statetrack.automata import Automaton, group_automaton
from statetrack.theory.construct import compile, plan
from statetrack.theory.requirements import analyze
from statetrack.theory.verify import count_errors, verify

TOKENS = 1_000_000
GROUPS = (
    *("Z2", "Z3", "Z4", "Z5", "Z6", "Z7", "Z8", "Z12", "S3", "S4", "S5", "A5", "D4", "D5", "D6", "Q8"),
    *("Z2xZ2xS3", "A5xZ9", "Z60"),
)
EXPRESSIONS = (
    *("(ab)*", "a*b*", "a(a|b)*", "(a|b)*abb", "(a|b)*a(a|b)(a|b)", "(aa)*", "(a|b)*aba(a|b)*", "a"),
    *("(aaa)*", "(aaaaaa)*", "((a|b)(a|b))*", "(aa|bb)*", "(ab|ba)*"),
)
SEEDS = range(40)


def full(states: int) -> Automaton:
    """The automaton whose three letters generate all maps of its states."""
    letters = [[*range(1, states), 0], [1, 0, *range(2, states)], [0, 0, *range(2, states)]]
    return Automaton(torch.tensor(letters).T.contiguous(), 0, torch.arange(states))


def random_automaton(states: int, letters: int, seed: int) -> Automaton:
    generator = torch.Generator().manual_seed(seed)
    return Automaton(torch.randint(states, (states, letters), generator=generator), 0, torch.arange(states))


def dyck(depth: int) -> Automaton:
    """One kind of brackets, nested at most so deep; words that are balanced are accepted."""
    trap = depth + 1
    rows = [[level + 1, level - 1 if level else trap] for level in range(trap)]
    return Automaton(torch.tensor([*rows, [trap, trap]]), 0, torch.tensor([1] + [0] * trap))


def seconds(function: Callable[[], Any], rounds: int = 3) -> float:
    """CPU time of one thread, the median: what the work takes however busy the machine is."""
    times = []
    for _ in range(rounds):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return round(sorted(times)[len(times) // 2], 3)


def speed() -> dict[str, Any]:
    torch.set_num_threads(1)
    eight, twelve = full(8), full(12)
    cascade = compile(eight)
    proof = verify(cascade, eight, mode="exhaustive")
    group = group_automaton("S5")
    model = compile(group, dtype=torch.bfloat16)
    start = time.process_time()
    errors, _ = count_errors(model, group, length=TOKENS)
    return {
        "analyze_T6_s": seconds(lambda: analyze(full(6))),
        "T6_elements": analyze(full(6)).monoid_size,
        "compile_T12_s": seconds(lambda: compile(twelve, strategy="exclusion")),
        "compile_12_states_12_letters_s": seconds(lambda: compile(random_automaton(12, 12, 0), strategy="exclusion")),
        "verify_T8_s": seconds(lambda: verify(cascade, eight, mode="exhaustive")),
        "verify_T8": {"states": proof.states, "checked": proof.checked, "errors": proof.errors},
        "T8_layers": cascade.config.num_layers,
        "T8_parameters": cascade.num_parameters(),
        "S5_tokens": TOKENS,
        "S5_tokens_s": round(time.process_time() - start, 2),
        "S5_errors": errors,
    }


def collection() -> dict[str, Callable[[], Automaton]]:
    """Every automaton that is read for 1,000,000 tokens, by its name."""
    made: dict[str, Callable[[], Automaton]] = {name: partial(group_automaton, name) for name in GROUPS}
    for name in ("S5", "S4", "A5"):
        made[f"{name}, two generators"] = partial(group_automaton, name, "two")
    made["S5, swaps"] = partial(group_automaton, "S5", "swaps")
    made |= {f"regex {text}": partial(Automaton.from_regex, text) for text in EXPRESSIONS}
    made |= {f"brackets nested {depth} deep": partial(dyck, depth) for depth in range(2, 11)}
    for seed in SEEDS:
        states, letters = 2 + seed % 11, 1 + seed % 4
        name = f"random {states} states, {letters} letters, seed {seed}"
        made[name] = partial(random_automaton, states, letters, seed)
    return made | {f"all maps of {states} states": partial(full, states) for states in (*range(2, 9), 12)}


def exactness(rows: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows so far, after each automaton that `rows` does not have yet."""
    for name, automaton in collection().items():
        if name not in rows:
            rows[name] = _exactness(automaton(), TOKENS)
            print(name, rows[name], flush=True)
        yield rows


def _exactness(automaton: Automaton, tokens: int) -> dict[str, Any]:
    model = compile(automaton, dtype=torch.bfloat16)
    proof = verify(model, automaton)
    start = time.perf_counter()
    errors, first = count_errors(model, automaton, length=tokens)
    return {
        "strategy": plan(automaton).strategy,
        "layers": model.config.num_layers,
        "proof": proof.mode,
        "states": proof.states,
        "proof_errors": proof.errors,
        "tokens": tokens,
        "errors": errors,
        "first_error": first,
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    words = sys.argv[1:]
    resume = "--resume" in words
    for part in [word for word in words if word != "--resume"] or ["speed", "exactness"]:
        path = ROOT / "results" / "theory" / f"{part}.json"
        if part == "speed":
            results = [speed()]
            print(*results)
        else:
            results = exactness(json.loads(path.read_text())["results"] if resume else {})
        for rows in results:
            write_results(path, {"environment": environment(["numpy", "sympy", "automata-lib"]), "results": rows})


if __name__ == "__main__":
    main()
