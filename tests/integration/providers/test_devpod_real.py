"""Sessions by the real `devpod` with its Docker provider, from a repository that asks for a password."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import aiohttp
import psutil
import pytest
import pytest_asyncio

from orchestrator.docker.engine import Engine
from orchestrator.errors import ProviderFailure
from orchestrator.providers.contract import Machine, Observation, Provider, SessionRef, SessionSpec, State
from orchestrator.providers.registry import open_provider
from tests.conftest import no_task_left
from tests.docker import Owned
from tests.git_server import GitServer
from tests.integration.providers.conftest import Heard, until, url
from tests.programs import program

# A build of DevPod that is under way is waited for, and each of its commands takes a second of a busy core.
# It may have to wait until DevPod is built.
pytestmark = [pytest.mark.late, pytest.mark.timeout(1500)]

USER, PASSWORD = "ada", "s3cret-passw0rd"
SERVICES = {
    "preview": {
        "command": ["sh", "-c", "echo serving for $PLANET; exec httpd -f -p $PORT -h ."],
        "port": 3000,
        "ready": "/README",
    }
}


@dataclass
class Place:
    """A tenant at a provider of DevPod's, and repositories for it."""

    data: Path
    server: GitServer
    owned: Owned
    image: str
    heard: Heard

    def open(self) -> Provider:
        return open_provider(
            "devpod",
            "dev",
            {"binary": program("devpod"), "reconcile_interval": 1.0},
            endpoint=self.owned.engine.host,
            credentials={"INACTIVITY_TIMEOUT": "99h"},
            data_dir=self.data,
            sink=self.heard.lines.append,
            repo_schemes=["https", "http"],
        )

    def repository(self, name: str, devcontainer: str | None = None, **more: Any) -> None:
        """A repository whose devcontainer.json is that, or names an image and `more`."""
        label = next(f"{key}={value}" for key, value in self.owned.labels.items())
        # Nothing that DevPod does needs a network in the container.
        whole = {"image": self.image, "runArgs": ["--network=none", f"--label={label}"], **more}
        text = json.dumps(whole) if devcontainer is None else devcontainer
        self.server.repository(name).commit({".devcontainer/devcontainer.json": text, "README": "read me\n"})

    def spec(
        self, name: str, number: int = 42, *, branch: str = "main", services: Mapping[str, Any] | None = None
    ) -> SessionSpec:
        repo_url = self.server.url(name, credentials=f"{USER}:{PASSWORD}")
        ref = SessionRef(number, "project", f"session-{number}", 7)
        return SessionSpec(
            ref, UUID(int=1), repo_url, branch, {"PLANET": 'Venus "2"'}, Machine("m", services=services or {})
        )

    async def containers(self) -> list[str]:
        return [one["State"] for one in await self.owned.engine.containers.list(self.owned.labels)]


@pytest_asyncio.fixture
async def place(tmp_path: Path, owned: Owned, busybox: str, heard: Heard) -> AsyncIterator[Place]:
    async with no_task_left(), GitServer(tmp_path / "repositories") as server:
        server.credentials = f"{USER}:{PASSWORD}"
        yield Place(tmp_path / "data", server, owned, busybox, heard)


async def get(address: str) -> str:
    async with aiohttp.request("GET", f"{address}README") as answer:
        return await answer.text()


def processes(data: Path) -> list[str]:
    """The command lines of all that DevPod runs for this directory."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("DEVPOD_HOME", "").startswith(str(data)):
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


async def test_a_session_from_its_first_start_to_its_end(place: Place) -> None:
    """One test for all of it: each step takes seconds."""
    place.repository("site", postCreateCommand="echo made for $PLANET > made")
    wanted = place.spec("site", services=SERVICES)
    first = place.open()
    assert (await first.check()).startswith("DevPod 0.")
    lines: set[str] = set()

    async def look() -> None:
        while True:
            lines.update(processes(place.data))
            await asyncio.sleep(0.05)

    looking = asyncio.create_task(look())
    try:
        endpoints = await first.start(wanted, place.heard.report)
    finally:
        looking.cancel()
        await asyncio.wait({looking})
    assert await get(url(endpoints.preview)) == "read me\n"
    assert [reason for reason, _ in place.heard.reports if reason in ("Cloning", "SettingUp", "StartingServices")] == [
        "Cloning", "SettingUp", "StartingServices"
    ]  # fmt: skip
    await until(lambda: 'serving for Venus "2"' in place.heard.of("preview", "stdout"))
    assert any("git clone" in line or "agent workspace up" in line for line in lines)
    kept = [path for path in place.data.rglob("*") if path.is_file() and PASSWORD.encode() in path.read_bytes()]
    assert not kept
    assert PASSWORD not in str(place.heard) + " ".join(lines)
    (container,) = await place.owned.engine.containers.list(place.owned.labels)
    inspected = await place.owned.engine.containers.inspect(container["Id"])
    assert PASSWORD not in json.dumps(inspected)

    # A command, in the repository, with the project's environment.
    assert await first.exec(wanted.ref, ["sh", "-c", "cat made; echo again > changed; exit 5"]) == (
        5, b'made for Venus "2"\n'
    )  # fmt: skip

    # Another orchestrator: the container and its service went on, and are reached where they were.
    await first.close()
    assert not processes(place.data)
    second = place.open()
    assert (await second.inspect(wanted.ref)) == Observation(State.RUNNING, "Ready", "All services answer.", endpoints)
    assert place.heard.of("preview", "stdout").count('serving for Venus "2"') == 1

    # Stopped by somebody, which DevPod is not told of: it is seen within a second or two, and not started unasked. (But
    # DevPod itself starts it for a connection that it is just about to make.)
    async def stopped() -> None:
        async for _, observation in second.watch():
            if observation.state is State.STOPPED:
                return

    seen = asyncio.create_task(stopped())
    async with asyncio.timeout(60):
        while not seen.done():
            if await place.containers() == ["running"]:
                await place.owned.engine.containers.kill(container["Id"], "SIGKILL")
            await asyncio.wait({seen}, timeout=2)
    assert await place.containers() == ["exited"]

    # Started again, with what its user did. Then stopped, and deleted.
    endpoints = await second.start(wanted, place.heard.report)
    assert await get(url(endpoints.preview)) == "read me\n"
    assert await second.exec(wanted.ref, ["cat", "changed"]) == (0, b"again\n")
    await second.stop(wanted.ref)
    assert (await second.inspect(wanted.ref)).state is State.STOPPED
    assert await place.containers() == ["exited"]
    await second.delete(wanted.ref)
    assert (await second.inspect(wanted.ref)).state is State.ABSENT
    assert await place.containers() == []
    assert not [path for path in place.data.rglob("*") if "session-42" in path.name or path.name.startswith("42.")]
    await second.delete(wanted.ref)
    await second.close()
    assert not processes(place.data)


async def test_what_a_repository_does_wrong_is_told_by_its_cause(place: Place) -> None:
    provider = place.open()
    place.repository("good")
    place.repository("broken", '{"image": ')
    place.repository("imageless", image="127.0.0.1:9/no-such-image:1")
    place.repository("failing", onCreateCommand="echo so sorry; exit 3")
    wrong = {
        "BranchNotFound": place.spec("good", 1, branch="nowhere"),
        "RepositoryNotFound": place.spec("missing", 2),
        "InvalidDevContainer": place.spec("broken", 3),
        "ImagePull": place.spec("imageless", 4),
        "CommandFailed": place.spec("failing", 5),
    }

    async def told(wanted: SessionSpec) -> str:
        with pytest.raises(ProviderFailure) as failure:
            await provider.start(wanted, place.heard.report)
        assert PASSWORD not in str(failure.value)
        await provider.delete(wanted.ref)
        return failure.value.reason

    found = await asyncio.gather(*(told(wanted) for wanted in wrong.values()))
    assert dict(zip(wrong, found, strict=True)) == {reason: reason for reason in wrong}
    assert await place.containers() == []
    await provider.close()


async def test_a_clone_that_never_ends_ends_with_its_start(place: Place, engine: Engine) -> None:
    provider = place.open()
    place.repository("endless")
    place.server.endless.add("endless")
    wanted = place.spec("endless")
    start = asyncio.create_task(provider.start(wanted, place.heard.report))
    await until(lambda: place.server.sent, timeout=60)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert not processes(place.data)
    # Half a clone is no clone for the next start.
    place.server.endless.clear()
    await provider.start(wanted, place.heard.report)
    assert (await provider.exec(wanted.ref, ["cat", "README"])) == (0, b"read me\n")
    await provider.delete(wanted.ref)
    await provider.close()
