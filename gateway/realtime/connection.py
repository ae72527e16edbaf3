"""One client's connection: what is known about it, and nothing that runs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from uuid import uuid4

from auth.permissions import Identity
from orchestrator.events import user_channel


@dataclass(slots=True, eq=False)
class Connection:
    """State only: the hub, the sweep and the reader's actions work on it. All of it belongs to one event loop."""

    transport: asyncio.Transport
    # Returns once the transport's buffer has room again, or the connection is lost. Never raises; not to be cancelled.
    drained: Callable[[], Awaitable[None]]
    identity: Identity
    # What the short token was narrowed to; None: it was not.
    narrowed: tuple[str, ...] | None
    # Unix seconds at which the authorisation ends.
    expires_at: float | None
    # The user's `tokens_valid_from` when the token was shown: that it has moved since says that the token is void.
    valid_from: float
    # Whether the client takes JSON arrays.
    batch: bool = False
    id: str = field(default_factory=lambda: uuid4().hex)
    # In the order of subscription; permitted, whether or not live events flow already.
    channels: dict[str, None] = field(default_factory=dict)
    # Live events flow: it is in the hub's lists. Not so while it catches up from history.
    live: bool = False
    # The code with which it was closed or aborted; nothing more may be written then.
    closed: int | None = None
    # The hub's note during one flush: those of the connection's channels that have something.
    busy: tuple[str, ...] = ()

    # Loop times, for the sweep: when to look next, when to ping, until when the pong must come.
    due: float = 0.0
    next_ping: float = 0.0
    pong_due: float | None = None
    # An action is being worked on: frames after it, pongs too, wait unread.
    handling: bool = False
    # Since when a replay has been waiting for the client to read.
    stalled_since: float | None = None
    # `expiring` was sent.
    warned: bool = False
    # Loop times of the last malformed frames.
    malformed: list[float] = field(default_factory=list)

    @property
    def user_id(self) -> int:
        """Whose it is."""
        return self.identity.user_id

    @property
    def own_channel(self) -> str:
        """The channel on which control messages come, and that every connection has."""
        return user_channel(self.identity.user_id)

    @property
    def ended(self) -> bool:
        """Whether it is closed by us or lost."""
        return self.closed is not None or self.transport.is_closing()
