"""Text from outside."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.text import clean


def test_plain_text_stays_as_it_is() -> None:
    assert clean("hello → wörld", 100) == "hello → wörld"


def test_what_postgresql_cannot_hold_is_replaced() -> None:
    assert clean("a\0b", 10) == "a�b"
    assert "\udc80" not in clean("a\udc80b", 20)
    assert clean("a\udc80b", 20).startswith("a�")


@given(st.text(st.characters(exclude_categories=())), st.integers(20, 100))
def test_whatever_comes_is_utf8_within_the_limit(text: str, limit: int) -> None:
    cleaned = clean(text, limit)
    assert len(cleaned.encode()) <= limit
    assert "\0" not in cleaned
