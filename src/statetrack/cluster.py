"""A grid on a SLURM cluster, through submitit: a job for each few runs, with the results of `reproduce`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from statetrack.experiments import Experiment
from statetrack.experiments.runner import RunEvent, finished_records, forget_failures, run_experiment
from statetrack.machine import available_devices
from statetrack.report import Record
from statetrack.reproduce import Outcome, chosen_runs, refuse_results_without_runs, write_results

_POLL_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What a job asks SLURM for.

    Attributes:
        partition: the partition; None for the cluster's own choice.
        account: whom the time is charged to; None for the cluster's own choice.
        minutes: time limit of a job. Runs that are not done by then write a checkpoint, and SLURM queues the job again,
            up to three times.
        gpus: GPUs of a job, on one machine; 0 for a job on CPUs.
        cpus: CPU cores of a job; None for one for each run at the same time.
        runs_per_job: runs of the grid that a job does; None for one at a time on each of its GPUs or cores.
        kind: "slurm"; or "local", jobs as processes of this machine, to try things out.
    """

    partition: str | None = None
    account: str | None = None
    minutes: int = 240
    gpus: int = 1
    cpus: int | None = None
    runs_per_job: int | None = None
    kind: Literal["slurm", "local"] = "slurm"

    def __post_init__(self) -> None:
        for name, least in (("minutes", 1), ("gpus", 0), ("cpus", 1), ("runs_per_job", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")


def reproduce_on_cluster(
    experiment: Experiment,
    out: Path,
    cluster: Cluster,
    *,
    only: str | None = None,
    workers: int | None = None,
    retry_failed: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Outcome]:
    """`run_reproduction` by jobs: submits what is left of a grid, waits, and writes the same files below `out`.

    Runs that are done or have failed are not submitted, and half-finished ones go on, so that the same call again
    continues. The directory must be one that the cluster's machines share; the logs of the jobs are in `out / "jobs"`.

    Args:
        experiment: the grid.
        out: the directory of the results.
        cluster: what a job asks for.
        only: as of `run_reproduction`.
        workers: runs at the same time in a job; None for one on each GPU, or one on each core.
        retry_failed: let runs that have failed go on from their last checkpoints.
        should_stop: asked every second; on True the jobs are cancelled. Their runs go on from their last checkpoints.

    Returns:
        The outcome of each run, in the experiment's order.

    Raises:
        ModuleNotFoundError: if submitit is not installed.
        ValueError: if `only` chooses nothing, or `out` has results without runs.
        RuntimeError: if there is no SLURM here; or if jobs failed, after the results of the others are written.
    """
    chosen = chosen_runs(experiment, only)
    refuse_results_without_runs(out)
    executor = _executor(out / "jobs", cluster, workers)
    if retry_failed:
        forget_failures(experiment, out / "runs")
    records = finished_records(experiment, out / "runs", range(len(experiment.runs)))
    left = [index for index in chosen if index not in records]
    size = cluster.runs_per_job or workers or cluster.gpus or cluster.cpus or 1
    chunks = [left[start : start + size] for start in range(0, len(left), size)]
    console = Console()
    console.print(f"{len(records)} runs are done, {len(left)} go to {len(chunks)} jobs", highlight=False)
    jobs: dict[Any, list[int]] = {}
    if chunks:
        with executor.batch():
            submitted = [executor.submit(GridJob(experiment, chunk, out / "runs", workers)) for chunk in chunks]
        jobs = dict(zip(submitted, chunks, strict=True))

    failures = []
    waiting = list(jobs)
    stopping = False
    while waiting:
        if not stopping and (stopping := should_stop()):
            for job in waiting:
                job.cancel()
        for job in [job for job in waiting if job.done()]:
            waiting.remove(job)
            error = job.exception()
            if error is None:
                records |= job.result()
            elif not stopping:
                failures.append(f"job {job.job_id} failed: {_reason(error)}; its log is {job.paths.stderr}")
            # Of a job that broke down, some runs may be done all the same.
            records |= finished_records(experiment, out / "runs", set(jobs[job]) - records.keys())
            state = "done" if error is None else "cancelled" if stopping else "failed"
            console.print(f"[{len(jobs) - len(waiting)}/{len(jobs)}] job {job.job_id}  {state}", highlight=False)
        if waiting:
            time.sleep(_POLL_SECONDS)
    outcomes = write_results(experiment, records, out)
    if failures:
        raise RuntimeError(failures[0] + (f" (and {len(failures) - 1} more)" if failures[1:] else ""))
    return outcomes


@dataclass(frozen=True)
class GridJob:
    """Some runs of a grid, on all GPUs of the machine that it finds itself on; what a job of the cluster calls.

    Attributes:
        experiment: the grid.
        indices: which of its runs.
        out: the directory of the run directories.
        workers: as of `run_experiment`.
    """

    experiment: Experiment
    indices: Sequence[int]
    out: Path
    workers: int | None = None

    def __call__(self) -> dict[int, Record]:
        """Trains and judges the runs; the records of those that came to their end, by their index in the grid."""
        part = replace(self.experiment, runs=tuple(self.experiment.runs[index] for index in self.indices))
        records: dict[int, Record] = {}

        def collect(event: RunEvent) -> None:
            if event.record is not None:
                records[self.indices[event.run]] = event.record
                print(f"{part.runs[event.run].name}: {event.record.failed or 'done'}", flush=True)

        run_experiment(part, self.out, workers=self.workers, devices=available_devices(), on_event=collect)
        return records

    def checkpoint(self) -> Any:
        """What submitit queues when the time is up or the job is preempted: the same again, which goes on."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def _executor(folder: Path, cluster: Cluster, workers: int | None) -> Any:
    try:
        import submitit
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "jobs on a cluster need the package submitit: pip install 'statetrack[slurm]'"
        ) from None
    if cluster.kind == "slurm" and submitit.SlurmExecutor.affinity() <= 0:
        raise RuntimeError("there is no SLURM here (no command srun); run this on a machine of the cluster")
    executor = submitit.AutoExecutor(folder, cluster=cluster.kind)
    slurm = {"partition": cluster.partition, "account": cluster.account}
    executor.update_parameters(
        name="statetrack",
        timeout_min=cluster.minutes,
        nodes=1,
        tasks_per_node=1,
        cpus_per_task=cluster.cpus or workers or max(1, cluster.gpus),
        **({"gpus_per_node": cluster.gpus} if cluster.gpus else {}),
        **{f"slurm_{key}": value for key, value in slurm.items() if value is not None},
    )
    return executor


def _reason(error: BaseException) -> str:
    """What happened, from one of submitit's errors: the last line of the traceback between its rules, or its first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    rules = [index for index, line in enumerate(lines) if not line.strip("-")]
    return lines[rules[-1] - 1] if len(rules) > 1 else lines[0]
