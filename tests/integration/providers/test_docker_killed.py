"""The process that uses a Docker provider is killed with -9, at each of its steps: the next goes on from there."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio

from orchestrator.database import Pool
from orchestrator.docker.engine import Engine
from orchestrator.eventlog.memory import MemoryLog
from orchestrator.logs import LogWriter
from orchestrator.providers.contract import LogLine, State
from orchestrator.providers.docker_containers import SERVICE, Names
from orchestrator.settings import DatabaseSettings
from tests.docker import Owned
from tests.integration.providers.conftest import Heard, git
from tests.integration.providers.docker_sessions import provider_of, shell, spec

ROOT = Path(__file__).parents[3]

# Starts a session, and is killed just before it asks the engine for its change number argv[5], or, for 0, in the middle
# of what it puts into the workspace.
STARTS = """
import asyncio, os, signal, sys
from pathlib import Path
from orchestrator.docker.connection import Connection
from orchestrator.docker.engine import Engine
from orchestrator.providers import docker_filling
from tests.docker import Owned
from tests.integration.providers.docker_sessions import provider_of, shell, spec

left, send, read = int(sys.argv[5]), Connection._send, docker_filling._read_in_threads

async def counted(self, version, method, *rest):
    global left
    left -= method != "GET"
    if left == 0 and method != "GET":
        os.kill(os.getpid(), signal.SIGKILL)
    return await send(self, version, method, *rest)

async def cut(parts):
    async for part in read(parts):
        yield part
        os.kill(os.getpid(), signal.SIGKILL)

if left:
    Connection._send = counted
else:
    docker_filling._read_in_threads = cut

async def report(reason, message):
    pass

async def main():
    engine = Engine()
    provider = provider_of(Owned(engine, sys.argv[1]), Path(sys.argv[2]), lambda line: None)
    await provider.start(spec({"preview": shell(sys.argv[3])}, repo_url=sys.argv[4]), report)

asyncio.run(main())
"""


def seeded() -> random.Random:
    seed = int(os.environ.get("SEED", random.randrange(2**32)))
    print(f"SEED={seed}")
    return random.Random(seed)


async def python(program: str, *arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, *arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.random
@pytest.mark.timeout(180)
async def test_whatever_a_killed_start_has_left_the_next_one_makes_it_whole(
    engine: Engine, owned: Owned, busybox: str, heard: Heard, git_url: str, repositories: Path, tmp_path: Path
) -> None:
    # More than is sent at once.
    (repositories / "project/large").write_bytes(random.randbytes(1 << 20))
    git("add", ".", cwd=repositories / "project")
    git("commit", "--quiet", "-m", "large", cwd=repositories / "project")
    asked = spec({"preview": shell(busybox)}, repo_url=f"{git_url}/project")
    docker = provider_of(owned, tmp_path / "other", heard.lines.append)
    moment, drawn = 0, seeded()
    try:
        # Each goes on from what the one before has left, and is killed a little later.
        while True:
            process = await python(STARTS, owned.instance, str(tmp_path), busybox, asked.repo_url or "", str(moment))
            _, said = await process.communicate()
            if process.returncode == 0:
                break
            assert process.returncode == -signal.SIGKILL, said.decode()
            assert (await docker.inspect(asked.ref)).state is not State.FAILED
            moment += drawn.randint(2, 5)
        assert (await docker.inspect(asked.ref)).state is State.RUNNING
        check = "cd /workspace/project && cat index.html && echo && wc -c <large && ls -A"
        code, output = await docker.exec(asked.ref, ["sh", "-c", check])
        assert (code, output.decode().split()) == (0, ["version", "2", "1048576", ".git", "index.html", "large"])
        assert len(await engine.containers.list(owned.labels)) == 1
    finally:
        await docker.close()


# Follows the output of all sessions until it is killed.
FOLLOWS = """
import asyncio, sys
from pathlib import Path
from orchestrator.database import open_pool
from orchestrator.docker.engine import Engine
from orchestrator.eventlog.memory import MemoryLog
from orchestrator.following import Following
from orchestrator.logs import LogWriter
from orchestrator.settings import DatabaseSettings
from tests.docker import Owned
from tests.integration.providers.docker_sessions import provider_of

async def main():
    settings = DatabaseSettings(url=sys.argv[3])
    pool = await open_pool(settings, name="follower")
    logs = LogWriter(pool, MemoryLog(), keep=100_000)
    provider = provider_of(Owned(Engine(), sys.argv[1]), Path(sys.argv[2]), logs.sink)
    print("follows", flush=True)
    await asyncio.gather(logs.run(), Following(settings, logs).run(1, "docker", provider))

asyncio.run(main())
"""
LINES = 1000


@pytest_asyncio.fixture
async def session_id(pool: Pool) -> int:
    """Of a row that lines can be stored for."""
    async with pool.acquire() as connection:
        workspace = await connection.fetchval("INSERT INTO workspaces (name) VALUES ('w') RETURNING id")
        project = await connection.fetchrow(
            "INSERT INTO projects (workspace_id, name) VALUES ($1, 'p') RETURNING id, uuid", workspace
        )
        provider = await connection.fetchval("INSERT INTO providers (name, kind) VALUES ('d', 'docker') RETURNING id")
        number: int = await connection.fetchval(
            """INSERT INTO sessions (project_id, project_uuid, workspace_id, provider_id, provider, machine_config,
                                     machine, namespace, container_name, status, expires_at)
               VALUES ($1, $2, $3, $4, 'd', 'small', '{}', 'n', 'c', 'running', now()) RETURNING id""",
            project["id"], project["uuid"], workspace, provider,
        )  # fmt: skip
    return number


async def test_lines_that_are_not_stored_when_the_lead_is_lost_are_stored_once(
    owned: Owned, busybox: str, tmp_path: Path, pool: Pool, session_id: int
) -> None:
    logs = LogWriter(pool, MemoryLog(), keep=1000)
    docker = provider_of(owned, tmp_path, logs.sink)
    ref = spec({}, session_id=session_id).ref
    marks = {**Names(owned.instance).of_project(ref), **Names(owned.instance).of_session(ref), SERVICE: "preview"}
    command = ["sh", "-c", "echo one; echo two; sleep 1000"]
    container = await owned.engine.containers.create("", {"Image": busybox, "Cmd": command, "Labels": marks})
    await owned.engine.containers.start(container)
    logs.sink(LogLine(session_id, "session", "system", "ours"))
    try:
        for _ in range(2):
            # The database is slow, and the lead goes to somebody else, who is us.
            following = asyncio.create_task(docker.follow(logs))
            async with asyncio.timeout(30):
                while logs.waiting < 3:
                    await asyncio.sleep(0.01)
            following.cancel()
            await asyncio.wait({following})
            assert logs.waiting == 1
        following = asyncio.create_task(docker.follow(logs))
        async with asyncio.timeout(30):
            while logs.waiting < 3:
                await asyncio.sleep(0.01)
        await logs.flush(30)
        following.cancel()
        await asyncio.wait({following})
        async with pool.acquire() as connection:
            rows = await connection.fetch("SELECT line FROM session_logs ORDER BY id")
        assert [row["line"] for row in rows] == ["ours", "one", "two"]
    finally:
        await docker.close()


@asynccontextmanager
async def follower(owned: Owned, directory: Path, settings: DatabaseSettings) -> AsyncIterator[None]:
    process = await python(FOLLOWS, owned.instance, str(directory), settings.url)
    assert process.stdout is not None
    try:
        async with asyncio.timeout(30):
            assert await process.stdout.readline() == b"follows\n"
        yield
    finally:
        process.kill()
        await process.communicate()


@pytest.mark.random
@pytest.mark.timeout(180)
async def test_each_line_is_stored_once_and_in_order_whoever_is_killed_while_following(
    owned: Owned,
    busybox: str,
    heard: Heard,
    tmp_path: Path,
    pool: Pool,
    database_settings: DatabaseSettings,
    session_id: int,
) -> None:
    drawn = seeded()
    # Crashes in the middle of it: the same container goes on with another run.
    prints = f"""
        trap 'exit 0' TERM
        [ -e /workspace/begun ] && i={LINES // 2} end={LINES} || i=0 end={LINES // 2}
        touch /workspace/begun
        while [ $i -lt $end ]; do echo "out $i"; echo "err $i" >&2; i=$((i+1)); [ $((i % 20)) = 0 ] && sleep 0.01; done
        [ $i = {LINES} ] || exit 1
        httpd -f -p $PORT & wait"""
    asked = spec({"preview": shell(busybox, prints)}, session_id=session_id)
    docker = provider_of(owned, tmp_path, heard.lines.append, ready_deadline=60)

    async def stored() -> list[tuple[str, str]]:
        async with pool.acquire() as connection:
            rows = await connection.fetch("SELECT stream, line FROM session_logs ORDER BY id")
        return [(row["stream"], row["line"]) for row in rows if row["stream"] != "system"]

    try:
        starting = asyncio.create_task(docker.start(asked, heard.report))
        for _ in range(2):
            async with follower(owned, tmp_path, database_settings):
                before, enough = len(await stored()), drawn.randrange(1, LINES // 4)
                async with asyncio.timeout(60):
                    while len(await stored()) < min(before + enough, 2 * LINES):
                        await asyncio.sleep(0.02)
        async with follower(owned, tmp_path, database_settings), asyncio.timeout(90):
            await starting
            while len(await stored()) < 2 * LINES:
                await asyncio.sleep(0.1)
        lines = await stored()
        for stream, name in (("stdout", "out"), ("stderr", "err")):
            assert [line for where, line in lines if where == stream] == [f"{name} {n}" for n in range(LINES)]
    finally:
        await docker.close()
