"""The command `statetrack pretrain`."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    from statetrack.pretraining.config import PretrainConfig


@dataclass(kw_only=True)
class Pretrain:
    """Pre-train a language model on prepared text, on one process or on all that torchrun has started.

    The same command again goes on from the last checkpoint, on any number of processes.

    Attributes:
        config: a TOML file, as docs/pretrain.md explains it; without one the run in --out goes on.
        out: the run directory to make, or to go on with.
        data: the prepared text, in place of data.directory.
        set: a value of the config, such as training.steps=100; may be given several times.
        device: cpu or cuda; if left out, cuda where there is one.
        plan: say what the run needs of memory and time on which cards, and train nothing.
    """

    config: Annotated[Path | None, tyro.conf.Positional] = None
    out: Path = Path("runs/pretrain")
    data: Path | None = None
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    device: str | None = None
    plan: bool = False

    def __call__(self) -> int:
        from statetrack.cli import stop_on_signal

        return run_command(self, stop_on_signal)


def run_command(command: Pretrain, stop_on_signal: Callable[[], AbstractContextManager[Callable[[], bool]]]) -> int:
    """Does it, and says what went wrong once, whatever the number of processes."""
    from statetrack.data import read_manifest
    from statetrack.plain import to_data
    from statetrack.pretraining.checkpoints import CheckpointError
    from statetrack.pretraining.config import config_of, data_table, read_tables
    from statetrack.pretraining.loop import pretrain
    from statetrack.pretraining.processes import SharedError, processes
    from statetrack.pretraining.run import PretrainRun
    from statetrack.progress import pretraining_progress
    from statetrack.training import TrainingError

    def read() -> tuple[PretrainRun, PretrainConfig]:
        run = PretrainRun(command.out)
        if command.config is None:
            tables = read_tables(to_data(run.read_config()), command.set)
        else:
            tables = read_tables(command.config, command.set)
        if command.data is not None:
            tables.setdefault("data", {})["directory"] = str(command.data)
        if isinstance(place := tables.get("data", {}).get("directory"), str):
            tables["data"]["directory"] = str(Path(place))
        return run, config_of(tables, read_manifest(data_table(tables).directory)["vocab_size"])

    if command.plan:
        return _plan(read()[1])
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    parent = os.getppid()
    launched = "TORCHELASTIC_RUN_ID" in os.environ
    started = False
    ending = ends_if_stuck(command.out) if several and launched else nullcontext()
    with stop_on_signal() as stopping, ending:

        def should_stop() -> bool:
            # torchrun that is killed on the spot can't end its processes: they would go on unseen.
            return stopping() or (launched and os.getppid() != parent)

        try:
            with processes(command.device) as own:
                run, config = own.together(read)
                started = True
                with pretraining_progress(config, own.is_first) as (show, say):
                    result = pretrain(config, run, own, on_progress=show, on_message=say, should_stop=should_stop)
                first = own.is_first
        except (TrainingError, CheckpointError, RuntimeError, OSError) as error:
            return _failed(error, command.out, several, started)
        except ValueError as error:
            if several and started and not isinstance(error, SharedError):
                return _failed(error, command.out, several, started)
            # All processes have it alike.
            if int(os.environ.get("RANK", "0")) == 0:
                print(f"statetrack: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
    again = f"statetrack pretrain --out {command.out}"
    if result.step < config.training.steps:
        if first:
            print(
                f"interrupted at step {result.step} of {config.training.steps}, saved in {command.out}. To go on, "
                f"repeat the command, or: {again}",
                file=sys.stderr,
            )
        return 130
    if first:
        print(
            f"trained {result.step} steps in {result.seconds:.1f} s, saved in {command.out}\n"
            f"next: statetrack generate {command.out} --prompt ..."
        )
    return 0


# torchrun kills on the spot what is there 30 seconds after SIGTERM.
_SECONDS_TO_END = 25.0


@contextmanager
def ends_if_stuck(out: Path, seconds: float = _SECONDS_TO_END) -> Iterator[None]:
    """Inside, a process that is still there `seconds` after SIGTERM says so once for all of the run and ends, status 1.

    When a process is killed, the kernels of the others wait for it on their GPUs without end. Python then waits for the
    GPU, and neither its signal handler nor an error of a connection is ever reached; torchrun would kill such a process
    without a word. To be used in the main thread, where SIGTERM has a handler.

    Args:
        out: the run directory.
        seconds: how long a step and a checkpoint may take.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # The number of a signal is written by the interpreter's handler in C, also while Python code waits.
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    ended = threading.Event()

    def watch() -> None:
        while (number := os.read(reader, 1)) and number[0] != signal.SIGTERM:
            pass
        os.close(reader)
        if number and not ended.wait(seconds):
            text = (
                f"told to end, this process could not do so within {seconds:g} seconds; most likely another process "
                "has ended, for which it waits; the same command goes on from the last checkpoint"
            )
            _failed(RuntimeError(text), out, True, True)

    threading.Thread(target=watch, daemon=True, name="ends_if_stuck").start()
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(before)
        os.close(writer)


_PLAN_WIDTH = 160


def _plan(config: PretrainConfig) -> int:
    from rich.console import Console

    from statetrack.pretraining.plan import plan

    console = Console()
    # Numbers are worth more than the frame: a narrower table would cut them off.
    Console(width=max(console.width, _PLAN_WIDTH)).print(
        plan(
            config.model,
            sequence_length=config.data.sequence_length,
            micro_batch_size=config.execution.micro_batch_size or config.data.batch_size,
            optimizer=config.optimizer,
            precision=config.training.precision,
            checkpointing=config.execution.activation_checkpointing,
            parallelism=config.execution.parallelism,
            reshard_after_forward=config.execution.reshard_after_forward,
            batch_size=config.data.batch_size,
            reduce_every_micro_batch=config.execution.reduce_every_micro_batch,
        )
    )
    return 0


def _failed(error: BaseException, out: Path, several: bool, started: bool) -> int:
    """Says why a run has ended, and ends this process if others may wait for it."""
    from statetrack.pretraining.processes import message_of

    text = message_of(error)
    if not several:
        print(f"statetrack: {text}", file=sys.stderr)
        return 1
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "") + os.environ.get("MASTER_PORT", "")
    marker = out / f".ended-{run_id}-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    lost = any(word in text.lower() for word in ("connection", "gloo", "nccl", "socket", "timed out", "peer"))
    if lost:  # the one with the reason comes first
        time.sleep(1)
        text = (
            "another process of this run has ended, so this one can't go on; the same command goes on from the last "
            "checkpoint"
        )
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        pass
    except OSError:
        print(f"statetrack: {text}", file=sys.stderr)
    else:
        print(f"statetrack: {text}", file=sys.stderr)
    sys.stderr.flush()
    sys.stdout.flush()
    # Threads that write a checkpoint wait for the others; they would keep this process from ending.
    os._exit(1)
