"""One server, behind a proxy that cuts, and one browser for all tests of a module."""

from __future__ import annotations

import asyncio
import socket
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import aiohttp
import pytest_asyncio
from playwright.async_api import BrowserContext, Page

from tests.browser.browser import chromium
from tests.integration.endtoend.server import DEADLINE, Client, Server
from tests.proxy import TcpProxy

# What a page of an app would do, and a count of the sockets that it has open at once.
_APP = """async ([token, since]) => {
  const { ClusterCode, swap } = await import("/static/cluster-code.js");
  const app = (window.app = { names: [], states: [], lost: [], errors: [], sockets: [], most: 0 });
  class Counted extends WebSocket {
    constructor(...given) {
      super(...given);
      app.sockets.push(this);
      app.most = Math.max(app.most, app.sockets.filter(({ readyState }) => readyState < 2).length);
    }
  }
  addEventListener("pageshow", ({ persisted }) => (app.persisted = persisted));
  const client = (app.client = new ClusterCode({ auth: swap(token), WebSocket: Counted, since }));
  client.on("state", ({ state }) => app.states.push(state));
  client.on("lost", (lost) => app.lost.push(lost));
  client.on("error", (error) => app.errors.push(error.message));
  client.on("event", ({ event_type, data }) => event_type === "workspace.created" && app.names.push(data.name));
  client.connect();
}"""


@dataclass
class Stage:
    """The server, the way to it, a browser, and events in the order of a number."""

    server: Server
    proxy: TcpProxy
    context: BrowserContext
    client: Client
    published: list[str] = field(default_factory=list)
    _numbers: count = field(default_factory=lambda: count(1))

    @property
    def url(self) -> str:
        """The server as the browser reaches it: through the proxy."""
        return f"http://127.0.0.1:{self.proxy.port}"

    async def publish(self, number: int = 1) -> None:
        """Make so many events, one after the other, past the proxy."""
        for _ in range(number):
            name = f"w{next(self._numbers)}"
            await self.client.call("POST", "/workspaces", {"name": name})
            self.published.append(name)

    async def open(self) -> App:
        """A page with an app that is connected; it sees what is published from now on."""
        page = await self.context.new_page()
        await page.goto(f"{self.url}/")
        await page.evaluate(_APP, [self.client._token, None])
        app = App(self, page, len(self.published))
        await app.until("app.client.state === 'connected'")
        return app


@dataclass
class App:
    """A page, and the number of events that were published before it was there."""

    stage: Stage
    page: Page
    before: int

    async def until(self, condition: str) -> None:
        """Wait until it holds; fails with what the app has seen."""
        try:
            async with asyncio.timeout(DEADLINE):
                while not await self.page.evaluate(condition):
                    await asyncio.sleep(0.02)
        except TimeoutError:
            seen = await self.page.evaluate(
                "JSON.stringify({ ...app, client: undefined, sockets: app.sockets.length })"
            )
            raise AssertionError(f"{condition} does not come true: {seen}") from None

    async def has_all(self) -> None:
        """Wait until it has as many events as there are: all, once, in order, and never through two sockets."""
        expected = self.stage.published[self.before :]
        await self.until(f"app.names.length >= {len(expected)}")
        seen = await self.page.evaluate("({ names: app.names, lost: app.lost, most: app.most })")
        assert seen == {"names": expected, "lost": [], "most": 1}

    async def state(self, name: str) -> Any:
        """Something that the app has noted."""
        return await self.page.evaluate(f"app.{name}")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def context() -> AsyncIterator[BrowserContext]:
    """The browser."""
    async with chromium() as context:
        yield context


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def start(context: BrowserContext) -> AsyncIterator[Callable[..., Any]]:
    """Starts a stage; all of it ends with the module. `start(AMQP_URL=…)` sets the server's environment."""
    stages: list[Stage] = []
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=DEADLINE)) as http:
        with tempfile.TemporaryDirectory(prefix="cc-") as folder:

            async def start(**environment: str) -> Stage:
                with socket.socket() as free:
                    free.bind(("127.0.0.1", 0))
                    port = free.getsockname()[1]
                # The same port after a restart.
                server = Server(Path(folder) / str(len(stages)), PORT=str(port), **environment)
                proxy = await TcpProxy("127.0.0.1", port).__aenter__()
                stages.append(Stage(server, proxy, context, Client(http, server)))
                await server.start()
                await stages[-1].client.sign_in()
                return stages[-1]

            try:
                yield start
            finally:
                for stage in stages:
                    await stage.proxy.__aexit__()
                    await stage.server.stop()
                    await stage.server.until_nothing_is_left()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage(start: Callable[..., Any]) -> Stage:
    """A server on the embedded database, with the log in memory."""
    return await start()
