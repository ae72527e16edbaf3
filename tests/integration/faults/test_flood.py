"""A publisher that floods: what can be delivered is, what cannot is put away once, and the gateways stay small."""

from __future__ import annotations

import asyncio
from time import monotonic

import aiormq
import orjson
import psutil
import pytest

from orchestrator.database import Wakeup
from orchestrator.eventlog import dead_letters
from orchestrator.events import EXCHANGE
from tests.integration.faults.flow import Flow
from tests.integration.faults.stage import Stage, caught_up
from tests.integration.faults.viewer import p99, prove
from tests.rabbitmq import eventually

pytestmark = [pytest.mark.alone, pytest.mark.timeout(200)]

DEAD_LETTER = "cluster-code.dead-letter"
FLOOD = 20_000
# One of so many is no envelope.
EVERY = 100
HISTORY = 2 << 20


async def flood(url: str, channel: str) -> None:
    """Publish as fast as it goes, without waiting for confirmations, as another service may."""
    connection = await aiormq.connect(url)
    try:
        amqp = await connection.channel(publisher_confirms=False)

        async def publish(body: bytes, key: str) -> None:
            # aiormq writes an id into what it is given.
            properties = aiormq.spec.Basic.Properties(delivery_mode=2)
            await amqp.basic_publish(body, exchange=EXCHANGE, routing_key=key, properties=properties, wait=False)

        for number in range(1, FLOOD + 1):
            body = orjson.dumps(
                {
                    "event_type": "flood.event", "channel": channel,
                    "data": {"n": number, "t": monotonic(), "text": "x" * 200},
                }
            )  # fmt: skip
            await publish(body, "flood.event")
            if number % EVERY == 0:
                await publish(b"{} %d" % number, "flood.broken")
            if number % 500 == 0:
                await asyncio.sleep(0)
    finally:
        await connection.close()


async def test_a_flood_reaches_all_and_what_is_broken_in_it_is_put_away_once(stage: Stage, amqp_url: str) -> None:
    async with stage.gateway(history_bytes=HISTORY) as one, stage.gateway(history_bytes=HISTORY) as other:
        flooded = await stage.audience(4, ["app:flooded"])
        observers = await stage.audience(6, ["app:calm"], measured=True)
        flow = Flow(await stage.log())
        async with flow.flowing(["app:calm"], 100):
            await asyncio.gather(*(viewer.until(lambda v=viewer: v.last("app:calm") > 150) for viewer in observers))
            undisturbed = p99(latency for viewer in observers for latency in viewer.latencies)
            began, memory = monotonic(), psutil.Process().memory_info().rss
            await flood(amqp_url, "app:flooded")
            sent = {"app:flooded": FLOOD}
            await caught_up(flooded, sent)
            disturbed = p99((pair for viewer in observers for pair in viewer.latencies), since=began)
        sent["app:calm"] = flow.sent["app:calm"]
        await caught_up(stage.viewers, sent)
        prove(stage.viewers, sent)
        # Whoever could not read so fast has come back, and been told of nothing that it missed.
        for viewer in stage.viewers:
            assert all(len(segments) == 1 for segments in viewer.segments.values())
        assert all(viewer.connections == 1 for viewer in observers)
        for gateway in (one, other):
            assert gateway.context.history.bytes <= HISTORY
        assert psutil.Process().memory_info().rss - memory < 192 << 20
        # Everything runs in this one process, viewers and publisher too, which have as much to do as the gateways.
        assert disturbed < max(2 * undisturbed, 5.0), (undisturbed, disturbed)

        # Both gateways have met each of them, and each is told of once.
        assert one.context.feed.invalid == other.context.feed.invalid == FLOOD // EVERY

        async def all_are_noted() -> bool:
            return await dead_letters.count(stage.pool) == (FLOOD // EVERY, FLOOD // EVERY)

        await eventually(all_are_noted)
        await put_away(stage)
        assert sorted(await letters(amqp_url)) == sorted(f"{{}} {n}" for n in range(EVERY, FLOOD + 1, EVERY))
        await stage.leave()


async def put_away(stage: Stage) -> None:
    """As orchestrators do it, two of which are there."""
    relays = [
        asyncio.create_task(dead_letters.relay(stage.database, await stage.log(name), Wakeup(), 0.2), name=name)
        for name in ("one", "two")
    ]

    async def none_waits() -> bool:
        return (await dead_letters.count(stage.pool))[1] == 0

    try:
        await eventually(none_waits)
    finally:
        for relay in relays:
            relay.cancel()
        await asyncio.wait(relays)


async def letters(url: str) -> list[str]:
    """The bodies of all dead letters; each has a reason."""
    connection = await aiormq.connect(url)
    try:
        channel = await connection.channel()
        found = []
        while (message := await channel.basic_get(DEAD_LETTER, no_ack=True)).delivery_tag:
            assert message.header.properties.headers["reason"]
            found.append(message.body.decode())
        return found
    finally:
        await connection.close()
