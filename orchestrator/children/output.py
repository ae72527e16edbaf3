"""What a process prints, as lines, in bounded memory and bounded time, whatever it prints."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar, cast

# Bytes of one line; what is longer is cut.
MAX_LINE = 8192
CUT = " … (cut)"
# Lines a second, and how many may come at once: a session that floods its log must not drown the others'.
LINES_PER_SECOND = 1000.0
BURST = 5000.0
# Bytes a second that are read of one stream; a process that prints more waits in its write.
BYTES_PER_SECOND = 4 << 20

_NUL = str.maketrans({"\0": "\N{REPLACEMENT CHARACTER}"})


def text(line: bytes) -> str:
    """A line as text: bytes that are no UTF-8 replaced, and NUL, which PostgreSQL's text cannot hold."""
    return line.rstrip(b"\r").decode(errors="replace").translate(_NUL)


class Splitter:
    """Cuts a stream of bytes into lines; holds at most one line's beginning."""

    def __init__(self, separators: bytes = b"\n", limit: int = MAX_LINE) -> None:
        self._separators = separators
        self._limit = limit
        self._held = bytearray()
        self._cut = False

    def feed(self, data: bytes, most: int) -> tuple[list[str], int]:
        """The first `most` of the lines that `data` ends, and how many more it ends, which are not even looked at."""
        separator = self._separators[:1]
        for other in self._separators[1:]:
            data = data.replace(bytes([other]), separator)
        *ended, rest = data.split(separator, most)
        lines = []
        for piece in ended:
            self._hold(piece)
            lines.append(self._take())
        more = rest.count(separator)
        if more:
            self._clear()
            rest = rest[rest.rindex(separator) + 1 :]
        self._hold(rest)
        return lines, more

    def end(self) -> list[str]:
        """The line that nothing ended, if there is one."""
        return [self._take()] if self._held else []

    def _hold(self, piece: bytes) -> None:
        room = self._limit - len(self._held)
        self._held += piece[:room]
        self._cut = self._cut or len(piece) > room

    def _take(self) -> str:
        line = text(bytes(self._held)) + (CUT if self._cut else "")
        self._clear()
        return line

    def _clear(self) -> None:
        self._held.clear()
        self._cut = False


class Budget:
    """Lines that may pass now: a bucket that fills with time."""

    def __init__(self, now: float, *, rate: float = LINES_PER_SECOND, burst: float = BURST) -> None:
        self._rate, self._burst, self._left, self._at = rate, burst, burst, now

    def left(self, now: float) -> int:
        """How many may pass at this moment."""
        self._left = min(self._burst, self._left + (now - self._at) * self._rate)
        self._at = now
        return int(self._left)

    def spend(self, lines: int) -> None:
        """So many have passed."""
        self._left -= lines


class Pipe(asyncio.Protocol):
    """The read end of a pipe that a process writes to."""

    def __init__(self) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._transport: asyncio.ReadTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport, to slow it down and to close it."""
        # uvloop's transports are no subclasses of asyncio's.
        self._transport = cast("asyncio.ReadTransport", transport)

    def connection_lost(self, error: Exception | None) -> None:
        """The last writer has closed it, or we have."""
        if not self.ended.done():
            self.ended.set_result(None)

    def close(self) -> None:
        """Read no more. A writer that is left gets SIGPIPE."""
        if self._transport is not None:
            self._transport.close()


class Stream(Pipe):
    """A pipe that is read by lines.

    `line` takes each; `left_out` is told how many the budget refused, once lines pass again or the stream ends.
    """

    def __init__(
        self, line: Callable[[str], None], left_out: Callable[[int], None], *, separators: bytes = b"\n"
    ) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self._line = line
        self._left_out = left_out
        self._splitter = Splitter(separators)
        self._budget = Budget(self._loop.time())
        self._refused = 0
        self._resume: asyncio.TimerHandle | None = None

    def data_received(self, data: bytes) -> None:
        """Hand on the lines that are whole, and read no faster than the limit."""
        lines, refused = self._splitter.feed(data, self._budget.left(self._loop.time()))
        self._budget.spend(len(lines))
        self._pass(lines)
        self._refused += refused
        delay = len(data) / BYTES_PER_SECOND
        if delay > 0.005 and self._transport is not None:
            self._transport.pause_reading()
            self._resume = self._loop.call_later(delay, self._transport.resume_reading)

    def connection_lost(self, error: Exception | None) -> None:
        """Hand on what is left."""
        if self._resume is not None:
            self._resume.cancel()
        if self._refused:
            self._left_out(self._refused)
        self._pass(self._splitter.end())
        super().connection_lost(error)

    def close(self) -> None:
        """Read no more."""
        if self._resume is not None:
            self._resume.cancel()
        super().close()

    def _pass(self, lines: list[str]) -> None:
        if lines and self._refused:
            refused, self._refused = self._refused, 0
            self._left_out(refused)
        for line in lines:
            self._line(line)


class Capture(Pipe):
    """A pipe whose first bytes are kept, and the rest thrown away."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._limit = limit
        self._kept = bytearray()

    def data_received(self, data: bytes) -> None:
        """Keep what there is room for."""
        self._kept += data[: self._limit - len(self._kept)]

    @property
    def output(self) -> bytes:
        """What was kept."""
        return bytes(self._kept)


P = TypeVar("P", bound=Pipe)


async def open_pipe(make: Callable[[], P]) -> tuple[P, int]:
    """A pipe: who reads it, and the descriptor to write to, which the caller closes once it is handed on.

    Pipes of our own, because asyncio's process ends for it only when the last grandchild that holds a pipe has ended.
    """
    loop = asyncio.get_running_loop()
    read, write = os.pipe()
    reader = os.fdopen(read, "rb", 0)
    try:
        _, pipe = await loop.connect_read_pipe(make, reader)
    except BaseException:
        reader.close()
        os.close(write)
        raise
    return pipe, write


class Tail:
    """The last lines of a service, for the message about its failure."""

    def __init__(self, lines: int = 10, width: int = 200) -> None:
        self._lines: deque[str] = deque(maxlen=lines)
        self._width = width

    def add(self, line: str) -> None:
        """Keep the line, unless it is blank."""
        if line.strip():
            self._lines.append(line if len(line) <= self._width else line[: self._width] + CUT)

    def clear(self) -> None:
        """Forget all."""
        self._lines.clear()

    def __str__(self) -> str:
        return "\n".join(self._lines)


async def drain(*pipes: Pipe, timeout: float) -> None:
    """Wait for the pipes' ends, at most `timeout` seconds, then close them: somebody else may hold them open."""
    try:
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                for pipe in pipes:
                    await asyncio.shield(pipe.ended)
    finally:
        for pipe in pipes:
            pipe.close()
