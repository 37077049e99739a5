"""All prefixes of a word at once: the products of its first letters in an automaton's transition monoid.

Products are associative, so that those of T letters take log2 T operations on [T, B] numbers (Hillis and Steele's scan)
instead of T on [B] each. In a cyclic group, where elements are powers, they are one cumulative sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from statetrack.automata.automaton import Automaton
from statetrack.automata.monoid import TransitionMonoid, transition_monoid


@dataclass(frozen=True)
class Prefixes:
    """An automaton that reads a word as the product of its letters.

    Attributes:
        letters: the element of each letter, int64 [letters].
        images: the image of each state under each element, int64 [elements * states].
        products: "m, then n" at m * elements + n, int64 [elements * elements]; None for a cyclic group, whose elements
            are numbered as powers: the product of m and n is m + n modulo their number.
        num_elements: of the monoid.
    """

    letters: Tensor
    images: Tensor
    products: Tensor | None
    num_elements: int

    @classmethod
    def of(cls, automaton: Automaton, most: int) -> Prefixes | None:
        """None if there are more than `most` elements."""
        monoid = transition_monoid(automaton, most)
        if monoid is None:
            return None

        def table(numbers: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(numbers, np.int64)).view(-1).to(automaton.device)

        letters = monoid.right[0]
        if (powers := _powers(monoid)) is None:
            return cls(table(letters), table(monoid.elements), table(monoid.products), len(monoid))
        exponents = np.empty_like(powers)
        exponents[powers] = np.arange(len(powers))
        return cls(table(exponents[letters]), table(monoid.elements[powers]), None, len(monoid))

    def run(self, letters: Tensor, start: Tensor, states: Tensor) -> None:
        """Writes the states [T, B] after each of the letters int64 [T, B] from states int64 [B]."""
        x = self.letters.index_select(0, letters.reshape(-1)).view(letters.shape)
        if self.products is None:
            x = x.cumsum(0).remainder_(self.num_elements)
        else:
            self._scan(x, self.products)
        places = torch.add(start, x, alpha=len(self.images) // self.num_elements)
        torch.index_select(self.images, 0, places.view(-1), out=states.view(-1))

    def _scan(self, x: Tensor, products: Tensor) -> None:
        """Puts the product of all elements up to it in the place of each."""
        index, distance = torch.empty_like(x), 1
        while distance < len(x):
            places = index[distance:]
            torch.add(x[distance:], x[:-distance], alpha=self.num_elements, out=places)
            torch.index_select(products, 0, places.view(-1), out=x[distance:].view(-1))
            distance *= 2


def _powers(monoid: TransitionMonoid) -> np.ndarray | None:
    """The powers of an element that all elements are, from the identity on; None unless it is a cyclic group."""
    products, count = monoid.products, len(monoid)
    if not np.array_equal(products, products.T):
        return None
    for element in range(count):
        powers, power = [0], element
        while power and len(powers) < count:
            powers.append(power)
            power = int(products[power, element])
        if not power and len(powers) == count:
            return np.array(powers)
    return None
