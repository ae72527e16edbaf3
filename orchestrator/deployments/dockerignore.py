"""Which files of a repository a `.dockerignore` leaves out, by Docker's rules.

Those are https://docs.docker.com/build/concepts/context/#dockerignore-files: the last line that matches decides, `!`
makes exceptions, `**` stands for any number of directories, and what leaves out a directory leaves out what is in it.
Patterns come from strangers, so that none may take long: a name is matched by an expression that never goes back, and
the directories between two names by going back to the last `**` only.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

# Lines of a file that count, and characters of one; what is more is refused.
_MOST_PATTERNS = 1000
_LONGEST_PATTERN = 1024
# What one pattern may stand for, each way to read its `**` being one.
_MOST_ALTERNATIVES = 64
# Any number of directories, none included.
_ANY_DIRECTORIES = None
_Name = re.Pattern[str]


class BadPattern(ValueError):
    """A line that is no pattern. The message names it."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """One line. `names` are what the parts of a path must match, None standing for `**`."""

    exception: bool
    alternatives: Sequence[Sequence[_Name | None]]
    # The directories that the pattern names before its first wildcard.
    prefix: tuple[str, ...]

    def matches(self, path: Sequence[str]) -> bool:
        """Whether the whole path matches."""
        return any(_matches(names, path) for names in self.alternatives)


class Ignored:
    """The patterns of one file."""

    def __init__(self, lines: Sequence[str]) -> None:
        self._patterns = [parse(line) for line in lines]
        if len(self._patterns) > _MOST_PATTERNS:
            raise BadPattern(f"there are more than {_MOST_PATTERNS} lines")
        self._exceptions = [pattern for pattern in self._patterns if pattern.exception]
        # What the root's own parent would be.
        self.root: Matched = (False,) * len(self._patterns)

    def match(self, path: Sequence[str], parent: Matched) -> tuple[bool, Matched]:
        """Whether a path, given by its parts, is left out; and what its own children are to be asked with."""
        found = []
        left_out = False
        for above, pattern in zip(parent, self._patterns, strict=True):
            # Docker does not try what could change nothing here: so an exception that names a directory counts in it
            # only where a line before it leaves that directory out.
            matches = above or (pattern.exception == left_out and pattern.matches(path))
            if matches:
                left_out = not pattern.exception
            found.append(matches)
        return left_out, tuple(found)

    def may_hold_exceptions(self, directory: Sequence[str]) -> bool:
        """Whether something below a directory that is left out may have to be sent even so."""
        return any(
            pattern.prefix[: len(directory)] == tuple(directory[: len(pattern.prefix)]) for pattern in self._exceptions
        )


# Which of the patterns match a path or a directory above it.
Matched = tuple[bool, ...]


def lines_of(text: str) -> list[str]:
    """The lines of a file that are patterns."""
    lines = text.removeprefix("\N{BYTE ORDER MARK}").split("\n")
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def parse(line: str) -> Pattern:
    """A pattern, from a line without blanks around it. Raises BadPattern."""
    exception = line.startswith("!")
    text = line[1:].strip() if exception else line
    if not text or len(text) > _LONGEST_PATTERN:
        raise BadPattern(repr(line[:80]))
    text = posixpath.normpath(text).lstrip("/") or "."
    try:
        alternatives = [[_compile(name) for name in names] for names in _spread(text.split("/"))]
    except (re.error, ValueError) as error:
        raise BadPattern(repr(line[:80])) from error
    plain = []
    for name in text.split("/"):
        if re.search(r"[*?\[\\]", name):
            break
        plain.append(name)
    return Pattern(exception, alternatives, tuple(plain))


def _spread(names: list[str]) -> list[list[str]]:
    """Names of which `**` is one or has no part: `a**b` is `ab` or `a*/**/b`."""
    spread: list[list[str]] = [[]]
    for place, name in enumerate(names):
        if "**" not in name:
            variants = [[name]]
        elif not name.strip("*"):
            # At the end it stands for all that is in the directory, which itself is not meant.
            variants = [["**", "*"] if place == len(names) - 1 else ["**"]]
        else:
            # They double with each `**`.
            variants = list(islice(_inside(re.sub(r"\*{2,}", "**", name)), _MOST_ALTERNATIVES + 1))
        spread = [before + variant for before in spread for variant in variants]
        if len(spread) > _MOST_ALTERNATIVES:
            raise ValueError(name)
    return spread


def _inside(name: str) -> Iterator[list[str]]:
    if name.startswith("**"):
        # Docker takes it for what a name ends with, in any directory.
        for rest in _inside("*" + name[2:]) if "**" in name[2:] else [["*" + name[2:]]]:
            yield ["**", *rest]
        return
    head, wild, tail = name.partition("**")
    if not wild:
        yield [name]
    elif not tail:
        # What lies below goes with it.
        yield [head + "*"]
    else:
        for rest in _inside(tail):
            yield [head + rest[0], *rest[1:]]
            yield [head + "*", "**", *rest]


def _compile(name: str) -> _Name | None:
    """An expression for one name. Whatever follows a `*` is looked for once, from the left, and not again."""
    if name == "**":
        return _ANY_DIRECTORIES
    first, *others = _between_stars(name)
    if not others:
        return re.compile(first, re.DOTALL)
    middle = "".join(f"(?>.*?{part})" for part in others[:-1] if part)
    return re.compile(f"{first}{middle}.*{others[-1]}", re.DOTALL)


def _between_stars(name: str) -> list[str]:
    """The parts of a name between its `*`, each as an expression."""
    parts = [""]
    place = 0
    while place < len(name):
        one = name[place]
        place += 1
        if one == "*":
            parts.append("")
        elif one == "?":
            parts[-1] += "."
        elif one == "\\":
            parts[-1] += re.escape(name[place : place + 1] or "\\")
            place += 1
        elif one == "[":
            end = _end_of_class(name, place)
            parts[-1] += _class(name[place:end])
            place = end + 1
        else:
            parts[-1] += re.escape(one)
    return parts


def _end_of_class(name: str, place: int) -> int:
    start = place + name[place : place + 1].count("^")
    while place < len(name):
        if name[place] == "\\":
            place += 1
        elif name[place] == "]" and place > start:
            return place
        place += 1
    raise ValueError(name)


def _class(inside: str) -> str:
    """`[…]` with only ranges, escapes and a leading `^` meaning anything."""
    inverted = inside.startswith("^")
    body = ""
    place = int(inverted)
    while place < len(inside):
        one = inside[place]
        if one == "\\":
            place += 1
            one = inside[place : place + 1]
        elif one == "-" and body:
            body += one
            place += 1
            continue
        body += re.escape(one)
        place += 1
    return f"[{'^' * inverted}{body}]"


def _matches(names: Sequence[_Name | None], path: Sequence[str]) -> bool:
    """Match part by part; after a mismatch the last `**` takes one part more."""
    at = part = 0
    again: tuple[int, int] | None = None
    while part < len(path):
        if at < len(names) and (name := names[at]) is None:
            again = at, part
            at += 1
        elif at < len(names) and name is not None and name.fullmatch(path[part]):
            at += 1
            part += 1
        elif again is not None:
            at, part = again[0] + 1, again[1] + 1
            again = again[0], part
        else:
            return False
    return all(name is None for name in names[at:])
