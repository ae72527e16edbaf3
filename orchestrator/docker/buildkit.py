"""What BuildKit tells of a build: its trace, decoded and put into words as `docker build --progress=plain` does.

The trace is `moby.buildkit.v1.StatusResponse` of BuildKit's api/services/control/control.proto, of which we read what
is said here; all else is passed over.

    StatusResponse: 1 vertexes, 2 statuses, 3 logs
    Vertex:         1 digest, 3 name, 4 cached, 5 started, 6 completed, 7 error
    VertexStatus:   1 id, 2 vertex, 4 current, 5 total, 8 completed
    VertexLog:      1 vertex, 4 msg
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

# Of a message: by field number, the values of a field in their order (numbers and times as int, all else as bytes).
Message = dict[int, list[int | bytes]]

# Of what a step said, in characters.
_TAIL = 4000


@dataclass(slots=True)
class _Vertex:
    number: int
    name: str
    started: bool = False
    ended: bool = False
    error: str = ""
    # The end of what it said.
    tail: str = ""


class Trace:
    """One build, as it goes on."""

    def __init__(self) -> None:
        self._vertexes: dict[bytes, _Vertex] = {}
        # Whose words came last, and whether they ended with a line.
        self._speaking: bytes | None = None
        self._line_ended = True

    @property
    def failed(self) -> tuple[str, str]:
        """The name of the step that failed (`[2/3] RUN make`), and the end of what it said; "" while none has."""
        return next(((vertex.name, vertex.tail) for vertex in self._vertexes.values() if vertex.error), ("", ""))

    def take(self, data: bytes) -> Iterator[str]:
        """The words for one piece of the trace. Raises ValueError: it is none."""
        message = decode(data)
        for raw in message.get(1, ()):
            yield from self._vertex(decode(_bytes(raw)))
        for raw in message.get(3, ()):
            yield from self._log(decode(_bytes(raw)))

    def _vertex(self, vertex: Message) -> Iterator[str]:
        digest = _bytes(_last(vertex, 1))
        known = self._vertexes.get(digest)
        if known is None:
            known = self._vertexes[digest] = _Vertex(len(self._vertexes) + 1, _text(_last(vertex, 3)))
        if 5 in vertex and not known.started:
            known.started = True
            yield from self._said(digest, f"{known.name}\n")
        if 6 in vertex and not known.ended:
            known.ended = True
            known.error = _text(_last(vertex, 7))
            yield from self._said(digest, f"{_ending(vertex, known.error)}\n", mark=True)

    def _log(self, log: Message) -> Iterator[str]:
        digest = _bytes(_last(log, 1))
        if (vertex := self._vertexes.get(digest)) is not None:
            text = _bytes(_last(log, 4)).decode("utf-8", "replace")
            vertex.tail = (vertex.tail + text)[-_TAIL:]
            yield from self._said(digest, text)

    def _said(self, digest: bytes, text: str, *, mark: bool = False) -> Iterator[str]:
        if not text:
            return
        before = ""
        if digest != self._speaking or mark:
            before = ("" if self._line_ended else "\n") + f"#{self._vertexes[digest].number} "
        self._speaking, self._line_ended = digest, text.endswith("\n")
        yield before + text


def _ending(vertex: Message, error: str) -> str:
    if error:
        return f"ERROR: {error}"
    if _last(vertex, 4):
        return "CACHED"
    return f"DONE {max(0.0, _time(_last(vertex, 6)) - _time(_last(vertex, 5))):.1f}s"


def decode(data: bytes) -> Message:
    """A message of protocol buffers, undone by one level. Raises ValueError: it is none."""
    found: Message = {}
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        value: int | bytes
        match tag & 7:
            case 0:
                value, at = _varint(data, at)
            case 1:
                value, at = data[at : at + 8], at + 8
            case 2:
                length, at = _varint(data, at)
                value, at = data[at : at + length], at + length
            case 5:
                value, at = data[at : at + 4], at + 4
            case _:
                raise ValueError("it has a field of no kind that there is")
        if at > len(data):
            raise ValueError("it ends within a field")
        found.setdefault(tag >> 3, []).append(value)
    return found


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 64:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError("it ends within a number")


def _last(message: Message, field: int) -> int | bytes:
    return message.get(field, [b""])[-1]


def _bytes(value: int | bytes) -> bytes:
    return value if isinstance(value, bytes) else b""


def _text(value: int | bytes) -> str:
    return _bytes(value).decode("utf-8", "replace")


def _time(value: int | bytes) -> float:
    """A Timestamp (1 seconds, 2 nanoseconds) in seconds."""
    stamp = decode(_bytes(value))
    seconds, nanos = (int(each) if isinstance(each := _last(stamp, field), int) else 0 for field in (1, 2))
    return seconds + nanos / 1e9
