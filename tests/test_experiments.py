"""Experiments: how their files are read, and that a grid runs on worker processes, stops and goes on."""

import itertools
import json
import multiprocessing
import os
import queue
import signal
import threading
from concurrent.futures import Future
from dataclasses import replace

import pytest
import torch

from statetrack import EigenvalueRange
from statetrack.cli import main
from statetrack.demo import run_demo
from statetrack.experiments import load_experiment, run_experiment, runner
from statetrack.experiments.experiment import read_experiment
from statetrack.experiments.runner import finished_records
from statetrack.report.record import group
from statetrack.runs import RunDirectory
from statetrack.training import train, training_steps

SMALL = {
    "title": "small",
    "seeds": [3, 4],
    "run": [
        {
            "task": "parity",
            "lengths": [5, 256],
            "winner_lengths": [300],
            "explanation": "because",
            "model": {"d_model": 8, "num_layers": 1},
            "mixer": {"name": "deltanet", "num_heads": 2},
            "training": {"steps": 4, "batch_size": 2, "max_length": 6, "log_every": 1},
            "sweep": [
                {"eigenvalue_range": [0, 1], "explanation": "another reason"},
                {"eigenvalue_range": [-1, 1]},
            ],
        }
    ],
}


HYBRID = [{"name": "deltanet", "num_heads": 2}, {"name": "mamba", "eigenvalue_range": [0, 1]}]


def run_here(experiment, out, monkeypatch, together=8, in_turn=1):
    """What a worker of `run_experiment` makes of the runs, seeds together, without seconds for a process to start."""
    monkeypatch.setattr(runner, "_events", queue.Queue(), raising=False)
    monkeypatch.setattr(runner, "_stop", threading.Event(), raising=False)
    monkeypatch.setattr(runner, "_device", "cpu", raising=False)
    records = []
    groups = runner._groups(experiment.runs, range(len(experiment.runs)), together)
    for lot in runner._lots(experiment.runs, groups, in_turn):
        records += runner._run([[runner._job(experiment, out, index) for index in group] for group in lot], 0)
    return records


def test_a_sweep_makes_a_run_for_every_entry_and_seed():
    experiment = read_experiment(SMALL)
    mixers = [run.config.model.mixer for run in experiment.runs]
    assert [mixer.eigenvalue_range for mixer in mixers] == [EigenvalueRange(0, 1)] * 2 + [EigenvalueRange(-1, 1)] * 2
    assert [run.config.training.seed for run in experiment.runs] == [3, 4, 3, 4]
    assert [run.explanation for run in experiment.runs] == ["another reason"] * 2 + ["because"] * 2
    assert len({run.name for run in experiment.runs}) == 4
    assert len(read_experiment(SMALL, [9]).runs) == 2


def test_what_runs_share_stands_once():
    run = SMALL["run"][0]
    shared = {key: value for key, value in run.items() if key not in ("training", "mixer")}
    shared |= {"training": {**run["training"], "steps": 9}, "mixer": run["mixer"]}
    own = {"training": {"steps": 4}, "mixer": {"num_heads": 2}}
    file = {"title": "small", "seeds": [3, 4], "shared": shared, "run": [own]}
    assert read_experiment(file) == read_experiment(SMALL)


def test_an_entry_of_a_sweep_may_have_seeds_of_its_own():
    sweep = [{"seeds": [0, 1]}, {"eigenvalue_range": [0, 1]}]
    file = {**SMALL, "run": [{**SMALL["run"][0], "sweep": sweep}], "preset": {"tiny": {"seeds": [5]}}}

    def seeds(*options):
        return [run.config.training.seed for run in read_experiment(file, *options).runs]

    assert seeds() == [0, 1, 3, 4]
    assert seeds([7]) == [7, 7]
    assert seeds(None, "tiny") == [5, 5]
    assert seeds([7], "tiny") == [7, 7]


def test_a_preset_may_have_smaller_tasks_in_place_of_those_that_runs_are_of():
    table = {**SMALL["run"][0], "judged_task": "modular_addition:5", "sweep": [{}]}
    preset = {"tiny": {"tasks": {"parity": "group:Z2", "modular_addition:5": "modular_addition:3"}}}
    (run,) = read_experiment({**SMALL, "run": [table], "preset": preset}, [0], "tiny").runs
    assert (run.config.task, run.judged_task) == ("group:Z2", "modular_addition:3")
    preset = {"tiny": {"tasks": {"partiy": "group:Z2"}}}
    with pytest.raises(ValueError, match="the preset tiny has a smaller task for partiy, which no run is of"):
        read_experiment({**SMALL, "preset": preset}, None, "tiny")


def test_a_run_may_be_judged_on_another_task_than_it_is_trained_on(tmp_path, monkeypatch):
    table = {**SMALL["run"][0], "task": "group:Z2", "judged_task": "parity", "sweep": [{}], "winner_lengths": []}
    experiment = read_experiment({**SMALL, "run": [table]}, [3])
    records = run_here(experiment, tmp_path, monkeypatch)
    directory = RunDirectory(tmp_path / experiment.runs[0].name)
    assert (directory.read_config().task, directory.read_evaluation()["task"]) == ("group:Z2", "parity")
    assert list(finished_records(experiment, tmp_path, [0]).values()) == records
    # Judged on what it was trained on, it is another run.
    own = replace(experiment, runs=(replace(experiment.runs[0], judged_task=None),))
    assert finished_records(own, tmp_path, [0]) == {}


def test_the_parity_experiment_has_every_family_at_both_ranges():
    experiment = load_experiment("parity", [0])
    ranges = {}
    for run in experiment.runs:
        mixer = run.config.model.mixer
        ranges.setdefault(mixer.name, []).append(str(getattr(mixer, "eigenvalue_range", "")))
        assert run.explanation
    assert ranges.pop("retnet") == [""]
    assert ranges.pop("rwkv7") == ["0,1", "-0.4548,1", "-1,1"]
    assert ranges.keys() == {"gla", "mamba2", "mlstm", "gated_deltanet", "deltaproduct"}
    assert all(tried == ["0,1", "-1,1"] for tried in ranges.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"titel": "x"}, "unknown key titel"),
        ({"run": [{"task": "parity", "mixer": {"name": "deltanet"}}]}, "lengths"),
        ({"run": [{"task": "parity", "lengths": [4], "mixer": {"name": "nothing"}}]}, "unknown mixer 'nothing'"),
        ({"run": [{"task": "parity", "lengths": [4], "mixer": {"name": "mamba", "heads": 1}}]}, "unknown key heads"),
        ({"run": [{"task": "parity", "lengths": [4], "mixer": HYBRID, "sweep": [{"num_heads": 1}]}]}, "which mixer"),
    ],
)
def test_a_wrong_file_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        read_experiment({**SMALL, **change})


def test_a_hybrid_runs_and_is_named_after_its_pattern(tmp_path, monkeypatch):
    table = SMALL["run"][0]
    run = {**table, "mixer": HYBRID, "model": {"d_model": 8, "num_layers": 2}, "sweep": [{}]}
    experiment = read_experiment({**SMALL, "run": [run]}, [3])
    assert [run.name for run in experiment.runs] == ["parity-deltanet[-1,1]n1+mamba[0,1]-seed3"]
    records = run_here(experiment, tmp_path, monkeypatch)
    (record,) = records
    assert (record.mixer, record.eigenvalue_range, record.num_householder) == ("deltanet+mamba", None, 1)
    assert record.variant == "2 layers, eigenvalues in [-1,1] and [0,1]"
    (of_it,) = group(records)
    assert of_it.model == "DeltaNet + Mamba, 2 layers, eigenvalues in [-1,1] and [0,1]"
    spectrum = [x for values in record.token_eigenvalues.values() for x, _ in values]
    assert min(spectrum) >= -1
    assert max(spectrum) <= 1
    # A run that is finished is found again under the same config.
    assert run_here(experiment, tmp_path, monkeypatch) == records


def test_a_sweep_may_replace_the_mixers_of_a_hybrid_as_a_whole():
    run = {**SMALL["run"][0], "model": {"num_layers": 2}, "sweep": [{"mixer": HYBRID}, {"mixer": HYBRID[1]}]}
    experiment = read_experiment({**SMALL, "run": [run]}, [3])
    assert [run.config.model.mixer_name for run in experiment.runs] == ["deltanet+mamba", "mamba"]


def test_a_grid_runs_stops_and_goes_on(tmp_path, monkeypatch):
    experiment, events = read_experiment(SMALL, [3]), []
    assert run_experiment(experiment, tmp_path, workers=1, should_stop=lambda: True) is None
    records = run_experiment(experiment, tmp_path, workers=2, on_event=events.append)
    assert records is not None
    assert [record.seed for record in records] == [3, 3]
    assert [set(record.accuracy) - {300} for record in records] == [{5, 256}] * 2
    assert all(record.train_seconds is not None and record.token_eigenvalues for record in records)
    assert [len(record.history) for record in records] == [4, 4]
    assert {event.run for event in events if event.progress} == {0, 1}
    written = {run.name: (tmp_path / run.name / "model.safetensors").stat().st_mtime_ns for run in experiment.runs}
    for run in experiment.runs:  # as a directory that was copied for its models alone
        (tmp_path / run.name / "training_state.safetensors").unlink()
    monkeypatch.setattr(runner, "ProcessPoolExecutor", lambda *args: pytest.fail("a worker for nothing"))
    events.clear()
    assert run_experiment(experiment, tmp_path, workers=1, on_event=events.append) == records
    assert [(event.run, event.record) for event in events] == list(enumerate(records))
    assert written == {name: (tmp_path / name / "model.safetensors").stat().st_mtime_ns for name in written}


def test_workers_leave_signals_to_the_process_that_started_them(tmp_path):
    signalled = []

    def signal_once():
        for process in [] if signalled else multiprocessing.active_children():
            signalled.append(process.pid)
            os.kill(process.pid, signal.SIGINT)
            os.kill(process.pid, signal.SIGUSR2)
        return False

    records = run_experiment(read_experiment(SMALL, [3]), tmp_path, workers=1, should_stop=signal_once)
    assert signalled
    assert records is not None
    assert [record.seed for record in records] == [3, 3]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


def test_runs_trained_together_have_directories_and_records_of_their_own(tmp_path, monkeypatch):
    experiment, events = read_experiment(SMALL), []
    records = run_experiment(experiment, tmp_path / "grid", workers=1, together=3, in_turn=2, on_event=events.append)
    assert records is not None
    # The seeds of both ranges, once both have begun.
    assert {event.progress.together for event in events if event.progress and event.progress.step > 1} == {4}
    for run, record in zip(experiment.runs, records, strict=True):
        assert (record.seed, record.steps) == (run.config.training.seed, 4)
        assert str(record.eigenvalue_range) == str(run.config.model.mixer.eigenvalue_range)
        alone, losses = RunDirectory(tmp_path / run.name), [point.loss for point in record.history]
        train(run.config, alone)
        assert losses == pytest.approx([line["loss"] for line in alone.read_metrics()], rel=1e-4)
        files = {file.name for file in (tmp_path / "grid" / run.name).iterdir()}
        assert files == {file.name for file in alone.path.iterdir()} | {"evaluation.json"}
    # Nothing is left to do, together or one by one.
    for together in (3, 1):
        assert run_here(experiment, tmp_path / "grid", monkeypatch, together) == records


def test_an_evaluation_that_the_experiment_did_not_ask_for_is_not_taken_for_its_own(tmp_path, monkeypatch):
    experiment = read_experiment({**SMALL, "run": [{**SMALL["run"][0], "sequences": 16}]}, [3])
    records = run_here(experiment, tmp_path, monkeypatch)
    done = finished_records(experiment, tmp_path, range(2))
    assert [done[0], done[1]] == records
    for index, options in enumerate((["--lengths", "5"], ["--lengths", "5,256", "--sequences", "8"])):
        assert main(["evaluate", str(tmp_path / experiment.runs[index].name), *options]) == 0
    assert finished_records(experiment, tmp_path, range(2)) == {}
    # Nor is one of labels where whole sequences are asked for.
    whole = replace(experiment, runs=tuple(replace(run, whole=True) for run in experiment.runs))
    assert main(["evaluate", str(tmp_path / experiment.runs[0].name), "--lengths", "5,256", "--sequences", "16"]) == 0
    assert (list(finished_records(experiment, tmp_path, [0])), finished_records(whole, tmp_path, [0])) == ([0], {})
    assert run_here(experiment, tmp_path, monkeypatch) == records
    (tmp_path / experiment.runs[1].name / "evaluation.json").write_text("{")
    assert list(finished_records(experiment, tmp_path, range(2))) == [0]


def test_a_run_that_breaks_down_is_reported_not_dropped(tmp_path, monkeypatch):
    broken = {
        **SMALL["run"][0],
        "training": {**SMALL["run"][0]["training"], "learning_rate": 1e38, "gradient_clip": 0, "warmup": 0},
    }
    records = run_here(read_experiment({**SMALL, "run": [broken]}, [0]), tmp_path, monkeypatch)
    assert len(records) == 2
    assert all(record.failed is not None and "the loss became" in record.failed for record in records)
    assert not any(record.solved for record in records)


def test_a_run_that_raises_is_given_up_and_the_others_of_its_group_go_on(tmp_path, monkeypatch):
    experiment, calls = read_experiment({**SMALL, "run": [{**SMALL["run"][0], "sweep": [{}]}]}), []

    def breaks_for_seed_3(configs, *args, **options):
        seeds = [config.training.seed for config in configs]
        calls.append(seeds)
        outcomes = yield from training_steps(configs, *args, **options)
        if 3 in seeds:
            raise RuntimeError("out of\nmemory")
        return outcomes

    monkeypatch.setattr(runner, "training_steps", breaks_for_seed_3)
    failed, done = run_here(experiment, tmp_path, monkeypatch)
    assert calls == [[3, 4], [3], [4]]
    assert (failed.failed, failed.seed, done.failed, done.seed) == ("RuntimeError: out of memory", 3, None, 4)
    directory = RunDirectory(tmp_path / experiment.runs[0].name)
    assert "breaks_for_seed_3" in json.loads(directory.failure_file.read_text())["traceback"]
    assert finished_records(experiment, tmp_path, range(2)) == {0: failed, 1: done}

    # It is not tried again, whatever its file looks like, until its failure is forgotten.
    assert run_here(experiment, tmp_path, monkeypatch) == [failed, done]
    directory.failure_file.write_text("{")
    (damaged, _) = run_here(experiment, tmp_path, monkeypatch)
    assert "is damaged and does not say why" in damaged.failed
    assert calls[3:] == []
    monkeypatch.setattr(runner, "training_steps", training_steps)
    runner.forget_failures(experiment, tmp_path)
    assert [record.failed for record in run_here(experiment, tmp_path, monkeypatch)] == [None, None]


def test_groups_in_turn_are_trained_as_they_would_be_alone(tmp_path, monkeypatch):
    longer = {**SMALL["run"][0], "task": "modular_addition:3", "sweep": [{}]}
    longer["training"] = {**longer["training"], "steps": 7}
    experiment, steps = read_experiment({**SMALL, "run": [*SMALL["run"], longer]}), []

    def recording(configs, *args, **options):
        names = [(config.task, str(config.model.mixer.eigenvalue_range)) for config in configs]
        assert len(set(names)) == 1
        training = training_steps(configs, *args, **options)
        while True:
            steps.append(names[0])
            try:
                next(training)
            except StopIteration as end:
                return end.value
            yield

    monkeypatch.setattr(runner, "training_steps", recording)
    records = run_here(experiment, tmp_path / "grid", monkeypatch, in_turn=2)
    first, second, third = ("parity", "0,1"), ("parity", "-1,1"), ("modular_addition:3", "-1,1")
    assert steps == [first, second] * 5 + [third] * 8  # the last says that there are no more
    steps.clear()
    run_here(experiment, tmp_path / "three", monkeypatch, in_turn=3)
    assert steps == [first, second, third] * 5 + [third] * 3
    for run, record in zip(experiment.runs, records, strict=True):
        assert (record.seed, record.steps) == (run.config.training.seed, run.config.training.steps)
        for grid in ("grid", "three"):
            model = RunDirectory(tmp_path / grid / run.name).load_model()
            for a, b in zip(model.parameters(), train(run.config).model.parameters(), strict=True):
                assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_what_is_finished_takes_nobodys_place(tmp_path, monkeypatch):
    experiment, lots = read_experiment({**SMALL, "seeds": [3, 4, 5]}), []
    run_here(replace(experiment, runs=experiment.runs[:2]), tmp_path, monkeypatch)

    class Pool:
        """Notes what a worker is asked to do, and does nothing."""

        def __init__(self, *args):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *args):
            pass

        def submit(self, function, lot, seed):
            assert function is runner._run
            lots.append([[job.index for job in group] for group in lot])
            done = Future()
            done.set_result([None for group in lot for _ in group])
            return done

    monkeypatch.setattr(runner, "ProcessPoolExecutor", Pool)
    events = []
    records = run_experiment(experiment, tmp_path, workers=2, devices=["cuda:0", "cuda:1"], on_event=events.append)
    assert [event.run for event in events if event.record] == [0, 1]
    assert records is not None
    assert [record.seed for record in records] == [3, 4]
    assert lots == [[[2], [3, 4]], [[5]]]  # one each is half of what is left
    lots.clear()
    run_experiment(experiment, tmp_path, workers=1, devices=["cuda:0"])
    assert lots == [[[2], [3, 4, 5]]]


def test_a_run_that_fails_beside_others_is_tried_alone(tmp_path, monkeypatch):
    experiment, calls = read_experiment(SMALL, [3]), []

    def no_memory_beside_others(configs, *args, shared, **options):
        """Before there is a directory."""
        calls.append([str(config.model.mixer.eigenvalue_range) for config in configs])
        if len(calls) == 2:
            raise torch.OutOfMemoryError("out of memory")
        return (yield from training_steps(configs, *args, shared=shared, **options))

    monkeypatch.setattr(runner, "training_steps", no_memory_beside_others)
    records = run_here(experiment, tmp_path, monkeypatch, in_turn=2)
    assert calls == [["0,1"], ["-1,1"], ["-1,1"]]
    assert [record.failed for record in records] == [None, None]
    assert [str(record.eigenvalue_range) for record in records] == ["0,1", "-1,1"]


def test_nothing_is_begun_once_the_work_is_to_stop(tmp_path, monkeypatch):
    experiment = read_experiment(SMALL, [3])

    def stops(configs, *args, **options):
        runner._stop.set()
        return (yield from training_steps(configs, *args, **options))

    monkeypatch.setattr(runner, "training_steps", stops)
    assert run_here(experiment, tmp_path, monkeypatch, in_turn=2) == [None, None]
    begun, other = (RunDirectory(tmp_path / run.name) for run in experiment.runs)
    assert (begun.weights_step(), other.exists()) == (1, False)


def test_large_models_do_not_take_turns():
    experiment = read_experiment({**SMALL, "seeds": [0, 1, 2, 3]})
    groups = runner._groups(experiment.runs, range(8), 2)
    assert groups == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert runner._lots(experiment.runs, groups, 3) == [groups[:3], groups[3:]]
    assert runner._lots(experiment.runs, groups, 1) == [[group] for group in groups]
    wide = {**SMALL["run"][0], "model": {"d_model": 512, "num_layers": 8}}
    wide["training"] = {**wide["training"], "batch_size": 128, "max_length": 64}
    experiment = read_experiment({**SMALL, "seeds": [0, 1, 2, 3], "run": [wide]})
    assert runner.MOST_ACTIVATIONS == 128 * 64 * 512 * 8 * 2
    assert runner._lots(experiment.runs, groups, 3) == [[group] for group in groups]
    assert runner._lots(experiment.runs, [[0], [1], [2]], 3) == [[[0], [1]], [[2]]]


@pytest.mark.parametrize("where", ["training", "evaluation"])
def test_a_full_disk_is_no_fault_of_the_run_and_groups_beside_it_save_what_they_have(tmp_path, monkeypatch, where):
    def full(configs, *args, **options):
        training = training_steps(configs, *args, **options)
        if configs[0].model.mixer.eigenvalue_range == EigenvalueRange(-1, 1):
            return (yield from training)
        yield from itertools.islice(training, 2)
        if where == "training":
            raise OSError(28, "No space left on device")
        return (yield from training)

    def full_too(*args, **options):
        raise OSError(28, "No space left on device")

    table = {**SMALL["run"][0], "training": {**SMALL["run"][0]["training"], "steps": 6}}
    experiment = read_experiment({**SMALL, "run": [table]}, [3])
    longer = replace(experiment.runs[1].config, training=replace(experiment.runs[1].config.training, steps=9))
    experiment = replace(experiment, runs=(experiment.runs[0], replace(experiment.runs[1], config=longer)))
    monkeypatch.setattr(runner, "training_steps", full)
    if where == "evaluation":
        monkeypatch.setattr(runner, "evaluate", full_too)
    with pytest.raises(OSError, match="No space left"):
        run_here(experiment, tmp_path, monkeypatch, in_turn=2)
    assert list(tmp_path.glob("*/failure.json")) == []
    assert RunDirectory(tmp_path / experiment.runs[1].name).weights_step() == {"training": 3, "evaluation": 9}[where]
    monkeypatch.undo()
    assert [record.failed for record in run_here(experiment, tmp_path, monkeypatch, in_turn=2)] == [None, None]


def test_damaged_files_stop_their_run_alone(tmp_path, monkeypatch):
    experiment = read_experiment(SMALL, [3])
    records = run_here(experiment, tmp_path, monkeypatch)
    RunDirectory(tmp_path / experiment.runs[0].name).model_file.write_bytes(b"cut short")
    (tmp_path / experiment.runs[1].name / "evaluation.json").write_text("{")
    damaged, judged_again = run_here(experiment, tmp_path, monkeypatch)
    assert "model.safetensors" in damaged.failed
    assert judged_again == records[1]
    assert list(tmp_path.glob("*/failure.json")) == []  # once the file is restored, the run goes on


def test_what_another_process_is_at_is_left_alone(tmp_path, monkeypatch):
    experiment = read_experiment(SMALL, [3])
    first, second = (tmp_path / run.name for run in experiment.runs)
    with runner._claim(first) as claimed:
        assert claimed
        nothing, record = run_here(experiment, tmp_path, monkeypatch)
        assert (nothing, str(record.eigenvalue_range), first.exists()) == (None, "-1,1", False)
        with runner._claim(second) as other:
            assert other
    assert run_here(experiment, tmp_path, monkeypatch)[1] == record
    assert first.exists()


def test_two_demos_at_once_in_one_directory_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("statetrack.demo.run_experiment", lambda *args, **options: [])
    with pytest.raises(RuntimeError, match="another process trains runs of the demo"):
        run_demo(tmp_path)


def test_the_demo_is_the_experiment_that_it_says_it_is():
    experiment = load_experiment("demo")
    models = {
        (
            r.config.task,
            r.config.model.mixer.name,
            str(r.config.model.mixer.eigenvalue_range),
            getattr(r.config.model.mixer, "num_householder", None),
        )
        for r in experiment.runs
    }
    assert models == {
        ("parity", "deltanet", "0,1", 1),
        ("parity", "deltanet", "-1,1", 1),
        ("parity", "mamba", "0,1", None),
        ("parity", "mamba", "-1,1", None),
        ("group:S3", "deltaproduct", "-1,1", 1),
        ("group:S3", "deltaproduct", "-1,1", 2),
    }
    assert len(experiment.runs) == 18
    assert all(run.explanation for run in experiment.runs)
    assert all(run.config.training.max_length == 40 for run in experiment.runs)
    assert all(run.config.training.min_length == 3 for run in experiment.runs if run.config.task == "parity")
