"""Secrets taken out of a log, also where one is split over two pieces of it, or is shown in another form.

A shell that traces, a client that sends Basic authentication and an URL show a secret in other letters: each form that
is likely is looked for. What may be the beginning of a secret is held back until more of the text tells.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator
from urllib.parse import parse_qsl, quote, quote_plus, unquote, urlsplit

MASK = "***"
# Characters. Shorter ones would blacken all of a log, and are soon guessed. No less than the mask: a log never grows.
SHORTEST = 4
# Characters of a line of a secret that has several: builders show a file line by line, with something before each.
_SHORTEST_LINE = 8
# Forms. More, as a file of many lines has, are not looked for one after the other: that would hold everybody up.
_MANY = 300
# A user without a password, or with so many characters, is a token.
_TOKEN = 20


class Masker:
    """Masks one text, which comes in pieces."""

    def __init__(self, secrets: Iterable[str]) -> None:
        self._forms = sorted({form for secret in secrets for form in _forms(secret)}, key=len, reverse=True)
        # The forms by their first characters, where there are many.
        self._starts: dict[str, list[str]] = {}
        if len(self._forms) > _MANY:
            for form in self._forms:
                self._starts.setdefault(form[:SHORTEST], []).append(form)
        self._hints = {start[:size] for start in self._starts for size in range(1, SHORTEST)}
        # Held back: a beginning of a form. Its first `_covered` characters are of one that was masked already.
        self._held = ""
        self._covered = 0

    @property
    def longest(self) -> int:
        """Characters of the longest form."""
        return len(self._forms[0]) if self._forms else 0

    def feed(self, text: str) -> str:
        """What can be shown of the text so far, beyond what was returned before."""
        text = self._held + text
        end = self._begins(text)
        shown = []
        place = covered = 0
        for start, stop in self._found(text, self._covered):
            if start >= end:
                break
            shown.append(text[place:start])
            if start > 0 or not self._covered:
                shown.append(MASK)
            # Else it goes on with what was masked at the end of the piece before.
            place, covered = min(stop, end), stop
        shown.append(text[place:end])
        self._held, self._covered = text[end:], max(0, max(covered, self._covered) - end)
        return "".join(shown)

    def end(self) -> str:
        """What was held back, at the end of the text: a beginning that tells much of a secret is masked, too."""
        rest, self._held, covered, self._covered = self._held[self._covered :], "", self._covered, 0
        if len(rest) < SHORTEST:
            return rest
        return "" if covered else MASK

    def without_beginning(self, text: str) -> str:
        """The rest of a text that was cut: what the end of a secret may be at its beginning is left out."""
        begin = min(self.longest, len(text))
        for start, stop in self._found(text, 0):
            if start < begin < stop:
                begin = stop
        return text[begin:]

    def _found(self, text: str, covered: int) -> Iterator[tuple[int, int]]:
        """Where the secrets are, in order; those that overlap as one."""
        places = [(0, covered)] if covered else []
        places += self._places(text)
        if not places:
            return
        places.sort()
        start, stop = places[0]
        for begin, end in places[1:]:
            if begin >= stop:
                yield start, stop
                start, stop = begin, end
            else:
                stop = max(stop, end)
        yield start, stop

    def _places(self, text: str) -> Iterator[tuple[int, int]]:
        """Where each form is, in any order."""
        if self._starts:
            for at in range(len(text) - SHORTEST + 1):
                for form in self._starts.get(text[at : at + SHORTEST], ()):
                    if text.startswith(form, at):
                        yield at, at + len(form)
            return
        for form in self._forms:
            at = text.find(form)
            while at >= 0:
                yield at, at + len(form)
                at = text.find(form, at + 1)

    def _begins(self, text: str) -> int:
        """Where in `text` a beginning of any form begins that more text may complete; its end, where none does."""
        if not self._starts:
            return min((_begins(form, text) for form in self._forms), default=len(text))
        for at in range(max(0, len(text) - self.longest + 1), len(text)):
            start = text[at : at + SHORTEST]
            if start in self._hints or any(
                len(form) > len(text) - at and form.startswith(text[at:]) for form in self._starts.get(start, ())
            ):
                return at
        return len(text)


def masked(text: str, secrets: Iterable[str]) -> str:
    """All of a text, its secrets masked."""
    masker = Masker(secrets)
    return masker.feed(text) + masker.end()


def credentials(repo_url: str) -> list[str]:
    """What in a repository's URL must not be seen: the password, a token in its place, the values of the query."""
    try:
        parts = urlsplit(repo_url)
    except ValueError:
        return []
    user, password = parts.username or "", parts.password or ""
    found = [password, *(value for _, value in parse_qsl(parts.query))]
    if parts.scheme != "ssh" and (not password or len(user) >= _TOKEN):
        found.append(user)
    return [form for value in found for form in (value, unquote(value))]


def _begins(form: str, text: str) -> int:
    """Where in `text` a beginning of the form begins that more text may complete; its end, where none does."""
    at = text.find(form[0], max(0, len(text) - len(form) + 1))
    while at >= 0:
        if form.startswith(text[at:]):
            return at
        at = text.find(form[0], at + 1)
    return len(text)


def _forms(secret: str) -> Iterator[str]:
    lines = [line for line in map(str.strip, secret.splitlines()) if len(line) >= _SHORTEST_LINE]
    # Not those that say "this is a key", which every key has.
    parts = [secret, secret.strip(), *(line for line in lines if not line.startswith("-----"))]
    for part in parts:
        if len(part) >= SHORTEST:
            yield part
            yield from (quote(part), quote(part, safe=""), quote_plus(part))
            yield json.dumps(part)[1:-1]
            yield json.dumps(part, ensure_ascii=False)[1:-1]
            yield from filter(lambda form: len(form) >= SHORTEST, _base64(part.encode()))


def _base64(secret: bytes) -> Iterator[str]:
    """What is the same in the base64 of every text that the secret is in, at each of its three places in a group."""
    for before in range(3):
        encoded = base64.b64encode(b"\0" * before + secret).decode()
        known = (8 * (before + len(secret))) // 6
        inner = encoded[(0, 2, 3)[before] : known]
        yield inner
        yield inner.replace("+", "-").replace("/", "_")
