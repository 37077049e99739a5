"""Results of a grid from several directories: put together, told apart, and what can't be read is refused."""

import json
import re
from copy import deepcopy
from dataclasses import replace

import pytest
from reproduction_examples import SMALL

from statetrack.cli import main
from statetrack.experiments.experiment import read_experiment
from statetrack.merge import fingerprint
from statetrack.reproduce import merge_results, run_reproduction

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


def test_parts_of_a_grid_come_into_one_table(experiment, parts, tmp_path, capsys):
    (first, second), expected = parts
    elsewhere = changed(second, tmp_path / "second", moved)
    merged = merge_results(experiment, tmp_path / "out", [first, elsewhere / "summary.json"])
    assert f"{first / 'summary.json'}: 1 runs of the grid" in capsys.readouterr().out
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


def test_results_of_one_machine_and_day_name_it_once(experiment, parts, tmp_path):
    (first, second), _ = parts
    merge_results(experiment, tmp_path, [first, second])
    assert len(summary_of(tmp_path)["origins"]) == 1
    assert "Where the runs were made" not in (tmp_path / "table.md").read_text()


def test_of_a_run_that_several_have_the_last_counts(experiment, parts, tmp_path):
    def worse(summary):
        summary["runs"][0]["accuracy"] = {"4": 0.0, "8": 0.0}

    (first, _), _ = parts
    other = changed(first, tmp_path / "worse", worse)
    for sources, last in (([first, other], other), ([other, first], first)):
        outcome = merge_results(experiment, tmp_path / "out", sources)[0]
        shares = summary_of(last)["runs"][0]["accuracy"]
        assert outcome.record.accuracy == {int(length): share for length, share in shares.items()}


def test_runs_of_another_config_are_left_out(parts, tmp_path, capsys):
    longer = deepcopy(SMALL)
    longer["run"][0]["sweep"][0]["mixer"] = {"name": "deltanet", "num_heads": 4}
    longer = read_experiment(longer, [3])
    (first, second), _ = parts
    outcomes = merge_results(longer, tmp_path, [first, second])
    assert [outcome.record is None for outcome in outcomes] == [True, False]
    assert "0 runs of the grid; 1 of other configs or no run of it are left out" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no run of 'small' is done in"):
        merge_results(longer, tmp_path, [first])


def test_summaries_from_before_lines_had_names_are_read(experiment, parts, tmp_path):
    def old(summary):
        for line in summary["runs"]:
            for key in ("name", "config", "origin", "accuracy"):
                line.pop(key, None)
        del summary["origins"]

    (first, _), expected = parts
    outcome = merge_results(experiment, tmp_path / "out", [changed(first, tmp_path / "old", old)])[0]
    assert outcome.record.accuracy == {}
    assert outcome.scaled_accuracy() == expected[0].scaled_accuracy()
    (line, _) = summary_of(tmp_path / "out")["runs"]
    assert line == summary_of(tmp_path / "old")["runs"][0] | {"origin": 0}  # it is not called what it may not be
    assert outcome.record.origin == {k: v for k, v in summary_of(first)["provenance"].items() if k != "Command"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "can't be read (No such file or directory); name directories that reproduce wrote"),
        ("[", "is no summary.json that reproduce wrote (JSONDecodeError"),
        ("[]", "is no summary.json that reproduce wrote (TypeError"),
        ('{"provenance": {}, "runs": [{}]}', "is no summary.json that reproduce wrote (KeyError: 'state')"),
    ],
)
def test_what_is_no_summary_is_refused(text, message, tmp_path, capsys):
    if text is not None:
        (tmp_path / "summary.json").write_text(text)
    assert main(["reproduce", "tracking", "--out", str(tmp_path / "out"), "--merge", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_merging_trains_nothing(capsys, tmp_path):
    assert main(["reproduce", "tracking", "--merge", str(tmp_path), "--only", "chess"]) == 2
    assert "--merge trains nothing: leave out --slurm" in capsys.readouterr().err


def test_a_fingerprint_is_of_what_was_chosen(experiment):
    run = experiment.runs[0]
    config, mixer = run.config, run.config.model.mixer
    same = replace(run, lengths=(5,), explanation="other words")
    assert fingerprint(run) == fingerprint(same) == fingerprint(read_experiment(SMALL, [3]).runs[0])
    others = [
        *(replace(run, judged_task="parity"), replace(run, whole=True)),
        replace(run, config=replace(config, training=replace(config.training, steps=3))),
        replace(run, config=replace(config, model=replace(config.model, mixer=replace(mixer, num_heads=4)))),
    ]
    assert len({fingerprint(run), *map(fingerprint, others)}) == 5
