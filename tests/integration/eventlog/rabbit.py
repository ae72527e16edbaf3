"""What the tests of the log in RabbitMQ share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from struct import pack

import aiormq
from pamqp import commands, frame

from orchestrator.errors import LogUnavailable
from orchestrator.eventlog.contract import Entry, EpochChanged, Truncated
from orchestrator.eventlog.rabbitmq import RabbitLog
from orchestrator.eventlog.rabbitmq.link import Endpoints
from orchestrator.eventlog.rabbitmq.wire import Taker
from orchestrator.events import EXCHANGE
from orchestrator.settings import AmqpSettings

# Seconds that a busy machine may take; a lost connection is noticed before.
PATIENCE = 40.0


def settings(url: str, **given: object) -> AmqpSettings:
    return AmqpSettings(url=url, **{"timeout": 20.0, **given})  # type: ignore[arg-type]


@asynccontextmanager
async def opened(url: str, *, name: str = "tests", **given: object) -> AsyncIterator[RabbitLog]:
    log = await RabbitLog.open(settings(url, **given), name=name)
    try:
        yield log
    finally:
        await log.close()


class Reading:
    """What one reader has got so far; `ended` is what ended it."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.ended: Exception | None = None
        self._changed = asyncio.Event()

    async def run(self, log: RabbitLog, after: int) -> None:
        try:
            async with aclosing(log.read(after)) as reader:
                async for batch in reader:
                    self.entries += batch
                    self._changed.set()
        except (Truncated, EpochChanged, LogUnavailable) as error:
            self.ended = error
            self._changed.set()

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    def ids(self) -> list[str]:
        """Of the events, each once, in order: as a history drops repeats."""
        return list(dict.fromkeys(entry.event_id for entry in self.entries if entry.channel))


@asynccontextmanager
async def reading(log: RabbitLog, after: int = 0) -> AsyncIterator[Reading]:
    found = Reading()
    task = asyncio.create_task(found.run(log, after))
    try:
        yield found
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


@asynccontextmanager
async def plainly(url: str) -> AsyncIterator[aiormq.abc.AbstractChannel]:
    """A channel as any other service has one."""
    connection = await aiormq.connect(url)
    try:
        yield await connection.channel()
    finally:
        await connection.close()


async def send(url: str, key: str, body: bytes, exchange: str = EXCHANGE, **properties: object) -> None:
    """Publish as another service does. aiormq gives every message an id: `message_id=None` takes it away."""
    async with plainly(url) as channel:
        given = aiormq.spec.Basic.Properties(delivery_mode=2, **properties)  # type: ignore[arg-type]
        await channel.basic_publish(body, exchange=exchange, routing_key=key, properties=given)


async def send_raw(url: str, key: str, body: bytes, properties: bytes) -> None:
    """Publish with the properties of a content header as they are: the flags, and what they announce."""
    link = await Endpoints(settings(url), "raw").open()
    try:
        lane = await link.lane(Taker())
        header = pack(">HHQ", 60, 0, len(body)) + properties
        parts = [frame.marshal(commands.Basic.Publish(exchange=EXCHANGE, routing_key=key), lane.number)]
        for kind, payload in ((2, header), (3, body)):
            parts.append(pack(">BHL", kind, lane.number, len(payload)) + payload + b"\xce")
        lane.write(b"".join(parts))
        # Answered in order: the message is there then.
        await lane.call(lambda channel: channel.exchange_declare(EXCHANGE, passive=True))
    finally:
        await link.close()
