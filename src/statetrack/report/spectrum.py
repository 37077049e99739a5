"""What measured eigenvalues let a state do, in plain words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from statetrack.report.record import Eigenvalues, Record

ComplexArray = NDArray[np.complex128]

UNIT = 0.05
"""A modulus this close to 1 counts as on the unit circle: at 0.95 a hundredth is left after 90 tokens."""

EXACT = 0.005
"""An eigenvalue this close to -1 is called -1: at 0.995 a hundredth is left after 900 tokens."""

REAL = 0.02
"""An imaginary part, or a real part below 0, of at most this counts as none."""


def as_complex(eigenvalues: Eigenvalues) -> ComplexArray:
    """complex128 [number of eigenvalues]."""
    return np.array([complex(*pair) for pair in eigenvalues], dtype=np.complex128)


def describe(record: Record) -> str:
    """A caption for a picture of the record's eigenvalues, computed from them: can the state be flipped, or rotated?"""
    values = as_complex(record.eigenvalues)
    tokens = {token: as_complex(pairs) for token, pairs in record.token_eigenvalues.items() if pairs}
    real = values[np.abs(values.imag) <= REAL].real
    sentences = []
    if len(real) < len(values):
        sentences.append(_rotation(values, tokens))
    if len(real):
        sentences.append(_flip(real, tokens, rotates=len(real) < len(values)))
    return " ".join(sentences)


def _rotation(values: ComplexArray, tokens: Mapping[str, ComplexArray]) -> str:
    strongest = _strongest_rotation(values)
    if strongest is None or abs(strongest) < 1 - UNIT:
        size = f"at most {abs(strongest):.2f}" if strongest is not None else "small"
        return f"Non-real eigenvalues, but of size {size}: what rotates fades."
    turns: dict[str, list[str]] = {}
    for token, of_token in tokens.items():
        turn = _strongest_rotation(of_token)
        if turn is not None and abs(turn) >= 1 - UNIT:
            turns.setdefault(_turn(turn), []).append(token)
    size = _number(abs(strongest))
    if not turns:
        return f"Non-real eigenvalues of size {size} rotate the state, by {_turn(strongest)}."
    actions = [f"{_tokens(names)} by {turn}" for turn, names in turns.items()]
    return f"Non-real eigenvalues of size {size} rotate the state: {_join(actions)}."


def _flip(real: NDArray[np.float64], tokens: Mapping[str, ComplexArray], *, rotates: bool) -> str:
    lowest = float(real.min())
    measured = _number(lowest)
    if lowest >= -REAL:
        if rotates:
            return f"No real one is below 0 (lowest {measured})."
        hardly = "Hardly" if measured.startswith("−") else "Never"
        return f"{hardly} below 0 (lowest {measured}): the state can be kept or forgotten, never flipped."
    if lowest > -1 + UNIT:
        fading = f"to a hundredth after {_flips_to_a_hundredth(lowest)} of them"
        return f"Negative, but no lower than {measured}: every flip shrinks the state, {fading}."
    flipping = [token for token, values in tokens.items() if _lowest_real(values) <= -1 + UNIT]
    subject = f"{_tokens(flipping)} flip{'s' * (len(flipping) == 1)}" if flipping else "a token can flip"
    others = {token: _lowest_real(values) for token, values in tokens.items() if token not in flipping}
    keeps = ""
    if flipping and others and -REAL <= min(others.values()) < math.inf:
        keeps = f", {_tokens(list(others))} do{'es' * (len(others) == 1)} not (lowest {_number(min(others.values()))})"
    only = "" if rotates else " All are real: no rotation."
    if lowest > -1 + EXACT:
        fading = f"but it fades to a hundredth after {_flips_to_a_hundredth(lowest)} flips"
        return f"Almost −1 (measured {measured}): {subject} the state{keeps}, {fading}.{only}"
    exactly = "" if measured == "−1" else f" (measured {measured})"
    return f"The eigenvalue −1{exactly}: {subject} the state{keeps}.{only}"


def _flips_to_a_hundredth(eigenvalue: float) -> str:
    return f"{max(1, round(math.log(0.01) / math.log(-eigenvalue))):,}"


def _strongest_rotation(values: ComplexArray) -> complex | None:
    """The non-real eigenvalue of the largest modulus, in the upper half plane: the angle is how far the state turns."""
    rotating = values[values.imag > REAL]
    return complex(rotating[np.abs(rotating).argmax()]) if len(rotating) else None


def _turn(eigenvalue: complex) -> str:
    """`about 120° (3 make a full turn)` where the angle is a simple part of a turn, else the angle alone."""
    degrees = math.degrees(math.atan2(eigenvalue.imag, eigenvalue.real))
    part = Fraction(degrees / 360).limit_denominator(12)
    if abs(float(part) * 360 - degrees) > 2 or part.numerator != 1:
        return f"{degrees:.0f}°"
    return f"about {360 / part.denominator:.0f}° ({part.denominator} make a full turn)"


def _lowest_real(values: ComplexArray) -> float:
    return float(np.min(values[np.abs(values.imag) <= REAL].real, initial=math.inf))


def _tokens(names: list[str]) -> str:
    shown = names if len(names) <= 4 else [*names[:3], f"{len(names) - 3} more"]
    return f"token{'s' * (len(names) > 1)} {_join(shown)}"


def _join(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _number(value: float) -> str:
    """Two decimals, or as many as it takes to tell the value from 0 and from ±1 (four at most); a true minus sign."""
    for decimals in range(2, 5):
        text = f"{value:.{decimals}f}"
        if abs(float(text)) not in (0, 1):
            break
    else:
        text = f"{value:.0f}"
    return text.replace("-", "−") if float(text) else "0"
