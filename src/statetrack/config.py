"""The configs of a run. As plain data (`plain`) they are the JSON of a run directory and the TOML of an experiment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from statetrack.fields import check_types
from statetrack.model import Mixers, ModelConfig
from statetrack.plain import from_data, read_mixer, read_mixers, to_data
from statetrack.precision import PrecisionOnTask, check_precision
from statetrack.tasks import Task, get_task

__all__ = ["RunConfig", "TrainingConfig", "from_data", "read_mixer", "read_mixers", "run_config", "to_data"]


MAX_BATCH = 2**31 - 1
"""Batches of more tokens are refused, before anything is as large or takes as long."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a model is trained on a task: AdamW on the cross-entropy of the labels, on data that is never repeated.

    Attributes:
        steps: optimizer steps.
        batch_size: sequences for each step.
        min_length: shortest training sequence, in tokens; every batch draws one length, uniformly among those that the
            task has.
        max_length: longest training sequence, in tokens.
        curriculum: share of the steps, at the start, in which lengths grow from min_length to max_length; 0 for none.
        curriculum_shape: how they grow. "linear": the longest length that is drawn rises along a line, and every batch
            draws from min_length up to it. "doubling": all batches of a stage have one length, which is min_length in
            the first and then twice that of the stage before, up to max_length in the last (or, of a task without
            sequences of such a length, the next shorter one that it has); stages take equal parts of the share, and
            the last one goes on to the end.
        curriculum_learning_rate_power: p >= 0; in a curriculum the learning rate is (min_length / n)^p of what it would
            be, where n is the longest length that may be drawn by then. Errors of a state add up over a sequence, so
            that long ones want smaller steps.
        last_label_only: learn from the last label of every sequence alone, as from one question at the end.
        part_labels: learn also from a label wherever a part of a sequence ends (`Task.with_parts`).
        learning_rate: peak learning rate.
        warmup: share of the steps, at the start, in which the learning rate rises linearly from 0.
        decay: share of the steps, at the end, in which it falls to 0; it is constant in between.
        decay_shape: how it falls: along half a cosine or a straight line.
        precision: of matrix products; "float32", or less: "bfloat16" is of activations too, by autocast; with "tf32",
            on an NVIDIA GPU, products see the first 11 bits of float32 numbers. Weights, the sum over the blocks,
            states, whatever decides on eigenvalues, the loss and the optimizer are float32 with all of them. It is of
            training alone; a trained model is evaluated in float32.
        z_loss: coefficient of the z-loss (arXiv 2204.02311), the mean square of the logarithm of the softmax's
            denominator. Cross-entropy stops caring once a model is confident; this term goes on to penalize any drift
            of the state that changes the logits, and so makes eigenvalues exact enough for sequences far longer than
            those of training.
        weight_decay: AdamW's, on the matrices of the mixers, the MLPs and the output layer; not on embeddings, vectors
            (norms, biases) and what decides on eigenvalues (`Mixer.eigenvalue_parameters`), which it would pull away
            from 1 and -1.
        beta1: AdamW's decay of the mean of the gradients.
        beta2: AdamW's decay of the mean of their squares.
        gradient_clip: largest norm of the gradient; 0 for no limit.
        seed: seed of the initial weights and of the data.
        checkpoint_every: steps from one checkpoint to the next; one is written at the end in any case.
        log_every: steps from one line of metrics to the next.
    """

    steps: int = 1000
    batch_size: int = 64
    min_length: int = 3
    max_length: int = 40
    curriculum: float = 0.0
    curriculum_shape: Literal["linear", "doubling"] = "linear"
    curriculum_learning_rate_power: float = 0.0
    last_label_only: bool = False
    part_labels: bool = False
    learning_rate: float = 1e-3
    warmup: float = 0.1
    decay: float = 0.9
    decay_shape: Literal["cosine", "linear"] = "cosine"
    precision: PrecisionOnTask = "float32"
    z_loss: float = 0.0
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    gradient_clip: float = 1.0
    seed: int = 0
    checkpoint_every: int = 500
    log_every: int = 10

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("steps", "batch_size", "min_length", "max_length", "checkpoint_every", "log_every"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.min_length > self.max_length:
            raise ValueError(f"min_length = {self.min_length} must not exceed max_length = {self.max_length}")
        if (tokens := self.batch_size * self.max_length) > MAX_BATCH:
            raise ValueError(
                f"a batch of batch_size = {self.batch_size} sequences of max_length = {self.max_length} would have "
                f"{tokens:,} tokens, more than {MAX_BATCH:,}"
            )
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate must be a positive number, got {self.learning_rate}")
        for name in ("warmup", "beta1", "beta2"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {value}")
        for name in ("curriculum_learning_rate_power", "z_loss", "weight_decay", "gradient_clip"):
            if not 0 <= (value := getattr(self, name)) < float("inf"):
                raise ValueError(f"{name} must be 0 or positive, got {value}")
        if not 0 <= self.decay <= 1 - self.warmup:
            raise ValueError(f"decay must lie in [0, 1 - warmup] = [0, {1 - self.warmup:g}], got {self.decay}")
        if not 0 <= self.curriculum <= 1:
            raise ValueError(f"curriculum must lie in [0, 1], got {self.curriculum}")
        if self.curriculum_shape not in ("linear", "doubling"):
            raise ValueError(f"curriculum_shape must be linear or doubling, got {self.curriculum_shape!r}")
        if not self.curriculum:
            for name, none in (("curriculum_shape", "linear"), ("curriculum_learning_rate_power", 0)):
                if (value := getattr(self, name)) != none:
                    raise ValueError(
                        f"{name} = {value!r} needs a curriculum; set curriculum to its share of the steps, such as 1"
                    )
        if self.last_label_only and self.part_labels:
            raise ValueError("last_label_only and part_labels exclude each other: choose one")
        if self.decay_shape not in ("cosine", "linear"):
            raise ValueError(f"decay_shape must be cosine or linear, got {self.decay_shape!r}")
        check_precision(self.precision, PrecisionOnTask)
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must lie in 0..2^63 - 1, got {self.seed}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All that determines a run: the task, the model and its training.

    Attributes:
        task: the task's name, as `statetrack tasks` lists them.
        model: the model; its vocabulary and outputs must be the task's.
        training: the training.

    Raises:
        ValueError: for an unknown task, sizes that are not the task's, and `part_labels` with a task that has no parts.
    """

    task: str
    model: ModelConfig
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        task = get_task(self.task)
        sizes = (self.model.vocab_size, self.model.output_size)
        if sizes != (task.vocab_size, task.num_labels):
            raise ValueError(
                f"the task {self.task} has {task.vocab_size} tokens and {task.num_labels} labels, "
                f"but the model was given {sizes[0]} and {sizes[1]}"
            )
        if self.training.part_labels:
            task.with_parts()


def run_config(task: str, mixer: Mixers, model: Mapping[str, Any], training: TrainingConfig) -> RunConfig:
    """A `RunConfig` whose model has the vocabulary and the outputs of its task.

    Args:
        task: the task's name.
        mixer: the token mixer, or the pattern of a hybrid.
        model: other fields of `ModelConfig`.
        training: the training.
    """
    found: Task = get_task(task)
    sizes = {"vocab_size": found.vocab_size, "output_size": found.num_labels}
    return RunConfig(task=task, model=from_data(ModelConfig, {**model, **sizes, "mixer": mixer}), training=training)
