"""The directory of a pre-training run.

config.json      the config as it was read, and a fingerprint of the data
.lock            held by the process that trains
metrics.jsonl    a line every few steps, and one for each evaluation
checkpoints/     from which training goes on (`checkpoints.py`)
model/           the trained model, as transformers and `from_pretrained` read it, with its tokenizer
tensorboard/     event files, if asked for
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from statetrack.data import read_manifest
from statetrack.files import atomic_write
from statetrack.model import LanguageModel, ModelConfig
from statetrack.plain import difference, to_data
from statetrack.pretraining.checkpoints import CheckpointError, Checkpoints
from statetrack.pretraining.config import PretrainConfig, config_of
from statetrack.pretraining.processes import Processes
from statetrack.runs import RunError

FORMAT = 1
"""Number of the layout of the directory; it changes when older readers could not make sense of one."""


class PretrainRun:
    """The directory of a run.

    Args:
        path: the directory; it need not exist yet.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.model_directory = self.path / "model"
        self.checkpoints = Checkpoints(self.path / "checkpoints")
        self._lock: IO[str] | None = None

    def exists(self) -> bool:
        return self.config_file.exists()

    def check(self, config: PretrainConfig) -> None:
        """Refuses a directory that holds something else than this run or the beginning of it; changes nothing.

        Raises:
            RunError: naming the first key that differs.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path} is a file; a run needs a directory of its own")
        if not self.exists():
            # A run that could not begin for want of space may have left its lock.
            if self.path.exists() and any(path.name != ".lock" for path in self.path.iterdir()):
                raise RunError(f"{self.path} has files in it but no config.json; a run needs a new or empty directory")
            return
        data = self._read()
        there = _without_execution(self.read_config())
        if there != (here := _without_execution(config)):
            raise RunError(
                f"{self.path} holds another run ({difference(there, here)}); choose another directory, or go on with "
                f"the config that it was started with: statetrack pretrain --out {self.path}"
            )
        if data.get("data_fingerprint") != fingerprint(config.data.directory):
            raise RunError(
                f"{config.data.directory} is not the data that {self.path} was started with; choose another directory "
                "for a new run"
            )

    def begin(self, config: PretrainConfig) -> None:
        """Makes the directory, takes hold of it, and writes the config, which may have another `execution` than before.

        Raises:
            RunError: if another run is at work there.
            OSError: if it can't be written.
        """
        from statetrack import __version__

        self.path.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        self.check(config)  # again, now that nobody else can begin one
        self.checkpoints.directory.mkdir(exist_ok=True)
        self.checkpoints.clear()
        for marker in self.path.glob(".ended-*"):  # of processes that have ended before
            marker.unlink(missing_ok=True)
        data = {"format": FORMAT, "statetrack": __version__, "data_fingerprint": fingerprint(config.data.directory)}
        atomic_write(self.config_file, json.dumps({**data, "pretraining": to_data(config)}, indent=2) + "\n")

    def unlock(self) -> None:
        """Lets go of the directory, as a process that ends does by itself."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _take_lock(self) -> None:
        try:
            import fcntl
        except ModuleNotFoundError:  # Windows
            return
        file = (self.path / ".lock").open("a+", encoding="utf-8")
        try:
            # Not flock, which worker processes would inherit, and hold for a while when this one is killed.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            raise RunError(
                f"{self.path} is in use by {owner}; wait until it has ended, or choose another directory"
            ) from None
        except OSError:  # a file system without locks
            file.close()
            return
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        self._lock = file

    def read_config(self) -> PretrainConfig:
        """The config that the run was started with.

        Raises:
            RunError: if there is none, or it can't be read.
        """
        data = self._read()
        if data.get("format") != FORMAT or not isinstance(data.get("pretraining"), dict):
            raise RunError(f"{self.config_file} is no config of a pre-training run of format {FORMAT}")
        try:
            return config_of(data["pretraining"])
        except ValueError as error:
            raise RunError(f"{self.config_file}: {error}") from None

    def load_model(self) -> LanguageModel:
        """The model with the weights of the last checkpoint, in evaluation mode, on the CPU.

        Raises:
            RunError: if there is no checkpoint, or it is damaged.
        """
        config = self.read_config()
        if not (steps := self.checkpoints.steps()):
            raise RunError(f"{self.path} has no checkpoint yet")
        model = LanguageModel(config.model)
        self.read_facts(steps[-1], config)
        with torch.no_grad():
            self.checkpoints.load(steps[-1], {f"model.{name}": value for name, value in model.state_dict().items()})
        return model.eval()

    def save(
        self, step: int, seconds: float, tensors: Mapping[str, Tensor], config: PretrainConfig, processes: Processes
    ) -> None:
        """Writes a checkpoint in the background; to be called by all processes.

        Raises:
            CheckpointError: if the one before could not be written.
        """
        facts = {"seconds": seconds, "tokens": step * config.tokens_per_step, "pretraining": to_data(config)}
        self.checkpoints.save(step, tensors, facts, processes, config.execution.keep_checkpoints)

    def read_facts(self, step: int, config: PretrainConfig, processes: Processes | None = None) -> dict[str, Any]:
        """What was saved beside the tensors of a checkpoint of this run; the arguments are those of `Checkpoints`.

        Raises:
            RunError: if the checkpoint is damaged, or another run wrote it.
        """
        facts = self.checkpoints.read_facts(step, processes)
        try:
            there = _without_execution(config_of(facts["pretraining"]))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise RunError(f"{self.checkpoints.path(step)} has no config that this version reads") from None
        if there != (here := _without_execution(config)):
            raise RunError(
                f"{self.checkpoints.path(step)} is a checkpoint of another run than {self.config_file} "
                f"({difference(there, here)}); take it out of there, or restore the config"
            )
        return facts

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        try:
            with self.metrics_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(dict(record)) + "\n")
        except OSError as error:  # an error of writing knows no name
            raise OSError(error.errno, error.strerror, str(self.metrics_file)) from None

    def read_metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics; one that a crash has cut short is left out."""
        records = []
        if self.metrics_file.exists():
            for line in self.metrics_file.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    continue
                if isinstance(record, dict) and isinstance(record.get("step"), int):
                    records.append(record)
        return records

    def truncate_metrics(self, step: int) -> None:
        """Drops the metrics of steps after `step`: training goes on from there and will write them again."""
        kept = [record for record in self.read_metrics() if record["step"] <= step]
        atomic_write(self.metrics_file, "".join(json.dumps(record) + "\n" for record in kept))

    def _read(self) -> dict[str, Any]:
        if not self.exists():
            raise RunError(f"{self.path} is not a run directory: it has no config.json")
        try:
            data = json.loads(self.config_file.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise RunError(f"{self.config_file} is not valid JSON ({error})") from None
        if not isinstance(data, dict):
            raise RunError(f"{self.config_file} must hold a JSON object")
        return data


def fingerprint(directory: Path | str) -> str:
    """What tells prepared data from other data: a hash of the hashes of its files."""
    manifest = read_manifest(Path(directory))
    hashes = [manifest["tokenizer_files"], manifest["shards"]]
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()[:16]


def export_model(config: ModelConfig, weights: Mapping[str, Tensor], data: Path | str, directory: Path) -> None:
    """Writes a trained model in the layout of transformers, with the tokenizer of its data.

    Without transformers the code for loading it where statetrack is not installed is left out.

    Args:
        config: the model's config.
        weights: its weights by name.
        data: the data it was trained on.
        directory: where to write; what was there is replaced.

    Raises:
        CheckpointError: if it can't be written.
    """
    temporary = directory.parent / ".export" / directory.name
    try:
        _export(config, weights, Path(data), temporary)
        shutil.rmtree(directory, ignore_errors=True)
        temporary.rename(directory)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"the model could not be written to {directory} ({getattr(error, 'strerror', None) or error}); the last "
            "checkpoint is intact, and the same command goes on from there"
        ) from None
    finally:
        shutil.rmtree(temporary.parent, ignore_errors=True)


def _export(config: ModelConfig, weights: Mapping[str, Tensor], data: Path, temporary: Path) -> None:
    shutil.rmtree(temporary.parent, ignore_errors=True)
    shutil.copytree(data / "tokenizer", temporary)
    separator = read_manifest(data)["separator"]
    try:
        from statetrack.hf import StatetrackForCausalLM, export
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        written = {"architectures": ["StatetrackForCausalLM"], "model_type": "statetrack", "eos_token_id": separator}
        fields = {**written, "bos_token_id": separator, **to_data(replace(config, output_size=None))}
        atomic_write(temporary / "config.json", json.dumps(fields, indent=2) + "\n")
        tensors = {f"model.{name}": tensor.contiguous() for name, tensor in weights.items()}
        atomic_write(temporary / "model.safetensors", save(tensors, {"format": "pt"}))
    else:
        model = LanguageModel(config)
        model.load_state_dict(dict(weights))
        options = {"eos_token_id": separator, "bos_token_id": separator, "pad_token_id": separator}
        with _without_bars():
            export(StatetrackForCausalLM.of(model, **options), temporary)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keeps transformers from drawing bars, which would stand between the lines of a log."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _without_execution(config: PretrainConfig) -> PretrainConfig:
    """The config as far as it decides on the result; the data is told by its fingerprint, wherever it lies."""
    return replace(config, execution=type(config.execution)(), data=replace(config.data, directory=""))
