"""Settings: frozen dataclasses that say, under each field, where its value comes from and what it means.

A field made by `variable` is read from the environment (and `.env`) by `load`; the same declaration feeds the table in
the documentation and `.env.example`, so the three cannot drift apart (`tests/unit/test_settings.py`).
"""

from __future__ import annotations

import dataclasses
import hmac
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from environs import Env, EnvError

from orchestrator.errors import SettingsError

_REQUIRED = dataclasses.MISSING
_DOMAIN = re.compile(r"(?=.{1,200}\Z)[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*")
T = TypeVar("T")
# What to say of a value that an environs parser refuses.
_REFUSALS = {"int": "is no whole number", "float": "is no number", "bool": "is neither true nor false"}


@dataclass(frozen=True, slots=True)
class Variable:
    """How one setting is read: its name in the environment, the environs parser (`int`, `list`, …), and its meaning."""

    name: str
    parse: str
    help: str
    secret: bool
    check: Callable[[Any], str | None] | None


def variable(
    name: str,
    parse: str,
    default: Any = _REQUIRED,
    *,
    help: str,  # noqa: A002  It is what the reader of a declaration looks for.
    secret: bool = False,
    check: Callable[[Any], str | None] | None = None,
) -> Any:
    """Declare a setting. `check` returns what is wrong with a value ("must be positive"), or None."""
    metadata = {"variable": Variable(name, parse, help, secret, check)}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def variables(settings: type) -> Iterator[tuple[Variable, Any]]:
    """Each declared variable of a settings class with its default (`dataclasses.MISSING`: required), in order."""
    for declared in dataclasses.fields(settings):
        if "variable" in declared.metadata:
            default = declared.default_factory() if callable(declared.default_factory) else declared.default
            yield declared.metadata["variable"], default


def environment(env_file: Path | None = Path(".env")) -> Env:
    """The environment with what `.env` adds; a variable that is set wins over the file."""
    env = Env()
    if env_file is not None and env_file.is_file():
        env.read_env(str(env_file), recurse=False)
    return env


def load(settings: type[T], env: Env, **overrides: Any) -> T:
    """Read every declared variable. Raises SettingsError, one line that names the variable, on a missing or wrong one.

    A variable set to the empty string counts as unset. `overrides` win over the environment.
    """
    values: dict[str, Any] = dict(overrides)
    for declared in dataclasses.fields(settings):  # type: ignore[arg-type]
        meta: Variable | None = declared.metadata.get("variable")
        if meta is None or declared.name in overrides:
            continue
        if not env.str(meta.name, ""):
            if declared.default is dataclasses.MISSING and declared.default_factory is dataclasses.MISSING:
                raise SettingsError(f"{meta.name} is not set: {meta.help}")
            continue
        try:
            value = getattr(env, meta.parse)(meta.name)
        except EnvError as error:
            given = "the value given" if meta.secret else repr(env.str(meta.name))
            refusal = _REFUSALS.get(meta.parse, f"is no {meta.parse}")
            raise SettingsError(f"{meta.name}: {given} {refusal}. {meta.help}") from error
        if meta.check and (wrong := meta.check(value)):
            raise SettingsError(f"{meta.name} {wrong}. {meta.help}")
        values[declared.name] = value
    return settings(**values)


def positive(value: float) -> str | None:
    """A check for `variable`: greater than zero."""
    return None if value > 0 else f"must be greater than 0, not {value}"


def repo_schemes() -> Any:
    """A field that the edge, which refuses others at once, and whoever clones both have."""
    return variable(
        "REPO_SCHEMES", "list", ["https", "http", "ssh", "git"], help="URL schemes that a repository may have."
    )


def metrics_token() -> Any:
    """A field of whoever serves `/metrics`."""
    return variable(
        "METRICS_TOKEN",
        "str",
        "",
        help="Bearer token that /metrics asks for, and /ready before it says why something is down; empty: none.",
        secret=True,
    )


def may_read_metrics(authorization: str, token: str) -> bool:
    """Whether who sends this `Authorization` knows the METRICS_TOKEN; anybody may when there is none."""
    scheme, _, given = authorization.encode(errors="surrogateescape").partition(b" ")
    return not token or (scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), token.encode()))


@dataclass(frozen=True, slots=True)
class RepositorySettings:
    """What a repository may be."""

    schemes: list[str] = repo_schemes()


@dataclass(frozen=True, slots=True)
class DatabaseSettings:
    """The PostgreSQL that all processes share."""

    url: str = variable(
        "DATABASE_URL", "str", help="The database, as postgresql://user:password@host:port/name.", secret=True
    )
    pool_size: int = variable(
        "DATABASE_POOL_SIZE", "int", 10, help="Connections that one process opens at most.", check=positive
    )
    # Seconds. A request waits no longer for a free connection or for an answer before it is told 503.
    timeout: float = variable(
        "DATABASE_TIMEOUT", "float", 5.0, help="Seconds to wait for a connection or an answer.", check=positive
    )


def _age(value: str) -> str | None:
    return None if re.fullmatch(r"[1-9][0-9]*[YMDhms]", value) else f"must be like 7D, 12h or 30m, not {value!r}"


def _amqp(value: str) -> str | None:
    return None if re.match(r"amqps?://", value) else "must begin with amqp:// or amqps://"


@dataclass(frozen=True, slots=True)
class AmqpSettings:
    """The RabbitMQ whose stream is the event log that all processes share."""

    url: str = variable(
        "AMQP_URL",
        "str",
        help="RabbitMQ, as amqp[s]://user:password@host:port/vhost; several, comma-separated, for a cluster.",
        secret=True,
        check=_amqp,
    )
    # RabbitMQ drops whole segments: some entries are kept longer than this.
    max_age: str = variable(
        "EVENTS_MAX_AGE",
        "str",
        "1D",
        help="How long the log keeps events: a number and Y, M, D, h, m or s.",
        check=_age,
    )
    max_bytes: int = variable(
        "EVENTS_MAX_BYTES", "int", 10 << 30, help="Bytes of events that the log keeps at most.", check=positive
    )
    # Seconds. What RabbitMQ has not confirmed by then is published again.
    timeout: float = variable(
        "AMQP_TIMEOUT", "float", 5.0, help="Seconds that RabbitMQ may take to answer.", check=positive
    )


@dataclass(frozen=True, slots=True)
class OrchestratorSettings:
    """What the orchestrator needs beside the database."""

    data_dir: Path = variable(
        "DATA_DIR", "path", Path("data"), help="Where the embedded database and local sessions keep their files."
    )
    # Sessions worked on at the same time by one process: starts are slow, and mostly wait.
    concurrency: int = variable(
        "ORCHESTRATOR_CONCURRENCY", "int", 8, help="Sessions that one orchestrator works on at once.", check=positive
    )
    # Seconds. A lease outlives three missed heartbeats; after it another orchestrator takes over.
    lease: float = variable(
        "ORCHESTRATOR_LEASE",
        "float",
        30.0,
        help="Seconds until another orchestrator takes over a dead one's work.",
        check=positive,
    )
    # Seconds. NOTIFY is a hint; this poll is the truth.
    poll_interval: float = variable(
        "ORCHESTRATOR_POLL_INTERVAL",
        "float",
        5.0,
        help="Seconds between looks for work that no hint announced.",
        check=positive,
    )
    # Seconds between inspections of what should be running.
    resync_interval: float = variable(
        "ORCHESTRATOR_RESYNC_INTERVAL",
        "float",
        30.0,
        help="Seconds between inspections of running sessions.",
        check=positive,
    )
    start_deadline: float = variable(
        "SESSION_START_DEADLINE", "float", 300.0, help="Seconds that a session may take to start.", check=positive
    )
    log_lines: int = variable(
        "SESSION_LOG_LINES", "int", 5000, help="Output lines kept for each session.", check=positive
    )
    deleted_retention: float = variable(
        "SESSION_DELETED_RETENTION",
        "float",
        30 * 86400.0,
        help="Seconds that a deleted session can still be read.",
        check=positive,
    )
    # Longer than HISTORY_SECONDS: what a starting gateway reads again must still be known here.
    dead_letter_retention: float = variable(
        "DEAD_LETTER_RETENTION",
        "float",
        7 * 86400.0,
        help="Seconds that messages which nobody could use are listed.",
        check=positive,
    )


def secrets_key() -> Any:
    """A field that the edge, which encrypts what apps keep secret, and the workers, which decrypt it, both have."""
    return variable(
        "SECRETS_KEY",
        "list",
        [],
        help="Key that apps' secrets are encrypted with, 32 bytes in base64 (`openssl rand -base64 32`); several,"
        " comma-separated: the first encrypts, all decrypt. Empty: apps cannot have secrets.",
        secret=True,
    )


def _image(value: str) -> str | None:
    return None if re.fullmatch(r"[\w./:@-]+", value, re.ASCII) else f"must be the name of an image, not {value!r}"


def base_domain() -> Any:
    """A field of the edge, which refuses domains that are under it, and of the workers, which make hosts of it."""
    return variable(
        "BASE_DOMAIN",
        "str",
        "localhost",
        help="Apps answer at {name}.{BASE_DOMAIN}.",
        check=lambda value: None if _DOMAIN.fullmatch(value) else f"must be a domain, not {value!r}",
    )


@dataclass(frozen=True, slots=True)
class DeploySettings:
    """How apps are built and run."""

    # DOCKER_HOST is Docker's own; a setting of ours would be a second truth.
    docker_host: str = variable(
        "DOCKER_HOST",
        "str",
        "",
        help="The Docker engine that builds and runs apps: unix:///path or tcp://host:port; empty: the local one.",
    )
    # Deployments worked on at the same time by one process; 0: none, others do.
    concurrency: int = variable(
        "DEPLOY_CONCURRENCY",
        "int",
        2,
        help="Deployments that one orchestrator works on at once; 0: none.",
        check=lambda value: None if value >= 0 else f"must not be negative, not {value}",
    )
    base_domain: str = base_domain()
    network: str = variable("DEPLOY_NETWORK", "str", "cluster-code", help="Docker network of the apps and of Traefik.")
    entrypoints: list[str] = variable(
        "TRAEFIK_ENTRYPOINTS", "list", ["web"], help="Traefik entry points that apps are reached through."
    )
    cert_resolver: str = variable(
        "TRAEFIK_CERT_RESOLVER", "str", "", help="Traefik certificate resolver of the apps' hosts; empty: no TLS."
    )
    # Which objects are ours: two installations that share an engine must differ here.
    instance: str = variable(
        "DEPLOY_INSTANCE", "str", "cluster-code", help="Marks what is this installation's at the Docker engine."
    )
    directory: Path = variable(
        "DEPLOY_DIR", "path", Path("data/deployments"), help="Where repositories are cloned to, while they are built."
    )
    clone_deadline: float = variable(
        "DEPLOY_CLONE_DEADLINE", "float", 300.0, help="Seconds that a clone may take.", check=positive
    )
    clone_bytes: int = variable(
        "DEPLOY_CLONE_BYTES", "int", 1 << 30, help="Bytes that a clone may have at most.", check=positive
    )
    # What projects without a Dockerfile are built on; a mirror's, where Docker's own registry is not to be asked.
    static_image: str = variable(
        "DEPLOY_STATIC_IMAGE",
        "str",
        "docker.io/library/busybox:1.37",
        help="Image, with busybox's `httpd`, that static sites without a Dockerfile are built on.",
        check=_image,
    )
    python_image: str = variable(
        "DEPLOY_PYTHON_IMAGE",
        "str",
        "docker.io/library/python:3.13-slim",
        help="Image that Python projects without a Dockerfile are built on.",
        check=_image,
    )
    node_image: str = variable(
        "DEPLOY_NODE_IMAGE",
        "str",
        "docker.io/library/node:24-slim",
        help="Image that Node projects without a Dockerfile are built on.",
        check=_image,
    )
    build_deadline: float = variable(
        "DEPLOY_BUILD_DEADLINE", "float", 1800.0, help="Seconds that a build may take.", check=positive
    )
    build_memory: int = variable(
        "DEPLOY_BUILD_MEMORY", "int", 4 << 30, help="Bytes of memory that a build may use.", check=positive
    )
    probe_deadline: float = variable(
        "DEPLOY_PROBE_DEADLINE", "float", 120.0, help="Seconds that an app gets to become healthy.", check=positive
    )
    drain: float = variable(
        "DEPLOY_DRAIN", "float", 10.0, help="Seconds that requests to a replaced container get to end.", check=positive
    )
    free_bytes: int = variable(
        "DEPLOY_FREE_BYTES", "int", 2 << 30, help="Free bytes of the engine's disk that a build needs.", check=positive
    )
    log_bytes: int = variable(
        "DEPLOY_LOG_BYTES", "int", 16 << 20, help="Bytes kept of the log of a deployment.", check=positive
    )
    # Seconds. A lease outlives three missed heartbeats; after it another worker goes on.
    lease: float = variable(
        "DEPLOY_LEASE", "float", 15.0, help="Seconds until another worker takes over a dead one's deployment.",
        check=positive,
    )  # fmt: skip
    secrets_key: list[str] = secrets_key()
    repo_schemes: list[str] = repo_schemes()


def _port_or_off(value: str) -> str | None:
    if value == "off" or (value.isascii() and value.isdecimal() and int(value) <= 65535):
        return None
    return f"must be 0 to 65535, or off, not {value!r}"


@dataclass(frozen=True, slots=True)
class ProbeSettings:
    """Where an orchestrator answers probes and Prometheus."""

    host: str = variable(
        "ORCHESTRATOR_HOST", "str", "127.0.0.1", help="Address of an orchestrator's /health, /ready and /metrics."
    )
    port: str = variable(
        "ORCHESTRATOR_PORT",
        "str",
        "8081",
        help="Their port; 0: any that is free, off: none. In `cluster-code dev` all of it is the gateway's.",
        check=_port_or_off,
    )
    metrics_token: str = metrics_token()
