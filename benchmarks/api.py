"""Writes docs/api.md: every public name, how it is called, and the first sentence of its docstring.

python -m benchmarks.api
"""

from __future__ import annotations

import importlib
import inspect
import re
from dataclasses import MISSING, fields, is_dataclass
from types import ModuleType
from typing import Any

from benchmarks.common import ROOT
from statetrack.files import atomic_write

PAGE = ROOT / "docs" / "api.md"
MODULES = {
    "statetrack": "Layers, models, the recurrence",
    "statetrack.data": "Text as batches of tokens",
    "statetrack.hf": "Models of transformers",
    "statetrack.tasks": "Tasks with a state to track",
    "statetrack.config": "The configs of a run",
    "statetrack.training": "Training",
    "statetrack.evaluation": "Accuracy by length",
    "statetrack.runs": "What a run directory holds",
    "statetrack.pretraining.config": "The config of pre-training",
    "statetrack.pretraining.presets": "Models of known sizes",
    "statetrack.pretraining.optimizers": "Optimizers and schedules",
    "statetrack.pretraining.loop": "Pre-training",
    "statetrack.pretraining.plan": "What fits on which cards",
    "statetrack.language_models": "Language models judged",
    "statetrack.generation": "Text from a model",
    "statetrack.split_in_time": "A sequence over several processes",
    "statetrack.automata": "Automata, groups, monoids",
    "statetrack.theory.requirements": "What a language needs",
    "statetrack.theory.construct": "Exact weights",
    "statetrack.theory.verify": "Proofs of models",
    "statetrack.theory.certify": "What a model can't do",
    "statetrack.stabilize": "Drift",
    "statetrack.experiments": "Grids of runs",
    "statetrack.report": "Pages and figures",
}


def page() -> str:
    parts = [
        "# API",
        "Every public name by module; `help(name)` and the source have shapes, dtypes, errors and equations. Arguments "
        "with a default end in `=`. Written by `python -m benchmarks.api` from the docstrings.",
    ]
    for name, title in MODULES.items():
        module = importlib.import_module(name)
        rows = [f"| `{public}` | {_cell(getattr(module, public))} |" for public in public_names(module)]
        if rows:
            parts.append("\n".join([f"## `{name}`: {title[0].lower()}{title[1:]}\n", "| | |", "|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def public_names(module: ModuleType) -> list[str]:
    """What a module exports by `__all__`, or else defines itself without an underscore before it."""
    if hasattr(module, "__all__"):
        return sorted(module.__all__, key=str.lower)
    own = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__
    ]
    return sorted(own, key=str.lower)


def _cell(value: Any) -> str:
    if not callable(value):
        return f"`{value!r}`"
    sentence = re.match(r"(.+?[.:])(?=\s+[A-Z`]|\s*\n\n|\s*$)", inspect.getdoc(value) or "", re.DOTALL)
    text = " ".join(sentence[1].split()) if sentence else ""
    call = _call(value)
    return (text + (f" `{call}`" if call else "")).replace("|", "\\|")


def _call(value: Any) -> str:
    """The names of the arguments, with `=` after those that have a default."""
    if is_dataclass(value):
        given = [
            field.name + ("=" if field.default is not MISSING or field.default_factory is not MISSING else "")
            for field in fields(value)
            if field.init
        ]
        return f"({', '.join(given)})" if 0 < len(given) <= 8 else ""
    try:
        parameters = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):
        return ""
    given = [
        ("**" if p.kind is p.VAR_KEYWORD else "") + p.name + ("=" if p.default is not p.empty else "")
        for p in parameters
    ]
    return f"({', '.join(given)})" if len(given) <= 8 else ""


if __name__ == "__main__":
    atomic_write(PAGE, page())
