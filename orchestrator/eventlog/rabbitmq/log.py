"""The event log in RabbitMQ: what `EventLog` promises, over connections that come and go.

One connection publishes, and answers what is asked of the log; each reader and each consumer has its own. All of them
are opened again, with full-jitter back-off, for as long as the log is open.

Where the log ends is not to be asked of a stream over AMQP 0-9-1, so `head` puts a mark there, an empty entry of its
own for nobody, and looks where it comes to lie. Readers of the same log leave its own marks out; to those of others
they are entries without a channel.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from uuid import uuid4

import structlog

from orchestrator.database import backoff
from orchestrator.errors import LogUnavailable, SettingsError, Unreachable
from orchestrator.eventlog.contract import DeadLetter, Delivery, Entry, EpochChanged, Truncated
from orchestrator.eventlog.rabbitmq.consuming import Consumer
from orchestrator.eventlog.rabbitmq.entries import entry
from orchestrator.eventlog.rabbitmq.link import NOT_FOUND, Endpoints, Link, Refused
from orchestrator.eventlog.rabbitmq.links import Links
from orchestrator.eventlog.rabbitmq.publishing import Message, Publisher, Refusal
from orchestrator.eventlog.rabbitmq.subscription import Subscription
from orchestrator.eventlog.rabbitmq.topology import DEAD_LETTER, STREAM, Declared, Topology
from orchestrator.eventlog.rabbitmq.wire import Lost, Properties, properties
from orchestrator.events import EXCHANGE, Event
from orchestrator.settings import AmqpSettings
from orchestrator.text import clean

log = structlog.get_logger("rabbitmq")

# Deliveries that the broker sends ahead of a reader.
_PREFETCH = 1000
# Seconds by which the broker's clock may differ from ours.
_SKEW = 5.0
# Bytes that AMQP has for a message's id.
_ID = 255
# Own marks whose place is remembered.
_MARKS = 1000


@dataclass(slots=True)
class Counters:
    """What the metrics show, since the start: messages confirmed and returned, connections lost, entries read."""

    published: int = 0
    returned: int = 0
    reconnects: int = 0
    read: int = 0


class RabbitLog:
    """An `EventLog` in RabbitMQ. Belongs to one event loop. Made by `open`."""

    def __init__(self, settings: AmqpSettings, *, name: str, segment_bytes: int | None = None) -> None:
        self.counters = Counters()
        self._links = Links(Endpoints(settings, name))
        self._topology = Topology(settings, segment_bytes=segment_bytes)
        self._timeout = settings.timeout
        self._epoch = ""
        # Those who look for the epoch do it one after the other, so that none tells an older one last.
        self._settling = asyncio.Lock()
        self._publisher: Publisher | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._trouble = ""
        self._subscriptions: set[Subscription] = set()
        # Who we are among those that put marks into the log, and where ours lie.
        self._marker = f"mark-{uuid4().hex}-"
        self._mark_numbers = count(1)
        self._marks: dict[int, None] = {}

    @classmethod
    async def open(cls, settings: AmqpSettings, *, name: str, segment_bytes: int | None = None) -> RabbitLog:
        """Connect, declare everything, find the epoch. `name` is what RabbitMQ shows of our connections.

        Raises SettingsError when the URL or the user is wrong or what is there has other arguments; Unreachable when
        nothing answers.
        """
        opened = cls(settings, name=name, segment_bytes=segment_bytes)
        try:
            opened._publisher = await opened._open_publisher()
        except Lost as error:
            await opened.close()
            raise _not_opened(error) from error
        except BaseException:
            await opened.close()
            raise
        return opened

    @property
    def epoch(self) -> str:
        """The incarnation of the stream, as it was last seen."""
        return self._epoch

    @property
    def waiting(self) -> int:
        """Entries that have come and that no reader has taken yet."""
        return sum(subscription.waiting for subscription in self._subscriptions)

    async def publish(self, events: Sequence[Event]) -> None:
        """Append, in order; some may be there twice, with the same id, when RabbitMQ went away meanwhile.

        An event's id has at most 255 bytes. Raises LogUnavailable when RabbitMQ has not confirmed in time.
        """
        await self._publish([Message(EXCHANGE, event.event_type, event.id, event.body()) for event in events])

    async def dead_letter(self, letters: Sequence[DeadLetter]) -> None:
        """Put messages into the queue of dead letters. Raises LogUnavailable."""
        await self._publish(
            [
                Message(
                    "",
                    DEAD_LETTER,
                    # What was no UTF-8 has grown in the reading.
                    clean(letter.event_id, _ID),
                    letter.body,
                    {
                        "reason": letter.reason[:1000],
                        "routing-key": letter.routing_key,
                        "offset": str(letter.offset),
                        "epoch": letter.epoch or self._epoch,
                    },
                )
                for letter in letters
            ]
        )

    async def head(self) -> int:
        """The offset of the newest entry that is no mark of ours. Publishes a mark. Raises LogUnavailable."""
        async with self._deadline():
            while True:
                publisher = await self._ready()
                try:
                    return await self._head(publisher)
                except Lost as error:
                    await self._discard(publisher, error)

    async def offset_before(self, seconds: float) -> int:
        """An offset before all entries of that time, with room for clocks that differ. Raises LogUnavailable."""
        # So that there is an entry of this moment, and one is delivered below in any case.
        await self.head()
        since = datetime.fromtimestamp(max(0.0, time.time() - seconds - _SKEW), UTC)
        async with self._deadline():
            while True:
                publisher = await self._ready()
                try:
                    return self._unmarked(await self._first(publisher.link, since) - 1)
                except Lost as error:
                    await self._discard(publisher, error)

    async def read(self, after: int) -> AsyncGenerator[Sequence[Entry], None]:
        """As the contract says; no lost connection ends it. Raises LogUnavailable only when the log is closed.

        An entry that is missing between two others is either one of RabbitMQ's own, which it counts without delivering
        them, or it was dropped for its age. So at each gap the log is asked where it begins: behind the gap means that
        entries are lost, and Truncated is raised.
        """
        epoch = self._epoch
        failures = 0
        while True:
            subscription = await self._subscribe(after, epoch, failures)
            try:
                while True:
                    deliveries = await subscription.take()
                    if self._epoch != epoch:
                        raise EpochChanged(self._epoch)
                    failures = 0
                    subscription.acknowledge(deliveries[-1].tag)
                    found = [(delivery, properties(delivery.properties)) for delivery in deliveries]
                    found = [each for each in found if each[1].offset >= after]
                    if not found:
                        continue
                    if found[-1][1].offset - after + 1 != len(found):
                        await self._require_all(subscription.link, after, [each[1].offset + 1 for each in found])
                    after = found[-1][1].offset + 1
                    if batch := [entry(*each, epoch) for each in found if not self._marked(each[1])]:
                        self.counters.read += len(batch)
                        yield batch
            except Lost as error:
                self._links.require_open()
                failures += 1
                self.counters.reconnects += 1
                log.warning("reading was interrupted", error=str(error), after=after, epoch=epoch)
            finally:
                self._subscriptions.discard(subscription)
                await self._links.give_back(subscription.link)

    async def consume(
        self, queue: str, bindings: Sequence[str], handler: Callable[[Delivery], Awaitable[None]]
    ) -> None:
        """Hand the messages of a queue of ours to `handler`, one at a time, in order, for ever.

        The queue is durable and bound to the exchange; of all who consume it, one gets the messages. A message that was
        handled is acknowledged. One for which the handler raises Undeliverable goes to the dead letters; after any
        other error it is handled again, with back-off, and those behind it wait. After a lost connection a message may
        come again. Cancelling leaves the message being handled in the queue. Raises LogUnavailable when the log is
        closed, SettingsError when the queue exists with other arguments.
        """
        consumer = Consumer(self._links, self._topology, self.dead_letter)
        await consumer.run(queue, bindings, handler)

    async def check(self) -> None:
        """Return when RabbitMQ answers and takes messages; raise LogUnavailable, with the reason, when not."""
        async with self._deadline(1):
            publisher = await self._ready()
            if blocked := publisher.link.wire.blocked:
                raise LogUnavailable(f"RabbitMQ takes no messages now: {blocked}")
            try:
                if not await self._topology.lasts(publisher.link, publisher.epoch):
                    await self._discard(publisher, Lost("the stream was deleted"))
                    await self._ready()
            except Lost as error:
                raise LogUnavailable(f"RabbitMQ does not answer: {error}") from error

    async def close(self) -> None:
        """End all readers and consumers, and close all connections. Idempotent."""
        # First, so that nobody begins to connect once more.
        await self._links.close()
        if self._connecting:
            self._connecting.cancel()
            await asyncio.wait([self._connecting])
        self._publisher = None

    # Publishing. -----------------------------------------------------------------------------------------------------

    async def _publish(self, messages: Sequence[Message]) -> None:
        self._links.require_open()
        publisher = None
        try:
            async with asyncio.timeout(self._timeout):
                while messages:
                    publisher = None
                    publisher = await self._ready()
                    try:
                        kept = await publisher.publish(messages)
                    except (Lost, Refusal) as error:
                        await self._discard(publisher, error)
                        continue
                    self.counters.published += kept
                    if messages := messages[kept:]:
                        self.counters.returned += 1
                        await self._discard(publisher, Lost("a message was returned: the stream was deleted"))
        except TimeoutError as error:
            raise LogUnavailable(self._overdue(publisher)) from error

    def _overdue(self, publisher: Publisher | None) -> str:
        """What to say when the deadline has passed; a connection that takes and says nothing is given up."""
        if publisher is None or publisher.over:
            return f"RabbitMQ cannot be reached: {self._trouble or 'connecting takes too long'}"
        if blocked := publisher.link.wire.blocked:
            # It would hear nothing of a connection that is given up, and keep it: so this one is.
            return f"RabbitMQ takes no messages now: {blocked}"
        publisher.link.drop("a message was not confirmed in time")
        return f"RabbitMQ has not confirmed within {self._timeout:g} s"

    async def _ready(self) -> Publisher:
        """The publisher, once there is one. Raises LogUnavailable when the log is closed."""
        while True:
            self._links.require_open()
            if self._publisher:
                if not self._publisher.over:
                    return self._publisher
                await self._discard(self._publisher, self._publisher.over)
                continue
            if self._connecting is None or self._connecting.done():
                self._connecting = asyncio.create_task(self._connect(), name="rabbitmq: connect")
            # It goes on when who waits gives up, so that what takes longer than one call still comes to its end.
            await asyncio.wait([self._connecting])

    async def _discard(self, publisher: Publisher, error: Exception) -> None:
        if self._publisher is publisher:
            self._publisher = None
            self._trouble = str(error)
            self.counters.reconnects += 1
            log.warning("publishing was interrupted", error=str(error))
            await self._links.give_back(publisher.link)

    async def _connect(self) -> None:
        failures = 0
        while not self._publisher:
            try:
                self._publisher = await self._open_publisher()
                log.info("connected", to=self._publisher.link.name, epoch=self._epoch)
            except (Lost, SettingsError) as error:
                failures += 1
                self._trouble = str(error)
                log.warning("RabbitMQ cannot be reached", error=str(error), failures=failures)
                await asyncio.sleep(backoff(failures))
            except LogUnavailable:
                # Closed, which those who wait for this see themselves.
                return

    async def _open_publisher(self) -> Publisher:
        link = await self._links.open()
        try:
            return await Publisher.open(link, await self._settle(link))
        except BaseException:
            await self._links.give_back(link)
            raise

    async def _settle(self, link: Link) -> str:
        """Declare everything, and find the epoch. Raises SettingsError, Lost."""
        async with self._settling:
            await self._topology.declare(link)
            epoch = await self._topology.epoch(link)
            if epoch != self._epoch:
                if self._epoch:
                    log.warning("the log has begun anew", epoch=epoch, before=self._epoch)
                self._epoch = epoch
                self._marks.clear()
            return epoch

    # Where the log begins and ends. ----------------------------------------------------------------------------------

    async def _head(self, publisher: Publisher) -> int:
        mark = f"{self._marker}{next(self._mark_numbers)}"
        subscription = await Subscription.open(publisher.link, STREAM, _PREFETCH, **{"x-stream-offset": "next"})
        try:
            # Its confirmation says, too, that the stream consumed is of the publisher's epoch.
            await publisher.publish([Message("", STREAM, mark, b"")])
            first = -1
            while True:
                for delivery in await subscription.take():
                    subscription.acknowledge(delivery.tag)
                    found = properties(delivery.properties)
                    first = found.offset if first < 0 else first
                    if found.message_id == mark:
                        self._remember(found.offset + 1)
                        return self._unmarked(first)
        except Refusal as error:
            raise Lost(str(error)) from error
        finally:
            await subscription.close()

    async def _first(self, link: Link, where: datetime | str) -> int:
        """The offset of the first entry from there on. Raises Lost."""
        subscription = await Subscription.open(link, STREAM, 1, **{"x-stream-offset": where})
        try:
            return properties((await subscription.take())[0].properties).offset + 1
        finally:
            await subscription.close()

    def _remember(self, offset: int) -> None:
        self._marks[offset] = None
        while len(self._marks) > _MARKS:
            del self._marks[next(iter(self._marks))]

    def _unmarked(self, offset: int) -> int:
        """The newest offset up to this one that is no mark of ours."""
        while offset in self._marks:
            offset -= 1
        return offset

    # Reading. --------------------------------------------------------------------------------------------------------

    async def _subscribe(self, after: int, epoch: str, failures: int) -> Subscription:
        """Consume the stream of this epoch behind an offset, once that can be. Raises EpochChanged, LogUnavailable."""
        while True:
            await self._links.pause(failures)
            link = None
            try:
                link = await self._links.open()
                subscription = await self._consume_from(link, after, epoch)
            except (Lost, SettingsError) as error:
                failures += 1
                log.warning("the log cannot be read", error=str(error), failures=failures)
            except BaseException:
                if link:
                    await self._links.give_back(link)
                raise
            else:
                if subscription:
                    self._subscriptions.add(subscription)
                    return subscription
            if link:
                await self._links.give_back(link)

    async def _consume_from(self, link: Link, after: int, epoch: str) -> Subscription | None:
        """None: the stream was gone for a moment, and must be looked for again. Raises EpochChanged, Lost."""
        try:
            subscription = await Subscription.open(link, STREAM, _PREFETCH, **{"x-stream-offset": after})
            # Asked after the consumer is there: had the stream been made anew before, this epoch would be over.
            if await self._topology.lasts(link, epoch):
                return subscription
        except Lost as error:
            if error.code != NOT_FOUND:
                raise
        if (now := await self._settle(link)) != epoch:
            raise EpochChanged(now)
        return None

    async def _require_all(self, link: Link, after: int, offsets: Sequence[int]) -> None:
        """Raise Truncated if entries are gone that lay between these offsets, or between `after` and the first."""
        oldest = await self._first(link, "first")
        expected = after + 1
        for offset in offsets:
            if offset != expected and oldest > expected:
                raise Truncated(oldest)
            expected = offset + 1

    def _marked(self, found: Properties) -> bool:
        if found.message_id.startswith(self._marker):
            self._remember(found.offset + 1)
            return True
        return False

    @asynccontextmanager
    async def _deadline(self, answers: int = 2) -> AsyncGenerator[None, None]:
        """The time of so many answers, of which a new connection needs one. Raises LogUnavailable when it is over."""
        try:
            async with asyncio.timeout(answers * self._timeout):
                yield
        except TimeoutError as error:
            raise LogUnavailable(f"RabbitMQ does not answer: {self._trouble or 'it takes too long'}") from error


async def declare(settings: AmqpSettings) -> list[Declared]:
    """Declare all that we need, and say what was there already. Raises SettingsError."""
    topology = Topology(settings)
    try:
        link = await Endpoints(settings, "cluster-code exchange declare").open()
        try:
            found = await topology.survey(link)
            await topology.epoch(link)
            return found
        finally:
            await link.close()
    except Lost as error:
        raise _not_opened(error) from error


def _not_opened(error: Lost) -> SettingsError:
    return (SettingsError if isinstance(error, Refused) else Unreachable)(f"AMQP_URL: {error}")
