"""Automata as JSON.

The package's own form is the tables of `Automaton`:

    {"transitions": [[0, 1], [1, 0]], "start": 0, "outputs": [0, 1], "letters": ["0", "1"], "states": ["even", "odd"]}

`transitions` has a row for each state and in it the next state for each letter, `outputs` a label for each state (0
rejects, 1 accepts); `accepting`, a list of states, may stand in its place; `letters` and `states` are names and may be
left out. The other form that is read is the arguments of automata-lib's `DFA`: `states`, `input_symbols`,
`transitions` as {state: {symbol: state}}, `initial_state`, `final_states`; missing transitions lead to a trap, whatever
`allow_partial` says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from statetrack.automata.automaton import Automaton

_OWN = ("transitions", "start", "outputs", "accepting", "letters", "states")
_DFA = ("states", "input_symbols", "transitions", "initial_state", "final_states")

_MOST_OUTPUTS = 65_536
"""A model has a class for every number up to the largest output."""


def read_automaton(path: Path | str) -> Automaton:
    """Reads an automaton from a JSON file.

    Raises:
        ValueError: if the file is no JSON, or none of an automaton.
        OSError: if it can't be read.
    """
    try:
        return automaton_from_json(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # of which JSON's and Unicode's errors are kinds
        raise ValueError(f"{path} does not hold an automaton: {error}") from None


def automaton_from_json(text: str) -> Automaton:
    """Reads an automaton from JSON text.

    Raises:
        ValueError: if it is none.
    """
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error})") from None
    except RecursionError:
        raise ValueError("not the JSON of an automaton: its brackets are nested too deep") from None
    if not isinstance(data, dict):
        raise ValueError(f"an automaton is a JSON object with {', '.join(_OWN[:3])}; got {type(data).__name__}")
    if "initial_state" in data:
        return _from_dfa_data(data)
    if unknown := sorted(set(data) - set(_OWN)):
        raise ValueError(f"unknown key {', '.join(unknown)}; the keys of an automaton are {', '.join(_OWN)}")
    if "transitions" not in data or ("outputs" in data) == ("accepting" in data):
        raise ValueError("an automaton needs transitions, and either outputs or accepting")
    transitions = _integers(data["transitions"], "transitions", ndim=2)
    if "outputs" in data:
        outputs = _integers(data["outputs"], "outputs", ndim=1)
        if outputs.numel() and outputs.max() >= _MOST_OUTPUTS:
            raise ValueError(
                f"outputs must be labels from 0 to {_MOST_OUTPUTS - 1:,}, one class of a model for each; number them "
                f"without gaps; got {int(outputs.max())}"
            )
    else:
        outputs = torch.zeros(len(transitions), dtype=torch.int64)
        accepting = data["accepting"]
        for state in accepting if isinstance(accepting, list) else [accepting]:
            if not _is_integer(state) or not 0 <= state < len(transitions) or not isinstance(accepting, list):
                raise ValueError(
                    f"accepting must be a list of states from 0 to {len(transitions) - 1}; got {json.dumps(state)}"
                )
            outputs[state] = 1
    start = data.get("start", 0)
    if not _is_integer(start):
        raise ValueError(f"start must be the number of a state; got {json.dumps(start)[:80]}")
    letters, states = (_names(data.get(key), key) for key in ("letters", "states"))
    return Automaton(transitions, start, outputs, letters, states)


def automaton_to_json(automaton: Automaton) -> str:
    """An automaton as JSON on one line, which `automaton_from_json` reads back."""
    data: dict[str, Any] = {
        "transitions": automaton.transitions.tolist(),
        "start": automaton.start,
        "outputs": automaton.outputs.tolist(),
    }
    if automaton.letter_names is not None:
        data["letters"] = list(automaton.letter_names)
    if automaton.state_names is not None:
        data["states"] = list(automaton.state_names)
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False)


def _from_dfa_data(data: Mapping[str, Any]) -> Automaton:
    missing = [key for key in _DFA if key not in data]
    if missing:
        raise ValueError(f"a DFA needs {', '.join(_DFA)}; {', '.join(missing)} is missing")
    if unknown := sorted(set(data) - {*_DFA, "allow_partial"}):
        raise ValueError(f"unknown key {', '.join(unknown)}; the keys of a DFA are {', '.join(_DFA)}")
    from automata.base.exceptions import AutomatonException
    from automata.fa.dfa import DFA

    try:
        # JSON's keys are strings, so every name is made one.
        dfa = DFA(
            states={str(state) for state in data["states"]},
            input_symbols={str(symbol) for symbol in data["input_symbols"]},
            transitions={str(state): {} for state in data["states"]}
            | {
                str(state): {str(symbol): str(target) for symbol, target in row.items()}
                for state, row in data["transitions"].items()
            },
            initial_state=str(data["initial_state"]),
            final_states={str(state) for state in data["final_states"]},
            allow_partial=True,
        )
    except (AutomatonException, AttributeError, TypeError) as error:
        raise ValueError(f"not the arguments of automata-lib's DFA: {error}") from None
    return Automaton.from_dfa(dfa)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _integers(values: Any, what: str, ndim: int) -> torch.Tensor:
    rows = values if ndim == 2 and isinstance(values, list) else [values]
    # Among integers a tensor takes `true` for 1.
    integers = all(isinstance(row, list) and all(map(_is_integer, row)) for row in rows)
    try:
        table = torch.tensor(values) if integers else None
    except (TypeError, ValueError, RuntimeError):
        table = None
    if table is None or table.dtype != torch.int64 or table.ndim != ndim:
        shape = "a list of lists of integers, all as long" if ndim == 2 else "a list of integers"
        raise ValueError(f"{what} must be {shape}; got {json.dumps(values)[:80]}")
    return table


def _names(values: Any, key: str) -> tuple[str, ...] | None:
    if values is None:
        return None
    if not isinstance(values, list) or not all(isinstance(value, str | int) for value in values):
        raise ValueError(f"{key} must be a list of names; got {json.dumps(values)[:80]}")
    return tuple(str(value) for value in values)
