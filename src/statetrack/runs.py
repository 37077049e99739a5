"""Run directories: everything about one trained model, in files that are replaced whole or not at all.

config.json                  the task, the model, the training; the format's number and the version that wrote it
model.safetensors            the weights of the last checkpoint
metrics.jsonl                a line every few steps
training_state.safetensors   weights, optimizer and step of the last checkpoint, from which training goes on
evaluation.json              what the last `statetrack evaluate` found, and of which step
failure.json                 why the run can't go on, if a grid has given it up
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from statetrack import weights
from statetrack.config import RunConfig, from_data, to_data
from statetrack.files import atomic_write
from statetrack.model import LanguageModel, ModelConfig

FORMAT = 1
"""Number of the layout of a run directory; it changes when older readers could not make sense of one."""


class RunError(ValueError):
    """A run directory that can't be used, and why."""


class TrainingError(RuntimeError):
    """Training that can't go on, and why."""


class RunDirectory:
    """A directory of one run.

    Args:
        path: the directory; it need not exist yet.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.json"
        self.model_file = self.path / "model.safetensors"
        self.metrics_file = self.path / "metrics.jsonl"
        self.evaluation_file = self.path / "evaluation.json"
        self.state_file = self.path / "training_state.safetensors"
        self.failure_file = self.path / "failure.json"

    def exists(self) -> bool:
        return self.config_file.exists()

    def create(self, config: RunConfig) -> None:
        """Makes the directory and writes the config.

        Raises:
            RunError: if the path is a file, or a directory with something else in it.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path} is a file; a run needs a directory of its own")
        if self.path.exists() and any(self.path.iterdir()) and not self.exists():
            raise RunError(f"{self.path} has files in it but no config.json; a run needs a new or empty directory")
        self.path.mkdir(parents=True, exist_ok=True)
        from statetrack import __version__

        data = {"format": FORMAT, "statetrack": __version__, **to_data(config)}
        atomic_write(self.config_file, json.dumps(data, indent=2) + "\n")

    def read_config(self) -> RunConfig:
        if not self.path.is_dir():
            raise RunError(f"there is no run directory {self.path}")
        if not self.exists():
            raise RunError(f"{self.path} is not a run directory: it has no config.json")
        try:
            data = json.loads(self.config_file.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise RunError(f"{self.config_file} is not valid JSON ({error}); restore it or train again") from None
        if not isinstance(data, dict) or "format" not in data:
            raise RunError(f"{self.config_file} is not the config of a run: it has no format number")
        written, version = data.pop("format"), data.pop("statetrack", "unknown")
        if written != FORMAT:
            raise RunError(
                f"{self.path} has the run format {written!r}, written by statetrack {version}, and this version reads "
                f"format {FORMAT}: use the version that wrote it"
            )
        try:
            return from_data(RunConfig, data)
        except ValueError as error:
            raise RunError(f"{self.config_file}: {error}") from None

    def load_model(self, device: torch.device | str = "cpu") -> LanguageModel:
        """The model with the weights of the last checkpoint, in evaluation mode.

        Raises:
            RunError: if the directory is missing, half-written, of another format, or its weights don't fit its config.
        """
        config = self.read_config()
        if not self.model_file.exists():
            raise RunError(f"{self.path} has no model.safetensors yet: its training did not reach a checkpoint")
        tensors = read_tensors(self.model_file)[0]
        check_weights(config.model, tensors, self.model_file)  # before memory is taken for what a config claims
        model = LanguageModel(config.model)
        model.load_state_dict(tensors)
        return model.to(device).eval()

    def save_checkpoint(self, model: nn.Module, optimizer: Mapping[str, Tensor], progress: Mapping[str, str]) -> None:
        """Replaces the training state, then the weights, each atomically.

        Raises:
            TrainingError: naming the weights, or the optimizer's tensors, that are not finite; the last checkpoint is
                intact.
        """
        tensors, moments = (
            {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
            for named in (model.state_dict(), optimizer)
        )
        # Moments may be infinite before any weight is, and training does not go on from such a state.
        for what, named in (("weights", tensors), ("the optimizer's tensors", moments)):
            if broken := [name for name, tensor in named.items() if not tensor.isfinite().all()]:
                raise TrainingError(
                    f"at step {progress['step']} {what} are no longer finite: {', '.join(broken)}; they are not saved, "
                    f"and what {self.path} has of earlier steps is kept; a lower learning rate or a stricter gradient "
                    "clip may help"
                )
        state = {f"model.{name}": tensor for name, tensor in tensors.items()}
        state |= {f"optimizer.{name}": tensor for name, tensor in moments.items()}
        facts = {**progress, "device": next(iter(model.state_dict().values())).device.type}
        atomic_write(self.state_file, save(state, facts))
        atomic_write(self.model_file, save(tensors, facts))

    def save_weights(self, model: nn.Module, facts: Mapping[str, str]) -> None:
        """Writes weights that no training made, such as those of a compiled model, atomically."""
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        atomic_write(self.model_file, save(weights, {"step": "0", "seconds": "0", **facts}))

    def load_checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, str]] | None:
        """The weights, the optimizer's tensors and the progress of the last checkpoint; None if there is none.

        Raises:
            RunError: if training can't go on from it: a tensor is missing, extra, misshapen or of another dtype, or the
                step or the seconds are no numbers of this run.
        """
        if not self.state_file.exists():
            if self.model_file.exists():
                raise RunError(
                    f"{self.path} has weights but no training_state.safetensors: it can be evaluated, not trained on"
                )
            return None
        state, progress = read_tensors(self.state_file)
        parts = {
            part: {name.removeprefix(part): tensor for name, tensor in state.items() if name.startswith(part)}
            for part in ("model.", "optimizer.")
        }
        config = self.read_config()
        check_weights(config.model, parts["model."], self.state_file)
        _check_optimizer(parts["model."], parts["optimizer."], self.state_file)
        others = [name for name in state if not name.startswith(("model.", "optimizer."))]
        dtypes = {torch.float32, torch.get_default_dtype()}
        others += [name for name, tensor in state.items() if tensor.dtype not in dtypes]
        if others:
            raise RunError(
                f"{self.state_file} has tensors that training does not go on from, other names or dtypes than float32: "
                f"{', '.join(others)}; restore it or train again"
            )
        _check_progress(progress, config.training.steps, self.state_file)
        return parts["model."], parts["optimizer."], progress

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dict(record)) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """The metrics that were written; a last line cut short by a crash is left out."""
        if not self.metrics_file.exists():
            return []
        return list(_complete_records(self.metrics_file.read_text(encoding="utf-8")))

    def weights_step(self) -> int | None:
        """The step of the weights in model.safetensors; None if there are none."""
        if not self.model_file.exists():
            return None
        return int(read_tensors(self.model_file)[1].get("step", -1))

    def train_seconds(self) -> float | None:
        """How long the training of the weights in model.safetensors took; None if they don't say."""
        seconds = read_tensors(self.model_file)[1].get("seconds")
        return None if seconds is None else float(seconds)

    def train_device(self) -> str | None:
        """The kind of device that wrote the weights in model.safetensors, "cuda" or "cpu"; None if they don't say."""
        return read_tensors(self.model_file)[1].get("device")

    def write_evaluation(self, evaluation: Mapping[str, Any]) -> None:
        """Writes an evaluation of the weights in model.safetensors, with their step."""
        data = {**evaluation, "step": self.weights_step()}
        atomic_write(self.evaluation_file, json.dumps(data, indent=2) + "\n")

    def read_evaluation(self) -> dict[str, Any]:
        """What `write_evaluation` wrote of the present weights; empty if nothing was, or training has gone on since.

        Raises:
            RunError: if the file is not valid JSON.
        """
        if not self.evaluation_file.exists():
            return {}
        try:
            evaluation = dict(json.loads(self.evaluation_file.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise RunError(f"{self.evaluation_file} is not valid JSON ({error}); evaluate the run again") from None
        # Files of before the step was written down are of a finished run.
        return evaluation if evaluation.get("step", self.weights_step()) == self.weights_step() else {}

    def write_failure(self, reason: str, traceback: str = "", origin: Mapping[str, str] | None = None) -> None:
        """Gives the run up: whoever does what is left of a grid leaves it alone until `forget_failure`."""
        data = {"reason": reason, "traceback": traceback, "origin": dict(origin or {})}
        atomic_write(self.failure_file, json.dumps(data, indent=2) + "\n")

    def read_failure(self) -> str | None:
        """Why the run was given up; None if it wasn't. A damaged file says as much."""
        if not self.failure_file.exists():
            return None
        try:
            return str(json.loads(self.failure_file.read_text(encoding="utf-8"))["reason"])
        except (ValueError, TypeError, KeyError):
            return f"it was given up, but {self.failure_file} is damaged and does not say why"

    def failure_origin(self) -> dict[str, str]:
        """Where the run was given up, as `write_failure` wrote it; empty if it did not, or its file is damaged."""
        try:
            return dict(json.loads(self.failure_file.read_text(encoding="utf-8"))["origin"])
        except (OSError, ValueError, TypeError, KeyError):
            return {}

    def forget_failure(self) -> None:
        """The run may go on, from its last checkpoint."""
        self.failure_file.unlink(missing_ok=True)

    def truncate_metrics(self, step: int) -> None:
        """Drops the metrics of steps after `step`: training goes on from there and will write them again."""
        kept = [record for record in self.read_metrics() if record["step"] <= step]
        if self.metrics_file.exists():
            atomic_write(self.metrics_file, "".join(json.dumps(record) + "\n" for record in kept))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file of a run.

    Raises:
        RunError: if the file is cut short or is not one.
    """
    try:
        return weights.read_tensors(path)
    except weights.WeightsError as error:
        raise RunError(f"{error}; restore it or train again") from None


def check_weights(config: ModelConfig, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Raises RunError for tensors that are not exactly those of a model, naming each one, or not floating-point."""
    try:
        problems = weights.misfit(weights.expected_shapes(config, tensors), tensors)
    except weights.WeightsError as error:
        raise RunError(f"{source} does not fit its model: {error}") from None
    if problems:
        raise RunError(f"{source} does not fit the model of its config: {problems}")
    if strange := sorted(name for name, tensor in tensors.items() if not tensor.is_floating_point()):
        raise RunError(f"{source} has weights that are not floating-point numbers: {', '.join(strange)}")


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Loads weights that must fit exactly.

    Raises:
        RunError: naming every missing, extra or misshapen tensor.
    """
    if problems := weights.misfit({name: tensor.shape for name, tensor in model.state_dict().items()}, tensors):
        raise RunError(f"{source} does not fit the model of its config: {problems}")
    model.load_state_dict(dict(tensors))


def _check_optimizer(parameters: Mapping[str, Tensor], moments: Mapping[str, Tensor], source: Path) -> None:
    """Raises RunError unless the tensors are AdamW's: two moments and a step for each parameter that had a gradient."""
    expected = {}
    for name, parameter in parameters.items():
        shapes = {"step": (), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
        if any(f"{name}.{key}" in moments for key in shapes):
            expected |= {f"{name}.{key}": shape for key, shape in shapes.items()}
    if problems := weights.misfit(expected, moments):
        raise RunError(f"{source} does not fit the optimizer of its run: {problems}; restore it or train again")
    if broken := [name for name, tensor in moments.items() if not tensor.isfinite().all()]:
        raise RunError(f"{source} has optimizer tensors that are not finite: {', '.join(broken)}; train again")


def _check_progress(progress: Mapping[str, str], steps: int, source: Path) -> None:
    """Raises RunError unless the step lies in the run and the seconds are a number."""
    step, seconds = progress.get("step", ""), progress.get("seconds", "")
    if not (step.isascii() and step.isdecimal() and len(step) < 20 and int(step) <= steps):
        raise RunError(f"{source} must say its step, from 0 to {steps}, and says {step!r}; restore it or train again")
    try:
        right = 0 <= float(seconds) < float("inf")
    except ValueError:
        right = False
    if not right:
        raise RunError(f"{source} must say its seconds of training, and says {seconds!r}; restore it or train again")


def _complete_records(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            yield record
