"""One Docker engine: what it has, what it can do, and how its answers and its absence become our errors.

engine = Engine("unix:///var/run/docker.sock")
container = await engine.containers.create("web", {"Image": "nginx", "Labels": {...}})
await engine.containers.start(container)
async for stream, at, line in engine.logs(container, follow=True):
    ...
await engine.close()
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from orchestrator.docker import events, logs
from orchestrator.docker.builds import Builds
from orchestrator.docker.connection import Connection, Params
from orchestrator.docker.containers import Containers
from orchestrator.docker.images import Images
from orchestrator.docker.networks import Networks
from orchestrator.docker.volumes import Volumes


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine says of itself: `version` is Docker's, `api_version` what is spoken with it (`1.41`)."""

    version: str
    api_version: str
    os: str
    # As Docker calls it: `amd64`, `arm64`.
    arch: str
    cpus: int
    memory_bytes: int
    # Where it keeps all it has, on its own machine.
    root_dir: str
    # Whether it can build with BuildKit.
    buildkit: bool
    # `cgroupfs` or `systemd`, and 1 or 2.
    cgroup_driver: str
    cgroup_version: int


class Engine:
    """The engine at `host`: `unix:///path`, `tcp://host:port`, or "" for DOCKER_HOST, else the socket of this machine.

    TLS goes by `tls`, else by DOCKER_TLS_VERIFY and DOCKER_CERT_PATH, as with docker's own client. `name` is what
    people call it; `timeout` (seconds) bounds each answer. Every method raises ProviderUnavailable (it cannot be
    reached, does not answer in time, hangs up) and EngineRefused (it did answer). Cancelling any of them gives its
    connection up. Nothing is opened before it is needed; `close` it in the end.
    """

    def __init__(
        self, host: str = "", *, name: str = "Docker", timeout: float = 15.0, tls: ssl.SSLContext | None = None
    ) -> None:
        self.connection = Connection(host, name=name, timeout=timeout, tls=tls)
        self.containers = Containers(self.connection)
        self.networks = Networks(self.connection)
        self.volumes = Volumes(self.connection)
        self.images = Images(self.connection)
        self.builds = Builds(self.connection)

    async def __aenter__(self) -> Engine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def host(self) -> str:
        """Where it is."""
        return self.connection.host

    async def close(self) -> None:
        """Close all connections, for good; what still runs on one fails. Idempotent."""
        await self.connection.close()

    async def info(self) -> EngineInfo:
        """What it says of itself."""
        api_version = await self.connection.version()
        found = await self.connection.json("GET", "/info")
        version = await self.connection.json("GET", "/version")
        return EngineInfo(
            version=found["ServerVersion"],
            api_version="{}.{}".format(*api_version),
            os=version["Os"],
            arch=version["Arch"],
            cpus=found["NCPU"],
            memory_bytes=found["MemTotal"],
            root_dir=found["DockerRootDir"],
            buildkit=version["Os"] == "linux",
            cgroup_driver=found.get("CgroupDriver") or "",
            cgroup_version=int(found.get("CgroupVersion") or 1),
        )

    async def now(self) -> datetime:
        """The time by its own clock."""
        said: str = (await self.connection.json("GET", "/info"))["SystemTime"]
        return datetime.fromisoformat(said)

    async def json(
        self, method: str, path: str, *, params: Params | None = None, body: Any = None, timeout: float | None = None
    ) -> Any:
        """What the API answers at a path without version (`/containers/json`), decoded; None where it says nothing.

        Params that are no strings are written as JSON, those that are None left out.
        """
        return await self.connection.json(method, path, params=params, body=body, timeout=timeout)

    async def happened(
        self, *, since: datetime, until: datetime, filters: Mapping[str, Sequence[str]]
    ) -> list[dict[str, Any]]:
        """The events of a time that is over, by the engine's clock, as far as it remembers them (256 of all)."""
        return [event async for event in events.between(self.connection, since, until, filters)]

    def logs(
        self, container: str, *, follow: bool = False, since: datetime | None = None, tail: int | None = None
    ) -> AsyncGenerator[logs.LogLine, None]:
        """The lines that a container has written: (`stdout` or `stderr`, when, text without its end).

        With `follow` until it ends. Lines over 1 MiB are cut; bytes that are no UTF-8, and NUL, become U+FFFD. `since`
        is inclusive, and times are in microseconds: whoever resumes gets lines of the last one's microsecond again.
        `tail`: only so many last lines. Raises EngineRefused (404: there is no such container).
        """
        return logs.read(self.connection, container, follow=follow, since=since, tail=tail)

    def events(
        self, *, since: datetime | int | None = None, filters: Mapping[str, Sequence[str]] | None = None
    ) -> AsyncGenerator[dict[str, Any], None]:
        """What happens, as the API tells it (`Type`, `Action`, `Actor`, `timeNano`), each once; it never ends.

        `since` (a time, or a `timeNano`) is inclusive. A lost engine is tried again for ever, with back-off, and what
        happened meanwhile is told. But an engine that was started again has forgotten what happened before, and each
        remembers 256 events only: after `{"Type": "engine", "Action": "connected"}`, which comes first, too, look at
        what there is. `{"Type": "engine", "Action": "lost", "message": …}` says that it is away. Raises
        ProviderUnavailable when the Engine was closed, and EngineRefused (400: wrong filters).
        """
        return events.events(self.connection, since=since, filters=filters)
