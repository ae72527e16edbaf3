"""Sessions on a real cluster, asked for by way of the database, and the orchestrators' processes that see to them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import psutil

from auth import projects
from orchestrator.cluster.client import Cluster
from orchestrator.cluster.objects import INSTANCE, PROJECT, SESSION
from orchestrator.database import Connection, Pool
from orchestrator.errors import ApiRefused
from orchestrator.sessions import store
from orchestrator.sessions.record import Session
from tests.cluster.conftest import IMAGE
from tests.integration.processes.process import Process, living
from tests.rabbitmq import free_ports

T = TypeVar("T")

# Seconds. Two cores run everything, the cluster too.
DEADLINE = 150.0
# Whoever takes over need not wait long for the leases of who died.
QUICK = {"ORCHESTRATOR_LEASE": "3", "ORCHESTRATOR_POLL_INTERVAL": "0.5", "ORCHESTRATOR_RESYNC_INTERVAL": "1"}
# A page; and what makes the container end as one that needs more memory than it has.
_SERVE = """
mkdir -p /tmp/w && echo hi > /tmp/w/index.html && httpd -p $PORT -h /tmp/w
trap 'exit 0' TERM
while [ ! -e /tmp/eat ]; do sleep 0.1 & wait $!; done
exec tail /dev/zero
"""
_NAMESPACES = "/api/v1/namespaces"


class Away(Exception):
    """There is no such object, though there was to be one."""


@dataclass
class Ground:
    """One provider of an installation of the test's own, and what is asked of it."""

    pool: Pool
    cluster: Cluster
    folder: Path
    # Of the processes: where the database and RabbitMQ are.
    environment: dict[str, str]
    kubeconfig: Path
    user_id: int
    workspace_id: int
    instance: str = field(default_factory=lambda: f"faults-{uuid4()}")
    workers: list[Process] = field(default_factory=list)
    sessions: list[int] = field(default_factory=list)

    # Processes. ------------------------------------------------------------------------------------------------------

    async def worker(self, **environment: str) -> Process:
        """Another orchestrator, begun."""
        worker = Process(
            self.folder,
            "orchestrator",
            **{**self.environment, **QUICK, "ORCHESTRATOR_PORT": str(free_ports(1)[0]), **environment},
        )
        self.workers.append(worker)
        await worker.start()
        await worker.until_logged("orchestrator runs")
        return worker

    async def kill(self, worker: Process) -> None:
        """End it as a crash does; what it has started ends, too."""
        children = worker.descendants()
        await worker.kill()
        await self.until(lambda: _true(not any(living(pid) for pid in children)), children)

    async def stop(self) -> None:
        """End all that run, in order; none of them has met with what it did not expect."""
        running = [worker for worker in self.workers if worker.running]
        assert [await worker.stop() for worker in running] == [0] * len(running)
        for worker in self.workers:
            assert "Traceback" not in (output := worker.output.read_text()), output[-8000:]

    async def close(self) -> None:
        """End the processes that are left, and have what is left in the cluster deleted."""
        for worker in self.workers:
            if worker.running:
                await worker.kill()
        for namespace in await self.namespaces():
            try:
                await self.cluster.delete(f"{_NAMESPACES}/{namespace}/pods", grace=0)
                await self.cluster.delete(f"{_NAMESPACES}/{namespace}")
            except ApiRefused as error:
                if error.status not in (404, 409):
                    raise

        async def gone() -> bool:
            return not await self.namespaces()

        await self.until(gone)

    # What is asked for. ----------------------------------------------------------------------------------------------

    async def configure(self, **options: Any) -> None:
        """Have the provider, and the machine configs `first` and `second`."""
        given = {"kubeconfig": str(self.kubeconfig), "instance": self.instance, "delete_deadline": 60, **options}
        async with self.pool.acquire() as connection:
            provider_id = await connection.fetchval(
                "INSERT INTO providers (name, kind, options, is_default) VALUES ('cluster', 'kubernetes', $1, true)"
                " RETURNING id",
                given,
            )
            for name in ("first", "second"):
                preview = {"image": IMAGE, "command": ["sh", "-c", _SERVE], "env": {"SIZE": name}}
                await connection.execute(
                    """INSERT INTO machine_configs
                              (name, provider_id, is_default, cpu, memory_bytes, disk_bytes, services, options)
                       VALUES ($1, $2, $3, 0.05, $4, $5, $6, $7)""",
                    name, provider_id, name == "first", 32 << 20, 10 << 20, {"preview": preview},
                    {"values": {
                        # Kubernetes' own way to an end may take a minute: the pods' files are swept up once in one.
                        "terminationGracePeriodSeconds": 0,
                        "services": {"preview": {
                            "readinessProbe": {"httpGet": {"path": "/", "port": 3000}, "periodSeconds": 1},
                        }},
                    }},
                )  # fmt: skip

    async def ask(self, change: Callable[[Connection], Awaitable[T]]) -> T:
        """What a transaction comes to."""
        async with self.pool.acquire() as connection, connection.transaction():
            return await change(connection)

    async def create(self) -> int:
        """A session of a project of its own."""

        async def make(connection: Connection) -> int:
            project = await projects.create(connection, self.workspace_id, name="site", env={"A": "secret-of-a"})
            session, _ = await store.create(
                connection, project=project, user_id=self.user_id, provider="cluster", machine_config="first"
            )
            return session.id

        session_id = await self.ask(make)
        self.sessions.append(session_id)
        return session_id

    async def want(self, session_id: int, desired: str) -> None:
        await self.ask(lambda connection: store.request(connection, session_id, desired))

    async def change(self, session_id: int, machine_config: str) -> None:
        await self.ask(lambda connection: store.change_machine(connection, session_id, machine_config))

    # What there is. --------------------------------------------------------------------------------------------------

    async def get(self, session_id: int) -> Session:
        async with self.pool.acquire() as connection:
            found = await store.get(connection, session_id)
        assert found is not None
        return found

    async def until(self, condition: Callable[[], Awaitable[T]], told: object = "") -> T:
        """What the condition comes to once it holds."""
        try:
            async with asyncio.timeout(DEADLINE):
                while not (held := await condition()):
                    await asyncio.sleep(0.1)
        except TimeoutError:
            raise AssertionError(f"not within {DEADLINE:.0f} seconds: {told}") from None
        return held

    async def reached(self, session_id: int, status: str, reason: str | None = None) -> Session:
        """The session once its request is carried out, with that status."""
        seen: Session | None = None

        async def there() -> Session | None:
            nonlocal seen
            seen = await self.get(session_id)
            settled = seen.status == status and not seen.outstanding and not seen.stale
            return seen if settled and reason in (None, seen.reason) else None

        try:
            return await self.until(there)
        except AssertionError:
            history = "\n".join(" ".join(one) for one in await self.history(session_id))
            raise AssertionError(f"it does not become {status}: {seen}\n{history}") from None

    async def history(self, session_id: int) -> list[tuple[str, str, str]]:
        """`(status, reason, message)` as they followed one another."""
        async with self.pool.acquire() as connection:
            rows = await connection.fetch(
                "SELECT status, reason, message FROM session_events WHERE session_id = $1 ORDER BY id", session_id
            )
        return [tuple(row) for row in rows]

    async def namespaces(self) -> list[str]:
        """Those of this installation."""
        found = await self.list(_NAMESPACES, label_selector=f"{INSTANCE}={self.instance}")
        return [one["metadata"]["name"] for one in found]

    async def list(self, path: str, *, label_selector: str = "") -> list[dict[str, Any]]:
        """Objects, as the API has them."""
        return [
            one async for page in self.cluster.list(path, dict, label_selector=label_selector) for one in page.items
        ]

    async def pod(self, session: Session) -> dict[str, Any]:
        """The session's one pod that is not about to end. Raises Away when there is none."""
        found = await self.list(f"{_NAMESPACES}/{session.namespace}/pods")
        living_ones = [one for one in found if "deletionTimestamp" not in one["metadata"]]
        if not living_ones:
            raise Away
        [pod] = living_ones
        return pod

    async def runs(self, session_id: int, machine_config: str) -> Session:
        """The session, which runs with that machine config, in the cluster and by the database alike."""
        session = await self.reached(session_id, "running")
        pod = await self.pod(session)
        [container] = pod["spec"]["containers"]
        assert {"name": "SIZE", "value": machine_config} in container["env"], container["env"]
        assert pod["metadata"]["labels"].items() >= {SESSION: str(session_id), PROJECT: session.namespace}.items()
        assert session.preview_url is not None
        assert await self.revisions(session) != []
        return session

    async def revisions(self, session: Session) -> list[str]:
        """The status of each revision of its release, oldest first; one is deployed, and those before it are not."""
        found = await self.list(f"{_NAMESPACES}/{session.namespace}/secrets", label_selector="owner=helm")
        labels = sorted((one["metadata"]["labels"] for one in found), key=lambda one: int(one["version"]))
        assert {one["name"] for one in labels} <= {session.container_name}
        return [one["status"] for one in labels]

    async def nothing_is_left(self) -> None:
        """Delete all sessions; fails unless the cluster and what is known of it are as empty then as they were."""
        for session_id in self.sessions:
            await self.want(session_id, "deleted")
        await asyncio.gather(*(self.reached(session_id, "deleted") for session_id in self.sessions))
        assert await self.namespaces() == []
        spaces = [(await self.get(session_id)).namespace for session_id in self.sessions]
        assert [line for line in map(_command, psutil.process_iter()) if any(one in line for one in spaces)] == []

        left: list[str] = []

        async def forgotten() -> bool:
            async with self.pool.acquire() as connection:
                left[:] = [row["told"] for row in await connection.fetch("SELECT told FROM cluster_objects")]
            return not left

        # Kubernetes removes Events after their namespace, when it has none too few others.
        await self.until(forgotten, left)


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


async def _true(holds: bool) -> bool:
    return holds
