"""The log in RabbitMQ while connections, brokers and streams are taken away: every event counted."""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import pytest

from orchestrator.errors import LogUnavailable
from orchestrator.eventlog.contract import EpochChanged
from orchestrator.eventlog.rabbitmq import RabbitLog
from orchestrator.events import EXCHANGE, Event
from tests.integration.eventlog.contract import numbered, numbers_of, read
from tests.integration.eventlog.rabbit import PATIENCE, Reading, opened, plainly, reading, settings
from tests.proxy import TcpProxy
from tests.rabbitmq import Broker, Server

STREAM = "cluster-code.events"


class Publishing:
    """Publishes numbered events, a few at a time, again and again until each is confirmed, as the outbox does."""

    def __init__(self, log: RabbitLog) -> None:
        self.log = log
        self.confirmed: list[Event] = []
        self.stop = asyncio.Event()
        self._grown = asyncio.Event()

    async def run(self) -> None:
        while not self.stop.is_set():
            events = numbered(range(len(self.confirmed), len(self.confirmed) + 7))
            while True:
                try:
                    await self.log.publish(events)
                    break
                except LogUnavailable:
                    await asyncio.sleep(0.05)
            self.confirmed += events
            self._grown.set()
            await asyncio.sleep(0.002)

    async def more(self, count: int) -> None:
        """Wait until so many more are confirmed."""
        until = len(self.confirmed) + count
        async with asyncio.timeout(PATIENCE):
            while len(self.confirmed) < until:
                self._grown.clear()
                await self._grown.wait()

    def ids(self) -> list[str]:
        return [event.id for event in self.confirmed]


@asynccontextmanager
async def publishing(log: RabbitLog) -> AsyncIterator[Publishing]:
    """The last of its events are confirmed when the body ends."""
    running = Publishing(log)
    task = asyncio.create_task(running.run())
    try:
        yield running
        running.stop.set()
        await asyncio.wait_for(task, PATIENCE)
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def all_arrived(found: Reading, sent: Publishing) -> None:
    """Each event once, in order, once repeats are dropped; no offset twice or out of order."""
    await found.until(lambda: found.ended or len(found.ids()) >= len(sent.confirmed))
    assert found.ended is None
    assert found.ids() == sent.ids()
    offsets = [entry.offset for entry in found.entries]
    assert offsets == sorted(set(offsets))


async def test_closed_connections_cost_nothing(amqp_url: str, rabbitmq_server: Server, vhost: str) -> None:
    async with opened(amqp_url) as log, reading(log) as found:
        async with publishing(log) as sent:
            closed = 0
            async with asyncio.timeout(PATIENCE):
                while closed < 4:
                    closed += await rabbitmq_server.close_connections(vhost)
                    await sent.more(21)
        await all_arrived(found, sent)
        assert log.counters.reconnects > 0
        assert log.counters.published >= len(sent.confirmed)
        assert log.counters.read == len(found.entries)


@pytest.mark.random
async def test_connections_that_are_reset_at_random_cost_nothing(
    amqp_url: str, rabbitmq_server: Server, vhost: str
) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    async with TcpProxy(rabbitmq_server.host, rabbitmq_server.port) as proxy:
        url = rabbitmq_server.amqp_url(vhost, port=proxy.port)
        async with opened(url) as log, reading(log) as found:
            async with publishing(log) as sent:
                for _ in range(12):
                    await sent.more(draw.randint(1, 200))
                    await asyncio.sleep(draw.uniform(0, 0.02))
                    if draw.random() < 0.2:
                        await proxy.refuse()
                        proxy.cut()
                        await asyncio.sleep(draw.uniform(0, 0.3))
                        await proxy.resume()
                    else:
                        proxy.cut()
            await all_arrived(found, sent)


async def test_a_frozen_network_hangs_nobody_and_loses_nothing(
    amqp_url: str, rabbitmq_server: Server, vhost: str
) -> None:
    async with TcpProxy(rabbitmq_server.host, rabbitmq_server.port) as proxy:
        url = rabbitmq_server.amqp_url(vhost, port=proxy.port) + "?heartbeat=1"
        async with opened(url, timeout=3.0) as log, opened(amqp_url) as other, reading(log) as found:
            await log.publish(numbered([0]))
            await found.until(lambda: found.entries)
            proxy.freeze()
            with pytest.raises(LogUnavailable, match=r"RabbitMQ has not confirmed within 3 s"):
                await log.publish(numbered([1]))
            with pytest.raises(LogUnavailable, match=r"RabbitMQ cannot be reached"):
                await log.publish(numbered([1]))
            with pytest.raises(LogUnavailable):
                await log.check()
            await other.publish(numbered([2]))
            # Those that were frozen are thrown away, and the next ones, which nobody answered either.
            await asyncio.wait_for(_until(lambda: log.counters.reconnects >= 2), PATIENCE)
            proxy.cut()
            await proxy.resume()
            await found.until(lambda: 2 in numbers_of(found.entries))
            async with asyncio.timeout(PATIENCE):
                while True:
                    with suppress(LogUnavailable):
                        await log.publish(numbered([3]))
                        break
            await found.until(lambda: 3 in numbers_of(found.entries))
            assert found.ended is None
            offsets = [entry.offset for entry in found.entries]
            assert offsets == sorted(set(offsets))
            await log.check()


async def _until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


async def test_a_deleted_stream_is_noticed_by_all_and_begins_anew(
    amqp_url: str, rabbitmq_server: Server, vhost: str
) -> None:
    async with plainly(amqp_url) as channel, opened(amqp_url) as one, opened(amqp_url) as two, opened(amqp_url) as idle:
        # A queue that takes everything, so that no message is returned.
        await channel.queue_declare("theirs")
        await channel.queue_bind("theirs", EXCHANGE, "#")
        first = one.epoch
        async with reading(one) as first_one, reading(two) as first_two, publishing(idle) as sent:
            await sent.more(100)
            before = len(sent.confirmed)
            await rabbitmq_server.delete_queue(vhost, STREAM)
            await first_one.until(lambda: first_one.ended)
            await first_two.until(lambda: first_two.ended)
            for ended in (first_one.ended, first_two.ended):
                assert isinstance(ended, EpochChanged)
                assert ended.epoch == one.epoch
            assert one.epoch == two.epoch != first
            async with reading(one) as second_one, reading(two) as second_two:
                await sent.more(100)
                assert idle.epoch == one.epoch
                sent.stop.set()
                last = sent.ids()[-1]
                await second_one.until(lambda: last in second_one.ids())
                await second_two.until(lambda: last in second_two.ids())
                assert second_one.entries == second_two.entries
        # What was confirmed when the stream was there is in one of the two, and nothing is missing between them.
        old, new = first_one.ids(), second_one.ids()
        assert old == sent.ids()[: len(old)]
        assert new == sent.ids()[sent.ids().index(new[0]) :]
        assert sent.ids().index(new[0]) <= max(before, len(old)) + 7
        assert second_one.entries[0].offset == 1


async def test_an_event_is_in_the_log_when_it_is_confirmed_although_the_stream_was_deleted(
    amqp_url: str, rabbitmq_server: Server, vhost: str
) -> None:
    async with plainly(amqp_url) as channel, opened(amqp_url) as log:
        await channel.queue_declare("theirs")
        await channel.queue_bind("theirs", EXCHANGE, "#")
        for number in range(5):
            epoch = log.epoch
            await rabbitmq_server.delete_queue(vhost, STREAM)
            await log.publish(numbered([number, number + 100]))
            assert log.epoch != epoch
            assert numbers_of(await read(log, 0, 2)) == [number, number + 100]


async def test_a_message_that_is_returned_is_published_again(amqp_url: str) -> None:
    async with plainly(amqp_url) as channel, opened(amqp_url) as log:
        epoch = log.epoch
        await channel.queue_unbind(STREAM, EXCHANGE, "#")
        await log.publish(numbered(range(3)))
        assert numbers_of(await read(log, 0, 3)) == [0, 1, 2]
        assert log.counters.returned == 1
        await channel.exchange_delete(EXCHANGE)
        await log.publish(numbered(range(3, 6)))
        assert numbers_of(await read(log, 0, 6)) == [0, 1, 2, 3, 4, 5]
        assert log.epoch == epoch


async def test_a_deleted_stream_is_noticed_without_anybody_publishing(
    amqp_url: str, rabbitmq_server: Server, vhost: str
) -> None:
    async with opened(amqp_url) as log:
        before = log.epoch
        await log.publish(numbered([1]))
        async with reading(log) as found:
            await found.until(lambda: found.entries)
            await rabbitmq_server.delete_queue(vhost, STREAM)
            await found.until(lambda: found.ended)
            assert isinstance(found.ended, EpochChanged)
        assert log.epoch != before
        await rabbitmq_server.delete_queue(vhost, STREAM)
        epoch = log.epoch
        await log.check()
        assert log.epoch != epoch
        await rabbitmq_server.delete_queue(vhost, STREAM)
        assert await log.head() == 0
        await rabbitmq_server.delete_queue(vhost, STREAM)
        assert await log.offset_before(60) == 0


async def test_a_cancelled_publication_disturbs_nobody(amqp_url: str) -> None:
    async with opened(amqp_url) as log, reading(log) as found:
        tasks = [asyncio.create_task(log.publish(numbered([number]))) for number in range(50)]
        for task in tasks[::2]:
            task.cancel()
        await asyncio.wait(tasks)
        await log.publish(numbered([100]))
        await found.until(lambda: 100 in numbers_of(found.entries))
        assert set(range(1, 50, 2)) <= set(numbers_of(found.entries))


# A broker of their own: a boot of some seconds each. -----------------------------------------------------------------


@pytest.fixture
async def own_vhost(broker: Broker) -> AsyncIterator[str]:
    await broker.server.add_vhost("faults")
    yield "faults"
    if broker.running:
        await broker.server.delete_vhost("faults")


async def test_a_killed_broker_comes_back_with_its_epoch_and_every_confirmed_event(
    broker: Broker, own_vhost: str
) -> None:
    async with opened(broker.server.amqp_url(own_vhost), timeout=3.0) as log, reading(log) as found:
        epoch = log.epoch
        async with publishing(log) as sent:
            await sent.more(100)
            await broker.kill()
            with pytest.raises(LogUnavailable, match=r"RabbitMQ does not answer: .*[Cc]onnect"):
                await log.check()
            await broker.start()
            await sent.more(100)
        await found.until(lambda: found.ended or found.ids()[-1:] == sent.ids()[-1:])
        assert log.epoch == epoch
        assert found.ended is None
        assert found.ids() == sent.ids()
        assert [entry.offset for entry in found.entries] == sorted({entry.offset for entry in found.entries})


async def test_a_broker_that_lost_its_data_has_another_epoch(broker: Broker) -> None:
    async with opened(broker.server.amqp_url(), timeout=5.0) as log, reading(log) as found:
        epoch = log.epoch
        await log.publish(numbered([1]))
        await found.until(lambda: found.entries)
        await broker.kill()
        await broker.wipe()
        await broker.start()
        await found.until(lambda: found.ended)
        assert isinstance(found.ended, EpochChanged)
        assert log.epoch != epoch
        await eventually_published(log, numbered([2]))
        assert numbers_of(await read(log, 0, 1)) == [2]


async def eventually_published(log: RabbitLog, events: list[Event]) -> None:
    async with asyncio.timeout(PATIENCE):
        while True:
            with suppress(LogUnavailable):
                return await log.publish(events)


async def test_a_broker_without_memory_takes_nothing_and_says_so(broker: Broker, own_vhost: str) -> None:
    async with opened(broker.server.amqp_url(own_vhost), timeout=2.0) as log, reading(log) as found:
        await log.publish(numbered([0]))
        await found.until(lambda: found.entries)
        await broker.ctl("set_vm_memory_high_watermark", "0.0000001")
        try:
            for _ in range(3):
                with pytest.raises(LogUnavailable, match=r"RabbitMQ takes no messages now: low on memory"):
                    await _refused(log)
            with pytest.raises(LogUnavailable, match=r"low on memory"):
                await log.check()
            # Reading goes on.
            assert numbers_of(await read(log, 0, 1)) == [0]
        finally:
            await broker.ctl("set_vm_memory_high_watermark", "0.4")
        await eventually_published(log, numbered([2]))
        await found.until(lambda: 2 in numbers_of(found.entries))
        # It is the same connection: those that are given up while they are blocked would pile up in the broker.
        assert log.counters.reconnects == 0


async def _refused(log: RabbitLog) -> None:
    # The alarm needs a moment to come.
    async with asyncio.timeout(PATIENCE):
        while True:
            await log.publish(numbered([1]))


async def test_a_log_that_is_closed_while_it_connects_leaves_nothing(
    amqp_url: str, rabbitmq_server: Server, vhost: str
) -> None:
    trouble: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: trouble.append(context))
    async with TcpProxy(rabbitmq_server.host, rabbitmq_server.port) as proxy:
        log = await RabbitLog.open(settings(rabbitmq_server.amqp_url(vhost, port=proxy.port)), name="tests")
        await proxy.refuse()
        proxy.cut()
        waiting = [asyncio.create_task(log.publish(numbered([number]))) for number in range(3)]
        async with asyncio.timeout(PATIENCE):
            while not (connecting := log._connecting) or connecting.done():
                await asyncio.sleep(0.01)
        await log.close()
        assert {type(each) for each in await asyncio.gather(*waiting, return_exceptions=True)} == {LogUnavailable}
        assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("rabbitmq")]
        del log, connecting, waiting
        gc.collect()
    assert trouble == []
