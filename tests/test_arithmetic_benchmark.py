"""The look at arithmetic keeps what it has, and docs/recipe.md says what it found."""

import json
from pathlib import Path

import pytest

from benchmarks import arithmetic

ROOT = Path(__file__).resolve().parents[1]


def test_runs_are_kept_and_not_repeated(tmp_path, monkeypatch):
    size = arithmetic.SIZES["3"]
    small = {**size, "d_model": 8, "training": {**size["training"], "steps": 2}}
    monkeypatch.setattr(arithmetic, "SIZES", {"3": small})
    monkeypatch.setattr(arithmetic, "ROWS", arithmetic.ROWS[:2])
    monkeypatch.setattr(arithmetic, "SEQUENCES", 4)
    monkeypatch.setattr("sys.argv", ["arithmetic", "--out", str(tmp_path / "results.json")])
    arithmetic.main()
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [(row["training"], row["seed"]) for row in results] == [
        ({}, 0), ({}, 1), ({"part_labels": True}, 0), ({"part_labels": True}, 1)
    ]  # fmt: skip
    assert len(arithmetic.table(results).splitlines()) == 2 + 2
    monkeypatch.setattr(arithmetic, "train", lambda config: pytest.fail("a finished run was repeated"))
    arithmetic.main()


def test_the_page_has_the_numbers_of_the_results():
    results = json.loads(arithmetic.RESULTS.read_text(encoding="utf-8"))["results"]
    assert arithmetic.table(results) in (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
