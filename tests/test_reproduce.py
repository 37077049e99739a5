"""Reproductions: the grids are what they say, runs are resumed and not repeated, ours stands beside theirs."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reproduction_examples import SMALL

from statetrack import reproduce
from statetrack.cli import main
from statetrack.experiments import load_experiment
from statetrack.experiments.experiment import read_experiment
from statetrack.model import LanguageModel
from statetrack.report import Record
from statetrack.reproduce import Outcome, comparison, reproductions, run_reproduction

DOCS = Path(__file__).resolve().parents[1] / "docs"
OWN = """
title = "my own"

[[run]]
task = "parity"
lengths = [4, 8]
sequences = 16
model = { d_model = 8 }
mixer = { name = "deltanet", num_heads = 2 }
training = { steps = 2, batch_size = 4, max_length = 8 }
"""


def record(accuracy, **facts):
    return Record(
        task="parity", mixer="deltanet", seed=0, steps=1, num_parameters=1, chance=0.5, train_lengths=(3, 40),
        accuracy=accuracy, **facts,
    )  # fmt: skip


def test_the_formal_languages_are_seven_models_on_three_tasks():
    runs = [run for run in load_experiment("formal-languages").runs if not run.recipe]
    models = {Outcome(run, None).model for run in runs}
    assert (len(runs), len(models)) == (63, 7)
    steps = {(run.config.task, run.config.training.steps) for run in runs}
    assert steps == {("parity", 20000), ("modular_arithmetic:5", 100000), ("modular_arithmetic_brackets:5", 100000)}
    assert all(set(run.published) == {"best", "median"} for run in runs)
    best = {(run.config.task, Outcome(run, None).model): run.published["best"] for run in runs}
    assert best["modular_arithmetic:5", "DeltaNet [-1, 1], 2 layers"] == 0.971
    assert {run.config.training.gradient_clip for run in runs if "lstm" in run.name} == {0.0}


def test_the_papers_protocol_sweeps_the_learning_rate():
    experiment = load_experiment("formal-languages-paper")
    assert len(experiment.runs) == 7 * 4 * 4 * 3
    assert {run.config.training.learning_rate for run in experiment.runs} == {1e-2, 1e-3, 5e-4, 1e-4}
    assert all(run.tuned and run.config.training.steps == 100_000 for run in experiment.runs)
    facts = {(run.config.task.partition(":")[0], run.config.model.num_layers) for run in experiment.runs}
    assert facts == {("parity", 2), ("modular_arithmetic", 3), ("modular_arithmetic_brackets", 3)}
    batches = {(run.config.model.mixer_name, run.config.training.batch_size) for run in experiment.runs}
    assert {size for name, size in batches if name == "mlstm"} == {512}
    assert {size for name, size in batches if name != "mlstm"} == {1024}
    released = load_experiment("formal-languages").runs
    theirs = {(run.config.task, str(run.config.model.mixer)): run.published for run in released if not run.recipe}
    for run in experiment.runs:
        if run.config.task != "modular_arithmetic_brackets:5:+-":
            assert run.published == theirs[run.config.task, str(run.config.model.mixer)]


@pytest.mark.parametrize("name", ["formal-languages", "word-problems"])
def test_recipes_are_for_models_with_signed_ranges_and_stand_beside_the_protocol(name):
    experiment = load_experiment(name, [0])
    recipes = [outcome for run in experiment.runs if run.recipe and (outcome := Outcome(run, None))]
    assert recipes
    assert all(outcome.run.config.model.mixer.eigenvalue_range.lo == -1 for outcome in recipes)
    assert {outcome.data(experiment.published)["protocol"] for outcome in recipes} == {"ours"}
    plain = [Outcome(run, None) for run in experiment.runs if not run.recipe]
    assert {outcome.data(experiment.published)["protocol"] for outcome in plain} == {experiment.published.protocol}


def test_the_word_problems_are_those_of_both_papers():
    experiment = load_experiment("word-problems")
    tasks = {run.config.task for run in experiment.runs}
    s5 = {"group:S5", "group:S5:swaps", "group:S5:3-cycles", "group:S5:all:4"}
    assert tasks == s5 | {"group:Z60", "group:S3", "group:S4", "group:A5"}
    assert all(run.whole and max(run.lengths) >= 500 for run in experiment.runs)
    (all_elements,) = {run.lengths for run in experiment.runs if "group_S5-deltaproduct" in run.name}
    assert {512, 1024, 2048} < set(all_elements)
    recipes = [run.config for run in experiment.runs if run.config.task == "group:S5" and run.recipe]
    assert [(c.model.mixer_name, c.training.max_length, c.training.seed) for c in recipes] == [
        (mixer, length, seed)
        for mixer in ("deltaproduct", "homogeneous_deltaproduct")
        for length in (32, 128)
        for seed in range(5)
    ]
    paced = [run.config.training for run in experiment.runs if run.config.task == "group:S5:all:4"]
    assert {(training.min_length, training.max_length) for training in paced} == {(64, 64)}
    products = [run.config.model.mixer for run in experiment.runs if "deltaproduct" in run.name]
    assert {mixer.num_householder for mixer in products} == {1, 2, 3, 4}
    for group in ("S3", "S4", "A5", "S5"):
        signed = {
            run.config.model.mixer.num_householder
            for run in experiment.runs
            if run.config.task == f"group:{group}" and not run.recipe and "deltaproduct[-1,1]" in run.name
        }
        assert signed == {1, 2, 3, 4}


@pytest.mark.parametrize("name", reproductions())
def test_a_preset_is_the_same_grid_and_says_that_it_is_smaller(name):
    whole = load_experiment(name, [0])
    for preset, options in reproductions()[name]["preset"].items():
        smaller, tasks = load_experiment(name, preset=preset), options.get("tasks", {})
        rows, whole_rows = (
            list(
                dict.fromkeys((tasks.get(t := run.config.task, t), Outcome(run, None).model) for run in experiment.runs)
            )
            for experiment in (smaller, whole)
        )
        assert rows == whole_rows
        assert all(run.config.training.steps <= 1000 for run in smaller.runs)
        with torch.device("meta"):  # widths and heads go together
            assert all(LanguageModel(config) for config in {run.config.model for run in smaller.runs})
        if preset == "smoke":
            assert all(run.config.training.steps * run.config.training.batch_size <= 8 for run in smaller.runs)
        assert smaller.published.protocol == "ours"
        assert preset in smaller.published.differences[0]
        assert ("smaller tasks" in smaller.published.differences[0]) == bool(tasks)
    with pytest.raises(ValueError, match="unknown preset 'huge'; this experiment has cpu, smoke"):
        load_experiment(name, preset="huge")


def test_a_grid_runs_stops_at_its_budget_and_goes_on(tmp_path):
    experiment = read_experiment(SMALL, [3])
    stopped = run_reproduction(experiment, tmp_path, workers=1, budget_minutes=1e-9)
    assert [outcome.record for outcome in stopped] == [None, None]
    assert "| 0 of 1 |" in (tmp_path / "table.md").read_text()
    assert [run["state"] for run in json.loads((tmp_path / "summary.json").read_text())["runs"]] == ["missing"] * 2

    first = run_reproduction(experiment, tmp_path, workers=1)
    weights = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/model.safetensors")}
    again = run_reproduction(experiment, tmp_path, workers=1)
    assert len(weights) == 2
    assert weights == {path: path.stat().st_mtime_ns for path in weights}
    assert [outcome.record for outcome in again] == [outcome.record for outcome in first]
    hurried = run_reproduction(experiment, tmp_path, workers=1, budget_minutes=1e-9)
    assert [outcome.record for outcome in hurried] == [outcome.record for outcome in first]

    summary = json.loads((tmp_path / "summary.json").read_text())
    lines = summary["runs"]
    assert [line["eigenvalue_range"] for line in lines] == [[0, 1], [-1, 1]]
    assert [line["layers"] for line in lines] == [1, 2]
    assert all(line["protocol"] == "paper" and line["steps"] == 2 and line["state"] == "done" for line in lines)
    for outcome, line in zip(first, lines, strict=True):
        mean = sum(outcome.record.accuracy.values()) / 2
        assert line["scaled_accuracy"] == pytest.approx((mean - 0.2) / 0.8)
        assert line["accuracy"] == {str(length): share for length, share in outcome.record.accuracy.items()}
    assert summary["provenance"]["Machine"]
    for text in ((tmp_path / "table.md").read_text(), (tmp_path / "report.html").read_text()):
        assert all(words in text for words in ("0.250 / 0.125", "perfect", "fewer steps", "a paper", "1 of 1"))


def test_a_part_of_a_grid_is_chosen_by_the_names_of_its_runs(tmp_path, monkeypatch, capsys):
    experiment = read_experiment(SMALL, [3])
    name = experiment.runs[1].name
    outcomes = run_reproduction(experiment, tmp_path, workers=1, only=re.escape(name) + "$")
    assert [outcome.record is None for outcome in outcomes] == [True, False]
    assert [path.name for path in (tmp_path / "runs").iterdir() if not path.name.startswith(".")] == [name]
    assert [run["state"] for run in json.loads((tmp_path / "summary.json").read_text())["runs"]] == ["missing", "done"]
    assert f"[1/1] {name}  done" in capsys.readouterr().out

    monkeypatch.setattr(reproduce, "run_reproduction", lambda *args, **options: outcomes)
    for only, message in (
        (f"^{re.escape(name)}", "those that were asked for are done"),
        (".", "the same command goes on"),
    ):
        assert main(["reproduce", "word-problems", "--preset", "smoke", "--out", str(tmp_path), "--only", only]) == 0
        assert f"1 of 2 runs are left; {message}" in capsys.readouterr().err


def test_best_and_median_leave_out_what_is_missing_and_count_what_failed_as_0():
    runs = read_experiment(SMALL, [0, 1, 2, 3]).runs[:4]
    shares = [record({4: 0.2, 8: 0.2}), record({4: 1.0, 8: 1.0}), None, record({}, failed="the loss became nan")]
    outcomes = [Outcome(run, one) for run, one in zip(runs, shares, strict=True)]
    (table, differences) = comparison(read_experiment(SMALL).published, outcomes)
    assert table.rows == [
        ("modular_arithmetic:3", "DeltaNet [0, 1], 1 layer", "1.000 / 0.000", "0.250 / 0.125", "3 of 4, 1 failed")
    ]
    assert table.text.endswith("A run that failed counts as 0.")
    assert "failed" not in comparison(read_experiment(SMALL).published, outcomes[:3])[0].text
    assert differences.rows == [("fewer steps",)]
    data = [outcome.data(read_experiment(SMALL).published) for outcome in outcomes]
    assert [line["state"] for line in data] == ["done", "done", "missing", "failed"]
    assert data[3]["scaled_accuracy"] is None


def test_a_hair_below_chance_has_no_sign_in_the_table():
    run = read_experiment(SMALL, [0]).runs[0]
    (table, _) = comparison(read_experiment(SMALL).published, [Outcome(run, record({4: 0.1999}))])
    assert table.rows[0][2] == "0.000 / 0.000"


def test_a_recipe_has_columns_of_its_own_beside_the_protocol():
    sweep = [{"eigenvalue_range": [-1, 1], "published": {"best": 0.25}}]
    sweep += [{"eigenvalue_range": [-1, 1], "recipe": True, "training": {"steps": 1}}]
    sweep += [{"mixer": {"name": "mamba"}, "recipe": True, "variant": "two words, more"}]
    experiment = read_experiment({**SMALL, "run": [{"sweep": sweep}]}, [0, 1])
    assert [run.config.training.steps for run in experiment.runs] == [2, 2, 1, 1, 2, 2]
    assert experiment.runs[2].name == experiment.runs[0].name.replace("-seed", "-recipe-seed")
    assert "-two_words_more-recipe-seed" in experiment.runs[4].name
    shares = [0.2, 0.6, 0.6, 1.0, None, 1.0]
    records = [None if share is None else record({4: share}) for share in shares]
    outcomes = [Outcome(run, one) for run, one in zip(experiment.runs, records, strict=True)]
    table = comparison(experiment.published, outcomes)[0]
    assert table.header == ("task", "model", "ours", "published", "our recipe", "seeds")
    # On the page the runs of one model are told apart as well.
    page = reproduce._on_the_page(experiment.published, outcomes)
    assert [one.variant for one in page] == ["", "", "our recipe", "our recipe", "two words, more, our recipe"]
    sentences = replace(experiment.published, recipe=["shorter"])
    assert comparison(sentences, outcomes)[-1].rows == [("shorter",)]
    assert comparison(sentences, outcomes[:2])[-1].rows == [("fewer steps",)]
    task = "modular_arithmetic:3"
    assert table.rows == [
        (task, "DeltaNet [-1, 1], 1 layer", "0.500 / 0.250", "0.250", "1.000 / 0.750", "2 of 2; recipe 2 of 2"),
        (task, "Mamba [-1, 1], 1 layer, two words, more", "–", "–", "1.000 / 1.000", "recipe 1 of 2"),
    ]


def test_the_learning_rate_is_chosen_by_the_median_over_seeds():
    run = {"learning_rates": [1e-2, 1e-3, 1e-4], "sweep": [{"eigenvalue_range": [-1, 1]}]}
    experiment = read_experiment({**SMALL, "run": [run]}, [0, 1, 2])
    assert experiment.runs[0].name.endswith("-lr0.01-seed0")
    assert experiment.runs[3].name.endswith("-lr0.001-seed0")
    # The second has the best run, the first the best median; nothing is known of the third.
    shares = [0.6, 0.6, 0.2, 1.0, 0.2, 0.2, None, None, None]
    records = [None if share is None else record({4: share}) for share in shares]
    outcomes = [Outcome(run, one) for run, one in zip(experiment.runs, records, strict=True)]
    table = comparison(experiment.published, outcomes)[0]
    assert table.rows == [("modular_arithmetic:3", "DeltaNet [-1, 1], 1 layer", "0.500 / 0.500", "0.01", "6 of 9")]
    assert table.header[-2] == "learning rate"
    page = reproduce._on_the_page(experiment.published, outcomes)
    assert [(one.variant, one.accuracy[4]) for one in page] == [("learning rate 0.01", share) for share in shares[:3]]
    assert {outcome.data(experiment.published)["learning_rate"] for outcome in outcomes} == {1e-2, 1e-3, 1e-4}


def test_a_preset_may_be_smaller_in_another_way_for_recipes():
    sweep = [{"training": {"batch_size": 3}}, {"recipe": True, "training": {"steps": 7, "batch_size": 5}}]
    preset = {"seeds": [0], "training": {"steps": 1}, "recipe": {"training": {"batch_size": 2}}}
    data = {**SMALL, "run": [{"sweep": sweep}], "preset": {"one": preset, "two": {"training": {"batch_size": 1}}}}
    sizes = {
        name: [(run.config.training.steps, run.config.training.batch_size) for run in runs]
        for name in ("one", "two")
        if (runs := read_experiment(data, [0], name).runs)
    }
    assert sizes == {"one": [(1, 3), (7, 2)], "two": [(2, 1), (7, 1)]}


@pytest.mark.parametrize(
    ("accuracy", "horizon"),
    [({32: 1.0, 64: 0.95, 128: 0.5}, 64), ({32: 0.5, 64: 1.0}, 0), ({32: 0.9}, 32), ({}, 0)],
)
def test_the_horizon_ends_where_accuracy_first_fails(accuracy, horizon):
    published = replace(read_experiment(SMALL).published, measure="sequence_accuracy")
    outcome = Outcome(read_experiment(SMALL).runs[0], record(accuracy))
    assert outcome.horizon() == horizon
    assert outcome.data(published)["horizon"] == horizon
    assert outcome.data(published)["sequence_accuracy"] == {str(length): share for length, share in accuracy.items()}


@pytest.mark.parametrize("measure", ["accuracy", "sequence_accuracy"])
def test_measures_by_length_have_a_table_of_medians(measure):
    published = replace(read_experiment(SMALL).published, measure=measure)
    runs = read_experiment(SMALL, [0, 1, 2]).runs[:3]
    shares = [record({4: 1.0, 8: 0.875}), record({4: 0.9999}), record({}, failed="the loss became nan")]
    outcomes = [Outcome(run, one) for run, one in zip(runs, shares, strict=True)]
    tables = comparison(published, outcomes)
    assert [table.title for table in tables] == ["Ours and theirs", "Accuracy by length", "Where the protocols differ"]
    assert tables[1].header == ("task", "model", "length: accuracy")
    assert tables[1].rows == [("modular_arithmetic:3", "DeltaNet [0, 1], 1 layer", "4: 99.9%, 8: 43.8%")]
    assert tables[0].rows[0][2] == "4 / 4"
    assert tables[0].rows[0][-1] == "3 of 3, 0 last, 1 failed"
    lasting = Outcome(runs[0], record({4: 1.0, 8: 0.9, 1000: 1.0}))  # judged at a winner's length too
    assert comparison(published, [lasting])[0].rows[0][-1] == "1 of 1, 1 lasts"
    line = outcomes[0].data(published)
    assert (line[measure], line["horizon"]) == ({"4": 1.0, "8": 0.875}, 4)
    # Where nobody has published numbers there is no column for them.
    assert tables[0].header == ("task", "model", "ours", "published", "seeds")
    unpublished = [replace(outcome, run=replace(outcome.run, published={})) for outcome in outcomes]
    results = comparison(published, unpublished)[0]
    assert (results.title, results.header) == ("Results", ("task", "model", "ours", "seeds"))
    assert comparison(published, unpublished)[-1].title == "How it is done"
    # Recipes have lines of their own, and nothing is said of models that have not been judged.
    recipe = Outcome(replace(runs[0], recipe=True), record({4: 1.0}))
    rows = comparison(published, [Outcome(runs[0], None), recipe])[1].rows
    assert rows == [("modular_arithmetic:3", "DeltaNet [0, 1], 1 layer, our recipe", "4: 100%")]
    assert "Accuracy by length" not in [table.title for table in comparison(published, [Outcome(runs[0], None)])]


def test_runs_that_failed_stay_failed_until_they_are_retried(tmp_path, monkeypatch, capsys):
    broken = {**SMALL["shared"]["training"], "learning_rate": 1e38, "gradient_clip": 0, "warmup": 0}
    sweep = [{"eigenvalue_range": [0, 1], "training": broken}, {"eigenvalue_range": [-1, 1]}]
    data = {**SMALL, "run": [{"sweep": sweep}]}
    monkeypatch.setattr(reproduce, "reproductions", lambda: {"small": data})
    monkeypatch.setattr("statetrack.experiments.load_experiment", lambda *options: read_experiment(data))
    words = ["reproduce", "small", "--out", str(tmp_path), "--workers", "1", "--devices", "cpu"]
    assert main(words) == 0
    assert "1 of 2 runs failed; --retry-failed lets them go on" in capsys.readouterr().err
    (failure,) = tmp_path.glob("runs/*/failure.json")
    assert json.loads(failure.read_text())["reason"].startswith("the loss became")
    states = [(run["state"], run["failed"]) for run in json.loads((tmp_path / "summary.json").read_text())["runs"]]
    assert states == [("failed", json.loads(failure.read_text())["reason"]), ("done", None)]
    assert "1 of 1, 1 failed" in (tmp_path / "table.md").read_text()
    assert "2 of 2 runs have ended, 1 of them in failure." in (tmp_path / "report.html").read_text()

    written = failure.stat().st_mtime_ns
    assert main([*words, "--retry-failed"]) == 0
    assert failure.stat().st_mtime_ns > written


def test_the_grid_of_the_docs_is_one_of_ones_own(tmp_path):
    (example,) = re.findall("```toml\n(.*?)```", (DOCS / "reproduce.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "pentagon.toml").write_text(example, encoding="utf-8")
    experiment = load_experiment(str(tmp_path / "pentagon.toml"), seeds=[4])
    models = [run.config.model.mixer for run in experiment.runs]
    assert [(model.num_householder, model.eigenvalue_range.lo) for model in models] == [(1, -1), (2, 0), (2, -1)]
    assert {(run.config.task, run.lengths, run.config.training.seed) for run in experiment.runs} == {
        ("group:D5", (32, 128, 512), 4)
    }


def test_the_command_runs_a_grid_of_ones_own(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.toml").write_text(OWN, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", "mine.toml", "--workers", "1", "--devices", "cpu", "--seeds", "5"]) == 0
    assert str(Path("runs/mine/table.md")) in capsys.readouterr().out
    summary = json.loads((tmp_path / "runs/mine/summary.json").read_text())
    assert [(run["task"], run["seed"], run["protocol"], run["state"]) for run in summary["runs"]] == [
        ("parity", 5, "ours", "done")
    ]
    assert summary["runs"][0]["accuracy"].keys() == {"4", "8"}
    table = (tmp_path / "runs/mine/table.md").read_text()
    assert "| task | model | reached | seeds |" in table
    assert not re.search("Published|follows|theirs", table)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no file mine.toml"),
        ("title =", "mine.toml is not valid TOML: "),
        ('title = "t"\nrun = []\nsteps = 3', "mine.toml: unknown key steps"),
        ('title = "t"\nrun = []', "mine.toml: there is no run"),
        (OWN + "sweep = []", "mine.toml: there is no run"),
        (OWN + "sweep = [{training = 3}]", "mine.toml: training must be a table, got 3"),
        (OWN + "sweep = [{seeds = 3}]", "mine.toml: seeds must be"),
        (OWN + 'published = {best = "0.5"}', "mine.toml: published.best must be a number, got '0.5'"),
        (OWN + "published = {mean = 0.5}", "mine.toml: unknown key mean"),
        (OWN + "chance = 1.0", "mine.toml: chance must be at least 0 and less than 1, got 1.0"),
        (OWN.replace("[4, 8]", "[]"), "got lengths []"),
        (OWN.replace("[4, 8]", "[8, 0]"), "got lengths [8, 0]"),
        (OWN.replace('"parity"', '["parity"]'), "mine.toml: task must be a string"),
        (OWN.replace('{ name = "deltanet", num_heads = 2 }', '"deltanet"'), "mine.toml: mixer must be a table"),
        ("# \xff", "mine.toml is not valid TOML: "),
    ],
)
def test_a_file_that_is_no_grid_gets_one_sentence(text, message, tmp_path, monkeypatch, capsys):
    if text is not None:
        (tmp_path / "mine.toml").write_text(text, encoding="latin-1")
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", "mine.toml"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "reproduce",
            "unknown experiment ''; those that can be reproduced are arithmetic, formal-languages, ",
        ),
        ("reproduce demo", "unknown experiment 'demo'"),
        ("reproduce word-problems --preset big", "unknown preset 'big'"),
        ("reproduce word-problems --workers 0", "workers must be at least 1"),
        ("reproduce word-problems --budget-minutes 0", "budget_minutes must be positive"),
        ("reproduce word-problems --devices tpu", "unknown device"),
        ("reproduce word-problems --seeds x", "seeds must be whole numbers"),
        ("reproduce word-problems --only [", "only must be a regular expression, got '['"),
        (
            "reproduce word-problems --only parity",
            "no run has a name with a match of 'parity'; names are such as",
        ),
    ],
)
def test_wrong_commands_get_one_sentence(words, message, capsys):
    assert main(words.split()) == 2
    assert message in capsys.readouterr().err


def test_the_list_has_every_grid_and_preset(capsys):
    assert main(["reproduce", "--list"]) == 0
    text = capsys.readouterr().out
    words = "formal-languages word-problems --preset smoke arithmetic tracking 120 96 134 336"
    assert all(word in text for word in words.split())


@pytest.mark.slow
@pytest.mark.parametrize("name", reproductions())
def test_every_run_of_a_grid_works(name, tmp_path):
    outcomes = run_reproduction(load_experiment(name, preset="smoke"), tmp_path, workers=1)
    assert all(outcome.judged for outcome in outcomes)
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("words", "devices"), [("", ["cuda:0", "cuda:1"]), ("--devices=cuda:1", ["cuda:1"]), ("--devices=cpu", ["cpu"])]
)
def test_a_grid_uses_every_gpu_unless_told_otherwise(words, devices, tmp_path, monkeypatch):
    seen = []

    def run_reproduction(experiment, out, **options):
        seen.extend(options["devices"])
        return []

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(reproduce, "run_reproduction", run_reproduction)
    main(["reproduce", "word-problems", "--preset", "smoke", "--out", str(tmp_path), *words.split()])
    assert seen == devices


@pytest.mark.parametrize(("device", "key"), [("cuda", True), ("cpu", False), (None, False)])
def test_seconds_of_a_gpu_have_a_key_of_their_own(device, key):
    experiment = read_experiment(SMALL)
    line = Outcome(experiment.runs[0], record({4: 1.0}, train_seconds=2.5, train_device=device)).data(
        experiment.published
    )
    assert line["seconds"] == 2.5
    assert line.get("gpu_seconds") == (2.5 if key else None)
    assert ("gpu_seconds" in line) == key
