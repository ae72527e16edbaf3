"""What the leader does: follows a cluster's objects, and tells each change that can be seen, once.

All informers add to one list; a short tick later its changes, what they mean for the sessions' rows, and the note of
what was told are one transaction, on the connection that holds the lead. So nothing can be told by who no longer leads,
and what was not told is missing in the table, where the next leader finds it by comparing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import Any

import asyncpg
import orjson
import structlog

from orchestrator.bridge import told, visible
from orchestrator.bridge.output import Output, Streams
from orchestrator.bridge.statuses import Held, Look, Statuses, Watched
from orchestrator.bridge.told import Row, Told
from orchestrator.bridge.visible import DEPLOYMENT, EVENT, INGRESS, NAMESPACE, POD, Kind
from orchestrator.cluster.objects import INSTANCE, Deployment, Event, Ingress, Namespace, Pod
from orchestrator.cluster.watch import Change, Informer
from orchestrator.database import Connection, Pool, backoff
from orchestrator.errors import ApiRefused, ProviderUnavailable
from orchestrator.providers.contract import Observation
from orchestrator.providers.evidence import is_ready

log = structlog.get_logger("bridge")

# Seconds that changes wait for others, to be one transaction: after a quiet time, and while many come; and how many
# that are at most.
_SOON = 0.01
_BUSY = 0.2
LIMIT = 500
# Changes that may wait: what is read of the cluster faster than it can be told is left there.
_MOST = 5000
# Seconds between two looks at sessions that time changes.
_SWEEP = 1.0
# Sessions looked at between two turns of the loop.
_SLICE = 100
# What says whether a session runs.
_DECISIVE = (NAMESPACE, DEPLOYMENT, POD)
# Of PostgreSQL's `bigint`.
_LARGEST = 2**63 - 1
# Of a cluster that was never watched before: older Events are no news.
_NEWS = timedelta(minutes=5)
# Seconds between two questions whether the API is there, and for how long it must be away to be told of.
PROBE = 5.0
OUTAGE = 10.0
# Seconds after an outage in which watches come to what is now.
_CALM = 2.0


@dataclass(slots=True)
class Counts:
    """What a bridge has done so far, over all its leads. `lag` takes seconds."""

    lag: Callable[[float], None]
    told: int = 0


class Lead:
    """One lead over one provider. `run` until it is lost or cancelled."""

    def __init__(
        self, connection: Connection, pool: Pool, provider_id: int, name: str, provider: Watched, look: Look,
        output: Output, counts: Counts,
    ) -> None:  # fmt: skip
        self._connection = connection
        self._counts = counts
        self._provider_id = provider_id
        self._name = name
        self._provider = provider
        self._json_name = orjson.dumps(name)
        cluster, ours = provider.cluster, f"{INSTANCE}={provider.options.instance}"
        self.held = Held(
            namespaces=Informer(cluster, "/api/v1/namespaces", Namespace, label_selector=ours),
            deployments=Informer(cluster, "/apis/apps/v1/deployments", Deployment, label_selector=ours),
            pods=Informer(cluster, "/api/v1/pods", Pod, label_selector=ours),
            # They have no labels: those of our namespaces are picked out here.
            events=Informer(cluster, "/api/v1/events", Event),
            ingresses=Informer(cluster, "/apis/networking.k8s.io/v1/ingresses", Ingress, label_selector=ours),
        )
        self.streams = Streams(pool, provider, self.held, output)
        self._statuses = Statuses(provider_id, provider, self.held, look, self._wake)
        self._informers: dict[str, tuple[Kind, Informer[Any]]] = {
            kind.name: (kind, informer)
            for kind, informer in (
                (NAMESPACE, self.held.namespaces),
                (DEPLOYMENT, self.held.deployments),
                (POD, self.held.pods),
                (EVENT, self.held.events),
                (INGRESS, self.held.ingresses),
            )
        }
        self._told: dict[str, dict[str, Told]] = {}
        # By kind, what was told and has not been seen yet; a kind that was listed wholly is no longer here.
        self._unseen: dict[str, set[str]] = {}
        # Nobody has watched this cluster before.
        self._first = False
        # By namespace, the session that it is of.
        self._sessions: dict[str, int | None] = {}
        self._rows: list[Row] = []
        self._missing: list[tuple[Kind, set[str]]] = []
        self._all_due = False
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._named = asyncio.Event()
        self._outage: str | None = None

    async def run(self) -> None:
        """Follow and tell until the lead is lost: raises what is in `database.UNAVAILABLE`."""
        self._told = await told.load(self._connection, self._provider_id)
        self._first = not self._told
        self._unseen = {name: set(self._told.setdefault(name, {})) for name in self._informers}
        log.info("watching a cluster", provider=self._name, known=sum(map(len, self._told.values())))
        work = {f"watch {name}s of {self._name}": self._follow(name) for name in self._informers}
        work |= {f"tell of {self._name}": self._tell(), f"probe {self._name}": self._probe()}
        work |= {f"lead over {self._name}": self._until_lost()}
        tasks = [asyncio.create_task(one, name=name) for name, one in work.items()]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            await self._statuses.close()
            await self.streams.close()

    async def _until_lost(self) -> None:
        """Raise at once when the connection ends, and not at its next use: another may lead, and follow output."""
        lost = asyncio.Event()
        self._connection.add_termination_listener(lambda _: lost.set())
        if not self._connection.is_closed():
            await lost.wait()
        raise ConnectionError("the connection to the database has ended")

    # What comes. -----------------------------------------------------------------------------------------------------

    async def _follow(self, name: str) -> None:
        kind, informer = self._informers[name]
        if kind is not NAMESPACE:
            # Whose the others are is known once these are.
            await self._named.wait()
        async with aclosing(informer.batches()) as batches:
            async for batch in batches:
                await self._room.wait()
                for change in batch.changes:
                    try:
                        self._take(kind, change, batch.at)
                    except Exception:
                        # It would be there for the next leader, too: one object must not keep us from all others.
                        informer.stats.unreadable += 1
                        meta = change.object.metadata
                        log.exception(
                            "change not understood",
                            provider=self._name, kind=kind.name, namespace=meta.namespace, object=meta.name,
                        )  # fmt: skip
                if batch.synced and name in self._unseen:
                    self._listed(kind)

    def _listed(self, kind: Kind) -> None:
        """The first list of a kind is complete: what is not in it is gone."""
        # From here on no other list is the first, also before what is missing was told.
        if missing := self._unseen.pop(kind.name):
            self._missing.append((kind, missing))
        if kind is NAMESPACE:
            self._named.set()
        if not self._unseen:
            self._first = False
        # As soon as all are listed, or once more: what comes late may say more.
        self._all_due = True
        self._wake()

    def _take(self, kind: Kind, change: Change[Any], at: float) -> None:
        thing, meta = change.object, change.object.metadata
        all_told = self._told[kind.name]
        known = all_told.get(meta.uid)
        if unseen := self._unseen.get(kind.name):
            unseen.discard(meta.uid)
        version = int(meta.resource_version)
        if version > _LARGEST:
            raise OverflowError("a version that the table cannot hold")
        gone = change.kind == "deleted"
        if known is None:
            if gone:
                return
        # A list is the truth, also where the cluster was set back to what it was before.
        elif version <= known.version and not (gone or change.synthetic):
            return
        if kind is EVENT:
            if known is None and meta.namespace not in self._sessions:
                # Not ours, or not yet: then it is found when its namespace comes.
                return
            session = self._sessions.get(meta.namespace)
        else:
            session = visible.session_id(meta)
            self._place(kind, meta.namespace or meta.name, session, gone)
            if kind is POD and session is not None:
                self.streams.see(session, thing, gone=gone)
        body, digest = visible.look(kind, thing)
        if gone:
            del all_told[meta.uid]
        else:
            all_told[meta.uid] = Told(version, digest)
            if known is not None and known.digest == digest:
                return
        how = "deleted" if gone else "added" if known is None else "modified"
        self._add(
            Row(
                kind.name, meta.uid, session, version, digest,
                visible.told(kind, self._json_name, session, how, meta, body),
                gone,
                # That an Event has expired is no news, and neither is an old one.
                kind is EVENT and (gone or (self._first and (session is None or _old(thing)))),
                session is not None and self._matters(kind, thing, session, gone),
                at,
            )
        )  # fmt: skip

    def _place(self, kind: Kind, namespace: str, session: int | None, gone: bool) -> None:
        """Note whose a namespace is."""
        if kind is NAMESPACE and gone:
            self._sessions.pop(namespace, None)
        elif namespace not in self._sessions or (session is not None and self._sessions[namespace] != session):
            if kind is not NAMESPACE and self.held.namespaces.get("", namespace) is None:
                return
            self._sessions[namespace] = session
            # Its Events may have come before it.
            for event in self.held.events.held(namespace):
                self._take(EVENT, Change("added", event), monotonic())

    def _matters(self, kind: Kind, thing: Any, session: int, gone: bool) -> bool:
        """Whether a visible change may mean something for its session's row."""
        if kind is POD:
            # By far the most changes: of a pod that goes on running.
            return (
                gone
                or session not in self._statuses.well
                or thing.metadata.deletion_timestamp is not None
                or not is_ready(thing)
            )
        if kind is INGRESS:
            self._statuses.inspect_later(session)
            return False
        return kind is not EVENT or (not gone and thing.type != "Normal")

    def _add(self, row: Row) -> None:
        self._rows.append(row)
        if len(self._rows) >= _MOST:
            self._room.clear()
        self._wake()

    def _wake(self) -> None:
        self._news.set()

    # What is told. ---------------------------------------------------------------------------------------------------

    async def _tell(self) -> None:
        swept = carried = monotonic()
        while True:
            try:
                async with asyncio.timeout(_SWEEP):
                    await self._news.wait()
                await asyncio.sleep(max(_SOON, carried + _BUSY - monotonic()))
            except TimeoutError:
                log.debug("nothing new", provider=self._name)
            self._news.clear()
            while self._missing:
                await self._find_missing(*self._missing.pop())
            await self._carry()
            carried = monotonic()
            if self._outage is not None:
                why, self._outage = self._outage, None
                await self._mark_stale(why)
            if self._all_due and self._complete:
                self._all_due = False
                await self._look_at_all()
            if monotonic() >= swept + _SWEEP:
                swept = monotonic()
                if self._complete:
                    await self._step(await self._statuses.unsettled(self._connection), trusted=False)

    @property
    def _complete(self) -> bool:
        """Whether what is held is all there is: before, nothing can be said of any session.

        What only says more of them (why they wait, how they are reached) is not waited for when it is not to be had.
        """
        return all(
            informer.stats.lists or (informer.trouble is not None and kind not in _DECISIVE)
            for kind, informer in self._informers.values()
        )

    def informers(self) -> Iterator[tuple[str, Informer[Any]]]:
        """Those of this lead, by what they follow."""
        return ((name, informer) for name, (_, informer) in self._informers.items())

    @property
    def waiting(self) -> int:
        """Changes that are not told yet."""
        return len(self._rows)

    async def _find_missing(self, kind: Kind, missing: Collection[str]) -> None:
        """Have told what was told by another leader, and is gone since."""
        uids = sorted(missing)
        now = monotonic()
        for begin in range(0, len(uids), LIMIT):
            some = uids[begin : begin + LIMIT]
            for uid, session, version, digest, text in await told.find(self._connection, self._provider_id, kind, some):
                self._told[kind.name].pop(uid, None)
                row = Row(
                    kind.name, uid, session, version, digest, visible.gone(text), True, kind is EVENT,
                    session is not None, now,
                )  # fmt: skip
                self._add(row)

    async def _carry(self) -> None:
        """Tell what waits, and change the rows that it means something for."""
        while self._rows or (self._complete and self._statuses.waiting):
            await self._step()

    async def _step(self, ids: Collection[int] = (), *, trusted: bool = True) -> None:
        """One transaction: up to `LIMIT` changes, what they mean for sessions, and these sessions, too.

        What is held may be ahead of what was told: of a session whose row is changed all that waits is told, too.
        """
        count = min(LIMIT, len(self._rows))
        due: set[int] = set()
        decided: list[tuple[int, Observation]] = []
        if self._complete:
            due = self._statuses.due()
            due.update(row.session_id for row in self._rows[:count] if row.matters and row.session_id is not None)
            decided = await self._statuses.decide(self._connection, due)
            decided += await self._statuses.decide(self._connection, set(ids) - due, trusted=trusted)
        changed = {session_id for session_id, _ in decided}
        rows, later = self._rows[:count], self._rows[count:]
        rows += [row for row in later if row.session_id in changed]
        if not rows and not decided:
            return
        try:
            async with self._connection.transaction():
                await told.write(self._connection, self._provider_id, rows)
                await self._statuses.record(self._connection, decided)
        except asyncpg.TransactionRollbackError as error:
            # Somebody else held rows in another order, or wrote first.
            log.info("told again", provider=self._name, error=str(error))
            for session_id in due.union(ids):
                self._statuses.touch(session_id)
            await asyncio.sleep(backoff(1))
            return
        # Others may have come meanwhile: at the end.
        arrived = self._rows[count + len(later) :]
        self._rows = [row for row in later if row.session_id not in changed] + arrived
        if len(self._rows) < _MOST:
            self._room.set()
        self._told_of(rows)

    def _told_of(self, rows: list[Row]) -> None:
        if rows:
            self._counts.told += sum(not row.silent for row in rows)
            self._counts.lag(monotonic() - rows[0].at)

    # The sessions. ---------------------------------------------------------------------------------------------------

    async def _look_at_all(self) -> None:
        """Compare all that should run with what is held: what a list has shown, and what an outage has hidden."""
        after = 0
        while True:
            rows = await self._connection.fetch(
                """SELECT id FROM sessions WHERE provider_id = $1 AND desired = 'running' AND id > $2
                    ORDER BY id LIMIT $3""",
                self._provider_id,
                after,
                _SLICE,
            )
            if not rows:
                break
            after = rows[-1]["id"]
            await self._step([row["id"] for row in rows])
        await self._report_strays()

    async def _report_strays(self) -> None:
        """Say which namespaces are of no session: never deleted here, since nobody knows what they are for."""
        spaces = self.held.namespaces.held()
        ours = {one.metadata.name for one in spaces if one.metadata.deletion_timestamp is None}
        rows = await self._connection.fetch(
            "SELECT namespace FROM sessions WHERE status <> 'deleted' AND namespace = ANY ($1)", list(ours)
        )
        if strays := ours - {row["namespace"] for row in rows}:
            log.warning("namespaces of no session", provider=self._name, count=len(strays), some=sorted(strays)[:10])

    # Outages. --------------------------------------------------------------------------------------------------------

    async def _probe(self) -> None:
        """Notice when the cluster is out of reach, or comes back."""
        blind_since: float | None = None
        marked = False
        while True:
            await asyncio.sleep(PROBE)
            began = monotonic()
            why = await self._why_blind()
            if why is None:
                blind_since = None
                if marked:
                    await asyncio.sleep(_CALM)
                    marked = await self._why_blind() is not None
                    self._all_due = not marked
                    self._wake()
                continue
            blind_since = blind_since or began
            if not marked and monotonic() >= blind_since + OUTAGE:
                marked = True
                self._outage = why
                self._wake()

    async def _why_blind(self) -> str | None:
        """Why what is held cannot be trusted to be of now."""
        try:
            await self._provider.cluster.version()
        except ProviderUnavailable as error:
            return str(error)
        except ApiRefused as error:
            log.debug("version refused", error=str(error))
        troubles = [informer.trouble for kind, informer in self._informers.values() if kind in _DECISIVE]
        return next((str(trouble) for trouble in troubles if trouble is not None), None)

    async def _mark_stale(self, why: str) -> None:
        log.warning("the cluster is out of reach", provider=self._name, why=why)
        while await self._statuses.mark_stale(self._connection, why) > 0:
            log.debug("marked stale", provider=self._name)


def _old(event: Event) -> bool:
    seen = visible.last_seen(event)
    return seen is None or seen < datetime.now(UTC) - _NEWS
