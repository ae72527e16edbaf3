"""Volumes of one engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from orchestrator.docker import labels as marks
from orchestrator.docker.connection import Connection
from orchestrator.errors import EngineRefused


class Volumes:
    """All raise ProviderUnavailable and EngineRefused."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def ensure(
        self, name: str, labels: Mapping[str, str] | None = None, options: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """The volume with this name, which is made if there is none; `options` are the API's (`Driver`, `DriverOpts`).

        Raises EngineRefused, 409, when there is one that lacks one of the labels: it is not ours.
        """
        wanted = dict(labels or {})
        body = {"Name": name, "Labels": wanted, **(options or {})}
        # One that is there is returned as it is.
        made: dict[str, Any] = await self._connection.make("/volumes/create", body=body)
        if not marks.matches(made["Labels"], wanted):
            raise EngineRefused(409, f"There is a volume {name} already that is not ours: remove or rename it.")
        return made

    async def inspect(self, name: str) -> dict[str, Any] | None:
        """What the engine knows of it; None: there is none."""
        try:
            found: dict[str, Any] = await self._connection.json("GET", _path(name))
        except EngineRefused as error:
            if error.status == 404:
                return None
            raise
        return found

    async def remove(self, name: str, *, force: bool = False) -> None:
        """Remove it with all that is in it; one that is gone is removed. Raises EngineRefused, 409: it is in use."""
        try:
            timeout = self._connection.timeout + 105
            await self._connection.json("DELETE", _path(name), params={"force": force}, timeout=timeout)
        except EngineRefused as error:
            if error.status != 404:
                raise

    async def list(self, labels: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
        """Those with all the labels (an empty value: any)."""
        filters = {"label": marks.selectors(labels or {})}
        found = await self._connection.json("GET", "/volumes", params={"filters": filters})
        return found["Volumes"] or []


def _path(name: str) -> str:
    return f"/volumes/{quote(name, safe='')}"
