"""The embedded PostgreSQL: what it survives, and what it leaves behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path

import asyncpg
import psutil
import pytest
import pytest_asyncio

from orchestrator.errors import SettingsError
from scripts.embedded import EmbeddedPostgres, embedded_postgres

# Survives a kill, not a power cut.
_FAST = {"fsync": "off"}
_NOBODY = 65534

# Runs a server until its input ends; everything is imported before the privileges are dropped, since the interpreter
# may lie where only root can read.
_CHILD = """
import asyncio, getpass, os, sys, asyncpg, structlog, uvloop
from pathlib import Path
from scripts.embedded import embedded_postgres
uvloop.new_event_loop().close()
structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
if sys.argv[2:]:
    os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))
async def main():
    async with embedded_postgres(Path(sys.argv[1]), options={"fsync": "off"}) as server:
        connection = await asyncpg.connect(server.url())
        print(await connection.fetchval("SELECT 41 + 1"), server.pid, flush=True)
        await connection.close()
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
uvloop.run(main())
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory with a short name that every user can reach."""
    with tempfile.TemporaryDirectory(prefix="cc-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest_asyncio.fixture
async def server(folder: Path) -> AsyncIterator[EmbeddedPostgres]:
    async with embedded_postgres(folder, options=_FAST) as server:
        yield server


async def fetch(server: EmbeddedPostgres, query: str) -> object:
    connection = await asyncpg.connect(server.url())
    try:
        return await connection.fetchval(query)
    finally:
        await connection.close()


def child(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(folder), *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3],
    )  # fmt: skip


def gone(pid: int) -> bool:
    try:
        process = psutil.Process(pid)
        process.wait(20)
    except psutil.NoSuchProcess:
        return True
    except psutil.TimeoutExpired:
        return False
    return True


async def test_stopped_and_started_again_it_has_its_data(server: EmbeddedPostgres) -> None:
    await fetch(server, "CREATE TABLE kept AS SELECT 7 AS value")
    before = server.pid
    await server.stop()
    assert server.pid is None
    await server.stop()
    await server.start()
    assert server.pid != before
    assert await fetch(server, "SELECT value FROM kept") == 7


async def test_a_database_is_made_once(server: EmbeddedPostgres) -> None:
    assert await server.create_database("one") == await server.create_database("one") == server.url("one")


async def test_only_its_own_user_can_enter_the_socket_directory(server: EmbeddedPostgres) -> None:
    assert (server.directory / "run").stat().st_mode & 0o077 == 0
    assert (server.directory / "postgres").stat().st_mode & 0o077 == 0


async def test_a_server_that_was_left_behind_is_ended(server: EmbeddedPostgres) -> None:
    async with embedded_postgres(server.directory, options=_FAST) as second:
        assert await fetch(second, "SELECT 1") == 1
        assert server.pid is None or gone(server.pid)


def test_it_dies_with_a_process_that_is_killed_and_starts_again(folder: Path) -> None:
    for _ in range(2):
        with child(folder) as process:
            answer, pid = process.stdout.readline().split()
            assert answer == "42"
            process.kill()
            process.wait(20)
            assert gone(int(pid))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user: run the tests as root")
def test_it_runs_as_an_ordinary_user_and_root_can_go_on_with_its_data(folder: Path) -> None:
    os.chown(folder, _NOBODY, _NOBODY)
    for user in ([str(_NOBODY)], []):
        with child(folder, *user) as process:
            answer, pid = process.stdout.readline().split()
            assert answer == "42"
            assert psutil.Process(int(pid)).uids().real == _NOBODY
            process.stdin.close()
            assert process.wait(20) == 0
            assert gone(int(pid))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user: run the tests as root")
async def test_root_runs_it_as_a_system_user(server: EmbeddedPostgres) -> None:
    assert psutil.Process(server.pid).uids().real not in (0, _NOBODY)


async def test_a_half_made_database_is_made_anew(folder: Path) -> None:
    unfinished = folder / "postgres.unfinished"
    unfinished.mkdir()
    (unfinished / "PG_VERSION").write_text("16\n")
    async with embedded_postgres(folder, options=_FAST) as server:
        assert await fetch(server, "SELECT 1") == 1
    assert not unfinished.exists()


async def test_a_start_that_is_cancelled_leaves_nothing_running(folder: Path) -> None:
    server = EmbeddedPostgres(folder, options=_FAST)
    for delay in (0.05, 0.4, 1.0):
        try:
            async with asyncio.timeout(delay):
                await server.start()
        except TimeoutError:
            pass  # As meant; a fast machine may have been done before.
        finally:
            await server.stop()
        left = [one.cmdline() for one in psutil.process_iter() if str(folder) in " ".join(cmdline(one))]
        assert left == []


def cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


async def test_in_a_directory_too_deep_for_a_socket_it_listens_elsewhere(folder: Path) -> None:
    deep = folder / ("d" * 100)
    async with embedded_postgres(deep, options=_FAST) as server:
        assert await fetch(server, "SELECT 1") == 1
        assert EmbeddedPostgres(deep).url() == server.url()
        sockets = Path(server.url().partition("host=")[2])
        assert sockets.parent == Path(tempfile.gettempdir())
    assert not sockets.exists()


async def test_a_socket_directory_of_another_user_is_refused(folder: Path) -> None:
    (folder / "elsewhere").mkdir()
    (folder / "run").symlink_to(folder / "elsewhere")
    server = EmbeddedPostgres(folder, options=_FAST)
    with pytest.raises(SettingsError, match="run belongs to another user"):
        await server.start()
    await server.stop()


async def test_a_directory_that_cannot_be_made_is_one_clear_line(folder: Path) -> None:
    (folder / "file").write_text("")
    with pytest.raises(SettingsError, match=r"^DATA_DIR: cannot keep the database in .*/file/data: Not a directory$"):
        await EmbeddedPostgres(folder / "file" / "data").start()


async def test_a_server_that_does_not_start_says_why(folder: Path) -> None:
    server = EmbeddedPostgres(folder, options={"shared_buffers": "many"})
    with pytest.raises(SettingsError, match=r"does not start: .*FATAL.*shared_buffers"):
        await server.start()
    await server.stop()


async def test_supervised_it_comes_back_after_it_was_killed(server: EmbeddedPostgres) -> None:
    await fetch(server, "CREATE TABLE kept AS SELECT 7 AS value")
    supervisor = asyncio.create_task(server.supervise())
    try:
        for end in (signal.SIGKILL, signal.SIGINT):
            before = server.pid
            os.kill(before, end)
            async with asyncio.timeout(30):
                while server.pid in (None, before) or not await answers(server):
                    assert not supervisor.done()
                    await asyncio.sleep(0.05)
            assert await fetch(server, "SELECT value FROM kept") == 7
    finally:
        supervisor.cancel()
        with suppress(asyncio.CancelledError):
            await supervisor


async def answers(server: EmbeddedPostgres) -> bool:
    try:
        return await fetch(server, "SELECT true") is True
    except (OSError, asyncpg.PostgresError):
        return False
