"""The loss of a batch, and of text that training never sees."""

from __future__ import annotations

import torch
from torch import Tensor

from statetrack.data import PackedBatch, PackedTokens, read_manifest
from statetrack.data.packed import packed_batch
from statetrack.pretraining.config import PretrainConfig
from statetrack.pretraining.parallel import ParallelModel
from statetrack.pretraining.processes import Processes


def batch_loss(model: ParallelModel, batch: PackedBatch, config: PretrainConfig, *, z_loss: float = 0.0) -> Tensor:
    """The mean cross-entropy of a batch in nats a token, plus the z-loss where there is one."""
    batch = batch.to(model.device, non_blocking=True)
    if config.data.separate_documents:
        return model(batch.ids, batch.cu_seqlens, batch.labels, z_loss=z_loss)
    rows = (-1, config.data.sequence_length)
    return model(batch.ids.view(rows), None, batch.labels.view(rows), z_loss=z_loss)


class HeldOut:
    """The held-out text of each domain, of which every process reads a part.

    A domain with less text than a sequence is left out.

    Args:
        config: the run's.
        processes: this process among all.
    """

    def __init__(self, config: PretrainConfig, processes: Processes) -> None:
        self.config, self.processes = config, processes
        self.domains: dict[str, PackedTokens] = {}
        directory, length = config.data.directory, config.data.sequence_length
        for domain, count in read_manifest(directory)["tokens"]["held_out"].items():
            if count > length:
                self.domains[domain] = PackedTokens(directory, "held_out", [domain])

    @torch.no_grad()
    def losses(self, model: ParallelModel) -> dict[str, float]:
        """Nats a token for each domain, over at most `evaluation_sequences` sequences; to be called by all processes.

        The sequences are the same ones for any number of processes.
        """
        return {domain: self._loss(model, tokens) for domain, tokens in self.domains.items()}

    def _loss(self, model: ParallelModel, tokens: PackedTokens) -> float:
        processes, length = self.processes, self.config.data.sequence_length
        number = min((tokens.num_tokens - 1) // length, self.config.execution.evaluation_sequences)
        size = self.config.execution.micro_batch_size or 1
        total = torch.zeros((), dtype=torch.float64)
        # Sharded weights are gathered by all processes together: those that are done read the first window again.
        for first in range(0, number, size * processes.size):
            start = first + processes.rank * size
            windows = list(range(start, min(start + size, number)))
            loss = batch_loss(model, packed_batch(tokens, windows or [0], length), self.config)
            total += loss.double().cpu() * len(windows)
        return float(processes.sum(total.to(model.device)).item()) / number
