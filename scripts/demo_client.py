"""What every demonstration does as a client, told as it happens: sign in, follow the socket, ask by REST."""

from __future__ import annotations

import asyncio
import secrets
import sys
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import aiohttp
import orjson
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from scripts import display, target
from scripts.demo_repository import DemoFailed

if TYPE_CHECKING:
    from environs import Env

# Seconds that one answer may take.
_ANSWER = 15.0


@dataclass(frozen=True, slots=True)
class Account:
    """Whose the demonstration is; None: a throw-away one is registered."""

    email: str | None = None
    password: str | None = None


def server(env: Env, url: str | None) -> str:
    """Where the server is: `url`, or the `cluster-code dev` that runs on DATA_DIR. Raises DemoFailed without one."""
    if url is None and (running := target.instance(env).running()) is not None:
        url = running.url
    if url is None:
        raise DemoFailed("no server runs here: start one by `make run` (or name one by --url)")
    return url.rstrip("/")


class Client:
    """A client of a server. `step` is what it is doing; `http` is open within `run`."""

    http: aiohttp.ClientSession

    def __init__(self, url: str, steps: int) -> None:
        self.step = "starting"
        self.url = url
        self.console = Console(highlight=False, soft_wrap=True)
        self._steps = steps
        self._headers: dict[str, str] = {}

    def run(self, demonstration: Callable[[], Awaitable[None]], deadline: float) -> int:
        """Run it within `deadline` seconds, with a bar that moves; returns the exit code."""
        return asyncio.run(self._run(demonstration, deadline))

    async def _run(self, demonstration: Callable[[], Awaitable[None]], deadline: float) -> int:
        with Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=20), TimeElapsedColumn(),
            console=self.console, transient=True,
        ) as self._progress:  # fmt: skip
            self._bar = self._progress.add_task(self.step, total=self._steps)
            try:
                async with (
                    asyncio.timeout(deadline),
                    aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_ANSWER)) as self.http,
                ):
                    await demonstration()
            except TimeoutError:
                problem = f"it took longer than {deadline:g} s; it was at: {self.step}"
            except (DemoFailed, aiohttp.ClientError) as error:
                problem = f"{error or type(error).__name__} (at: {self.step})"
            else:
                self.console.print("[bold green]All of it happened.[/]")
                return 0
        print(f"cluster-code: the demonstration failed: {problem}", file=sys.stderr)
        return 1

    async def sign_in(self, account: Account) -> None:
        """Sign in, with a new account where none is given."""
        self.next("signing in")
        email, password = account.email, account.password
        if not email or not password:
            email, password = f"demo-{secrets.token_hex(6)}@localhost", secrets.token_urlsafe(15)
            await self.call("POST", "/auth/register", {"email": email, "password": password, "name": "Demo"})
        answer = await self.call("POST", "/auth/login", {"email": email, "password": password})
        self._headers["Authorization"] = f"Bearer {answer['access_token']}"
        self.say(f"signed in as {email}")

    async def connect(self, stack: AsyncExitStack) -> tuple[aiohttp.ClientWebSocketResponse, str]:
        """The open socket, and the position from which nothing is missed."""
        self.next("swapping the main token for a short one")
        short = await self.call("POST", "/auth")
        self.say(f"a short token, good for {short['expires_in']} s and one connection")
        self.next("connecting to /ws")
        protocols = ("cluster-code.v1", f"bearer.{short['short_token']}")
        socket = await stack.enter_async_context(self.http.ws_connect(f"{self.url}/ws", protocols=protocols))
        connected = await self.message(socket)
        if connected["event_type"] != "connected":
            raise DemoFailed(f"the first frame is {connected['event_type']!r} and not 'connected'")
        return socket, connected["data"]["position"]

    async def subscribe(self, socket: aiohttp.ClientWebSocketResponse, channel: str, position: str) -> None:
        """Follow a channel, from `position` on."""
        asked = {"action": "subscribe", "channel": channel, "since": position, "id": "demo"}
        await socket.send_str(orjson.dumps(asked).decode())

    async def message(self, socket: aiohttp.ClientWebSocketResponse, *, twice: str = "") -> dict[str, Any]:
        """The next envelope, shown unless it is one of the user's channel that begins with `twice`, which another
        channel tells as well. Raises DemoFailed when the server has closed the socket."""
        frame = await socket.receive()
        if frame.type is not aiohttp.WSMsgType.TEXT:
            raise DemoFailed(f"the server closed the socket ({socket.close_code} {frame.extra or ''})".rstrip())
        message: dict[str, Any] = orjson.loads(frame.data)
        if not (twice and message["event_type"].startswith(twice) and message["channel"].startswith("user:")):
            self.console.print(display.line(message))
        if message["event_type"] == "error":
            raise DemoFailed(f"the socket says: {message['data']['message']}")
        return message

    async def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """What the API answers. Raises DemoFailed for an answer of 400 or more, aiohttp.ClientError for none."""
        data = None if body is None else orjson.dumps(body)
        headers = self._headers | ({"Content-Type": "application/json"} if data else {})
        async with self.http.request(method, f"{self.url}/api/v1{path}", data=data, headers=headers) as answer:
            content = await answer.read()
            if answer.status >= 400:
                raise DemoFailed(f"{method} {path} answers {answer.status}: {_detail(content)}")
            return orjson.loads(content) if content else None

    def next(self, step: str) -> None:
        """Begin a step."""
        self.step = step
        self._progress.update(self._bar, advance=1, description=step)

    def at(self, what: str) -> None:
        """Show where within the step it is."""
        self._progress.update(self._bar, description=what)

    def say(self, text: str) -> None:
        """Tell what was found."""
        self.console.print(Text(f"  {text}", style="dim"))


def _detail(content: bytes) -> str:
    """What a problem document says."""
    try:
        document = orjson.loads(content)
        detail = str(document["detail"])
        errors = {name: " ".join(lines) for name, lines in document.get("errors", {}).items()}
        return detail + "".join(f" {name}: {wrong}" for name, wrong in errors.items() if wrong not in detail)
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        return content[:200].decode(errors="replace")
