"""Containers of one engine: made, started, ended, looked at, filled with files, and commands run in them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from orchestrator.docker import labels as marks
from orchestrator.docker.connection import Connection
from orchestrator.errors import EngineRefused, ProviderUnavailable

# Seconds.
EXEC_DEADLINE = 60.0
ARCHIVE_DEADLINE = 900.0
# Of the output of a command in a container, in bytes.
EXEC_OUTPUT = 1024 * 1024


class Containers:
    """All raise ProviderUnavailable and EngineRefused. A container is named by its id or its name."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def create(self, name: str, config: Mapping[str, Any], *, platform: str | None = None) -> str:
        """Make one of the API's config (`Image`, `Cmd`, `Labels`, `HostConfig`, …), and return its id.

        Raises EngineRefused: 404 without the image, 409 when the name is taken.
        """
        params = {"name": name, "platform": platform}
        made = await self._connection.make("/containers/create", params=params, body=config)
        return str(made["Id"])

    async def start(self, container: str) -> None:
        """Start it; one that runs already is left alone."""
        await self._connection.json("POST", f"{_path(container)}/start", timeout=self._connection.timeout + 45)

    async def stop(self, container: str, grace: float = 10.0) -> None:
        """SIGTERM, or what the image says, and after `grace` seconds SIGKILL. One that is gone or ended is stopped."""
        seconds = max(0, round(grace))
        await self._unless_gone(
            "POST", f"{_path(container)}/stop", params={"t": seconds}, timeout=self._connection.timeout + seconds + 15
        )

    async def kill(self, container: str, signal: str = "SIGKILL") -> None:
        """Send a signal. One that is gone or does not run is left alone."""
        try:
            await self._unless_gone("POST", f"{_path(container)}/kill", params={"signal": signal})
        except EngineRefused as error:
            # It does not run.
            if error.status != 409:
                raise

    async def remove(self, container: str, *, force: bool = True, volumes: bool = False) -> None:
        """Remove it, and with `volumes` those without a name. One that is gone is removed."""
        path, params = _path(container), {"force": force, "v": volumes}
        try:
            await self._unless_gone("DELETE", path, params=params, timeout=self._connection.timeout + 45)
        except EngineRefused as error:
            # Somebody else is about to remove it.
            if error.status != 409 or "in progress" not in str(error):
                raise

    async def inspect(self, container: str) -> dict[str, Any] | None:
        """What the engine knows of it; None: there is none."""
        found: dict[str, Any] | None = await self._unless_gone("GET", f"{_path(container)}/json")
        return found

    async def list(self, labels: Mapping[str, str] | None = None, *, all: bool = True) -> list[dict[str, Any]]:  # noqa: A002
        """Those with all the labels (an empty value: any), in short; without `all` those that run."""
        filters = {"label": marks.selectors(labels or {})}
        found: list[dict[str, Any]] = await self._connection.json(
            "GET", "/containers/json", params={"all": all, "filters": filters}
        )
        return found

    async def rename(self, container: str, name: str) -> None:
        """Give it another name. Raises EngineRefused, 409: it is taken."""
        await self._connection.json("POST", f"{_path(container)}/rename", params={"name": name})

    async def update(self, container: str, limits: Mapping[str, Any]) -> None:
        """Change limits (`Memory`, `NanoCpus`, `PidsLimit`, `RestartPolicy`, …) while it runs."""
        await self._connection.json("POST", f"{_path(container)}/update", body=limits)

    async def wait(self, container: str) -> int:
        """The exit code, as soon as it does not run."""
        async with self._connection.stream("POST", f"{_path(container)}/wait", begin=float("inf")) as stream:
            async for ended in stream.objects():
                if (ended.get("Error") or {}).get("Message"):
                    raise EngineRefused(500, ended["Error"]["Message"])
                return int(ended["StatusCode"])
        raise self._connection.unavailable("hung up before the container had ended")

    async def put_archive(self, container: str, path: str, tar: bytes | AsyncIterable[bytes]) -> None:
        """Unpack a tar archive into the folder `path`, which must be there; the container need not run.

        What `tar` raises is raised. Bounded by ARCHIVE_DEADLINE.
        """
        async with self._connection.stream(
            "PUT", f"{_path(container)}/archive", params={"path": path}, data=tar, begin=ARCHIVE_DEADLINE
        ) as stream:
            while await stream.read():
                pass

    async def has(self, container: str, path: str) -> bool:
        """Whether a file or a folder is there; the container need not run."""
        try:
            async with self._connection.stream("GET", f"{_path(container)}/archive", params={"path": path}):
                return True
        except EngineRefused as error:
            if error.status == 404:
                return False
            raise

    async def exec(
        self,
        container: str,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
        timeout: float = EXEC_DEADLINE,
    ) -> tuple[int, bytes]:
        """Run a command in it: its exit code, and its output with its errors, the first 1 MiB of it.

        After `timeout` seconds (ProviderUnavailable), or when cancelled, nobody listens any more; the engine does not
        end the command for that. Raises EngineRefused where it does not run.
        """
        body = {"AttachStdout": True, "AttachStderr": True, "Cmd": list(argv), "User": user or ""}
        body["Env"] = [f"{name}={value}" for name, value in (env or {}).items()]
        made = await self._connection.json("POST", f"{_path(container)}/exec", body=body)
        output = bytearray()
        begin = {"Detach": False, "Tty": False}
        try:
            async with asyncio.timeout(timeout) as timer:
                async with self._connection.stream(
                    "POST", f"/exec/{made['Id']}/start", body=begin, begin=float("inf")
                ) as stream:
                    async for _, data in stream.frames():
                        output += data[: EXEC_OUTPUT - len(output)]
                ended = await self._connection.json("GET", f"/exec/{made['Id']}/json")
        except TimeoutError:
            if not timer.expired():
                raise
            raise ProviderUnavailable(f"The command in {container} did not end within {timeout:g} seconds.") from None
        if ended["ExitCode"] is None:
            raise self._connection.unavailable(f"hung up before the command in {container} had ended")
        return int(ended["ExitCode"]), bytes(output)

    async def _unless_gone(self, method: str, path: str, **request: Any) -> Any:
        try:
            return await self._connection.json(method, path, **request)
        except EngineRefused as error:
            if error.status == 404:
                return None
            raise


def _path(container: str) -> str:
    return f"/containers/{quote(container, safe='')}"
