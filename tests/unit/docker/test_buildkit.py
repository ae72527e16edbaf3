"""BuildKit's trace, put into words."""

from __future__ import annotations

import random
from contextlib import suppress

import pytest

from orchestrator.docker.buildkit import Trace


def field(number: int, value: bytes | int | str) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)


def vertex(digest: str, name: str, *more: bytes) -> bytes:
    return field(1, field(1, digest) + field(3, name) + b"".join(more))


def log(digest: str, text: str | bytes) -> bytes:
    return field(3, field(1, digest) + field(3, 1) + field(4, text))


def at(number: int, seconds: int, nanos: int = 0) -> bytes:
    return field(number, field(1, seconds) + field(2, nanos))


def words(trace: Trace, *pieces: bytes) -> str:
    return "".join(text for piece in pieces for text in trace.take(piece))


def test_steps_and_their_words_are_told_as_docker_does() -> None:
    trace = Trace()
    began, ended = at(5, 1_700_000_000), at(6, 1_700_000_001, 500_000_000)
    assert words(
        trace,
        vertex("a", "[1/2] FROM x") + vertex("b", "[2/2] RUN make"),
        vertex("a", "[1/2] FROM x", field(4, 1), began, ended),
        vertex("b", "[2/2] RUN make", began),
        log("b", "one\ntw"),
        log("b", "o\x1b[31m"),
        vertex("c", "other", began),
        log("b", b"\xff\n"),
        log("nobody", "unheard"),
        vertex("b", "[2/2] RUN make", began, ended, field(7, "exit code: 1")),
        vertex("c", "other", began, ended),
    ) == (
        "#1 [1/2] FROM x\n#1 CACHED\n#2 [2/2] RUN make\none\ntwo\x1b[31m\n#3 other\n#2 �\n#2 ERROR: exit code: 1\n"
        "#3 DONE 1.5s\n"
    )
    assert trace.failed == ("[2/2] RUN make", "one\ntwo\x1b[31m�\n")


@pytest.mark.random
def test_what_is_no_trace_is_refused() -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    source = random.Random(seed)
    whole = vertex("a", "name", at(5, 1_700_000_000), at(6, 1_700_000_001)) + log("a", "text")
    for _ in range(2000):
        broken = bytearray(whole[: source.randrange(len(whole) + 1)])
        for _ in range(source.randrange(4)):
            if broken:
                broken[source.randrange(len(broken))] = source.randrange(256)
        # Nothing else is raised, and it ends.
        with suppress(ValueError):
            words(Trace(), bytes(broken))
