"""Training: task + model -> checkpoints and metrics; resumable at any step, the same loop on CPU and GPU."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from statetrack import seeds
from statetrack.config import RunConfig, TrainingConfig
from statetrack.model import LanguageModel
from statetrack.plain import difference
from statetrack.runs import RunDirectory, RunError, load_weights
from statetrack.tasks import IGNORE, Task, get_task
from statetrack.weight_decay import by_weight_decay


class TrainingError(RuntimeError):
    """Training that can't go on, and why."""


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
        seconds: of training so far, those before an interruption included.
    """

    step: int
    steps: int
    loss: float
    accuracy: float
    learning_rate: float
    tokens_per_second: float
    seconds: float

    @property
    def seconds_left(self) -> float:
        return self.seconds / self.step * (self.steps - self.step)


@dataclass(frozen=True)
class TrainingResult:
    """What `train` returns.

    Attributes:
        model: the trained model, in evaluation mode.
        step: optimizer steps done; fewer than the config's if it was told to stop.
        seconds: of training, those before an interruption included.
    """

    model: LanguageModel
    step: int
    seconds: float


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
        device: where to train.
        on_progress: called every `log_every` steps.
        should_stop: asked after every step; on True a checkpoint is written and `train` returns.

    Raises:
        RunError: if the directory holds another run.
        ValueError: if the task has no sequences of the lengths asked for.
        TrainingError: if the loss is no longer finite.
        OSError: if a checkpoint can't be written; the last one is intact.
    """
    options, task = config.training, get_task(config.task)
    fitting = fitting_lengths(task, options)
    torch.manual_seed(int(seeds.generator("initial weights", options.seed).initial_seed()))
    model = LanguageModel(config.model).to(device)
    optimizer = _optimizer(model, options)
    start, seconds_before = 0, 0.0
    if directory is not None:
        _open(directory, config)
        if (checkpoint := directory.load_checkpoint()) is not None:
            weights, moments, progress = checkpoint
            load_weights(model, weights, directory.state_file)
            _load_optimizer(optimizer, model, moments)
            start, seconds_before = int(progress["step"]), float(progress["seconds"])
        directory.truncate_metrics(start)

    model.train()
    began = time.perf_counter()
    tokens, step = 0, start
    # A process killed between the two files of a checkpoint leaves weights that are older than the training state.
    saved = start if directory is None or directory.weights_step() == start else None

    def seconds() -> float:
        return seconds_before + time.perf_counter() - began

    def checkpoint_now() -> None:
        nonlocal saved
        if directory is not None and saved != step:
            progress = {"step": str(step), "steps": str(options.steps), "seconds": repr(seconds())}
            directory.save_checkpoint(model, _optimizer_tensors(optimizer, model), progress)
        saved = step

    while step < options.steps:
        learning_rate = learning_rate_at(step, options)
        batch = _batch(task, options, fitting, step, device)
        loss, correct = _loss(model, *batch, options.z_loss)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if options.gradient_clip:
            nn.utils.clip_grad_norm_(model.parameters(), options.gradient_clip)
        optimizer.step()
        step += 1
        tokens += batch[0].numel()
        last = step == options.steps
        # Reading the loss waits for a GPU, so it is read where it is needed.
        if step % options.log_every == 0 or step % options.checkpoint_every == 0 or last:
            if not math.isfinite(loss_value := loss.item()):
                raise TrainingError(
                    f"the loss became {loss_value} at step {step} of {options.steps}; "
                    f"a learning rate below {options.learning_rate:g} or a stricter gradient clip may help"
                )
            rate = tokens / (time.perf_counter() - began)
            progress = Progress(
                step, options.steps, loss_value, correct.item(), learning_rate, round(rate, 1), round(seconds(), 4)
            )
            if directory is not None:
                directory.append_metrics(vars(progress))
            on_progress(progress)
        stopping = should_stop() and not last
        if step % options.checkpoint_every == 0 or stopping:
            checkpoint_now()
        if stopping:
            break
    checkpoint_now()
    return TrainingResult(model.eval(), step, seconds())


def learning_rate_at(step: int, options: TrainingConfig) -> float:
    """The learning rate of optimizer step `step` (from 0): a linear rise, a constant part, a fall to 0."""
    warmup, decay = options.warmup * options.steps, options.decay * options.steps
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    left = min(1.0, (options.steps - step) / decay) if decay else 1.0
    fall = left if options.decay_shape == "linear" else (1 - math.cos(math.pi * left)) / 2
    return options.learning_rate * rise * fall


def fitting_lengths(task: Task, options: TrainingConfig) -> list[int]:
    """The lengths that training draws from, each as often as the others: those within its bounds that the task has.

    Raises:
        ValueError: if there are none.
    """
    fitting = [length for length in range(options.min_length, options.max_length + 1) if task.fits(length)]
    if not fitting:
        raise ValueError(
            f"the task {task.name} has no sequences of {options.min_length} to {options.max_length} tokens; "
            "choose another min_length and max_length"
        )
    return fitting


def _batch(
    task: Task, options: TrainingConfig, fitting: Sequence[int], step: int, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    lengths = seeds.generator("training length", options.seed, step)
    length = fitting[int(torch.randint(len(fitting), (), generator=lengths))]
    data = seeds.generator("training data", options.seed, step, device=device)
    ids, labels = task.sample(options.batch_size, length, data)
    if options.last_label_only:
        labels[:, :-1] = IGNORE
    return ids, labels


def _loss(model: LanguageModel, ids: Tensor, labels: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """The mean loss of the labels, and the share of them that is right."""
    logits, answers = model(ids).flatten(0, 1).float(), labels.flatten()
    asked = answers != IGNORE
    loss = F.cross_entropy(logits, answers, ignore_index=IGNORE)
    if z_loss:
        loss = loss + z_loss * (torch.logsumexp(logits, -1).square() * asked).sum() / asked.sum()
    correct = ((logits.detach().argmax(-1) == answers) & asked).sum() / asked.sum()
    return loss, correct


def _optimizer(model: LanguageModel, options: TrainingConfig) -> torch.optim.AdamW:
    decayed, kept = by_weight_decay(model)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": options.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=(options.beta1, options.beta2), fused=True)


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
