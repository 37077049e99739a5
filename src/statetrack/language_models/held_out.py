"""Perplexity on held-out text by the length of the context, and by position, in memory that doesn't grow with either.

The same tokens are read at every length: in windows of so many tokens, at whose beginning the state is reset. So
lengths differ in how far the state is carried and in nothing else. A model that uses its context gets better with the
length; one that breaks beyond its training length gets worse.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from statetrack.data.packed import PackedTokens
from statetrack.data.preparation import read_manifest
from statetrack.data.tokenizer import load_tokenizer
from statetrack.language_models.causal import CausalModel

Text = Literal["concatenated", "documents"]
"""Which text is read: stretches of the stream of all documents, or the beginnings of long documents."""

_PIECE = 512
"""Tokens of a row that are read at once, where several rows have room for so many."""


@dataclass(frozen=True)
class Loss:
    """A mean loss in nats a token.

    Attributes:
        start, stop: the positions start..stop - 1 in a window, from 0.
        loss: the mean; its exponential is the perplexity.
        stderr: standard error of the mean over the stretches of text; None with one stretch alone.
        change: how much higher the loss is than at the shortest length, on the same tokens; 0 for that length itself.
        change_stderr: its standard error.
        tokens: how many tokens the mean is of.
    """

    start: int
    stop: int
    loss: float
    stderr: float | None
    tokens: int
    change: float = 0.0
    change_stderr: float | None = None

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


@dataclass(frozen=True)
class DomainPerplexity:
    """What came out on one domain.

    Attributes:
        domain: its name.
        stretches: how many stretches of text, each as long as the longest length; they are what errors are taken over.
        bytes: of the text that was predicted, separators left out.
        by_length: the loss with the state reset every so many tokens (`stop`), the shortest first; all on the same
            tokens.
        by_position: the loss at positions of the longest windows.
        left_out: lengths for which the domain has no text.
    """

    domain: str
    stretches: int
    bytes: int
    by_length: tuple[Loss, ...]
    by_position: tuple[Loss, ...]
    left_out: tuple[int, ...] = ()

    def to_data(self) -> dict[str, Any]:
        """As JSON has it, with perplexities and bits a byte."""
        data = asdict(self)
        for key in ("by_length", "by_position"):
            for entry, loss in zip(data[key], getattr(self, key), strict=True):
                entry["perplexity"] = loss.perplexity
        for entry, loss in zip(data["by_length"], self.by_length, strict=True):
            entry["bits_per_byte"] = loss.loss * loss.tokens / math.log(2) / max(1, self.bytes)
        return data


@torch.inference_mode()
def perplexity(
    model: CausalModel,
    data: Path | str,
    lengths: Sequence[int],
    *,
    domains: Sequence[str] | None = None,
    tokens: int = 2**18,
    text: Text = "concatenated",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[DomainPerplexity]:
    """The loss on held-out text of each domain, with contexts of each length.

    Args:
        model: the model; its vocabulary must hold that of the data.
        data: what `statetrack data prepare` has written.
        lengths: how many tokens the state is carried over; each must divide the longest.
        domains: the domains to judge on; None for all that have held-out text.
        tokens: how many tokens of a domain are read at each length at most, but one stretch at least.
        text: "concatenated" for stretches that are evenly spread over the held-out stream, in which documents follow
            each other: every position has the same kind of text, so that what changes along a window is the model.
            "documents" for the beginnings of the documents that are longer than the longest length: the whole context
            is to the point, but such documents are few and of a kind of their own.
        on_progress: called with the tokens done and the tokens in all.

    Raises:
        ValueError: for lengths that don't fit together, a vocabulary that is too small, or where no domain has a
            stretch of text of even the shortest length.
    """
    wanted = sorted(set(lengths))
    if not wanted or wanted[0] < 1:
        raise ValueError(f"lengths must be positive integers, at least one of them, got {wanted}")
    if odd := [length for length in wanted if wanted[-1] % length]:
        raise ValueError(
            f"each length must divide the longest, so that all are judged on the same tokens; {odd[0]} does not divide "
            f"{wanted[-1]}"
        )
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}")
    if text not in get_args(Text):
        raise ValueError(f"text must be concatenated or documents, got {text!r}")
    manifest = read_manifest(Path(data))
    if manifest["vocab_size"] > model.vocab_size:
        raise ValueError(
            f"{data} has {manifest['vocab_size']} token ids and the model reads {model.vocab_size}: prepare the data "
            "with the tokenizer of the model"
        )
    held_out = manifest["tokens"]["held_out"]
    chosen = [domain for domain in manifest["sources"] if held_out[domain]] if domains is None else list(domains)
    plans = []
    for domain in chosen:
        source = PackedTokens(data, "held_out", [domain])
        for count in range(len(wanted), 0, -1):
            starts = _stretches(source, wanted[count - 1], max(1, tokens // wanted[count - 1]), text)
            fit = [length for length in wanted[:count] if wanted[count - 1] % length == 0]
            if len(starts):
                plans.append((domain, source, starts, fit))
                break
    if not plans:
        raise ValueError(f"{data} has no held-out text ({text}) of {wanted[0]:,} tokens; ask for shorter lengths")
    total = sum(len(starts) * fit[-1] * len(fit) for _, _, starts, fit in plans)
    done = 0
    tokenizer = load_tokenizer(Path(data) / "tokenizer")
    results = []
    for domain, source, starts, fit in plans:
        longest, means, positions = fit[-1], [], ()
        for length in fit:
            edges = _edges(length)
            sums = torch.zeros(len(starts), len(edges) - 1, dtype=torch.float64)
            for rows, column, losses in _losses(model, source, starts, longest, length, edges):
                sums[rows, column] += losses
            done += len(starts) * longest
            on_progress(done, total)
            means.append(sums.sum(1) / longest)
            if length == longest:
                widths = torch.tensor(np.diff(edges))
                positions = tuple(
                    Loss(start, stop, *_mean(column), tokens=(stop - start) * len(starts))
                    for start, stop, column in zip(edges[:-1], edges[1:], (sums / widths).T, strict=True)
                )
        by_length = []
        for length, mean in zip(fit, means, strict=True):
            change, error = _mean(mean - means[0])
            loss, stderr = _mean(mean)
            by_length.append(Loss(0, length, loss, stderr, len(starts) * longest, change, error))
        size = sum(_num_bytes(source, start, longest, tokenizer) for start in starts)
        left_out = tuple(length for length in wanted if length not in fit)
        results.append(DomainPerplexity(domain, len(starts), size, tuple(by_length), positions, left_out))
    return results


def _stretches(source: PackedTokens, length: int, most: int, text: Text) -> list[int]:
    """Where stretches of `length` tokens begin that have a token behind them; `most` of them, evenly spread."""
    if text == "concatenated":
        starts = np.arange((source.num_tokens - 1) // length) * length
    else:
        _, begins = source.read(0, source.num_tokens)
        sizes = np.diff([*begins, source.num_tokens])
        starts = begins[sizes > length]
    chosen = np.arange(min(most, len(starts))) * len(starts) // max(1, min(most, len(starts)))
    return starts[chosen].tolist()


def _edges(length: int) -> list[int]:
    """Boundaries of the positions whose losses are averaged: two to an octave from 64 on."""
    edges = [0, *(step for power in range(6, 63) for step in (2**power, 3 * 2 ** (power - 1)) if step < length)]
    return [*edges, length]


def _losses(
    model: CausalModel, source: PackedTokens, starts: Sequence[int], longest: int, length: int, edges: Sequence[int]
) -> Iterator[tuple[Tensor, int, Tensor]]:
    """Sums of losses: which stretches they belong to, at which positions (a number of the edges), one for each."""
    budget = model.tokens_at_once
    windows = [
        (stretch, start + offset) for stretch, start in enumerate(starts) for offset in range(0, longest, length)
    ]
    rows = max(1, budget // min(length, _PIECE))
    for first in range(0, len(windows), rows):
        batch = windows[first : first + rows]
        stretches = [stretch for stretch, _ in batch]
        piece = max(1, budget // len(batch))
        state = None
        for begin in range(0, length, piece):
            end = min(begin + piece, length)
            read = [source.read(start + begin, start + end + 1)[0] for _, start in batch]
            ids = torch.from_numpy(np.stack(read)).to(model.device)
            losses, state = model.losses(ids[:, :-1], ids[:, 1:], state)
            losses = losses.double().cpu()
            for column, (low, high) in enumerate(itertools.pairwise(edges)):
                low, high = max(low, begin) - begin, min(high, end) - begin
                if low < high:
                    part = losses[:, low:high].sum(1)
                    # Several windows of a batch may belong to one stretch.
                    by_stretch = torch.zeros(len(starts), dtype=torch.float64)
                    by_stretch.index_add_(0, torch.tensor(stretches), part)
                    touched = torch.tensor(sorted(set(stretches)))
                    yield touched, column, by_stretch[touched]


def _mean(values: Tensor) -> tuple[float, float | None]:
    """The mean of one value a stretch, and its standard error; None for a single stretch."""
    error = None if len(values) < 2 else float(values.std() / len(values) ** 0.5)
    return float(values.mean()), error


def _num_bytes(source: PackedTokens, start: int, length: int, tokenizer: Any) -> int:
    ids, _ = source.read(start + 1, start + length + 1)
    return len(tokenizer.decode(ids[ids != source.separator].tolist()).encode("utf-8", errors="replace"))
