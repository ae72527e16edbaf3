"""Workers that are killed with -9 at random moments, while they deploy for real."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from orchestrator.deployments import apps, directories, labels, queue
from orchestrator.deployments.apps import App
from orchestrator.deployments.contract import AppSecrets, AppSettings
from orchestrator.deployments.source import MARKER
from orchestrator.deployments.sweep import sweep
from orchestrator.docker import labels as marks
from orchestrator.errors import Conflict
from orchestrator.settings import DatabaseSettings, DeploySettings
from tests.docker import Owned
from tests.git_server import GitServer, Repository
from tests.integration.deployments.conftest import KEYS, Place
from tests.integration.deployments.staged import until

SECRET = "hunter2-0123"
WORKERS, APPS = 3, 3
# Seconds in which a worker is killed after the one before.
MOMENT = 0.6


@dataclass
class Workers:
    """The processes, and the one that they are forked from."""

    parent: asyncio.subprocess.Process
    running: list[int]

    async def begin(self) -> None:
        assert self.parent.stdin is not None
        assert self.parent.stdout is not None
        self.parent.stdin.write(b"\n")
        self.running.append(int(await self.parent.stdout.readline()))

    async def kill(self, pid: int) -> None:
        """Kill one, and have another in its place."""
        self.running.remove(pid)
        os.kill(pid, signal.SIGKILL)
        await self.begin()


@asynccontextmanager
async def working(database: DatabaseSettings, settings: DeploySettings, errors: Path) -> AsyncIterator[Workers]:
    given = json.dumps({**asdict(settings), "directory": str(settings.directory)})
    with errors.open("wb") as file:
        parent = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.integration.deployments.faults.workers", database.url, given,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=file,
        )  # fmt: skip
    workers = Workers(parent, [])
    try:
        for _ in range(WORKERS):
            await workers.begin()
        yield workers
    finally:
        assert parent.stdin is not None
        parent.stdin.close()
        async with asyncio.timeout(60):
            await parent.wait()


@dataclass
class Site:
    """An app, its repository, and what was committed."""

    place: Place
    app: App
    repository: Repository
    base: str
    commits: int = 0

    async def push(self) -> None:
        """Commit a page that says which it is, and queue it."""
        self.commits += 1
        self.repository.commit(
            {
                "Dockerfile": f"FROM {self.base}\nCOPY page /www/\nRUN echo $((6*7)) built\n"
                'CMD ["httpd", "-f", "-p", "8080", "-h", "/www"]\n',
                "page/index.html": f"page {self.commits}",
            },
            f"Page {self.commits}",
        )
        await self.place.enqueue(self.app, cause="push")

    async def roll_back(self, draw: random.Random) -> None:
        async with self.place.pool.acquire() as connection, connection.transaction():
            rows = await connection.fetch(
                "SELECT id FROM deployments WHERE app_id = $1 AND status = 'retired' AND image IS NOT NULL", self.app.id
            )
            if rows:
                await queue.roll_back(connection, draw.choice(rows)["id"], user_id=None)

    async def cancel(self, draw: random.Random) -> None:
        rows = await self.place.pool.fetch(
            "SELECT id FROM deployments WHERE app_id = $1 AND finished_at IS NULL", self.app.id
        )
        if rows:
            async with self.place.pool.acquire() as connection, connection.transaction():
                await queue.cancel(connection, draw.choice(rows)["id"])


async def make_site(place: Place, server: GitServer, name: str, base: str) -> Site:
    async with place.pool.acquire() as connection, connection.transaction():
        app, _ = await apps.create(
            connection, KEYS, workspace_id=place.workspace_id, created_by=place.user_id, name=name,
            repo_url=server.url(name), branch=None, auto_deploy=True,
            settings=replace(AppSettings(), keep_images=2), secrets=AppSecrets(env={"PASSWORD": SECRET}),
        )  # fmt: skip
    return Site(place, app, server.repository(name), base)


@pytest.mark.late
@pytest.mark.random
@pytest.mark.timeout(300)
async def test_workers_killed_at_any_moment_lose_double_and_leave_nothing(
    place: Place, database_settings: DatabaseSettings, owned: Owned, busybox: str, tmp_path: Path
) -> None:
    seed = int(os.environ.get("DEPLOY_KILL_SEED") or random.randrange(10**9))
    moments = int(os.environ.get("DEPLOY_KILL_MOMENTS") or 50)
    print(f"DEPLOY_KILL_SEED={seed}")
    draw = random.Random(seed)
    settings = DeploySettings(
        instance=owned.instance, network=f"{owned.instance}-apps", directory=tmp_path / "deployments", lease=2.0,
        drain=0.1, free_bytes=1 << 20, secrets_key=["k" * 42 + "A"],
    )  # fmt: skip
    foreign = await _foreign(owned, f"{owned.instance}-a-1", busybox)
    errors = tmp_path / "errors"
    try:
        async with GitServer(tmp_path / "repositories") as server:
            sites = [await make_site(place, server, f"{owned.instance}-{name}", busybox) for name in "abc"[:APPS]]
            async with working(database_settings, settings, errors) as workers:
                for _ in range(moments):
                    await _ask(draw, draw.choice(sites))
                    await asyncio.sleep(draw.uniform(0, MOMENT))
                    await workers.kill(draw.choice(workers.running))
                for site in sites:
                    await site.push()
                await until(lambda: _all_ended(place))
        await _agree(owned, place, settings, sites)
        await _told_once(place)
        await _nothing_left(place, settings)
        assert SECRET not in errors.read_text(errors="replace")
        now = await owned.engine.containers.inspect(foreign["Id"])
        assert now is not None
        assert (now["State"]["StartedAt"], now["Name"]) == (foreign["State"]["StartedAt"], foreign["Name"])
    except BaseException:
        print(errors.read_text(errors="replace")[-20_000:])
        raise
    finally:
        await owned.engine.containers.remove(foreign["Id"])


async def _ask(draw: random.Random, site: Site) -> None:
    """What users do."""
    what = draw.random()
    try:
        if what < 0.6:
            await site.push()
        elif what < 0.8:
            await site.roll_back(draw)
        else:
            await site.cancel(draw)
    except Conflict:
        return


async def _foreign(owned: Owned, name: str, image: str) -> dict[str, Any]:
    """A container with a name as ours have, of another installation."""
    config = {"Image": image, "Cmd": ["sleep", "1000"], "Labels": {marks.INSTANCE: "another", marks.APP: "1"}}
    made = await owned.engine.containers.create(name, config)
    await owned.engine.containers.start(made)
    found = await owned.engine.containers.inspect(made)
    assert found is not None
    return found


async def _all_ended(place: Place) -> bool:
    return not await place.pool.fetchval("SELECT count(*) FROM deployments WHERE finished_at IS NULL")


async def _agree(owned: Owned, place: Place, settings: DeploySettings, sites: list[Site]) -> None:
    """Database, containers, images and networks say the same, once the sweep has been."""
    engine = owned.engine
    await sweep(engine, place.pool, KEYS, settings)
    rows = await place.pool.fetch("SELECT * FROM deployments ORDER BY id")
    counts: dict[str, int] = defaultdict(int)
    for row in rows:
        counts[row["status"]] += 1
    print(dict(counts))
    assert set(counts) <= {"live", "retired", "failed", "cancelled", "superseded"}
    failed = {row["reason"]: row["message"] for row in rows if row["status"] == "failed"}
    # One that three workers died of, one whose image was removed before it was gone back to, and one whose container
    # has the name of the foreign one.
    assert failed.keys() <= {"WorkerDied", "ImageGone", "NameTaken"}, failed
    live = {row["app_id"]: row for row in rows if row["status"] == "live"}
    assert len(live) == counts["live"] == len(sites)
    containers = await engine.containers.list(labels.ours(settings))
    assert sorted(one["Names"][0] for one in containers) == sorted(
        f"/{site.app.name}-{live[site.app.id]['id']}" for site in sites
    )
    async with aiohttp.ClientSession() as session:
        for one in containers:
            [site] = [site for site in sites if str(site.app.id) == one["Labels"][marks.APP]]
            address = one["NetworkSettings"]["Networks"][settings.network]["IPAddress"]
            async with session.get(f"http://{address}:8080/") as answer:
                assert await answer.text() == f"page {site.commits}"
    for site in sites:
        images = await engine.images.list(labels.ours(settings, app_id=site.app.id))
        assert 1 <= len(images) <= 2
        assert live[site.app.id]["image_id"] in {image["Id"] for image in images}
    # Those of builds that were under way included.
    left = await engine.json(
        "GET", "/containers/json", params={"all": "true", "filters": {"ancestor": [sites[0].base]}}
    )
    assert {one["Id"] for one in left} - {one["Id"] for one in containers} == {
        one["Id"] for one in left if one["Labels"].get(marks.INSTANCE) == "another"
    }
    networks = await engine.networks.list({marks.INSTANCE: settings.instance})
    assert [network["Name"] for network in networks] == [settings.network]


async def _told_once(place: Place) -> None:
    """No state is told twice in a row, none is missing at the end, and the log is told as it is stored."""
    statuses: dict[int, list[dict[str, Any]]] = defaultdict(list)
    logs: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for event_type, channel, data in await place.told():
        if channel.startswith("deployment:"):
            (logs if event_type == "deployment.log" else statuses)[int(channel[len("deployment:") :])].append(data)
    for row in await place.pool.fetch("SELECT id, status FROM deployments"):
        told = statuses[row["id"]]
        assert told[-1]["status"] == row["status"]
        states = [{name: value for name, value in state.items() if name != "updated_at"} for state in told]
        assert all(before != after for before, after in pairwise(states))
        final = [state["status"] for state in told if state["status"] not in ("queued", "deploying")]
        # Live, while it is tidied up after, and then retired, once more when its image goes; or one of the others.
        assert list(dict.fromkeys(final)) in ([final[0]], ["live", "retired"]), final
        assert final == sorted(final), final
        stored = await place.pool.fetch(
            "SELECT position, length, text FROM deployment_logs WHERE deployment_id = $1 ORDER BY position", row["id"]
        )
        assert [(data["position"], data["length"], data["text"]) for data in logs[row["id"]]] == [
            tuple(piece) for piece in stored
        ]
        position = 0
        for piece in stored:
            assert piece["position"] == position
            position += piece["length"]
            assert SECRET not in piece["text"]


async def _nothing_left(place: Place, settings: DeploySettings) -> None:
    async with place.pool.acquire() as connection:
        await directories.remove_leftovers(connection, settings.directory)
    assert list(settings.directory.iterdir()) == []
    assert await asyncio.to_thread(_processes, str(settings.directory)) == []


def _processes(directory: str) -> list[int]:
    """Those that work on what is in the directory."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARKER, "").startswith(directory):
                found.append(process.pid)
    return found
