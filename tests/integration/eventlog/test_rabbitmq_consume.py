"""Queues of our own beside the log: in order, one at a time, nothing lost, what is broken put away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress

import pytest

from orchestrator.errors import LogUnavailable, SettingsError
from orchestrator.eventlog.rabbitmq import Delivery, RabbitLog, Undeliverable
from tests.integration.eventlog.rabbit import PATIENCE, opened, plainly, send
from tests.rabbitmq import Server

QUEUE = "cluster-code.users"
KEYS = ("auth.user.*",)


class Handler:
    """Keeps what it is given; `fail` says what to raise for one message, if anything."""

    def __init__(self, fail: Callable[[Delivery], Exception | None] = lambda _: None) -> None:
        self.handled: list[Delivery] = []
        self.calls = 0
        self.running = 0
        self.fail = fail
        self._changed = asyncio.Event()

    async def __call__(self, delivery: Delivery) -> None:
        self.calls += 1
        self.running += 1
        assert self.running == 1, "one at a time"
        await asyncio.sleep(0)
        self.running -= 1
        self._changed.set()
        if error := self.fail(delivery):
            raise error
        self.handled.append(delivery)

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    def bodies(self) -> list[bytes]:
        return [delivery.body for delivery in self.handled]


@asynccontextmanager
async def consuming(log: RabbitLog, handler: Handler, keys: Sequence[str] = KEYS) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(log.consume(QUEUE, keys, handler))
    try:
        yield task
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError, LogUnavailable):
            await task


async def bound(rabbitmq_server: Server, vhost: str) -> None:
    """Wait until the queue is there: what is published before, is not for it."""
    async with asyncio.timeout(PATIENCE):
        while True:
            found = await rabbitmq_server.call("GET", f"bindings/{vhost}")
            if any(each["destination"] == QUEUE and each["routing_key"] == KEYS[0] for each in found):
                return
            await asyncio.sleep(0.02)


async def test_messages_come_in_order_one_at_a_time_and_wait_while_nobody_consumes(
    amqp_url: str, rabbitmq_server: Server, vhost: str
) -> None:
    handler = Handler()
    async with opened(amqp_url) as log:
        async with consuming(log, handler):
            await bound(rabbitmq_server, vhost)
        for number in range(20):
            await send(amqp_url, "auth.user.created", b"%d" % number, message_id=f"id-{number}")
        await send(amqp_url, "auth.other.created", b"for nobody")
        async with consuming(log, handler):
            await handler.until(lambda: len(handler.handled) == 20)
            assert handler.bodies() == [b"%d" % number for number in range(20)]
            assert handler.handled[3] == Delivery("auth.user.created", "id-3", b"3")
            await send(amqp_url, "auth.user.deleted", b"last")
            await handler.until(lambda: len(handler.handled) == 21)
        assert handler.calls == 21


async def test_one_that_will_never_do_is_put_away_and_the_next_ones_come(
    amqp_url: str, rabbitmq_server: Server, vhost: str
) -> None:
    handler = Handler(lambda delivery: Undeliverable("no JSON") if delivery.body == b"broken" else None)
    async with opened(amqp_url) as log, consuming(log, handler):
        await bound(rabbitmq_server, vhost)
        await send(amqp_url, "auth.user.created", b"broken", message_id="one")
        await send(amqp_url, "auth.user.created", b"good")
        await send(amqp_url, "auth.user.created", b"x" * ((1 << 20) + 1))
        await send(amqp_url, "auth.user.created", b"good")
        await handler.until(lambda: len(handler.handled) == 2)
        async with plainly(amqp_url) as channel:
            first = await channel.basic_get("cluster-code.dead-letter", no_ack=True)
            second = await channel.basic_get("cluster-code.dead-letter", no_ack=True)
            assert (first.body, first.header.properties.message_id) == (b"broken", "one")
            assert first.header.properties.headers["reason"] == "no JSON"
            assert first.header.properties.headers["routing-key"] == "auth.user.created"
            assert second.header.properties.headers["reason"] == "a body of 1048577 bytes is longer than 1048576"


async def test_one_that_cannot_be_handled_now_is_tried_again_and_the_others_wait(
    amqp_url: str, rabbitmq_server: Server, vhost: str
) -> None:
    handler = Handler(lambda _: LogUnavailable("staged") if handler.calls < 4 else None)
    async with opened(amqp_url) as log, consuming(log, handler):
        await bound(rabbitmq_server, vhost)
        for number in range(3):
            await send(amqp_url, "auth.user.updated", b"%d" % number)
        await handler.until(lambda: len(handler.handled) == 3)
        assert handler.bodies() == [b"0", b"1", b"2"]
        assert handler.calls == 6


async def test_one_that_was_being_handled_when_its_consumer_ended_goes_to_the_next(
    amqp_url: str, rabbitmq_server: Server, vhost: str
) -> None:
    stuck = Handler(lambda _: RuntimeError("staged"))
    next_one = Handler()
    async with opened(amqp_url) as one, opened(amqp_url) as two, consuming(one, stuck):
        await bound(rabbitmq_server, vhost)
        await send(amqp_url, "auth.user.updated", b"0")
        # The one that has come first has the messages: it must have, before the other comes.
        await stuck.until(lambda: stuck.calls)
        async with consuming(two, next_one):
            for number in (1, 2):
                await send(amqp_url, "auth.user.updated", b"%d" % number)
            await stuck.until(lambda: stuck.calls >= 2)
            assert next_one.calls == 0
            await one.close()
            await next_one.until(lambda: len(next_one.handled) == 3)
            assert next_one.bodies() == [b"0", b"1", b"2"]


async def test_closed_connections_lose_no_message(amqp_url: str, rabbitmq_server: Server, vhost: str) -> None:
    handler = Handler()
    async with opened(amqp_url) as log, consuming(log, handler):
        await bound(rabbitmq_server, vhost)
        async with plainly(amqp_url) as channel:
            for number in range(200):
                await channel.basic_publish(
                    b"%d" % number, exchange="apps.clusterix-code-v1", routing_key="auth.user.created"
                )
        closed = 0
        async with asyncio.timeout(PATIENCE):
            while closed < 2:
                closed += await rabbitmq_server.close_connections(vhost)
        await handler.until(lambda: b"199" in handler.bodies())
        assert list(dict.fromkeys(handler.bodies())) == [b"%d" % number for number in range(200)]


async def test_a_queue_with_other_arguments_is_told(amqp_url: str) -> None:
    async with plainly(amqp_url) as channel:
        await channel.queue_declare("cluster-code.other", durable=True)
    async with opened(amqp_url) as log:
        with pytest.raises(SettingsError, match=r"'cluster-code\.other' with x-single-active-consumer none"):
            await log.consume("cluster-code.other", KEYS, Handler())


async def test_a_consumer_ends_at_whatever_moment_of_its_start_it_is_cancelled(amqp_url: str) -> None:
    async with opened(amqp_url) as log:
        for steps in range(0, 150, 5):
            task = asyncio.create_task(log.consume(QUEUE, KEYS, Handler()))
            for _ in range(steps):
                await asyncio.sleep(0.0002)
            task.cancel()
            await asyncio.wait([task], timeout=PATIENCE)
            assert task.cancelled(), steps


async def test_a_closed_log_ends_its_consumers(amqp_url: str, rabbitmq_server: Server, vhost: str) -> None:
    async with opened(amqp_url) as log:
        task = asyncio.create_task(log.consume(QUEUE, KEYS, Handler()))
        await bound(rabbitmq_server, vhost)
        await log.close()
        with pytest.raises(LogUnavailable):
            await asyncio.wait_for(task, PATIENCE)
