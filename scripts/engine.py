"""The Docker engine that this machine's settings lead to, and what `dev` makes of it."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import structlog

from orchestrator.database import Connection
from orchestrator.docker.engine import Engine
from orchestrator.errors import ClusterCodeError
from scripts import examples

log = structlog.get_logger("dev")

# Seconds that the engine gets to say which images it has.
_PATIENCE = 3.0


async def import_providers(connection: Connection, host: str, image: str) -> None:
    """Add the provider `docker` where an engine is named or there is a local one, and `devpod` where that is, too.

    `image`: what DOCKER_DEMO_IMAGE says; empty: a busybox that the engine has already, else the examples' own.
    """
    if not _configured(Engine(host).host):
        return
    image = image or await busybox(host)
    await examples.import_provider(connection, "docker", examples.read("docker.yaml", image))
    if shutil.which("devpod"):
        await examples.import_provider(connection, "devpod", examples.read("devpod.yaml", image))


def _configured(host: str) -> bool:
    return not host.startswith("unix://") or Path(host.removeprefix("unix://")).is_socket()


async def busybox(host: str) -> str:
    """A busybox that the engine has, so that none need be pulled; "" when it has none, or does not answer."""
    try:
        async with asyncio.timeout(_PATIENCE), Engine(host) as engine:
            names = {name for image in await engine.images.list() for name in image["RepoTags"] or ()}
    except (ClusterCodeError, TimeoutError) as error:
        log.info("the Docker engine does not answer", error=str(error) or type(error).__name__)
        return ""
    suitable = sorted(name for name in names if examples.is_busybox(name))
    return "" if "busybox:stable" in suitable else next(iter(suitable), "")
