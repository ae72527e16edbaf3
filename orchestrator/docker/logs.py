"""What a container has written, line by line, as its engine keeps it."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from urllib.parse import quote

from orchestrator.docker.connection import Connection, Stream
from orchestrator.errors import EngineRefused

# Of a line, in bytes; what is longer is cut, since what runs there is not trusted.
LONGEST = 1024 * 1024
# Engines keep a longer line in parts of this size, each with its time before it.
_PART = 16 * 1024
# The times of two streams are not quite in the order that they are told in.
_OVERLAP = timedelta(milliseconds=10)
_STREAMS = {1: "stdout", 2: "stderr"}
# What is shorter holds no time and no space after it: `2026-01-01T00:00:00.000000000Z `.
_STAMP = 31

# The stream (`stdout` or `stderr`; a terminal's is `stdout`), when it was written, and the line without its end.
LogLine = tuple[str, datetime, str]


async def read(
    connection: Connection, container: str, *, follow: bool, since: datetime | None, tail: int | None
) -> AsyncGenerator[LogLine, None]:
    """See `Engine.logs`."""
    told: deque[LogLine] = deque()
    async with aclosing(_read(connection, container, follow=follow, since=since, tail=tail)) as lines:
        async for line in lines:
            yield line
            if follow:
                told.append(line)
                while told[0][1] < line[1] - _OVERLAP:
                    told.popleft()
    if not follow or (tail == 0 and not told):
        return
    # Engines stop following a container that ends before they have told its last lines.
    again = Counter(told)
    since = max(at for _, at, _ in told) - _OVERLAP if told else since
    try:
        async with aclosing(_read(connection, container, follow=False, since=since, tail=None)) as lines:
            async for line in lines:
                if again[line]:
                    again[line] -= 1
                else:
                    yield line
    except EngineRefused as error:
        # It was removed meanwhile.
        if error.status not in (404, 409):
            raise


async def _read(
    connection: Connection, container: str, *, follow: bool, since: datetime | None, tail: int | None
) -> AsyncGenerator[LogLine, None]:
    path = f"/containers/{quote(container, safe='')}"
    terminal = (await connection.json("GET", f"{path}/json"))["Config"]["Tty"]
    params = {"follow": follow, "stdout": True, "stderr": True, "timestamps": True}
    wanted = params | {"since": since and _seconds(since), "tail": None if tail is None else str(tail)}
    # A container that says nothing is not silent by fault; what is there already comes at once.
    idle = None if follow else connection.timeout
    async with connection.stream(
        "GET", f"{path}/logs", params=wanted, begin=float("inf") if follow else None, idle=idle
    ) as stream:
        lines = {number: _Lines(name) for number, name in _STREAMS.items()}
        async with aclosing(_parts(stream, terminal)) as parts:
            async for number, part in parts:
                if number not in lines:
                    raise EngineRefused(500, part.decode("utf-8", "replace").strip())
                for line in lines[number].take(part):
                    yield line
        for rest in lines.values():
            for line in rest.take(b"\n" if rest.begun else b""):
                yield line


async def _parts(stream: Stream, terminal: bool) -> AsyncGenerator[tuple[int, bytes], None]:
    if not terminal:
        async for frame in stream.frames():
            yield frame
        return
    while data := await stream.read():
        yield 1, data


class _Lines:
    """Puts the lines of one stream together from what comes, and takes the times out of them."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._begun = bytearray()

    @property
    def begun(self) -> bool:
        """Whether there is a line that has not ended."""
        return bool(self._begun)

    def take(self, data: bytes) -> Iterator[LogLine]:
        """The lines that end in `data`."""
        *ended, rest = data.split(b"\n")
        for part in ended:
            self._add(part)
            if self._begun:
                yield self._line()
            self._begun.clear()
        self._add(rest)

    def _add(self, part: bytes) -> None:
        # The times within count, too.
        self._begun += part[: LONGEST + LONGEST // 256 - len(self._begun)]

    def _line(self) -> LogLine:
        whole = bytes(self._begun)
        at = _time(whole) or datetime.now(UTC)
        text = _without_times(whole).removesuffix(b"\r")[:LONGEST]
        return self._name, at, text.decode("utf-8", "replace").replace("\0", "�")


def _without_times(line: bytes) -> bytes:
    parts = []
    while _time(line) is not None:
        line = line[_STAMP:]
        parts.append(line[:_PART])
        line = line[_PART:]
    return b"".join(parts) + line


def _time(line: bytes) -> datetime | None:
    if len(line) < _STAMP or line[_STAMP - 1 : _STAMP] != b" " or line[_STAMP - 2 : _STAMP - 1] != b"Z":
        return None
    try:
        # It has nanoseconds, which a datetime has not.
        return datetime.fromisoformat(line[: _STAMP - 5].decode("ascii")).replace(tzinfo=UTC)
    except ValueError:
        return None


def _seconds(at: datetime) -> str:
    whole = at.astimezone(UTC)
    return f"{int(whole.timestamp())}.{whole.microsecond:06}000"
