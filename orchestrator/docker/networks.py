"""Networks of one engine."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from orchestrator.docker import labels as marks
from orchestrator.docker.connection import Connection
from orchestrator.errors import EngineRefused


class Networks:
    """All raise ProviderUnavailable and EngineRefused. A network is named by its id or its name."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._ensuring = asyncio.Lock()

    async def ensure(
        self, name: str, labels: Mapping[str, str] | None = None, options: Mapping[str, Any] | None = None
    ) -> str:
        """The id of the network with this name, which is made if there is none; `options` are the API's (`Driver`, …).

        Engines let several who ask at once make one each, of which nothing can join any by its name: all but one are
        removed, so that a name is worth more than the id. Raises EngineRefused, 409, when there is one that lacks one
        of the labels: it is not ours.
        """
        wanted = dict(labels or {})
        async with self._ensuring:
            if (found := await self._ours(name, wanted)) is not None:
                return found
            body = {"Name": name, "CheckDuplicate": True, "Labels": wanted, **(options or {})}
            refused: EngineRefused | None = None
            try:
                made = str((await self._connection.make("/networks/create", body=body))["Id"])
            except EngineRefused as error:
                # Was somebody faster?
                if error.status != 409:
                    raise
                refused = error
            if (found := await self._ours(name, wanted)) is not None:
                return found
            if refused is not None:
                raise refused
            return made

    async def _ours(self, name: str, labels: Mapping[str, str]) -> str | None:
        found = await self._connection.json("GET", "/networks", params={"filters": {"name": [name]}})
        same = [each for each in found if each["Name"] == name]
        if not all(marks.matches(each["Labels"], labels) for each in same):
            raise EngineRefused(409, f"There is a network {name} already that is not ours: remove or rename it.")
        # The same for all who look: the oldest stays, unless only another is in use.
        for each in sorted(same, key=lambda each: (each["Created"], each["Id"]), reverse=True):
            if len(same) > 1:
                try:
                    await self.remove(each["Id"])
                    same.remove(each)
                except EngineRefused as error:
                    if error.status != 403:
                        raise
        if len(same) > 1:
            raise EngineRefused(409, f"There are {len(same)} networks {name} in use: remove all but one by hand.")
        return str(same[0]["Id"]) if same else None

    async def inspect(self, network: str) -> dict[str, Any] | None:
        """What the engine knows of it, its containers too; None: there is none."""
        try:
            found: dict[str, Any] = await self._connection.json("GET", _path(network))
        except EngineRefused as error:
            if error.status == 404:
                return None
            raise
        return found

    async def connect(self, network: str, container: str, *, aliases: list[str] | None = None) -> None:
        """Let a container into it, under more names; one that is in already stays as it is."""
        body = {"Container": container, "EndpointConfig": {"Aliases": aliases or []}}
        try:
            await self._connection.json("POST", f"{_path(network)}/connect", body=body)
        except EngineRefused as error:
            # 403 for one that runs, 409 from others.
            if "already exists" not in str(error):
                raise

    async def disconnect(self, network: str, container: str, *, force: bool = True) -> None:
        """Take a container out of it; one that is not in, and a network or a container that is gone, are fine."""
        try:
            body = {"Container": container, "Force": force}
            await self._connection.json("POST", f"{_path(network)}/disconnect", body=body)
        except EngineRefused as error:
            if error.status != 404 and "is not connected" not in str(error):
                raise

    async def remove(self, network: str) -> None:
        """Remove it; one that is gone is removed. Raises EngineRefused, 403: containers are in it."""
        try:
            await self._connection.json("DELETE", _path(network))
        except EngineRefused as error:
            if error.status != 404:
                raise

    async def list(self, labels: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
        """Those with all the labels (an empty value: any)."""
        filters = {"label": marks.selectors(labels or {})}
        found: list[dict[str, Any]] = await self._connection.json("GET", "/networks", params={"filters": filters})
        return found


def _path(network: str) -> str:
    return f"/networks/{quote(network, safe='')}"
