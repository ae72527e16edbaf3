"""The part of an orchestrator that deploys apps: its engine, its worker, and what is looked after beside it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from orchestrator.database import Pool, Wakeup, backoff, leadership
from orchestrator.deployments import directories, leases, queue, release
from orchestrator.deployments.engine_work import EngineWork
from orchestrator.deployments.secrets import Keyring
from orchestrator.deployments.sweep import sweep
from orchestrator.deployments.worker import Worker
from orchestrator.docker.engine import Engine
from orchestrator.errors import EngineRefused, ProviderUnavailable
from orchestrator.settings import DatabaseSettings, DeploySettings

log = structlog.get_logger("deployments")

# The advisory lock of the one that sweeps.
LEADER_KEY = 0x737765657073
# Seconds between two sweeps, and between two looks for directories of killed workers.
SWEEP_INTERVAL = 60.0


class Deployer:
    """Run each of `roots` in a task, again and again; `drain`, end the tasks, `close`. `wakeup` is NOTIFY's."""

    def __init__(self, settings: DeploySettings, database_settings: DatabaseSettings, pool: Pool) -> None:
        """Raises SettingsError for wrong keys."""
        self.wakeup = Wakeup()
        self._settings = settings
        self._database_settings = database_settings
        self._pool = pool
        self._keys = Keyring(settings.secrets_key)
        self._engine = Engine(settings.docker_host)
        self.worker = Worker(settings, pool, self.wakeup, EngineWork(self._engine, settings))

    def roots(self) -> dict[str, Callable[[], Awaitable[None]]]:
        """One iteration of each of its loops, by name. They raise what is in `UNAVAILABLE`."""
        return {
            "deployments": self.worker.iterate,
            "docker engine": self.worker.look_at_engine,
            "sweep": self._lead,
            "deployment directories": self._look_for_directories,
        }

    async def take_over(self) -> int:
        """End the leases of killed workers, where this is the only one; how many there were."""
        async with self._pool.acquire() as connection:
            return await leases.void(connection)

    async def close(self) -> None:
        """Close the engine's connections."""
        await self._engine.close()

    async def _lead(self) -> None:
        """As the leader: have the engine agree with the database, at once and then regularly."""
        failures = 0
        async with leadership(self._database_settings, LEADER_KEY) as connection:
            while True:
                await queue.forget_deliveries(connection)
                try:
                    await release.ensure_network(self._engine, self._settings)
                    await sweep(self._engine, self._pool, self._keys, self._settings)
                    failures = 0
                except (ProviderUnavailable, EngineRefused) as error:
                    failures += 1
                    log.warning("not swept", error=str(error), failures=failures)
                await asyncio.sleep(backoff(failures, base=1.0, cap=SWEEP_INTERVAL) if failures else SWEEP_INTERVAL)

    async def _look_for_directories(self) -> None:
        async with self._pool.acquire() as connection:
            if count := await directories.remove_leftovers(connection, self._settings.directory):
                log.info("removed what killed workers left", directories=count)
        await asyncio.sleep(SWEEP_INTERVAL)
