"""Accuracy by length, at any length, in constant memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from statetrack import seeds
from statetrack.model import LanguageModel, ModelState, Tracker
from statetrack.tasks import IGNORE, Batch, EndlessTask, Task

LONG = 10_000
"""Lengths from here on are judged on fewer sequences."""

MAX_LENGTH = 10**9
"""Longer sequences are refused: reading them takes weeks."""

SOLVED_LENGTH, SOLVED_ACCURACY = 256, 0.999
"""A model has solved its task if it is right this often at this length, several times its longest training sequence."""

SEGMENT_TOKENS, SEGMENT_TOKENS_GPU = 16_384, 262_144
"""Tokens of all sequences of a batch that are in memory at once, on a CPU and on a GPU."""


@dataclass(frozen=True)
class Accuracy:
    """The accuracy at one length.

    Attributes:
        length: position of the label that was judged, counted from 1.
        accuracy: share of fresh sequences whose label at this position, or all up to it, the model got right.
        sequences: how many sequences were judged.
    """

    length: int
    accuracy: float
    sequences: int


@torch.inference_mode()
def evaluate(
    model: Tracker,
    task: Task,
    lengths: Iterable[int],
    *,
    seed: int = 0,
    sequences: int | None = None,
    whole: bool = False,
    device: torch.device | str = "cpu",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Accuracy]:
    """Judges the label at each of the lengths on sequences that training has not seen.

    The model computes in the dtype of its weights, which is float32 whatever the precision of its training was. A
    sequence is read in segments, with the state carried from one to the next, so that memory does not grow with
    length. Where sequences end with the answer (expressions, programs), each length has sequences of its own.

    Args:
        model: the model, in evaluation mode; or the `StabilizedModel` of it.
        task: the task; it must have a label at the lengths asked for (`Task.fits`).
        lengths: positions counted from 1.
        seed: seed of the sequences; their stream is another than that of the training data.
        sequences: how many; None for 512, and 32 at lengths from 10,000 on.
        whole: a sequence counts as right at a length only if every label up to it is (sequence accuracy).
        device: where to evaluate.
        on_progress: called with the tokens done and the tokens in all after each segment.

    Raises:
        ValueError: for no lengths, a length below 1, fewer than one sequence, or a length at which the task asks
            nothing.
    """
    wanted = sorted(set(lengths))
    if not wanted or wanted[0] < 1:
        raise ValueError(f"lengths must be positive integers, at least one of them, got {wanted}")
    if wanted[-1] > MAX_LENGTH:
        raise ValueError(f"lengths of up to {MAX_LENGTH:,} are judged, got {wanted[-1]:,}")
    if sequences is not None and sequences < 1:
        raise ValueError(f"sequences must be at least 1, got {sequences}")
    if unfit := [length for length in wanted if not task.fits(length)]:
        near = [length for length in range(max(1, unfit[0] - 100), unfit[0] + 100) if task.fits(length)]
        advice = f"; near {unfit[0]} there is one at {min(near, key=lambda n: abs(n - unfit[0]))}" if near else ""
        raise ValueError(f"the task {task.name} has no label at length {', '.join(map(str, unfit))}{advice}")
    groups: dict[tuple[int, int], list[int]] = {}
    for length in wanted:
        count = sequences or default_sequences(length)
        groups.setdefault((count, 0 if isinstance(task, EndlessTask) else length), []).append(length)
    total = sum(count * group[-1] for (count, _), group in groups.items())
    done = 0
    shares: dict[int, tuple[int, Tensor]] = {}
    unlabelled: list[tuple[list[int], Tensor]] = []
    # Nothing in the loop looks at what was computed, so that a GPU never waits for the host.
    for (count, alone), group in groups.items():
        key = (seed, count, alone) if alone else (seed, count)
        segments = _segments(task, count, group[-1], seeds.generator("evaluation data", *key, device=device))
        state: ModelState | None = None
        so_far = torch.ones(count, dtype=torch.bool, device=device)
        position = 0
        for batch in segments:
            size = batch.ids.shape[1]
            here = [length for length in group if position < length <= position + size]
            at = torch.tensor([length - position - 1 for length in here], dtype=torch.long)
            at = at.to(device, non_blocking=True)
            logits, state = model.scan(batch.ids, state, positions=None if whole else at)
            answers = batch.labels[:, at]
            unlabelled.append((here, (answers == IGNORE).any()))
            if whole:
                right = (logits.argmax(-1) == batch.labels) | (batch.labels == IGNORE)
                right[:, 0] &= so_far
                right = right.cummin(1).values
                right, so_far = right[:, at], right[:, -1]
            else:
                right = logits.argmax(-1) == answers
            shares |= {n: (count, share) for n, share in zip(here, right.double().mean(0).unbind(), strict=True)}
            position += size
            done += size * count
            on_progress(done, total)
    for here, missing in unlabelled:
        if missing:
            raise ValueError(f"the task {task.name} has no label at every one of the lengths {here}")
    return [Accuracy(length, float(share), count) for length, (count, share) in sorted(shares.items())]


def _segments(task: Task, count: int, length: int, generator: torch.Generator) -> Iterator[Batch]:
    """Sequences of a length in segments of limited size."""
    size = max(1, (SEGMENT_TOKENS_GPU if generator.device.type == "cuda" else SEGMENT_TOKENS) // count)
    if isinstance(task, EndlessTask):
        stream = task.stream(count, generator)
        for position in range(0, length, size):
            yield stream.next(min(size, length - position))
    else:
        batch = task.sample(count, length, generator)
        yield from map(Batch, batch.ids.split(size, 1), batch.labels.split(size, 1))


def default_sequences(length: int) -> int:
    """How many sequences are judged at a length where nobody says how many."""
    return 32 if length >= LONG else 512


def solved(accuracy: Mapping[int, float]) -> bool:
    """Whether accuracies by length are those of a model that has solved its task; False if it was not judged there."""
    return accuracy.get(SOLVED_LENGTH, 0.0) >= SOLVED_ACCURACY


def evaluation_data(results: Iterable[Accuracy], task: Task, seed: int, *, whole: bool = False) -> dict[str, Any]:
    """The results as JSON has them: what evaluation.json holds."""
    results = list(results)
    return {
        "task": task.name,
        "seed": seed,
        "whole": whole,
        "chance": task.chance,
        "accuracy": {str(result.length): result.accuracy for result in results},
        "sequences": {str(result.length): result.sequences for result in results},
    }


@torch.inference_mode()
def measure_eigenvalues(
    model: LanguageModel, task: Task, *, seed: int = 0, sequences: int = 8, length: int = 32, most: int = 2000
) -> dict[int, list[tuple[float, float]]]:
    """The eigenvalues of the model's transition matrices on fresh data, all layers together, by input token.

    Args:
        model: the model, on the CPU.
        task: where the data comes from.
        seed: seed of the sequences.
        sequences: B, how many.
        length: T, their length, or the longest below that the task has.
        most: eigenvalues kept in all, drawn at random where there are more.

    Returns:
        For each token that occurred, pairs (real part, imaginary part), rounded to four decimals, without duplicates.
    """
    random = seeds.generator("eigenvalues", seed)
    length = next((fitting for fitting in range(length, 0, -1) if task.fits(fitting)), length)
    ids = task.sample(sequences, length, random).ids
    by_token: dict[int, set[tuple[float, float]]] = {}
    for transition in model.transitions(ids):
        if transition is None:
            continue
        values = transition.eigenvalues().flatten(2)
        for token in ids.unique().tolist():
            pairs = torch.view_as_real(values[ids == token].flatten()).mul(1e4).round().div(1e4).unique(dim=0)
            by_token.setdefault(token, set()).update((x, y) for x, y in pairs.tolist())
    share = min(1.0, most / max(1, sum(len(pairs) for pairs in by_token.values())))
    kept = {}
    for token, pairs in by_token.items():
        ordered = sorted(pairs)
        chosen = torch.randperm(len(ordered), generator=random)[: max(1, round(share * len(ordered)))]
        kept[token] = [ordered[i] for i in sorted(chosen.tolist())]
    return kept
