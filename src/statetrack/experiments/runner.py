"""Runs an experiment in worker processes of one thread, as many at once as there are cores or GPUs.

On a GPU, runs that differ in seed and learning rate alone are a group that is trained together, as one model
(`train_together`), and several groups of small models take their steps in turn (`training_steps`), which takes less
time than one after the other; on a CPU, where arithmetic and not launching it takes the time, one by one.

A run that breaks down is given up: its directory says why, and it is not tried again until `forget_failures`. Several
processes may work on one directory of runs, since each leaves alone what another is at.
"""

from __future__ import annotations

import inspect
import multiprocessing
import os
import queue
import shutil
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
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
from statetrack.training import (
    Progress,
    SharedTime,
    TrainingError,
    TrainingResult,
    training_steps,
    why_apart,
)

MOST_TOGETHER = 8
"""So many runs trained as one keep a GPU busy; more would only need more of its memory."""

MOST_IN_TURN = 4
"""So many groups in turn take three quarters of the time that they take one after the other, two in turn seven eighths
(`results/training/h100-in-turn.json`); more were not measured."""

MOST_ACTIVATIONS = 2**26
"""Groups take turns only while a step of all of them has so many activations at most: sequences x tokens x width x
layers. Larger ones have more to do at a time, and may have no room beside each other."""


@dataclass(frozen=True)
class RunEvent:
    """News of a run, for whoever shows the progress.

    Attributes:
        run: index of the run in the experiment.
        progress: while it trains.
        evaluated: while it is evaluated: the share that is done.
        record: when it is finished, and those that take turns with it.
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
    in_turn: int | None = None,
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
        in_turn: how many such groups take their steps in turn, at most, if they are small; None for `MOST_IN_TURN` on
            GPUs, fewer if some would have nothing to do, and one on CPUs.
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
    records = finished_records(experiment, out, range(len(experiment.runs)), evaluation_seed=evaluation_seed)
    for index, record in records.items():
        on_event(RunEvent(index, record=record))
    left = [index for index in range(len(experiment.runs)) if index not in records]
    if not left:  # said without the seconds that workers take to start
        return list(records.values())
    on_cpu = set(devices) == {"cpu"}
    workers = workers or (available_cores() if on_cpu else len(devices))
    if together is None:
        together = 1 if on_cpu else min(MOST_TOGETHER, -(-len(left) // workers))
    groups = _groups(experiment.runs, left, together)
    if in_turn is None:
        in_turn = 1 if on_cpu else min(MOST_IN_TURN, -(-len(groups) // workers))
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
            for lot in _lots(experiment.runs, groups, in_turn):
                jobs = [[_job(experiment, out, index) for index in group] for group in lot]
                pending[pool.submit(_run, jobs, evaluation_seed)] = [job.index for group in jobs for job in group]
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
            if _holds(directory, run) and (record := _record(directory, run, evaluation_seed)) is not None:
                records[index] = record
        except RunError:
            continue
    return records


def forget_failures(experiment: Experiment, out: Path) -> None:
    """Lets the runs below `out` that have failed go on, from their last checkpoints, at the next `run_experiment`."""
    for run in experiment.runs:
        RunDirectory(out / run.name).forget_failure()


def _record(directory: RunDirectory, run: ExperimentRun, evaluation_seed: int) -> Record | None:
    """The record of a run that was trained and judged, or given up; None for one that is to be done."""
    if (reason := directory.read_failure()) is not None:
        return record_of_failure(directory, reason, explanation=run.explanation)
    if _is_done(directory, run, evaluation_seed):  # what training would go on from may be gone by then
        return record_of_run(directory, explanation=run.explanation)
    return None


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


def _groups(runs: Sequence[ExperimentRun], indices: Iterable[int], most: int) -> list[list[int]]:
    """The indices, those side by side whose runs can be trained together, at most so many in a group."""
    groups: list[list[int]] = []
    for index in indices:
        last = groups[-1] if groups else []
        if last and len(last) < most and why_apart([runs[i].config for i in (*last, index)]) is None:
            last.append(index)
        else:
            groups.append([index])
    return groups


def _lots(runs: Sequence[ExperimentRun], groups: Sequence[list[int]], most: int) -> list[list[list[int]]]:
    """The groups, those side by side that are small enough to take turns, at most so many in a lot."""

    def activations(group: list[int]) -> int:
        config = runs[group[0]].config
        tokens = config.training.batch_size * config.training.max_length
        return len(group) * tokens * config.model.d_model * config.model.num_layers

    lots: list[list[list[int]]] = []
    for group in groups:
        last = lots[-1] if lots else []
        if last and len(last) < most and sum(map(activations, [*last, group])) <= MOST_ACTIVATIONS:
            last.append(group)
        else:
            lots.append([group])
    return lots


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


def _job(experiment: Experiment, out: Path, index: int) -> _Job:
    run = experiment.runs[index]
    return _Job(index, run, RunDirectory(out / run.name))


def _run(lot: Sequence[Sequence[_Job]], evaluation_seed: int) -> list[Record | None]:
    """Trains groups of runs in turn and judges each run; None for those that were stopped or are another process's."""
    records: dict[int, Record | None] = {job.index: None for group in lot for job in group}
    if _stop.is_set():  # it waited in the queue of this worker, where nobody could cancel it
        return list(records.values())
    with ExitStack() as claims:
        claimed = [[job for job in group if claims.enter_context(_claim(job.directory.path))] for group in lot]
        to_do = []
        for group in claimed:
            for job in group:
                if job.directory.exists() and not _holds(job.directory, job.run):
                    shutil.rmtree(job.directory.path)  # what another run has left
                records[job.index] = _record(job.directory, job.run, evaluation_seed)
            to_do.append([job for job in group if records[job.index] is None])
        for job, outcome in _train([group for group in to_do if group]):
            records[job.index] = _judge(job, outcome, evaluation_seed)
    return list(records.values())


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


_Outcome = TrainingResult | Exception


def _train(groups: Sequence[Sequence[_Job]]) -> list[tuple[_Job, _Outcome]]:
    """Trains groups of runs in turn: the runs, each with its result or why it broke down, without those not begun.

    Raises:
        OSError, AcceleratorError: what is no fault of the runs; those of other groups save what they have.
    """
    shared, stop = SharedTime(), threading.Event()
    in_turn = [(group, _steps(group, shared, stop)) for group in groups]
    outcomes: list[tuple[_Job, _Outcome]] = []
    alone: list[_Job] = []
    try:
        while in_turn:
            for group, steps in in_turn[:]:
                if _stop.is_set() and not _has_begun(steps):
                    in_turn.remove((group, steps))
                    continue
                try:
                    next(steps)
                except StopIteration as end:
                    outcomes += zip(group, end.value, strict=True)
                    in_turn.remove((group, steps))
                except Exception as error:
                    beside_others = len(groups) > 1 or len(group) > 1
                    no_room = beside_others and isinstance(error, torch.OutOfMemoryError)
                    begun = all(job.directory.exists() for job in group)
                    if _is_nobodys_fault(error) or not (begun or no_room):
                        raise
                    traceback.clear_frames(error.__traceback__)  # which hold a model and what it had in memory
                    in_turn.remove((group, steps))
                    if beside_others:  # alone it shows whose fault it is, or that together they only were too many
                        alone += group
                    else:
                        outcomes.append((group[0], error))
    finally:
        stop.set()
        for _, steps in in_turn:
            if _has_begun(steps):
                with suppress(Exception):  # such as the same full disk
                    deque(steps, maxlen=0)
    for job in alone:
        outcomes += _train([[job]])
    return outcomes


def _has_begun(steps: Generator[None, None, list[TrainingResult | TrainingError]]) -> bool:
    return inspect.getgeneratorstate(steps) != inspect.GEN_CREATED


def _steps(
    group: Sequence[_Job], shared: SharedTime, stop: threading.Event
) -> Generator[None, None, list[TrainingResult | TrainingError]]:
    """Trains a group, a step at a time."""
    return training_steps(
        [job.run.config for job in group],
        [job.directory for job in group],
        device=_device,
        on_progress=lambda run, progress: _events.put(RunEvent(group[run].index, progress=progress)),
        should_stop=lambda: _stop.is_set() or stop.is_set(),
        shared=shared,
    )


def _is_nobodys_fault(error: Exception) -> bool:
    """Whether an error says nothing of the run that met it: a full disk, or a GPU that needs a new process."""
    return isinstance(error, (OSError, torch.AcceleratorError))


def _judge(job: _Job, outcome: _Outcome, evaluation_seed: int) -> Record | None:
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
