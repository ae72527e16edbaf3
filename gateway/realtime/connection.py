"""One client's connection: what is known about it, how bytes get to it, and nothing that runs.

While nothing waits in the transport, bytes go straight to its socket: that spares a tenth of what a delivery costs. The
transport gets what the socket does not take, and everything behind that, so that the order holds.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from secrets import token_hex
from typing import TYPE_CHECKING, ClassVar

from auth.permissions import Identity
from orchestrator.events import user_channel

if TYPE_CHECKING:
    from gateway.realtime.history import Stored


def _new_id() -> str:
    # 64 random bits: short, since it is kept for each connection, and too many to meet twice over all gateways.
    return token_hex(8)


@dataclass(slots=True, eq=False)
class Connection:
    """State only: the hub, the sweep and the stream's actions work on it. All of it belongs to one event loop."""

    # How it came, as administrators are told it.
    kind: ClassVar[str] = "websocket"

    transport: asyncio.Transport
    identity: Identity
    # What the short token was narrowed to; None: it was not.
    narrowed: tuple[str, ...] | None
    # Unix seconds at which the authorisation ends.
    expires_at: float | None
    # The user's `tokens_valid_from` when the token was shown: that it has moved since says that the token is void.
    valid_from: float
    # Whether the client takes JSON arrays.
    batch: bool = False
    id: str = field(default_factory=_new_id)
    # The client's address, and the Unix seconds at which it came: for administrators.
    address: str = ""
    opened_at: float = field(default_factory=time.time)
    # In the order of subscription; permitted, whether or not live events flow already.
    channels: tuple[str, ...] = ()
    # Live events flow: it is in the hub's lists. Not so while it catches up from history.
    live: bool = False
    # The code with which it was closed or aborted; nothing more may be written then.
    closed: int | None = None
    # The transport holds more unsent bytes than its high-water mark.
    paused: bool = False
    # The hub's note during one flush: what the connection is to get.
    busy: list[Stored] | None = None

    # Loop times, for the sweep: when to look next, when to ping, until when the pong must come.
    due: float = 0.0
    next_ping: float = 0.0
    pong_due: float | None = None
    # An action is worked on, so that nothing is read, a pong neither.
    handling: bool = False
    # Loop time since which a replay waits for the client to read.
    stalled_since: float | None = None
    # `expiring` was sent.
    warned: bool = False
    # Loop times of the malformed frames within the last minute.
    malformed: tuple[float, ...] = ()

    # Sends bytes and returns how many were taken, or raises OSError. For the fan-out, which holds the rest; everybody
    # else calls `write`.
    send: Callable[[bytes], int] = field(init=False, repr=False)
    # The transport's socket, or None where it must not be written to beside the transport (TLS).
    _socket: socket.socket | None = field(init=False, repr=False)
    _drained: asyncio.Future[None] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        own = self.transport.get_extra_info("socket")
        if own is None or self.transport.get_extra_info("sslcontext") is not None:
            self._socket = None
        else:
            self._socket = socket.socket(own.family, own.type, own.proto, own.fileno())
        # What was written by others may wait in the transport yet.
        self.send = self._append

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

    def write(self, data: bytes) -> None:
        """Send now what the socket takes; the rest waits in the transport. Raises nothing: a loss is told later."""
        try:
            sent = self.send(data)
        except OSError:
            sent = 0
        if sent != len(data):
            self.hold(data, sent)

    def hold(self, data: bytes, sent: int) -> None:
        """Have the transport send what `send` did not, and all that comes until that is gone."""
        self.transport.write(data[sent:])
        self.send = self._append

    def _append(self, data: bytes) -> int:
        """Send behind what waits in the transport; when nothing does, past the transport from now on."""
        if self._socket is not None and not self.transport.get_write_buffer_size():
            self.send = self._socket.send
            return self.send(data)
        self.transport.write(data)
        return len(data)

    def lost(self) -> None:
        """The transport is gone, and closes its socket when this returns: whose number that is next, is another's."""
        self.send = len
        if self._socket is not None:
            self._socket.detach()
            self._socket = None
        self.resume()

    async def drained(self) -> None:
        """Return once the transport's buffer has room, or the connection is lost. One task at a time may wait."""
        if self.paused:
            self._drained = asyncio.get_running_loop().create_future()
            try:
                await self._drained
            finally:
                self._drained = None

    def resume(self) -> None:
        """The buffer has room again, or there is none any more."""
        self.paused = False
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
