"""The frames of AMQP 0-9-1, in whatever pieces they come."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from pamqp import commands, frame
from pamqp.body import ContentBody
from pamqp.header import ContentHeader
from pamqp.heartbeat import Heartbeat

from orchestrator.eventlog.rabbitmq.wire import (
    MAX_BODY,
    Incoming,
    Lane,
    Lost,
    Publications,
    Taker,
    Wire,
    acknowledgement,
    exchange_check,
    properties,
)


class Notes(Taker):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def delivered(self, deliveries: list[Incoming]) -> None:
        self.told += deliveries

    def returned(self, message_id: str) -> None:
        self.told.append(("returned", message_id))

    def confirmed(self, tag: int, *, multiple: bool, taken: bool) -> None:
        self.told.append(("confirmed", tag, multiple, taken))

    def cancelled(self) -> None:
        self.told.append("cancelled")

    def lost(self, error: Lost) -> None:
        self.told.append((error.reason, error.code))


def delivery(tag: int, key: str, body: bytes, channel: int = 1, part: int = 100, **given: Any) -> bytes:
    header = ContentHeader(body_size=len(body), properties=commands.Basic.Properties(**given))
    frames = [commands.Basic.Deliver("ctag", tag, False, "exchange", key), header]
    frames += [ContentBody(body[at : at + part]) for at in range(0, len(body), part)]
    return b"".join(frame.marshal(each, channel) for each in frames)


async def left(wire: Wire) -> bytes:
    """What aiormq would read."""
    wire.feed_eof()
    return await wire.read()


@pytest.mark.random
async def test_messages_are_whole_in_whatever_pieces_they_come() -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    wire = Wire(asyncio.get_running_loop())
    one, two = Notes(), Notes()
    wire.lanes = {1: Lane(one), 3: Lane(two)}
    stream, others, expected = b"", b"", {1: [], 3: []}
    for tag in range(1, 200):
        channel = draw.choice((1, 3))
        body = draw.randbytes(draw.choice((0, 1, 99, 100, 101, 250)))
        given = {"message_id": f"id-{tag}", "headers": {"x-stream-offset": 1 << 40}}
        stream += delivery(tag, f"key.{tag}", body, channel, **given)
        expected[channel].append((tag, f"key.{tag}", body))
        if draw.random() < 0.3:
            foreign = frame.marshal(
                draw.choice((Heartbeat(), commands.Queue.BindOk(), commands.Channel.OpenOk())), draw.choice((0, 1, 2))
            )
            stream += foreign
            others += foreign
    at = 0
    while at < len(stream):
        size = draw.choice((1, 5, 7, 8, 30, 500, 4_000))
        wire.feed_data(stream[at : at + size])
        at += size
    for channel, notes in ((1, one), (3, two)):
        assert [(each.tag, each.routing_key, each.body) for each in notes.told] == expected[channel]
        assert all(properties(each.properties).offset == 1 << 40 for each in notes.told)
    heartbeat = frame.marshal(Heartbeat(), 0)
    assert (await left(wire)).replace(heartbeat, b"") == others.replace(heartbeat, b"")


async def test_what_a_broker_says_of_messages_is_told() -> None:
    wire, notes = Wire(asyncio.get_running_loop()), Notes()
    wire.lanes = {1: Lane(notes)}
    for said in (
        commands.Basic.Ack(5, True),
        commands.Basic.Ack(6, False),
        commands.Basic.Nack(7, True),
        commands.Basic.Return(312, "NO_ROUTE", "exchange", "key"),
        ContentHeader(body_size=1, properties=commands.Basic.Properties(message_id="id")),
        ContentBody(b"x"),
    ):
        wire.feed_data(frame.marshal(said, 1))
    # These two are aiormq's as well.
    cancel = frame.marshal(commands.Basic.Cancel("ctag", True), 1)
    close = frame.marshal(commands.Channel.Close(404, "NOT_FOUND - no exchange", 60, 40), 1)
    wire.feed_data(cancel)
    wire.feed_data(close)
    assert notes.told == [
        ("confirmed", 5, True, True),
        ("confirmed", 6, False, True),
        ("confirmed", 7, True, False),
        ("returned", "id"),
        "cancelled",
        ("NOT_FOUND - no exchange", 404),
    ]
    assert (await left(wire)).replace(frame.marshal(Heartbeat(), 0), b"") == cancel + close
    assert len(notes.told) == 6, "a loss is told once"


async def test_the_broker_s_own_reason_is_told_to_all() -> None:
    wire, one, two = Wire(asyncio.get_running_loop()), Notes(), Notes()
    wire.lanes = {1: Lane(one), 2: Lane(two)}
    wire.feed_data(frame.marshal(commands.Connection.Blocked("low on memory"), 0))
    assert wire.blocked == "low on memory"
    wire.feed_data(frame.marshal(commands.Connection.Unblocked(), 0))
    assert wire.blocked == ""
    wire.feed_data(frame.marshal(commands.Connection.Close(320, "CONNECTION_FORCED", 0, 0), 0))
    wire.feed_eof()
    assert one.told == two.told == [("CONNECTION_FORCED", 320)]


async def test_a_loss_ends_all_waits_also_beside_one_that_is_just_over() -> None:
    loop = asyncio.get_running_loop()
    wire = Wire(loop)

    async def wait(seconds: float) -> None:
        async with asyncio.timeout(seconds) as deadline:
            wire.deadlines.add(deadline)
            # In the same turn of the loop in which the first is over, and before its task knows.
            await loop.create_future()

    over, *others = [asyncio.create_task(wait(seconds)) for seconds in (0.01, 1000, 1000)]
    await asyncio.sleep(0)
    first = next(each for each in wire.deadlines if each.when() < loop.time() + 10)
    while not first.expired():
        loop.call_soon(lambda: first.expired() and wire.gone is None and wire.lose("cut"))
        await asyncio.sleep(0)
    for task in (over, *others):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(task, 30)


async def test_of_a_body_that_is_too_long_only_the_beginning_is_kept() -> None:
    wire, notes = Wire(asyncio.get_running_loop()), Notes()
    wire.lanes = {1: Lane(notes)}
    body = random.Random(1).randbytes(MAX_BODY + 1)
    wire.feed_data(delivery(1, "key", body, part=100_000))
    wire.feed_data(delivery(2, "key", b"next"))
    first, second = notes.told
    assert (first.size, first.body) == (MAX_BODY + 1, body[: 64 << 10])
    assert (second.size, second.body) == (4, b"next")


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"message_id": "id"},
        {"headers": {"x-stream-offset": 7}},
        {"headers": {"a": "b", "x-stream-offset": 7, "c": [1, {"d": None}]}, "message_id": "id"},
        {
            "content_type": "t" * 255,
            "content_encoding": "gzip",
            "headers": {"x-stream-offset": 1 << 50},
            "delivery_mode": 2,
            "priority": 3,
            "correlation_id": "c",
            "reply_to": "r",
            "expiration": "5",
            "message_id": "\u00e9" * 100,
            "message_type": "m",
            "user_id": "u",
            "app_id": "a",
        },
    ],
)
def test_properties_are_read_whichever_there_are(given: dict[str, Any]) -> None:
    raw = ContentHeader(body_size=0, properties=commands.Basic.Properties(**given)).marshal()[12:]
    found = properties(raw)
    assert found.message_id == given.get("message_id", "")
    assert found.encoding == given.get("content_encoding", "")
    assert found.offset == given.get("headers", {}).get("x-stream-offset", -1)


@pytest.mark.parametrize("size", [0, 1, 92, 93, 1_000])
def test_what_is_published_is_what_another_library_reads(size: int) -> None:
    body = random.Random(size).randbytes(size)
    data = Publications(5, "exchange", 100).frames("k" * 300, "id", body, {"reason": "because", "n": 1})
    frames = []
    while data:
        length, channel, found = frame.unmarshal(data)
        assert channel == 5
        assert length <= 100 or len(frames) < 2
        frames.append(found)
        data = data[length:]
    publish, header, *parts = frames
    assert (publish.exchange, publish.routing_key, publish.mandatory) == ("exchange", "k" * 255, True)
    assert header.body_size == size
    assert header.properties.message_id == "id"
    assert header.properties.delivery_mode == 2
    assert header.properties.content_type == "application/json"
    assert header.properties.headers == {"reason": "because", "n": 1}
    assert b"".join(part.value for part in parts) == body


def test_an_id_that_amqp_cannot_carry_is_refused() -> None:
    with pytest.raises(ValueError, match="255"):
        Publications(1, "exchange", 100).frames("key", "x" * 256, b"")


def test_other_frames_are_what_another_library_writes() -> None:
    assert acknowledgement(258, 1 << 40) == frame.marshal(commands.Basic.Ack(1 << 40, True), 258)
    _, channel, declare = frame.unmarshal(exchange_check(3, "name"))
    assert (channel, declare.exchange, declare.passive, declare.nowait) == (3, "name", True, False)


async def test_another_protocol_is_left_to_aiormq() -> None:
    wire = Wire(asyncio.get_running_loop())
    wire.feed_data(b"AMQP\x00\x01\x00\x00")
    assert await left(wire) == b"AMQP\x00\x01\x00\x00"
