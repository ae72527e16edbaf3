"""A Kubernetes API server that stages what goes wrong with one: the real protocol over a store in memory.

What it speaks: objects with versions and uids, list pages with continue tokens, watches with bookmarks and
`timeoutSeconds`, compaction (410, as a status or in the stream), label and field selectors, create, replace, merge
patch, delete with finalizers, bearer tokens, a pod's log. It checks no schema and runs no controller: a test
writes what they would.

    async with KubernetesApi() as api:
        api.write_kubeconfig(folder / "kubeconfig")
        api.put(PODS, pod("one", "default"))
        await api.watching(PODS)
        api.cut(mid_line=True)

Faults of requests still to come are queued by `fail`, each taken by the next request that matches; faults of what is
open now are methods: `cut`, `freeze`, `expire`, `send`.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
from aiohttp import web

NAMESPACES = "/api/v1/namespaces"
PODS = "/api/v1/pods"
EVENTS = "/api/v1/events"
SERVICES = "/api/v1/services"
SECRETS = "/api/v1/secrets"
DEPLOYMENTS = "/apis/apps/v1/deployments"
INGRESSES = "/apis/networking.k8s.io/v1/ingresses"

_KINDS = {
    "configmaps": "ConfigMap",
    "deployments": "Deployment",
    "endpoints": "Endpoints",
    "events": "Event",
    "ingresses": "Ingress",
    "namespaces": "Namespace",
    "persistentvolumeclaims": "PersistentVolumeClaim",
    "pods": "Pod",
    "replicasets": "ReplicaSet",
    "resourcequotas": "ResourceQuota",
    "secrets": "Secret",
    "services": "Service",
}
_VERBS = {"POST": "create", "PUT": "replace", "PATCH": "patch", "DELETE": "delete"}
_PATCHES = ("merge-patch", "strategic-merge-patch", "apply-patch")

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that came: `verb` is list, watch, get, create, replace, patch, delete or log."""

    verb: str
    path: str
    params: Mapping[str, str]
    authorization: str
    # `time.monotonic()` when it came.
    at: float


@dataclass(frozen=True, slots=True)
class Answer:
    """A fault: a request gets this instead of what it asked for."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    # Seconds until it comes; infinite: never.
    after: float = 0.0


def html(status: int = 502) -> Answer:
    """What a proxy in front of the API says when the API is away."""
    body = b"<html>\r\n<head><title>502 Bad Gateway</title></head>\r\n<body>nginx</body>\r\n</html>\r\n"
    return Answer(status, body, {"Content-Type": "text/html"})


def refused(status: int, reason: str, message: str = "", *, retry_after: float | None = None) -> Answer:
    """The API's own error."""
    headers = {"Content-Type": "application/json"}
    if retry_after is not None:
        headers["Retry-After"] = f"{retry_after:g}"
    return Answer(status, orjson.dumps(_status(status, reason, message)), headers)


EMPTY = Answer(200, b"", {"Content-Type": "application/json"})
NEVER = Answer(200, after=float("inf"))


def slow(seconds: float) -> Answer:
    """What was asked for comes, but late."""
    return Answer(0, after=seconds)


@dataclass(slots=True)
class _Stored:
    object: Json
    body: bytes
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Happened:
    version: int
    type: str
    namespace: str
    stored: _Stored
    # Of the object as it was before; None: there was none.
    labels_before: Mapping[str, str] | None


@dataclass(slots=True)
class _Collection:
    kind: str
    api_version: str
    objects: dict[tuple[str, str], _Stored] = field(default_factory=dict)
    history: deque[_Happened] = field(default_factory=deque)
    # Watches that begin before this version are told 410.
    floor: int = 0


@dataclass(frozen=True, slots=True)
class _Selection:
    namespace: str
    labels: Callable[[Mapping[str, str]], bool]
    fields: Callable[[Json], bool]

    def has(self, namespace: str, stored: _Stored) -> bool:
        return (
            (not self.namespace or namespace == self.namespace)
            and self.labels(stored.labels)
            and self.fields(stored.object)
        )

    def line(self, happened: _Happened) -> bytes | None:
        """The line of a watch: an object that comes to match is ADDED, one that matches no more is DELETED."""
        if self.namespace and happened.namespace != self.namespace:
            return None
        if not self.fields(happened.stored.object):
            return None
        now = happened.type != "DELETED" and self.labels(happened.stored.labels)
        before = happened.labels_before is not None and self.labels(happened.labels_before)
        if not (now or before):
            return None
        return _line("DELETED" if not now else "MODIFIED" if before else "ADDED", happened.stored.body)


@dataclass(slots=True)
class _Run:
    """What a container has written from one start on."""

    lines: list[tuple[datetime, str]] = field(default_factory=list)
    ended: bool = False


@dataclass(eq=False, slots=True)
class _Watch:
    path: str
    selection: _Selection
    bookmarks: bool
    transport: asyncio.Transport
    pending: list[bytes] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    # How it ends once what is pending has been sent: `cleanly`, or by a reset.
    ending: str = ""
    # The next line is sent in half, and then it ends in this way.
    cut_next: str = ""

    def send(self, line: bytes) -> None:
        if self.ending:
            return
        if self.cut_next:
            line, self.ending = line[: len(line) // 2], self.cut_next
        self.pending.append(line)
        self.changed.set()

    def end(self, how: str) -> None:
        self.ending = self.ending or how
        self.changed.set()


class KubernetesApi:
    """The server, on a free port of 127.0.0.1 (or `port`), while it is entered as a context.

    `token`, when it is set, is the only one that is let in. `bookmark_every` (seconds) is how often watches get a
    bookmark, `history` how many changes of a collection are remembered, `gone_in_stream` says how a watch from a
    version too old is told so.
    """

    def __init__(self, *, token: str = "", port: int = 0, bookmark_every: float = 60.0, history: int = 100_000) -> None:
        self.token = token
        self.port = port
        self.bookmark_every = bookmark_every
        self.gone_in_stream = True
        # Everything that was asked, in order.
        self.requests: list[Asked] = []
        # The version of the last change of anything.
        self.version = 1000
        self._history = history
        self._collections: dict[str, _Collection] = {}
        self._snapshots: dict[str, tuple[int, list[bytes]]] = {}
        self._faults: list[tuple[str, str, Answer]] = []
        self._watches: set[_Watch] = set()
        self._logs: dict[tuple[str, str, str], list[_Run]] = {}
        self._log_readers: set[asyncio.Transport] = set()
        self._news = asyncio.Event()
        self._thawed = asyncio.Event()
        self._thawed.set()
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> KubernetesApi:
        app = web.Application(client_max_size=64 << 20)
        app.router.add_route("*", "/{path:.*}", self._answer)
        # A watch whose client has gone must end, although it has nothing to send.
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await self.listen()
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._runner is not None
        self._thawed.set()
        for watch in self._watches:
            watch.end("reset")
        await self._runner.cleanup()

    async def listen(self) -> None:
        """Take connections; again, at the same port, after `refuse`."""
        assert self._runner is not None
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[-1][1]

    async def refuse(self) -> None:
        """Take no more connections, as an API server that is down. What is open stays: `cut` it, too."""
        assert self._runner is not None
        for site in list(self._runner.sites):
            await site.stop()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def write_kubeconfig(self, path: Path, *, token: str | None = None) -> Path:
        """Write what a client is configured by, with the server's token or another."""
        given = self.token if token is None else token
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": self.url}}],
            "users": [{"name": "test", "user": {"token": given} if given else {}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        }
        path.write_text(json.dumps(config))
        return path

    # What is there. --------------------------------------------------------------------------------------------------

    def put(self, collection: str, thing: Json) -> Json:
        """Create an object, or replace the one of its name; returns it as it is stored."""
        held, key = self._collection(collection), _key(thing)
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        metadata = dict(thing.get("metadata", {}))
        if before := held.objects.get(key):
            old = before.object["metadata"]
            metadata |= {"uid": old["uid"], "creationTimestamp": old["creationTimestamp"]}
            if "deletionTimestamp" in old:
                metadata.setdefault("deletionTimestamp", old["deletionTimestamp"])
            changed = before.object.get("spec") != thing.get("spec")
            metadata["generation"] = old["generation"] + changed
        else:
            metadata = {"uid": str(uuid.uuid4()), "creationTimestamp": now, "generation": 1} | metadata
        self.version += 1
        metadata["resourceVersion"] = str(self.version)
        whole = {"apiVersion": held.api_version, "kind": held.kind} | thing | {"metadata": metadata}
        if "deletionTimestamp" in metadata and not metadata.get("finalizers"):
            return self._gone(collection, key, whole)
        stored = held.objects[key] = _Stored(whole, orjson.dumps(whole), metadata.get("labels") or {})
        self._happened(collection, "MODIFIED" if before else "ADDED", key[0], stored, before)
        return whole

    def patch(self, collection: str, name: str, changes: Json, *, namespace: str = "") -> Json:
        """Change an object by a merge patch (RFC 7396). Raises KeyError."""
        return self.put(collection, _merged(self._collection(collection).objects[namespace, name].object, changes))

    def delete(self, collection: str, name: str, *, namespace: str = "") -> Json:
        """Delete an object: at once, or, when it has finalizers, once they are gone. Raises KeyError.

        With a namespace goes all that is in it.
        """
        key = namespace, name
        thing = self._collection(collection).objects[key].object
        if thing["metadata"].get("finalizers"):
            return self.patch(
                collection, name, {"metadata": {"deletionTimestamp": _moment(datetime.now(UTC))}}, namespace=namespace
            )
        self.version += 1
        changed = thing | {"metadata": thing["metadata"] | {"resourceVersion": str(self.version)}}
        return self._gone(collection, key, changed)

    def get(self, collection: str, name: str, *, namespace: str = "") -> Json:
        """An object. Raises KeyError."""
        return self._collection(collection).objects[namespace, name].object

    def all(self, collection: str) -> list[Json]:
        """Every object of a collection."""
        return [stored.object for _, stored in sorted(self._collection(collection).objects.items())]

    def log(self, namespace: str, name: str, container: str, *lines: str, at: datetime | None = None) -> None:
        """Add lines to a container's log; who follows it gets them."""
        moment = at or datetime.now(UTC)
        runs = self._logs.setdefault((namespace, name, container), [])
        if not runs or runs[-1].ended:
            runs.append(_Run())
        runs[-1].lines.extend((moment, line) for line in lines)
        self._notify()

    def end_log(self, namespace: str, name: str, container: str) -> None:
        """A container ends: who follows its log has read all of it, and the next line is its next run's."""
        self._logs[namespace, name, container][-1].ended = True
        self._notify()

    # What goes wrong. ------------------------------------------------------------------------------------------------

    def fail(self, verb: str, *answers: Answer, path: str = "") -> None:
        """The next requests with this verb (and path) get these answers, one each."""
        self._faults += [(verb, path, answer) for answer in answers]

    def recover(self) -> None:
        """Forget the faults that nobody has met."""
        self._faults.clear()

    def cut(self, path: str = "", *, clean: bool = False) -> None:
        """End the open watches: by closing the connection, or as the API itself ends them."""
        for watch in self._of(path):
            watch.end("cleanly" if clean else "reset")

    def cut_mid_line(self, path: str = "", *, clean: bool = False) -> None:
        """End the open watches in the middle of the next line that they would send."""
        for watch in self._of(path):
            watch.cut_next = "cleanly" if clean else "reset"

    def cut_logs(self) -> None:
        """Close the connections of those who follow logs."""
        for transport in self._log_readers:
            transport.abort()

    def freeze(self) -> None:
        """Send no byte more to anybody, who are not told; connections and requests are taken."""
        self._thawed.clear()

    def thaw(self) -> None:
        """Go on after `freeze`."""
        self._thawed.set()

    def compact(self) -> None:
        """Forget what has happened: watches from versions before now, and lists half read, are told 410."""
        self._snapshots.clear()
        for collection in self._collections.values():
            collection.history.clear()
            collection.floor = self.version

    def expire(self, path: str = "") -> None:
        """Forget what has happened, and tell the open watches that they are too old."""
        self.compact()
        self.send(error(410, "Expired", "The resourceVersion for the provided watch is too old."), path=path)
        self.cut(path, clean=True)

    def bookmark(self, path: str = "") -> None:
        """Send a bookmark to the open watches that want them."""
        for watch in self._of(path):
            if watch.bookmarks:
                watch.send(self._bookmark(watch))

    def send(self, line: bytes, *, path: str = "") -> None:
        """Send a line to the open watches, whatever it is."""
        for watch in self._of(path):
            watch.send(line)

    # What was asked. -------------------------------------------------------------------------------------------------

    def asked(self, verb: str, path: str = "") -> list[Asked]:
        """The requests with a verb (and a path), in order."""
        return [one for one in self.requests if one.verb == verb and path in ("", one.path)]

    def watches(self, path: str = "") -> int:
        """How many watches are open."""
        return len(self._of(path))

    async def watching(self, path: str = "", count: int = 1, *, within: float = 20.0) -> None:
        """Return once so many watches are open. Raises TimeoutError."""
        await self.until(lambda: self.watches(path) >= count, within=within)

    async def until(self, condition: Callable[[], bool], *, within: float = 20.0) -> None:
        """Return once a condition over requests, watches and objects is true. Raises TimeoutError."""
        async with asyncio.timeout(within):
            while not condition():
                await self._news.wait()

    # Requests. -------------------------------------------------------------------------------------------------------

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        path = request.path
        if path in ("/version", "/healthz", "/livez", "/readyz"):
            await self._thawed.wait()
            version = {"major": "1", "minor": "33", "gitVersion": "v1.33.0", "platform": "linux/amd64"}
            return _json(version) if path == "/version" else web.Response(text="ok")
        found = _parse(path)
        if found is None:
            return _refuse(404, "NotFound", "the server could not find the requested resource")
        collection, namespace, name, part = found
        verb = _verb(request, name, part)
        self.requests.append(
            Asked(verb, path, dict(request.query), request.headers.get("Authorization", ""), time.monotonic())
        )
        self._notify()
        if fault := self._fault(verb, path):
            await asyncio.sleep(fault.after) if fault.after < float("inf") else await asyncio.Event().wait()
        await self._thawed.wait()
        if fault and fault.status:
            return web.Response(status=fault.status, body=fault.body, headers=fault.headers)
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            return _refuse(401, "Unauthorized", "Unauthorized")
        return await self._handle(request, verb, collection, namespace, name)

    async def _handle(
        self, request: web.Request, verb: str, collection: str, namespace: str, name: str
    ) -> web.StreamResponse:
        match verb:
            case "list":
                return self._list(request, collection, namespace)
            case "watch":
                return await self._watch(request, collection, namespace)
            case "log":
                return await self._log(request, namespace, name)
        held = self._collection(collection).objects
        body = await request.read()
        given = orjson.loads(body) if body else {}
        metadata = given.setdefault("metadata", {}) if verb in ("create", "replace", "patch") else {}
        if verb == "create":
            name = metadata.setdefault("name", metadata.get("generateName", "") + uuid.uuid4().hex[:5])
        key = namespace, name
        if verb in ("create", "replace", "patch"):
            metadata["name"] = name
            if namespace:
                metadata["namespace"] = namespace
        if verb == "create":
            if key in held:
                return _refuse(409, "AlreadyExists", f'{collection.rpartition("/")[2]} "{name}" already exists')
            return _json(self.put(collection, given), status=201)
        if verb == "delete" and not name:
            return self._delete_all(request, collection, namespace)
        if verb == "patch" and "apply-patch" in request.content_type and key not in held:
            return _json(self.put(collection, given), status=201)
        if key not in held:
            return _refuse(404, "NotFound", f'{collection.rpartition("/")[2]} "{name}" not found')
        if verb == "get":
            return web.Response(body=held[key].body, content_type="application/json")
        if verb == "delete":
            return _json(self.delete(collection, name, namespace=namespace))
        now = held[key].object["metadata"]["resourceVersion"]
        if metadata.get("resourceVersion", now) != now:
            return _refuse(409, "Conflict", "the object has been modified; please apply your changes to the latest")
        if verb == "replace":
            return _json(self.put(collection, given))
        if not any(kind in request.content_type for kind in _PATCHES):
            return _refuse(415, "UnsupportedMediaType", f"the body of the request was in {request.content_type}")
        return _json(self.patch(collection, name, given, namespace=namespace))

    def _delete_all(self, request: web.Request, collection: str, namespace: str) -> web.Response:
        selection = _selection(request, namespace)
        held = self._collection(collection).objects
        for key in [key for key, stored in held.items() if selection.has(key[0], stored)]:
            self.delete(collection, key[1], namespace=key[0])
        return _json({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"})

    def _list(self, request: web.Request, collection: str, namespace: str) -> web.Response:
        held = self._collection(collection)
        limit = int(request.query.get("limit") or 0)
        begin = 0
        if token := request.query.get("continue"):
            name, _, offset = base64.urlsafe_b64decode(token).decode().partition(":")
            begin = int(offset)
            if name not in self._snapshots:
                return _refuse(
                    410, "Expired", "The provided continue parameter is too old to display a consistent list"
                )
        else:
            selection = _selection(request, namespace)
            name = uuid.uuid4().hex
            bodies = [stored.body for key, stored in sorted(held.objects.items()) if selection.has(key[0], stored)]
            self._snapshots[name] = self.version, bodies
        version, bodies = self._snapshots[name]
        end = min(begin + limit, len(bodies)) if limit else len(bodies)
        metadata: Json = {"resourceVersion": str(version)}
        if end < len(bodies):
            metadata["continue"] = base64.urlsafe_b64encode(f"{name}:{end}".encode()).decode()
            metadata["remainingItemCount"] = len(bodies) - end
        else:
            del self._snapshots[name]
        head = orjson.dumps({"kind": f"{held.kind}List", "apiVersion": held.api_version, "metadata": metadata})
        body = head[:-1] + b',"items":[' + b",".join(bodies[begin:end]) + b"]}\n"
        return web.Response(body=body, content_type="application/json")

    async def _watch(self, request: web.Request, collection: str, namespace: str) -> web.StreamResponse:
        held = self._collection(collection)
        since = int(request.query.get("resourceVersion") or 0)
        too_old = 0 < since < held.floor
        if too_old and not self.gone_in_stream:
            return _refuse(410, "Expired", f"too old resource version: {since} ({held.floor})")
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        assert request.transport is not None
        wants_bookmarks = request.query.get("allowWatchBookmarks") in ("true", "1")
        watch = _Watch(request.path, _selection(request, namespace), wants_bookmarks, request.transport)
        if too_old:
            watch.send(error(410, "Expired", f"too old resource version: {since} ({held.floor})"))
            watch.end("cleanly")
        elif since:
            for happened in held.history:
                if happened.version > since and (line := watch.selection.line(happened)):
                    watch.send(line)
        else:
            for key, stored in sorted(held.objects.items()):
                if watch.selection.has(key[0], stored):
                    watch.send(_line("ADDED", stored.body))
        self._watches.add(watch)
        self._notify()
        try:
            await self._stream(response, watch, float(request.query.get("timeoutSeconds") or 1800))
        finally:
            self._watches.discard(watch)
            self._notify()
        return response

    async def _stream(self, response: web.StreamResponse, watch: _Watch, timeout: float) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        while True:
            left = deadline - loop.time()
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, min(left, self.bookmark_every))):
                    await watch.changed.wait()
            await self._thawed.wait()
            watch.changed.clear()
            if not watch.pending and not watch.ending:
                # The API sends a last one before it ends a watch, so that the next goes on from there.
                if watch.bookmarks:
                    watch.send(self._bookmark(watch))
                if loop.time() >= deadline:
                    watch.end("cleanly")
            lines, watch.pending = watch.pending, []
            if lines:
                await response.write(b"".join(lines))
            if watch.ending and not watch.pending:
                if watch.ending == "reset":
                    # What was written before must not be lost with it: it is on its way once the buffer is empty.
                    while watch.transport.get_write_buffer_size():
                        await asyncio.sleep(0.001)
                    watch.transport.abort()
                return

    async def _log(self, request: web.Request, namespace: str, name: str) -> web.StreamResponse:
        query = request.query
        key = namespace, name, query.get("container", "")
        runs = self._logs.get(key, [])
        if query.get("previous") == "true":
            runs = [run for run in runs if run.ended]
        if not runs:
            return _refuse(400, "BadRequest", f'container "{key[2]}" in pod "{name}" is waiting to start')
        since = datetime.fromisoformat(query["sinceTime"]) if "sinceTime" in query else datetime.min.replace(tzinfo=UTC)
        run = runs[-1]
        sent = len(run.lines) - int(query["tailLines"]) if "tailLines" in query else 0
        sent = max(0, sent)
        response = web.StreamResponse(headers={"Content-Type": "text/plain"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        assert request.transport is not None
        self._log_readers.add(request.transport)
        try:
            while True:
                await self._thawed.wait()
                # Kubernetes' logs have nanoseconds, and `sinceTime` whole seconds.
                lines = [
                    (f"{_moment(at, '%Y-%m-%dT%H:%M:%S.%f')[:-1]}000Z " if query.get("timestamps") == "true" else "")
                    + line
                    for at, line in run.lines[sent:]
                    if at >= since
                ]
                sent = len(run.lines)
                if lines:
                    await response.write("".join(f"{line}\n" for line in lines).encode())
                if query.get("follow") != "true":
                    return response
                while len(run.lines) == sent:
                    if run.ended:
                        return response
                    await self._news.wait()
        finally:
            self._log_readers.discard(request.transport)

    # The store. ------------------------------------------------------------------------------------------------------

    def _collection(self, path: str) -> _Collection:
        if path not in self._collections:
            prefix, _, resource = path.rpartition("/")
            version = prefix.removeprefix("/apis/").removeprefix("/api/")
            self._collections[path] = _Collection(_KINDS.get(resource, resource.title()), version)
        return self._collections[path]

    def _gone(self, collection: str, key: tuple[str, str], thing: Json) -> Json:
        held = self._collection(collection)
        before = held.objects.pop(key)
        stored = _Stored(thing, orjson.dumps(thing), before.labels)
        self._happened(collection, "DELETED", key[0], stored, before)
        if collection == NAMESPACES:
            for path, other in list(self._collections.items()):
                for namespace, name in [inside for inside in other.objects if inside[0] == key[1]]:
                    self.delete(path, name, namespace=namespace)
        return thing

    def _happened(self, collection: str, kind: str, namespace: str, stored: _Stored, before: _Stored | None) -> None:
        held = self._collection(collection)
        happened = _Happened(self.version, kind, namespace, stored, before.labels if before else None)
        held.history.append(happened)
        while len(held.history) > self._history:
            held.floor = held.history.popleft().version
        for watch in self._watches:
            found = _parse(watch.path)
            if found and found[0] == collection and (line := watch.selection.line(happened)):
                watch.send(line)
        self._notify()

    def _of(self, path: str) -> list[_Watch]:
        return [watch for watch in self._watches if path in ("", watch.path) and not watch.ending]

    def _fault(self, verb: str, path: str) -> Answer | None:
        for index, (wanted, where, answer) in enumerate(self._faults):
            if wanted == verb and where in ("", path):
                del self._faults[index]
                return answer
        return None

    def _bookmark(self, watch: _Watch) -> bytes:
        found = _parse(watch.path)
        assert found is not None
        held = self._collection(found[0])
        mark: Json = {"kind": held.kind, "apiVersion": held.api_version}
        mark["metadata"] = {"resourceVersion": str(self.version), "creationTimestamp": None}
        # An object without anything, as Go writes it.
        empty = {"containers": None}
        template = {"metadata": {"creationTimestamp": None}, "spec": empty}
        specs = {"Pod": empty, "Deployment": {"replicas": 0, "selector": None, "template": template, "strategy": {}}}
        return _line("BOOKMARK", orjson.dumps(mark | {"spec": specs.get(held.kind, {}), "status": {}}))

    def _notify(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


def pod(name: str, namespace: str, *, labels: Mapping[str, str] | None = None, phase: str = "Running") -> Json:
    """A small pod with one container, `main`."""
    ready = phase == "Running"
    state = (
        {"running": {"startedAt": "2026-01-01T00:00:00Z"}} if ready else {"waiting": {"reason": "ContainerCreating"}}
    )
    return {
        "metadata": {"name": name, "namespace": namespace, "labels": dict(labels or {})},
        "spec": {"containers": [{"name": "main", "image": "busybox"}], "nodeName": "bench"},
        "status": {
            "phase": phase,
            "conditions": [{"type": "Ready", "status": str(ready)}],
            "containerStatuses": [
                {"name": "main", "image": "busybox", "ready": ready, "restartCount": 0, "state": state, "lastState": {}}
            ],
        },
    }


def error(status: int, reason: str, message: str = "") -> bytes:
    """The line of a watch that says that it cannot go on."""
    return _line("ERROR", orjson.dumps(_status(status, reason, message)))


def line(kind: str, thing: Json) -> bytes:
    """A line of a watch: ADDED, MODIFIED, DELETED or BOOKMARK, and an object."""
    return _line(kind, orjson.dumps(thing))


def _line(kind: str, body: bytes) -> bytes:
    return b'{"type":"%s","object":%s}\n' % (kind.encode(), body)


def _status(code: int, reason: str, message: str) -> Json:
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": message or reason,
        "reason": reason,
        "code": code,
    }


def _json(value: Json, *, status: int = 200) -> web.Response:
    return web.Response(status=status, body=orjson.dumps(value), content_type="application/json")


def _refuse(status: int, reason: str, message: str) -> web.Response:
    return _json(_status(status, reason, message), status=status)


def _key(thing: Json) -> tuple[str, str]:
    metadata = thing["metadata"]
    return metadata.get("namespace", ""), metadata["name"]


def _moment(at: datetime, form: str = "%Y-%m-%dT%H:%M:%S") -> str:
    return at.astimezone(UTC).strftime(form) + "Z"


def _merged(before: Any, changes: Any) -> Any:
    if not isinstance(changes, dict):
        return changes
    merged = dict(before) if isinstance(before, dict) else {}
    for name, value in changes.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = _merged(merged.get(name), value)
    return merged


def _parse(path: str) -> tuple[str, str, str, str] | None:
    """(path of the collection in all namespaces, namespace, name, part of the object)."""
    found = re.fullmatch(r"(/api/v1|/apis/[^/]+/[^/]+)/(.+)", path)
    if not found:
        return None
    prefix, parts = found[1], found[2].split("/")
    namespace = ""
    if parts[0] == "namespaces" and len(parts) > 2 and parts[2] not in ("status", "finalize"):
        namespace, parts = parts[1], parts[2:]
    resource, name, part = [*parts, "", ""][:3]
    return f"{prefix}/{resource}", namespace, name, part


def _verb(request: web.Request, name: str, part: str) -> str:
    if request.method != "GET":
        return _VERBS.get(request.method, request.method)
    if part == "log":
        return "log"
    if name:
        return "get"
    return "watch" if request.query.get("watch") in ("true", "1") else "list"


def _selection(request: web.Request, namespace: str) -> _Selection:
    labels = _selector(request.query.get("labelSelector", ""))
    wanted = [
        (path.rstrip("!=").split("."), value, path.endswith("!"))
        for path, _, value in (
            term.partition("=") for term in request.query.get("fieldSelector", "").split(",") if term
        )
    ]

    def fields(thing: Json) -> bool:
        return all((_field(thing, path) == value.lstrip("=")) != negated for path, value, negated in wanted)

    return _Selection(namespace, labels, fields)


def _field(value: Any, path: list[str]) -> str:
    for part in path:
        value = value.get(part, "") if isinstance(value, dict) else ""
    return str(value)


def _selector(text: str) -> Callable[[Mapping[str, str]], bool]:
    tests = [_term(term.strip()) for term in re.split(r",(?![^(]*\))", text)] if text else []
    return lambda labels: all(test(labels) for test in tests)


def _term(term: str) -> Callable[[Mapping[str, str]], bool]:
    if found := re.fullmatch(r"(\S+)\s+(in|notin)\s*\((.*)\)", term):
        name, inside, values = found[1], found[2] == "in", {value.strip() for value in found[3].split(",")}
        return lambda labels: (labels.get(name) in values) == inside
    if found := re.fullmatch(r"([^=!\s]+)\s*(==?|!=)\s*(\S*)", term):
        name, equal, value = found[1], found[2] != "!=", found[3]
        return lambda labels: (labels.get(name) == value) == equal
    name, there = term.lstrip("!"), not term.startswith("!")
    return lambda labels: (name in labels) == there
