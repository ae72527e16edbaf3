"""What other services put into the log, and how it is read."""

from __future__ import annotations

import asyncio
from struct import pack

import aiormq
import orjson

from orchestrator.eventlog.rabbitmq import DeadLetter
from tests.integration.eventlog.contract import numbered, numbers_of, read
from tests.integration.eventlog.rabbit import opened, plainly, reading, send, send_raw

ENVELOPE = b'{"event_type":"app.opened","channel":"app:1","data":{"n":1}}'


async def test_an_envelope_of_another_service_is_an_entry(amqp_url: str) -> None:
    async with opened(amqp_url) as log:
        await send(amqp_url, "other.key", ENVELOPE, message_id="one", headers={"x": "y", "n": 5, "t": {"a": [1]}})
        await send(amqp_url, "other.key", ENVELOPE, message_id="two", content_encoding="utf-8", priority=3, app_id="a")
        first, second = await read(log, 0, 2)
        assert (first.offset, first.event_id, first.event_type, first.channel) == (1, "one", "app.opened", "app:1")
        assert (first.body, first.invalid) == (ENVELOPE, "")
        assert (second.offset, second.event_id, second.invalid) == (2, "two", "")


async def test_headers_that_make_no_sense_here_stop_no_reader(amqp_url: str) -> None:
    # A moment in the year 55,000 (microseconds, where seconds are meant), and a name that is no UTF-8.
    table = b"\x04whenT" + pack(">Q", 1_700_000_000_000_000) + b"\x02\xff\xfet\x01" + b"\x01aA\0\0\0\x02t\x01"
    async with opened(amqp_url) as log:
        await send_raw(amqp_url, "other.key", ENVELOPE, pack(">HL", 0x2000, len(table)) + table)
        await send(amqp_url, "other.key", ENVELOPE, message_id="next")
        first, second = await read(log, 0, 2)
        assert (first.offset, first.channel) == (1, "app:1")
        assert (second.offset, second.event_id) == (2, "next")


async def test_a_message_without_an_id_gets_the_same_one_from_every_reader(amqp_url: str) -> None:
    async with opened(amqp_url) as log, opened(amqp_url) as other:
        async with plainly(amqp_url) as channel:
            properties = aiormq.spec.Basic.Properties(delivery_mode=2)
            # aiormq makes an id where there is none: an empty one, that it takes for its own, is none on the wire.
            properties.message_id = _Nothing("")
            await channel.basic_publish(
                ENVELOPE, exchange="apps.clusterix-code-v1", routing_key="a", properties=properties
            )
        (entry,) = await read(log, 0, 1)
        assert entry.event_id == f"{log.epoch}-1"
        assert await read(other, 0, 1) == [entry]


class _Nothing(str):
    """An empty string that is true."""

    def __bool__(self) -> bool:
        return True


async def test_what_is_no_envelope_is_told_with_the_reason_and_stops_nothing(amqp_url: str) -> None:
    large = b'{"event_type":"a","channel":"b:1","data":"' + b"x" * (1 << 20) + b'"}'
    async with opened(amqp_url) as log:
        await send(amqp_url, "a.b", b"hello", message_id="one")
        await send(amqp_url, "a.b", b"", message_id="two")
        await send(amqp_url, "a.b", ENVELOPE, message_id="three", content_encoding="gzip")
        await send(amqp_url, "a.b", large, message_id="four")
        await send(amqp_url, "a.b", b'{"event_type":"a","channel":"b:1"}', message_id="five")
        await log.publish(numbered([6]))
        entries = await read(log, 0, 6)
        assert [entry.offset for entry in entries] == [1, 2, 3, 4, 5, 6]
        assert [entry.channel for entry in entries] == [""] * 5 + ["session:1"]
        assert [entry.event_type for entry in entries[:5]] == ["a.b"] * 5
        reasons = [entry.invalid for entry in entries]
        assert reasons[0].startswith("not JSON")
        assert reasons[1].startswith("not JSON")
        assert reasons[2] == "a body with the content encoding 'gzip' is not read"
        assert reasons[3] == f"a body of {len(large)} bytes is longer than 1048576"
        assert entries[3].body == large[: 64 << 10]
        assert reasons[4] == "'data' is missing"
        assert reasons[5] == ""


async def test_the_largest_body_that_is_taken_comes_whole(amqp_url: str) -> None:
    body = b'{"event_type":"a","channel":"b:1","data":"%b"}'
    body = body % (b"x" * ((1 << 20) - len(body) + 2))
    assert len(body) == 1 << 20
    async with opened(amqp_url) as log:
        await send(amqp_url, "a.b", body, message_id="one")
        (entry,) = await read(log, 0, 1)
        assert (entry.body == body, entry.invalid) == (True, "")


async def test_messages_about_users_are_passed_over(amqp_url: str) -> None:
    async with opened(amqp_url) as log:
        await send(amqp_url, "auth.user.created", b"no envelope")
        await send(amqp_url, "auth", b"")
        await send(amqp_url, "auth.user.updated", ENVELOPE)
        await send(amqp_url, "authentic", b"no envelope")
        entries = await read(log, 0, 4)
        assert [(entry.channel, bool(entry.invalid)) for entry in entries] == [("", False)] * 3 + [("", True)]


async def test_the_marks_of_one_log_are_nothing_to_itself_and_for_nobody_to_others(amqp_url: str) -> None:
    async with opened(amqp_url) as log, opened(amqp_url) as other:
        assert await log.head() == 0
        assert await log.head() == 0
        await log.publish(numbered([1]))
        head = await log.head()
        assert head == 3
        assert [entry.offset for entry in await read(log, 0, 1)] == [3]
        entries = await read(other, 0, 4)
        assert [entry.offset for entry in entries] == [1, 2, 3, 4]
        assert [entry.channel for entry in entries] == ["", "", "session:1", ""]
        assert not any(entry.invalid for entry in entries)
        assert await other.head() == 4


async def test_a_reader_ahead_of_the_log_gets_what_comes_there(amqp_url: str) -> None:
    async with opened(amqp_url) as log:
        await log.publish(numbered(range(3)))
        async with reading(log, 5) as found:
            await log.publish(numbered(range(3, 10)))
            await found.until(lambda: len(found.entries) >= 5)
            assert [entry.offset for entry in found.entries] == [6, 7, 8, 9, 10]
            assert numbers_of(found.entries) == [5, 6, 7, 8, 9]


async def test_a_reader_that_does_not_read_keeps_little_and_loses_nothing(amqp_url: str) -> None:
    async with opened(amqp_url) as log:
        await log.publish(numbered([0]))
        reader = log.read(0)
        assert numbers_of(await anext(reader)) == [0]
        text = "x" * 200_000
        for start in range(1, 301, 20):
            events = numbered(range(start, start + 20))
            await log.publish(
                [type(event)("a", "b:1", {"n": event.data["n"], "t": text}, event.id) for event in events]
            )
        (subscription,) = log._subscriptions
        async with asyncio.timeout(30):
            while not subscription._paused:
                await asyncio.sleep(0.01)
        assert subscription._bytes < (16 << 20) + (1 << 20)
        numbers: list[int] = []
        async with asyncio.timeout(40):
            while len(numbers) < 300:
                numbers += [orjson.loads(entry.body)["data"]["n"] for entry in await anext(reader)]
        assert numbers == list(range(1, 301))
        await reader.aclose()


async def test_dead_letters_are_kept_with_their_reason(amqp_url: str) -> None:
    async with opened(amqp_url) as log, plainly(amqp_url) as channel:
        await log.dead_letter([DeadLetter(b"body", "not JSON", "a.b", 7, "id-7")])
        got = await channel.basic_get("cluster-code.dead-letter", no_ack=True)
        assert got.body == b"body"
        assert got.header.properties.message_id == "id-7"
        assert got.header.properties.headers == {
            "reason": "not JSON",
            "routing-key": "a.b",
            "offset": "7",
            "epoch": log.epoch,
        }
        await channel.queue_delete("cluster-code.dead-letter")
        await log.dead_letter([DeadLetter(b"again", "not JSON", "a.b", 8, "id-8")])
        got = await channel.basic_get("cluster-code.dead-letter", no_ack=True)
        assert got.body == b"again"
