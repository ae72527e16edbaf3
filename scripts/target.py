"""Which database an admin command works on.

`DATABASE_URL`, when it is set. Else the embedded one of DATA_DIR: through the `cluster-code dev` that runs it, or, when
none does, started for as long as the command takes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from orchestrator.errors import SettingsError, Unavailable
from orchestrator.settings import DatabaseSettings, OrchestratorSettings, load
from scripts.instance import Instance, InUse

if TYPE_CHECKING:
    from environs import Env

    from orchestrator.database import Connection

# Seconds that a server may take to start, or a command before us to end.
_PATIENCE = 20.0
DATABASE = "clustercode"


def instance(env: Env) -> Instance:
    """The data directory that the settings name."""
    return Instance(load(OrchestratorSettings, env).data_dir)


@asynccontextmanager
async def database(env: Env) -> AsyncIterator[DatabaseSettings]:
    """The database to work on, for as long as the body takes. Raises SettingsError."""
    if env.str("DATABASE_URL", ""):
        yield load(DatabaseSettings, env)
        return
    async with _embedded(instance(env)) as url:
        yield load(DatabaseSettings, env, url=url)


@asynccontextmanager
async def connection(env: Env) -> AsyncIterator[Connection]:
    """A connection to it, once its schema is known to be current.

    Raises SettingsError; SchemaOutdated, saying what to run; Unavailable when the database goes away meanwhile.
    """
    from orchestrator.database import UNAVAILABLE, open_pool, require_schema

    async with database(env) as settings:
        pool = await open_pool(settings, name="cluster-code admin")
        try:
            await require_schema(pool)
            async with pool.acquire() as connection:
                yield connection
        except UNAVAILABLE as error:
            raise Unavailable(f"the database does not answer ({error or type(error).__name__}); try again") from error
        finally:
            pool.terminate()


@asynccontextmanager
async def _embedded(instance: Instance) -> AsyncIterator[str]:
    from scripts.embedded import embedded_postgres

    deadline = asyncio.get_running_loop().time() + _PATIENCE
    while True:
        running = instance.running()
        if running is not None:
            if running.database_url is None:
                raise SettingsError("DATABASE_URL is not set, but the server that runs on DATA_DIR was given one")
            yield running.database_url
            return
        try:
            with instance.hold("an admin command"):
                async with embedded_postgres(instance.directory) as server:
                    yield await server.create_database(DATABASE)
            return
        except InUse:
            if asyncio.get_running_loop().time() > deadline:
                raise
        await asyncio.sleep(0.1)
