"""The namespaces of sessions: made, known as ours by their labels, and gone when a delete returns.

A namespace that is not ours is never changed: whoever made it may have all sorts of things in there.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping

import msgspec

from orchestrator.cluster.client import Cluster
from orchestrator.cluster.objects import INSTANCE, PROJECT, SESSION, Meta, Namespace, Partial
from orchestrator.errors import ApiRefused, ProviderFailure
from orchestrator.providers.contract import Report, SessionRef
from orchestrator.providers.options import KubernetesOptions

# Seconds between two looks at what is to go away.
POLL_INTERVAL = 0.5
_NAMESPACES = "/api/v1/namespaces"
# What a terminating namespace still holds, as its conditions tell it: `pods. has 2 resource instances`.
_REMAINING = re.compile(r"([a-z0-9-]+)\.([a-z0-9.-]*) has \d+ resource instances")
# Of what holds a namespace, so many are named.
_MOST_NAMED = 5


class _GroupVersion(msgspec.Struct, rename="camel", frozen=True):
    group_version: str = ""


class _Group(msgspec.Struct, rename="camel", frozen=True):
    """What the API says of a group: `/apis/{name}`."""

    preferred_version: _GroupVersion = _GroupVersion()


class Namespaces:
    """Those of one cluster that belong to one installation."""

    def __init__(self, cluster: Cluster, options: KubernetesOptions) -> None:
        self._cluster = cluster
        self._options = options

    def ours(self, namespace: Namespace) -> bool:
        """Whether this installation made it, for the project that it is named after."""
        labels = namespace.metadata.labels
        return labels.get(INSTANCE) == self._options.instance and labels.get(PROJECT) == namespace.metadata.name

    async def get(self, ref: SessionRef) -> Namespace | None:
        """The session's namespace if there is one, whosever it is."""
        try:
            return await self._cluster.get(f"{_NAMESPACES}/{ref.namespace}", Namespace)
        except ApiRefused as error:
            if error.status != 404:
                raise
            return None

    async def owned(self, ref: SessionRef) -> Namespace | None:
        """The session's namespace if there is one and it is ours."""
        found = await self.get(ref)
        return found if found is not None and self.ours(found) else None

    async def claim(self, ref: SessionRef, report: Report) -> Namespace:
        """The session's namespace: made, or verified to be ours. One that is going away is waited for.

        Raises ProviderFailure: `NamespaceTaken`, `NamespaceTerminating`.
        """
        while True:
            found = await self.get(ref)
            if found is None:
                try:
                    body = {"metadata": {"name": ref.namespace, "labels": self._labels(ref)}}
                    return await self._cluster.create(_NAMESPACES, body, Namespace)
                except ApiRefused as error:
                    if error.reason != "AlreadyExists":
                        raise
                    continue
            if not self.ours(found):
                raise ProviderFailure(
                    "NamespaceTaken",
                    f"The namespace {ref.namespace} is there already and does not belong to this Cluster Code"
                    f" (instance {self._options.instance!r}): remove it, or let an operator label it, and start again.",
                )
            if found.metadata.deletion_timestamp is None:
                return await self._label(found, ref)
            await report("NamespaceTerminating", "Waiting until what was there before is deleted.")
            await self._gone(found)

    async def annotate(self, ref: SessionRef, annotations: Mapping[str, str | None]) -> None:
        """Set annotations; None removes one."""
        await self._cluster.patch(
            f"{_NAMESPACES}/{ref.namespace}", {"metadata": {"annotations": dict(annotations)}}, Namespace
        )

    async def delete(self, namespace: Namespace) -> None:
        """Delete a namespace of ours, and return when it is gone.

        Raises ProviderFailure (`DeleteBlocked`), naming what holds it, when it is not gone by the deadline.
        """
        if namespace.metadata.deletion_timestamp is None:
            try:
                await self._cluster.delete(
                    f"{_NAMESPACES}/{namespace.metadata.name}", preconditions={"uid": namespace.metadata.uid}
                )
            except ApiRefused as error:
                # 409: it is going already, or is another one by now, which `_gone` sees.
                if error.status not in (404, 409):
                    raise
        await self._gone(namespace)

    def _labels(self, ref: SessionRef) -> dict[str, str]:
        return {
            INSTANCE: self._options.instance,
            PROJECT: ref.namespace,
            SESSION: str(ref.session_id),
            "pod-security.kubernetes.io/enforce": self._options.pod_security,
        }

    async def _label(self, namespace: Namespace, ref: SessionRef) -> Namespace:
        labels = self._labels(ref)
        if labels.items() <= namespace.metadata.labels.items():
            return namespace
        return await self._cluster.patch(f"{_NAMESPACES}/{ref.namespace}", {"metadata": {"labels": labels}}, Namespace)

    async def _gone(self, namespace: Namespace) -> None:
        """Return when the namespace is gone, also when there is another of its name."""
        name, last = namespace.metadata.name, namespace
        try:
            async with asyncio.timeout(self._options.delete_deadline) as timer:
                while True:
                    try:
                        last = await self._cluster.get(f"{_NAMESPACES}/{name}", Namespace)
                    except ApiRefused as error:
                        if error.status != 404:
                            raise
                        return
                    if last.metadata.uid != namespace.metadata.uid:
                        return
                    await asyncio.sleep(POLL_INTERVAL)
        except TimeoutError:
            if not timer.expired():
                raise
        held = await self._held(last)
        raise ProviderFailure(
            "DeleteBlocked",
            f"The namespace {name} is not gone after {self._options.delete_deadline:.0f} seconds: {held}",
        )

    async def _held(self, namespace: Namespace) -> str:
        """What keeps a namespace from going away, and what to do about it."""
        messages = {one.type: one.message for one in namespace.status.conditions if one.status == "True"}
        for broken in ("NamespaceDeletionDiscoveryFailure", "NamespaceDeletionGroupVersionParsingFailure"):
            if broken in messages:
                return f"{messages[broken]} Have an operator mend or remove that API."
        held: list[str] = []
        for plural, group in _REMAINING.findall(messages.get("NamespaceContentRemaining", "")):
            held += await self._objects(namespace.metadata.name, plural, group)
        held += [f"itself (finalizer {one})" for one in namespace.metadata.finalizers]
        if held:
            more = f" and {len(held) - _MOST_NAMED} more" if len(held) > _MOST_NAMED else ""
            mend = (
                "Find out why what set the finalizers does not remove them; an operator can by hand."
                if any("finalizer" in one for one in held)
                else "See whether their node is well."
            )
            return f"it waits for {', '.join(held[:_MOST_NAMED])}{more}. {mend}"
        told = messages.get("NamespaceFinalizersRemaining") or messages.get("NamespaceContentRemaining")
        return told or messages.get("NamespaceDeletionContentFailure") or "Kubernetes does not say why."

    async def _objects(self, namespace: str, plural: str, group: str) -> list[str]:
        """The objects of a kind that are left in a namespace, with their finalizers."""
        try:
            if group:
                found = await self._cluster.get(f"/apis/{group}", _Group)
                place = f"/apis/{found.preferred_version.group_version}"
            else:
                place = "/api/v1"
            path = f"{place}/namespaces/{namespace}/{plural}"
            objects = [one async for page in self._cluster.list(path, Partial, limit=100) for one in page.items]
        except ApiRefused:
            # The one who may not look at them is told what the namespace's conditions say.
            return []
        return [f"{plural}/{one.metadata.name}{_finalizers(one.metadata)}" for one in objects]


def _finalizers(metadata: Meta) -> str:
    names = metadata.finalizers
    if not names:
        return ""
    return f" (finalizer{'s' if len(names) > 1 else ''} {', '.join(names)})"
