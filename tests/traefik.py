"""A real Traefik in front of the containers of a test, on ports of 127.0.0.1 that nobody else has."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp

from orchestrator.docker import labels

# Seconds. It is a large program, on a machine that may have others to do.
_BOOT_DEADLINE = 60.0


class Traefik:
    """A `traefik` that looks at containers of one `instance` at the engine `host`, and takes requests at `address`.

    `throttle`: its `providersThrottleDuration`, as it writes them (`2s` is its default).

        async with Traefik(program("traefik"), engine.host, "test-1") as traefik:
            await traefik.servers("shop")
    """

    def __init__(self, binary: str, host: str, instance: str, folder: Path, *, throttle: str = "100ms") -> None:
        self._log = folder / "traefik.log"
        self.address, self._api = f"127.0.0.1:{_free_port()}", f"127.0.0.1:{_free_port()}"
        self._command = [
            binary,
            f"--entrypoints.web.address={self.address}",
            f"--entrypoints.traefik.address={self._api}",
            "--api.insecure=true",
            "--global.checknewversion=false",
            "--global.sendanonymoususage=false",
            f"--providers.docker.endpoint={host}",
            "--providers.docker.exposedbydefault=false",
            f"--providers.docker.constraints=Label(`{labels.INSTANCE}`,`{instance}`)",
            f"--providers.providersthrottleduration={throttle}",
        ]
        self._process: subprocess.Popen[bytes] | None = None
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Traefik:
        self._session = aiohttp.ClientSession()
        try:
            await asyncio.to_thread(self._spawn)
            await self._answers()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def log(self) -> str:
        """What it said."""
        return self._log.read_text(errors="replace")

    async def tells(self, kind: str) -> dict[str, dict[str, Any]]:
        """What it has of `routers` or `services` from the engine, by name."""
        assert self._session is not None
        async with self._session.get(f"http://{self._api}/api/http/{kind}") as response:
            found = await response.json()
        return {one["name"].removesuffix("@docker"): one for one in found if one["provider"] == "docker"}

    async def servers(self, service: str) -> set[str]:
        """The URLs that it sends the requests of a service to."""
        found: Mapping[str, Any] = (await self.tells("services")).get(service) or {}
        return {server["url"] for server in (found.get("loadBalancer") or {}).get("servers") or []}

    async def close(self) -> None:
        """End it."""
        if self._session is not None:
            await self._session.close()
        if self._process is not None:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)

    def _spawn(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    async def _answers(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + _BOOT_DEADLINE
        while True:
            with suppress(aiohttp.ClientError):
                await self.tells("routers")
                return
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"traefik does not start: {self.log[-2000:]}")
            await asyncio.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
