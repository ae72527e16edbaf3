"""How every server under test is told what to publish: small frames over a loopback connection of its own.

    u32 length of what follows | "P" | u16 length of the channel | channel | body      publish the body on the channel
    u32 length of what follows | "S"                                                   answer one line of JSON: `Probe`

Numbers are big-endian. It costs each server the same two slices a message, and none of them an HTTP request.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from collections.abc import Callable
from struct import Struct
from typing import TypeAlias

import orjson

_HEAD = Struct(">IcH")
_LENGTH = Struct(">I")
_TICK = 0.001

# Gets a channel and a body.
Publish: TypeAlias = Callable[[str, bytes], None]


class Probe:
    """How long the loop was away: the longest time between two of its turns, and what the garbage collection took."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._began_collecting = 0.0
        self._clear()
        gc.callbacks.append(self._collecting)

    def _clear(self) -> None:
        self._wall = self._cpu = self._collecting_longest = 0.0
        self._collections = 0
        self._seen = time.perf_counter()
        self._cpu_seen = time.thread_time()

    def start(self) -> None:
        """Begin to look, every millisecond."""
        if self._timer is not None:
            self._timer.cancel()
        self._clear()
        self._timer = self._loop.call_later(_TICK, self._tick)

    def stop(self) -> None:
        """Look no more."""
        gc.callbacks.remove(self._collecting)
        if self._timer is not None:
            self._timer.cancel()

    def _tick(self) -> None:
        now, cpu = time.perf_counter(), time.thread_time()
        self._wall = max(self._wall, now - self._seen - _TICK)
        self._cpu = max(self._cpu, cpu - self._cpu_seen)
        self._seen, self._cpu_seen = now, cpu
        self._timer = self._loop.call_later(_TICK, self._tick)

    def _collecting(self, phase: str, info: dict[str, int]) -> None:
        if info["generation"] != 2:
            return
        if phase == "start":
            self._began_collecting = time.perf_counter()
        else:
            self._collections += 1
            self._collecting_longest = max(self._collecting_longest, time.perf_counter() - self._began_collecting)

    def answer(self) -> bytes:
        """What was seen since `start`, in seconds, as a line of JSON; and begin anew."""
        self._tick_now()
        answer = {
            "pause": self._wall,
            "cpu_pause": self._cpu,
            "collections": self._collections,
            "collection": self._collecting_longest,
        }
        self.start()
        return orjson.dumps(answer, option=orjson.OPT_APPEND_NEWLINE)

    def _tick_now(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._tick()


class Control(asyncio.Protocol):
    """One such connection. `publish` gets the channel and the body."""

    def __init__(self, publish: Publish, probe: Probe) -> None:
        self._publish = publish
        self._probe = probe
        self._kept = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if self._kept:
            data = self._kept + data
        at, end = 0, len(data)
        while end - at >= 4:
            (length,) = _LENGTH.unpack_from(data, at)
            if end - at - 4 < length:
                break
            if length == 1:
                self._transport.write(self._probe.answer())
            else:
                _, _, name = _HEAD.unpack_from(data, at)
                body = at + 7 + name
                self._publish(data[at + 7 : body].decode(), data[body : at + 4 + length])
            at += 4 + length
        self._kept = data[at:]


def publication(channel: bytes, body: bytes) -> bytes:
    """What publishes a body."""
    return _HEAD.pack(3 + len(channel) + len(body), b"P", len(channel)) + channel + body


async def listen(port: int, publish: Publish) -> None:
    """Take such connections on 127.0.0.1:`port` until the process ends."""
    probe = Probe()
    await asyncio.get_running_loop().create_server(lambda: Control(publish, probe), "127.0.0.1", port)


def ports() -> tuple[int, int]:
    """The two arguments that every server under test is given: for browsers, and for this."""
    return int(sys.argv[1]), int(sys.argv[2])
