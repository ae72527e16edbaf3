"""What all tests share: real services, a part of them for each test, and an eye on what a test leaves behind."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Generator, Iterator
from contextlib import asynccontextmanager, suppress
from itertools import count
from pathlib import Path
from typing import NoReturn

import asyncpg
import pytest
import pytest_asyncio
import structlog

import migrations
from orchestrator.database import Pool, open_pool
from orchestrator.docker.engine import Engine
from orchestrator.settings import DatabaseSettings
from scripts.embedded import EmbeddedPostgres
from tests import docker, rabbitmq

# Tests need speed, not the survival of a power cut.
_FAST = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off", "max_connections": "100"}

_numbers = count(1)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def postgres() -> AsyncIterator[EmbeddedPostgres]:
    """A server with the database `template`, migrated. One for the whole run."""
    with tempfile.TemporaryDirectory(prefix="cluster-code-tests-") as folder:
        server = EmbeddedPostgres(Path(folder), options=_FAST)
        try:
            await server.start()
            url = await server.create_database("template")
            await asyncio.to_thread(migrations.apply, url)
            yield server
        finally:
            await server.stop()


@pytest_asyncio.fixture
async def database_url(postgres: EmbeddedPostgres) -> AsyncIterator[str]:
    """The URL of a migrated, empty database that only this test has."""
    name = f"test_{os.getpid()}_{next(_numbers)}"
    yield await postgres.create_database(name, template="template")
    connection = await asyncpg.connect(postgres.url())
    try:
        await connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
    finally:
        await connection.close()


@pytest.fixture
def database_settings(database_url: str) -> DatabaseSettings:
    """The test's database, as the processes get it."""
    return DatabaseSettings(url=database_url)


@pytest_asyncio.fixture
async def pool(database_settings: DatabaseSettings) -> AsyncIterator[Pool]:
    """A pool on the test's database."""
    pool = await open_pool(database_settings, name="test")
    yield pool
    await pool.close()


@pytest_asyncio.fixture
async def connection(pool: Pool) -> AsyncIterator[asyncpg.Connection]:
    """A connection to the test's database."""
    async with pool.acquire() as connection:
        yield connection


@pytest.fixture(autouse=True)
def _log_setup() -> Iterator[None]:
    """A command that runs inside a test sets up the logging of its process, which is that of the next test, too."""
    yield
    structlog.reset_defaults()


@asynccontextmanager
async def no_task_left() -> AsyncIterator[None]:
    """Fail when the body leaves a task behind that was not there before."""
    before = asyncio.all_tasks()
    yield
    # A fixture's end may run in another task than its beginning.
    if current := asyncio.current_task():
        before.add(current)
    async with asyncio.timeout(2):
        while any(not task.done() for task in asyncio.all_tasks() - before):
            await asyncio.sleep(0.01)


def pytest_configure(config: pytest.Config) -> None:
    """Name the place of the run's RabbitMQ, before there are workers."""
    if not hasattr(config, "workerinput"):
        rabbitmq.begin_run()


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the run's RabbitMQ, whatever became of the workers."""
    if not hasattr(config, "workerinput"):
        rabbitmq.end_run()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Have RabbitMQ boot beside the first tests, when one of those selected wants it."""
    waiting = [item for item in session.items if "rabbitmq_server" in getattr(item, "fixturenames", ())]
    booting = [item for item in session.items if "_own_broker" in getattr(item, "fixturenames", ())]
    for item in (*waiting, *booting):
        # Any of them may have to wait for a boot, which takes long on a busy machine.
        if not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(rabbitmq.BOOT_DEADLINE + 60))
    if waiting and not session.config.option.collectonly:
        # The tests themselves say that there is none.
        with suppress(rabbitmq.NoBroker):
            rabbitmq.want()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Tell in one line, and not in one for each test, that there is no RabbitMQ."""
    report = yield
    if report.skipped and isinstance(report.longrepr, tuple) and rabbitmq.HOW_TO_GET_ONE in report.longrepr[2]:
        report.longrepr = (__file__, no_broker.__code__.co_firstlineno, report.longrepr[2])
    return report


def no_broker(error: rabbitmq.NoBroker) -> NoReturn:
    """Skip the test; fail it where everything must be there."""
    if os.environ.get("CI"):
        pytest.fail(str(error), pytrace=False)
    pytest.skip(str(error))


@pytest_asyncio.fixture
async def rabbitmq_server() -> rabbitmq.Server:
    """The RabbitMQ that all tests of the run share: each works in a virtual host of its own."""
    try:
        return await rabbitmq.shared()
    except rabbitmq.NoBroker as error:
        no_broker(error)


@pytest_asyncio.fixture
async def vhost(rabbitmq_server: rabbitmq.Server) -> AsyncIterator[str]:
    """The name of an empty virtual host that only this test has."""
    name = f"test-{os.getpid()}-{next(_numbers)}"
    await rabbitmq_server.add_vhost(name)
    yield name
    await rabbitmq_server.delete_vhost(name)


@pytest.fixture
def amqp_url(rabbitmq_server: rabbitmq.Server, vhost: str) -> str:
    """The URL of the test's own virtual host."""
    return rabbitmq_server.amqp_url(vhost)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def _own_broker() -> AsyncIterator[rabbitmq.Broker]:
    try:
        broker = rabbitmq.Broker()
    except rabbitmq.NoBroker as error:
        no_broker(error)
    yield broker
    await broker.stop()


@pytest_asyncio.fixture
async def broker(_own_broker: rabbitmq.Broker) -> rabbitmq.Broker:
    """A running RabbitMQ that the test may kill, freeze and start again; in a later test it runs once more."""
    if not _own_broker.running:
        await _own_broker.start()
    return _own_broker


def no_docker(error: docker.NoDocker) -> NoReturn:
    """Skip the test; fail it where everything must be there."""
    if os.environ.get("CI"):
        pytest.fail(str(error), pytrace=False)
    pytest.skip(str(error))


@pytest_asyncio.fixture
async def engine() -> AsyncIterator[Engine]:
    """The Docker engine that all tests share, and other things, too."""
    try:
        engine = await docker.find()
    except docker.NoDocker as error:
        no_docker(error)
    yield engine
    await engine.close()


@pytest_asyncio.fixture
async def owned(engine: Engine) -> AsyncIterator[docker.Owned]:
    """The mark of what this test makes at the engine; what has it goes with the test."""
    owned = docker.Owned(engine, f"test-{os.getpid()}-{next(_numbers)}")
    yield owned
    await owned.remove()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def busybox() -> AsyncIterator[str]:
    """The name of an image with a shell, `httpd` and `nc`, at the engine that all tests share."""
    try:
        engine = await docker.find()
        async with engine:
            name = await docker.make_busybox(engine, f"cluster-code-tests-busybox:{os.getpid()}")
            yield name
            await engine.images.remove(name, force=True)
    except docker.NoDocker as error:
        no_docker(error)


@pytest_asyncio.fixture
async def dockerd() -> AsyncIterator[docker.Daemon]:
    """A Docker engine of this test's own, in a network of its own, to be killed and frozen."""
    try:
        daemon = docker.Daemon()
    except docker.NoDocker as error:
        no_docker(error)
    async with daemon:
        yield daemon
