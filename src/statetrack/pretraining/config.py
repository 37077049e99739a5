"""The config of a pre-training run: a TOML file, options on the command line laid over it, and the data's vocabulary.

[model]                          # a preset, or the fields of `ModelConfig`, or a preset with fields laid over it
preset = "deltanet-125m"
eigenvalue_range = [-1, 1]       # of every mixer that has one

[data]
directory = "data/mix"           # what `statetrack data prepare` has written
sequence_length = 2048
batch_size = 256                 # sequences of a step, of all processes together

[training]
steps = 20000
precision = "bfloat16"

[optimizer]                      # `OptimizerConfig`
[schedule]                       # `ScheduleConfig`
[execution]                      # how it is computed and watched: may change when a run goes on
[execution.logging]
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

from statetrack.files import read_toml
from statetrack.mixers.mixer import WidenedMixerConfig
from statetrack.model import ModelConfig
from statetrack.plain import from_data, to_data
from statetrack.precision import Precision, check_precision
from statetrack.pretraining.optimizers import OptimizerConfig, ScheduleConfig
from statetrack.pretraining.presets import preset
from statetrack.transition import EigenvalueRange

Table = TypeVar("Table")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a model is trained on.

    Attributes:
        directory: what `statetrack data prepare` has written.
        sequence_length: T, tokens of a sequence.
        batch_size: sequences of an optimizer step, of all processes together.
        shares: the share of the sequences that each domain gets, in any unit, such as {code = 2, prose = 1}; a domain
            with more than it has is repeated. Without any, all domains are read evenly.
        separate_documents: reset the state where a document begins within a sequence, so that no document sees another.
            Without it every sequence is one piece of text, which is faster on a GPU.
    """

    directory: str
    sequence_length: int = 2048
    batch_size: int = 32
    shares: dict[str, float] = field(default_factory=dict)
    separate_documents: bool = True

    def __post_init__(self) -> None:
        _at_least(self, 1, "sequence_length", "batch_size")
        if bad := [domain for domain, share in self.shares.items() if not 0 < share < float("inf")]:
            raise ValueError(f"the share of {bad[0]} must be a positive number, got {self.shares[bad[0]]}")


@dataclass(frozen=True, kw_only=True)
class PretrainingConfig:
    """How long, how precisely and how carefully a model is trained.

    Attributes:
        steps: optimizer steps.
        precision: "bfloat16": matrix products and activations, by autocast; weights, gradients across processes, the
            optimizer, states and whatever decides on eigenvalues are float32. "float32": all of it.
        gradient_clip: largest norm of the gradient; 0 for no limit.
        z_loss: coefficient of the z-loss (arXiv 2204.02311), the mean square of the logarithm of the softmax's
            denominator.
        spike_deviations: a step whose loss or gradient norm is so many standard deviations above the mean of the steps
            before it is skipped; 0 skips only steps with numbers that are not finite.
        spike_window: how many steps before it that are.
        max_skipped: end the run after so many skipped steps in a row.
        seed: of the initial weights and of the order of the data.
    """

    steps: int
    precision: Precision = "float32"
    gradient_clip: float = 1.0
    z_loss: float = 0.0
    spike_deviations: float = 6.0
    spike_window: int = 128
    max_skipped: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        _at_least(self, 1, "steps", "max_skipped")
        _at_least(self, 2, "spike_window")
        check_precision(self.precision)
        for name in ("gradient_clip", "z_loss", "spike_deviations"):
            if not 0 <= (value := getattr(self, name)) < float("inf"):
                raise ValueError(f"{name} must be 0 or positive, got {value}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must lie in 0..2^63 - 1, got {self.seed}")


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Where metrics go beside metrics.jsonl.

    Attributes:
        tensorboard: event files in the run directory; needs the package tensorboard.
        wandb: a project of Weights & Biases; needs the package wandb.
        trackio: a project of trackio; needs the package trackio.
    """

    tensorboard: bool = False
    wandb: str | None = None
    trackio: str | None = None


@dataclass(frozen=True, kw_only=True)
class ExecutionConfig:
    """How a run is computed and watched. None of it changes what is computed, but for rounding; a run may go on with
    other values.

    Attributes:
        parallelism: "fsdp", weights and optimizer sharded over the processes (FSDP2); "ddp", a copy in each; "none" for
            one process; "auto", none or fsdp by the number of processes.
        reshard_after_forward: with FSDP, free the gathered weights of each block after its forward pass, and gather
            them once more in the backward. Otherwise they stay, which takes 2 bytes a parameter of the model in bf16
            and 4 in float32, and half as much is gathered.
        micro_batch_size: sequences of a forward pass of a process; gradients are accumulated over the rest of its part
            of the batch. None for the whole part at once.
        reduce_every_micro_batch: with FSDP, sum the gradients over the processes after every micro-batch, of which each
            then keeps its part. Otherwise that is done once a step, until which each keeps all: 4 bytes a parameter.
        activation_checkpointing: compute the activations of every so manyth block again in the backward pass: 1 for all
            blocks, 0 for none.
        compile: compile each block by `torch.compile`.
        num_workers: processes that read batches; 0 for the training process itself.
        log_every: steps from one line of metrics to the next. Numbers on a GPU are read only then.
        evaluate_every: steps from one evaluation on held-out text to the next; 0 for one at the end alone.
        evaluation_sequences: held-out sequences of each domain, at most.
        checkpoint_every: steps from one checkpoint to the next; one is written at the end in any case.
        keep_checkpoints: the last so many are kept.
        logging: where metrics go beside metrics.jsonl.
    """

    parallelism: Literal["auto", "none", "ddp", "fsdp"] = "auto"
    reshard_after_forward: bool = False
    micro_batch_size: int | None = None
    reduce_every_micro_batch: bool = False
    activation_checkpointing: int = 0
    compile: bool = False
    num_workers: int = 0
    log_every: int = 10
    evaluate_every: int = 500
    evaluation_sequences: int = 64
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        if self.parallelism not in ("auto", "none", "ddp", "fsdp"):
            raise ValueError(f"parallelism must be auto, none, ddp or fsdp, got {self.parallelism!r}")
        _at_least(self, 0, "activation_checkpointing", "num_workers", "evaluate_every")
        _at_least(
            self, 1, "micro_batch_size", "log_every", "evaluation_sequences", "checkpoint_every", "keep_checkpoints"
        )


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """All of a pre-training run.

    Attributes:
        model: the model; its vocabulary is that of the data.
        data: what it is trained on.
        training: how long and how carefully.
        optimizer: AdamW or Muon.
        schedule: the learning rate over the steps.
        execution: how it is computed and watched.
    """

    model: ModelConfig
    data: DataConfig
    training: PretrainingConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)

    def __post_init__(self) -> None:
        if self.model.output_size not in (None, self.model.vocab_size):
            raise ValueError(
                f"a language model predicts its own tokens: leave output_size out, got {self.model.output_size} beside "
                f"{self.model.vocab_size} tokens"
            )

    @property
    def tokens_per_step(self) -> int:
        return self.data.batch_size * self.data.sequence_length

    def micro_batches(self, world_size: int) -> int:
        """How many forward passes a process does for a step.

        Raises:
            ValueError: if the batch can't be divided so.
        """
        size, batch = self.execution.micro_batch_size, self.data.batch_size
        unit = world_size * (size or 1)
        if batch % unit:
            parts = f"{world_size} processes" + (f" * micro_batch_size = {size}" if size else "")
            raise ValueError(f"batch_size = {batch} must be a multiple of {parts}")
        return batch // unit if size else 1


def read_tables(file: Path | str | Mapping[str, Any], overrides: Iterable[str] = ()) -> dict[str, Any]:
    """The contents of a config file, with `table.key=value` laid over it, values as TOML writes them.

    Args:
        file: the file, or its contents.
        overrides: what is laid over it.

    Raises:
        ValueError: if it can't be read, or an override is not of that form.
    """
    tables = dict(file) if isinstance(file, Mapping) else read_toml(Path(file))
    for name, table in tables.items():
        if not isinstance(table, Mapping):
            raise ValueError(f"{name} must be a table [{name}], got {table!r}")
    for text in overrides:
        key, sign, value = text.partition("=")
        names = key.strip().split(".")
        if not sign or len(names) < 2 or not all(names):
            raise ValueError(f"an override is table.key=value, for example training.steps=100; got {text!r}")
        table: Any = tables
        for name in names[:-1]:
            table = table.setdefault(name, {})
            if not isinstance(table, dict):
                raise ValueError(f"{key} can't be set: {name} is not a table")
        table[names[-1]] = _value(value)
    return tables


def config_of(tables: Mapping[str, Any], vocab_size: int | None = None) -> PretrainConfig:
    """The config in tables such as `read_tables` gives.

    Args:
        tables: plain data.
        vocab_size: that of the data, which the model must have; None where the model says it itself.

    Raises:
        ValueError: for unknown, missing or ill-typed keys and values that are refused, naming the table.
    """
    hints = get_type_hints(PretrainConfig)
    if unknown := sorted(tables.keys() - hints.keys()):
        raise ValueError(f"unknown table {', '.join(unknown)}; the tables are {', '.join(hints)}")
    if missing := [name for name in ("model", "data", "training") if name not in tables]:
        raise ValueError(f"the config lacks the table [{missing[0]}]")
    parts: dict[str, Any] = {}
    for name, table in tables.items():
        if not isinstance(table, Mapping):
            raise ValueError(f"{name} must be a table [{name}], got {table!r}")
        table = dict(table)
        if name == "model":
            parts[name] = _within(name, lambda table=table: _model(table, vocab_size))
            continue
        if name == "execution" and isinstance(logging := table.get("logging"), Mapping):
            table["logging"] = _within("execution.logging", lambda data=logging: from_data(LoggingConfig, data))
        parts[name] = _within(name, lambda name=name, table=table: from_data(hints[name], table))
    return PretrainConfig(**parts)


def data_table(tables: Mapping[str, Any]) -> DataConfig:
    """The table [data] alone, from which the vocabulary is known before the model is.

    Raises:
        ValueError: if it is missing or ill.
    """
    table = tables.get("data", {})
    if not isinstance(table, Mapping) or "directory" not in table:
        raise ValueError("the config has no data.directory; give it there or by --data")
    return _within("data", lambda: from_data(DataConfig, table))


def _model(table: dict[str, Any], vocab_size: int | None) -> ModelConfig:
    named, range_ = table.pop("preset", None), table.pop("eigenvalue_range", None)
    there = table.pop("vocab_size", vocab_size)
    if there is None:
        raise ValueError("vocab_size is missing")
    if vocab_size is not None and there != vocab_size:
        raise ValueError(f"vocab_size = {there!r} is not the data's, {vocab_size}; leave it out")
    if named is not None:
        if not isinstance(named, str):
            raise ValueError(f"preset must be a string, got {named!r}")
        base = to_data(preset(named, vocab_size=there))
        if (
            isinstance(table.get("mixer"), Mapping)
            and table["mixer"].get("name", base["mixer"]["name"]) == (base["mixer"]["name"])
        ):
            table["mixer"] = {**base["mixer"], **table["mixer"]}
        table = {**base, **table}
    model = from_data(ModelConfig, {**table, "vocab_size": there})
    if range_ is None:
        return model
    wanted = EigenvalueRange.of(range_)
    widened = [m for m in model.mixer_pattern if isinstance(m, WidenedMixerConfig)]
    if not widened:
        raise ValueError(f"{model.mixer_name} has no eigenvalue_range")
    mixer = tuple(replace(m, eigenvalue_range=wanted) if m in widened else m for m in model.mixer_pattern)
    return replace(model, mixer=mixer)


def _within(table: str, read: Any) -> Any:
    try:
        return read()
    except ValueError as error:
        raise ValueError(f"[{table}] {error}") from None


def _value(text: str) -> Any:
    """A value as TOML has it; anything else is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text.strip()


def _at_least(config: Any, smallest: int, *names: str) -> None:
    for name in names:
        if (value := getattr(config, name)) is not None and value < smallest:
            raise ValueError(f"{name} must be at least {smallest}, got {value}")
