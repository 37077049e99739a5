"""Training: task + model -> checkpoints and metrics; resumable at any step, the same loop on CPU and GPU."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from statetrack import seeds
from statetrack.config import RunConfig
from statetrack.model import LanguageModel, check_backends
from statetrack.plain import difference
from statetrack.precision import check_device
from statetrack.runs import RunDirectory, RunError, TrainingError, load_weights
from statetrack.tasks import get_task
from statetrack.training_step import TrainingStep, fitting_lengths, learning_rate_at, make_optimizer


@dataclass(frozen=True)
class Progress:
    """One line of metrics.

    Attributes:
        step: optimizer steps done.
        steps: optimizer steps in all.
        loss: of this step's batch: cross-entropy in nats for each label, plus the z-loss where there is one.
        accuracy: share of this step's labels that the model got right.
        learning_rate: of this step.
        tokens_per_second: since training started or went on.
        seconds: of training so far, those before an interruption included; of runs that are trained together or in
            turn, each has its share of the time.
        together: how many runs share the time.
    """

    step: int
    steps: int
    loss: float
    accuracy: float
    learning_rate: float
    tokens_per_second: float
    seconds: float
    together: int = 1

    @property
    def seconds_left(self) -> float:
        return self.together * self.seconds / self.step * (self.steps - self.step)


@dataclass(frozen=True)
class TrainingResult:
    """What `train` returns.

    Attributes:
        model: the trained model, in evaluation mode.
        step: optimizer steps done; fewer than the config's if it was told to stop.
        seconds: of training, those before an interruption included; its share where several runs shared the time.
    """

    model: LanguageModel
    step: int
    seconds: float


class SharedTime:
    """A clock that those who use a device at the same time have in common: it runs slower the more of them there are.

    What passes on it while somebody uses the device is their share of the time.
    """

    def __init__(self) -> None:
        self.users = 0
        self._stopped = False
        self._now, self._read = 0.0, time.perf_counter()

    def __call__(self) -> float:
        """Seconds since some moment."""
        read = time.perf_counter()
        if not self._stopped:
            self._now += (read - self._read) / max(self.users, 1)
        self._read = read
        return self._now

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """One user more inside."""
        self()
        self.users += 1
        try:
            yield
        finally:
            self()
            self.users -= 1

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """What takes place inside takes no time."""
        self()
        self._stopped = True
        try:
            yield
        finally:
            self()
            self._stopped = False


def train(
    config: RunConfig,
    directory: RunDirectory | None = None,
    *,
    device: torch.device | str = "cpu",
    on_progress: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> TrainingResult:
    """Trains a model, or goes on from the directory's last checkpoint.

    The data of a step depends on the seed and the step alone, so that a run that was interrupted, even by kill -9,
    ends bit for bit where an uninterrupted one does, on the same machine with the same number of threads.

    Args:
        config: what to train.
        directory: where checkpoints and metrics go; None keeps everything in memory.
        device: where to train. On a GPU the steps are replayed from CUDA graphs.
        on_progress: called every `log_every` steps.
        should_stop: asked after every step; on True a checkpoint is written and `train` returns.

    Raises:
        RunError: if the directory holds another run.
        ValueError: if the task has no sequences of the lengths asked for, or the device has not the precision or the
            backend that is asked for.
        TrainingError: if the loss is no longer finite.
        OSError: if a checkpoint can't be written; the last one is intact.
    """
    (outcome,) = train_together(
        [config],
        [directory],
        device=device,
        on_progress=lambda _, progress: on_progress(progress),
        should_stop=should_stop,
    )
    if isinstance(outcome, TrainingError):
        raise outcome
    return outcome


def train_together(
    configs: Sequence[RunConfig],
    directories: Sequence[RunDirectory | None] | None = None,
    *,
    device: torch.device | str = "cpu",
    on_progress: Callable[[int, Progress], None] = lambda run, progress: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[TrainingResult | TrainingError]:
    """Trains runs that differ in seed and learning rate alone, as one model, in less time than one after the other.

    Each is trained as `train` would train it, to float rounding: on its own data, with its own gradient clipping, into
    its own directory. Runs that have got to different steps go on one group after the other.

    Args:
        configs: what to train.
        directories: where checkpoints and metrics go, one for each; None keeps everything in memory.
        device: as of `train`.
        on_progress: called with the index of a run every `log_every` steps.
        should_stop: asked after every step; on True checkpoints are written and this returns.

    Returns:
        For each run its result, or the error that `train` would raise when its loss is no longer finite; the others go
        on without it.

    Raises:
        RunError, OSError: as `train`.
        ValueError: as `train`, and for configs that can't be trained together.
    """
    steps = training_steps(configs, directories, device=device, on_progress=on_progress, should_stop=should_stop)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def training_steps(
    configs: Sequence[RunConfig],
    directories: Sequence[RunDirectory | None] | None = None,
    *,
    device: torch.device | str = "cpu",
    on_progress: Callable[[int, Progress], None] = lambda run, progress: None,
    should_stop: Callable[[], bool] = lambda: False,
    shared: SharedTime | None = None,
) -> Generator[None, None, list[TrainingResult | TrainingError]]:
    """`train_together`, which it returns the results of, a step at a time.

    On a GPU a step has been launched when it yields, and the steps of several such generators, advanced in turn, are
    computed side by side: one of a small model leaves most of a GPU idle.

    Args:
        configs, directories, device, on_progress, should_stop: as of `train_together`.
        shared: the clock of those who take turns; None for who has the device alone.

    Raises:
        RunError, OSError, ValueError: as `train_together`, at the first step or at a later one.
    """
    if (reason := why_apart(configs)) is not None:
        raise ValueError(reason)
    fitting_lengths(get_task(configs[0].task), configs[0].training)
    directories = directories or [None] * len(configs)
    shared = shared or SharedTime()
    with shared.stopped():  # nobody learns meanwhile
        runs = [_Run(config, directory, device, shared) for config, directory in zip(configs, directories, strict=True)]
    for start in sorted({run.step for run in runs}):
        members = [index for index, run in enumerate(runs) if run.step == start]
        with shared.in_use():
            yield from _steps(
                [runs[i] for i in members], lambda i, progress, of=members: on_progress(of[i], progress), should_stop
            )
    return [run.outcome() for run in runs]


def why_apart(configs: Sequence[RunConfig]) -> str | None:
    """Why runs can't be trained together, in a sentence; None if they can."""
    if not configs:
        return "there must be at least one run to train"
    first = configs[0]
    if len(configs) > 1 and not all(mixer.vmaps for mixer in first.model.mixer_pattern):
        return f"runs of {first.model.mixer_name} can't be trained together; train them one after the other"
    for config in configs[1:]:
        training = replace(config.training, seed=first.training.seed, learning_rate=first.training.learning_rate)
        if (other := replace(config, training=training)) != first:
            return (
                "runs that are trained together may differ in seed and learning rate alone, not in more "
                f"({difference(first, other)})"
            )
    return None


class _Run:
    """One run: its model, its optimizer, and what is in its directory.

    Attributes:
        step: optimizer steps done.
        failure: why it can't go on; None while it can.
    """

    def __init__(
        self, config: RunConfig, directory: RunDirectory | None, device: torch.device | str, shared: SharedTime
    ) -> None:
        self.config, self.directory, self._shared = config, directory, shared
        torch.manual_seed(seeds.number("initial weights", config.training.seed))
        self.model = LanguageModel(config.model).to(device)
        check_device(config.training.precision, self.model.embedding.weight.device)
        self.optimizer = make_optimizer(self.model, config.training)
        self.step = 0
        self.failure: TrainingError | None = None
        self._seconds_before = 0.0
        if directory is not None:
            check_backends(self.model)  # before there is a directory of a run that can't be
            _open(directory, config)
            if (checkpoint := directory.load_checkpoint()) is not None:
                weights, moments, progress = checkpoint
                load_weights(self.model, weights, directory.state_file)
                _load_optimizer(self.optimizer, self.model, moments)
                self.step, self._seconds_before = int(progress["step"]), float(progress["seconds"])
            directory.truncate_metrics(self.step)
        # A process killed between the two files of a checkpoint leaves weights older than the training state.
        self._saved = self.step if directory is None or directory.weights_step() == self.step else None
        self.begin(1)

    def begin(self, together: int) -> None:
        """Starts the clocks, which run for so many runs at once."""
        self.model.train()
        self._began, self._share_began = time.perf_counter(), self._shared()
        self._tokens, self._together = 0, together

    def seconds(self) -> float:
        return self._seconds_before + (self._shared() - self._share_began) / self._together

    def count(self, tokens: int) -> None:
        """One more step is done, on so many tokens."""
        self.step += 1
        self._tokens += tokens

    def report(self, loss: float, correct: float) -> Progress | None:
        """A line of metrics; None if the loss is no longer finite, which ends the run."""
        options = self.config.training
        if not math.isfinite(loss):
            self.failure = TrainingError(
                f"the loss became {loss} at step {self.step} of {options.steps}; "
                f"a learning rate below {options.learning_rate:g} or a stricter gradient clip may help"
            )
            return None
        rate = self._tokens / (time.perf_counter() - self._began)
        progress = Progress(
            self.step,
            options.steps,
            loss,
            correct,
            learning_rate_at(self.step - 1, options),
            round(rate, 1),
            round(self.seconds(), 4),
            self._together * self._shared.users,
        )
        if self.directory is not None:
            self.directory.append_metrics({k: v for k, v in vars(progress).items() if k != "together"})
        return progress

    def checkpoint(self) -> None:
        """Writes a checkpoint, unless there is one of this step or the run has failed."""
        if self.failure is None and self.directory is not None and self._saved != self.step:
            steps = self.config.training.steps
            progress = {"step": str(self.step), "steps": str(steps), "seconds": repr(self.seconds())}
            try:
                self.directory.save_checkpoint(self.model, _optimizer_tensors(self.optimizer, self.model), progress)
            except TrainingError as error:
                self.failure = error
        self._saved = self.step

    def outcome(self) -> TrainingResult | TrainingError:
        return self.failure or TrainingResult(self.model.eval(), self.step, self._seconds_before)

    def end(self) -> None:
        """Writes the last checkpoint and stops the clock."""
        self.checkpoint()
        self._seconds_before = self.seconds()


def _steps(
    runs: Sequence[_Run], on_progress: Callable[[int, Progress], None], should_stop: Callable[[], bool]
) -> Iterator[None]:
    """Trains runs that have got to the same step; yields after each."""
    options = runs[0].config.training
    on_gpu = runs[0].model.embedding.weight.device.type == "cuda"
    take_step = TrainingStep(
        [run.config for run in runs], [run.model for run in runs], [run.optimizer for run in runs], fixed=on_gpu
    )
    for run in runs:
        run.begin(len(runs))
    for step in range(runs[0].step, options.steps):
        with take_step.turn():
            losses, correct = take_step(step)
            for run, length in zip(runs, take_step.lengths(step), strict=True):
                run.count(options.batch_size * length)
            last, checkpoint = step + 1 == options.steps, (step + 1) % options.checkpoint_every == 0
            # Reading the loss waits for a GPU, so it is read where it is needed.
            if (step + 1) % options.log_every == 0 or checkpoint or last:
                for index, values in enumerate(zip(losses.tolist(), correct.tolist(), strict=True)):
                    if runs[index].failure is None and (progress := runs[index].report(*values)) is not None:
                        on_progress(index, progress)
                if all(run.failure is not None for run in runs):
                    break
            stopping = should_stop() and not last
            if checkpoint or stopping:
                for run in runs:
                    run.checkpoint()
            if stopping:
                break
        yield
    with take_step.context():
        for run in runs:
            run.end()


def _optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state, named after the parameters: `embedding.weight.exp_avg` and so on."""
    return {f"{name}.{key}": value for name, p in model.named_parameters() for key, value in optimizer.state[p].items()}


def _load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        parameter, _, key = name.rpartition(".")
        optimizer.state[parameters[parameter]][key] = tensor.to(parameters[parameter].device)


def _open(directory: RunDirectory, config: RunConfig) -> None:
    if not directory.exists():
        directory.create(config)
        return
    there = directory.read_config()
    if there != config:
        raise RunError(
            f"{directory.path} holds another run ({difference(there, config)}); choose another directory, or repeat "
            "the options it was started with to go on"
        )
