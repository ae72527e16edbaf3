"""A client of `/ws`, written from docs/protocol.md alone; aiohttp is only its transport.

It keeps a position to resume from as the document says: the `since` of the whole connection, and, until `subscribed`
answers it, a `since` of its own for each channel that was subscribed with one.
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import aiohttp

CONTROL = {"connected", "subscribed", "unsubscribed", "pong", "expiring", "error"}


class Closed(Exception):
    """The connection has ended with `code`."""

    def __init__(self, code: int | None) -> None:
        super().__init__(f"closed with {code}")
        self.code = code


class Client:
    """One client through any number of connections. `token` gets a new short token for each."""

    def __init__(self, session: aiohttp.ClientSession, url: str, token: Callable[[], Awaitable[str]]) -> None:
        self._session = session
        self._url = url
        self._token = token
        self._websocket: aiohttp.ClientWebSocketResponse | None = None
        self._waiting: list[dict[str, Any]] = []
        # All log events, in the order of their arrival, through all connections; and what was said beside them.
        self.events: list[dict[str, Any]] = []
        self.controls: list[dict[str, Any]] = []
        self.frames = 0
        # Where to resume, and the channels that resume there.
        self.position: str | None = None
        self.channels: list[str] = []
        # Channels whose replay is not complete, each with where it goes on.
        self.replaying: dict[str, str] = {}
        self.recovered = True

    async def connect(
        self, *, channels: Iterable[str] = (), since: str | None = None, batch: bool = False, subprotocol: bool = False
    ) -> dict[str, Any]:
        """Open a connection and return the data of `connected`. Raises aiohttp.WSServerHandshakeError when refused."""
        query = {}
        protocols = ()
        if subprotocol:
            protocols = ("cluster-code.v1", f"bearer.{await self._token()}")
        else:
            query["token"] = await self._token()
        if channels := list(channels):
            query["channels"] = ",".join(channels)
        if since is not None:
            query["since"] = since
        if batch:
            query["batch"] = "1"
        self._websocket = await self._session.ws_connect(
            self._url, params=query, protocols=protocols, max_msg_size=0, autoclose=True
        )
        self._waiting = []
        assert self._websocket.protocol == ("cluster-code.v1" if subprotocol else None)
        first = await self.receive()
        assert first["event_type"] == "connected", first
        self.position = first["data"]["position"]
        self.channels = first["data"]["channels"]
        self.recovered = first["data"]["recovered"]
        return first["data"]

    async def resume(self, **options: Any) -> dict[str, Any]:
        """Connect anew with everything that was subscribed, at the position that was reached."""
        replaying, self.replaying = self.replaying, {}
        settled = [channel for channel in self.channels if channel not in replaying]
        data = await self.connect(channels=settled, since=self.position, **options)
        for channel, since in replaying.items():
            await self.subscribe(channel, since=since)
        return data

    async def send(self, message: Any) -> None:
        """Send an action."""
        assert self._websocket is not None
        await self._websocket.send_str(message if isinstance(message, str) else json.dumps(message))

    async def subscribe(self, channel: str, *, since: str | None = None) -> None:
        """Ask for a channel; the answer comes among the messages."""
        message = {"action": "subscribe", "channel": channel}
        if since is not None:
            message["since"] = since
            self.replaying[channel] = since
        await self.send(message)

    async def receive(self, timeout: float = 10) -> dict[str, Any]:
        """The next message, noted. Raises Closed, or TimeoutError."""
        assert self._websocket is not None
        if not self._waiting:
            frame = await asyncio.wait_for(self._websocket.receive(), timeout)
            if frame.type is not aiohttp.WSMsgType.TEXT:
                raise Closed(self._websocket.close_code)
            self.frames += 1
            read = json.loads(frame.data)
            self._waiting = read if isinstance(read, list) else [read]
        message = self._waiting.pop(0)
        self._note(message)
        return message

    async def until(self, event_type: str, timeout: float = 10) -> dict[str, Any]:
        """Receive until a message of that type, and return it."""
        async with asyncio.timeout(timeout):
            while (message := await self.receive(timeout))["event_type"] != event_type:
                pass
        return message

    async def closed(self, timeout: float = 10) -> int | None:
        """Receive until the connection ends; the code."""
        try:
            async with asyncio.timeout(timeout):
                while True:
                    await self.receive(timeout)
        except Closed as end:
            return end.code

    def cut(self) -> None:
        """End the connection as a broken network does: nothing more is sent, what was received and not read is lost."""
        assert self._websocket is not None
        self._websocket._response.connection.transport.abort()
        self._waiting = []

    async def close(self) -> None:
        """End the connection properly."""
        if self._websocket is not None:
            await self._websocket.close()

    @property
    def socket(self) -> aiohttp.ClientWebSocketResponse:
        """The transport, for tests that send what no client should."""
        assert self._websocket is not None
        return self._websocket

    @property
    def numbers(self) -> dict[str, list[int]]:
        """The `n` of the events' data, by channel."""
        found = defaultdict(list)
        for event in self.events:
            found[event["channel"]].append(event["data"]["n"])
        return found

    def _note(self, message: dict[str, Any]) -> None:
        assert {"event_type", "channel", "data"} <= set(message)
        if "offset" not in message:
            assert message["event_type"] in CONTROL
            self.controls.append(message)
            if message["event_type"] == "subscribed":
                self._settle(message)
            return
        self.events.append(message)
        channel, position = message["channel"], f"{self._epoch}:{message['offset']}"
        if channel in self.replaying:
            assert message["offset"] > int(self.replaying[channel].split(":")[1])
            self.replaying[channel] = position
        else:
            assert self.position is None or message["offset"] > int(self.position.split(":")[1])
            self.position = position

    def _settle(self, message: dict[str, Any]) -> None:
        channel = message["channel"]
        if channel not in self.channels:
            self.channels.append(channel)
        if self.replaying.pop(channel, None) is not None:
            self.recovered = self.recovered and message["data"]["recovered"]
        self.position = message["data"]["position"]

    @property
    def _epoch(self) -> str:
        assert self.position is not None
        return self.position.split(":")[0]
