"""What a regular expression says wrong, in words, and which letters occur in it; automata-lib reads the rest."""

from __future__ import annotations

import re

MAX_LETTERS = 10_000
"""Longer expressions, with their repetitions written out, are refused: their automata would take hours."""

_INFIX = "|&^"
_POSTFIX = "*+?"
_REPEATED = re.compile(r"\{(\d*)(?:,(\d*))?\}")
_CLASS = re.compile(r"\[[^\]]*\]")
_NAMED = {"n": "\n", "r": "\r", "t": "\t", "v": "\v", "f": "\f", "a": "\a", "b": "\b"}


class ExpressionError(ValueError):
    """What is wrong with an expression and what would be right, to go on after a colon."""


def letters_of(expression: str) -> set[str]:
    """The letters that occur in an expression, those of classes included.

    Raises:
        ExpressionError: for an expression that is none, or one that is longer than `MAX_LETTERS` when its repetitions
            are written out.
    """
    letters: set[str] = set()
    opened: list[int] = []  # places of parentheses that are open
    sizes: list[list[int]] = [[]]  # for each of them, and the whole, the letters of each part so far
    before = ""  # an infix operator or an opening parenthesis, or nothing at all: what can't be repeated or joined
    place = 0
    while place < len(expression):
        character = expression[place]
        token, at = character, f"{character!r} at place {place + 1}"
        if character in _POSTFIX or character == "{":
            most = 1
            if character == "{":
                token, most = _repetition(expression, place)
            if before in ("", "(", *_INFIX):
                raise ExpressionError(f"{at} has nothing before it to repeat; write '\\{character}' for the letter")
            sizes[-1][-1] *= max(1, most)
        elif character in _INFIX:
            if before in ("", "(", *_INFIX):
                raise ExpressionError(f"{at} has nothing on its left; write () for the empty word")
        elif character == "(":
            opened.append(place)
            sizes.append([])
        elif character == ")":
            if not opened:
                raise ExpressionError(f"{at} closes nothing; leave it out, or write '\\)' for the letter")
            if before in [*_INFIX]:
                raise ExpressionError(f"{before!r} before {at} has nothing on its right; write () for the empty word")
            opened.pop()
            size = sum(sizes.pop())
            sizes[-1].append(size)
        else:
            token, found = _letters_at(expression, place)
            letters |= found
            sizes[-1].append(1)
        before = character
        place += len(token)
    if opened:
        raise ExpressionError(f"'(' at place {opened[-1] + 1} is not closed; add ')', or write '\\(' for the letter")
    if before and before in _INFIX:
        raise ExpressionError(f"{before!r} at its end has nothing on its right; write () for the empty word")
    if sum(sizes[0]) > MAX_LETTERS:
        raise ExpressionError(
            f"with its repetitions written out it has more than {MAX_LETTERS:,} letters; write a shorter one"
        )
    return letters


def _repetition(expression: str, place: int) -> tuple[str, int]:
    """A repetition {n}, {m,n}, {m,} or {,n} as written, and the most copies that it takes to write it out."""
    match = _REPEATED.match(expression, place)
    if match is None or not (match[1] or match[2]):
        raise ExpressionError(
            f"'{{' at place {place + 1} begins no number of repetitions; write {{2}}, {{1,2}} or {{2,}}, or '\\{{' for "
            "the letter"
        )
    if max(len(match[1]), len(match[2] or "")) > len(str(MAX_LETTERS)):
        raise ExpressionError(f"{match[0]} repeats too often; repeat at most {MAX_LETTERS:,} times")
    least = int(match[1] or 0)
    most = int(match[2]) if match[2] else least
    if most < least:
        raise ExpressionError(
            f"{match[0]} asks for at least {least} and at most {most} repetitions; write {{{most},{least}}}"
        )
    return match[0], most


def _letters_at(expression: str, place: int) -> tuple[str, set[str]]:
    """A letter, a quoted letter, the wildcard or a class as written, and the letters that it names."""
    character = expression[place]
    if character == ".":
        return character, set()
    if character == "\\":
        return _quoted(expression, place)
    if character == "[":
        match = _CLASS.match(expression, place)
        if match is None:
            rest = expression[place:]
            raise ExpressionError(f"the class {rest!r} has no end; write {rest + ']'!r}, or '\\[' for the letter")
        return match[0], _class(match[0])
    if character in "]}":
        raise ExpressionError(
            f"{character!r} at place {place + 1} closes nothing; write '\\{character}' for the letter"
        )
    if character.isspace() and character != " ":
        raise ExpressionError(f"{character!r} is no letter as it stands; write it with a backslash")
    return character, {character}


def _quoted(text: str, place: int) -> tuple[str, set[str]]:
    token = text[place : place + 2]
    if len(token) < 2:
        raise ExpressionError("a backslash at its end quotes nothing; write two for the letter")
    if token[1] in "sSdDwW":
        raise ExpressionError(f"{token} is no class here; write the letters out, such as [0-9]")
    return token, {_NAMED.get(token[1], token[1])}


def _class(written: str) -> set[str]:
    """The letters of a class; those that it excludes are letters of the expression as well."""
    inside = written[1:-1].removeprefix("^")
    if not inside:
        raise ExpressionError(f"the class {written} is empty; write letters between the brackets")
    ends: list[tuple[str, str]] = []  # each letter as written, and what it is
    place = 0
    while place < len(inside):
        token, found = _quoted(inside, place) if inside[place] == "\\" else (inside[place], {inside[place]})
        ends.append((token, found.pop()))
        place += len(token)
    letters: set[str] = set()
    index = 0
    while index < len(ends):
        (first, low) = ends[index]
        if first != "-" and index + 2 < len(ends) and ends[index + 1][0] == "-":
            last, high = ends[index + 2]
            if high < low:
                raise ExpressionError(f"the range {first}-{last} runs backwards; write {last}-{first}")
            letters |= {chr(code) for code in range(ord(low), ord(high) + 1)}
            index += 3
        else:
            letters.add(low)
            index += 1
    return letters
