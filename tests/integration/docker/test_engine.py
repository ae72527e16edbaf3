"""A real Docker engine, as our client sees it."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from datetime import timedelta
from typing import Any

import pytest

from orchestrator.docker import events
from orchestrator.docker.engine import Engine
from orchestrator.errors import EngineRefused, ImagePullFailed, ProviderUnavailable
from tests.docker import Daemon, Owned, Registry, make_busybox, tar


def shell(owned: Owned, image: str, script: str, **config: Any) -> dict[str, Any]:
    return {"Image": image, "Cmd": ["sh", "-c", script], "Labels": owned.labels, "StopSignal": "SIGKILL"} | config


async def run(owned: Owned, image: str, script: str, **config: Any) -> str:
    container = await owned.engine.containers.create("", shell(owned, image, script, **config))
    await owned.engine.containers.start(container)
    return container


async def test_it_says_what_it_is(engine: Engine) -> None:
    info = await engine.info()
    assert info.os == "linux"
    assert info.arch in ("amd64", "arm64")
    assert info.cpus >= 1
    assert info.memory_bytes > 1 << 28
    assert info.root_dir.startswith("/")
    assert tuple(map(int, info.api_version.split("."))) >= (1, 41)


async def test_a_killed_engine_is_unavailable_and_then_there_again(dockerd: Daemon) -> None:
    async with Engine(dockerd.host) as engine:
        await make_busybox(engine, "one:1")
        dockerd.kill()
        with pytest.raises(ProviderUnavailable, match=rf"^Docker at {dockerd.host} cannot be reached .*: start it"):
            await engine.info()
        await dockerd.start()
        assert await engine.images.inspect("one:1")
