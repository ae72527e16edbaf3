"""What an event log promises, whichever it is. `tests/integration/eventlog/contract.py` holds each to it.

- **Order.** Offsets grow, with gaps; every reader sees the same entries with the same offsets in the same order.
- **Durability.** When `publish` returns, the events are in the log. When it raises, each may or may not be: the caller
  publishes them again with the same ids, and readers drop the repeats.
- **Epoch.** Names one incarnation of the log. Offsets of two epochs have nothing to do with each other; no reader
  crosses from one into the next (`EpochChanged`).
- **Reading never loses.** A reader that falls behind what the log keeps is told so (`Truncated`), never skipped ahead.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from orchestrator.events import Event


class Truncated(Exception):
    """The entries after the offset asked for are no longer all there; `first` is the oldest offset that is."""

    def __init__(self, first: int) -> None:
        super().__init__(f"the log begins at offset {first}")
        self.first = first


class EpochChanged(Exception):
    """The log was lost and has begun anew as `epoch`, which is to be read from its own beginning."""

    def __init__(self, epoch: str) -> None:
        super().__init__(f"the log has begun anew, as {epoch}")
        self.epoch = epoch


# Not frozen, which would cost a microsecond an entry; nobody changes one nevertheless.
@dataclass(slots=True)
class Entry:
    """One entry as the log keeps it. `body` is the envelope's JSON, without `offset`.

    An empty `channel` says that nobody is to see it: it is there for the offset alone. With `invalid`, which says why,
    its body is no envelope, and `event_type` is what the publisher routed it by.
    """

    offset: int
    event_id: str
    event_type: str
    channel: str
    body: bytes
    invalid: str = ""


class EventLog(Protocol):
    """One ordered log of events. All methods may be called from several tasks at once."""

    @property
    def epoch(self) -> str:
        """The incarnation, 1-32 characters of [a-z0-9]. Known once the log is open; another after `EpochChanged`."""
        ...

    async def head(self) -> int:
        """The offset of the newest entry; 0 when there never was one. The first entry's offset is at least 1.

        Raises LogUnavailable.
        """
        ...

    async def offset_before(self, seconds: float) -> int:
        """An offset after which every entry of the last `seconds` comes: perhaps earlier than need be, never later.

        Raises LogUnavailable.
        """
        ...

    async def publish(self, events: Sequence[Event]) -> None:
        """Append, in order, and return once that is durable.

        Raises LogUnavailable. Cancelling leaves open whether the events were appended.
        """
        ...

    def read(self, after: int) -> AsyncGenerator[Sequence[Entry], None]:
        """Every entry with an offset greater than `after`, in batches as they come, without end.

        Raises Truncated when some of them are gone, EpochChanged when the log has begun anew, LogUnavailable when it
        can no longer be read; `aclose` the generator to stop.
        """
        ...

    async def check(self) -> None:
        """Return when the log answers; raise LogUnavailable, with the reason, when it does not."""
        ...

    async def close(self) -> None:
        """End all readers and give everything back. Idempotent."""
        ...


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that nobody can use: it is kept in the queue of dead letters with the reason.

    `offset` and `epoch` say where it lies in the log; 0 and "": it does not come from there.
    """

    body: bytes
    reason: str
    routing_key: str
    offset: int
    event_id: str
    epoch: str = ""


@dataclass(frozen=True, slots=True)
class Delivery:
    """One message from a queue of ours."""

    routing_key: str
    message_id: str
    body: bytes


class Undeliverable(Exception):
    """Raised by a handler of `consume`: this message will never do, for the reason given."""


class Exchange(Protocol):
    """What there is beside the log where that is in RabbitMQ: queues of ours."""

    async def dead_letter(self, letters: Sequence[DeadLetter]) -> None:
        """Put messages into the queue of dead letters; returns once that is durable. Raises LogUnavailable."""
        ...

    async def consume(
        self, queue: str, bindings: Sequence[str], handler: Callable[[Delivery], Awaitable[None]]
    ) -> None:
        """Hand the messages of a durable queue to `handler`, one at a time, in order, for ever.

        Of all who consume it, one gets the messages. One for which the handler raises Undeliverable goes to the dead
        letters; after any other error it is handled again, and those behind it wait. Raises LogUnavailable when the log
        is closed.
        """
        ...
