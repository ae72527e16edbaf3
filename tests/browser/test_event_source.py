"""A real browser's EventSource: it comes back by itself, misses nothing, and stays away when it is told to."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer, unused_port

from gateway.app import build, listening
from gateway.context import CONTEXT, Context
from gateway.realtime import sse
from gateway.settings import GatewaySettings
from orchestrator.database import Pool
from orchestrator.eventlog.memory import MemoryLog
from orchestrator.events import Event
from orchestrator.settings import DatabaseSettings
from tests.integration.realtime.conftest import TOKENS

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# A browser on a busy machine takes long to begin.
PATIENCE = 90.0
PAGE = """<!doctype html><meta charset="utf-8"><script>
const told = [];
let sending = Promise.resolve();
const post = (body) => () => fetch("/tell", { method: "POST", body });
const tell = (what) => { sending = sending.then(post(JSON.stringify(what))); };
const source = new EventSource(%s);
source.onmessage = ({ data, lastEventId }) => tell({ message: JSON.parse(data), id: lastEventId });
source.onerror = () => tell({ state: source.readyState });
</script>"""


class Page:
    """What the page has told."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []
        self.url = ""

    async def show(self, _: web.Request) -> web.Response:
        return web.Response(text=PAGE % orjson.dumps(self.url).decode(), content_type="text/html")

    async def tell(self, request: web.Request) -> web.Response:
        self.told.append(orjson.loads(await request.read()))
        return web.Response(status=204)

    @property
    def messages(self) -> list[dict[str, Any]]:
        return [one["message"] for one in self.told if "message" in one]

    @property
    def numbers(self) -> list[int]:
        return [message["data"]["n"] for message in self.messages if "offset" in message]

    def count(self, event_type: str) -> int:
        return sum(message["event_type"] == event_type for message in self.messages)


async def until(condition: Any) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.02)


@asynccontextmanager
async def chromium(url: str, folder: Path) -> AsyncIterator[None]:
    if CHROMIUM is None:
        reason = "chromium is not installed: apt install chromium"
        if os.environ.get("CI"):
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    process = await asyncio.create_subprocess_exec(
        CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--disable-background-networking", f"--user-data-dir={folder}", "--remote-debugging-port=0", url,
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL, start_new_session=True,
        env={**os.environ, "HOME": str(folder)},
    )  # fmt: skip
    try:
        yield
    finally:
        # The browser is many processes.
        os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


@pytest.mark.timeout(240)
async def test_a_browser_comes_back_by_itself_until_it_must_not(
    pool: Pool, database_settings: DatabaseSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sse, "_RETRY", (500, 600))
    page, log, port = Page(), MemoryLog(), unused_port()
    pages = web.Application()
    pages.router.add_get("/", page.show)
    pages.router.add_post("/tell", page.tell)
    async with TestServer(pages) as server:
        origin = str(server.make_url("/")).rstrip("/")
        settings = GatewaySettings(port=port, cors_origins=[origin])
        app = build(settings, TOKENS, pool, log, database_settings)
        async with listening(app, settings):
            context: Context = app[CONTEXT]
            hub = context.hub
            user_id = await pool.fetchval(
                "INSERT INTO users (email, name, is_admin) VALUES ('a@example.org', 'a', true) RETURNING id"
            )
            async with pool.acquire() as connection:
                identity = await context.tokens.authenticate(connection, context.tokens.issue_main(user_id))
            token = context.tokens.issue_short(identity)
            page.url = f"http://127.0.0.1:{port}/api/v1/events?channels=app:1&token={token}"

            async def publish(*numbers: int) -> None:
                await log.publish([Event("test.event", "app:1", {"n": number}) for number in numbers])

            async with chromium(origin, tmp_path):
                await until(lambda: page.count("connected") == 1)
                for cut in range(1, 6):
                    await publish(10 * cut, 10 * cut + 1)
                    await until(lambda cut=cut: page.numbers[-1:] == [10 * cut + 1])
                    (one,) = hub.connections.values()
                    if cut == 3:
                        hub.close(one, 4011)
                    else:
                        one.transport.abort()
                    await publish(10 * cut + 2)
                    await until(lambda cut=cut: page.count("connected") == cut + 1)
                await until(lambda: page.numbers[-1:] == [52])
                assert page.numbers == [10 * cut + place for cut in range(1, 6) for place in range(3)]
                assert all(one["data"]["recovered"] for one in page.messages if one["event_type"] == "connected")
                # CONNECTING: it has come back each time by itself.
                assert {one["state"] for one in page.told if "state" in one} == {0}
                (one,) = hub.connections.values()
                hub.close(one, 4503)
                # CLOSED: it was refused, and gives up.
                await until(lambda: page.told[-1] == {"state": 2})
                assert page.messages[-1]["data"] == {
                    "code": 4503, "reason": "disconnected by an administrator", "reconnect": False,
                }  # fmt: skip
                assert hub.connections == {}
    await log.close()
