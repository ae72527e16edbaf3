"""Frames as a client may send them, cut anywhere: held against a second reading of RFC 6455, written for this test."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.realtime import frames
from gateway.realtime.frames import FrameError, Reader

LIMIT = 300
MASK = b"\x01\x80\xff\x10"


@dataclass(frozen=True)
class Frame:
    """One frame; with the defaults, a right one. `form`: how many bytes the length is written in (0: the fewest)."""

    opcode: int
    payload: bytes = b""
    final: bool = True
    reserved: int = 0
    masked: bool = True
    form: int = 0

    @property
    def data(self) -> bytes:
        length = len(self.payload)
        form = self.form or (1 if length < 126 else 2 if length < 1 << 16 else 8)
        head = bytes([self.final << 7 | self.reserved << 4 | self.opcode])
        bit = 0x80 if self.masked else 0
        head += bytes([bit | {1: length, 2: 126, 8: 127}[form]]) + (length.to_bytes(form, "big") if form > 1 else b"")
        if not self.masked:
            return head + self.payload
        return head + MASK + bytes(byte ^ MASK[place % 4] for place, byte in enumerate(self.payload))


def read(reader: Reader, *pieces: bytes) -> tuple[list[tuple[int, bytes, int]], int | None]:
    """Everything that these pieces hold, and the code at which they end when they do."""
    found: list[tuple[int, bytes, int]] = []
    try:
        for piece in pieces:
            reader.feed(piece)
            while (message := reader.next()) is not None:
                found.append(tuple(message))
    except FrameError as error:
        return found, error.code
    return found, None


def expected(sent: list[Frame]) -> tuple[list[tuple[int, bytes, int]], int | None]:
    """What RFC 6455 makes of them."""
    found: list[tuple[int, bytes, int]] = []
    text: bytes | None = None
    for frame in sent:
        shortest = 1 if len(frame.payload) < 126 else 2
        is_control = frame.opcode >= 8
        if frame.reserved or frame.opcode not in (0, 1, 2, 8, 9, 10) or (is_control and not frame.final):
            return found, 1002
        if not is_control and (frame.opcode == 0) == (text is None):
            return found, 1002
        if frame.opcode == 2:
            return found, 4501
        if not frame.masked or (is_control and (len(frame.payload) > 125 or frame.form > 1)):
            return found, 1002
        if frame.form > shortest:
            return found, 1002
        if is_control:
            code = 0
            if frame.opcode == 8:
                code, wrong = close_code(frame.payload)
                if wrong:
                    return found, wrong
            found.append((frame.opcode, frame.payload[2:] if frame.opcode == 8 else frame.payload, code))
            continue
        if len(text or b"") + len(frame.payload) > LIMIT:
            return found, 4501
        text = (text or b"") + frame.payload
        if frame.final:
            if not is_utf8(text):
                return found, 1007
            found.append((1, text, 0))
            text = None
    return found, None


def close_code(payload: bytes) -> tuple[int, int | None]:
    if not payload:
        return 1005, None
    code = int.from_bytes(payload[:2], "big")
    allowed = {1000, 1001, 1002, 1003, *range(1007, 1015), *range(3000, 5000)}
    if len(payload) == 1 or code not in allowed:
        return 0, 1002
    return code, None if is_utf8(payload[2:]) else 1007


def is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def cut(data: bytes, places: list[int]) -> list[bytes]:
    ends = sorted({place % (len(data) + 1) for place in places} | {0, len(data)})
    return [data[start:end] for start, end in pairwise(ends)]


PAYLOADS = st.one_of(
    st.binary(max_size=8),
    st.text(max_size=40).map(str.encode),
    st.sampled_from([b"", b"x" * 124, b"x" * 125, b"x" * 126, b"x" * LIMIT, b"x" * (LIMIT + 1), "ä€😀".encode()]),
    st.integers(0, 65535).flatmap(lambda code: st.binary(max_size=6).map(lambda rest: code.to_bytes(2, "big") + rest)),
)
USUALLY = st.sampled_from([True] * 9 + [False])
RIGHT = st.builds(Frame, st.sampled_from([0, 1, 1, 8, 9, 10]), PAYLOADS, st.booleans())
ANY = st.builds(
    Frame,
    st.integers(0, 15),
    PAYLOADS,
    USUALLY,
    st.sampled_from([0] * 9 + [1, 2, 4]),
    USUALLY,
    st.sampled_from([0, 0, 0, 2, 8]),
).filter(lambda frame: not (frame.form == 2 and len(frame.payload) >= 1 << 16))


@given(st.lists(st.one_of(RIGHT, ANY), max_size=8), st.lists(st.integers(0, 1 << 16), max_size=12))
@settings(max_examples=600, deadline=None)
def test_any_frames_cut_anywhere_are_read_as_the_rfc_says(sent: list[Frame], places: list[int]) -> None:
    data = b"".join(frame.data for frame in sent)
    messages, code = expected(sent)
    assert read(Reader(LIMIT), *cut(data, places)) == (messages, code)


@given(st.binary(max_size=400), st.lists(st.integers(0, 400), max_size=6))
@settings(max_examples=300, deadline=None)
def test_garbage_ends_in_the_same_code_however_it_is_cut(data: bytes, places: list[int]) -> None:
    whole, pieces = read(Reader(LIMIT), data), read(Reader(LIMIT), *cut(data, places))
    assert whole == pieces
    assert whole[1] in (None, 1002, 1007, 4501)


CONVERSATION = [
    Frame(1, b'{"action":"ping"}'),
    Frame(1, "Grüße, ".encode()[:3], final=False),
    Frame(9, b"in between"),
    Frame(0, "Grüße, ".encode()[3:], final=False),
    Frame(0, b"", final=False),
    Frame(10, b""),
    Frame(0, "Welt 😀".encode()),
    Frame(1, b"x" * 126),
    Frame(8, (1000).to_bytes(2, "big") + "tschüß".encode()),
]
CONVERSED = [
    (1, b'{"action":"ping"}', 0),
    (9, b"in between", 0),
    (10, b"", 0),
    (1, "Grüße, Welt 😀".encode(), 0),
    (1, b"x" * 126, 0),
    (8, "tschüß".encode(), 1000),
]


def test_every_cut_of_a_conversation_gives_the_same() -> None:
    data = b"".join(frame.data for frame in CONVERSATION)
    for place in range(len(data) + 1):
        assert read(Reader(LIMIT), data[:place], data[place:]) == (CONVERSED, None)
    for size in (1, 2, 3, 7):
        pieces = [data[place : place + size] for place in range(0, len(data), size)]
        assert read(Reader(LIMIT), *pieces) == (CONVERSED, None)


@pytest.mark.parametrize(
    ("head", "code"),
    [
        (b"\xc1", 1002),
        (b"\xa1", 1002),
        (b"\x91", 1002),
        (b"\x83", 1002),
        (b"\x8b", 1002),
        (b"\x80", 1002),
        (b"\x00", 1002),
        (b"\x08", 1002),
        (b"\x09", 1002),
        (b"\x82", 4501),
        (b"\x02", 4501),
        (b"\x81\x05", 1002),
        (b"\x89\xfe", 1002),
        (b"\x88\xff", 1002),
        (b"\x81\xfe\x00\x7d", 1002),
        (b"\x81\xfe\x01\x2d", 4501),
        (b"\x81\xff" + (65535).to_bytes(8, "big"), 1002),
        (b"\x81\xff" + (1 << 40).to_bytes(8, "big"), 4501),
        (b"\x81\xff" + (1 << 63).to_bytes(8, "big"), 1002),
    ],
)
def test_what_is_wrong_is_told_by_the_first_byte_that_shows_it(head: bytes, code: int) -> None:
    assert read(Reader(LIMIT), *(bytes([byte]) for byte in head[:-1])) == ([], None)
    assert read(Reader(LIMIT), head) == ([], code)


def test_empty_fragments_without_end_take_no_memory() -> None:
    reader = Reader(LIMIT)
    assert read(reader, Frame(1, b"x", final=False).data) == ([], None)
    empty = Frame(0, b"", final=False).data
    for _ in range(1000):
        assert read(reader, empty * 100) == ([], None)
    assert reader.waiting == 0
    assert len(reader._text or b"") == 1
    assert read(reader, Frame(0, b"y").data) == ([(1, b"xy", 0)], None)


def test_nothing_is_kept_of_what_is_read() -> None:
    reader = Reader(LIMIT)
    frame = Frame(1, b"x" * 200).data
    read(reader, frame + frame[:50])
    assert reader.waiting == 50
    read(reader, frame[50:])
    assert reader.waiting == 0
    assert reader._data == b""


@given(st.binary(max_size=1000), st.binary(min_size=4, max_size=4))
def test_a_mask_is_taken_off_by_putting_it_on_again(payload: bytes, mask: bytes) -> None:
    masked = frames.unmask(payload, mask)
    assert masked == bytes(byte ^ mask[place % 4] for place, byte in enumerate(payload))
    assert frames.unmask(masked, mask) == payload
