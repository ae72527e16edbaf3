"""What one resource of a cluster is now, and each change of it: a list, then a watch from where it ended, for ever.

What the API's documentation promises of watches, and what real ones do besides, decides the shape of this loop
(https://kubernetes.io/docs/reference/using-api/api-concepts/#efficient-detection-of-changes):

- A watch ends whenever the server likes, and goes on from the version of the last line that was read whole. Bookmarks
  move that version on where nothing happens.
- A version too old is told as a status (410) or as a line of the watch. Then everything is listed again, and what is
  held is compared with it: what was missed comes as changes that are marked `synthetic`.
- A connection may be dead without anybody saying so. Where no byte comes, not even a bookmark, it is given up.
- Lines may be repeated, and late: versions decide, not the order. The API calls them opaque, but all of its servers
  count, and comparing them is what keeps an older state from overwriting a newer one.
- Nothing here looks at the time of day.

The list is read in pages, and looked at in slices between which the loop goes on. What is held is not the objects but
their encoding (`packing`).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from itertools import islice
from typing import Generic, Literal, Protocol, TypeVar, cast

import msgspec
import structlog

from orchestrator.cluster.client import Cluster
from orchestrator.cluster.objects import ListMeta, Meta, Status
from orchestrator.cluster.packing import Packing
from orchestrator.database import backoff
from orchestrator.errors import ApiRefused, ProviderUnavailable

log = structlog.get_logger("watch")

# Objects looked at between two turns of the loop: a few milliseconds' work.
_SLICE = 100
# Seconds. A watch that ends sooner, without any change, counts as failed: else a server that ends all of them at once
# would be asked without a pause.
_SHORT = 1.0
# Of those, in a row, so many are no trouble yet: a version too old is one.
_USUAL = 2
# Seconds. A server that asks to be left alone for longer is asked again after these.
_LONGEST = 60.0
# Deleted objects that are remembered, so that a late line does not bring one back.
_REMEMBERED = 1000


class _Thing(Protocol):
    @property
    def metadata(self) -> Meta: ...


T = TypeVar("T", bound=_Thing)


class Change(msgspec.Struct, Generic[T], frozen=True, gc=False):
    """One object as it is now; a deleted one as it was last.

    `synthetic`: nobody told of the change when it happened, it was found by listing. The first list finds everything
    `added`. An object that was made anew under the same name is one `deleted` and then one `added`, with another uid.
    """

    kind: Literal["added", "modified", "deleted"]
    object: T
    synthetic: bool = False


class Batch(msgspec.Struct, Generic[T], frozen=True):
    """Changes that came together, in order.

    `synced`: with these a list is complete, and what is held is all there is: of what was held before, everything that
    is gone has been told. `at` is the `time.monotonic()` when they came.
    """

    changes: Sequence[Change[T]]
    synced: bool
    at: float


@dataclass(slots=True)
class Stats:
    """What an informer has done. Times are those of `time.monotonic()`; None: not yet."""

    # When a watch last said anything, be it a bookmark, and when a list was last complete.
    last_event: float | None = None
    last_list: float | None = None
    # Changes that were told, and lines of watches that told of an object.
    changes: int = 0
    lines: int = 0
    lists: int = 0
    watches: int = 0
    # Lines and objects that were passed over: late, repeated, or such as we cannot read.
    stale: int = 0
    unreadable: int = 0

    @property
    def restarts(self) -> int:
        """Watches that had to be begun again."""
        return max(0, self.watches - 1)


class _Held(msgspec.Struct, gc=False):
    uid: str
    version: int
    # The number of the list or watch that has last seen it.
    round: int
    body: bytes


class _Line(msgspec.Struct, Generic[T], gc=False):
    type: str
    object: T


class _Name(msgspec.Struct, rename="camel", frozen=True, gc=False):
    name: str = ""
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""


class _Named(msgspec.Struct, frozen=True, gc=False):
    """What can be read of any object, also of one that is not as we think."""

    metadata: _Name = _Name()


class _Expired(Exception):
    """What is watched must be listed again."""


_UNREADABLE = (msgspec.DecodeError, ValueError)
_refusal = msgspec.json.Decoder(_Line[Status]).decode  # type: ignore[type-var]
_named_line = msgspec.json.Decoder(_Line[_Named]).decode  # type: ignore[type-var]
_named_item = msgspec.json.Decoder(_Named).decode


def _name_of(item: msgspec.Raw) -> _Name:
    try:
        return _named_item(item).metadata
    except _UNREADABLE:
        return _Name()


def without_annotations(thing: T) -> T:
    """What is held of an object, where nothing else is said: annotations may be larger than all the rest."""
    if not thing.metadata.annotations:
        return thing
    return _with(thing, msgspec.structs.replace(thing.metadata, annotations={}))


def _with_version(thing: T, version: str) -> T:
    return _with(thing, msgspec.structs.replace(thing.metadata, resource_version=version))


def _with(thing: T, metadata: Meta) -> T:
    return cast(T, msgspec.structs.replace(cast(msgspec.Struct, thing), metadata=metadata))


class Informer(Generic[T]):
    """Follows one resource: `path` in all namespaces (`/api/v1/pods`) or one, of the struct `type` of `objects`.

    `keep` makes of an object what is held of it, of the same type; that something else of it has changed is not told.
    `page` is how many objects a list asks for at a time, `watch_for` the seconds after which the server is to end a
    watch, `stall` those without a byte after which it is given up: more than the minute between two bookmarks.

        async with aclosing(informer.batches()) as batches:
            async for batch in batches:
                ...
    """

    def __init__(
        self,
        cluster: Cluster,
        path: str,
        type: type[T],  # noqa: A002
        *,
        label_selector: str = "",
        field_selector: str = "",
        keep: Callable[[T], T] = without_annotations,
        page: int = 500,
        watch_for: float = 300.0,
        stall: float = 90.0,
    ) -> None:
        self.path = path
        self.stats = Stats()
        # Why nothing is heard now; None: a watch is open.
        self.trouble: Exception | None = None
        self._cluster = cluster
        self._label_selector = label_selector
        self._field_selector = field_selector
        self._page = page
        self._watch_for = watch_for
        self._stall = stall
        self._keep = keep
        self._line: Callable[[bytes], _Line[T]] = msgspec.json.Decoder(_Line[type]).decode  # type: ignore[valid-type]
        self._item = msgspec.json.Decoder(type).decode
        self._packing = Packing(type)
        self._namespaces: dict[str, dict[str, _Held]] = {}
        self._gone: dict[str, None] = {}
        self._round = 0
        # Where the next watch begins; 0: list first.
        self._version = 0

    # What is held. ---------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return sum(map(len, self._namespaces.values()))

    def namespaces(self) -> list[str]:
        """The namespaces of what is held."""
        return list(self._namespaces)

    def get(self, namespace: str, name: str) -> T | None:
        """The object of this name ("" as the namespace of what is in none), as it was last seen."""
        held = self._namespaces.get(namespace, {}).get(name)
        return self._unpack(held.version, held.body) if held else None

    def held(self, namespace: str | None = None) -> Iterator[T]:
        """What is held of one namespace, or of all, as it was when this was called; each is decoded as it is taken."""
        spaces = self._namespaces.values() if namespace is None else [self._namespaces.get(namespace, {})]
        # Not what is held, which changes in place.
        now = [(held.version, held.body) for space in spaces for held in space.values()]
        return (self._unpack(version, body) for version, body in now)

    # What happens. ---------------------------------------------------------------------------------------------------

    async def batches(self) -> AsyncGenerator[Batch[T], None]:
        """Everything there is, then every change, for ever: no failure ends it. See the class for how to close it."""
        failures = 0
        while True:
            begun, before, asked = time.monotonic(), self.stats.lines, 0.0
            error: ProviderUnavailable | ApiRefused | None = None
            try:
                async with aclosing(self.once()) as batches:
                    async for batch in batches:
                        yield batch
            except (ProviderUnavailable, ApiRefused) as failed:
                error = failed
                asked = failed.retry_after or 0.0
            if self.stats.lines > before:
                failures = 0
            if error is None and time.monotonic() - begun >= _SHORT:
                failures = 0
                continue
            failures += 1
            if error is not None or failures > _USUAL:
                self._troubled(error, failures)
            await asyncio.sleep(max(min(asked, _LONGEST), backoff(failures)))

    async def once(self) -> AsyncGenerator[Batch[T], None]:
        """List, where there is nothing to go on from, then watch until the watch ends, for whatever reason.

        Raises ProviderUnavailable and ApiRefused. The next call goes on from there, also after this was cancelled.
        """
        try:
            if not self._version:
                async with aclosing(self._list()) as batches:
                    async for batch in batches:
                        yield batch
            async with aclosing(self._watch()) as batches:
                async for batch in batches:
                    yield batch
        except _Expired as expired:
            log.info("list again", resource=self.path, cluster=self._cluster.name, why=str(expired))
            self._version = 0
        except ApiRefused as refused:
            # Whatever it is that it does not like about where we are: a list begins anew.
            self._version = 0
            if refused.status != 410:
                raise
            log.info("list again", resource=self.path, cluster=self._cluster.name, why=str(refused))

    async def _list(self) -> AsyncGenerator[Batch[T], None]:
        self._round += 1
        version = 0
        listing = self._cluster.list(
            self.path,
            msgspec.Raw,
            label_selector=self._label_selector,
            field_selector=self._field_selector,
            limit=self._page,
        )
        async with aclosing(listing) as pages:
            async for page in pages:
                at = time.monotonic()
                # All pages are of one moment; should they not be, what comes twice is dropped.
                version = version or self._moment(page.metadata)
                items = iter(page.items)
                while some := list(islice(items, _SLICE)):
                    changes: list[Change[T]] = []
                    for item in some:
                        self._listed(item, changes)
                    self.stats.changes += len(changes)
                    if changes:
                        yield Batch(changes, False, at)
                    await asyncio.sleep(0)
        gone = [
            (namespace, name)
            for namespace, names in self._namespaces.items()
            for name, held in names.items()
            if held.round != self._round
        ]
        while len(gone) > _SLICE:
            yield self._vanished(gone[-_SLICE:], synced=False)
            del gone[-_SLICE:]
            await asyncio.sleep(0)
        # Not before: a list that is cancelled on the way is made again, and finds what is left.
        self._version = version
        self.stats.lists += 1
        self.stats.last_list = time.monotonic()
        yield self._vanished(gone, synced=True)

    def _moment(self, meta: ListMeta) -> int:
        # Without one, it is not the API that says that there is nothing.
        if not meta.resource_version.isdecimal() or meta.resource_version == "0":
            raise ProviderUnavailable(
                f"The cluster {self._cluster.name} sent something that is no list of {self.path}: is it a Kubernetes?"
            )
        return int(meta.resource_version)

    def _listed(self, item: msgspec.Raw, changes: list[Change[T]]) -> None:
        try:
            thing = self._item(item)
            version = int(thing.metadata.resource_version)
        except _UNREADABLE as error:
            self._unreadable(_name_of(item), error)
            return
        meta = thing.metadata
        held = self._namespaces.get(meta.namespace, {}).get(meta.name)
        if held is None or held.uid != meta.uid:
            if held is not None:
                changes.append(Change("deleted", self._forget(meta.namespace, meta.name), True))
            changes.append(Change("added", thing, True))
        elif held.version != version:
            # Not "less": a list is the truth, also where the cluster was set back to an earlier state.
            if self._renew(thing, version, held):
                changes.append(Change("modified", thing, True))
            return
        else:
            held.round = self._round
            return
        self._gone.pop(meta.uid, None)
        self._hold(thing, version)

    def _vanished(self, gone: Sequence[tuple[str, str]], *, synced: bool) -> Batch[T]:
        changes = [Change("deleted", self._forget(namespace, name), True) for namespace, name in gone]
        self.stats.changes += len(changes)
        return Batch(changes, synced, time.monotonic())

    async def _watch(self) -> AsyncGenerator[Batch[T], None]:
        params = {
            "labelSelector": self._label_selector,
            "fieldSelector": self._field_selector,
            "watch": "1",
            "allowWatchBookmarks": "true",
            "resourceVersion": str(self._version),
            # Not all at the same moment.
            "timeoutSeconds": str(round(self._watch_for * random.uniform(0.8, 1.0))),
        }
        self.stats.watches += 1
        async with self._cluster.stream(self.path, params, idle=self._stall) as arriving:
            self._recovered()
            async for lines in arriving:
                at = self.stats.last_event = time.monotonic()
                changes: list[Change[T]] = []
                ended = self._read(lines, changes)
                if changes:
                    self.stats.changes += len(changes)
                    yield Batch(changes, False, at)
                if ended:
                    raise ended

    def _read(self, lines: Sequence[bytes], changes: list[Change[T]]) -> Exception | None:
        """Take in lines, as far as the first that ends the watch: why it does."""
        for line in lines:
            try:
                event = self._line(line)
                kind, meta = event.type, event.object.metadata
                version = int(meta.resource_version)
            except _UNREADABLE as error:
                if ended := self._odd(line, error, changes):
                    return ended
                continue
            if kind == "BOOKMARK":
                if version < self._version:
                    return self._set_back(version)
            elif kind == "ERROR":
                return self._refused(line)
            else:
                self.stats.lines += 1
                if kind == "DELETED":
                    told = self._deleted(event.object, changes)
                else:
                    told = self._changed(event.object, version, changes)
                self.stats.stale += not told
            if version > self._version:
                self._version = version
        return None

    def _odd(self, line: bytes, error: Exception, changes: list[Change[T]]) -> Exception | None:
        """A line that is no object as we know them: an error, a bookmark, or an object that is passed over.

        A bookmark is an object without anything, in which Go's empty lists are null. An error has no version.
        """
        try:
            event = _named_line(line)
            meta = event.object.metadata
            version = int(meta.resource_version) if event.type != "ERROR" else 0
        except _UNREADABLE:
            return ProviderUnavailable(
                f"The cluster {self._cluster.name} sent something that is no line of a watch of {self.path}: is it a"
                f" Kubernetes? It begins with {line[:60]!r}."
            )
        if event.type == "ERROR":
            return self._refused(line)
        if event.type == "DELETED":
            self._deleted(event.object, changes)
        elif event.type != "BOOKMARK":
            self._unreadable(meta, error)
        elif version < self._version:
            return self._set_back(version)
        self._version = max(self._version, version)
        return None

    def _set_back(self, version: int) -> Exception:
        """Bookmarks only go forward, but for a cluster that was restored from a backup: all may be otherwise."""
        return _Expired(f"the cluster was set back from version {self._version} to {version}")

    def _refused(self, line: bytes) -> Exception:
        try:
            status = _refusal(line).object
        except _UNREADABLE:
            status = Status(code=500, message="an error that is not understood")
        if status.code == 410:
            return _Expired(status.message)
        if status.code == 429 or status.code >= 500:
            return ProviderUnavailable(
                f"The cluster {self._cluster.name} ended a watch of {self.path}: {status.message}"
            )
        return ApiRefused(status.code, status.reason, status.message, details=status.details)

    # The held. -------------------------------------------------------------------------------------------------------

    def _changed(self, thing: T, version: int, changes: list[Change[T]]) -> bool:
        """Take in what a watch says of an object; False: it says nothing new."""
        meta = thing.metadata
        names = self._namespaces.get(meta.namespace)
        held = names.get(meta.name) if names else None
        if held is None:
            if meta.uid in self._gone:
                return False
            changes.append(Change("added", thing))
        elif version <= held.version:
            return False
        elif held.uid == meta.uid:
            if self._renew(thing, version, held):
                changes.append(Change("modified", thing))
            return True
        elif meta.uid in self._gone:
            return False
        else:
            changes.append(Change("deleted", self._forget(meta.namespace, meta.name), True))
            changes.append(Change("added", thing))
        self._hold(thing, version)
        return True

    def _deleted(self, thing: T | _Named, changes: list[Change[T]]) -> bool:
        """An object never comes back: also what is told of late ends it."""
        meta = thing.metadata
        held = self._namespaces.get(meta.namespace, {}).get(meta.name)
        if held is None or held.uid != meta.uid:
            self._remember(meta.uid)
            return False
        last = self._forget(meta.namespace, meta.name)
        changes.append(Change("deleted", last if isinstance(thing, _Named) else thing))
        return True

    def _pack(self, thing: T) -> bytes:
        # The version is held beside it: where only that is new, the bytes are the same.
        return self._packing.pack(_with_version(self._keep(thing), ""))

    def _unpack(self, version: int, body: bytes) -> T:
        return _with_version(self._packing.unpack(body), str(version))

    def _hold(self, thing: T, version: int) -> None:
        """Hold an object of a name that nothing is held of."""
        meta = thing.metadata
        held = _Held(meta.uid, version, self._round, self._pack(thing))
        self._namespaces.setdefault(meta.namespace, {})[meta.name] = held

    def _renew(self, thing: T, version: int, held: _Held) -> bool:
        """Hold an object as it is now; whether it is another than it was."""
        body = self._pack(thing)
        changed = body != held.body
        held.version, held.round = version, self._round
        if changed:
            held.body = body
        return changed

    def _forget(self, namespace: str, name: str) -> T:
        """Hold an object no more; returns it as it was last."""
        names = self._namespaces[namespace]
        held = names.pop(name)
        if not names:
            del self._namespaces[namespace]
        self._remember(held.uid)
        return self._unpack(held.version, held.body)

    def _remember(self, uid: str) -> None:
        self._gone[uid] = None
        if len(self._gone) > _REMEMBERED:
            del self._gone[next(iter(self._gone))]

    # What is said of it. ---------------------------------------------------------------------------------------------

    def _unreadable(self, name: _Name, error: Exception) -> None:
        """Pass over an object that does not fit: it must not keep us from all the others."""
        self.stats.unreadable += 1
        if held := self._namespaces.get(name.namespace, {}).get(name.name):
            held.round = self._round
        log.warning(
            "object not understood",
            resource=self.path,
            cluster=self._cluster.name,
            namespace=name.namespace,
            name=name.name,
            error=str(error),
        )

    def _troubled(self, error: Exception | None, failures: int) -> None:
        self.trouble = error or ProviderUnavailable(
            f"The cluster {self._cluster.name} ends every watch of {self.path} at once."
        )
        # 1, 2, 4, 8, …: an outage of a day is told in some twelve lines.
        if failures & (failures - 1) == 0:
            log.warning(
                "watch failed",
                resource=self.path,
                cluster=self._cluster.name,
                error=str(self.trouble),
                failures=failures,
            )

    def _recovered(self) -> None:
        if self.trouble is not None:
            log.info("watching again", resource=self.path, cluster=self._cluster.name)
        self.trouble = None
