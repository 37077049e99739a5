"""Results of a grid from several directories: put together, told apart, nothing lost; what can't be read is refused."""

import json
import re
import shutil
from copy import deepcopy
from dataclasses import replace

import pytest
from reproduction_examples import SMALL

from statetrack import reproduce
from statetrack.cli import main
from statetrack.cluster import Cluster, reproduce_on_cluster
from statetrack.experiments.experiment import read_experiment
from statetrack.merge import OF_THE_FILE
from statetrack.report import provenance, run_origin
from statetrack.reproduce import merge_results, run_reproduction
from statetrack.runs import RunDirectory

HERE = {"Machine": "one", "Commit": "a"}


@pytest.fixture(scope="module")
def experiment():
    return read_experiment(SMALL, [3])


@pytest.fixture(scope="module")
def parts(experiment, tmp_path_factory):
    """Two directories with a run each, and the outcomes of both."""
    places, outcomes = [], []
    for index, run in enumerate(experiment.runs):
        places.append(tmp_path_factory.mktemp("part"))
        done = run_reproduction(experiment, places[-1], workers=1, only=f"^{re.escape(run.name)}$")
        assert [outcome.record is not None for outcome in done] == [other == index for other in range(2)]
        outcomes.append(done[index])
    return places, outcomes


def summary_of(path):
    return json.loads((path / "summary.json").read_text())


def changed(place, out, change):
    """A copy of a summary.json with something else in it."""
    summary = summary_of(place)
    change(summary)
    out.mkdir()
    (out / "summary.json").write_text(json.dumps(summary))
    return out


def moved(summary):
    summary["origins"] = [HERE]


def old(summary):
    """As it was before lines had configs."""
    for line in summary["runs"]:
        for key in ("name", "config", "judged", "origin", "accuracy"):
            line.pop(key, None)
    del summary["origins"]


def failed(summary):
    for line in summary["runs"]:
        if line["state"] == "done":
            line |= {"state": "failed", "failed": "the loss became nan"}
            del line["accuracy"]


def test_parts_of_a_grid_come_into_one_table(experiment, parts, tmp_path, capsys):
    (first, second), expected = parts
    elsewhere = changed(second, tmp_path / "second", moved)
    merged = merge_results(experiment, tmp_path / "out", [first, elsewhere / "summary.json"])
    assert f"{first / 'summary.json'}: 1 of 2 runs\n" in capsys.readouterr().out
    for outcome, alone in zip(merged, expected, strict=True):
        assert outcome.scaled_accuracy() == alone.scaled_accuracy() is not None
        light = replace(alone.record, history=(), eigenvalues=(), token_eigenvalues={}, accuracy_sequences={})
        assert replace(outcome.record, origin=light.origin) == light
    summary = summary_of(tmp_path / "out")
    assert [line["state"] for line in summary["runs"]] == ["done", "done"]
    assert [summary["origins"][line["origin"]] for line in summary["runs"]] == [expected[0].record.origin, HERE]
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| 1 | one |" in text
    assert text.count("| 1 of 1 |") == 2
    # Once more from its own results, and a part again: nothing is lost.
    again = merge_results(experiment, tmp_path / "out", [tmp_path / "out", first])
    assert [outcome.record for outcome in again] == [outcome.record for outcome in merged]


def test_a_run_says_where_it_was_made(parts):
    (first, _), (outcome, _) = parts
    origin = outcome.record.origin
    assert origin.keys() >= {"Machine", "Accelerator", "System", "Versions", "Date"}
    assert origin["Accelerator"] == "none"
    assert "Command" not in origin
    summary = summary_of(first)
    assert summary["origins"] == [origin]
    assert [line.get("origin") for line in summary["runs"]] == [0, None]
    assert "Where the runs were made" not in (first / "table.md").read_text()


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("other", [old, failed])
def test_a_done_run_and_one_with_a_config_come_before_others(experiment, parts, tmp_path, other, order):
    (first, _), expected = parts
    sources = [first, changed(first, tmp_path / "other", other)][::order]
    outcome = merge_results(experiment, tmp_path / "out", sources)[0]
    assert (outcome.old, outcome.record.failed) == (None, None)
    assert outcome.record.accuracy == expected[0].record.accuracy
    assert merge_results(experiment, tmp_path / "alone", [tmp_path / "other"])[0].failed == (other is failed)


def test_a_done_run_without_a_config_comes_before_a_failed_one_with_it(experiment, parts, tmp_path):
    (first, _), expected = parts
    sources = [changed(first, tmp_path / "old", old), changed(first, tmp_path / "failed", failed)]
    for name, order in (("1", 1), ("2", -1)):
        outcome = merge_results(experiment, tmp_path / name, sources[::order])[0]
        assert (outcome.failed, outcome.scaled_accuracy()) == (False, expected[0].scaled_accuracy())


def test_of_two_lines_in_one_file_the_better_counts_and_the_other_is_counted(experiment, parts, tmp_path, capsys):
    def twice(summary):
        again = deepcopy(summary["runs"][0]) | {"state": "failed", "failed": "why"}
        summary["runs"].append(again)

    (first, _), expected = parts
    outcome = merge_results(experiment, tmp_path / "out", [changed(first, tmp_path / "twice", twice)])[0]
    assert outcome.record.accuracy == expected[0].record.accuracy
    assert "1 of 2 runs; 1 are left out" in capsys.readouterr().out


def test_where_no_run_has_an_origin_there_is_no_table_of_them(experiment, parts, tmp_path):
    def unknown(summary):
        del summary["runs"][0]["origin"]

    merge_results(experiment, tmp_path / "out", [changed(parts[0][0], tmp_path / "a", unknown)])
    assert "Where the runs were made" not in (tmp_path / "out" / "table.md").read_text()
    merge_results(experiment, tmp_path / "both", [tmp_path / "a", parts[0][1]])
    assert "| 1 | not written down |" in (tmp_path / "both" / "table.md").read_text()


def test_a_failed_run_and_an_evaluation_say_where_they_were_made(experiment, parts, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: f"the card {device}")
    assert provenance(device="cuda:1")["Accelerator"] == "the card cuda:1"
    assert provenance(device="cpu")["Accelerator"] == "none"
    directory = RunDirectory(tmp_path)
    assert directory.failure_origin() == {}
    directory.write_failure("why", origin=HERE)
    assert (directory.read_failure(), directory.failure_origin()) == ("why", HERE)
    (run,) = (parts[0][0] / "runs").glob("mod*")
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "evaluation.json").write_text("{")  # what is damaged is replaced
    assert main(["evaluate", str(copy), "--lengths", "4", "--sequences", "2", "--device", "cpu"]) == 0
    assert RunDirectory(copy).read_evaluation()["origin"] == run_origin("cpu")


def test_of_two_that_are_worth_as_much_the_last_counts(experiment, parts, tmp_path):
    def worse(summary):
        summary["runs"][0]["accuracy"] = {"4": 0.0, "8": 0.0}

    (first, _), _ = parts
    other = changed(first, tmp_path / "worse", worse)
    for name, sources in (("1", [first, other]), ("2", [other, first])):
        outcome = merge_results(experiment, tmp_path / name, sources)[0]
        shares = summary_of(sources[-1])["runs"][0]["accuracy"]
        assert outcome.record.accuracy == {int(length): share for length, share in shares.items()}


def of_config(run, **changes):
    return {"config": replace(run.config, **changes)}


@pytest.mark.parametrize(
    "change",
    [
        lambda run: of_config(run, training=replace(run.config.training, beta2=0.5)),
        lambda run: of_config(run, model=replace(run.config.model, mixer=replace(run.config.model.mixer, num_heads=4))),
        lambda run: {"lengths": (2, 8)},
        lambda run: {"sequences": 8},
        lambda run: {"chance": 0.5},
        lambda run: {"whole": True},
        lambda run: {"judged_task": "modular_arithmetic:3:+"},
    ],
    ids=["training", "mixer", "lengths", "sequences", "chance", "whole", "task"],
)
def test_runs_of_another_config_or_judged_otherwise_are_left_out(change, experiment, parts, tmp_path, capsys):
    run = experiment.runs[0]
    other = replace(experiment, runs=(replace(run, **change(run)), experiment.runs[1]))
    (first, second), _ = parts
    outcomes = merge_results(other, tmp_path / "out", [first, second])
    assert [outcome.record is None for outcome in outcomes] == [True, False]
    assert "0 of 2 runs; 1 are left out: of other configs, or none of the grid" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no run of 'small' has ended in"):
        merge_results(other, tmp_path / "none", [first])
    assert not (tmp_path / "none").exists()


def test_a_field_that_was_added_later_changes_nothing(experiment, parts, tmp_path):
    def earlier(summary):
        del summary["runs"][0]["config"]["training"]["z_loss"]

    assert experiment.runs[0].config.training.z_loss == 0
    (first, _), _ = parts
    assert merge_results(experiment, tmp_path / "out", [changed(first, tmp_path / "a", earlier)])[0].judged
    longer = deepcopy(SMALL)
    longer["shared"]["training"]["z_loss"] = 0.1
    with pytest.raises(ValueError, match="no run of 'small' has ended in"):
        merge_results(read_experiment(longer, [3]), tmp_path / "none", [tmp_path / "a"])


def test_lines_from_before_they_had_configs_stay_as_they_are(experiment, parts, tmp_path, capsys):
    (first, _), expected = parts
    source = changed(first, tmp_path / "old", old)
    for out, sources in (("out", [source]), ("again", [tmp_path / "out"])):
        outcome = merge_results(experiment, tmp_path / out, sources)[0]
        assert "1 of 2 runs; 1 of them without a config, which nobody can compare" in capsys.readouterr().out
        assert (outcome.record.accuracy, outcome.scaled_accuracy()) == ({}, expected[0].scaled_accuracy())
        assert summary_of(tmp_path / out)["runs"][0] == summary_of(source)["runs"][0] | {"origin": 0}
        made = {name: value for name, value in summary_of(first)["provenance"].items() if name != "Command"}
        assert outcome.record.origin == made | {"Note": OF_THE_FILE}


@pytest.mark.parametrize("key", ["precision", "seed", "title"])
def test_lines_that_could_be_of_another_run_are_left_out(key, experiment, parts, tmp_path):
    def less(summary):
        old(summary)
        summary["runs"][0].pop(key, None)
        summary["title"] = "another" if key == "title" else summary["title"]

    with pytest.raises(ValueError, match="no run of 'small' has ended in"):
        merge_results(experiment, tmp_path / "out", [changed(parts[0][0], tmp_path / "less", less)])


def test_what_a_run_has_not_written_down_is_not_made_up(experiment, parts, tmp_path):
    def unknown(summary):
        del summary["runs"][0]["origin"]

    outcome = merge_results(experiment, tmp_path / "out", [changed(parts[0][0], tmp_path / "a", unknown)])[0]
    assert outcome.record.origin == {}
    assert "origin" not in summary_of(tmp_path / "out")["runs"][0]


def test_results_are_not_written_over(experiment, parts, tmp_path):
    (first, second), _ = parts
    lost = "has results (of its own|without their runs|that are left out), which would be lost; choose another --out"
    with pytest.raises(ValueError, match=lost):
        merge_results(experiment, first, [first, second])
    out = tmp_path / "out"
    merge_results(experiment, out, [first])
    before = summary_of(out)
    with pytest.raises(ValueError, match=lost):
        merge_results(experiment, out, [second])
    with pytest.raises(ValueError, match=lost):
        run_reproduction(experiment, out, workers=1)
    with pytest.raises(ValueError, match=lost):
        reproduce_on_cluster(experiment, out, Cluster())
    with pytest.raises(ValueError, match=lost):  # one of its lines is of no run of this grid
        merge_results(replace(experiment, runs=experiment.runs[1:]), out, [out, second])
    assert summary_of(out) == before


LINE = '{"title": "", "provenance": {}, "runs": [%s]}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "can't be read (No such file or directory); name directories that reproduce wrote"),
        ("[", "is not valid JSON (Expecting value"),
        ("[]", "is no summary.json that reproduce wrote: it has no title"),
        ('{"title": "", "runs": []}', "it has no provenance"),
        (LINE % '{"state": "missing"}, {}', "see line 1 of its runs"),
        (LINE % '{"state": "done", "origin": 3}', "see line 0 of its runs"),
        (LINE % '{"state": "done", "origin": "x"}', "see line 0 of its runs"),
        (LINE % '{"state": "done", "origin": 0.0}', "see line 0 of its runs"),
        (LINE % '{"state": "done", "config": null}', "see line 0 of its runs"),
        (LINE % '{"state": "done", "accuracy": null}', "see line 0 of its runs"),
        (LINE % '{"state": "done", "accuracy": {"4": "x"}}', "see line 0 of its runs"),
        (LINE % '{"state": "done", "accuracy": {"x": 1}}', "see line 0 of its runs"),
        ('{"title": "", "provenance": {}, "origins": 5, "runs": []}', "see where it was made"),
        ('{"title": "", "provenance": {}, "origins": [{"a": 1}], "runs": []}', "see where it was made"),
        (LINE % "", "has ended in"),
    ],
)
def test_what_is_no_summary_is_refused(text, message, tmp_path, capsys):
    if text is not None:
        (tmp_path / "summary.json").write_text(text)
    assert main(["reproduce", "tracking", "--out", str(tmp_path / "out"), "--merge", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command(experiment, parts, tmp_path, capsys, monkeypatch):
    (first, second), _ = parts
    monkeypatch.setattr("statetrack.experiments.load_experiment", lambda *args: experiment)
    for sources, words in (([first, second], ""), ([first], "of 2 runs 1 are missing and 0 failed\n")):
        out = tmp_path / str(len(sources))
        assert main(["reproduce", "tracking", "--out", str(out), "--merge", *map(str, sources)]) == 0
        printed = capsys.readouterr()
        assert (str(out / "table.md") in printed.out, printed.err) == (True, words)
        assert "perfect" in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--merge", "a", "--only", "chess", "--devices", "cpu"],
            "--merge trains nothing: leave out --only, --devices",
        ),
        (["--merge", "a", "--slurm"], "--merge trains nothing: leave out --slurm"),
        (["--merge"], "--merge needs directories with results, or files summary.json; none was given"),
    ],
)
def test_merging_trains_nothing(options, message, capsys, monkeypatch):
    monkeypatch.setattr(reproduce, "run_reproduction", lambda *args, **options: pytest.fail("it trains"))
    assert main(["reproduce", "tracking", *options]) == 2
    assert message in capsys.readouterr().err
