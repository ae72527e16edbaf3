"""What there is in RabbitMQ for us: its names, its declaration, and the epoch of the stream.

The epoch names one incarnation of the stream, and all who ask must hear the same name. RabbitMQ shows nothing of a
stream that would tell it from one of the same name made after it, so this is built from what it does guarantee:

- The exchange `cluster-code.epoch.NAME` is bound to the stream alone, and deletes itself with its last binding, that
  is: with the stream, in one transaction. So it exists exactly as long as the incarnation of the stream that it was
  bound to. It is never published to.
- The stream `cluster-code.epochs` holds every NAME that was ever proposed, in one order for all. Its exchange is made
  and bound before a name goes in there.

The epoch is the first of these names whose exchange exists. Who finds none proposes one and looks again; however many
race, all end with the first. A name proposed for nothing does no harm.
"""

from __future__ import annotations

import asyncio
import random
import re
import string
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from aiormq.abc import AbstractChannel

from orchestrator.errors import SettingsError
from orchestrator.eventlog.rabbitmq.link import ACCESS_REFUSED, NOT_FOUND, PRECONDITION_FAILED, Lane, Link
from orchestrator.eventlog.rabbitmq.wire import Incoming, Lost, Publications, Taker, acknowledgement
from orchestrator.events import EXCHANGE, USER_MESSAGES, USERS_QUEUE
from orchestrator.settings import AmqpSettings

STREAM = "cluster-code.events"
EPOCHS = "cluster-code.epochs"
DEAD_LETTER = "cluster-code.dead-letter"
_ONE_CONSUMER: dict[str, Any] = {"x-single-active-consumer": True}
# Dead letters beyond it push out the oldest, so that a broken publisher cannot fill the disk.
_DEAD_LETTER_BYTES = 256 << 20
# Seconds after which the stream of epochs, from which nothing more comes, is taken to be read.
_QUIET = 0.25
_PREFETCH = 100


@dataclass(frozen=True, slots=True)
class Declared:
    """One thing that RabbitMQ holds for us: `kind` is exchange, stream or queue; `existed`: it was there before."""

    kind: str
    name: str
    existed: bool


def epoch_exchange(epoch: str) -> str:
    """The exchange that exists as long as this epoch lasts."""
    return f"cluster-code.epoch.{epoch}"


class Topology:
    """Declares what we need, with the arguments that the settings give. `segment_bytes`: for tests, of the stream."""

    def __init__(self, settings: AmqpSettings, *, segment_bytes: int | None = None) -> None:
        self._stream_arguments: dict[str, Any] = {
            "x-queue-type": "stream",
            "x-max-age": settings.max_age,
            "x-max-length-bytes": settings.max_bytes,
        }
        if segment_bytes:
            self._stream_arguments["x-stream-max-segment-size-bytes"] = segment_bytes
        # Names whose exchange is gone, which it stays.
        self._dead: set[str] = set()

    async def declare(self, link: Link) -> None:
        """Declare all of it, whatever is there already. Raises SettingsError when it is there otherwise; Lost."""
        for _, _, _, make in self._parts():
            await _declare(link, make)
        await _declare(link, lambda channel: channel.queue_bind(STREAM, EXCHANGE, "#"))
        # Here, too, so that what is published before the first consumer comes is not lost.
        await _declare(link, partial(_bind, USERS_QUEUE, USER_MESSAGES))

    async def declare_queue(self, link: Link, name: str, bindings: Sequence[str]) -> None:
        """Declare a durable queue of ours, of whose consumers one gets the messages. Raises SettingsError, Lost."""
        await _declare(link, lambda channel: channel.exchange_declare(EXCHANGE, exchange_type="topic", durable=True))
        await _declare(link, lambda channel: channel.queue_declare(name, durable=True, arguments=_ONE_CONSUMER))
        for key in bindings:
            await _declare(link, partial(_bind, name, key))

    async def survey(self, link: Link) -> list[Declared]:
        """Declare all of it, and say what was there already. Raises SettingsError, Lost."""
        found = []
        for kind, name, look, _ in self._parts():
            try:
                await link.ask(look)
                found.append(Declared(kind, name, existed=True))
            except Lost as error:
                if error.code != NOT_FOUND:
                    raise
                found.append(Declared(kind, name, existed=False))
        await self.declare(link)
        return found

    async def epoch(self, link: Link) -> str:
        """The epoch of the stream, which was declared. Raises Lost."""
        names = _Names()
        lane = await link.lane(names)
        try:
            await lane.consume(EPOCHS, _PREFETCH, {"x-stream-offset": "first"})
            # Who proposes nothing has waited for nothing: what is read below is what there was.
            return await self._first_alive(link, lane, names, within=_QUIET) or await self._propose(link, lane, names)
        finally:
            await lane.close()

    async def lasts(self, link: Link, epoch: str) -> bool:
        """Whether the stream of this epoch is still there. Raises Lost."""
        return await link.exists(epoch_exchange(epoch))

    async def _propose(self, link: Link, lane: Lane, names: _Names) -> str:
        """Put a name of ours among those of others who race; the epoch, which may be one of theirs. Raises Lost."""
        name = "".join(random.SystemRandom().choices(string.ascii_lowercase + string.digits, k=8))
        exchange = epoch_exchange(name)
        await link.ask(
            lambda channel: channel.exchange_declare(exchange, exchange_type="fanout", durable=True, auto_delete=True)
        )
        await link.ask(lambda channel: channel.queue_bind(STREAM, exchange))
        lane.write(Publications(lane.number, "", link.frame_max).frames(EPOCHS, name, name.encode()))
        if epoch := await self._first_alive(link, lane, names, within=link.timeout, until=name):
            return epoch
        raise Lost(f"{link.name}: the stream was deleted while it was declared, or its epochs cannot be read")

    async def _first_alive(
        self, link: Link, lane: Lane, names: _Names, *, within: float, until: str | None = None
    ) -> str | None:
        """The first name whose exchange exists; None if none has up to `until`, or none more comes in that time."""
        while name := await names.next(within):
            lane.write(acknowledgement(lane.number, names.tag))
            if name not in self._dead:
                if await self.lasts(link, name):
                    return name
                self._dead.add(name)
            if name == until:
                return None
        return None

    def _parts(self) -> list[tuple[str, str, _Call, _Call]]:
        epochs = {"x-queue-type": "stream"}
        dead = {"x-max-length-bytes": _DEAD_LETTER_BYTES}

        def queue(name: str, arguments: dict[str, Any]) -> tuple[_Call, _Call]:
            return (
                lambda channel: channel.queue_declare(name, passive=True),
                lambda channel: channel.queue_declare(name, durable=True, arguments=arguments),
            )

        return [
            (
                "exchange",
                EXCHANGE,
                lambda channel: channel.exchange_declare(EXCHANGE, passive=True),
                lambda channel: channel.exchange_declare(EXCHANGE, exchange_type="topic", durable=True),
            ),
            ("stream", STREAM, *queue(STREAM, self._stream_arguments)),
            ("stream", EPOCHS, *queue(EPOCHS, epochs)),
            ("queue", DEAD_LETTER, *queue(DEAD_LETTER, dead)),
            ("queue", USERS_QUEUE, *queue(USERS_QUEUE, _ONE_CONSUMER)),
        ]


_Call: TypeAlias = Callable[[AbstractChannel], Awaitable[Any]]


async def _bind(queue: str, key: str, channel: AbstractChannel) -> None:
    await channel.queue_bind(queue, EXCHANGE, key)


class _Names(Taker):
    """The names of epochs as they are read."""

    def __init__(self) -> None:
        self.tag = 0
        self._names: asyncio.Queue[Incoming | Lost] = asyncio.Queue()

    def delivered(self, deliveries: list[Incoming]) -> None:
        for delivery in deliveries:
            self._names.put_nowait(delivery)

    def cancelled(self) -> None:
        self._names.put_nowait(Lost("the stream of the epochs was deleted"))

    def lost(self, error: Lost) -> None:
        self._names.put_nowait(error)

    async def next(self, within: float) -> str | None:
        """The next name; None when none comes within so many seconds. Raises Lost."""
        try:
            async with asyncio.timeout(within):
                found = await self._names.get()
        except TimeoutError:
            return None
        if isinstance(found, Lost):
            raise found
        self.tag = found.tag
        return found.body.decode(errors="replace")


async def _declare(link: Link, make: _Call) -> None:
    try:
        await link.ask(make)
    except Lost as error:
        if error.code == PRECONDITION_FAILED:
            raise SettingsError(_conflict(error.reason)) from error
        if error.code == ACCESS_REFUSED:
            raise SettingsError(f"AMQP_URL: the user may not declare what is needed: {error.reason}") from error
        raise


_INEQUIVALENT = re.compile(
    r"inequivalent arg '(?P<argument>[^']+)' for (?P<what>\w+ '[^']+').*"
    r": received (?P<ours>.+) but current is (?P<theirs>.+)"
)
_SETTINGS = {"x-max-age": "EVENTS_MAX_AGE", "x-max-length-bytes": "EVENTS_MAX_BYTES"}


def _conflict(reason: str) -> str:
    """RabbitMQ's words for arguments that differ, as one line that says what to do."""
    if not (found := _INEQUIVALENT.search(reason)):
        return f"RabbitMQ holds something under a name of ours that is of another kind: {reason}"
    argument, what = found["argument"], found["what"]
    ours, theirs = (_value(found[key]) for key in ("ours", "theirs"))
    line = f"RabbitMQ has the {what} with {argument} {theirs}, where {ours} is wanted"
    if (setting := _SETTINGS.get(argument)) and theirs != "none":
        return f"{line}: set {setting} to what is there, or delete it (which loses what it holds)"
    return f"{line}: delete it (which loses what it holds), or use another virtual host"


def _value(words: str) -> str:
    """One value as RabbitMQ tells it: "the value '1D' of type 'longstr'", "'topic'", "none"."""
    quoted = re.search(r"'([^']*)'", words)
    return quoted[0] if quoted else words.strip()
