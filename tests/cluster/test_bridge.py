"""The bridge between a real cluster and the sessions' rows."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import pytest_asyncio

from orchestrator.bridge.bridge import Bridges
from orchestrator.bridge.statuses import Look
from orchestrator.cluster.client import Cluster
from orchestrator.cluster.objects import INSTANCE, PROJECT, SESSION, Partial, Pod
from orchestrator.database import Pool, Wakeup
from orchestrator.eventlog.memory import MemoryLog
from orchestrator.logs import LogWriter
from orchestrator.providers.contract import Provider
from orchestrator.providers.kubernetes import KubernetesProvider
from orchestrator.providers.options import KubernetesOptions
from orchestrator.sessions.observe import Observer
from orchestrator.settings import DatabaseSettings, OrchestratorSettings
from tests.cluster.conftest import IMAGE, eventually, removed_after

pytestmark = pytest.mark.timeout(300)

Json = dict[str, Any]

# A container that says something, and ends badly as soon as it is told to.
_COMMAND = ["sh", "-c", "echo it runs; until [ -e /tmp/crash ]; do sleep 0.2; done; echo no such table; exit 3"]


class Stage:
    """One session, in the database and in a namespace of the cluster."""

    def __init__(self, cluster: Cluster, pool: Pool, session_id: int, namespace: str, labels: Json) -> None:
        self.cluster = cluster
        self.session_id = session_id
        self.namespace = namespace
        self._pool = pool
        self._labels = labels

    async def make(self) -> None:
        """The namespace and the deployment, as a chart would."""
        meta = {"name": self.namespace, "labels": self._labels}
        await self.cluster.create("/api/v1/namespaces", {"metadata": meta}, Partial)
        name = f"session-{self.session_id}"
        labels = self._labels | {"app": name}
        container = {
            "name": "preview",
            "image": IMAGE,
            "command": _COMMAND,
            "readinessProbe": {"exec": {"command": ["true"]}, "periodSeconds": 1},
        }
        await self.cluster.create(
            f"/apis/apps/v1/namespaces/{self.namespace}/deployments",
            {
                "metadata": {"name": name, "labels": labels},
                "spec": {
                    "replicas": 1,
                    "strategy": {"type": "Recreate"},
                    "selector": {"matchLabels": {"app": name}},
                    "template": {
                        "metadata": {"labels": labels},
                        "spec": {"containers": [container], "terminationGracePeriodSeconds": 0},
                    },
                },
            },
            Partial,
        )

    async def pods(self) -> list[Pod]:
        path = f"/api/v1/namespaces/{self.namespace}/pods"
        return [pod async for page in self.cluster.list(path, Pod) for pod in page.items]

    async def row(self) -> Any:
        async with self._pool.acquire() as connection:
            return await connection.fetchrow("SELECT * FROM sessions WHERE id = $1", self.session_id)

    async def told(self, event_type: str) -> list[Json]:
        async with self._pool.acquire() as connection:
            rows = await connection.fetch(
                "SELECT data FROM outbox WHERE channel = $1 AND event_type = $2 ORDER BY id",
                f"session:{self.session_id}",
                event_type,
            )
        return [orjson.loads(row["data"]) for row in rows]

    async def lines(self) -> list[str]:
        async with self._pool.acquire() as connection:
            rows = await connection.fetch(
                "SELECT line FROM session_logs WHERE session_id = $1 AND stream = 'stdout' ORDER BY id", self.session_id
            )
        return [row["line"] for row in rows]

    async def has(self, status: str) -> bool:
        return bool((await self.row())["status"] == status)


@pytest_asyncio.fixture
async def stage(
    cluster: Cluster, kubeconfig: Path, pool: Pool, database_settings: DatabaseSettings, tmp_path: Path
) -> AsyncIterator[Stage]:
    instance = f"test-{uuid.uuid4()}"
    async with pool.acquire() as connection:
        workspace_id = await connection.fetchval("INSERT INTO workspaces (name) VALUES ('team') RETURNING id")
        provider_id = await connection.fetchval(
            "INSERT INTO providers (name, kind) VALUES ('real', 'kubernetes') RETURNING id"
        )
        project = await connection.fetchrow(
            "INSERT INTO projects (workspace_id, name) VALUES ($1, 'shop') RETURNING id, uuid", workspace_id
        )
        session_id = await connection.fetchval(
            """INSERT INTO sessions (project_id, project_uuid, workspace_id, provider_id, provider, machine_config,
                                     machine, namespace, container_name, observed_generation, status, expires_at)
               VALUES ($1, $2, $3, $4, 'real', 'small', '{"name": "small"}', $2::uuid::text, 'session-' ||
                       currval(pg_get_serial_sequence('sessions', 'id')), 1, 'starting', now() + interval '1 year')
               RETURNING id""",
            project["id"], project["uuid"], workspace_id, provider_id,
        )  # fmt: skip
    namespace = str(project["uuid"])
    labels = {INSTANCE: instance, PROJECT: namespace, SESSION: str(session_id)}
    provider = KubernetesProvider(
        "real", KubernetesOptions(kubeconfig=str(kubeconfig), instance=instance, request_timeout=30.0)
    )

    async def find(_: int | None) -> Provider:
        return provider

    log = MemoryLog()
    observer = Observer(OrchestratorSettings(data_dir=tmp_path), pool, Wakeup(), find)
    logs = LogWriter(pool, log, keep=5000)
    bridges = Bridges(database_settings, pool, logs, Look(observer.look, 300.0))
    async with removed_after(cluster, namespace):
        stage = Stage(cluster, pool, session_id, namespace, labels)
        await stage.make()
        tasks = {
            asyncio.create_task(bridges.run(provider_id, "real", provider), name="bridge"),
            asyncio.create_task(logs.run(), name="session output"),
        }
        try:
            yield stage
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            await provider.close()
            await log.close()


async def test_a_session_is_followed_from_its_first_pod_to_the_end_of_its_namespace(stage: Stage) -> None:
    await eventually(lambda: stage.has("running"))
    pods = await stage.told("session.pod")
    assert pods[0]["change"] == "added"
    assert pods[-1]["ready"]
    assert pods[-1]["containers"][0]["state"] == "running"
    assert {"Scheduled", "Started"} <= {one["reason"] for one in await stage.told("session.event")}

    async def said() -> bool:
        return await stage.lines() == ["it runs"]

    await eventually(said)

    (pod,) = await stage.pods()
    await stage.cluster.exec(stage.namespace, pod.metadata.name, "preview", ["touch", "/tmp/crash"])

    async def crashed() -> bool:
        return (await stage.lines())[:2] == ["it runs", "no such table"]

    await eventually(crashed)

    async def started_again() -> bool:
        told = await stage.told("session.pod")
        return told[-1]["ready"] and told[-1]["containers"][0]["restarts"] > 0

    # The file is in the container, which is another now: it goes on.
    await eventually(started_again)
    await eventually(lambda: stage.has("running"))

    await stage.cluster.delete(f"/api/v1/namespaces/{stage.namespace}/pods/{pod.metadata.name}", grace=0)

    async def replaced() -> bool:
        told = await stage.told("session.pod")
        return told[-1]["ready"] and told[-1]["uid"] != pod.metadata.uid

    await eventually(replaced)
    gone = [one for one in await stage.told("session.pod") if one["uid"] == pod.metadata.uid]
    assert [one["change"] for one in gone].count("deleted") == 1
    await eventually(lambda: stage.has("running"))

    await stage.cluster.delete(f"/api/v1/namespaces/{stage.namespace}")
    await eventually(lambda: stage.has("pending"))
    assert (await stage.row())["reason"] == "Lost"
    versions = [(one["uid"], one["resource_version"]) for one in await stage.told("session.pod")]
    assert len(versions) == len(set(versions))
