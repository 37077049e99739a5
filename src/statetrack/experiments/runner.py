"""Runs an experiment in worker processes of one thread, as many at once as there are cores or GPUs.

On a GPU, runs that differ in seed and learning rate alone are trained together, as one model (`train_together`), which
takes less time than one after the other; on a CPU, where arithmetic and not launching it takes the time, one by one.

A run that breaks down is given up: its directory says why, and it is not tried again until `forget_failures`. Several
processes may work on one directory of runs, since each leaves alone what another is at.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import shutil
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from statetrack.evaluation import Accuracy, default_sequences, evaluate, evaluation_data, solved
from statetrack.experiments.experiment import Experiment, ExperimentRun
from statetrack.machine import available_cores
from statetrack.model import LanguageModel
from statetrack.records import record_of_failure, record_of_run
from statetrack.report import Record, run_origin
from statetrack.runs import RunDirectory, RunError
from statetrack.tasks import get_task
from statetrack.training import Progress, TrainingError, TrainingResult, train_together, why_apart

MOST_TOGETHER = 8
"""So many runs trained as one keep a GPU busy; more would only need more of its memory."""


@dataclass(frozen=True)
class RunEvent:
    """News of a run, for whoever shows the progress.

    Attributes:
        run: index of the run in the experiment.
        progress: while it trains.
        evaluated: while it is evaluated: the share that is done.
        record: when it is finished.
    """

    run: int
    progress: Progress | None = None
    evaluated: float | None = None
    record: Record | None = None


def run_experiment(
    experiment: Experiment,
    out: Path,
    *,
    workers: int | None = None,
    devices: Sequence[str] = ("cpu",),
    together: int | None = None,
    evaluation_seed: int = 0,
    on_event: Callable[[RunEvent], None] = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Record] | None:
    """Trains and evaluates every run, each in a directory of its own below `out`.

    Runs that are finished there already, with the same config, are not repeated, nor are those that have failed;
    half-finished ones go on.

    Args:
        experiment: what to run.
        out: the directory of the experiment.
        workers: processes; None for one on each core, or one on each GPU.
        devices: where they run, such as ("cuda:0", "cuda:1"); the workers are shared out among them.
        together: how many runs that differ in seed and learning rate alone are trained as one, at most; None for
            `MOST_TOGETHER` on GPUs, fewer if some would have nothing to do, and one on CPUs.
        evaluation_seed: seed of the sequences that the models are judged on.
        on_event: called in this process with news of the runs.
        should_stop: asked a few times a second; on True all runs write a checkpoint and stop.

    Returns:
        A record for each run, in the experiment's order, those that failed included, without those that another
        process is at; None if it was told to stop before all were finished.

    Raises:
        OSError: if results can't be written; the other runs have saved what they had.
        RunError: if there is something else where a run directory should be.
    """
    records: dict[int, Record] = {}
    if all(_has_ended(RunDirectory(out / run.name)) for run in experiment.runs):
        # Mostly nothing is left to do, which is said without the seconds that workers take to start.
        records = finished_records(experiment, out, range(len(experiment.runs)), evaluation_seed=evaluation_seed)
        if len(records) == len(experiment.runs):
            for index, record in records.items():
                on_event(RunEvent(index, record=record))
            return list(records.values())
    on_cpu = set(devices) == {"cpu"}
    workers = workers or (available_cores() if on_cpu else len(devices))
    if together is None:
        together = 1 if on_cpu else min(MOST_TOGETHER, -(-len(experiment.runs) // workers))
    groups = _groups(experiment.runs, together)
    context = multiprocessing.get_context("spawn")
    events: Queue[RunEvent] = context.Queue()
    stop = context.Event()
    places: Queue[str] = context.Queue()
    for worker in range(workers):
        places.put(devices[worker % len(devices)])

    def drain(timeout: float) -> None:
        try:
            event = events.get(timeout=timeout)
            while True:
                on_event(event)
                event = events.get_nowait()
        except queue.Empty:
            pass

    with ProcessPoolExecutor(workers, context, _start_worker, (events, stop, places, os.getpid())) as pool:
        pending: dict[Future[list[Record | None]], list[int]] = {}
        with _signals_kept_from_workers():
            for group in groups:
                runs = [experiment.runs[index] for index in group]
                pending[pool.submit(_run, group, runs, [out / run.name for run in runs], evaluation_seed)] = group
        try:
            while pending and not should_stop():
                drain(timeout=0.1)
                for future in [future for future in pending if future.done()]:
                    for index, record in zip(pending.pop(future), future.result(), strict=True):
                        if record is not None:
                            records[index] = record
                            on_event(RunEvent(index, record=record))
        finally:  # also when a run ended in an error: the others save what they have
            if pending:
                stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
    if pending:
        return None
    return [records[index] for index in sorted(records)]


def finished_records(
    experiment: Experiment, out: Path, indices: Iterable[int], *, evaluation_seed: int = 0
) -> dict[int, Record]:
    """The records of those runs that `run_experiment` has trained and judged, or given up, below `out`, by index.

    Runs with damaged files are left out: whoever goes on with one is told what is wrong with it.
    """
    records = {}
    for index in indices:
        run = experiment.runs[index]
        directory = RunDirectory(out / run.name)
        try:
            if not _holds(directory, run):
                continue
            if (reason := directory.read_failure()) is not None:
                records[index] = record_of_failure(directory, reason, explanation=run.explanation)
            elif _is_done(directory, run, evaluation_seed):
                records[index] = record_of_run(directory, explanation=run.explanation)
        except RunError:
            continue
    return records


def forget_failures(experiment: Experiment, out: Path) -> None:
    """Lets the runs below `out` that have failed go on, from their last checkpoints, at the next `run_experiment`."""
    for run in experiment.runs:
        RunDirectory(out / run.name).forget_failure()


def _has_ended(directory: RunDirectory) -> bool:
    """Whether a run seems to be judged or given up, to judge by the files that it has."""
    return directory.evaluation_file.exists() or directory.failure_file.exists()


def _is_done(directory: RunDirectory, run: ExperimentRun, evaluation_seed: int) -> bool:
    """Whether a run is trained and judged; not if its weights are damaged, which whoever loads them will say."""
    try:
        trained = directory.weights_step() == run.config.training.steps
    except RunError:
        return False
    return trained and _is_judged(directory, run, evaluation_seed)


def _is_judged(directory: RunDirectory, run: ExperimentRun, evaluation_seed: int) -> bool:
    """Whether the evaluation in a directory is the experiment's: `statetrack evaluate` may have written another."""
    try:
        evaluation = directory.read_evaluation()
    except RunError:  # damaged, and nothing is lost with it
        return False
    judged = {int(length): count for length, count in evaluation.get("sequences", {}).items()}
    return (
        set(run.lengths) <= judged.keys() <= {*run.lengths, *run.winner_lengths}
        and all(count == (run.sequences or default_sequences(length)) for length, count in judged.items())
        and evaluation.get("seed") == evaluation_seed
        and evaluation.get("task") == get_task(run.judged_task or run.config.task).name
        and evaluation.get("whole", run.whole) == run.whole  # files of before it was written down are the grid's
    )


def _holds(directory: RunDirectory, run: ExperimentRun) -> bool:
    """Whether a run directory is that of the run, as far as it has come."""
    try:
        return directory.exists() and directory.read_config() == run.config
    except ValueError:
        return False


@contextmanager
def _signals_kept_from_workers() -> Iterator[None]:
    """Processes that are started inside never get the signals that are for this one, not even while they start.

    Ctrl-C reaches the whole process group, and SLURM may send every process of a job the SIGUSR2 that announces its
    end. Only this process acts on them, and tells the workers through `stop`.
    """
    if not hasattr(signal, "pthread_sigmask"):  # on Windows, where workers ignore ctrl-C once they have started
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGUSR2})  # which processes inherit
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_events: Queue[RunEvent]
_stop: Event
_device: str


def _start_worker(events: Queue[RunEvent], stop: Event, places: Queue[str], parent: int) -> None:
    global _events, _stop, _device
    _events, _stop, _device = events, stop, places.get()
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()


def _die_with(parent: int) -> None:
    """Ends this worker when its parent is gone, killed before it could say `stop`."""
    while os.getppid() == parent:
        threading.Event().wait(1)
    os._exit(1)


def _groups(runs: Sequence[ExperimentRun], most: int) -> list[list[int]]:
    """The indices of the runs, those side by side that can be trained together, at most so many in a group."""
    groups: list[list[int]] = []
    for index, run in enumerate(runs):
        last = groups[-1] if groups else []
        if last and len(last) < most and why_apart([*(runs[i].config for i in last), run.config]) is None:
            last.append(index)
        else:
            groups.append([index])
    return groups


def _run(
    indices: Sequence[int], runs: Sequence[ExperimentRun], paths: Sequence[Path], evaluation_seed: int
) -> list[Record | None]:
    """Trains runs together and judges them one by one; None for those that were stopped or are another process's."""
    records: dict[int, Record | None] = {}
    if _stop.is_set():  # it waited in the queue of this worker, where nobody could cancel it
        return [None] * len(indices)
    with ExitStack() as claims:
        group: list[_Job] = []
        for index, run, path in zip(indices, runs, paths, strict=True):
            if not claims.enter_context(_claim(path)):
                continue
            directory = _directory(run, path)
            if (reason := directory.read_failure()) is not None:
                records[index] = record_of_failure(directory, reason, explanation=run.explanation)
            elif _is_done(directory, run, evaluation_seed):  # what training would go on from may be gone by then
                records[index] = record_of_run(directory, explanation=run.explanation)
            else:
                group.append(_Job(index, run, directory))
        for job, outcome in zip(group, _train(group), strict=True):
            records[job.index] = _judge(job, outcome, evaluation_seed)
    return [records.get(index) for index in indices]


@dataclass(frozen=True)
class _Job:
    """A run, its index in the experiment, and its directory."""

    index: int
    run: ExperimentRun
    directory: RunDirectory

    def failed(self, error: Exception) -> Record:
        """The record of the run, which is given up because of the error."""
        reason = str(error)
        if not isinstance(error, (TrainingError, RunError)):
            reason = f"{type(error).__name__}: {' '.join(reason.split())}"
        if not isinstance(error, RunError):  # of damaged files, which are seen each time until they are restored
            text = "".join(traceback.format_exception(error))
            self.directory.write_failure(reason, text, run_origin(str(_device)))
        return record_of_failure(self.directory, reason, explanation=self.run.explanation)


@contextmanager
def _claim(path: Path) -> Iterator[bool]:
    """Keeps a run to this process; False if it is another's."""
    locks = path.parent / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    lock = FileLock(locks / path.name, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _train(group: Sequence[_Job]) -> Sequence[TrainingResult | Exception]:
    """Trains runs together: for each its result, or why it broke down.

    Raises:
        OSError, AcceleratorError: what is no fault of the runs.
    """
    if not group:
        return []
    try:
        return train_together(
            [job.run.config for job in group],
            [job.directory for job in group],
            device=_device,
            on_progress=lambda run, progress: _events.put(RunEvent(group[run].index, progress=progress)),
            should_stop=_stop.is_set,
        )
    except Exception as error:
        if _is_nobodys_fault(error) or not all(job.directory.exists() for job in group):
            raise
        if len(group) == 1:
            return [error]
    # Alone it shows whose fault it is, or that together they only were too many.
    return [outcome for job in group for outcome in _train([job])]


def _is_nobodys_fault(error: Exception) -> bool:
    """Whether an error says nothing of the run that met it: a full disk, or a GPU that needs a new process."""
    return isinstance(error, (OSError, torch.AcceleratorError))


def _directory(run: ExperimentRun, path: Path) -> RunDirectory:
    """The directory of a run, empty if another run was in it."""
    directory = RunDirectory(path)
    if directory.exists() and not _holds(directory, run):
        shutil.rmtree(path)
    return directory


def _judge(job: _Job, outcome: TrainingResult | Exception, evaluation_seed: int) -> Record | None:
    """The record of a run that was trained, evaluated unless it has been; None if it was stopped."""
    if isinstance(outcome, Exception):
        return job.failed(outcome)
    if outcome.step < job.run.config.training.steps:
        return None
    try:
        if not _is_judged(job.directory, job.run, evaluation_seed):
            _evaluate(job, outcome.model, evaluation_seed)
        return record_of_run(job.directory, explanation=job.run.explanation)
    except _Stopped:
        return None
    except Exception as error:
        if _is_nobodys_fault(error):
            raise
        return job.failed(error)


def _evaluate(job: _Job, model: LanguageModel, evaluation_seed: int) -> None:
    run, task = job.run, get_task(job.run.judged_task or job.run.config.task)

    def on_progress(done: int, total: int) -> None:
        if _stop.is_set():
            raise _Stopped
        _events.put(RunEvent(job.index, evaluated=done / total))

    def judge(lengths: tuple[int, ...]) -> list[Accuracy]:
        return evaluate(
            model,
            task,
            lengths,
            seed=evaluation_seed,
            sequences=run.sequences,
            whole=run.whole,
            device=_device,
            on_progress=on_progress,
        )

    results = judge(run.lengths)
    if run.winner_lengths and solved({result.length: result.accuracy for result in results}):
        results += judge(run.winner_lengths)
    data = evaluation_data(results, task, evaluation_seed, whole=run.whole)
    job.directory.write_evaluation(data | {"origin": run_origin(str(_device))})


class _Stopped(Exception):  # noqa: N818 - not an error
    """Leaves an evaluation that was told to stop."""
