"""`cluster-code watch`: events of channels as they happen, through every cut, each once and in order.

What it shows goes to stdout, what it has to say to stderr. It speaks only what `docs/protocol.md` says.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
from base64 import b64encode
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import aiohttp
import orjson
from rich.console import Console
from rich.text import Text

from gateway.realtime.protocol import BEARER, REASONS, SUBPROTOCOL
from orchestrator.database import backoff
from orchestrator.errors import ClusterCodeError, SettingsError
from orchestrator.settings import load
from scripts import display, target, users
from scripts.settings import DevSettings

if TYPE_CHECKING:
    from environs import Env

# Gives a main token; another one than before when that was refused, if there is one.
Token = Callable[[bool], Awaitable[str]]

TOKEN = "CLUSTER_CODE_TOKEN"  # noqa: S105  The variable's name.
# Seconds that an answer may take, and that a connection must last to count as a stable one.
_ANSWER = 15.0
_STABLE = 10.0


class WatchFailed(ClusterCodeError):
    """Trying again is no use."""


class _Lost(Exception):
    """The connection, or the way to it: trying again helps. `wait`: seconds to wait at least."""

    def __init__(self, why: str, wait: float = 0) -> None:
        super().__init__(why)
        self.wait = wait


class _Terminal(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


@dataclass(frozen=True, slots=True)
class Options:
    """What to watch, and how it is shown."""

    channels: tuple[str, ...]
    json: bool = False
    since: str | None = None
    url: str | None = None
    token_file: Path | None = None
    # Whose eyes to see with when the server that runs here is watched.
    email: str | None = None


def main(env: Env, options: Options) -> int:
    """Watch until interrupted; the exit code. Raises SettingsError, WatchFailed."""
    watch = Watch(_url(env, options), _token(env, options), options)
    try:
        asyncio.run(watch.run())
    except BrokenPipeError:
        # Whoever read has enough. Python would complain once more when it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    finally:
        if watch.position:
            watch.say(f"go on after this by --since {watch.position}")
    return 0


def _url(env: Env, options: Options) -> str:
    if options.url:
        return options.url.rstrip("/")
    running = target.instance(env).running()
    if running is None:
        raise WatchFailed("no server runs here: start one by `make run` (or name one by --url)")
    return running.url


def _token(env: Env, options: Options) -> Token:
    """What gives the main token: a file, read for each connection; the environment; or the installation's keys."""
    file, variable = options.token_file, os.environ.get(TOKEN, "").strip()
    issued: list[str] = []

    async def of_file(anew: bool) -> str:
        try:
            return (await asyncio.to_thread(Path(file or "").read_text)).strip()
        except (OSError, UnicodeDecodeError) as error:
            raise WatchFailed(f"--token-file: cannot read {file}: {error}") from error

    async def of_environment(anew: bool) -> str:
        return variable

    async def of_installation(anew: bool) -> str:
        # Kept: while the server restarts, its database is not to be reached for.
        if anew or not issued:
            email = options.email or load(DevSettings, env).admin_email
            issued[:] = [await users.issue_token(env, email, ["read"], [], None)]
        return issued[0]

    if file is not None:
        return of_file
    if variable:
        return of_environment
    if options.url:
        raise SettingsError(f"{TOKEN} is not set: put a main or API token there, or into a file for --token-file")
    return of_installation


class Watch:
    """One watch, over any number of connections. `position` is where it would resume."""

    def __init__(self, url: str, token: Token, options: Options) -> None:
        self.position = options.since
        self._url = url
        self._token = token
        self._options = options
        self._out = _Terminal(highlight=False, soft_wrap=True)
        self._err = Console(stderr=True, highlight=False, soft_wrap=True)

    def say(self, text: str, style: str = "dim") -> None:
        """Tell the person, beside the events."""
        self._err.print(Text(text, style=style))

    async def run(self) -> None:
        """Watch for ever. Raises WatchFailed; BrokenPipeError when nobody reads any more."""
        failures, loop = 0, asyncio.get_running_loop()
        async with aiohttp.ClientSession() as http:
            while True:
                began = loop.time()
                try:
                    await self._connection(http)
                except (aiohttp.ClientError, TimeoutError, _Lost) as error:
                    failures = 0 if loop.time() - began >= _STABLE else failures
                    delay = max(backoff(failures, base=0.5, cap=20), getattr(error, "wait", 0))
                    failures += 1
                    self.say(f"{error or type(error).__name__}; trying again in {delay:.1f} s", "yellow")
                    await asyncio.sleep(delay)

    async def _connection(self, http: aiohttp.ClientSession) -> None:
        """One connection, until it ends: always by an exception."""
        query = {"batch": "1"} | ({"since": self.position} if self.position else {})
        if self._options.channels:
            query["channels"] = ",".join(self._options.channels)
        protocols = (SUBPROTOCOL, f"{BEARER}{await self._swap(http)}")
        try:
            async with asyncio.timeout(_ANSWER):
                # Pings of our own: the server's are answered without a word, and a dead network says nothing.
                socket = await http.ws_connect(
                    f"{self._url}/ws", params=query, protocols=protocols, heartbeat=20, max_msg_size=0
                )
        except aiohttp.WSServerHandshakeError as error:
            await self._refused(http, query, error.status)
        async with socket:
            async for frame in socket:
                if frame.type is not aiohttp.WSMsgType.TEXT:
                    break
                read = orjson.loads(frame.data)
                for message in read if isinstance(read, list) else [read]:
                    await self._take(http, socket, message)
                sys.stdout.flush()
            code = socket.close_code or 1006
            reason = f"{REASONS[code]} ({code})" if code in REASONS else str(code)
            if 4500 <= code < 5000:
                raise WatchFailed(f"the server has closed the connection for good: {reason}")
            raise _Lost(f"connection lost: {reason}")

    async def _take(
        self, http: aiohttp.ClientSession, socket: aiohttp.ClientWebSocketResponse, message: dict[str, Any]
    ) -> None:
        data = message["data"]
        if "offset" in message:
            self._show(message)
            if self.position:
                self.position = f"{self.position.partition(':')[0]}:{message['offset']}"
        elif message["event_type"] == "connected":
            how, self.position = "resumed after" if self.position else "connected at", data["position"]
            if data["recovered"]:
                self.say(f"{how} {self.position}: {', '.join(data['channels'])}", "green")
            else:
                self.say(f"recovered: false; what came before {self.position} may be missing here", "bold red")
        elif message["event_type"] == "expiring":
            await socket.send_json({"action": "refresh", "token": await self._swap(http)})
        elif message["event_type"] == "error":
            self.say(data["message"], "red")

    def _show(self, message: dict[str, Any]) -> None:
        if self._options.json:
            sys.stdout.buffer.write(orjson.dumps(message, option=orjson.OPT_APPEND_NEWLINE))
        else:
            self._out.print(display.line(message))

    async def _swap(self, http: aiohttp.ClientSession) -> str:
        """A new short token. Raises _Lost, WatchFailed, aiohttp.ClientError, TimeoutError."""
        timeout = aiohttp.ClientTimeout(total=_ANSWER)
        for anew in (False, True):
            headers = {"Authorization": f"Bearer {await self._token(anew)}"}
            async with http.post(f"{self._url}/api/v1/auth", headers=headers, timeout=timeout) as answer:
                content = await answer.read()
            if answer.status != 401:
                break
        if answer.status != 200:
            raise _refusal(answer, content)
        return str(orjson.loads(content)["short_token"])

    async def _refused(self, http: aiohttp.ClientSession, query: dict[str, str], status: int) -> NoReturn:
        """Raise what the server has against the handshake: aiohttp keeps its words from us, so they are asked for."""
        headers = {
            "Connection": "Upgrade",
            "Upgrade": "websocket",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": b64encode(random.randbytes(16)).decode(),
            "Sec-WebSocket-Protocol": f"{SUBPROTOCOL}, {BEARER}{await self._swap(http)}",
        }
        timeout = aiohttp.ClientTimeout(total=_ANSWER)
        async with http.get(f"{self._url}/ws", params=query, headers=headers, timeout=timeout) as answer:
            if answer.status == status:
                raise _refusal(answer, await answer.read())
        raise _Lost(f"the server has refused the connection ({status})")


def _refusal(answer: aiohttp.ClientResponse, problem: bytes) -> Exception:
    """What an answer means: to try again, or to give up with what the server says."""
    try:
        detail = str(orjson.loads(problem)["detail"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        detail = f"it answers {answer.status} to {answer.method} {answer.url.path}"
    if answer.status >= 500 or answer.status in (408, 425, 429):
        wait = answer.headers.get("Retry-After", "")
        return _Lost(f"the server says: {detail}", float(wait) if wait.isdigit() else 0)
    return WatchFailed(f"the server refuses: {detail}")
