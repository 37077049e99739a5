"""What a person sees while something long is going on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from statetrack.config import RunConfig
from statetrack.training import Progress as TrainingProgress

if TYPE_CHECKING:  # PyTorch's engine for many processes takes a while to import
    from statetrack.pretraining.config import PretrainConfig
    from statetrack.pretraining.loop import PretrainProgress


def describe(progress: TrainingProgress) -> str:
    """Step, loss, accuracy and speed of a training run, in a line."""
    return (
        f"step {progress.step:>{len(str(progress.steps))}}/{progress.steps}  loss {progress.loss:.4f}  "
        f"accuracy {progress.accuracy:.3f}  {progress.tokens_per_second / 1000:,.0f}k tokens/s"
    )


@contextmanager
def training_progress(config: RunConfig) -> Iterator[Callable[[TrainingProgress], None]]:
    """Shows one run on standard error: a bar with loss, accuracy, speed, time left; without a terminal, ten lines."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        bar = bars.add_task(config.task, total=config.training.steps)
        shown = 0

        def show(progress: TrainingProgress) -> None:
            nonlocal shown
            bars.update(bar, completed=progress.step, description=f"{config.task}  {describe(progress)}")
            if not console.is_terminal and (tenth := 10 * progress.step // progress.steps) > shown:
                shown = tenth
                console.print(f"{describe(progress)}  {progress.seconds_left:.0f} s left", highlight=False)

        yield show


@contextmanager
def pretraining_progress(
    config: PretrainConfig, shown: bool
) -> Iterator[tuple[Callable[[PretrainProgress], None], Callable[[str], None]]]:
    """Shows a pre-training run on standard error: a bar where there is a terminal, else lines; and messages.

    Args:
        config: the run's.
        shown: False in all processes but one.
    """
    console = Console(stderr=True, quiet=not shown)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal)) as bars:
        bar = bars.add_task(config.model.mixer_name, total=config.training.steps)

        def show(progress: PretrainProgress) -> None:
            rate = f"{progress.tokens_per_second:,.0f} tokens/s"
            line = f"step {progress.step}/{progress.steps}  loss {progress.loss:.4f}  {rate}"
            if progress.mfu is not None:
                line += f"  MFU {progress.mfu:.1%}"
            bars.update(bar, completed=progress.step, description=line)
            if not console.is_terminal:
                console.print(f"{line}  {progress.seconds_left:,.0f} s left", highlight=False, soft_wrap=True)

        yield show, lambda text: console.print(text, highlight=False, soft_wrap=True)


@contextmanager
def evaluation_progress() -> Iterator[Callable[[int, int], None]]:
    """Shows the share of tokens read, on standard error."""
    console = Console(stderr=True)
    columns = (TextColumn("evaluating"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), TextColumn("left"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task("evaluating", total=None)
        yield lambda done, total: bars.update(bar, completed=done, total=total)
