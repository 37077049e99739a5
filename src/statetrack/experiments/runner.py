"""Runs an experiment: every run in a worker process of one thread, as many at once as there are cores or GPUs."""

from __future__ import annotations

import multiprocessing
import os
import queue
import shutil
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from pathlib import Path

import torch

from statetrack.evaluation import Accuracy, evaluate, evaluation_data, solved
from statetrack.experiments.experiment import Experiment, ExperimentRun
from statetrack.machine import available_cores
from statetrack.records import record_of_failure, record_of_run
from statetrack.report import Record
from statetrack.runs import RunDirectory
from statetrack.tasks import get_task
from statetrack.training import Progress, TrainingError, train


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
    evaluation_seed: int = 0,
    on_event: Callable[[RunEvent], None] = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Record] | None:
    """Trains and evaluates every run, each in a directory of its own below `out`.

    Runs that are finished there already, with the same config, are not repeated; half-finished ones go on.

    Args:
        experiment: what to run.
        out: the directory of the experiment.
        workers: processes; None for one on each core, or one on each GPU.
        devices: where they run, such as ("cuda:0", "cuda:1"); the workers are shared out among them.
        evaluation_seed: seed of the sequences that the models are judged on.
        on_event: called in this process with news of the runs.
        should_stop: asked a few times a second; on True all runs write a checkpoint and stop.

    Returns:
        A record for each run, in the experiment's order, those that failed included; None if it was told to stop.
    """
    workers = workers or (available_cores() if list(devices) == ["cpu"] else len(devices))
    context = multiprocessing.get_context("spawn")
    events: Queue[RunEvent] = context.Queue()
    stop = context.Event()
    places: Queue[str] = context.Queue()
    for worker in range(workers):
        places.put(devices[worker % len(devices)])
    records: dict[int, Record] = {}

    def drain(timeout: float) -> None:
        try:
            event = events.get(timeout=timeout)
            while True:
                on_event(event)
                event = events.get_nowait()
        except queue.Empty:
            pass

    with ProcessPoolExecutor(workers, context, _start_worker, (events, stop, places, os.getpid())) as pool:
        pending: dict[Future[Record | None], int] = {}
        for index, run in enumerate(experiment.runs):
            pending[pool.submit(_run, index, run, out / run.name, evaluation_seed)] = index
        try:
            while pending and not should_stop():
                drain(timeout=0.1)
                for future in [future for future in pending if future.done()]:
                    index = pending.pop(future)
                    if (record := future.result()) is not None:
                        records[index] = record
                        on_event(RunEvent(index, record=record))
        finally:  # also when a run ended in an error: the others save what they have
            if pending:
                stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
    if pending:
        return None
    return [records[index] for index in sorted(records)]


def finished_record(run: ExperimentRun, path: Path) -> Record | None:
    """The record of a run that was trained and judged in the directory `path`; None if it was not, or not this run."""
    directory = RunDirectory(path)
    if not _holds(directory, run) or not directory.evaluation_file.exists():
        return None
    if directory.weights_step() != run.config.training.steps:
        return None
    return record_of_run(directory, explanation=run.explanation)


def _holds(directory: RunDirectory, run: ExperimentRun) -> bool:
    """Whether a run directory is that of the run, as far as it has come."""
    try:
        return directory.exists() and directory.read_config() == run.config
    except ValueError:
        return False


_events: Queue[RunEvent]
_stop: Event
_device: str


def _start_worker(events: Queue[RunEvent], stop: Event, places: Queue[str], parent: int) -> None:
    global _events, _stop, _device
    _events, _stop, _device = events, stop, places.get()
    torch.set_num_threads(1)
    # Ctrl-C reaches the whole process group; only the parent acts on it, and tells the workers through `stop`.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()


def _die_with(parent: int) -> None:
    """Ends this worker when its parent is gone, killed before it could say `stop`."""
    while os.getppid() == parent:
        threading.Event().wait(1)
    os._exit(1)


def _run(index: int, run: ExperimentRun, path: Path, evaluation_seed: int) -> Record | None:
    directory, config = RunDirectory(path), run.config
    if directory.exists() and not _holds(directory, run):
        shutil.rmtree(path)
    try:
        result = train(
            config,
            directory,
            device=_device,
            on_progress=lambda progress: _events.put(RunEvent(index, progress=progress)),
            should_stop=_stop.is_set,
        )
    except TrainingError as error:
        return record_of_failure(directory, str(error), explanation=run.explanation)
    if result.step < config.training.steps:
        return None
    if not directory.evaluation_file.exists():
        task = get_task(config.task)

        def judge(lengths: tuple[int, ...]) -> list[Accuracy]:
            def on_progress(done: int, total: int) -> None:
                if _stop.is_set():
                    raise _Stopped
                _events.put(RunEvent(index, evaluated=done / total))

            return evaluate(
                result.model,
                task,
                lengths,
                seed=evaluation_seed,
                sequences=run.sequences,
                whole=run.whole,
                device=_device,
                on_progress=on_progress,
            )

        try:
            results = judge(run.lengths)
            if run.winner_lengths and solved({result.length: result.accuracy for result in results}):
                results += judge(run.winner_lengths)
        except _Stopped:
            return None
        directory.write_evaluation(evaluation_data(results, task, evaluation_seed))
    return record_of_run(directory, explanation=run.explanation)


class _Stopped(Exception):  # noqa: N818 - not an error
    """Leaves an evaluation that was told to stop."""
