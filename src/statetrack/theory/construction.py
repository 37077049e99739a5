"""What all constructions of `construct` share: from a plan to a `LanguageModel` with weights that are written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from statetrack.automata import Automaton
from statetrack.layers import ReLUMLP
from statetrack.mixers import MixerConfig
from statetrack.mixers.exact_deltaproduct import ExactDeltaProduct, ExactDeltaProductConfig
from statetrack.model import Block, LanguageModel, ModelConfig
from statetrack.theory.wiring import ONE, Coordinates, Name, Sum

MAX_INTEGER = 256
"""bfloat16 has every integer up to here."""


class ConstructionError(ValueError):
    """An automaton for which there is no model of the kind asked for, and the nearest that there is."""


@dataclass(frozen=True)
class Plan:
    """What a compiled model is made of.

    Attributes:
        strategy: "representation", "states", "definite", "exclusion" or "holonomy".
        num_layers: blocks.
        num_householder: N, factors for each token.
        num_heads: H.
        head_dim: K.
        value_dim: V.
        theorem: why that is enough.
        why: the same in a sentence.
    """

    strategy: str
    num_layers: int
    num_householder: int
    num_heads: int
    head_dim: int
    value_dim: int
    theorem: str
    why: str


class Construction(ABC):
    """A model to be: its plan, its config, and the writing of its weights."""

    plan: Plan

    def __init__(self, automaton: Automaton) -> None:
        self.automaton = automaton
        self.table = automaton.transitions.cpu().numpy()
        self.outputs: list[int] = automaton.outputs.tolist()
        self.num_classes = automaton.num_outputs

    @property
    def work(self) -> int:
        p = self.plan
        return p.num_layers * p.num_heads * p.num_householder * (p.head_dim + p.value_dim)

    @cached_property
    @abstractmethod
    def config(self) -> ModelConfig:
        """Of the model that holds the weights."""

    @abstractmethod
    def write(self, model: LanguageModel) -> None:
        """Writes the weights that are not 0."""

    @property
    def letters(self) -> range:
        return range(self.automaton.num_letters)

    def num_parameters(self) -> int:
        with torch.device("meta"):
            return LanguageModel(self.config).num_parameters()

    def build(self) -> LanguageModel:
        with torch.device("meta"):  # nothing is drawn at random: all weights are written
            model = LanguageModel(self.config)
        model.to_empty(device="cpu")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
            self.write(model)
        return model

    def model_config(self, stream: Coordinates, hidden: int, depth: int, mixer: MixerConfig) -> ModelConfig:
        return ModelConfig(
            vocab_size=self.automaton.num_letters,
            output_size=self.num_classes,
            d_model=len(stream),
            num_layers=self.plan.num_layers,
            mlp_ratio=hidden / len(stream),
            mlp="relu" if hidden else "gated",
            mlp_depth=depth if hidden else 1,
            final_norm=False,
            norm_placement="none",
            mixer=mixer,
        )

    def mixer_config(self, **options: Any) -> ExactDeltaProductConfig:
        p = self.plan
        return ExactDeltaProductConfig(
            num_heads=p.num_heads,
            head_dim=p.head_dim,
            value_dim=p.value_dim,
            num_householder=p.num_householder,
            **options,
        )

    def label_rows(self, states: Sequence[Name]) -> list[Sum]:
        """The rows of the output layer, given a coordinate for each state that is 1 in this state and 0 in others."""
        rows: list[Sum] = [{} for _ in range(self.num_classes)]
        for state, name in enumerate(states):
            rows[self.outputs[state]][name] = 1
        return rows


def letter_name(letter: int) -> Name:
    return ("letter", letter)


def exact_mixer(block: Block) -> ExactDeltaProduct:
    assert isinstance(block.mixer, ExactDeltaProduct)
    return block.mixer


def relu_mlp(block: Block) -> ReLUMLP:
    assert isinstance(block.mlp, ReLUMLP)
    return block.mlp


def reflections(images: np.ndarray, signs: np.ndarray | None = None) -> list[np.ndarray]:
    """Keys of reflections whose product, the first applied first, is a signed permutation matrix A.

    As many as the rank of I - A (the theorem of Cartan and Dieudonne): with k = v - A v the reflection takes v to A v,
    and what is left to do fixes A v and whatever A fixed. Entries are 0, 1 and -1.
    """
    images = images.copy()
    signs = np.ones_like(images) if signs is None else signs.copy()
    keys = []
    for axis in range(len(images)):
        while (target := int(images[axis])) != axis or signs[axis] < 0:
            key = np.zeros(len(images), dtype=np.int64)
            key[axis] = 1
            if target == axis:
                signs[axis] = 1
            else:
                key[target] = -signs[axis]
                # A after the reflection sends the axis where A sent the target, up to the sign, and fixes the target.
                images[axis], signs[axis] = images[target], signs[axis] * signs[target]
                images[target], signs[target] = target, 1
            keys.append(key)
    return keys


def bumps(read: Name, offset: float, count: int) -> tuple[dict[Name, Sum], list[Sum]]:
    """Hidden units, and sums of them that are 1 where `read + offset` is 1, 2, ..., count and 0 at other integers.

    relu(x - j + 1) - 2 relu(x - j) + relu(x - j - 1) is 1 at x = j and 0 at all other integers.
    """
    hinges: dict[Name, Sum] = {(read, j): {read: 1, ONE: offset - j} for j in range(count)}
    found = []
    for j in range(1, count + 1):
        bump: Sum = {(read, j - 1): 1}
        if j < count:
            bump[read, j] = -2
        if j + 1 < count:
            bump[read, j + 1] = 1
        found.append(bump)
    return hinges, found


def completed(injection: dict[int, int], size: int) -> np.ndarray:
    """The permutation that continues a partial injection with the fewest exchanges: every path becomes a cycle."""
    images = np.arange(size)
    hit = set(injection.values())
    for begin in range(size):
        if begin in hit:
            continue
        end = begin
        while end in injection:
            end = injection[end]
        images[end] = begin
    for source, target in injection.items():
        images[source] = target
    return images
