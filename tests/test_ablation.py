"""The ablation trains what is missing and keeps it, and docs/recipe.md says what it found."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import ablation
from benchmarks.ablation import Value, draw, horizon, read_plan, recipes, run, table, variant, variants
from statetrack.config import to_data
from statetrack.mixers import Mixer
from statetrack.model import LanguageModel
from statetrack.training import TrainingError

ROOT = Path(__file__).resolve().parents[1]
PLAN = read_plan(ablation.CHOICES.read_text(encoding="utf-8"))
SMALL = """
experiment = "demo"
model = [{ name = "mamba", title = "parity, Mamba", run = "parity-mamba[-1,1]" }]

[[choice]]
name = "z_loss"
title = "z-loss"
values = [{ label = "0", training = { z_loss = 0.0, steps = 2 } }, { label = "0.1", training = { steps = 2 } }]

[[choice]]
name = "dt_rank"
title = "rank"
values = [
    { label = "1", mixer = { dt_rank = 1 }, training = { steps = 2 } },
    { label = "16", training = { steps = 2 } },
]
"""


def ablate(path, seeds):
    """Runs all of `SMALL` but the recipe itself, which takes its hundreds of steps."""
    run(read_plan(SMALL), seeds, path, only=lambda one: bool(one.changes))
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(ablation, "LENGTHS", (10, 40))
    monkeypatch.setattr(ablation, "SEQUENCES", 4)


def test_two_choices_are_run_kept_resumed_and_drawn(tmp_path, short, monkeypatch):
    first = ablate(tmp_path / "results.json", [5])
    assert [[done["seed"] for done in row["seeds"]] for row in first["results"]] == [[], [5], [5], [5]]
    assert first["results"][3]["changes"] == {"mixer": {"dt_rank": 1}, "training": {"steps": 2}}
    for row in first["results"][1:]:
        assert 0 <= row["seeds"][0]["accuracy"]["40"] <= 1
        assert -1 <= row["seeds"][0]["lowest_real_part"] <= row["seeds"][0]["largest_modulus"] <= 1
    second = ablate(tmp_path / "results.json", [5, 6])
    assert [row["seeds"][0] for row in second["results"][1:]] == [row["seeds"][0] for row in first["results"][1:]]
    assert [done["seed"] for done in second["results"][1]["seeds"]] == [5, 6]
    monkeypatch.setattr(ablation, "train", lambda config: pytest.fail("a finished run was repeated"))
    assert ablate(tmp_path / "results.json", [5, 6]) == second
    assert draw(read_plan(SMALL), second, tmp_path / "images") == []  # two seeds are not enough
    monkeypatch.setattr(ablation, "ENOUGH_SEEDS", 2)
    files = draw(read_plan(SMALL), second, tmp_path / "images")
    assert [file.name for file in files] == ["ablation-z-loss.svg", "ablation-dt-rank.svg"]
    assert all(ElementTree.parse(file).getroot().tag.endswith("svg") for file in files)
    assert len(table(read_plan(SMALL), second).splitlines()) == 2 + 4


def test_a_run_that_breaks_down_is_counted(tmp_path, short, monkeypatch):
    def breaks(config):
        raise TrainingError("the loss became nan")

    monkeypatch.setattr(ablation, "train", breaks)
    row = ablate(tmp_path / "results.json", [5])["results"][1]
    assert row["seeds"][0]["failed"] == "the loss became nan"
    assert ablation.right(row, 256) == "0/1"
    assert ablation.median_horizon(row) == "< 10"


def test_results_of_another_recipe_are_refused(tmp_path):
    path, plan = tmp_path / "results.json", read_plan(SMALL)
    recipe = to_data(recipes(plan)["mamba"])
    del recipe["training"]["curriculum"]  # an option that is younger than the file, and off by default
    path.write_text(json.dumps({"recipes": {"mamba": recipe}, "results": []}), encoding="utf-8")
    run(plan, [], path)
    recipe["training"]["z_loss"] = 0.7
    path.write_text(json.dumps({"recipes": {"mamba": recipe}, "results": []}), encoding="utf-8")
    with pytest.raises(ValueError, match="another recipe"):
        run(plan, [], path)


def test_unknown_models_are_refused():
    with pytest.raises(ValueError, match="names the model mamba3; there are mamba"):
        read_plan(SMALL.replace('title = "rank"', 'title = "rank"\nmodels = ["mamba3"]'))


def test_every_choice_has_the_recipe_s_own_value_once():
    of_models = recipes(PLAN)
    for choice in PLAN.choice:
        for model in PLAN.model:
            recipe = of_models[model.name]
            found = [variant(model, recipe, value).changes for value in PLAN.values(choice, model)]
            assert not found or (found.count({}) == 1 and len(found) >= 2), (choice.name, model.name)


def test_values_of_the_recipe_are_one_variant():
    found = variants(PLAN)
    assert [one.model.name for one in found if not one.changes] == [model.name for model in PLAN.model]
    assert len({(one.model.name, json.dumps(one.changes)) for one in found}) == len(found)


def test_weight_decay_can_take_what_decides_on_eigenvalues():
    model = PLAN.model[0]
    one = variant(model, recipes(PLAN)[model.name], Value(label="all", decay_eigenvalues=True))
    mixer = LanguageModel(one.config.model).get_submodule("blocks.0.mixer")
    assert isinstance(mixer, Mixer)
    assert one.changes == {"decay_eigenvalues": True}
    assert mixer.eigenvalue_parameters()
    with ablation.decayed_eigenvalues(one.config):
        assert mixer.eigenvalue_parameters() == []
    assert mixer.eigenvalue_parameters()


def test_the_failure_horizon_ends_at_the_first_length_that_fails():
    assert horizon({10: 1.0, 40: 0.9, 256: 0.89, 1000: 0.95}) == 40
    assert horizon({10: 0.5, 40: 1.0}) == 0
    assert horizon({10: 1.0, 10_000: 1.0}) == 10_000


def test_the_page_has_the_numbers_and_the_figures_of_the_results():
    results = json.loads(ablation.RESULTS.read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    compared = list(dict.fromkeys(choice.name for choice, _, _ in ablation.shown(PLAN, results)))
    assert table(PLAN, results) in page
    assert re.findall(r"\(images/ablation-([\w-]+)\.svg\)", page) == [name.replace("_", "-") for name in compared]
    assert all((ablation.IMAGES / f"ablation-{name.replace('_', '-')}.svg").exists() for name in compared)
