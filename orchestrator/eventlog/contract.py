"""What an event log promises, whichever it is. `tests/integration/eventlog/contract.py` holds each to it.

- **Order.** Offsets grow, with gaps; every reader sees the same entries with the same offsets in the same order.
- **Durability.** When `publish` returns, the events are in the log. When it raises, each may or may not be: the caller
  publishes them again with the same ids, and readers drop the repeats.
- **Epoch.** Names one incarnation of the log. Offsets of two epochs have nothing to do with each other; no reader
  crosses from one into the next (`EpochChanged`).
- **Reading never loses.** A reader that falls behind what the log keeps is told so (`Truncated`), never skipped ahead.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
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
