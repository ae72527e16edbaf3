"""The way to one Docker engine: where it is, TLS, its API's version, deadlines, and what its answers mean.

aiodocker holds the session. Its own calls have no deadlines, end a stream whose connection broke as if it had ended,
and choke on long lines; so requests are made here, on that session.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import ssl
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiodocker
import aiohttp
from yarl import URL

from orchestrator.errors import EngineRefused, ProviderUnavailable
from orchestrator.tasks import to_the_end

# The versions of the API that we know: what a newer engine has besides is not used, an older one can do too little.
OLDEST, NEWEST = (1, 41), (1, 51)
_OLDEST_ENGINE = "20.10"

# Seconds.
_CONNECT_TIMEOUT = 10.0
# Where systemd holds the socket, connections to an engine that is being started again wait.
_STAYS = 2.0
# So long a stream may be silent before the engine is asked whether it is there.
_QUIET = 30.0
# Where an engine of this machine listens, in the order of docker's own client.
_SOCKETS = ("/var/run/docker.sock", "/run/docker.sock", "~/.docker/run/docker.sock")
# Of a body that is sent, in bytes.
_PIECE = 256 * 1024
# The words of an engine that answers, but is on its way down or up.
_AWAY = re.compile(
    r"shutting down|containerd\.sock|transport is closing|error reading from server: EOF|is not running yet"
)

Params = Mapping[str, Any]


class Silent(ProviderUnavailable):
    """It has not answered in time; it may be waiting for somebody else."""


class Connection:
    """Requests to one engine. `timeout` (seconds) bounds each answer, and the beginning of each stream.

    All raise ProviderUnavailable (nothing there, no answer in time, hung up, going down) and EngineRefused. Cancelling
    closes the connection, which ends what the engine does for it. Params that are None are left out, others that are
    no strings are written as JSON. Nothing is opened before the first request. `tls` is in place of what
    DOCKER_TLS_VERIFY and DOCKER_CERT_PATH say.
    """

    def __init__(
        self, host: str = "", *, name: str = "Docker", timeout: float = 15.0, tls: ssl.SSLContext | None = None
    ) -> None:
        self._tls = tls
        # Where people can mend it.
        self._said_by = "its endpoint" if host else "DOCKER_HOST"
        self.host = host or os.environ.get("DOCKER_HOST") or _local()
        self.name = name
        self.timeout = timeout
        self._docker: aiodocker.Docker | None = None
        self._closed = False
        self._version: tuple[int, int] | None = None
        self._negotiating = asyncio.Lock()

    async def close(self) -> None:
        """Close all connections, for good; what still runs on one fails. Idempotent."""
        self._closed = True
        docker, self._docker = self._docker, None
        if docker is not None:
            await docker.close()
            # It is ours, since theirs opens 100 connections at most.
            await docker.connector.close()

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    async def version(self) -> tuple[int, int]:
        """The version of the API that is spoken: the engine's, or the newest that we know."""
        async with self._negotiating:
            if self._version is None:
                async with self._bounded(self.timeout):
                    self._version = await self._negotiate()
            return self._version

    async def json(
        self,
        method: str,
        path: str,
        *,
        params: Params | None = None,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> Any:
        """What the API answers, decoded; None where it says nothing. `path` begins with `/`, without a version."""
        bound = self.timeout if timeout is None else timeout
        async with self._bounded(bound):
            version = await self.version()
            async with await self._send(version, method, path, params, _encoded(body), headers) as response:
                return self.decoded(await response.read())

    async def make(self, path: str, *, params: Params | None = None, body: Any = None) -> Any:
        """`json`, by POST, of what makes something. Cancelled, it ends with the answer, within the timeout: the engine
        goes on all the same, and who takes away what there is must find it."""
        return await to_the_end(self.json("POST", path, params=params, body=body), name=f"POST {path}")

    async def stays(self) -> None:
        """Return when the engine takes a new connection at once. One that is being stopped does not, though it goes on
        answering on those that it has, with failures of what it ends."""
        fresh = Connection(self.host, name=self.name, timeout=min(self.timeout, _STAYS), tls=self._tls)
        try:
            await fresh.ping()
        finally:
            await fresh.close()

    async def ping(self) -> None:
        """Return when the engine answers."""
        async with self._bounded(self.timeout), await self._send(None, "GET", "/_ping") as response:
            await response.read()

    @asynccontextmanager
    async def stream(
        self,
        method: str,
        path: str,
        *,
        params: Params | None = None,
        body: Any = None,
        data: bytes | AsyncIterable[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
        begin: float | None = None,
        idle: float | None = None,
    ) -> AsyncIterator[Stream]:
        """An answer that comes bit by bit. `data` is sent as it is, `body` as JSON.

        Its headers must come within `begin` seconds (None: the timeout; infinity: whenever), and then never `idle`
        seconds without a byte. Without a bound the engine must answer elsewhere while the stream is silent. What `data`
        raises is raised here. Leaving closes the connection.
        """
        sent = None if data is None else _Sent(data)
        response = None
        try:
            async with self._bounded(self.timeout if begin is None else begin, sent):
                version = await self.version()
                payload = _encoded(body) if sent is None else sent
                response = await self._send(version, method, path, params, payload, headers)
            yield Stream(self, response, idle, sent)
        finally:
            if response is not None:
                response.close()
            if sent is not None:
                await sent.close()

    # ------------------------------------------------------------------------------------------------------------------

    async def _negotiate(self) -> tuple[int, int]:
        async with await self._send(None, "GET", "/version") as response:
            found = self.decoded(await response.read())
        try:
            newest = _parsed(found["ApiVersion"])
            oldest = _parsed(found.get("MinAPIVersion") or "1.12")
        except (TypeError, KeyError, ValueError):
            raise self.unavailable(f"answers, but not as a Docker engine does: correct {self._said_by}") from None
        if newest < OLDEST:
            raise self.unavailable(f"is too old ({found.get('Version')}): it takes Docker {_OLDEST_ENGINE} or newer")
        if oldest > NEWEST:
            raise self.unavailable(f"is too new ({found.get('Version')}): its API begins at {found['MinAPIVersion']}")
        return min(newest, NEWEST)

    async def _send(
        self,
        version: tuple[int, int] | None,
        method: str,
        path: str,
        params: Params | None = None,
        payload: bytes | _Sent | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> aiohttp.ClientResponse:
        docker = self._opened()
        url = URL(docker.docker_host + ("" if version is None else "/v{}.{}".format(*version)) + path)
        kind = {"Content-Type": "application/x-tar" if isinstance(payload, _Sent) else "application/json"}
        response = await docker.session.request(
            method,
            url.with_query(_query(params or {})),
            data=payload,
            headers={"User-Agent": "cluster-code", **kind, **(headers or {})},
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT),
            allow_redirects=False,
        )
        if response.status < 300 or response.status == 304:
            return response
        try:
            said = await response.read()
        finally:
            response.close()
        raise self._refusal(response, said)

    def _refusal(self, response: aiohttp.ClientResponse, said: bytes) -> ProviderUnavailable | EngineRefused:
        status = response.status
        try:
            message = str(json.loads(said)["message"])
        except (ValueError, TypeError, KeyError):
            return self.unavailable(f"answered {status}, and not as a Docker engine does: is it one, or a proxy?")
        if status == 503 or (status >= 500 and _AWAY.search(message)):
            return self.unavailable(f"has no time for us ({message})")
        return EngineRefused(status, message)

    def _opened(self) -> aiodocker.Docker:
        if self._closed:
            raise ProviderUnavailable(f"The connections to {self.name} at {self.host} are closed.")
        if self._docker is None:
            base, connector = _connector(self.host, self._tls)
            self._docker = aiodocker.Docker(base, connector=connector, api_version="v{}.{}".format(*OLDEST))
        return self._docker

    @asynccontextmanager
    async def _bounded(self, seconds: float, sent: _Sent | None = None) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(None if seconds == float("inf") else seconds):
                yield
        except TimeoutError:
            self._version = None
            raise Silent(str(self.unavailable(f"did not answer within {seconds:g} seconds"))) from None
        except (aiohttp.ClientError, OSError) as error:
            self._version = None
            if sent is not None and sent.error is not None:
                raise sent.error from None
            why = f"cannot be reached ({reason(error)}): start it, or correct {self._said_by}"
            raise self.unavailable(why) from None

    def unavailable(self, what: str) -> ProviderUnavailable:
        """The error that says so, with the engine's host."""
        return ProviderUnavailable(f"{self.name} at {self.host} {what}.")

    def decoded(self, said: bytes) -> Any:
        """What JSON says; None where it is empty."""
        if not said.strip():
            return None
        try:
            return json.loads(said)
        except ValueError:
            raise self.unavailable("answered something that cannot be read: is it a Docker engine?") from None


class Stream:
    """What comes of an answer. Raises ProviderUnavailable when the connection breaks, or is silent for too long."""

    def __init__(
        self, connection: Connection, response: aiohttp.ClientResponse, idle: float | None, sent: _Sent | None
    ) -> None:
        self._connection = connection
        self._response = response
        self._idle = idle
        self._sent = sent

    @property
    def headers(self) -> Mapping[str, str]:
        """Those of the answer."""
        return self._response.headers

    async def read(self) -> bytes:
        """What came since; empty: it has ended."""
        while True:
            try:
                async with asyncio.timeout(_QUIET if self._idle is None else self._idle):
                    return await self._read()
            except TimeoutError:
                if self._idle is not None:
                    why = self._connection.unavailable(f"has sent nothing for {self._idle:g} seconds")
                    raise Silent(str(why)) from None
            # One that is stopped, or behind a network that is down, hangs up on nobody.
            await self._connection.ping()

    async def _read(self) -> bytes:
        try:
            return await self._response.content.readany()
        except TimeoutError:
            # One is an OSError, too.
            raise
        except (aiohttp.ClientError, OSError) as error:
            if self._sent is not None and self._sent.error is not None:
                raise self._sent.error from None
            raise self._connection.unavailable(f"hung up ({reason(error)})") from None

    async def lines(self) -> AsyncGenerator[bytes, None]:
        """The lines, of any length, without their ends; a last one needs none."""
        begun: list[bytes] = []
        while data := await self.read():
            *lines, rest = data.split(b"\n")
            if lines:
                yield b"".join((*begun, lines[0]))
                begun.clear()
                for line in lines[1:]:
                    yield line
            if rest:
                begun.append(rest)
        if begun:
            yield b"".join(begun)

    async def objects(self) -> AsyncGenerator[Any, None]:
        """The JSON objects of a stream that has one in each line."""
        async for line in self.lines():
            if line.strip():
                yield self._connection.decoded(line)

    async def frames(self) -> AsyncGenerator[tuple[int, bytes], None]:
        """What is multiplexed: the number of the stream (1: stdout, 2: stderr, 3: the engine's own errors), and data.

        A frame that is longer than what came together is given in parts, with the same number.
        """
        buffer = bytearray()
        number = left = 0
        while data := await self.read():
            buffer += data
            while buffer:
                if not left:
                    if len(buffer) < 8:
                        break
                    number, left = buffer[0], int.from_bytes(buffer[4:8], "big")
                    del buffer[:8]
                    continue
                part = bytes(buffer[:left])
                del buffer[: len(part)]
                left -= len(part)
                yield number, part


class _Sent:
    """A body that is read as it is sent, and keeps what reading it raised."""

    def __init__(self, data: bytes | AsyncIterable[bytes]) -> None:
        self._parts = _pieces(data) if isinstance(data, bytes) else aiter(data)
        self.error: Exception | None = None

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        try:
            return await anext(self._parts)
        except StopAsyncIteration:
            raise
        except Exception as error:
            self.error = error
            raise

    async def close(self) -> None:
        close = getattr(self._parts, "aclose", None)
        if close is not None:
            # One that runs at this moment is cancelled with the request.
            with suppress(RuntimeError):
                await close()


async def _pieces(data: bytes) -> AsyncIterator[bytes]:
    for at in range(0, len(data), _PIECE):
        yield data[at : at + _PIECE]


def reason(error: Exception) -> str:
    """The innermost words for what went wrong: the outer ones name the host, which we do ourselves."""
    inner = getattr(error, "os_error", None) or getattr(error, "certificate_error", None) or error
    words = getattr(inner, "verify_message", None) or getattr(inner, "strerror", None) or str(inner)
    return words or type(inner).__name__


def _encoded(body: Any) -> bytes | None:
    return None if body is None else json.dumps(body).encode()


def _query(params: Params) -> dict[str, str]:
    return {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in params.items()
        if value is not None
    }


def _parsed(version: str) -> tuple[int, int]:
    major, minor = version.split(".")
    return int(major), int(minor)


def _local() -> str:
    paths = [Path(path).expanduser() for path in _SOCKETS]
    return f"unix://{next((path for path in paths if path.is_socket()), paths[0])}"


def _connector(host: str, tls: ssl.SSLContext | None) -> tuple[str, aiohttp.BaseConnector]:
    """The URL that requests begin with, and what connects. Raises ProviderUnavailable: a host that is none."""
    # Streams take a connection each, so their number has no bound.
    if host.startswith("unix://"):
        return "http://localhost", aiohttp.UnixConnector(host.removeprefix("unix://"), limit=0)
    try:
        url = URL(host)
    except ValueError:
        url = URL()
    if url.scheme not in ("tcp", "http", "https") or not url.host:
        raise ProviderUnavailable(f"{host!r} is no Docker host: give unix:///path or tcp://host:port.")
    context = tls
    if context is None and (url.scheme == "https" or os.environ.get("DOCKER_TLS_VERIFY")):
        context = _tls()
    port = url.explicit_port or (2376 if context else 2375)
    base = URL.build(scheme="https" if context else "http", host=url.host, port=port)
    connector = aiohttp.TCPConnector(limit=0, ssl=context or True, socket_factory=_socket)
    return str(base).rstrip("/"), connector


def _tls() -> ssl.SSLContext:
    """As docker's own client: `ca.pem`, `cert.pem` and `key.pem` in DOCKER_CERT_PATH, each if it is there."""
    folder = Path(os.environ.get("DOCKER_CERT_PATH") or os.environ.get("DOCKER_CONFIG") or "~/.docker").expanduser()
    authority, certificate, key = (folder / name for name in ("ca.pem", "cert.pem", "key.pem"))
    try:
        context = ssl.create_default_context(cafile=str(authority) if authority.exists() else None)
        if certificate.exists():
            context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise ProviderUnavailable(
            f"The certificates in {folder} cannot be used ({reason(error)}): correct DOCKER_CERT_PATH."
        ) from None
    return context


def _socket(address: Any) -> socket.socket:
    """A socket that notices within two minutes that the other side is gone, also when nothing is sent."""
    made = socket.socket(*address[:3])
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, option):
            made.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return made
