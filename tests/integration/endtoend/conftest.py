"""A server of its own for each test, ended with it, and a repository to run."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio

from scripts.demo_repository import Repository, served
from tests.integration.endtoend.server import Client, Server


@pytest.fixture
def data_dir() -> Iterator[Path]:
    """A directory that is not there yet, in one with a short name."""
    with tempfile.TemporaryDirectory(prefix="cc-") as folder:
        yield Path(folder) / "data"


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def started_before() -> AsyncIterator[Path]:
    """The data directory of a server that was started and stopped once: spares each test the making of a database."""
    with tempfile.TemporaryDirectory(prefix="cc-") as folder:
        server = Server(Path(folder) / "data")
        await server.start()
        assert await server.stop() == 0
        # These are for one installation only.
        for name in ("instance", "jwt-secret"):
            (server.data_dir / name).unlink(missing_ok=True)
        yield server.data_dir


@pytest_asyncio.fixture
async def idle(data_dir: Path) -> AsyncIterator[Server]:
    """A server that is not started yet, without any data. However the test ends, nothing of it runs on."""
    server = Server(data_dir)
    yield server
    if server._process is not None and server._process.returncode is None:
        assert await server.stop() == 0
    await server.until_nothing_is_left()


@pytest_asyncio.fixture
async def server(idle: Server, started_before: Path) -> Server:
    """A server that is ready."""
    # Whose files they are matters to PostgreSQL, and `shutil.copytree` forgets it.
    copy = await asyncio.create_subprocess_exec("cp", "--archive", started_before, idle.data_dir)
    assert await copy.wait() == 0
    await idle.start()
    return idle


@pytest_asyncio.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as session:
        yield session


@pytest_asyncio.fixture
async def client(http: aiohttp.ClientSession, server: Server) -> Client:
    """The administrator of `server`, signed in."""
    client = Client(http, server)
    await client.sign_in()
    return client


@pytest_asyncio.fixture
async def repository() -> AsyncIterator[Repository]:
    async with served({"index.html": "<h1>A page of the test</h1>"}) as repository:
        yield repository
