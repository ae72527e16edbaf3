"""Text from outside (a process's output, a provider's message), made fit for PostgreSQL and for JSON."""

from __future__ import annotations

_CUT = " … (cut)"


def clean(text: str, limit: int) -> str:
    """`text` without what PostgreSQL or UTF-8 cannot hold (NUL, lone surrogates: replaced by U+FFFD), cut to `limit`.

    `limit` is in bytes of UTF-8, the mark of a cut included; no character is cut in the middle.
    """
    text = text.replace("\0", "�")
    if text.isascii() and len(text) <= limit:
        return text
    # What was decoded with `surrogateescape` holds surrogates, which UTF-8 forbids.
    encoded = text.encode("utf-8", "surrogatepass").decode("utf-8", "replace").encode()
    if len(encoded) <= limit:
        return encoded.decode()
    return encoded[: limit - len(_CUT.encode())].decode("utf-8", "ignore") + _CUT
