"""From an image to what serves: a container beside the one before, tried, put in its place, and those before removed.

At no moment does Traefik know of no container that serves: the new one's gate (`gate`) is opened while that of the one
before is open still, and what is removed was closed long enough before.

All raise StepFailed, ProviderUnavailable and EngineRefused, and may be done again at any point: what is there already
is gone on with. Only what has our labels is ever touched.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from orchestrator.deployments import container as containers
from orchestrator.deployments import gate, labels, probing
from orchestrator.deployments.contract import UNSTEADY, Image, StepFailed, Task
from orchestrator.docker import labels as marks
from orchestrator.docker.engine import Engine
from orchestrator.errors import EngineRefused
from orchestrator.settings import DeploySettings

probe = probing.probe

# Seconds. Traefik obeys what it hears of a container after its `providersThrottleDuration`, 2 seconds by default, and
# once it has looked at all containers. Then nobody is sent to an address that the next container may get.
LETS_GO = 5.0
# What a gate gets to swing: the engine's next check may have to begin first.
_SWING = 30.0
# How long a new container must have run before those before it are closed, and how long that is waited for.
STEADY = 2.0
_UNSTEADY = 30.0
# What a container gets to end by itself, after SIGTERM.
_GRACE = 10.0


# Run. -----------------------------------------------------------------------------------------------------------------


async def run(engine: Engine, task: Task, image: Image, settings: DeploySettings) -> str:
    """Start the deployment's container, its gate closed, beside the one before; returns its id.

    What a killed worker left of it is gone on with if it is just that and runs, or else replaced. Raises StepFailed:
    `NameTaken`, `ImageGone`, `ForbiddenLabels`, `StartFailed`, `UnsupportedPlatform`.
    """
    await _check_image(engine, image)
    await ensure_network(engine, settings)
    siblings = [found["Labels"] for found in await _before(engine, task, settings)]
    wanted = containers.config(task, image, settings, siblings)
    found = await engine.containers.inspect(task.container)
    if found is not None:
        if not marks.matches(found["Config"]["Labels"], _marks(task, settings)):
            raise _taken(task)
        if containers.is_as_wanted(found, wanted):
            task.say(f"The container {task.container} runs already.\n")
            return str(found["Id"])
        await engine.containers.remove(found["Id"], volumes=True)
    return await _started(engine, task, wanted)


async def _check_image(engine: Engine, image: Image) -> None:
    found = await engine.images.inspect(image.name)
    if found is None or found["Id"] != image.id:
        raise StepFailed("ImageGone", f"The image {image.name} is gone from the Docker engine: deploy from Git anew.")
    # A container takes over its image's labels, and so could take another app's requests.
    if forbidden := labels.forbidden(found["Config"].get("Labels") or {}):
        raise StepFailed(
            "ForbiddenLabels",
            f"The image has the label {forbidden[0]}, which is not an app's to set: remove it from the Dockerfile (what"
            " Traefik does is said by the app's domains and port).",
        )


async def ensure_network(engine: Engine, settings: DeploySettings) -> None:
    """Make the network of the apps, if there is none."""
    # One that is there may be anybody's: whoever installed Traefik has made it.
    if await engine.networks.inspect(settings.network) is None:
        try:
            await engine.networks.ensure(settings.network, {marks.INSTANCE: settings.instance})
        except EngineRefused as error:
            # Somebody made it meanwhile.
            if error.status != 409:
                raise


async def _started(engine: Engine, task: Task, wanted: dict[str, Any]) -> str:
    try:
        made = await engine.containers.create(task.container, wanted)
        await gate.install(engine, made)
        await engine.containers.start(made)
    except EngineRefused as error:
        if error.status == 409:
            raise _taken(task) from error
        raise StepFailed("StartFailed", f"The container does not start: {error}") from error
    task.say(f"Started the container {task.container}.\n")
    return made


def _taken(task: Task) -> StepFailed:
    return StepFailed(
        "NameTaken", f"There is a container {task.container} already that is not ours: remove or rename it."
    )


# Swap. ----------------------------------------------------------------------------------------------------------------


async def swap(engine: Engine, task: Task, container: str, settings: DeploySettings) -> None:
    """Have Traefik send requests to the new container, too. Raises StepFailed, as `probe` does, and `GateStuck`."""
    if gate.is_open(found := await engine.containers.inspect(container)):
        return
    if not gate.is_running(found):
        # The engine was restarted since, or it has crashed.
        await probe(engine, task, container, settings)
    await engine.containers.update(container, containers.RESTART)
    await gate.swing(engine, container, opened=True)
    try:
        async with asyncio.timeout(_SWING):
            await gate.opens(engine, container)
    except TimeoutError:
        raise StepFailed(
            "GateStuck",
            f"The Docker engine did not find the container healthy within {_SWING:g} seconds: deploy again.",
        ) from None
    found = await engine.containers.inspect(container)
    if not gate.is_open(found):
        if found is None:
            raise StepFailed("ContainerGone", "Somebody removed the container.")
        raise await probing.ended(engine, task, found)
    task.say(f"{labels.url(task.app_name, settings)} is served by the container {task.container}.\n")


async def drain(engine: Engine, task: Task, settings: DeploySettings) -> None:
    """Have Traefik send nothing more to the containers before, and give the requests that they have time to end.

    Not before the new one has run for some seconds. Raises StepFailed (`Unsteady`) where it does not stay up: then
    those before go on serving.
    """
    before = [found for found in await _before(engine, task, settings) if found["State"] == "running"]
    if not before:
        return
    # Once they are closed, by a worker that was killed, there is no way back.
    if await _serving(engine, before):
        await _steady(engine, task)
    await _close(engine, [found["Id"] for found in before])
    task.say(f"Giving the requests that are under way {settings.drain:g} seconds.\n")
    await asyncio.sleep(LETS_GO + settings.drain)


async def _steady(engine: Engine, task: Task) -> None:
    clock = asyncio.get_running_loop().time
    since, started = clock(), ""
    try:
        async with asyncio.timeout(_UNSTEADY):
            while (left := since + STEADY - clock()) > 0:
                found = await engine.containers.inspect(task.container)
                seen = found["State"]["StartedAt"] if found and gate.is_open(found) else ""
                if seen != started or not seen:
                    since, started = clock(), seen
                await asyncio.sleep(min(left, 0.2))
    except TimeoutError:
        raise _unsteady() from None


def _unsteady() -> StepFailed:
    return StepFailed(UNSTEADY, "The new container does not stay up: the one before goes on serving.")


async def _close(engine: Engine, those: Sequence[str]) -> None:
    """Close gates, and return when the engine says that they are closed."""

    async def close(container: str) -> None:
        try:
            async with asyncio.timeout(_SWING):
                await gate.swing(engine, container, opened=False)
                await gate.closes(engine, container)
        except (EngineRefused, TimeoutError):
            # It is gone, or its disk is full: it must go without.
            return

    await asyncio.gather(*(close(container) for container in those))


# Clean. ---------------------------------------------------------------------------------------------------------------


async def clean(engine: Engine, task: Task, settings: DeploySettings) -> None:
    """Remove the containers before, and images beyond those that the app keeps. Raises StepFailed (`Unsteady`)."""
    before = await _before(engine, task, settings)
    if await _serving(engine, before) and not await _serving(engine, [{"Id": task.container}]):
        raise _unsteady()
    await retire(engine, before, grace=_GRACE)
    for found in before:
        task.say(f"Removed the container {found['Names'][0].removeprefix('/')}.\n")
    images = await engine.images.list(labels.ours(settings, app_id=task.app_id))
    if removed := await prune(engine, images, task.settings.keep_images, {task.deployment_id}):
        task.say(f"Removed {removed} image{'s' if removed > 1 else ''} that nobody goes back to.\n")


async def prune(engine: Engine, images: Sequence[dict[str, Any]], keep: int, needed: set[int]) -> int:
    """Remove those of an app's images (as `list` gives them) but for the newest `keep`, those that containers have, and
    those of the deployments that are `needed`; returns how many. What has names that are not ours keeps those.
    """
    used = {found["ImageID"] for found in await engine.containers.list()}
    # What runs is one of those that are kept, however old.
    newest = sorted(images, key=lambda image: (image["Id"] in used, deployment_of(image)), reverse=True)
    rest = [image for image in newest[keep:] if image["Id"] not in used and deployment_of(image) not in needed]
    for image in rest:
        await remove_image(engine, image)
    return len(rest)


async def remove(engine: Engine, container: str, *, grace: float = _GRACE) -> None:
    """End a container with SIGTERM, after `grace` seconds with SIGKILL, and remove it with its unnamed volumes."""
    await engine.containers.stop(container, grace)
    await engine.containers.remove(container, volumes=True)


async def remove_image(engine: Engine, image: dict[str, Any]) -> None:
    """Take our names off an image (as `list` gives it), which goes with its last one; one that is used stays."""
    ours = [name for name in image.get("RepoTags") or [] if name.startswith("cluster-code-")]
    foreign = [name for name in image.get("RepoTags") or [] if name not in ours and name != "<none>:<none>"]
    for name in ours or ([] if foreign else [image["Id"]]):
        try:
            await engine.images.remove(name)
        except EngineRefused as error:
            if error.status != 409:
                raise


# Away with it. --------------------------------------------------------------------------------------------------------


async def discard(engine: Engine, task: Task, settings: DeploySettings) -> None:
    """Remove the deployment's container and the image that it built: it has failed, or was cancelled."""
    mine = labels.ours(settings, app_id=task.app_id, deployment_id=task.deployment_id)
    await retire(engine, await engine.containers.list(mine))
    for image in await engine.images.list(mine):
        await remove_image(engine, image)


async def retire(engine: Engine, those: Sequence[dict[str, Any]], *, grace: float = 0.0) -> None:
    """Remove containers (as `list` gives them), those that Traefik sends requests to once it has let go of them.

    Those end by SIGTERM; the others get `grace` seconds before SIGKILL.
    """
    if serving := await _serving(engine, those):
        await _close(engine, serving)
        await asyncio.sleep(LETS_GO)
    await asyncio.gather(*(remove(engine, one["Id"], grace=_GRACE if one["Id"] in serving else grace) for one in those))


async def _serving(engine: Engine, those: Sequence[dict[str, Any]]) -> list[str]:
    """The ids of those that Traefik sends requests to."""
    return [one["Id"] for one in those if gate.is_open(await engine.containers.inspect(one["Id"]))]


async def remove_app(engine: Engine, app_id: int, settings: DeploySettings) -> None:
    """Remove all that an app has at the engine."""
    mine = labels.ours(settings, app_id=app_id)
    await retire(engine, await engine.containers.list(mine))
    for image in await engine.images.list(mine):
        await remove_image(engine, image)


# ----------------------------------------------------------------------------------------------------------------------


def _marks(task: Task, settings: DeploySettings) -> dict[str, str]:
    return labels.ours(settings, app_id=task.app_id, deployment_id=task.deployment_id)


async def _before(engine: Engine, task: Task, settings: DeploySettings) -> list[dict[str, Any]]:
    """The app's containers (as `list` gives them) of deployments before this one: newer ones are another worker's."""
    found = await engine.containers.list(labels.ours(settings, app_id=task.app_id))
    return [one for one in found if 0 <= deployment_of(one) < task.deployment_id]


def deployment_of(found: dict[str, Any]) -> int:
    """The id of the deployment that a container or an image is of; -1 where its label says none."""
    said = (found.get("Labels") or {}).get(marks.DEPLOYMENT, "")
    return int(said) if said.isascii() and said.isdecimal() else -1
