"""The loop of pre-training: data + model -> checkpoints, metrics and a model, on one process or many.

Everything of a step depends on the config and the step alone, not on who computes which part of it. So a run that was
interrupted, even by kill -9, goes on as if nothing had happened; on another number of processes it does but for the
order of sums.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from statetrack import seeds
from statetrack.data import PackedBatch, PackedBatches, PackedTokens, check
from statetrack.model import LanguageModel
from statetrack.pretraining.config import PretrainConfig
from statetrack.pretraining.flops import peak_flops, training_flops_per_token
from statetrack.pretraining.guard import StepGuard, guarded_step
from statetrack.pretraining.held_out import HeldOut, batch_loss
from statetrack.pretraining.optimizers import build_optimizer, learning_rate_factor, set_learning_rate
from statetrack.pretraining.parallel import ParallelModel
from statetrack.pretraining.processes import Processes
from statetrack.pretraining.run import PretrainRun, export_model
from statetrack.pretraining.sinks import open_sinks
from statetrack.training import TrainingError

# Data up to this size is compared with its hashes before a run, which takes seconds.
_CHECKED_BYTES = 2**31


@dataclass(frozen=True)
class PretrainProgress:
    """One line of metrics.

    Attributes:
        step: optimizer steps done.
        steps: optimizer steps in all.
        tokens: tokens read so far, by all processes.
        loss: mean of the last step's batch, in nats a token.
        gradient_norm: of the last step, before clipping.
        learning_rate: of the last step.
        tokens_per_second: since the last line, of all processes together; evaluations and checkpoints aside.
        mfu: model FLOPs utilization since the last line (`flops.py`), a share; None where the peak is not known.
        memory_gb: the most that tensors on this process's GPU took so far, in 10^9 bytes; None on a CPU.
        skipped: steps left out so far.
        seconds: of training so far, those before an interruption included.
    """

    step: int
    steps: int
    tokens: int
    loss: float
    gradient_norm: float
    learning_rate: float
    tokens_per_second: float
    mfu: float | None
    memory_gb: float | None
    skipped: int
    seconds: float

    @property
    def seconds_left(self) -> float:
        return self.seconds / self.step * (self.steps - self.step)


@dataclass(frozen=True)
class PretrainResult:
    """What `pretrain` returns.

    Attributes:
        step: optimizer steps done; fewer than the config's if it was told to stop.
        seconds: of training, those before an interruption included.
        held_out: the loss on the held-out text of each domain, in nats a token; empty if it was told to stop.
    """

    step: int
    seconds: float
    held_out: dict[str, float]


def pretrain(
    config: PretrainConfig,
    run: PretrainRun,
    processes: Processes,
    *,
    on_progress: Callable[[PretrainProgress], None] = lambda progress: None,
    on_message: Callable[[str], None] = lambda text: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> PretrainResult:
    """Trains a language model, or goes on from the last checkpoint of the run.

    Args:
        config: what to train.
        run: where checkpoints, metrics and the model go.
        processes: this process among those of the run; all call this function alike.
        on_progress: told every `log_every` steps, in the first process.
        on_message: told what else happens, a sentence each, in the first process.
        should_stop: asked after every step; if any process says True, a checkpoint is written and all return.

    Raises:
        RunError: if the directory holds another run, or its checkpoint is damaged.
        DataError: if there is no such data.
        ValueError: if sizes don't go together.
        TrainingError: after `max_skipped` steps in a row without a usable loss or gradient.
        CheckpointError: if a checkpoint or the model can't be written; what was written before is intact.
    """
    place = {"rank": processes.rank, "world_size": processes.size}
    processes.together(lambda: check(config.data.directory, **place, max_bytes=_CHECKED_BYTES))
    training = processes.together(lambda: _Training(config, run, processes))
    try:
        return training.run_to_the_end(on_progress, on_message, should_stop)
    except Exception as error:
        # The end of the processes would cut off a checkpoint that is still being written. All of them give up at the
        # same step; another error leaves one alone, who must not wait for the rest.
        if isinstance(error, TrainingError) or processes.size == 1:
            with suppress(Exception):  # the error that ends the run is the one to tell
                run.checkpoints.wait()
        raise
    finally:
        run.unlock()


class _Training:
    """The parts of a run, made or restored, and the loop over them."""

    def __init__(self, config: PretrainConfig, run: PretrainRun, processes: Processes) -> None:
        self.config, self.run, self.processes = config, run, processes
        self.micro_batches = config.micro_batches(processes.size)
        self.tokens = PackedTokens(config.data.directory, "train")
        if self.tokens.vocab_size != config.model.vocab_size:
            raise ValueError(
                f"the model has {config.model.vocab_size} tokens and the data {self.tokens.vocab_size}; leave "
                "vocab_size out"
            )
        self.held_out = HeldOut(config, processes)
        self._batches(0)  # refuses data that is too short
        run.check(config)
        torch.manual_seed(int(seeds.generator("initial weights", config.training.seed).initial_seed()))
        model = LanguageModel(config.model)
        self.parallel = ParallelModel(model, processes, config.execution, config.training.precision)
        self.optimizer = build_optimizer(model, config.optimizer)
        self.guard = StepGuard(config.training, processes.device)
        self.flops = training_flops_per_token(config.model, config.data.sequence_length)
        peak = peak_flops(processes.device)
        self.peak = None if peak is None else peak * processes.size

    def run_to_the_end(
        self,
        on_progress: Callable[[PretrainProgress], None],
        on_message: Callable[[str], None],
        should_stop: Callable[[], bool],
    ) -> PretrainResult:
        config, processes, execution = self.config, self.processes, self.config.execution
        first, steps = processes.is_first, config.training.steps
        processes.together(lambda: self.run.begin(config) if first else None)
        step, seconds_before = self._restore()
        processes.together(lambda: self.run.truncate_metrics(step) if first else None)
        if first and step:
            on_message(f"going on from step {step} of {steps}")
        if first and not self.held_out.domains:
            on_message(
                f"no domain has a sequence of {config.data.sequence_length} tokens of held-out text: losses will be of "
                "training alone"
            )
        sinks = processes.together(lambda: open_sinks(self.run.path, config) if first else [])
        batches = iter(self._batches(step).loader(execution.num_workers, pin_memory=processes.device.type == "cuda"))
        clock, skipped = _Clock(seconds_before), -1
        evaluated: dict[str, float] = {}
        stopping = due = False
        while step < steps and not stopping:
            factor = learning_rate_factor(step, steps, config.schedule)
            loss, norm = self._step(next(batches), factor)
            step += 1
            clock.tokens += config.tokens_per_step
            last = step == steps
            # Reading a number waits for a GPU, so it is done where it is needed.
            if step % execution.log_every == 0 or last or processes.device.type == "cpu":
                now = int(self.guard.state["skipped"].item())
                if now > skipped >= 0 and first:
                    numbers = f"loss {loss.item():.4g}, gradient norm {norm.item():.4g}"
                    on_message(f"up to step {step}: {now - skipped} steps skipped; the last one has {numbers}")
                skipped = now
                self._give_up(step)
            if step % execution.log_every == 0 or last:
                progress = self._progress(step, factor, loss, norm, skipped, clock)
                if first:
                    self._record({"kind": "training", **vars(progress)}, step, sinks)
                    on_progress(progress)
            stopping = processes.any_wishes(should_stop()) and not last
            if last or (execution.evaluate_every and step % execution.evaluate_every == 0):
                with clock.stopped():
                    evaluated = self.held_out.losses(self.parallel)
                if first:
                    self._record({"kind": "held_out", "step": step, "loss": evaluated}, step, sinks)
                    texts = ", ".join(f"{domain} {value:.4f}" for domain, value in evaluated.items())
                    if texts:
                        on_message(f"step {step}: held-out loss {texts}")
            due = due or step % execution.checkpoint_every == 0
            # What led to steps that had to be skipped shall not take the place of what was before it.
            if last or stopping or (due and not self.guard.state["in_a_row"].item()):
                due = False
                with clock.stopped():
                    self.run.save(step, clock.seconds(), self._tensors(), config, processes)
        self.run.checkpoints.wait()
        if not stopping:
            weights = self.parallel.whole_weights()
            if first and (clock.tokens or not self.run.model_directory.exists()):
                export_model(config.model, weights, config.data.directory, self.run.model_directory)
        for sink in sinks:
            sink.close()
        return PretrainResult(step, clock.seconds(), evaluated)

    def _batches(self, start_step: int) -> PackedBatches:
        data = self.config.data
        return PackedBatches(
            self.tokens,
            sequence_length=data.sequence_length,
            batch_size=data.batch_size,
            seed=self.config.training.seed,
            start_step=start_step,
            rank=self.processes.rank,
            world_size=self.processes.size,
            shares=data.shares or None,
        )

    def _step(self, batch: PackedBatch, learning_rate_factor: float) -> tuple[Tensor, Tensor]:
        """One optimizer step; the loss of the whole batch and the norm of its gradient, on the device."""
        training = self.config.training
        total = torch.zeros((), device=self.processes.device)
        parts = batch.split(self.micro_batches)
        for index, part in enumerate(parts):
            with self.parallel.accumulating(last=index + 1 == len(parts)):
                loss = batch_loss(self.parallel, part, self.config, z_loss=training.z_loss) / len(parts)
                loss.backward()
            total += loss.detach()
        total = self.processes.mean(total)
        norm = self.parallel.clip_gradients(training.gradient_clip)
        set_learning_rate(self.optimizer, learning_rate_factor)
        guarded_step(self.optimizer, self.guard.accepts(total, norm))
        self.optimizer.zero_grad(set_to_none=True)
        return total, norm

    def _give_up(self, step: int) -> None:
        if (worst := int(self.guard.state["worst"].item())) >= self.config.training.max_skipped:
            raise TrainingError(
                f"{worst} steps in a row before step {step} of {self.config.training.steps} had no usable loss or "
                f"gradient; a learning rate below {self.config.optimizer.learning_rate:g} or a longer warm-up may help"
            )

    def _progress(
        self, step: int, factor: float, loss: Tensor, norm: Tensor, skipped: int, clock: _Clock
    ) -> PretrainProgress:
        cuda = self.processes.device.type == "cuda"
        loss_value, norm_value = loss.item(), norm.item()
        rate = clock.rate()
        return PretrainProgress(
            step=step,
            steps=self.config.training.steps,
            tokens=step * self.config.tokens_per_step,
            loss=loss_value,
            gradient_norm=norm_value,
            learning_rate=self.config.optimizer.learning_rate * factor,
            tokens_per_second=round(rate, 1),
            mfu=None if self.peak is None else round(self.flops * rate / self.peak, 4),
            memory_gb=round(torch.cuda.max_memory_allocated() / 1e9, 3) if cuda else None,
            skipped=skipped,
            seconds=round(clock.seconds(), 3),
        )

    def _record(self, record: dict[str, Any], step: int, sinks: list[Any]) -> None:
        self.run.append_metrics(record)
        for sink in sinks:
            sink.write(step, record)

    def _tensors(self) -> dict[str, Tensor]:
        """All tensors of a checkpoint by name."""
        parameters = self.parallel.parameters
        tensors: dict[str, Tensor] = {f"model.{name}": value.detach() for name, value in parameters.items()}
        for name, parameter in parameters.items():
            state = self.optimizer.state.get(parameter, {})
            tensors |= {f"optimizer.{name}.{key}": value for key, value in state.items()}
        return tensors | {f"guard.{name}": value for name, value in self.guard.state.items()}

    def _restore(self) -> tuple[int, float]:
        """Goes back to the last checkpoint; its step and the seconds of training until then, 0 if there is none."""
        run, processes = self.run, self.processes
        if not (steps := run.checkpoints.steps()):
            return 0, 0.0
        step = steps[-1]
        # Step by step together: who finds damage alone would leave the others waiting in what they read together.
        facts = processes.together(lambda: run.read_facts(step, self.config, processes))
        shapes = processes.together(lambda: run.checkpoints.shapes(step))
        for name, parameter in self.parallel.parameters.items():
            for full in [key for key in shapes if key.startswith(f"optimizer.{name}.")]:
                key = full.removeprefix(f"optimizer.{name}.")
                if "." in key:  # of a parameter whose name begins with this one's
                    continue
                like = shapes[full] == parameter.shape and bool(parameter.shape)
                empty = torch.zeros_like(parameter) if like else torch.zeros(shapes[full], device=parameter.device)
                self.optimizer.state[parameter][key] = empty.detach()
        processes.together(lambda: run.checkpoints.load(step, self._tensors(), processes))
        return step, float(facts["seconds"])


class _Clock:
    """Seconds and tokens of training, without what is done in between."""

    def __init__(self, seconds_before: float) -> None:
        self.tokens = 0
        self._began = time.perf_counter() - seconds_before
        self._since, self._counted, self._pause = time.perf_counter(), 0, 0.0

    def seconds(self) -> float:
        """Since training began, those before an interruption included."""
        return time.perf_counter() - self._began

    def rate(self) -> float:
        """Tokens a second since the last call."""
        now = time.perf_counter()
        rate = (self.tokens - self._counted) / max(now - self._since - self._pause, 1e-9)
        self._since, self._counted, self._pause = now, self.tokens, 0.0
        return rate

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """For what is no training."""
        before = time.perf_counter()
        yield
        self._pause += time.perf_counter() - before
