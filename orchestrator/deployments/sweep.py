"""What nobody's deployment looks after: leftovers at the engine, apps that are gone from it, old images, a full disk.

What is looked at is listed before the database is asked what is wanted, so that nothing which was made meanwhile is
taken for a leftover. An app that somebody works on is left alone.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import structlog

from orchestrator.database import Pool
from orchestrator.deployments import building, gate, labels, leases, record, release
from orchestrator.deployments.contract import Image, StepFailed, Task
from orchestrator.deployments.release import deployment_of
from orchestrator.deployments.secrets import Keyring
from orchestrator.docker import labels as marks
from orchestrator.docker.engine import Engine
from orchestrator.errors import EngineRefused, Invalid, NotFound, SecretsUnreadable
from orchestrator.settings import DeploySettings

log = structlog.get_logger("deployments")

# Seconds. A build that is under way has images without a name, too.
_UNNAMED = 3600
# What no build has used for a week is not kept.
_CACHE_AGE = timedelta(days=7)


@dataclass(frozen=True, slots=True)
class Kept:
    """What an app keeps at the engine. `live`: the deployment that serves. `images`: the ids of those to go back to."""

    keep_images: int
    live: int | None
    images: frozenset[str]
    # Somebody works on it, or it waits to be removed.
    busy: bool


async def sweep(engine: Engine, pool: Pool, keys: Keyring, settings: DeploySettings) -> None:
    """Make the engine agree with the database, once. One orchestrator at a time may do this.

    Removes containers and images of apps and deployments that are no more, runs those again that should serve and do
    not run, and prunes images and what was kept for builds. Raises ProviderUnavailable, EngineRefused and what the
    database raises; an app that cannot be run is logged.
    """
    containers = await engine.containers.list(labels.ours(settings))
    images = await engine.images.list(labels.ours(settings))
    apps = await kept(pool)
    await _remove_leftovers(engine, containers, apps)
    await _remove_images(engine, pool, images, apps, settings)
    await building.prune_cache(engine, settings, older=_CACHE_AGE)
    # This may take long, after which the rest would be of no worth.
    there = {deployment_of(found): found for found in containers}
    for app_id, app in apps.items():
        if app.live is not None and not app.busy and await _is_down(engine, there.get(app.live)):
            await _run_again(engine, pool, keys, settings, app_id, app.live)


async def kept(pool: Pool) -> dict[int, Kept]:
    """What each app keeps, by its id."""
    rows = await pool.fetch(
        """SELECT apps.id, (settings ->> 'keep_images')::integer AS keep_images,
                  (SELECT id FROM deployments WHERE app_id = apps.id AND status = 'live') AS live,
                  ARRAY(SELECT image_id FROM deployments WHERE app_id = apps.id AND image_id IS NOT NULL) AS images,
                  deleting OR EXISTS (SELECT FROM deployments WHERE app_id = apps.id AND finished_at IS NULL
                                         AND status <> 'queued') AS busy
             FROM apps"""
    )
    return {
        row["id"]: Kept(row["keep_images"] or 1, row["live"], frozenset(row["images"]), row["busy"]) for row in rows
    }


async def require_room(engine: Engine, settings: DeploySettings) -> None:
    """Raise StepFailed (`DiskFull`) if the engine's disk has too little room for a build.

    An engine on another machine, or one whose folder is not to be seen from here, is not asked.
    """
    folder = (await engine.info()).root_dir
    try:
        if not engine.host.startswith("unix://"):
            raise FileNotFoundError
        disk = await asyncio.to_thread(os.statvfs, folder)
    except OSError:
        log.debug("disk not seen", host=engine.host, folder=folder)
        return
    free = disk.f_bavail * disk.f_frsize
    if free < settings.free_bytes:
        raise StepFailed(
            "DiskFull",
            f"The Docker engine's disk has {_gib(free)} free, and a build needs {_gib(settings.free_bytes)}: ask an"
            " operator to make room.",
        )


async def _remove_leftovers(engine: Engine, containers: list[dict[str, Any]], apps: Mapping[int, Kept]) -> None:
    serving = {deployment_of(found) for found in containers if await _serves(engine, found)}
    leftovers = []
    for found in containers:
        deployment, app = deployment_of(found), apps.get(_app(found))
        if app is not None and (app.busy or deployment == app.live):
            continue
        # What serves is not taken away while the one in its place does not.
        if app is not None and app.live is not None and app.live not in serving and deployment in serving:
            continue
        leftovers.append(found)
    if leftovers:
        log.info("removing leftovers", containers=[found["Names"][0].removeprefix("/") for found in leftovers])
        await release.retire(engine, leftovers)


async def _is_down(engine: Engine, found: dict[str, Any] | None) -> bool:
    """Whether what should serve must be helped: what has crashed and is started again by the engine need not be."""
    if found is None or found["State"] != "running":
        return found is None or found["State"] in ("created", "exited", "dead")
    seen = await engine.containers.inspect(found["Id"])
    return seen is None or not (gate.is_open(seen) or seen["RestartCount"])


async def _serves(engine: Engine, found: dict[str, Any]) -> bool:
    return found["State"] == "running" and gate.is_open(await engine.containers.inspect(found["Id"]))


async def _run_again(
    engine: Engine, pool: Pool, keys: Keyring, settings: DeploySettings, app_id: int, deployment_id: int
) -> None:
    try:
        if not await _is_left_alone(pool, app_id, deployment_id):
            return
        task, image = await _recipe(pool, keys, deployment_id)
        log.warning("running again what does not run", container=task.container)
        container = await release.run(engine, task, image, settings)
        await release.probe(engine, task, container, settings)
        if await _is_left_alone(pool, app_id, deployment_id):
            await release.swap(engine, task, container, settings)
    except (StepFailed, EngineRefused, Invalid, SecretsUnreadable, NotFound) as error:
        log.error("cannot be run again", deployment=deployment_id, error=str(error))


async def _is_left_alone(pool: Pool, app_id: int, deployment_id: int) -> bool:
    """Whether it is live still, and nobody is about to put another in its place."""
    now = (await kept(pool)).get(app_id)
    return now is not None and now.live == deployment_id and not now.busy


async def _recipe(pool: Pool, keys: Keyring, deployment_id: int) -> tuple[Task, Image]:
    async with pool.acquire() as connection:
        deployment = await record.get(connection, deployment_id)
        if deployment is None or not deployment.image or not deployment.image_id:
            raise NotFound(f"Deployment {deployment_id} has no image.")
        settings, secrets = await record.recipe(connection, deployment, keys)
    task = Task(
        app_id=deployment.app_id,
        app_name=deployment.app_name,
        workspace_id=deployment.workspace_id,
        deployment_id=deployment.id,
        number=deployment.number,
        repo_url=deployment.repo_url,
        branch=deployment.branch,
        commit_id=deployment.commit_id,
        settings=settings,
        secrets=secrets,
        directory=Path(os.devnull),
        # Its log was closed when it had gone live; an app's output does not belong into ours.
        say=lambda _: None,
    )
    return task, Image(deployment.image, deployment.image_id)


async def _remove_images(
    engine: Engine, pool: Pool, images: list[dict[str, Any]], apps: Mapping[int, Kept], settings: DeploySettings
) -> None:
    """Remove images of apps that are gone, of deployments that have failed, and those beyond what an app keeps."""
    long_ago = time.time() - _UNNAMED
    wanted: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for image in images:
        app = apps.get(_app(image))
        unnamed = not any(name != "<none>:<none>" for name in image.get("RepoTags") or [])
        if app is None or (image["Created"] < long_ago if unnamed else not app.busy and image["Id"] not in app.images):
            await release.remove_image(engine, image)
        elif not app.busy:
            wanted[_app(image)].append(image)
    for app_id, found in wanted.items():
        app = apps[app_id]
        if await release.prune(engine, found, app.keep_images, {app.live} if app.live else set()):
            there = {image["Id"] for image in await engine.images.list(labels.ours(settings, app_id=app_id))}
            async with pool.acquire() as connection:
                await leases.forget_images(connection, app_id, there)


def _app(found: Mapping[str, Any]) -> int:
    said = (found.get("Labels") or {}).get(marks.APP, "")
    return int(said) if said.isascii() and said.isdecimal() else -1


def _gib(count: int) -> str:
    return f"{count / (1 << 30):.1f} GiB"
