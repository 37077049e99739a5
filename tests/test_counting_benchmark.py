"""The look at counting keeps what it has, and docs/recipe.md says what it found."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import counting
from statetrack.stabilize import StabilizationError
from statetrack.tasks import get_task
from statetrack.theory.construct import compile
from statetrack.training_step import draw_length, fitting_lengths

ROOT = Path(__file__).resolve().parents[1]


def no_states_to_go_back_to(model):
    """In place of looking for them, which takes ten seconds with a model that has learned nothing."""
    raise StabilizationError("two states are one")


def test_runs_are_kept_and_not_repeated(tmp_path, monkeypatch):
    monkeypatch.setattr(counting, "StabilizedModel", no_states_to_go_back_to)
    monkeypatch.setattr(counting, "SHARED", {**counting.SHARED, "steps": 2})
    monkeypatch.setattr(counting, "LENGTHS", (16, 64))
    monkeypatch.setattr(counting, "SEQUENCES", 4)
    monkeypatch.setattr(counting, "SEEDS", (5, 6))
    chosen = {name: {**counting.CURRICULA[name], "max_length": 16} for name in ("linear, falling", "doubling, falling")}
    monkeypatch.setattr(counting, "CURRICULA", chosen)
    monkeypatch.setattr("sys.argv", ["counting", "--out", str(tmp_path / "results.json")])
    counting.main()
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [(row["model"], row["curriculum"], row["seed"]) for row in results] == [
        (model, curriculum, seed)
        for model, curriculum in [
            *((model, curriculum) for model in counting.MODELS for curriculum in chosen),
            ("DeltaNet, 2 layers, 8 heads, bias on beta", "doubling, falling, 4,000 steps"),
        ]
        for seed in (5, 6)
    ]
    assert all(row["margin"].keys() == row["accuracy"].keys() == {"16", "64"} for row in results)
    assert len(counting.table(results).splitlines()) == 2 + 7
    monkeypatch.setattr(counting, "train_together", lambda configs: pytest.fail("a finished run was repeated"))
    counting.main()


def test_the_curricula_read_about_as_many_tokens():
    """Means of what a step draws: what they are compared at is equal cost."""
    means = []
    for curriculum in counting.CURRICULA:
        options = counting.configs("DeltaNet, 2 layers", curriculum)[0].training
        fitting = fitting_lengths(get_task(counting.TASK), options)
        drawn = torch.tensor([draw_length(options, fitting, step) for step in range(options.steps)])
        means.append(float(drawn.double().mean()))
    assert all(250 < mean < 290 for mean in means), means
    assert counting.configs("DeltaNet, 2 layers", "doubling")[0].training.steps == 2000


def test_margins_are_those_of_the_right_class(monkeypatch):
    monkeypatch.setattr(counting, "LENGTHS", (3, 50))
    model = compile(get_task(counting.TASK).automaton)
    assert all(value > 0 for value in counting.margins(model).values())
    with torch.no_grad():
        model.output_weight.neg_()
    assert all(value < 0 for value in counting.margins(model).values())


def test_the_page_has_the_numbers_of_the_results():
    results = json.loads(counting.RESULTS.read_text(encoding="utf-8"))["results"]
    assert counting.table(results) in (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
