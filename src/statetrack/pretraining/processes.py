"""The processes of a run: one, those that torchrun has started on a machine, or those of a SLURM job.

Each has a rank and a device. What they have to agree on beside gradients goes over gloo, on the CPU: whether to stop,
and who met an error.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

Result = TypeVar("Result")

# A process that is gone is noticed at once, by its closed connections; this is for one that hangs.
_TIMEOUT = timedelta(minutes=15)


class SharedError(ValueError):
    """An error that one process had, raised in all of them."""


@dataclass
class Processes:
    """This process among those of a run.

    Attributes:
        rank: its number among all.
        size: how many there are.
        device: where it computes.
        storage: the group in which checkpoints are written in the background, gloo.
    """

    rank: int
    size: int
    device: torch.device
    storage: dist.ProcessGroup
    _control: dist.ProcessGroup = field(repr=False)
    _wish: tuple[torch.Tensor, dist.Work] | None = field(default=None, repr=False)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes what is written once."""
        return self.rank == 0

    def together(self, action: Callable[[], Result]) -> Result:
        """Does something in all processes, which all fail if one does.

        Raises:
            SharedError: a ValueError in all of them, with the message of the first that had an error, if it had a
                ValueError, an OSError or missed a module. One process alone raises what it had.
            Exception: what else the action raises, in this process.
        """
        failure: str | None = None
        result: Result | None = None
        try:
            result = action()
        except (ValueError, OSError, ModuleNotFoundError) as error:
            if self.size == 1:
                raise
            failure = message_of(error)
        failures: list[str | None] = [None] * self.size
        dist.all_gather_object(failures, failure, group=self._control)
        if found := [text for text in failures if text is not None]:
            raise SharedError(found[0])
        return result  # pyright: ignore[reportReturnType]

    def any_wishes(self, wish: bool) -> bool:
        """Whether any process has had a wish until its last call; all get the same answer.

        To be called by all once a step. The answer is one call late where there are several processes, so that nobody
        waits for it.
        """
        if self.size == 1:
            return wish
        before, self._wish = self._wish, None
        answer = False
        if before is not None:
            before[1].wait()
            answer = bool(before[0].item())
        value = torch.tensor([float(wish)])
        work = dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self._control, async_op=True)
        assert work is not None
        self._wish = value, work
        return answer

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """The mean of a tensor over all processes, on the device and without waiting for it."""
        return self.sum(value) / self.size

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all processes, likewise."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value


@contextmanager
def processes(device: str | None = None) -> Iterator[Processes]:
    """Joins the processes of a run, or stands alone where nobody has started several.

    Args:
        device: "cpu" or "cuda"; None for cuda where there is one. Each process of a machine has a GPU of its own.

    Raises:
        ValueError: for a device that is not there.
    """
    launched = dist.is_torchelastic_launched() or ("RANK" in os.environ and "MASTER_ADDR" in os.environ)
    place = _device(device, int(os.environ.get("LOCAL_RANK", "0")) if launched else None)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
    joined = not dist.is_initialized()
    if joined and launched:
        dist.init_process_group(backend, timeout=_TIMEOUT)
    elif joined:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    groups = [dist.new_group(backend="gloo", timeout=_TIMEOUT) for _ in range(2)]
    storage, control = groups
    assert isinstance(storage, dist.ProcessGroup)
    assert isinstance(control, dist.ProcessGroup)
    own = Processes(dist.get_rank(), dist.get_world_size(), place, storage, control)
    ended = False
    try:
        yield own
        ended = True
    finally:
        # After an error others may wait in a collective that this process will never join, and so would this call.
        if joined and (ended or own.size == 1):
            dist.destroy_process_group()


def _device(name: str | None, local_rank: int | None) -> torch.device:
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise ValueError(f"unknown device {name!r}; the devices are cpu and cuda")
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("there is no CUDA device here; leave out --device or say --device cpu")
    index = torch.cuda.current_device() if local_rank is None else local_rank
    if index >= torch.cuda.device_count():
        raise ValueError(
            f"{torch.cuda.device_count()} GPUs are too few for the processes of this machine; start as many as there "
            "are GPUs"
        )
    return torch.device("cuda", index)


def message_of(error: BaseException) -> str:
    """The message of an error on one line."""
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        amount = re.search(r"ried to allocate (.+?(?:B|bytes))\b", str(error))
        return (
            f"there is not enough memory{f' for another {amount[1]}' if amount else ''}; a smaller "
            "execution.micro_batch_size takes less, and so do execution.activation_checkpointing = 1 and, on several "
            "processes, execution.reshard_after_forward = true"
        )
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror.lower()}: {error.filename}" if error.filename else error.strerror.lower()
    return " ".join(str(error).split())
