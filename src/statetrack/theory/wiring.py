"""Linear layers from sums of named quantities, for weights that are written and not learned."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from statetrack.layers import ReLUMLP

Name: TypeAlias = Hashable
"""A quantity: a coordinate of the residual stream or a hidden unit."""

Sum: TypeAlias = dict[Name, float]
"""A linear combination: name -> coefficient. The name `ONE` stands for the constant 1."""

ONE: Name = "one"


def total(*sums: Mapping[Name, float], scale: float = 1) -> Sum:
    """The sum of linear combinations, times a number."""
    result: Sum = {}
    for summand in sums:
        for name, coefficient in summand.items():
            result[name] = result.get(name, 0) + scale * coefficient
    return result


class Coordinates:
    """Names for the coordinates of a vector, in the order in which they are added."""

    def __init__(self, names: Iterable[Name] = ()) -> None:
        self._numbers: dict[Name, int] = {}
        for name in names:
            self._numbers.setdefault(name, len(self._numbers))

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, name: Name) -> int:
        return self._numbers[name]

    def __contains__(self, name: Name) -> bool:
        return name in self._numbers

    def vector(self, values: Mapping[Name, float]) -> Tensor:
        """A vector with the given values and 0 elsewhere: float32 [coordinates]."""
        return self.matrix([values])[0]

    def matrix(self, rows: Sequence[Mapping[Name, float]]) -> Tensor:
        """A matrix whose rows are linear combinations of the coordinates: float32 [rows, coordinates]."""
        places = [(row, self[name]) for row, values in enumerate(rows) for name in values]
        matrix = torch.zeros(len(rows), len(self))
        if places:
            coefficients = torch.tensor([float(value) for values in rows for value in values.values()])
            matrix[tuple(torch.tensor(places).T)] = coefficients  # a name occurs once in a sum, so no place does twice
        return matrix


@torch.no_grad()
def wire_mlp(
    mlp: ReLUMLP,
    stream: Coordinates,
    layers: Sequence[Mapping[Name, Mapping[Name, float]]],
    writes: Mapping[Name, Mapping[Name, float]],
) -> None:
    """Writes the weights of a ReLU MLP.

    Args:
        mlp: the MLP; its hidden layers must be wide enough, and what is not named is 0.
        stream: the coordinates of its input and output.
        layers: for each hidden layer the units, `relu` of a linear combination of those of the layer before (of the
            coordinates in the first), where `ONE` is the bias.
        writes: what is added to coordinates of the residual stream, by units of the last layer.
    """
    below = stream
    for layer, units in zip(mlp.hidden, layers, strict=True):
        assert isinstance(layer, nn.Linear)
        rows = [{name: value for name, value in inputs.items() if name != ONE} for inputs in units.values()]
        layer.weight.zero_()
        layer.weight[: len(units), : len(below)] = below.matrix(rows)
        layer.bias.zero_()
        layer.bias[: len(units)] = torch.tensor([float(inputs.get(ONE, 0)) for inputs in units.values()])
        below = Coordinates(units)
    mlp.down_proj.weight.zero_()
    for name, values in writes.items():
        mlp.down_proj.weight[stream[name], : len(below)] = below.vector(values)
