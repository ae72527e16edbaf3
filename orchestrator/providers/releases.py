"""The Helm release of a session: which values are applied, which revision was good, and the way back to it.

Two annotations of the namespace say it, so that any orchestrator can go on from there: the digest of what is applied
(none while that changes), and the revision that was last seen ready with the digest of it.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import orjson
import structlog
import yaml

from orchestrator.cluster.client import Cluster
from orchestrator.cluster.helm import DeploymentBroken, Helm, ReleaseBroken
from orchestrator.cluster.objects import Namespace, Partial
from orchestrator.errors import ApiRefused, ProviderFailure
from orchestrator.providers.contract import Report, SessionRef
from orchestrator.providers.namespaces import POLL_INTERVAL, Namespaces

log = structlog.get_logger("provider.kubernetes")

APPLIED = "cluster-code.io/applied"
GOOD = "cluster-code.io/good"
# Seconds that one call of helm may take: it waits for no pod, but for hooks.
_HELM_DEADLINE = 300.0
# Seconds that the pods of a Deployment that is made anew may take to end.
_DROP_DEADLINE = 120.0


@dataclass(frozen=True, slots=True)
class Chart:
    """Which chart: a directory or an archive here, `oci://…` or `repository/name`; and the digest of what is in it."""

    ref: str
    version: str | None
    digest: str


def find_chart(ref: str, version: str | None) -> Chart:
    """A chart, and for one that is here what tells it from its next version. Reads it all, which blocks.

    Raises ProviderFailure (`ChartMissing`).
    """
    path = Path(ref).absolute()
    if "://" in ref or not (Path(ref).is_absolute() or path.exists()):
        return Chart(ref, version, "")
    try:
        return Chart(str(path), None, _digest(path))
    except OSError as error:
        raise ProviderFailure(
            "ChartMissing",
            f"The chart {ref} cannot be read ({error.strerror}): have an operator set the provider's option `chart`.",
        ) from error


def _digest(path: Path) -> str:
    files = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        content = file.read_bytes()
        digest.update(f"{file.relative_to(path)}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class _Record:
    """The Secret that Helm keeps one revision in."""

    name: str
    revision: int
    status: str


class Releases:
    """Those of the sessions of one cluster."""

    def __init__(self, cluster: Cluster, helm: Helm, namespaces: Namespaces) -> None:
        self._cluster = cluster
        self._helm = helm
        self._namespaces = namespaces

    def wanted(self, chart: Chart, values: Mapping[str, Any]) -> str:
        """The digest of a chart with its values."""
        said = orjson.dumps([chart.ref, chart.version, chart.digest, values], option=orjson.OPT_SORT_KEYS)
        return hashlib.sha256(said).hexdigest()[:32]

    async def deploy(
        self, ref: SessionRef, namespace: Namespace, chart: Chart, values: Mapping[str, Any], report: Report
    ) -> bool:
        """Apply the chart with these values, unless they are; whether that changed anything.

        What a crash has left of an earlier call, and what was taken away by hand, is put right. Raises what
        `Helm.upgrade` does, but ReleaseBroken.
        """
        wanted = self.wanted(chart, values)
        applied = namespace.metadata.annotations.get(APPLIED)
        records = await self._records(ref)
        if applied == wanted and records and records[-1].status == "deployed" and await self._whole(ref):
            return False
        await report("Deploying", f"{'Changing' if records else 'Installing'} the session's chart.")
        if applied is not None:
            await self._namespaces.annotate(ref, {APPLIED: None})
        await self._forget(ref, [one for one in records if one.status.startswith("pending-")])
        await self._upgrade(ref, chart, orjson.dumps(values))
        await self._namespaces.annotate(ref, {APPLIED: wanted})
        return True

    async def settle(self, ref: SessionRef, namespace: Namespace, wanted: str) -> None:
        """Note that what is deployed now has been seen ready, as what to go back to."""
        records = await self._records(ref)
        good = f"{records[-1].revision} {wanted}" if records else None
        if namespace.metadata.annotations.get(GOOD) != good:
            await self._namespaces.annotate(ref, {APPLIED: wanted, GOOD: good})

    def way_back(self, namespace: Namespace, wanted: str) -> tuple[int, str] | None:
        """The revision that ran before something else was wanted, and its digest."""
        revision, _, digest = namespace.metadata.annotations.get(GOOD, "").partition(" ")
        return (int(revision), digest) if revision.isdecimal() and digest not in ("", wanted) else None

    async def roll_back(self, ref: SessionRef, revision: int, chart: Chart) -> None:
        """Go back to a revision; does not wait for pods. Raises what `deploy` does.

        `chart` is the one to go back with where Helm cannot: a volume that has grown, for one, never shrinks again.
        """
        await self._namespaces.annotate(ref, {APPLIED: None})
        await self._forget(ref, [one for one in await self._records(ref) if one.status.startswith("pending-")])
        place = ref.container_name, ref.namespace
        try:
            await self._helm.rollback(*place, revision, deadline=_HELM_DEADLINE)
        except (ReleaseBroken, ProviderFailure) as error:
            log.warning("helm cannot roll back; applying the values of then", session=ref.session_id, error=str(error))
            try:
                values = await self._helm.values(*place, revision, deadline=_HELM_DEADLINE)
            except ReleaseBroken as gone:
                raise ProviderFailure("HelmFailed", f"{gone}.") from gone
            await self._upgrade(ref, chart, values)

    async def _upgrade(self, ref: SessionRef, chart: Chart, values: bytes) -> None:
        """Have helm apply the values, once more without what it stumbles over."""
        place = ref.container_name, ref.namespace, chart.ref, chart.version, values
        try:
            await self._helm.upgrade(*place, deadline=_HELM_DEADLINE)
            return
        except ReleaseBroken as error:
            log.warning("helm cannot go on from what is there", session=ref.session_id, error=str(error))
            if not isinstance(error, DeploymentBroken):
                # Revisions are counted from one again: what was good would be taken for another.
                await self._namespaces.annotate(ref, {GOOD: None})
                await self._forget(ref, await self._records(ref))
            # A change that is merged into what nobody remembers may not be valid. A session has no pod to lose now.
            await self._drop_deployment(ref)
        try:
            await self._helm.upgrade(*place, deadline=_HELM_DEADLINE)
        except ReleaseBroken as error:
            raise ProviderFailure("HelmFailed", f"{error}.") from error

    async def uninstall(self, ref: SessionRef) -> None:
        """Remove the release if there is one. Records that are of no use are left to the namespace's deletion."""
        if not await self._records(ref):
            return
        try:
            await self._helm.uninstall(ref.container_name, ref.namespace, deadline=_HELM_DEADLINE)
        except (ReleaseBroken, ProviderFailure) as error:
            log.warning(
                "release not uninstalled; its namespace takes it along", session=ref.session_id, error=str(error)
            )

    async def _whole(self, ref: SessionRef) -> bool:
        """Whether all objects of the release are there."""
        try:
            manifest = await self._helm.manifest(ref.container_name, ref.namespace, deadline=_HELM_DEADLINE)
        except (ReleaseBroken, ProviderFailure):
            return False
        for path in await asyncio.to_thread(_paths, manifest, ref.namespace):
            if not await self._there(path):
                return False
        return True

    async def _there(self, path: str) -> bool:
        try:
            await self._cluster.get(path, Partial)
        except ApiRefused as error:
            if error.status != 404:
                raise
            return False
        return True

    async def _records(self, ref: SessionRef) -> list[_Record]:
        """What Helm keeps of the release, oldest first."""
        path = f"/api/v1/namespaces/{ref.namespace}/secrets"
        selector = f"owner=helm,name={ref.container_name}"
        found = []
        async for page in self._cluster.list(path, Partial, label_selector=selector):
            for secret in page.items:
                labels = secret.metadata.labels
                found.append(_Record(secret.metadata.name, int(labels.get("version", "0")), labels.get("status", "")))
        return sorted(found, key=lambda one: one.revision)

    async def _forget(self, ref: SessionRef, records: list[_Record]) -> None:
        """Take records away; helm takes over the objects themselves, which carry the release's name."""
        for one in records:
            log.warning(
                "forgetting a broken revision", session=ref.session_id, revision=one.revision, status=one.status
            )
            await self._drop(f"/api/v1/namespaces/{ref.namespace}/secrets/{one.name}")

    async def _drop_deployment(self, ref: SessionRef) -> None:
        """Delete the Deployment, and return when its pods are gone, too: they count against the quota."""
        await self._drop(_deployment(ref), propagation="Foreground")
        try:
            async with asyncio.timeout(_DROP_DEADLINE) as timer:
                while True:
                    if not await self._there(_deployment(ref)):
                        return
                    await asyncio.sleep(POLL_INTERVAL)
        except TimeoutError:
            if not timer.expired():
                raise
        raise ProviderFailure(
            "StopTimeout",
            f"The pods of {ref.container_name} have not ended within {_DROP_DEADLINE:.0f} seconds: see whether their"
            " node is well, and start again.",
        )

    async def _drop(self, path: str, *, propagation: Literal["Background", "Foreground"] = "Background") -> None:
        try:
            await self._cluster.delete(path, propagation=propagation)
        except ApiRefused as error:
            if error.status != 404:
                raise


def _deployment(ref: SessionRef) -> str:
    return f"/apis/apps/v1/namespaces/{ref.namespace}/deployments/{ref.container_name}"


def _paths(manifest: bytes, namespace: str) -> list[str]:
    """Where the API has the objects of a manifest; one that is not in the namespace counts as missing."""
    things = [thing for one in yaml.safe_load_all(manifest) if one for thing in one.get("items", [one])]
    return [_path(thing, namespace) for thing in things]


def _path(thing: Mapping[str, Any], namespace: str) -> str:
    version, kind = thing["apiVersion"], thing["kind"].lower()
    # As Kubernetes' own kinds and nearly all others are called. Of the rest the release is applied once more.
    plural = f"{kind[:-1]}ies" if kind.endswith("y") else f"{kind}es" if kind.endswith("s") else f"{kind}s"
    place = f"apis/{version}" if "/" in version else f"api/{version}"
    return f"/{place}/namespaces/{namespace}/{plural}/{thing['metadata']['name']}"
