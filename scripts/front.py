"""The Traefik that a demonstration looks through: one that runs, or one of its own, by a program or in a container."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from orchestrator.docker.engine import Engine
from orchestrator.docker.labels import INSTANCE
from orchestrator.errors import ClusterCodeError
from orchestrator.settings import DeploySettings
from scripts.demo_client import Client
from scripts.demo_repository import DemoFailed, dies_with_us, free_port

_IMAGE = "traefik:v3.6"
# What it says of every app is what the labels of their containers say.
_OPTIONS = (
    "--providers.docker=true",
    "--providers.docker.exposedbydefault=false",
    "--providers.providersthrottleduration=100ms",
    "--global.checknewversion=false",
    "--global.sendanonymoususage=false",
    "--log.level=WARN",
)


@asynccontextmanager
async def opened(client: Client, engine: Engine, settings: DeploySettings, url: str | None) -> AsyncIterator[str]:
    """Where to ask for the apps' hosts. `url`: of a Traefik that runs. Raises DemoFailed."""
    client.next("finding Traefik")
    if url is not None:
        client.say(f"Traefik at {url}")
        yield url.rstrip("/")
    elif program := os.environ.get("TRAEFIK_BIN") or shutil.which("traefik"):
        async with _process(program, engine, settings) as here:
            client.say(f"{program} at {here}, as long as this takes")
            yield here
    else:
        async with _container(client, engine, settings) as here:
            client.say(f"{_IMAGE} in a container at {here}, as long as this takes")
            yield here


@asynccontextmanager
async def _process(program: str, engine: Engine, settings: DeploySettings) -> AsyncIterator[str]:
    with tempfile.TemporaryDirectory(prefix="cluster-code-demo-") as folder:
        output = Path(folder) / "log"
        port = free_port()
        with output.open("wb") as log:
            traefik = await asyncio.create_subprocess_exec(
                *dies_with_us(), program, *_OPTIONS, f"--providers.docker.endpoint={engine.host}",
                *(f"--entrypoints.{name}.address=127.0.0.1:{port + place}" for place, name in _entrypoints(settings)),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder,
            )  # fmt: skip
        try:
            await _until_it_answers(port, lambda: traefik.returncode is not None, output)
            yield f"http://127.0.0.1:{port}"
        finally:
            if traefik.returncode is None:
                traefik.terminate()
            await traefik.wait()


@asynccontextmanager
async def _container(client: Client, engine: Engine, settings: DeploySettings) -> AsyncIterator[str]:
    scheme, _, path = engine.host.partition("://")
    if scheme != "unix":
        raise DemoFailed(f"there is no Traefik here that could follow {engine.host}: name one by --front URL")
    if await engine.images.inspect(_IMAGE) is None:
        client.say(f"pulling {_IMAGE}")
        try:
            await engine.images.pull(_IMAGE, say=client.say)
        except ClusterCodeError as error:
            raise DemoFailed(f"there is no Traefik: {error} Name one that runs by --front URL") from error
    network = await engine.networks.ensure(settings.network, {INSTANCE: settings.instance})
    entrypoints = [f"--entrypoints.{name}.address=:{8000 + place}" for place, name in _entrypoints(settings)]
    container = await engine.containers.create(
        f"cluster-code-demo-{secrets.token_hex(4)}",
        {
            "Image": _IMAGE,
            "Cmd": [*_OPTIONS, *entrypoints],
            "ExposedPorts": {"8000/tcp": {}},
            "HostConfig": {
                "AutoRemove": True,
                "Binds": [f"{path}:/var/run/docker.sock:ro"],
                "NetworkMode": network,
                "PortBindings": {"8000/tcp": [{"HostIp": "127.0.0.1", "HostPort": ""}]},
            },
        },
    )
    try:
        await engine.containers.start(container)
        found = await engine.containers.inspect(container)
        if found is None:
            raise DemoFailed("Traefik's container ended at once")
        port = int(found["NetworkSettings"]["Ports"]["8000/tcp"][0]["HostPort"])
        await _until_it_answers(port, lambda: False, None)
        yield f"http://127.0.0.1:{port}"
    finally:
        await engine.containers.remove(container)


def _entrypoints(settings: DeploySettings) -> list[tuple[int, str]]:
    """Those that the apps' labels name; the first is the one that is asked."""
    return list(enumerate(settings.entrypoints))


async def _until_it_answers(port: int, ended: Callable[[], bool], output: Path | None) -> None:
    for _ in range(200):
        if ended():
            said = _said(output) if output else ""
            raise DemoFailed(f"Traefik does not start: {said or 'it said nothing'}")
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.1)
        else:
            writer.close()
            return
    raise DemoFailed(f"Traefik does not answer at port {port}")


def _said(output: Path) -> str:
    return output.read_text(errors="replace").strip()
