from __future__ import annotations

import asyncio
import os
from functools import partial
from pathlib import Path

import pytest

from orchestrator.children import output
from orchestrator.children.output import Budget, Capture, Splitter, Stream, Tail, drain, open_pipe, text


def test_lines_are_cut_at_their_ends_however_the_bytes_come() -> None:
    splitter = Splitter()
    lines = []
    for byte in b"one\r\ntwo\n\nthree":
        lines += splitter.feed(bytes([byte]), 10)[0]
    assert lines + splitter.end() == ["one", "two", "", "three"]
    assert splitter.end() == []


def test_a_long_line_is_cut_and_what_follows_it_is_not() -> None:
    splitter = Splitter(limit=10)
    assert splitter.feed(b"x" * 8, 5) == ([], 0)
    assert splitter.feed(b"y" * 1000, 5) == ([], 0)
    assert splitter.feed(b"z\nnext\n", 5) == (["xxxxxxxxyy" + output.CUT, "next"], 0)


def test_a_stream_without_a_line_end_holds_one_line() -> None:
    splitter = Splitter()
    for _ in range(1000):
        splitter.feed(b"x" * 65536, 5)
    assert len(splitter._held) == output.MAX_LINE


def test_lines_over_the_budget_are_counted_and_the_last_beginning_is_kept() -> None:
    splitter = Splitter()
    assert splitter.feed(b"a\nb\nc\nd\ne", 2) == (["a", "b"], 2)
    assert splitter.feed(b"nd\n", 2) == (["end"], 0)


def test_nothing_passes_when_there_is_no_budget() -> None:
    splitter = Splitter()
    assert splitter.feed(b"a\nb\nc", 0) == ([], 2)


def test_carriage_returns_end_lines_where_asked_for() -> None:
    assert Splitter(b"\n\r").feed(b"10%\r20%\rdone\n", 9) == (["10%", "20%", "done"], 0)


def test_bytes_that_are_no_text_are_replaced() -> None:
    assert text(b"a\xffb\0c\xed\xa0\x80\r") == "a\ufffdb\ufffdc\ufffd\ufffd\ufffd"


def test_the_budget_fills_with_time_up_to_its_burst() -> None:
    budget = Budget(0.0, rate=10, burst=20)
    assert budget.left(0.0) == 20
    budget.spend(20)
    assert budget.left(0.5) == 5
    assert budget.left(1000.0) == 20


def test_the_tail_keeps_the_last_lines_and_no_blank_ones() -> None:
    tail = Tail(lines=2, width=5)
    for line in ("one", "two", "  ", "three-and-more"):
        tail.add(line)
    assert str(tail) == "two\nthree" + output.CUT


async def test_a_flood_is_read_slowly_and_told_of_by_number() -> None:
    lines: list[str] = []
    left_out: list[int] = []
    stream, write = await open_pipe(partial(Stream, lines.append, left_out.append))
    stream._budget = Budget(asyncio.get_running_loop().time(), rate=0.0, burst=3)
    try:
        await asyncio.to_thread(os.write, write, b"line\n" * 12000)
    finally:
        os.close(write)
    await asyncio.wait_for(stream.ended, 5)
    assert lines == ["line"] * 3
    assert left_out == [11997]


async def test_left_out_lines_are_told_before_the_next_that_passes() -> None:
    told: list[object] = []
    stream, write = await open_pipe(partial(Stream, told.append, told.append))
    stream._budget = Budget(0.0, rate=0.0, burst=1)
    stream.data_received(b"a\nb\nc\n")
    stream._budget = Budget(0.0, rate=0.0, burst=9)
    stream.data_received(b"d\n")
    assert told == ["a", 2, "d"]
    os.close(write)
    await drain(stream, timeout=1)


async def test_who_holds_a_pipe_open_is_not_waited_for() -> None:
    lines: list[str] = []
    stream, write = await open_pipe(partial(Stream, lines.append, lines.append))
    os.write(write, b"unended")
    try:
        await drain(stream, timeout=0.05)
        await asyncio.wait_for(stream.ended, 2)
    finally:
        os.close(write)
    assert lines == ["unended"]


async def test_a_slowed_pipe_can_be_closed() -> None:
    stream, write = await open_pipe(partial(Stream, lambda line: None, lambda lines: None))
    stream.data_received(b"x" * (8 << 20))
    stream.close()
    await asyncio.wait_for(stream.ended, 2)
    os.close(write)


async def test_a_capture_keeps_the_first_bytes() -> None:
    capture, write = await open_pipe(partial(Capture, 5))
    os.write(write, b"1234567")
    os.close(write)
    await asyncio.wait_for(capture.ended, 2)
    assert capture.output == b"12345"
    capture.close()


async def test_a_pipe_that_cannot_be_read_leaves_no_descriptor() -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))

    def broken() -> Stream:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        await open_pipe(broken)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before
