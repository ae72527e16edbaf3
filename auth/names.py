"""What people may call themselves and their things: text that PostgreSQL can store and a list can show on one line."""

from __future__ import annotations

import re
import unicodedata

from auth.errors import Unacceptable

LONGEST_NAME = 200
# RFC 5321, 4.5.3.1.3: a path of 256 octets with its two angle brackets.
LONGEST_EMAIL = 254
_EMAIL = re.compile(r"[^@\s]{1,64}@[^@\s.]+(\.[^@\s.]+)*")


def clean(value: str, *, field: str, longest: int = LONGEST_NAME) -> str:
    """`value` without the blanks around it. Raises Unacceptable(field) when it is empty, too long or not printable."""
    value = value.strip()
    if not 0 < len(value) <= longest:
        raise Unacceptable(f"{field!r} must have 1 to {longest} characters; this has {len(value)}.", field=field)
    if any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in value):
        raise Unacceptable(f"{field!r} must hold no control characters, line breaks or lone surrogates.", field=field)
    return value


def clean_email(value: str) -> str:
    """`value` without the blanks around it, in the case it was given. Raises Unacceptable(field="email").

    Only the shape is checked: whether mail arrives there is for a mail to find out. A domain without a dot is fine:
    `admin@localhost` is what a fresh installation has.
    """
    value = clean(value, field="email", longest=LONGEST_EMAIL)
    if not _EMAIL.fullmatch(value):
        raise Unacceptable("'email' must look like name@example.org.", field="email")
    return value
