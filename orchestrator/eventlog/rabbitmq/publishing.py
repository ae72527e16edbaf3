"""Publishing over one link: in batches, confirmed, and never into a stream that is not there.

RabbitMQ confirms what no queue took (and returns it, if it was mandatory), and what only others' queues took. So after
each batch the broker is asked, on the same channel and therefore in order, whether the exchange of the epoch exists: it
does only if the stream was bound while the batch was routed. If it does not, the broker closes the channel.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from orchestrator.eventlog.rabbitmq.link import Lane, Link
from orchestrator.eventlog.rabbitmq.topology import epoch_exchange
from orchestrator.eventlog.rabbitmq.wire import Lost, Publications, Taker, exchange_check


class Message(NamedTuple):
    """What is published: to an exchange, or to the queue that the routing key names where `exchange` is empty."""

    exchange: str
    routing_key: str
    id: str
    body: bytes
    headers: dict[str, Any] | None = None


class Refusal(Exception):
    """The broker has a message and could not keep it."""


class _Batch:
    """Messages on their way. `done` is set when all are confirmed and the epoch still lasts, or with `error`."""

    __slots__ = ("checked", "done", "error", "left")

    def __init__(self, left: int) -> None:
        self.left = left
        self.checked = False
        self.done = asyncio.Event()
        self.error: Exception | None = None

    def look(self) -> None:
        if self.checked and self.left == 0:
            self.done.set()

    def fail(self, error: Exception) -> None:
        self.error = self.error or error
        self.done.set()


class Publisher(Taker):
    """Publishes over a link, for one epoch. When `over` is set, nothing more can be: another one is to be opened."""

    def __init__(self, link: Link, epoch: str) -> None:
        self.link = link
        self.epoch = epoch
        self.over: Lost | None = None
        self._lane: Lane
        self._check = b""
        self._next = 1
        # By delivery tag, in order.
        self._unconfirmed: dict[int, _Batch] = {}
        self._unchecked: deque[_Batch] = deque()
        self._returned: set[str] = set()
        self._unblocked = asyncio.Event()
        self._publications: dict[str, Publications] = {}

    @classmethod
    async def open(cls, link: Link, epoch: str) -> Publisher:
        """Open a channel for it. Raises Lost."""
        publisher = cls(link, epoch)
        lane = publisher._lane = await link.lane(publisher, confirms=True)
        publisher._check = exchange_check(lane.number, epoch_exchange(epoch))
        return publisher

    async def publish(self, messages: Sequence[Message]) -> int:
        """Publish in order; how many of the first ones are kept: fewer than given when one was returned.

        Waits while the broker takes no messages. Raises Lost when the link is lost, or the epoch over: each message may
        be kept or not; Refusal. Cancelling leaves open which are kept, too.
        """
        while self.link.wire.blocked and not self.over:
            self._unblocked.clear()
            await self._unblocked.wait()
        if self.over:
            raise self.over
        batch = _Batch(len(messages))
        frames = [self._frames(message) for message in messages]
        for tag in range(self._next, self._next + len(messages)):
            self._unconfirmed[tag] = batch
        self._next += len(messages)
        self._unchecked.append(batch)
        self._lane.write(b"".join((*frames, self._check)))
        await batch.done.wait()
        if batch.error:
            raise batch.error
        kept = len(messages)
        if self._returned:
            kept = sum(1 for _ in takewhile(lambda message: message.id not in self._returned, messages))
            self._returned.difference_update(message.id for message in messages)
        return kept

    def _frames(self, message: Message) -> bytes:
        to = self._publications.get(message.exchange)
        if to is None:
            to = Publications(self._lane.number, message.exchange, self.link.frame_max)
            self._publications[message.exchange] = to
        return to.frames(message.routing_key, message.id, message.body, message.headers)

    def returned(self, message_id: str) -> None:
        self._returned.add(message_id)

    def confirmed(self, tag: int, *, multiple: bool, taken: bool) -> None:
        if multiple:
            tags = list(takewhile(lambda each: each <= tag, self._unconfirmed))
        else:
            tags = [tag] if tag in self._unconfirmed else []
        for each in tags:
            batch = self._unconfirmed.pop(each)
            batch.left -= 1
            if not taken:
                batch.fail(Refusal("RabbitMQ could not keep a message"))
            elif batch.left == 0:
                batch.look()

    def checked(self) -> bool:
        if not self._unchecked:
            return False
        batch = self._unchecked.popleft()
        batch.checked = True
        batch.look()
        return True

    def unblocked(self) -> None:
        self._unblocked.set()

    def lost(self, error: Lost) -> None:
        self.over = error
        self._unblocked.set()
        for batch in (*self._unconfirmed.values(), *self._unchecked):
            if not batch.done.is_set():
                batch.fail(error)
        self._unconfirmed.clear()
        self._unchecked.clear()
