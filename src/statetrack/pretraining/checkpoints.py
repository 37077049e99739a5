"""Checkpoints by torch.distributed.checkpoint: written in the background, whole or not at all, for any number of ranks.

    checkpoints/step-00001000/
      shard-00001-model-00001-of-00001.safetensors   what each process holds of weights, optimizer and guard
      progress.json                                  the step, and the files with their sizes

They are written beside it, to `.step-00001000.tmp`, which gets its name when all processes are done. The files are
safetensors and JSON: nothing in a checkpoint is a pickle, neither written nor read.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from statetrack.files import atomic_write, sync_directory
from statetrack.pretraining.processes import Processes
from statetrack.runs import RunError

_NAME = re.compile(r"step-(\d+)")


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written, and why."""


class Checkpoints:
    """The checkpoints of a run.

    Args:
        directory: where they are; the same one for all processes.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._writing: Future | None = None

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, in order."""
        if not self.directory.is_dir():
            return []
        return sorted(int(match[1]) for path in self.directory.iterdir() if (match := _NAME.fullmatch(path.name)))

    def path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}"

    def clear(self) -> None:
        """Removes what processes that were killed have left unfinished."""
        if self.directory.is_dir():
            for path in self.directory.glob(".*"):
                shutil.rmtree(path, ignore_errors=True)

    def save(
        self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], processes: Processes, keep: int
    ) -> None:
        """Copies tensors to the CPU and goes on to write them in the background; to be called by all processes.

        Args:
            step: optimizer steps done.
            tensors: by name, in part DTensors.
            facts: what else belongs to it, as JSON.
            processes: this process among all.
            keep: older checkpoints beyond the last so many are removed once this one is complete.

        Raises:
            CheckpointError: if the one before could not be written; those before it are intact.
        """
        self.wait()
        target = self.path(step)
        if target.exists():
            return
        temporary = target.with_name(f".{target.name}.tmp")
        if processes.is_first:
            temporary.mkdir(parents=True, exist_ok=True)
        writer = _Writer(self, temporary, step, dict(facts), keep)
        future = async_save(dict(tensors), storage_writer=writer, process_group=processes.storage)
        assert isinstance(future, Future)
        self._writing = future

    def wait(self) -> None:
        """Waits until the last checkpoint is complete.

        Raises:
            CheckpointError: if it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            writing.result()
        except (CheckpointException, OSError) as error:
            cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
            reason = getattr(cause, "strerror", None) or " ".join(str(cause).split()) or type(cause).__name__
            self.clear()  # a full disk has no room for half a checkpoint
            raise CheckpointError(
                f"a checkpoint could not be written to {self.directory} ({reason}); those before it are intact"
            ) from None

    def read_facts(self, step: int) -> dict[str, Any]:
        """What was saved beside the tensors.

        Raises:
            RunError: if files of the checkpoint are missing or cut short.
        """
        place = self.path(step)
        try:
            data = json.loads((place / "progress.json").read_text(encoding="utf-8"))
            files = dict(data["files"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{place} is damaged: its progress.json can't be read ({error}); {_ADVICE}") from None
        for name, size in files.items():
            file = place / name
            if Path(name).name != name or not file.is_file() or file.stat().st_size != size:
                raise RunError(f"{place} is damaged: {name} is missing or cut short; {_ADVICE}")
        return data

    def shapes(self, step: int) -> dict[str, torch.Size]:
        """The names and shapes of a checkpoint's tensors, each put together from its parts."""
        metadata = HuggingFaceStorageReader(str(self.path(step))).read_metadata()
        return {name: entry.size for name, entry in metadata.state_dict_metadata.items()}  # pyright: ignore

    def load(self, step: int, tensors: Mapping[str, Tensor], processes: Processes | None = None) -> None:
        """Fills tensors of the same names and shapes, each process its parts of them.

        Args:
            step: which checkpoint.
            tensors: by name, in part DTensors, which may be spread over other processes than they were.
            processes: this process among all; None to read alone.

        Raises:
            RunError: if the checkpoint is damaged or has other tensors.
        """
        there = self.shapes(step)
        missing = sorted(name for name, tensor in tensors.items() if there.get(name) != tensor.shape)
        if missing:
            raise RunError(f"{self.path(step)} does not fit the model: {missing[0]} is missing or of another shape")
        reader = HuggingFaceStorageReader(str(self.path(step)))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            group = None if processes is None else processes.storage
            load(dict(tensors), storage_reader=reader, process_group=group, no_dist=processes is None)

    def _complete(self, temporary: Path, step: int, facts: Mapping[str, Any], keep: int) -> None:
        files = {path.name: path.stat().st_size for path in sorted(temporary.glob("*.safetensors"))}
        atomic_write(temporary / "progress.json", json.dumps({"step": step, **facts, "files": files}) + "\n")
        temporary.rename(self.path(step))
        sync_directory(self.directory)
        for old in self.steps()[:-keep]:
            gone = self.directory / f".{self.path(old).name}.old"
            self.path(old).rename(gone)
            shutil.rmtree(gone, ignore_errors=True)


_ADVICE = "remove that directory to go on from the checkpoint before it"


class _Writer(HuggingFaceStorageWriter):
    """Safetensors files of all processes, which become a checkpoint when the last one is written."""

    def __init__(self, checkpoints: Checkpoints, temporary: Path, step: int, facts: dict[str, Any], keep: int) -> None:
        super().__init__(str(temporary), save_distributed=True)
        self._then = lambda: checkpoints._complete(temporary, step, facts, keep)

    def finish(self, metadata: Any, results: Any) -> None:
        """Called in the first process, after all have written their files."""
        super().finish(metadata, results)
        self._then()
