"""A connection to RabbitMQ with one channel: opened at the first host that answers, watched, and given up for good.

Nobody repairs a link. Whoever uses it hears of its loss, and opens another.
"""

from __future__ import annotations

import asyncio
import logging
import re
import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeAlias, TypeVar, cast

import aiormq
from aiormq.abc import AbstractChannel
from yarl import URL

from orchestrator.errors import SettingsError
from orchestrator.eventlog.rabbitmq import wire
from orchestrator.eventlog.rabbitmq.wire import Lost, Taker, Transport, Wire
from orchestrator.settings import AmqpSettings

T = TypeVar("T")
Question: TypeAlias = Callable[[AbstractChannel], Awaitable[T]]

# How aiormq says that something did not work out.
_FAILURES = (aiormq.AMQPError, OSError, TimeoutError, RuntimeError, asyncio.IncompleteReadError)

# Whatever aiormq has to say of connections is told by who uses them, in one line and without a traceback.
logging.getLogger("aiormq").setLevel(logging.CRITICAL)

# AMQP's reply codes for what will not change by itself.
_REFUSED = {403, 530}
PRECONDITION_FAILED, NOT_FOUND, ACCESS_REFUSED = 406, 404, 403


class Refused(Lost):
    """The broker answers, and lets us not in: the user, the password or the virtual host is wrong."""


class Endpoints:
    """The brokers of a cluster, from the settings. Raises SettingsError, which shows nothing of what was given."""

    def __init__(self, settings: AmqpSettings, name: str) -> None:
        self.timeout = settings.timeout
        # RabbitMQ advises against less than 5 seconds.
        heartbeat = max(5, round(settings.timeout))
        self._urls = [
            _url(text.strip()).update_query(name=name) for text in re.split(r",(?=\s*amqps?://)", settings.url)
        ]
        self._urls = [url if "heartbeat" in url.query else url.update_query(heartbeat=heartbeat) for url in self._urls]
        self._first = 0

    async def open(self) -> Link:
        """A link to the first broker that answers, beginning with the one that did last. Raises Lost."""
        failures: list[Lost] = []
        for place in range(len(self._urls)):
            index = (self._first + place) % len(self._urls)
            try:
                link = await Link.open(self._urls[index], self.timeout)
            except Lost as error:
                failures.append(error)
            else:
                self._first = index
                return link
        # What a broker says is worth more than that another is silent.
        raise next((error for error in failures if isinstance(error, Refused)), failures[0])


def _url(text: str) -> URL:
    try:
        url = URL(text)
        # A port that is none shows when it is asked for.
        if url.scheme in ("amqp", "amqps") and url.host and url.port != 0:
            return url
    except ValueError:
        # The reason would show the URL, and with it the password.
        pass
    raise SettingsError("AMQP_URL is not like amqp://user:password@host:port/vhost (or amqps://)")


class Link:
    """One open connection. `name` is the broker's address, fit to be shown."""

    def __init__(self, connection: aiormq.Connection, wire: Wire, timeout: float) -> None:
        self.wire = wire
        self.frame_max: int = connection.connection_tune.frame_max or (1 << 17)
        self.heartbeat = connection.heartbeat_timeout
        self.name = _name(connection.url)
        self._connection = connection
        self.timeout = timeout

    @classmethod
    async def open(cls, url: URL, timeout: float) -> Link:
        """Connect, within `timeout` seconds. Raises Lost; Refused when the broker does not let us in."""
        transport = Transport()
        connection = aiormq.Connection(url, transport_factory=transport)
        try:
            async with asyncio.timeout(timeout):
                await connection.connect()
        except Exception as error:
            failure = _failure(error, transport.wire, _name(url), timeout)
            await _abandon(connection, transport.wire)
            raise failure from error
        except BaseException:
            await _abandon(connection, transport.wire)
            raise
        return cls(connection, cast(Wire, transport.wire), timeout)

    @property
    def silent(self) -> bool:
        """Whether nothing was heard for two heartbeats, in which a broker that lives sends four."""
        quiet = asyncio.get_running_loop().time() - self.wire.heard
        return bool(self.heartbeat) and quiet > 2 * self.heartbeat

    async def lane(self, taker: Taker, *, confirms: bool = False) -> Lane:
        """A new channel whose messages are `taker`'s. Raises Lost."""
        channel = await self._answer(self._connection.channel(publisher_confirms=confirms))
        return Lane(self, channel, taker)

    async def ask(self, question: Question[T]) -> T:
        """Ask the broker something over a channel that may be lost by a refusal. Raises Lost, with AMQP's code."""
        channel = await self._answer(self._connection.channel(publisher_confirms=False))
        try:
            return await self._answer(question(channel))
        finally:
            await self._close_channel(channel)

    async def exists(self, exchange: str) -> bool:
        """Whether there is such an exchange. Raises Lost."""
        try:
            await self.ask(lambda channel: channel.exchange_declare(exchange, passive=True))
        except Lost as error:
            if error.code != NOT_FOUND:
                raise
            return False
        return True

    async def close(self) -> None:
        """Say good-bye, if that is heard, and close. Idempotent."""
        self.wire.lanes.clear()
        if self.wire.gone is None and not self.wire.blocked and not self.silent:
            with suppress(*_FAILURES):
                async with asyncio.timeout(1.0):
                    await _cancellable(self._connection.close())
        await self.abandon()

    async def abandon(self) -> None:
        """Drop the connection, as it is, without a word. Idempotent."""
        self.wire.lanes.clear()
        await _abandon(self._connection, self.wire)

    def drop(self, reason: str) -> None:
        """Cut the connection now: all who use it hear that it is lost."""
        self.wire.lose(reason)
        self.wire.transport.abort()

    async def _answer(self, question: Awaitable[T]) -> T:
        deadline = asyncio.timeout(0 if self.wire.gone else self.timeout)
        self.wire.deadlines.add(deadline)
        try:
            async with deadline:
                return await _cancellable(question)
        except _FAILURES as error:
            raise _failure(error, self.wire, self.name, self.timeout) from error
        finally:
            self.wire.deadlines.discard(deadline)

    async def _close_channel(self, channel: AbstractChannel) -> None:
        if not channel.is_closed and self.wire.gone is None:
            with suppress(*_FAILURES):
                async with asyncio.timeout(self.timeout):
                    await _cancellable(channel.close())


class Lane:
    """A channel of a link whose messages go to a taker, and whose frames can be written by hand."""

    def __init__(self, link: Link, channel: AbstractChannel, taker: Taker) -> None:
        self.link = link
        self.number = channel.number
        self._channel = channel
        self._lane = link.wire.lanes[channel.number] = wire.Lane(taker)
        if link.wire.gone:
            self._lane.lose(link.wire.gone)

    def write(self, frames: bytes) -> None:
        """Send whole frames. Never waits; nothing is sent when the connection is gone."""
        transport = self.link.wire.transport
        if not transport.is_closing():
            transport.write(frames)

    async def call(self, question: Question[T]) -> T:
        """Ask the broker something over this channel. Raises Lost, with AMQP's code."""
        return await self.link._answer(question(self._channel))  # noqa: SLF001  One thing in two parts.

    async def consume(self, queue: str, prefetch: int, arguments: dict[str, Any]) -> None:
        """Have the messages of a queue delivered to the taker. Raises Lost, with AMQP's code."""
        await self.call(lambda channel: channel.basic_qos(prefetch_count=prefetch))
        await self.call(lambda channel: channel.basic_consume(queue, _nobody, arguments=arguments))

    async def close(self) -> None:
        """Close the channel; the link stays. Idempotent."""
        # Its messages on the way still have to be taken off the wire until it is closed.
        self._lane.taker = Taker()
        await self.link._close_channel(self._channel)  # noqa: SLF001
        self.link.wire.lanes.pop(self.number, None)


async def _cancellable(question: Awaitable[T]) -> T:
    """Await it. To a cancellation aiormq may answer with an error of its own: raised is the cancellation."""
    task = asyncio.current_task()
    before = task.cancelling() if task else 0
    try:
        return await question
    finally:
        if task and task.cancelling() > before:
            raise asyncio.CancelledError


async def _nobody(_: object) -> None:
    """What aiormq would call with the deliveries that it never sees."""


async def _abandon(connection: aiormq.Connection, wire: Wire | None) -> None:
    if wire is not None:
        wire.lose("the connection was dropped")
        wire.transport.abort()
    # Its tasks end by the loss of the transport.
    with suppress(*_FAILURES):
        await connection.close()


def _failure(error: Exception, wire: Wire | None, name: str, timeout: float) -> Lost:
    if wire is not None and wire.closed is not None:
        kind = Refused if wire.closed.code in _REFUSED else Lost
        return kind(f"{name}: {wire.closed.reason}", wire.closed.code)
    if wire is not None and wire.gone is not None:
        return Lost(f"{name}: {wire.gone.reason}", wire.gone.code)
    if isinstance(error, Lost):
        return Lost(f"{name}: {error.reason}", error.code)
    code = _code(error)
    if isinstance(error, aiormq.ProbableAuthenticationError):
        return Refused(f"{name}: {error}", ACCESS_REFUSED)
    if isinstance(error, TimeoutError):
        return Lost(f"{name} does not answer within {timeout:g} s")
    if isinstance(error, ssl.SSLCertVerificationError):
        return Lost(f"{name}: its certificate is not trusted: {error.verify_message}")
    return Lost(f"{name}: {error or type(error).__name__}", code)


_CODES: dict[type[Exception], int] = {
    aiormq.ChannelNotFoundEntity: NOT_FOUND,
    aiormq.ChannelPreconditionFailed: PRECONDITION_FAILED,
    aiormq.ChannelAccessRefused: ACCESS_REFUSED,
}


def _code(error: Exception) -> int:
    return next((code for kind, code in _CODES.items() if isinstance(error, kind)), 0)


def _name(url: Any) -> str:
    return f"RabbitMQ at {url.host}:{url.port or (5671 if url.scheme == 'amqps' else 5672)}"
