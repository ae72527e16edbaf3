"""Containers under the names that are ours, at a Docker engine where others have containers, too."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from orchestrator.docker import labels
from orchestrator.docker.engine import Engine
from orchestrator.errors import EngineRefused, ProviderFailure
from orchestrator.providers.symptoms import command_failure, plain

# In the engine's words: a port of its machine that somebody has, and an init that it does not have.
_PORT_TAKEN = ("port is already allocated", "address already in use")
_NO_INIT = ("docker-init", "init binary")
# Looks at a name that is taken, by nothing that can be seen; and seconds between them.
_TRIES, _SOON = 30, 0.1


async def put(engine: Engine, name: str, config: Mapping[str, Any]) -> str:
    """Make a container, in place of the one of ours that has the name; its id.

    Raises ProviderFailure (`NameTaken`) for somebody else's, EngineRefused, ProviderUnavailable.
    """
    tries = 0
    while True:
        try:
            return await engine.containers.create(name, config)
        except EngineRefused as error:
            if error.status != 409:
                raise
            there = await engine.containers.inspect(name)
            if there is None:
                # It is about to be there, or gone; or the engine is confused, which ends with its next start only.
                tries += 1
                if tries == _TRIES:
                    raise
                await asyncio.sleep(_SOON)
                continue
            if not labels.matches(there["Config"]["Labels"], _whose(config["Labels"])):
                raise ProviderFailure(
                    "NameTaken",
                    f"There is a container {name} already at the Docker engine, which is not of this session: have an"
                    " operator rename or remove it, or give this installation an `instance` of its own.",
                ) from error
            await engine.containers.remove(there["Id"], volumes=True)


def _whose(marks: Mapping[str, str]) -> dict[str, str]:
    return {name: marks[name] for name in (labels.INSTANCE, labels.SESSION)}


def port_taken(error: EngineRefused) -> bool:
    """Whether a container does not start because somebody has its port."""
    return any(words in str(error) for words in _PORT_TAKEN)


def lacks_init(error: EngineRefused) -> bool:
    """Whether a container does not start because the engine has no init for it."""
    return any(words in str(error) for words in _NO_INIT)


def refusal(error: EngineRefused, what: str) -> ProviderFailure:
    """The failure that an engine's refusal means; `what` is the service, or what else was to be made."""
    said = str(error)
    if "address pool" in said or "could not find an available" in said:
        return ProviderFailure(
            "NoAddresses",
            f"The Docker engine has no addresses left for another network ({plain(said)}): have an operator delete"
            " sessions, or set `default-address-pools` in the engine's daemon.json.",
        )
    if "not ours" in said:
        return ProviderFailure("NameTaken", plain(said) + ".")
    if "no space left" in said:
        return ProviderFailure("DiskFull", f"The Docker engine has no room left for {what}: tell an operator.")
    if (command := command_failure(what, said)) is not None:
        return ProviderFailure("CommandNotFound", command)
    return ProviderFailure("EngineRefused", f"The Docker engine refuses {what}: {plain(said, 500)}.")
