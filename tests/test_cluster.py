"""Grids as jobs: submitit's local executor runs them as SLURM would."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from reproduction_examples import SMALL

from statetrack import cluster
from statetrack.cli import main
from statetrack.cluster import Cluster, GridJob, reproduce_on_cluster
from statetrack.experiments import runner
from statetrack.experiments.experiment import read_experiment
from statetrack.reproduce import run_reproduction

submitit = pytest.importorskip("submitit")
from submitit.slurm.slurm import _make_sbatch_string  # noqa: E402 (it may not be there)

LOCAL = Cluster(kind="local", gpus=0)


def lines(out):
    runs = json.loads((out / "summary.json").read_text())["runs"]
    return [{key: value for key, value in run.items() if key != "seconds"} for run in runs]


def test_jobs_do_what_is_left_and_nothing_twice(tmp_path, capsys):
    experiment = read_experiment(SMALL, [3])
    first, *_ = experiment.runs
    (tmp_path / "runs" / first.name).mkdir(parents=True)
    (tmp_path / "runs" / first.name / "config.json").write_text("no config of this run")
    outcomes = reproduce_on_cluster(experiment, tmp_path, replace(LOCAL, runs_per_job=2))
    assert "0 runs are done, 2 go to 1 jobs" in capsys.readouterr().out
    assert [run["state"] for run in lines(tmp_path)] == ["done", "done"]
    for name in ("table.md", "report.html"):
        assert "0.250 / 0.125" in (tmp_path / name).read_text()

    weights = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/model.safetensors")}
    assert len(weights) == 2
    again = reproduce_on_cluster(experiment, tmp_path, LOCAL)
    assert "2 runs are done, 0 go to 0 jobs" in capsys.readouterr().out
    assert [outcome.record for outcome in again] == [outcome.record for outcome in outcomes]
    assert weights == {path: path.stat().st_mtime_ns for path in weights}


@pytest.mark.slow
def test_jobs_write_what_one_process_writes(tmp_path):
    experiment = read_experiment(SMALL, [3])
    run_reproduction(experiment, tmp_path / "here", workers=1)
    reproduce_on_cluster(experiment, tmp_path / "jobs", LOCAL)
    assert lines(tmp_path / "jobs") == lines(tmp_path / "here")


@pytest.mark.slow
def test_a_stop_cancels_the_jobs_and_says_what_is_missing(tmp_path):
    outcomes = reproduce_on_cluster(read_experiment(SMALL, [3]), tmp_path, LOCAL, should_stop=lambda: True)
    assert [outcome.record for outcome in outcomes] == [None, None]
    assert [run["state"] for run in lines(tmp_path)] == ["missing", "missing"]


@pytest.mark.slow
def test_a_job_that_breaks_down_is_named_with_its_log(tmp_path):
    experiment = read_experiment(SMALL, [3])
    (tmp_path / "runs").mkdir()
    for run in experiment.runs:
        (tmp_path / "runs" / run.name).write_text("a file where a directory should be")
    with pytest.raises(RuntimeError, match=r"job \d+ failed: .*is a file.*its log is .*\.err"):
        reproduce_on_cluster(experiment, tmp_path, replace(LOCAL, runs_per_job=2))
    assert [run["state"] for run in lines(tmp_path)] == ["missing", "missing"]


def test_a_job_does_its_runs_on_every_gpu_of_its_machine(tmp_path, monkeypatch):
    """The records are those of its runs, by their place in the whole grid."""
    experiment = read_experiment(SMALL, [3, 4])
    seen = {}

    def run_experiment(part, out, *, workers, devices, on_event):
        seen.update(names=[run.name for run in part.runs], devices=devices)
        on_event(runner.RunEvent(1, record=record))

    record = type("Record", (), {"failed": None})()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(cluster, "run_experiment", run_experiment)
    job = GridJob(experiment, [1, 3], tmp_path)
    assert job() == {3: record}
    assert seen["names"] == [experiment.runs[1].name, experiment.runs[3].name]
    assert seen["devices"] == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]
    again = job.checkpoint()
    assert (again.function, again.args) == (job, ())


def test_what_slurm_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(submitit.SlurmExecutor, "affinity", classmethod(lambda cls: 2))
    asked = Cluster(partition="gpu", account="us", minutes=90, gpus=4)
    parameters = cluster._executor(tmp_path, asked, None)._executor.parameters
    script = _make_sbatch_string("run", tmp_path, **parameters)
    for line in ("partition=gpu", "account=us", "time=90", "gpus-per-node=4", "nodes=1", "cpus-per-task=4"):
        assert f"#SBATCH --{line}\n" in script
    on_cpus = cluster._executor(tmp_path, Cluster(gpus=0), 8)._executor.parameters
    assert "gpus-per-node" not in (script := _make_sbatch_string("run", tmp_path, **on_cpus))
    assert "#SBATCH --cpus-per-task=8\n" in script


def test_without_slurm_or_submitit_one_sentence_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(submitit.SlurmExecutor, "affinity", classmethod(lambda cls: -1))
    words = f"reproduce word-problems --preset smoke --out {tmp_path} --slurm".split()
    assert main(words) == 2
    assert "there is no SLURM here (no command srun)" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert main(words) == 2
    assert "pip install 'statetrack[slurm]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--slurm --devices cpu", "leave out --devices and --budget-minutes"),
        ("--slurm --slurm-gpus -1", "gpus must be at least 0, got -1"),
        ("--slurm --slurm-minutes 0", "minutes must be at least 1, got 0"),
        ("--slurm --slurm-runs 0", "runs_per_job must be at least 1, got 0"),
    ],
)
def test_wrong_options_are_refused(words, message, capsys):
    assert main(["reproduce", "word-problems", *words.split()]) == 2
    assert message in capsys.readouterr().err
