"""Patterns of foreign channels that a token may name: `app:7`, or `app:*` for all that begin with `app:`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from auth.errors import Unacceptable

MAX_PATTERNS = 128
_PATTERN = re.compile(r"[A-Za-z0-9_.-]{1,64}:[!-)+-~]{0,134}\*?")


def check_patterns(patterns: Sequence[str]) -> tuple[str, ...]:
    """The patterns, when each is well-formed. Raises Unacceptable(field="channels") with the first that is not."""
    if len(patterns) > MAX_PATTERNS:
        raise Unacceptable(f"At most {MAX_PATTERNS} channels can be named, not {len(patterns)}.", field="channels")
    for pattern in patterns:
        if not _PATTERN.fullmatch(pattern) or pattern.endswith(":"):
            raise Unacceptable(
                f"{pattern[:200]!r} is no channel: write kind:id, or kind:* for all of a kind.", field="channels"
            )
    return tuple(patterns)


def covers(held: Iterable[str], wanted: str) -> bool:
    """Whether one of the patterns `held` names the channel `wanted`, or all that the pattern `wanted` does."""
    return any(wanted.startswith(pattern[:-1]) if pattern.endswith("*") else wanted == pattern for pattern in held)
