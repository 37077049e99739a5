"""Checkpoints by torch.distributed.checkpoint: written in the background, whole or not at all, for any number of ranks.

    checkpoints/step-00001000/
      shard-00001-model-00001-of-00001.safetensors   what each process holds of weights, optimizer and guard
      progress.json                                  the step, the config, and the files with their sizes and hashes

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
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future as TorchFuture

from statetrack.files import atomic_write, file_hash, sync_directory
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
            reason = _cause(error)
            self.clear()  # a full disk has no room for half a checkpoint
            raise CheckpointError(
                f"a checkpoint could not be written to {self.directory} ({reason}); those before it are intact"
            ) from None

    def read_facts(self, step: int, processes: Processes | None = None) -> dict[str, Any]:
        """What was saved beside the tensors, once the files are found to be those that were written.

        Args:
            step: which checkpoint.
            processes: this process among all, each of which compares its part of the files with their hashes; None to
                compare all of them.

        Raises:
            RunError: naming a file that is missing, cut short, changed, or does not belong to the checkpoint.
        """
        place = self.path(step)
        try:
            data = json.loads((place / "progress.json").read_text(encoding="utf-8"))
            files = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in data["files"].items()}
            right = data["step"] == step and 0 <= float(data["seconds"]) < float("inf")
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            right, data, files = False, {}, {}
        if not right:
            raise self._damaged(step, "its progress.json is missing or not what was written")
        for name, (size, _) in files.items():
            file = place / name
            if Path(name).name != name or not file.is_file() or file.stat().st_size != size:
                raise self._damaged(step, f"{name} is missing or cut short")
        # Any file of tensors would be read, whoever put it there.
        if strangers := sorted({path.name for path in place.glob("*.safetensors")} - files.keys()):
            raise self._damaged(step, f"{strangers[0]} does not belong to it")
        rank, ranks = (0, 1) if processes is None else (processes.rank, processes.size)
        for name in sorted(files)[rank::ranks]:
            if file_hash(place / name) != files[name][1]:
                raise self._damaged(step, f"{name} is not the file that was written: its hash differs")
        return data

    def shapes(self, step: int) -> dict[str, torch.Size]:
        """The names and shapes of a checkpoint's tensors, each put together from its parts.

        Raises:
            RunError: if a file can't be read.
        """
        try:
            metadata = HuggingFaceStorageReader(str(self.path(step))).read_metadata()
        except (SafetensorError, ValueError, KeyError, TypeError, OSError) as error:
            raise self._damaged(step, f"its tensors can't be read ({error})") from None
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
            try:
                load(dict(tensors), storage_reader=reader, process_group=group, no_dist=processes is None)
            except CheckpointException as error:
                raise self._damaged(step, f"its tensors can't be read ({_cause(error)})") from None

    def _damaged(self, step: int, what: str) -> RunError:
        place, before = self.path(step), [other for other in self.steps() if other < step]
        advice = f"go on from {self.path(before[-1]).name}" if before else "begin anew: there is none before it"
        return RunError(f"{place} is damaged: {what}; remove that directory to {advice}")

    def _complete(
        self, temporary: Path, step: int, facts: Mapping[str, Any], hashes: Mapping[str, str], keep: int
    ) -> None:
        files = {name: {"bytes": (temporary / name).stat().st_size, "sha256": hashes[name]} for name in sorted(hashes)}
        atomic_write(temporary / "progress.json", json.dumps({"step": step, **facts, "files": files}) + "\n")
        temporary.rename(self.path(step))
        sync_directory(self.directory)
        for old in self.steps()[:-keep]:
            gone = self.directory / f".{self.path(old).name}.old"
            self.path(old).rename(gone)
            shutil.rmtree(gone, ignore_errors=True)


def _cause(error: BaseException) -> str:
    """Why reading or writing failed, from the first process where it did."""
    cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
    return getattr(cause, "strerror", None) or " ".join(str(cause).split()) or type(cause).__name__


class _Writer(HuggingFaceStorageWriter):
    """Safetensors files of all processes, which become a checkpoint when the last one is written."""

    def __init__(self, checkpoints: Checkpoints, temporary: Path, step: int, facts: dict[str, Any], keep: int) -> None:
        super().__init__(str(temporary), save_distributed=True)
        self._temporary = temporary
        self._then = lambda hashes: checkpoints._complete(temporary, step, facts, hashes, keep)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        """Writes the files of this process; the results carry their hashes to the first one."""
        results = super().write_data(plan, planner).wait()
        hashes = {name: file_hash(self._temporary / name) for name in {r.storage_data.relative_path for r in results}}
        written = [replace(r, storage_data=(name := r.storage_data.relative_path, hashes[name])) for r in results]
        future = TorchFuture()
        future.set_result(written)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Called in the first process, after all have written their files."""
        super().finish(metadata, results)
        self._then(dict(result.storage_data for written in results for result in written))
