"""Tasks: what a model is trained and judged on, drawn afresh for every batch.

A task is a file in this folder with a `TASK`; `get_task` finds it by itself.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from functools import cache

from statetrack.tasks.task import IGNORE, Batch, EndlessTask, Stream, Task, TaskFamily

__all__ = ["IGNORE", "Batch", "EndlessTask", "Stream", "Task", "TaskFamily", "get_task", "list_tasks"]


def list_tasks() -> tuple[TaskFamily, ...]:
    """What there is to train on, by name."""
    return tuple(_families().values())


def get_task(name: str) -> Task:
    """The task called `name`, such as "parity", "modular_addition:5" or "group:A5xZ9".

    Raises:
        ValueError: for an unknown name or a wrong argument; the message names what would be right.
    """
    families = _families()
    family_name, colon, argument = name.partition(":")
    family = families.get(family_name)
    if family is None:
        close = difflib.get_close_matches(family_name, families, n=1)
        hint = f"did you mean {families[close[0]].syntax!r}? " if close else ""
        known = ", ".join(family.syntax for family in families.values())
        raise ValueError(f"unknown task {name!r}; {hint}the tasks are {known}")
    if family.argument and not argument:
        raise ValueError(
            f"the task {family_name} needs an argument, {family.syntax}, for example {family.example}; got {name!r}"
        )
    if colon and not family.argument:
        raise ValueError(f"the task {family_name} takes no argument; got {name!r}")
    return family.make(argument)


@cache
def _families() -> dict[str, TaskFamily]:
    modules = (importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__))
    found = [module.TASK for module in modules if hasattr(module, "TASK")]
    return {family.name: family for family in sorted(found, key=lambda family: family.name)}
