"""`python -m orchestrator`: a worker process, which shares the event log with gateways in other processes.

Any number of them may work on one database and one RabbitMQ.
"""

from __future__ import annotations

import socket
import sys
from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING

from orchestrator import process
from orchestrator.eventlog.rabbitmq import RabbitLog
from orchestrator.probes import Probes
from orchestrator.process import Signals
from orchestrator.providers.registry import open_provider
from orchestrator.run import Orchestrator
from orchestrator.settings import (
    AmqpSettings,
    DatabaseSettings,
    DeploySettings,
    OrchestratorSettings,
    ProbeSettings,
    RepositorySettings,
    load,
)

if TYPE_CHECKING:
    from environs import Env


def main() -> int:
    """Work until a signal; the exit code, as `orchestrator.process` says."""
    return process.run("orchestrator", _work)


async def _work(env: Env, signals: Signals) -> int:
    settings = load(OrchestratorSettings, env)
    amqp, database = load(AmqpSettings, env), load(DatabaseSettings, env)
    deploy, schemes = load(DeploySettings, env), load(RepositorySettings, env).schemes
    name = f"cluster-code orchestrator {socket.gethostname()}"
    probes = Probes(load(ProbeSettings, env))
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(probes.listening())
        pool = probes.pool = await stack.enter_async_context(process.pool(database, name=name))
        events = probes.log = await process.patiently("event log", lambda: RabbitLog.open(amqp, name=name))
        stack.push_async_callback(events.close)
        orchestrator = probes.orchestrator = Orchestrator(
            settings=settings,
            database_settings=database,
            pool=pool,
            log=events,
            exchange=events,
            deploy=deploy,
            open_provider=partial(open_provider, repo_schemes=schemes),
        )
        task = await stack.enter_async_context(process.running(orchestrator.run(), "orchestrator"))
        await process.until_stopped(signals, task)
    return 0


if __name__ == "__main__":
    sys.exit(main())
