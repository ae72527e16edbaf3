"""The Kubernetes cluster that this machine's settings lead to: what `dev` makes of it, and what the demonstration asks.

There is one where KUBECONFIG is set, and in a pod. What only it needs is imported only then: the client is large.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec
import structlog

from orchestrator import machine_import, machines
from orchestrator.database import UNAVAILABLE, Connection, Pool, backoff
from orchestrator.errors import ApiRefused, ClusterCodeError, ProviderUnavailable
from scripts import examples

if TYPE_CHECKING:
    from orchestrator.cluster.client import Cluster

log = structlog.get_logger("dev.cluster")

PROVIDER = "kubernetes"
_FILE = "kubernetes.yaml"
_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
# Seconds between two attempts to ask the cluster, at most.
_PATIENCE = 10.0
_AWAY: tuple[type[BaseException], ...] = (*UNAVAILABLE, ProviderUnavailable)


class _Image(msgspec.Struct):
    names: list[str] | None = None


class _NodeSpec(msgspec.Struct):
    unschedulable: bool = False


class _NodeStatus(msgspec.Struct):
    images: list[_Image] | None = None


class _Node(msgspec.Struct):
    spec: _NodeSpec = msgspec.field(default_factory=_NodeSpec)
    status: _NodeStatus = msgspec.field(default_factory=_NodeStatus)


def configured() -> bool:
    """Whether there is a way to a cluster: a KUBECONFIG, or a pod's service account."""
    return bool(os.environ.get("KUBECONFIG")) or ("KUBERNETES_SERVICE_HOST" in os.environ and _ACCOUNT.exists())


def reached(options: Mapping[str, Any] | None = None) -> Cluster:
    """The cluster that a provider with these options has, or one with none; to be closed. Raises SettingsError."""
    from orchestrator.cluster import access
    from orchestrator.cluster.client import Cluster
    from orchestrator.providers.options import KubernetesOptions

    known = KubernetesOptions.load(options or {})
    way = access.find(known.kubeconfig, known.context, known.in_cluster)
    return Cluster(way, name=PROVIDER, timeout=known.request_timeout)


async def gone(cluster: Cluster, namespace: str) -> bool:
    """Whether the cluster has no such namespace. Raises ProviderUnavailable, ApiRefused."""
    from orchestrator.cluster.objects import Namespace

    try:
        await cluster.get(f"/api/v1/namespaces/{namespace}", Namespace)
    except ApiRefused as error:
        if error.status == HTTPStatus.NOT_FOUND:
            return True
        raise
    return False


async def page(cluster: Cluster, url: str) -> str:
    """What a URL within the cluster (`http://SERVICE.NAMESPACE.svc:PORT/PATH`) answers, by way of the API server.

    Raises ProviderUnavailable, ApiRefused.
    """
    parts = urlsplit(url)
    service, namespace = (parts.hostname or "").split(".")[:2]
    path = f"/api/v1/namespaces/{namespace}/services/{service}:{parts.port or 80}/proxy{parts.path.rstrip('/')}/"
    return (await cluster.read(path)).decode(errors="replace")


async def import_provider(connection: Connection, image: str) -> None:
    """Add the provider and its machine config, unless there is one of that name.

    `image`: what KUBERNETES_DEMO_IMAGE says; empty: the file's own, until `fit_image` has asked the cluster.
    """
    await examples.import_provider(connection, PROVIDER, examples.read(_FILE, image))


async def fit_image(pool: Pool, image: str, asked: asyncio.Event | None = None) -> None:
    """Have the machine config of the demonstration run `image`, or, when that is empty, what the nodes hold already.

    So it works without a registry, too. Waits for the cluster, however long that takes; returns when there is nothing
    more to do. What somebody else has changed about the machine config stays as it is. `asked` is set when the cluster
    has been tried once.
    """
    failures = 0
    while True:
        try:
            await _fit(pool, image)
            return
        except _AWAY as error:
            failures += 1
            if asked is not None:
                asked.set()
            log.debug("the images of the nodes are not known yet", error=str(error) or type(error).__name__)
            await asyncio.sleep(backoff(failures, cap=_PATIENCE))
        except ClusterCodeError as error:
            log.warning("the image of the demonstration stays as it is", error=str(error))
            return


async def _fit(pool: Pool, image: str) -> None:
    async with pool.acquire() as connection:
        row = next((row for row in await machines.providers(connection) if row.name == PROVIDER), None)
        current = await _current(connection)
    if row is None or current is None:
        log.info("the demonstration's machine config was changed, or removed: it stays so")
        return
    default = _image(examples.read(_FILE))
    why = "KUBERNETES_DEMO_IMAGE"
    if not image and current == default:
        image, why = await _held(row.options), "the nodes hold it already"
    if not image or image == current:
        log.info("the demonstration's machine config runs", image=current)
        return
    async with pool.acquire() as connection, connection.transaction():
        if await _current(connection) == current:
            await machine_import.apply(connection, replace(examples.read(_FILE, image), providers=()))
            log.info("the demonstration's machine config runs", image=image, why=why)


async def _current(connection: Connection) -> str | None:
    """The image that our machine config has now; None when it is gone, or more of it was changed than the image."""
    wanted = examples.read(_FILE)
    names = {entry["name"] for entry in wanted.machine_configs}
    images = {
        service.get("image", "")
        for config in await machines.machine_configs(connection)
        if config.name in names
        for service in config.services.values()
    }
    if len(images) != 1:
        return None
    (image,) = images
    changes = await machine_import.plan(connection, replace(examples.read(_FILE, image), providers=()))
    return image if all(change.action == "unchanged" for change in changes) else None


async def _held(options: Mapping[str, Any]) -> str:
    """A busybox that all nodes hold, by a name with a tag; "" when there is none, or we may not ask."""
    nodes = 0
    found: Counter[str] = Counter()
    async with reached(options) as cluster:
        try:
            async for page in cluster.list("/api/v1/nodes", _Node):
                for node in page.items:
                    if not node.spec.unschedulable:
                        nodes += 1
                        found.update({name for image in node.status.images or () for name in image.names or ()})
        except ApiRefused as error:
            log.info("the images of the nodes are not for us to know", reason=error.reason)
            return ""
    suitable = sorted(name for name, count in found.items() if count == nodes and examples.is_busybox(name))
    default = _image(examples.read(_FILE))
    return default if default in suitable else next(iter(suitable), "")


def _image(wanted: machine_import.Import) -> str:
    return str(next(iter(wanted.machine_configs[0]["services"].values()))["image"])
