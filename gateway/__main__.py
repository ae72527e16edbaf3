"""`python -m gateway`: one replica of the gateway, which reads the event log that all replicas share.

With `--workers N`, N of them on one port, and a process that looks after them (`gateway.supervisor`).
"""

from __future__ import annotations

import argparse
import socket
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import structlog

from auth.settings import TokenSettings
from gateway import app as gateway
from gateway import siblings, supervisor, waiting
from gateway.ratelimit import Limits
from gateway.settings import GatewaySettings, RealtimeSettings
from gateway.siblings import SIBLINGS, Siblings
from gateway.supervisor import Worker
from gateway.token_settings import token_settings
from orchestrator import process
from orchestrator.deployments.secrets import Keyring
from orchestrator.eventlog.rabbitmq import RabbitLog
from orchestrator.process import Signals
from orchestrator.settings import AmqpSettings, DatabaseSettings, load

if TYPE_CHECKING:
    from environs import Env

log = structlog.get_logger("gateway")


@dataclass(frozen=True, slots=True)
class Settings:
    """All that a replica needs, read and checked before anything is touched."""

    gateway: GatewaySettings
    tokens: TokenSettings
    database: DatabaseSettings
    amqp: AmqpSettings

    @classmethod
    def read(cls, env: Env) -> Settings:
        """Raises SettingsError."""
        edge = load(GatewaySettings, env, realtime=load(RealtimeSettings, env))
        # Rates are parsed by who counts, keys by who encrypts.
        Limits(edge)
        Keyring(edge.secrets_key)
        return cls(edge, token_settings(env), load(DatabaseSettings, env), load(AmqpSettings, env))


def main(arguments: Sequence[str] = ()) -> int:
    """Serve until a signal; the exit code, as `orchestrator.process` says."""
    parser = argparse.ArgumentParser(prog="gateway", description="One replica of the gateway.")
    parser.add_argument("--workers", type=_count, default=1, metavar="N", help="processes on the port (default 1)")
    # What a supervisor says to its workers.
    parser.add_argument("--worker", type=Worker.parse, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.worker:
        given.worker.begin()
    if given.workers > 1:
        return process.run("gateway", partial(_supervise, count=given.workers))
    return process.run("gateway", partial(_serve, worker=given.worker))


async def _supervise(env: Env, signals: Signals, *, count: int) -> int:
    return await supervisor.supervise(Settings.read(env).gateway, signals, count=count)


async def _serve(env: Env, signals: Signals, *, worker: Worker | None) -> int:
    settings = Settings.read(env)
    name = f"cluster-code gateway {socket.gethostname()}" + (f" worker {worker.number}" if worker else "")
    async with AsyncExitStack() as stack:
        # Of workers, the supervisor speaks at the port.
        async with nullcontext() if worker else waiting.answering(settings.gateway):
            pool = await stack.enter_async_context(process.pool(settings.database, name=name))
            events = await process.patiently("event log", lambda: RabbitLog.open(settings.amqp, name=name))
            stack.push_async_callback(events.close)
        app = gateway.build(settings.gateway, settings.tokens, pool, events, settings.database)
        if worker:
            app[SIBLINGS] = Siblings(worker.folder)
        port = await stack.enter_async_context(gateway.listening(app, settings.gateway, reuse_port=bool(worker)))
        if worker:
            await stack.enter_async_context(siblings.joined(app, worker.folder, worker.number))
        log.info("gateway listens", host=settings.gateway.host, port=port)
        await process.until_stopped(signals, gateway.until_failure(app))
    log.info("gateway ended")
    return 0


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of processes")
    return int(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
