"""The files of `configs/` that `cluster-code dev` imports by itself, with what only the machine can say of them."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog

from orchestrator import machine_import, machines
from orchestrator.database import Connection
from orchestrator.machine_import import Import

log = structlog.get_logger("dev")

FOLDER = Path(__file__).parent.parent / "configs"


async def import_provider(connection: Connection, name: str, wanted: Import) -> None:
    """Add the provider `name` of an example and its machine configs, unless there is one of that name: whoever changed
    it knows why."""
    if any(row.name == name for row in await machines.providers(connection)):
        return
    # Others may run theirs at the same place: what is whose must not be in doubt.
    own = {"instance": f"dev-{secrets.token_hex(4)}"}
    providers = tuple({**entry, "options": {**entry["options"], **own}} for entry in wanted.providers)
    there = {config.name for config in await machines.machine_configs(connection)}
    new = tuple(entry for entry in wanted.machine_configs if entry["name"] not in there)
    changes = await machine_import.apply(connection, replace(wanted, providers=providers, machine_configs=new))
    log.info("imported", file=wanted.source, changes=[str(change) for change in changes])


def read(name: str, image: str = "") -> Import:
    """An example, and with `image` that in place of each image of its machine configs."""
    wanted = machine_import.read_file(FOLDER / name)
    if not image:
        return wanted
    return replace(wanted, machine_configs=tuple(_with_image(entry, image) for entry in wanted.machine_configs))


def is_busybox(name: str) -> bool:
    """Whether an image is a busybox, as far as its name tells; by its tag, since a digest says nothing to people."""
    repository, tagged, _ = name.rpartition("/")[2].partition(":")
    return "@" not in name and repository == "busybox" and bool(tagged)


def _with_image(entry: Mapping[str, Any], image: str) -> dict[str, Any]:
    services = {
        name: {**service, "image": image} if "image" in service else service
        for name, service in entry["services"].items()
    }
    options = entry["options"]
    if "fallback_image" in options:
        options = {**options, "fallback_image": image}
    return {**entry, "services": services, "options": options}
