"""Prepared tokens as batches: memory-mapped, in an order that neither ranks, nor workers, nor interruptions change.

The tokens of a split are one stream, cut into windows of equal length. A batch is so many windows in one row, with
`cu_seqlens` at every window and every document: the state is reset there. Windows are shuffled anew for each epoch; the
batch of a step is determined by the seed and the step alone, whoever computes which part of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from statetrack import seeds
from statetrack.data.preparation import SPLITS, DataError, read_manifest


class PackedTokens:
    """The stream of all tokens of a split, memory-mapped.

    Attributes:
        num_tokens: its length.
        vocab_size: of the tokenizer.
        separator: the token that every document begins with.
        domain_ranges: where the tokens of each domain begin and end.

    Args:
        directory: what `prepare` has written.
        split: "train" or "held_out".
        domains: the domains to read, one after the other; None for all.

    Raises:
        DataError: if the directory can't be read, or there are no such tokens.
    """

    def __init__(self, directory: Path | str, split: str = "train", domains: Sequence[str] | None = None) -> None:
        if split not in SPLITS:
            raise ValueError(f"split must be {' or '.join(SPLITS)}, got {split!r}")
        self.directory = Path(directory)
        manifest = read_manifest(self.directory)
        known = list(manifest["sources"])
        if unknown := [domain for domain in domains or () if domain not in known]:
            raise DataError(f"{directory} has no domain {unknown[0]!r}; it has {', '.join(known)}")
        self.vocab_size: int = manifest["vocab_size"]
        self.separator: int = manifest["separator"]
        parts: list[dict] = []
        self.domain_ranges: dict[str, tuple[int, int]] = {}
        for domain in known if domains is None else domains:
            shards = [shard[split] for shard in manifest["shards"] if shard["domain"] == domain]
            begin = sum(part["tokens"] for part in parts)
            parts += [shard for shard in shards if shard["tokens"]]
            self.domain_ranges[domain] = begin, begin + sum(shard["tokens"] for shard in shards)
        if not parts:
            raise DataError(f"{directory} has no {split} tokens of {', '.join(domains or known)}")
        self._paths = [[entry["path"] for entry in part["files"]] for part in parts]
        self._dtype = np.dtype(manifest["dtype"])
        self._ends = np.cumsum([part["tokens"] for part in parts])
        self._open: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._documents = [part["documents"] for part in parts]
        self.num_tokens = int(self._ends[-1])
        for part in range(len(parts)):  # better now than in the middle of training
            self._map(part)

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens start..stop - 1, int64, and where among them documents begin.

        Raises:
            ValueError: if they lie outside of the stream.
            DataError: if the files hold something else than was written.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise ValueError(f"tokens lie in 0..{self.num_tokens}, got {start}..{stop}")
        pieces, begins = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        position, part = start, int(np.searchsorted(self._ends, start, side="right"))
        while position < stop:
            tokens, starts = self._part(part)
            offset = int(self._ends[part]) - len(tokens)
            first, last = position - offset, min(stop - offset, len(tokens))
            pieces.append(tokens[first:last].astype(np.int64))
            low, high = np.searchsorted(starts, [first, last])
            begins.append(starts[low:high] + (offset - start))
            position, part = offset + last, part + 1
        ids, starts = np.concatenate(pieces), np.concatenate(begins)
        # A GPU would end with an assertion, or with nonsense.
        if ids.max(initial=0) >= self.vocab_size or (np.diff(starts, prepend=-1, append=len(ids)) <= 0).any():
            raise DataError(
                f"{self.directory} has token ids beyond its vocabulary or documents out of order, so its files are not "
                "what was written; prepare the data again"
            )
        return ids, starts

    def _part(self, part: int) -> tuple[np.ndarray, np.ndarray]:
        # Opened at the first use, so that each worker has maps of its own.
        if part not in self._open:
            self._open[part] = self._map(part)
        return self._open[part]

    def _map(self, part: int) -> tuple[np.ndarray, np.ndarray]:
        arrays = []
        length = int(self._ends[part] - (self._ends[part - 1] if part else 0))
        for name, size, dtype in zip(
            self._paths[part], (length, self._documents[part]), (self._dtype, np.dtype(np.int64)), strict=True
        ):
            try:
                array = np.load(self.directory / name, mmap_mode="r", allow_pickle=False)
            except (ValueError, OSError, EOFError):
                array = None
            if array is None or array.shape != (size,) or array.dtype != dtype:
                raise DataError(f"{self.directory / name} is not the file that was written; prepare the data again")
            arrays.append(array)
        return arrays[0], arrays[1]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": {}}


@dataclass(frozen=True)
class PackedBatch:
    """Windows of tokens in one row.

    Attributes:
        ids: [1, N], int64.
        labels: the next token of each, [1, N]; after the last token of a document the separator.
        cu_seqlens: the boundaries [S + 1] of windows and documents, int64, on the CPU.
    """

    ids: Tensor
    labels: Tensor
    cu_seqlens: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The batch with its tokens on a device. The boundaries stay on the CPU, where models read them."""
        ids, labels = (x.to(device, non_blocking=non_blocking) for x in (self.ids, self.labels))
        return replace(self, ids=ids, labels=labels)

    def pin_memory(self) -> PackedBatch:
        return replace(self, ids=self.ids.pin_memory(), labels=self.labels.pin_memory())

    def split(self, parts: int) -> list[PackedBatch]:
        """The batch in parts of equal length, one after the other.

        Raises:
            ValueError: if that would cut a sequence.
        """
        length, rest = divmod(self.ids.shape[1], parts)
        cuts = torch.arange(parts + 1) * length
        places = torch.searchsorted(self.cu_seqlens, cuts)
        if rest or not torch.equal(self.cu_seqlens[places.clamp(max=len(self.cu_seqlens) - 1)], cuts):
            raise ValueError(f"a batch of {self.ids.shape[1]} tokens can't be split into {parts} at its boundaries")
        return [
            PackedBatch(
                self.ids[:, start : start + length],
                self.labels[:, start : start + length],
                self.cu_seqlens[first : last + 1] - start,
            )
            for start, first, last in zip(cuts.tolist(), places.tolist(), places[1:].tolist(), strict=False)
        ]


class PackedBatches(IterableDataset):
    """The batches of one rank from a step on, without end.

    A rank gets the windows `rank`, `rank + world_size`, ... of a step's global batch. To go on after an interruption,
    give the next step as `start_step`: the batches are the same ones, on any number of ranks whose batches together
    have the same size.

    Args:
        tokens: the stream.
        sequence_length: tokens of a window.
        batch_size: windows of a step, of all ranks together.
        seed: of the order.
        start_step: the step of the first batch.
        rank: which part of each batch to give.
        world_size: into how many parts batches are divided.
        shares: the share of the windows that each domain gets, in any unit; the others get none. In an epoch, which has
            as many windows as the stream, domains are left in part or repeated accordingly, and which part is chosen
            anew for each epoch. None for all windows of the stream.

    Raises:
        ValueError: for sizes that don't go together.
    """

    def __init__(
        self,
        tokens: PackedTokens,
        *,
        sequence_length: int,
        batch_size: int,
        seed: int = 0,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shares: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        if sequence_length < 1 or batch_size < 1 or start_step < 0:
            raise ValueError(
                "sequence_length and batch_size must be at least 1 and start_step at least 0, got "
                f"{sequence_length}, {batch_size} and {start_step}"
            )
        if not 0 <= rank < world_size or batch_size % world_size:
            raise ValueError(
                f"rank must lie in 0..world_size - 1, and world_size divide batch_size = {batch_size}; got rank {rank} "
                f"of {world_size}"
            )
        self.tokens, self.sequence_length, self.batch_size = tokens, sequence_length, batch_size
        self.seed, self.start_step, self.rank, self.world_size = seed, start_step, rank, world_size
        # The label of the last token is one token further.
        self.num_windows = (tokens.num_tokens - 1) // sequence_length
        self._parts = self._windows_by_domain(shares) if shares else [(0, self.num_windows, self.num_windows)]
        self.steps_per_epoch = sum(count for *_, count in self._parts) // batch_size
        if not self.steps_per_epoch:
            raise ValueError(
                f"a batch of {batch_size} windows of {sequence_length} tokens needs "
                f"{batch_size * sequence_length + 1:,} tokens, and there are {tokens.num_tokens:,}"
            )

    def __iter__(self) -> Iterator[PackedBatch]:
        # A loader takes batches from its workers in turn, so the steps remain in order.
        worker = get_worker_info()
        step = self.start_step + (0 if worker is None else worker.id)
        epoch, order = -1, torch.zeros(0)
        while True:
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = self._order(epoch)
            first = step % self.steps_per_epoch * self.batch_size
            windows = order[first + self.rank : first + self.batch_size : self.world_size].tolist()
            yield packed_batch(self.tokens, windows, self.sequence_length)
            step += 1 if worker is None else worker.num_workers

    def loader(self, num_workers: int = 0, *, pin_memory: bool = False) -> DataLoader:
        """A loader of the batches, the same ones in the same order for any number of workers."""
        return DataLoader(self, batch_size=None, num_workers=num_workers, pin_memory=pin_memory)

    def _windows_by_domain(self, shares: Mapping[str, float]) -> list[tuple[int, int, int]]:
        """The first window of each domain, how many it has, and how many an epoch takes of it."""
        ranges = self.tokens.domain_ranges
        parts = []
        for domain, share in shares.items():
            if domain not in ranges:
                raise ValueError(f"there is no domain {domain!r} to give a share to; there are {', '.join(ranges)}")
            first, end = (min(-(-place // self.sequence_length), self.num_windows) for place in ranges[domain])
            if first == end or not 0 < share < float("inf"):
                raise ValueError(
                    f"the domain {domain} can't have the share {share}: shares are positive, and a domain needs "
                    f"{self.sequence_length} tokens"
                )
            parts.append((first, end - first, round(share / sum(shares.values()) * self.num_windows)))
        return parts

    def _order(self, epoch: int) -> Tensor:
        """The windows of an epoch."""
        draws = seeds.generator("windows", self.seed, epoch)
        if len(self._parts) == 1 and self._parts[0][1] == self._parts[0][2]:
            return self._parts[0][0] + torch.randperm(self._parts[0][1], generator=draws)
        windows = []
        for first, number, count in self._parts:
            whole, rest = divmod(count, number)
            windows += [first + torch.arange(number)] * whole + [first + torch.randperm(number, generator=draws)[:rest]]
        order = torch.cat(windows)
        return order[torch.randperm(len(order), generator=draws)]


def packed_batch(tokens: PackedTokens, windows: Sequence[int], length: int) -> PackedBatch:
    """Windows of a stream, each of `length` tokens from a multiple of it on, in one row."""
    ids, labels, boundaries = [], [], [np.array([len(windows) * length])]
    for row, window in enumerate(windows):
        row_tokens, starts = tokens.read(window * length, (window + 1) * length + 1)
        ids.append(row_tokens[:-1])
        labels.append(row_tokens[1:])
        starts = np.union1d(starts[starts < length], [0])
        boundaries.append(starts + row * length)
    return PackedBatch(
        torch.from_numpy(np.concatenate(ids)).unsqueeze(0),
        torch.from_numpy(np.concatenate(labels)).unsqueeze(0),
        torch.from_numpy(np.sort(np.concatenate(boundaries))),
    )


class PackedRows(Dataset):
    """Windows one by one in the order of the stream, as `Trainer` of transformers takes them.

    An item has `input_ids` and `labels`, both the tokens [T], and `position_ids` [T], which begin again at 0 with every
    document: models of `statetrack.hf` reset their state there.

    Args:
        tokens: the stream.
        sequence_length: T.

    Raises:
        ValueError: if there are fewer tokens.
    """

    def __init__(self, tokens: PackedTokens, sequence_length: int) -> None:
        if not 1 <= sequence_length <= tokens.num_tokens:
            raise ValueError(
                f"sequence_length must lie in 1..{tokens.num_tokens}, the number of tokens, got {sequence_length}"
            )
        self.tokens, self.sequence_length = tokens, sequence_length

    def __len__(self) -> int:
        return self.tokens.num_tokens // self.sequence_length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"there are {len(self)} windows, got {index}")
        start = index * self.sequence_length
        tokens, starts = self.tokens.read(start, start + self.sequence_length)
        ids = torch.from_numpy(tokens)
        begins = np.union1d(starts, [0])
        positions = np.arange(len(tokens)) - np.repeat(begins, np.diff([*begins, len(tokens)]))
        return {"input_ids": ids, "labels": ids, "position_ids": torch.from_numpy(positions)}
