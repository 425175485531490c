"""Regular expressions on module names, matched in time that no pattern of a checkpoint can blow up.

A set of positions in a name is an integer, one bit each; every part of a pattern maps the positions
where it may begin to those where it may end, so that nothing is ever tried twice.
"""

import re
from collections.abc import Callable, Iterable
from functools import cache

MAX_CHARACTERS = 256
_Step = Callable[[dict[str, int], int], int]
_TOKEN = re.compile(
    r"(?P<one>\\[^A-Za-z0-9]|\\[dDwWsS]|\[\^?(?:\\[^A-Za-z0-9]|\\[dDwWsS]|[^\\\[\]])+\]"
    r"|[^\\()\[\]{}|*+?^$])|(?P<begin>\((?:\?:)?(?!\?))|(?P<end>\))|(?P<or>\|)|(?P<anchor>[$^])"
)
_REPEAT = re.compile(r"(?:([*+?])|\{([0-9]{1,2})(?:(,)([0-9]{1,2})?)?\})(?![*+?{])")


class NamePattern:
    """A pattern of literals, classes, groups, alternatives, repeats and anchors."""

    def __init__(self, text: str) -> None:
        """Parse a pattern.

        Raises:
            ValueError: it is longer than MAX_CHARACTERS, broken, or of other constructs, such as a
                repeated group that repeats something inside.
        """
        if len(text) > MAX_CHARACTERS:
            raise ValueError("too long")
        self._text, self._at, self._n_loops = text, 0, 0
        self._step = self._alternatives()
        if self._at != len(text):
            raise ValueError("unbalanced")

    def matches(self, name: str) -> bool:
        """Return whether the pattern matches at the beginning of a name, as `re.match`."""
        places: dict[str, int] = {"^": 1, "$": 1 << len(name)}
        for at, character in enumerate(name):
            places[f"={character}"] = places.get(f"={character}", 0) | 1 << at
        return self._step(places, 1) != 0

    def _alternatives(self) -> _Step:
        options = [self._sequence()]
        while self._text[self._at : self._at + 1] == "|":
            self._at += 1
            options.append(self._sequence())
        return lambda places, at: _union(option(places, at) for option in options)

    def _sequence(self) -> _Step:
        steps = []
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            steps.append(self._repeated())

        def step(places: dict[str, int], at: int) -> int:
            for each in steps:
                at = each(places, at)
                if not at:
                    break
            return at

        return step

    def _repeated(self) -> _Step:
        found = _TOKEN.match(self._text, self._at)
        if found is None:
            raise ValueError("unknown construct")
        self._at, before = found.end(), self._n_loops
        if found["anchor"]:
            anchor = found["anchor"]
            return lambda places, at: at & places[anchor]
        if found["one"]:
            once = _one(found["one"])
        else:
            once = self._alternatives()
            if self._text[self._at : self._at + 1] != ")":
                raise ValueError("unbalanced")
            self._at += 1
        repeat = _REPEAT.match(self._text, self._at)
        if repeat is None:
            return once
        self._at = repeat.end()
        if repeat[1] == "?":
            return lambda places, at: at | once(places, at)
        if self._n_loops != before:  # every level would double the work, or worse
            raise ValueError("nested repeats")
        self._n_loops += 1
        if repeat[1]:
            return _repeat(once, "*+".index(repeat[1]), None)
        most = int(repeat[4]) if repeat[4] else None if repeat[3] else int(repeat[2])
        return _repeat(once, int(repeat[2]), most)


def _one(text: str) -> _Step:
    """Return the step over one character, as `re` reads it."""
    try:
        accepts = cache(re.compile(f"={text}").fullmatch)
    except re.error as error:
        raise ValueError("unknown class") from error
    if len(text) == 1 and text != ".":
        key = f"={text}"
        return lambda places, at: (at & places.get(key, 0)) << 1

    def step(places: dict[str, int], at: int) -> int:
        if text not in places:
            places[text] = _union(m for c, m in places.items() if accepts(c))
        return (at & places[text]) << 1

    return step


def _repeat(once: _Step, least: int, most: int | None) -> _Step:
    def step(places: dict[str, int], at: int) -> int:
        for _ in range(least):
            at = once(places, at)
        found, count = at, least
        while at and (most is None or count < most):
            at = once(places, at) & ~found
            found, count = found | at, count + 1
        return found

    return step


def _union(sets: Iterable[int]) -> int:
    found = 0
    for each in sets:
        found |= each
    return found
