from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from auth.channels import check_patterns, covers
from auth.errors import Unacceptable
from auth.names import clean, clean_email


@pytest.mark.parametrize(
    ("given_name", "kept"),
    [
        (" Ann ", "Ann"),
        ("'; DROP TABLE users; --", "'; DROP TABLE users; --"),
        ("$(reboot)", "$(reboot)"),
        ("李", "李"),
    ],
)
def test_names_are_kept_without_the_blanks_around_them(given_name: str, kept: str) -> None:
    assert clean(given_name, field="name") == kept


@pytest.mark.parametrize("wrong", ["", "   ", "x" * 201, "a\x00b", "a\nb", "a\ud800b", "a\u2028b", "\x1b[31mred"])
def test_names_that_cannot_be_stored_or_shown_are_refused(wrong: str) -> None:
    with pytest.raises(Unacceptable) as caught:
        clean(wrong, field="name")
    assert caught.value.field == "name"


@pytest.mark.parametrize("right", ["ann@example.org", "admin@localhost", "o'brien+x@mail.example.co", "λ@πελάτης.gr"])
def test_addresses_that_look_like_addresses_are_taken(right: str) -> None:
    assert clean_email(f" {right}\t") == right


@pytest.mark.parametrize(
    "wrong", ["", "ann", "@example.org", "ann@", "a@b@c", "a b@c", "a@b..c", "a@.b", "a@b.", "a\x00@b", "x" * 65 + "@b",
              "a@" + "b" * 260]
)  # fmt: skip
def test_addresses_that_do_not_are_refused(wrong: str) -> None:
    with pytest.raises(Unacceptable) as caught:
        clean_email(wrong)
    assert caught.value.field == "email"


@given(st.text())
def test_whatever_is_typed_is_kept_or_refused(text: str) -> None:
    for check in (clean_email, lambda value: clean(value, field="name")):
        try:
            kept = check(text)
        except Unacceptable:
            continue
        assert kept == text.strip()
        kept.encode()


@pytest.mark.parametrize("right", ["app:*", "app:7", "app:a/b:c", "My-App_1.0:x*", "a:*"])
def test_patterns_of_channels_are_taken(right: str) -> None:
    assert check_patterns([right]) == (right,)


@pytest.mark.parametrize(
    "wrong", ["", "*", "app", "app:", ":7", "app:*x", "app:a b", "app:\x00", "app:é", "a" * 65 + ":x"]
)
def test_what_is_no_pattern_is_refused(wrong: str) -> None:
    with pytest.raises(Unacceptable):
        check_patterns(["app:*", wrong])


def test_a_pattern_covers_its_channels_and_narrower_patterns() -> None:
    held = ["app:*", "build:7"]
    assert all(covers(held, wanted) for wanted in ("app:1", "app:*", "app:x*", "build:7"))
    assert not any(covers(held, wanted) for wanted in ("application:1", "build:70", "build:*", "build:7*", "app"))
    assert not covers([], "app:1")
