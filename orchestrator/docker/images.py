"""Images of one engine: pulled from registries, with our credentials for them, and kept in order."""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

from orchestrator.docker import labels as marks
from orchestrator.docker.connection import Connection, Silent
from orchestrator.errors import EngineRefused, ImagePullFailed

# What registries are asked with: `username` and `password`, or `identitytoken`.
Auth = Mapping[str, str]

# Seconds. Without a word for so long a registry is taken for dead; how often progress is told at most.
_SILENCE = 120.0
_PROGRESS = 2.0
# How far it must have come since it was told last, in hundredths.
_STEP = 5
_HUB = "https://index.docker.io/v1/"

_UNAUTHORIZED = re.compile(
    r"unauthorized|authentication required|no basic auth|access denied|denied: |forbidden|incorrect username",
    re.IGNORECASE,
)
_NOT_FOUND = re.compile(
    r"not found|manifest unknown|does not exist|name unknown|no matching manifest|no such image", re.IGNORECASE
)


class Images:
    """All raise ProviderUnavailable and EngineRefused. An image is named by its id or one of its names."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def inspect(self, image: str) -> dict[str, Any] | None:
        """What the engine knows of it; None: it is not there."""
        try:
            found: dict[str, Any] = await self._connection.json("GET", f"{_path(image)}/json")
        except EngineRefused as error:
            if error.status == 404:
                return None
            raise
        return found

    async def pull(
        self,
        image: str,
        *,
        auth: Auth | None = None,
        say: Callable[[str], None] | None = None,
        platform: str | None = None,
    ) -> None:
        """Get an image from its registry, with `auth`, or else with what DOCKER_CONFIG has for that registry.

        `say` is told the progress, some lines (without ends) in all. Raises ImagePullFailed. Cancelling ends the pull.
        """
        name, tag = _named(image)
        credentials = auth or configured(os.environ).get(registry(image))
        headers = {} if credentials is None else {"X-Registry-Auth": encoded(credentials)}
        params = {"fromImage": name, "tag": tag, "platform": platform}
        told = _Progress(say) if say else None
        try:
            async with self._connection.stream(
                "POST", "/images/create", params=params, headers=headers, begin=_SILENCE, idle=_SILENCE
            ) as stream:
                async for part in stream.objects():
                    if error := part.get("error"):
                        raise EngineRefused(500, str((part.get("errorDetail") or {}).get("message") or error))
                    if told:
                        told.take(part)
        except EngineRefused as error:
            # It ends its pulls when it is stopped.
            await self._connection.stays()
            raise pull_failed(image, str(error), status=error.status) from None
        except Silent:
            # The engine, or the registry?
            await self._connection.ping()
            raise pull_failed(image, "it did not answer in time") from None

    async def tag(self, image: str, name: str) -> None:
        """Give it one more name, `repository:tag`."""
        repository, tag = _named(name)
        await self._connection.json("POST", f"{_path(image)}/tag", params={"repo": repository, "tag": tag})

    async def remove(self, image: str, *, force: bool = False) -> None:
        """Take this name off it, and remove it with its last one; one that is gone is removed.

        Raises EngineRefused, 409: a container has it (with `force`: one that runs).
        """
        try:
            await self._connection.json(
                "DELETE", _path(image), params={"force": force}, timeout=self._connection.timeout + 105
            )
        except EngineRefused as error:
            if error.status != 404:
                raise

    async def list(
        self, labels: Mapping[str, str] | None = None, *, reference: str = "", dangling: bool | None = None
    ) -> list[dict[str, Any]]:
        """Those with all the labels (an empty value: any), whose name fits the pattern, in short."""
        filters: dict[str, list[str]] = {"label": marks.selectors(labels or {})}
        if reference:
            filters["reference"] = [reference]
        if dangling is not None:
            filters["dangling"] = [json.dumps(dangling)]
        found: list[dict[str, Any]] = await self._connection.json("GET", "/images/json", params={"filters": filters})
        return found

    async def prune(self, labels: Mapping[str, str], *, older: timedelta = timedelta()) -> int:
        """Remove images that have no name, no container, all these labels and that age; returns the bytes freed."""
        filters = {"dangling": ["true"], "label": marks.selectors(labels), "until": [f"{older.total_seconds():.0f}s"]}
        done = await self._connection.json("POST", "/images/prune", params={"filters": filters}, timeout=_SILENCE)
        return int(done["SpaceReclaimed"])

    async def prune_cache(self, *, older: timedelta) -> int:
        """Remove what BuildKit has kept to build faster and has not used for so long; returns the bytes freed."""
        params = {"all": True, "filters": {"until": [f"{older.total_seconds():.0f}s"]}}
        done = await self._connection.json("POST", "/build/prune", params=params, timeout=_SILENCE)
        return int(done["SpaceReclaimed"])


class _Progress:
    """Makes a few lines of the many words of a pull."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._layers: dict[str, tuple[int, int]] = {}
        self._told_at = time.monotonic()
        self._told = 0

    def take(self, part: Mapping[str, Any]) -> None:
        """One object of the stream."""
        status, detail = str(part.get("status") or ""), part.get("progressDetail") or {}
        layer = part.get("id")
        if status == "Downloading" and layer and detail.get("total"):
            self._layers[layer] = int(detail.get("current") or 0), int(detail["total"])
            self._sum_up()
        elif status == "Download complete" and layer in self._layers:
            self._layers[layer] = (self._layers[layer][1],) * 2
        elif status and "progressDetail" not in part:
            # That it begins, the digest, and that it is done.
            self._say(f"{layer}: {status}" if layer else status)

    def _sum_up(self) -> None:
        current = sum(layer[0] for layer in self._layers.values())
        total = sum(layer[1] for layer in self._layers.values())
        hundredths = 100 * current // total
        now = time.monotonic()
        if now < self._told_at + _PROGRESS or abs(hundredths - self._told) < _STEP:
            return
        self._told_at, self._told = now, hundredths
        self._say(f"Downloading: {current / 1e6:.1f} of {total / 1e6:.1f} MB ({hundredths} %)")


def pull_failed(image: str, message: str, *, status: int = 500) -> ImagePullFailed:
    """The error that the engine's words for a failed pull mean."""
    if "invalid reference format" in message:
        return ImagePullFailed("ImageNotFound", f"{image!r} is no name of an image ({message}).", status=status)
    host = registry(image)
    host = "Docker Hub" if host == _HUB else host
    # Docker Hub says of a private image, and of one that is not there, the same.
    if "pull access denied" in message and "may require" in message:
        return ImagePullFailed(
            "ImageNotFound", f"{host} has no image {image}, or it is private and there are no credentials for it.",
            status=status,
        )  # fmt: skip
    if _UNAUTHORIZED.search(message):
        sentence = f"{host} does not let us pull {image}: the credentials for it are missing or wrong ({message})."
        return ImagePullFailed("RegistryUnauthorized", sentence, status=status)
    if status == 404 or _NOT_FOUND.search(message):
        return ImagePullFailed("ImageNotFound", f"{host} has no image {image} ({message}).", status=status)
    sentence = f"{image} cannot be pulled, since {host} cannot be reached ({message})."
    return ImagePullFailed("RegistryUnreachable", sentence, status=status)


# Registries and credentials for them. --------------------------------------------------------------------------------


def registry(image: str) -> str:
    """The registry that an image comes from, as docker's configuration names it: `ghcr.io`, `localhost:5000`."""
    first, slash, _ = image.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost"):
        return _HUB if first in ("docker.io", "index.docker.io") else first
    return _HUB


def configured(environment: Mapping[str, str]) -> dict[str, Auth]:
    """The credentials in docker's own configuration (`config.json` in DOCKER_CONFIG), by registry.

    What is not there, or cannot be read, gives none: then registries are asked without.
    """
    folder = Path(environment.get("DOCKER_CONFIG") or Path.home() / ".docker")
    try:
        entries = json.loads((folder / "config.json").read_bytes()).get("auths") or {}
        return {_registry_key(key): auth for key, entry in entries.items() if (auth := _credentials(key, entry))}
    except (OSError, ValueError, AttributeError):
        return {}


def encoded(auth: Auth | Mapping[str, Auth]) -> str:
    """As it goes into a header."""
    return base64.urlsafe_b64encode(json.dumps(auth).encode()).decode()


def _registry_key(key: str) -> str:
    host = key.removeprefix("https://").removeprefix("http://").partition("/")[0]
    return _HUB if host in ("index.docker.io", "docker.io", "registry-1.docker.io") else host


def _credentials(key: str, entry: Mapping[str, str]) -> Auth | None:
    found = {name: entry[name] for name in ("username", "password", "identitytoken") if entry.get(name)}
    if entry.get("auth"):
        try:
            user, _, password = base64.b64decode(entry["auth"], validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            return None
        found |= {"username": user, "password": password.rstrip("\0")}
    return {**found, "serveraddress": key} if found else None


def _named(image: str) -> tuple[str, str]:
    """The repository, and the tag or digest."""
    repository, at, digest = image.partition("@")
    if at:
        return repository, digest
    folder, slash, last = image.rpartition("/")
    name, _, tag = last.partition(":")
    return folder + slash + name, tag or "latest"


def _path(image: str) -> str:
    if any(part in ("", ".", "..") for part in image.split("/")):
        # It would lead to something else of the API.
        raise EngineRefused(400, f"invalid reference format: {image!r} is no name of an image")
    return f"/images/{quote(image, safe='/:@')}"
