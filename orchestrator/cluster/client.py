"""Kubernetes' API over HTTP: requests with deadlines, streams of lines, logs, and commands in containers.

Objects are decoded into the structs that are asked for (`objects`). What the API itself refuses is ApiRefused; all that
may be otherwise next time, and whatever is no answer of a Kubernetes API, is ProviderUnavailable: a proxy's 404 must
never be taken for an object that is gone.
"""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from typing import Any, Generic, Literal, TypeAlias, TypeVar
from urllib.parse import quote

import aiohttp
import msgspec
from yarl import URL

from orchestrator.cluster.access import Access, Credentials
from orchestrator.cluster.objects import ListMeta, Status
from orchestrator.errors import ApiRefused, ProviderUnavailable

T = TypeVar("T")

# Lines that came together, without their ends; and all that come.
Lines: TypeAlias = list[bytes]
Arriving: TypeAlias = AsyncIterator[Lines]

# Seconds.
_CONNECT_TIMEOUT = 10.0
EXEC_DEADLINE = 60.0
# Of the output of a command in a container, in bytes.
EXEC_OUTPUT = 1024 * 1024
# A longer line of a container is cut, in bytes.
LOG_LINE = 1024 * 1024
# How often a request that the API has no time for now is asked again, and the longest wait for that, in seconds.
_RETRIES = 3
_LONGEST_WAIT = 10.0
# Who changes the fields of objects, as server-side apply keeps it.
FIELD_MANAGER = "cluster-code"
# What is read ahead of an answer, in bytes: a busy watch comes in fewer, larger pieces.
_READ_BUFFER = 1024 * 1024

_encode = msgspec.json.Encoder().encode

_PATCHES = {
    "merge": "application/merge-patch+json",
    "strategic": "application/strategic-merge-patch+json",
    # YAML, says the type; JSON is YAML.
    "apply": "application/apply-patch+yaml",
}
# The API server's words for a group or a version that it does not have.
_NO_SUCH_PATH = b"404 page not found"
_STDOUT, _STDERR, _STATUS = 1, 2, 3
_EXEC_PROTOCOL = "v4.channel.k8s.io"


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """A part of a list. `metadata.resource_version` is the same for all parts of one."""

    metadata: ListMeta
    items: list[T]


class Version(msgspec.Struct, rename="camel"):
    """What a cluster says of itself: `git_version` is `v1.33.1`, perhaps with more after it."""

    git_version: str = ""


class _Page(msgspec.Struct, Generic[T]):
    metadata: ListMeta = ListMeta()
    # Go's empty list.
    items: list[T] | None = None


class _Status(Status, frozen=True):
    """With what tells it from another object, and, where a command has ended, that it did well."""

    kind: str = ""
    status: str = ""


class _Allowed(msgspec.Struct):
    allowed: bool = False


class _Review(msgspec.Struct):
    status: _Allowed = msgspec.field(default_factory=_Allowed)


class _Distrust(Exception):
    """The API does not take our credentials."""

    def __init__(self, error: ProviderUnavailable) -> None:
        self.error = error


class _Busy(Exception):
    """The API wants to be asked again, so many seconds later."""

    def __init__(self, error: ProviderUnavailable, after: float) -> None:
        self.error = error
        self.after = after


@dataclass(frozen=True, slots=True)
class _Request:
    method: str
    path: str
    params: Mapping[str, str]
    body: bytes | None = None
    content_type: str = "application/json"


class Cluster:
    """One Kubernetes API. `name` is what people call it; `timeout` (seconds) bounds each answer.

    Every method raises ProviderUnavailable (it cannot be reached, does not answer in time, is overloaded, or does not
    know us any more) and ApiRefused. Cancelling any of them gives its connection up. Paths are the API's own:
    `/apis/apps/v1/namespaces/one/deployments/web`. To be closed in the end.
    """

    def __init__(self, access: Access, *, name: str = "kubernetes", timeout: float = 15.0) -> None:
        self.access = access
        self.name = name
        self._timeout = timeout
        self._session: aiohttp.ClientSession | None = None
        self._closed = False
        # As it was asked last.
        self._server = ""

    async def __aenter__(self) -> Cluster:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections, for good; what still runs on one fails. Idempotent."""
        self._closed = True
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    # Objects. --------------------------------------------------------------------------------------------------------

    async def get(self, path: str, type: type[T], **params: str) -> T:  # noqa: A002
        """The object at a path."""
        return self._decoded(type, await self._ask(_Request("GET", path, params)))

    async def list(
        self,
        path: str,
        type: type[T],  # noqa: A002
        *,
        label_selector: str = "",
        field_selector: str = "",
        limit: int = 500,
        **params: str,
    ) -> AsyncGenerator[Page[T], None]:
        """The objects of a collection, page by page, at most `limit` in each.

        Raises ApiRefused with status 410 when reading took so long that the rest is to be had no more.
        """
        asked = params | {"labelSelector": label_selector, "fieldSelector": field_selector, "limit": str(limit)}
        while True:
            found = self._decoded(_Page[type], await self._ask(_Request("GET", path, asked)))  # type: ignore[valid-type]
            yield Page(found.metadata, found.items or [])
            if not found.metadata.continue_:
                return
            # The token has the version in it; asking for one besides is an error.
            asked = asked | {"continue": found.metadata.continue_, "resourceVersion": ""}

    async def create(self, path: str, body: Mapping[str, Any], type: type[T], **params: str) -> T:  # noqa: A002
        """Make an object in the collection at `path`. Raises ApiRefused, `AlreadyExists`, too."""
        return self._decoded(type, await self._ask(_Request("POST", path, params, _encode(body))))

    async def replace(self, path: str, body: Mapping[str, Any], type: type[T], **params: str) -> T:  # noqa: A002
        """Put an object in the place of another; one with a resourceVersion only in that of this version (409)."""
        return self._decoded(type, await self._ask(_Request("PUT", path, params, _encode(body))))

    async def patch(
        self,
        path: str,
        body: Mapping[str, Any],
        type: type[T],  # noqa: A002
        *,
        kind: Literal["merge", "strategic", "apply"] = "merge",
        **params: str,
    ) -> T:
        """Change an object. `apply` makes one that is not there, and takes fields from whoever else set them."""
        if kind == "apply":
            params = {"fieldManager": FIELD_MANAGER, "force": "true"} | params
        return self._decoded(type, await self._ask(_Request("PATCH", path, params, _encode(body), _PATCHES[kind])))

    async def delete(
        self,
        path: str,
        *,
        propagation: Literal["Background", "Foreground", "Orphan"] = "Background",
        grace: int | None = None,
        preconditions: Mapping[str, str] | None = None,
        **params: str,
    ) -> None:
        """Ask that an object, or with selectors many, go away; returns before they have.

        `grace` are a pod's seconds until it is killed, `preconditions` what must be true of the object (`uid`,
        `resourceVersion`; else 409).
        """
        options: dict[str, Any] = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": propagation}
        if grace is not None:
            options["gracePeriodSeconds"] = grace
        if preconditions is not None:
            options["preconditions"] = dict(preconditions)
        await self._ask(_Request("DELETE", path, params, _encode(options)))

    async def scale(self, path: str, replicas: int) -> None:
        """Set how many replicas the object at `path` (a deployment, say) is to have."""
        body = _encode({"spec": {"replicas": replicas}})
        await self._ask(_Request("PATCH", f"{path}/scale", {}, body, _PATCHES["merge"]))

    async def read(self, path: str, **params: str) -> bytes:
        """What the API answers as it is: what a service says behind its proxy, for instance."""
        return await self._ask(_Request("GET", path, params))

    async def version(self) -> Version:
        """The version of the API server."""
        return await self.get("/version", Version)

    async def can_i(
        self, verb: str, resource: str, *, group: str = "", namespace: str = "", subresource: str = "", name: str = ""
    ) -> bool:
        """Whether we may do that; without a namespace: in all of them."""
        attributes = {"verb": verb, "resource": resource, "group": group, "namespace": namespace}
        attributes |= {"subresource": subresource, "name": name}
        body = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": attributes},
        }
        reviews = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
        return (await self.create(reviews, body, _Review)).status.allowed

    # Streams. --------------------------------------------------------------------------------------------------------

    def stream(
        self, path: str, params: Mapping[str, str] | None = None, *, idle: float | None = 90.0
    ) -> AbstractAsyncContextManager[Arriving]:
        """The lines of an answer that does not end, of a watch for instance: those that came together at a time.

        Lines are without their ends, and may be of any length; one whose end never came is left out. After `idle`
        seconds without a byte the stream fails (None: never). Leaving the context closes the connection.

            async with cluster.stream("/api/v1/pods", {"watch": "1"}) as arriving:
                async for lines in arriving:
                    ...
        """
        return self._stream(_Request("GET", path, params or {}), idle, None)

    def logs(
        self,
        namespace: str,
        pod: str,
        container: str,
        *,
        follow: bool = False,
        since: datetime | None = None,
        tail: int | None = None,
        previous: bool = False,
        timestamps: bool = False,
        idle: float | None = None,
    ) -> AbstractAsyncContextManager[Arriving]:
        """The lines that a container has written, as `stream` gives them; with `follow` until it ends.

        One longer than `LOG_LINE` is cut, since what runs there is not trusted, and a last one needs no end.
        `since` counts in whole seconds, so that lines of its second come again; `tail` are so many last lines,
        `previous` those of the run before the last restart. With `timestamps` each line begins with its time (RFC 3339,
        nanoseconds) and a space. Raises ApiRefused (400) where the container has not begun, or had no run before.
        """
        params = {"container": container, "follow": _flag(follow), "previous": _flag(previous)}
        params["timestamps"] = _flag(timestamps)
        params["sinceTime"] = since.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if since else ""
        params["tailLines"] = "" if tail is None else str(tail)
        request = _Request("GET", f"{_pod(namespace, pod)}/log", params)
        return self._stream(request, idle if follow else self._timeout, LOG_LINE)

    @asynccontextmanager
    async def _stream(self, request: _Request, idle: float | None, longest: int | None) -> AsyncIterator[Arriving]:
        response = await self._open(request, aiohttp.ClientTimeout(sock_connect=_CONNECT_TIMEOUT, sock_read=idle))
        try:
            async with aclosing(self._lines(response, idle, longest)) as lines:
                yield lines
        finally:
            response.close()

    async def _lines(
        self, response: aiohttp.ClientResponse, idle: float | None, longest: int | None
    ) -> AsyncGenerator[Lines, None]:
        read = response.content.readany
        # The parts of a line that has not ended, put together once, when it has; and how long they are.
        begun: Lines = []
        length = 0
        while True:
            try:
                data = await read()
            except TimeoutError:
                raise self._unavailable(f"has sent nothing for {idle:g} seconds") from None
            except (aiohttp.ClientError, OSError) as error:
                raise self._unavailable(f"hung up ({_reason(error)})") from None
            if not data:
                break
            if b"\n" not in data:
                if longest is None or length < longest:
                    begun.append(data)
                    length += len(data)
                continue
            lines = (b"".join((*begun, data)) if begun else data).split(b"\n")
            if longest is not None and length >= longest:
                lines[0] = lines[0][:longest]
            last = lines.pop()
            begun, length = [last] if last else [], len(last)
            yield lines
        if begun and longest is not None:
            yield [b"".join(begun)[:longest]]

    # Commands. -------------------------------------------------------------------------------------------------------

    async def exec(
        self, namespace: str, pod: str, container: str, argv: Sequence[str], *, deadline: float = EXEC_DEADLINE
    ) -> tuple[int, bytes]:
        """Run a command in a container: its exit code, and its output with its errors, the first 1 MiB of it.

        After `deadline` seconds, or when cancelled, nobody listens any more; Kubernetes does not end the command for
        that. Raises ApiRefused where it could not be run (no such program or container).
        """
        params = [("container", container), ("stdout", "1"), ("stderr", "1"), *(("command", one) for one in argv)]
        path = f"{_pod(namespace, pod)}/exec"
        output = bytearray()
        status = bytearray()
        try:
            async with asyncio.timeout(deadline) as timer:
                async with await self._upgrade(path, params) as websocket:
                    async for message in websocket:
                        if message.type is not aiohttp.WSMsgType.BINARY or not message.data:
                            continue
                        channel, data = message.data[0], memoryview(message.data)[1:]
                        if channel == _STATUS:
                            status += data
                        elif channel in (_STDOUT, _STDERR):
                            output += data[: EXEC_OUTPUT - len(output)]
        except TimeoutError:
            if not timer.expired():
                raise
            raise ProviderUnavailable(f"The command in {pod} did not end within {deadline:g} seconds.") from None
        if not status:
            raise self._unavailable(f"hung up before the command in {pod} had ended")
        return _exit_code(self._decoded(_Status, bytes(status))), bytes(output)

    async def _upgrade(self, path: str, params: Sequence[tuple[str, str]]) -> aiohttp.ClientWebSocketResponse[bool]:
        async def send(credentials: Credentials) -> aiohttp.ClientWebSocketResponse[bool]:
            async with asyncio.timeout(self._timeout):
                return await self._connections().ws_connect(
                    _url(credentials, path, params),
                    protocols=(_EXEC_PROTOCOL,),
                    headers=credentials.headers,
                    ssl=credentials.ssl or True,
                    server_hostname=credentials.server_name,
                    proxy=credentials.proxy,
                    # Who does not say good-bye is not waited for.
                    timeout=aiohttp.ClientWSTimeout(ws_close=1.0),
                )

        return await self._insisting(send)

    # Requests. -------------------------------------------------------------------------------------------------------

    async def _ask(self, request: _Request) -> bytes:
        timeout = aiohttp.ClientTimeout(total=self._timeout, sock_connect=_CONNECT_TIMEOUT)

        async def send(credentials: Credentials) -> bytes:
            async with await self._send(credentials, request, timeout) as response:
                return await response.read()

        return await self._insisting(send)

    async def _open(self, request: _Request, timeout: aiohttp.ClientTimeout) -> aiohttp.ClientResponse:
        async def send(credentials: Credentials) -> aiohttp.ClientResponse:
            # It begins with the first change, but its headers come at once.
            async with asyncio.timeout(self._timeout):
                return await self._send(credentials, request, timeout)

        return await self._insisting(send)

    async def _send(
        self, credentials: Credentials, request: _Request, timeout: aiohttp.ClientTimeout
    ) -> aiohttp.ClientResponse:
        headers = credentials.headers.copy()
        headers["Accept"] = "application/json"
        if request.body is not None:
            headers["Content-Type"] = request.content_type
        return await self._connections().request(
            request.method,
            _url(credentials, request.path, list(request.params.items())),
            data=request.body,
            headers=headers,
            ssl=credentials.ssl or True,
            server_hostname=credentials.server_name,
            proxy=credentials.proxy,
            timeout=timeout,
            allow_redirects=False,
            read_bufsize=_READ_BUFFER,
        )

    async def _insisting(self, send: Callable[[Credentials], Awaitable[T]]) -> T:
        """Ask again where the API asks for that, and once more with new credentials where it refuses the old.

        The errors of aiohttp are never a cause of ours: they hold the headers, and with them the token.
        """
        credentials = await self.access.credentials()
        renewed, retries = False, 0
        while True:
            self._server = credentials.server
            try:
                return await send(credentials)
            except _Distrust as error:
                if renewed:
                    raise error.error from None
            except aiohttp.ClientConnectorCertificateError as error:
                if renewed:
                    raise self._unavailable(
                        f"shows a certificate that is not trusted ({_reason(error)}): correct the certificate authority"
                    ) from None
            except _Busy as busy:
                retries += 1
                if retries > _RETRIES or busy.after > _LONGEST_WAIT:
                    raise busy.error from None
                # Not all at the same moment.
                await asyncio.sleep(busy.after * random.uniform(1.0, 1.2))
                continue
            except TimeoutError:
                raise self._unavailable(f"did not answer within {self._timeout:g} seconds") from None
            except (aiohttp.ClientError, OSError) as error:
                raise self._unavailable(f"cannot be reached ({_reason(error)})") from None
            renewed = True
            credentials = await self.access.renew(credentials)

    async def _check(self, response: aiohttp.ClientResponse) -> None:
        """Raise what an answer means that is none to what was asked."""
        if response.status < 300:
            return
        try:
            body = await response.read()
        except BaseException:
            response.close()
            raise
        status, refusal = response.status, _refusal(body)
        said = f"{status}: {refusal.message}" if refusal else str(status)
        if status == 401:
            raise _Distrust(self._unavailable("does not let us in (401): the credentials are wrong, or have expired"))
        after = _retry_after(response)
        if status == 429 or (status >= 500 and after is not None):
            raise _Busy(
                self._unavailable(f"has no time for us ({said})", retry_after=after), 1.0 if after is None else after
            )
        if status >= 500:
            raise self._unavailable(f"failed ({said})")
        if refusal:
            raise ApiRefused(status, refusal.reason, refusal.message, retry_after=after, details=refusal.details)
        if status == 404 and body.strip() == _NO_SUCH_PATH:
            raise ApiRefused(404, "", f"{self.name} has no API at {response.url.path}")
        raise self._unavailable(f"answered {status}, and not as Kubernetes does: is it one, or a proxy?")

    def _connections(self) -> aiohttp.ClientSession:
        if self._closed:
            raise ProviderUnavailable(f"The connections to the cluster {self.name} are closed.")
        if self._session is None:
            self._session = aiohttp.ClientSession(
                # Streams take a connection each.
                connector=aiohttp.TCPConnector(limit=0, socket_factory=_socket),
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT),
                # To press its answers together takes the API server longer than the network to carry them.
                headers={"User-Agent": "cluster-code", "Accept-Encoding": "identity"},
                raise_for_status=self._check,
            )
        return self._session

    def _unavailable(self, what: str, *, retry_after: float | None = None) -> ProviderUnavailable:
        host = URL(self._server).authority
        return ProviderUnavailable(f"The cluster {self.name} at {host} {what}.", retry_after=retry_after)

    def _decoded(self, type: type[T], body: bytes) -> T:  # noqa: A002
        try:
            found: T = _decoder(type)(body)  # type: ignore[arg-type]
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise self._unavailable(f"answered something that cannot be read ({error}): is it a Kubernetes?") from error
        return found


@cache
def _decoder(type: Any) -> Callable[[bytes], Any]:  # noqa: A002
    return msgspec.json.Decoder(type).decode


_status = msgspec.json.Decoder(_Status).decode


def _refusal(body: bytes) -> _Status | None:
    """What the API says of why it refuses, if it is the API that says it."""
    try:
        found = _status(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return found if found.kind == "Status" else None


def _retry_after(response: aiohttp.ClientResponse) -> float | None:
    try:
        return max(0.0, float(response.headers["Retry-After"]))
    except (KeyError, ValueError):
        return None


def _exit_code(status: _Status) -> int:
    """The exit code in what comes last of a command. Raises ApiRefused: it was not run."""
    if status.status == "Success":
        return 0
    for cause in status.details.get("causes") or ():
        if cause.get("reason") == "ExitCode":
            return int(cause["message"])
    raise ApiRefused(status.code or 500, status.reason, status.message, details=status.details)


def _url(credentials: Credentials, path: str, params: Sequence[tuple[str, str]]) -> URL:
    return URL(credentials.server + path).with_query([(name, value) for name, value in params if value])


def _pod(namespace: str, pod: str) -> str:
    return f"/api/v1/namespaces/{quote(namespace, safe='')}/pods/{quote(pod, safe='')}"


def _flag(value: bool) -> str:
    return "true" if value else ""


def _reason(error: Exception) -> str:
    """The innermost words for what went wrong: the outer ones name the host, which we do ourselves."""
    inner = getattr(error, "os_error", None) or getattr(error, "certificate_error", None) or error
    words = getattr(inner, "verify_message", None) or getattr(inner, "strerror", None) or str(inner)
    return words or type(inner).__name__


def _socket(address: Any) -> socket.socket:
    """A socket that notices within two minutes that the other side is gone, also when nothing is sent."""
    made = socket.socket(*address[:3])
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, option):
            made.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return made
