"""`cluster-code dev`: gateway, orchestrator, event log and database in one process, for a newcomer and for one machine.

    DATA_DIR held -> database up -> schema current -> first start's rows -> orchestrator -> listening -> announced

The end goes the same way back. The first signal lets sockets and requests go within SHUTDOWN_GRACE, then ends the
sessions' processes, then the database; each further signal cuts the step short that is being waited for.
"""

from __future__ import annotations

import asyncio
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import click
import structlog
import uvloop

import migrations
from auth import accounts, passwords
from auth.errors import Taken
from gateway import app as gateway
from gateway.api.health import ENGINE
from gateway.metrics import METRICS
from gateway.ratelimit import Limits
from gateway.settings import GatewaySettings, RealtimeSettings
from gateway.token_settings import token_settings
from orchestrator import log_setup, machine_import
from orchestrator.database import Pool, open_pool, require_schema
from orchestrator.deployments.secrets import Keyring
from orchestrator.errors import SettingsError
from orchestrator.eventlog.contract import EventLog
from orchestrator.eventlog.memory import MemoryLog
from orchestrator.process import Signals, close_pool, running, until_stopped
from orchestrator.providers.registry import open_provider
from orchestrator.run import Orchestrator
from orchestrator.settings import AmqpSettings, DatabaseSettings, DeploySettings, OrchestratorSettings, load
from scripts import cluster, engine, examples, users
from scripts.embedded import EmbeddedPostgres
from scripts.instance import Instance
from scripts.settings import DevSettings
from scripts.target import DATABASE

if TYPE_CHECKING:
    from environs import Env

    from orchestrator.eventlog.rabbitmq import RabbitLog

log = structlog.get_logger("dev")

# Seconds that the cluster gets to say which images its nodes hold, before the server is said to be ready without; one
# that refuses is not waited for.
_FIT_DEADLINE = 15.0


@dataclass(frozen=True, slots=True)
class Settings:
    """All that can be set, read and checked before anything is touched."""

    gateway: GatewaySettings
    orchestrator: OrchestratorSettings
    deploy: DeploySettings
    dev: DevSettings
    # None: the embedded one.
    database: DatabaseSettings | None
    # None: the log is kept in memory.
    amqp: AmqpSettings | None

    @classmethod
    def read(cls, env: Env) -> Settings:
        """Raises SettingsError."""
        edge = load(GatewaySettings, env, realtime=load(RealtimeSettings, env))
        # Rates are parsed by who counts, keys by who encrypts.
        Limits(edge)
        Keyring(edge.secrets_key)
        return cls(
            gateway=edge,
            orchestrator=load(OrchestratorSettings, env),
            deploy=load(DeploySettings, env),
            dev=load(DevSettings, env),
            database=load(DatabaseSettings, env) if env.str("DATABASE_URL", "") else None,
            amqp=load(AmqpSettings, env) if env.str("AMQP_URL", "") else None,
        )


def main(env: Env) -> None:
    """Run until a signal. Raises SettingsError, and SystemExit(130) when it was interrupted before it was ready."""
    log_setup.configure(env)
    settings = Settings.read(env)
    try:
        uvloop.run(_main(env, settings))
    except asyncio.CancelledError:
        sys.exit(130)


async def _main(env: Env, settings: Settings) -> None:
    started = time.monotonic()
    signals = Signals.taken()
    async with AsyncExitStack() as stack:
        instance = Instance(settings.orchestrator.data_dir)
        stack.enter_context(instance.hold("cluster-code dev"))
        tokens = token_settings(env, secret=instance.jwt_secret())
        edge = replace(settings.gateway, secrets_key=settings.gateway.secrets_key or [instance.secrets_key()])
        _require_free(settings.gateway)
        parts: list[Awaitable[Any]] = []
        database = settings.database or load(
            DatabaseSettings, env, url=await stack.enter_async_context(_embedded(instance, parts))
        )
        pool = await open_pool(database, name="cluster-code dev")
        stack.push_async_callback(close_pool, pool)
        await _current_schema(pool, database)
        await _first_start(pool, settings.dev, settings.deploy.docker_host)
        exchange = await _exchange(settings.amqp)
        events: EventLog = exchange or MemoryLog()
        stack.push_async_callback(events.close)
        orchestrator = Orchestrator(
            settings=settings.orchestrator,
            database_settings=database,
            pool=pool,
            log=events,
            exchange=exchange,
            deploy=_deploy_settings(env, settings.deploy, instance, edge.secrets_key),
            open_provider=partial(open_provider, repo_schemes=settings.gateway.repo_schemes),
            alone=settings.database is None,
        )
        parts.append(await stack.enter_async_context(running(orchestrator.run(), "orchestrator")))
        if cluster.configured():
            await stack.enter_async_context(_fitted(pool, settings.dev))
        app = gateway.build(edge, tokens, pool, events, database)
        app[METRICS].include(orchestrator.metrics)
        if (deployer := orchestrator.deployer) is not None:
            app[ENGINE] = lambda: deployer.worker.trouble
        port = await stack.enter_async_context(gateway.listening(app, settings.gateway))
        url = f"http://{_shown(settings.gateway.host)}:{port}"
        stack.enter_context(instance.announce(url, None if settings.database else database.url))
        click.echo(f"Ready: {url} (in {time.monotonic() - started:.1f} s). Ctrl-C ends it.")
        await until_stopped(signals, *parts, gateway.until_failure(app))


def _deploy_settings(env: Env, settings: DeploySettings, instance: Instance, keys: list[str]) -> DeploySettings:
    """As they are set; what is not is this data directory's own, since others may use the same engine."""
    if not env.str("DEPLOY_DIR", ""):
        settings = replace(settings, directory=instance.directory / "deployments")
    if not env.str("DEPLOY_INSTANCE", ""):
        settings = replace(settings, instance=instance.name)
    return replace(settings, secrets_key=keys)


@asynccontextmanager
async def _fitted(pool: Pool, settings: DevSettings) -> AsyncIterator[None]:
    """Let what the demonstration runs on the cluster suit it, as soon as that can be found out."""
    asked = asyncio.Event()
    fitting = cluster.fit_image(pool, settings.kubernetes_demo_image, asked)
    async with running(fitting, "image of the demonstration") as task:
        task.add_done_callback(partial(_fitting_ended, asked))
        try:
            async with asyncio.timeout(_FIT_DEADLINE):
                await asked.wait()
        except TimeoutError:
            log.info("the cluster takes long to answer", seconds=_FIT_DEADLINE)
        yield


def _fitting_ended(asked: asyncio.Event, task: asyncio.Task[None]) -> None:
    asked.set()
    if not task.cancelled() and (error := task.exception()):
        log.error("task failed", task=task.get_name(), exc_info=error)


@asynccontextmanager
async def _embedded(instance: Instance, parts: list[Awaitable[Any]]) -> AsyncIterator[str]:
    """The embedded database, started again whenever it ends by itself; yields its URL."""
    server = EmbeddedPostgres(instance.directory)
    try:
        await server.start()
        url = await server.create_database(DATABASE)
        async with running(server.supervise(), "database supervisor") as task:
            parts.append(task)
            yield url
    finally:
        await server.stop()


async def _exchange(settings: AmqpSettings | None) -> RabbitLog | None:
    """RabbitMQ, when there is one: it keeps the log, so that other processes and services share it."""
    if settings is None:
        return None
    from orchestrator.eventlog.rabbitmq import RabbitLog

    return await RabbitLog.open(settings, name="cluster-code dev")


async def _current_schema(pool: Pool, database: DatabaseSettings) -> None:
    async with pool.acquire() as connection:
        missing = await migrations.pending(connection)
    if missing:
        applied = await asyncio.to_thread(migrations.apply, database.url)
        log.info("schema brought up to date", applied=applied)
    await require_schema(pool)


async def _first_start(pool: Pool, settings: DevSettings, docker_host: str) -> None:
    """Import the examples while there is no provider, and make an administrator while there is none.

    Where there is a way to a cluster, or to a Docker engine, its provider is imported beside them, also later.

    Its password is printed before it is committed: there is never one that nobody was told.
    """
    async with pool.acquire() as connection:
        if not await connection.fetchval("SELECT EXISTS (SELECT FROM providers)"):
            for name in ("providers.yaml", "machine-configs.yaml"):
                await machine_import.apply(connection, examples.read(name))
                log.info("imported", file=f"configs/{name}")
        if cluster.configured():
            await cluster.import_provider(connection, settings.kubernetes_demo_image)
        await engine.import_providers(connection, docker_host, settings.docker_demo_image)
        if await connection.fetchval("SELECT EXISTS (SELECT FROM users WHERE is_admin AND NOT is_disabled)"):
            return
    password = settings.admin_password or users.generate_password()
    password_hash = await passwords.hash(password)
    async with pool.acquire() as connection, connection.transaction():
        try:
            await accounts.register(connection, settings.admin_email, password_hash, "Administrator", is_admin=True)
        except Taken as error:
            raise SettingsError(f"ADMIN_EMAIL: {error} It is no administrator: name another address.") from error
        _print_admin(settings.admin_email, None if settings.admin_password else password)


def _print_admin(email: str, password: str | None) -> None:
    lines = [f"A first administrator was made: {email}"]
    if password:
        lines += [f"Password: {password}", "It is shown this once. Change it by PUT /api/v1/users/me."]
    lines.append("Sign in: POST /api/v1/auth/login")
    width = max(map(len, lines))
    click.echo(f"┌{'─' * (width + 2)}┐")
    for line in lines:
        click.echo(f"│ {line:{width}} │")
    click.echo(f"└{'─' * (width + 2)}┘")


def _require_free(settings: GatewaySettings) -> None:
    """Raise SettingsError at once, and not after the database has started, when the port is taken."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            where = f"{settings.host}:{settings.port}"
            raise SettingsError(
                f"PORT: cannot listen on {where}: {error.strerror}. Set another PORT or HOST"
            ) from error


def _shown(host: str) -> str:
    """A host that a browser on this machine can open."""
    if host in ("0.0.0.0", "::", ""):  # noqa: S104  Compared, not bound.
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host
