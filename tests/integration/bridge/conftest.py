"""A cluster that a test stages, sessions in the database, and bridges between the two."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import pytest
import pytest_asyncio

from orchestrator.bridge.bridge import Bridges
from orchestrator.bridge.statuses import Look
from orchestrator.cluster.objects import INSTANCE, PROJECT, SESSION
from orchestrator.database import Pool, Wakeup, open_pool
from orchestrator.eventlog.memory import MemoryLog
from orchestrator.logs import LogWriter
from orchestrator.providers.contract import Provider
from orchestrator.providers.kubernetes import KubernetesProvider
from orchestrator.providers.options import KubernetesOptions
from orchestrator.sessions import store
from orchestrator.sessions.observe import Observer
from orchestrator.sessions.record import Session
from orchestrator.settings import DatabaseSettings, OrchestratorSettings
from tests.conftest import no_task_left
from tests.kubernetes import DEPLOYMENTS, EVENTS, NAMESPACES, PODS, Json, KubernetesApi

# The client alone takes half a minute to be imported on a machine that is busy enough.
DEADLINE = 60.0


@dataclass
class Ground:
    """One provider whose cluster the test stages."""

    api: KubernetesApi
    pool: Pool
    database_settings: DatabaseSettings
    kubeconfig: Path
    provider_id: int
    workspace_id: int
    options: dict[str, Any] = field(default_factory=dict)
    log: MemoryLog = field(default_factory=MemoryLog)
    _count: int = 0

    # The database. ---------------------------------------------------------------------------------------------------

    async def session(self, status: str = "running", **columns: Any) -> Session:
        """A session whose request is carried out, a minute ago."""
        self._count += 1
        project = await self.fetchrow(
            "INSERT INTO projects (workspace_id, name) VALUES ($1, $2) RETURNING id, uuid",
            self.workspace_id,
            f"project {self._count}",
        )
        session_id = await self.value(
            """INSERT INTO sessions (project_id, project_uuid, workspace_id, provider_id, provider, machine_config,
                                     machine, namespace, container_name, observed_generation, status, preview_url,
                                     expires_at, updated_at)
               VALUES ($1, $2, $3, $4, 'staged', 'small', '{"name": "small"}', $2::uuid::text, 'session-' ||
                       currval(pg_get_serial_sequence('sessions', 'id')), 1, $5, 'http://there/preview',
                       now() + interval '1 year', now() - interval '1 minute')
               RETURNING id""",
            project["id"], project["uuid"], self.workspace_id, self.provider_id, status,
        )  # fmt: skip
        for name, value in columns.items():
            await self.value(f"UPDATE sessions SET {name} = $2 WHERE id = $1", session_id, value)  # noqa: S608
        return await self.get(session_id)

    async def get(self, session: Session | int) -> Session:
        async with self.pool.acquire() as connection:
            found = await store.get(connection, session if isinstance(session, int) else session.id)
        assert found is not None
        return found

    async def until(self, session: Session, **fields: Any) -> Session:
        """The session once its fields are so."""

        async def there() -> Session | None:
            now = await self.get(session)
            return now if all(getattr(now, name) == value for name, value in fields.items()) else None

        return await until(there, lambda: self.get(session))

    async def fetchrow(self, statement: str, *arguments: Any) -> Any:
        async with self.pool.acquire() as connection:
            return await connection.fetchrow(statement, *arguments)

    async def fetch(self, statement: str, *arguments: Any) -> list[Any]:
        async with self.pool.acquire() as connection:
            return await connection.fetch(statement, *arguments)

    async def value(self, statement: str, *arguments: Any) -> Any:
        async with self.pool.acquire() as connection:
            return await connection.fetchval(statement, *arguments)

    async def told(self, event_type: str = "", channel: str = "cluster") -> list[Json]:
        """The data of the events on a channel so far, in order."""
        rows = await self.fetch(
            "SELECT data FROM outbox WHERE channel = $1 AND ($2 = '' OR event_type = $2) ORDER BY id",
            channel,
            event_type,
        )
        return [orjson.loads(row["data"]) for row in rows]

    async def until_told(self, count: int, event_type: str = "", channel: str = "cluster") -> list[Json]:
        """The events, once there are so many."""

        async def there() -> list[Json] | None:
            events = await self.told(event_type, channel)
            return events if len(events) >= count else None

        events = await until(there, lambda: self.told(event_type, channel))
        assert len(events) == count, events
        return events

    async def end_leaders(self) -> int:
        """End the connections of all who lead; how many there were."""
        rows = await self.fetch(
            """SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                WHERE application_name = 'cluster-code leader' AND datname = current_database()"""
        )
        return len(rows)

    # The cluster. ----------------------------------------------------------------------------------------------------

    def labels(self, session: Session) -> dict[str, str]:
        return {INSTANCE: "cluster-code", PROJECT: str(session.project_uuid), SESSION: str(session.id)}

    def meta(self, session: Session, name: str, **more: Any) -> Json:
        return {"name": name, "namespace": session.namespace, "labels": self.labels(session), **more}

    def owned(self, session: Session, name: str) -> Json:
        """The metadata of a pod of the session's deployment."""
        owner = {"kind": "ReplicaSet", "name": f"{session.container_name}-5d4f", "uid": "0"}
        return self.meta(session, name, ownerReferences=[owner])

    def place(self, session: Session) -> None:
        """The session's namespace."""
        self.api.put(
            NAMESPACES,
            {
                "metadata": {"name": session.namespace, "labels": self.labels(session)},
                "status": {"phase": "Active"},
            },
        )

    def run(self, session: Session, **container: Any) -> None:
        """All that a running session has in its cluster; `container` changes its container's status."""
        self.place(session)
        self.deployment(session)
        self.pod(session, **container)

    def deployment(self, session: Session, *, ready: int = 1, replicas: int = 1) -> None:
        status = {
            "observedGeneration": 10,
            "replicas": replicas,
            "updatedReplicas": replicas,
            "readyReplicas": ready,
            "availableReplicas": ready,
            "unavailableReplicas": replicas - ready,
            "conditions": [
                {"type": "Available", "status": str(ready == replicas)},
                {"type": "Progressing", "status": "True", "reason": "NewReplicaSetAvailable"},
            ],
        }
        self.api.put(
            DEPLOYMENTS,
            {"metadata": self.meta(session, session.container_name), "spec": {"replicas": replicas}, "status": status},
        )

    def pod(self, session: Session, name: str = "", **container: Any) -> Json:
        """The session's pod, with one container, ready unless said otherwise."""
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        status: Json = {
            "name": "preview",
            "image": "busybox",
            "ready": True,
            "started": True,
            "restartCount": 0,
            "state": {"running": {"startedAt": now}},
            "lastState": {},
        } | container
        ready = str(status["ready"])
        return self.api.put(
            PODS,
            {
                "metadata": self.owned(session, name or f"{session.container_name}-abc"),
                "spec": {"nodeName": "bench", "containers": [{"name": "preview", "image": "busybox"}]},
                "status": {
                    "phase": "Running",
                    "startTime": now,
                    "conditions": [{"type": "Ready", "status": ready}, {"type": "ContainersReady", "status": ready}],
                    "containerStatuses": [status],
                },
            },
        )

    def event(
        self, session: Session, name: str = "one", *, count: int = 1, seen: datetime | None = None, **more: Any
    ) -> Json:
        """A Kubernetes Event about the session's pod."""
        at = (seen or datetime.now(UTC)).strftime("%Y-%m-%dT%H:%M:%SZ")
        about = {
            "kind": "Pod",
            "namespace": session.namespace,
            "name": f"{session.container_name}-abc",
            "fieldPath": "spec.containers{preview}",
        }
        return self.api.put(
            EVENTS,
            {
                "metadata": {"name": name, "namespace": session.namespace},
                "involvedObject": about,
                "type": "Normal",
                "reason": "Pulled",
                "message": "Container image is there.",
                "count": count,
                "firstTimestamp": at,
                "lastTimestamp": at,
            }
            | more,
        )

    def crash(self, session: Session, restarts: int = 3) -> None:
        """The session's container crashes again and again."""
        ended = {"terminated": {"exitCode": 1, "reason": "Error", "finishedAt": "2026-01-01T00:00:00Z"}}
        waiting = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 40s restarting failed container"}}
        self.pod(session, ready=False, started=False, restartCount=restarts, state=waiting, lastState=ended)

    # Bridges. --------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def orchestrator(self) -> AsyncIterator[Orchestrator]:
        """What an orchestrator has of it: to be killed, or ended in order at the end."""
        pool = await open_pool(self.database_settings, name="test")
        options = KubernetesOptions(kubeconfig=str(self.kubeconfig), **self.options)
        provider = KubernetesProvider("staged", options)
        settings = OrchestratorSettings(data_dir=self.kubeconfig.parent)

        async def find(_: int | None) -> Provider:
            return provider

        observer = Observer(settings, pool, Wakeup(), find)
        logs = LogWriter(pool, self.log, keep=5000)
        bridges = Bridges(self.database_settings, pool, logs, Look(observer.look, settings.start_deadline))
        tasks = {
            asyncio.create_task(bridges.run(self.provider_id, "staged", provider), name="bridge"),
            asyncio.create_task(logs.run(), name="session output"),
        }
        one = Orchestrator(bridges, logs, provider, tasks)
        try:
            yield one
            for task in tasks:
                assert one.ended or not task.done(), task
        finally:
            await one.end()
            await provider.close()
            with suppress(TimeoutError):
                await asyncio.wait_for(pool.close(), 5)

    @asynccontextmanager
    async def bridge(self) -> AsyncIterator[Orchestrator]:
        """The only one, once it follows everything; it leaves no task behind."""
        async with no_task_left(), self.orchestrator() as one:
            await one.following()
            yield one


@dataclass
class Orchestrator:
    """The parts of one that bridges have to do with."""

    bridges: Bridges
    logs: LogWriter
    provider: KubernetesProvider
    tasks: set[asyncio.Task[None]]
    ended: bool = False

    async def following(self) -> None:
        """Return once it leads, and all is listed and told."""

        async def there() -> bool:
            readings = self.bridges.read()
            return bool(readings) and readings[0].leads and self.settled()

        await until(there, self._state)

    def settled(self) -> bool:
        """Whether it leads, has listed everything, and has nothing left to tell."""
        (reading,) = self.bridges.read() or [None]
        return (
            reading is not None
            and reading.leads
            and not reading.waiting
            and all(one.last_list_age is not None for one in reading.resources.values())
        )

    async def _state(self) -> Any:
        return self.bridges.read()

    async def end(self) -> None:
        """End it, as a shutdown does. Idempotent."""
        self.ended = True
        for task in self.tasks:
            task.cancel()
        await asyncio.wait(self.tasks)


async def until(there: Callable[[], Awaitable[Any]], otherwise: Callable[[], Awaitable[Any]] | None = None) -> Any:
    """The first true answer, within a deadline; `otherwise` says what there is instead."""
    with suppress(TimeoutError):
        async with asyncio.timeout(DEADLINE):
            while not (answer := await there()):
                await asyncio.sleep(0.01)
            return answer
    raise AssertionError(f"did not come about; instead: {await otherwise() if otherwise else 'nothing'}")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outages are noticed sooner than in the field."""
    monkeypatch.setattr("orchestrator.bridge.leading.PROBE", 0.1)
    monkeypatch.setattr("orchestrator.bridge.leading.OUTAGE", 0.3)


@pytest_asyncio.fixture
async def ground(pool: Pool, database_settings: DatabaseSettings, tmp_path: Path) -> AsyncIterator[Ground]:
    async with pool.acquire() as connection:
        workspace_id = await connection.fetchval("INSERT INTO workspaces (name) VALUES ('team') RETURNING id")
        provider_id = await connection.fetchval(
            "INSERT INTO providers (name, kind, is_default) VALUES ('staged', 'kubernetes', true) RETURNING id"
        )
    async with KubernetesApi() as api:
        kubeconfig = api.write_kubeconfig(tmp_path / "kubeconfig")
        ground = Ground(api, pool, database_settings, kubeconfig, provider_id, workspace_id)
        yield ground
        await ground.log.close()
