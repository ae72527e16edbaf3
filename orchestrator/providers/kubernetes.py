"""Sessions in a Kubernetes cluster: a namespace, a Secret, a Helm release and a rollout each.

Every step looks at what is there and goes on from it, so that a call that was cancelled, or an orchestrator that was
killed, leaves nothing that the next call cannot take up. What happens by itself afterwards is the bridge's to see
(`orchestrator.bridge`), which watches the whole cluster; `watch` here says nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
import sys
from base64 import b64encode
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar

import orjson
import structlog

from orchestrator.children import launch
from orchestrator.cluster import access
from orchestrator.cluster.client import Cluster, Page
from orchestrator.cluster.helm import Helm
from orchestrator.cluster.objects import (
    INSTANCE,
    PROJECT,
    SESSION,
    Claim,
    Deployment,
    Event,
    Ingress,
    Namespace,
    Partial,
    Pod,
    Service,
)
from orchestrator.errors import ApiRefused, ProviderFailure, ProviderUnavailable
from orchestrator.machine_kinds import SERVICES
from orchestrator.providers.chart_values import values_of
from orchestrator.providers.contract import (
    Endpoints,
    Observation,
    Report,
    RolledBack,
    SessionRef,
    SessionSpec,
    State,
)
from orchestrator.providers.diagnosis import Evidence, Rules, api_failure, crashed, diagnose
from orchestrator.providers.endpoints import endpoints_of
from orchestrator.providers.kubeconfig import PrivateKubeconfig
from orchestrator.providers.namespaces import POLL_INTERVAL, Namespaces
from orchestrator.providers.options import KubernetesOptions
from orchestrator.providers.releases import Chart, Releases, find_chart

log = structlog.get_logger("provider.kubernetes")

T = TypeVar("T")

CHART = Path(__file__).parents[2] / "charts" / "dev-session-template"
# Seconds between two looks at a rollout.
ROLLOUT_INTERVAL = 1.0
# Seconds that a start may take whose caller names no deadline; and how much later than a caller's ours is.
_START_DEADLINE = 3600.0
_LATER = 60.0
# Of the seconds that a start has, so many at most are kept for going back to what ran before.
_WAY_BACK = 60.0
# Times that a session may be taken away by others while it starts.
_ROUNDS = 5
# Seconds that found permissions are taken to stay.
_PERMITTED_FOR = 600.0
# Permissions asked for at the same time: far away each takes long.
_QUESTIONS = 8
# Of the output of a container that crashed.
_LAST_LINES = 20

# What the Secret with the environment is labelled with.
_COMPONENT = "app.kubernetes.io/component"
# What we, and helm on our behalf, ask of the cluster: `(verb, group, resource)`, in any namespace.
_NEEDED = (
    *(("create", "", one) for one in ("namespaces", "secrets", "services", "persistentvolumeclaims")),
    *(("create", "", one) for one in ("resourcequotas", "limitranges", "pods/exec")),
    *(("get", "", "namespaces"), ("patch", "", "namespaces"), ("delete", "", "namespaces")),
    *(("list", "", "secrets"), ("update", "", "secrets"), ("delete", "", "secrets"), ("get", "", "pods/log")),
    *(("list", "", one) for one in ("pods", "events", "services", "persistentvolumeclaims")),
    *(("watch", "", one) for one in ("pods", "events", "namespaces")),
    *((verb, "apps", "deployments") for verb in ("create", "get", "patch", "watch")),
    ("patch", "apps", "deployments/scale"),
    *((verb, "networking.k8s.io", "ingresses") for verb in ("create", "list", "watch")),
    ("create", "networking.k8s.io", "networkpolicies"),
)


class KubernetesProvider:
    """`Provider` by one cluster. `cluster` and `options` are the bridge's, too.

    `kubeconfig`: what one says, in place of the options' way in.
    """

    def __init__(self, name: str, options: KubernetesOptions, kubeconfig: str | None = None) -> None:
        self._kubeconfig = PrivateKubeconfig(kubeconfig) if kubeconfig is not None else None
        if self._kubeconfig is not None:
            options = replace(options, kubeconfig=self._kubeconfig.path)
        self.options = options
        way_in = access.find(options.kubeconfig, options.context, options.in_cluster)
        self.cluster = Cluster(way_in, name=name, timeout=options.request_timeout)
        self.rules = Rules(
            transient_reasons=frozenset(options.transient_reasons),
            transient_grace=options.transient_grace,
            progress_deadline=options.progress_deadline,
            instance=options.instance,
        )
        self._name = name
        self._helm = Helm(
            program=options.helm,
            launcher=(sys.executable, "-I", "-S", launch.__file__, f"parent={os.getpid()}", "--"),
            kubeconfig=options.kubeconfig,
            context=options.context,
            in_cluster=way_in.in_cluster,
        )
        self._namespaces = Namespaces(self.cluster, options)
        self._releases = Releases(self.cluster, self._helm, self._namespaces)
        self._calls: set[asyncio.Timeout] = set()
        self._closed = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._permitted_at: float | None = None

    async def check(self) -> str:
        """See `Provider`: the API answers, helm is there, and both may do what sessions need."""
        async with self._call("look at the cluster", 60.0):
            version = await self.cluster.version()
            helm = await self._helm.check()
            try:
                await self._chart({})
            except ProviderFailure as error:
                raise ProviderUnavailable(str(error)) from error
            if self._permitted_at is None or monotonic() > self._permitted_at + _PERMITTED_FOR:
                await self._permissions()
                self._permitted_at = monotonic()
        return f"Kubernetes {version.git_version}, by Helm {helm[0]}.{helm[1]}"

    async def start(self, spec: SessionSpec, report: Report) -> Endpoints:
        """See `Provider`. Cancelling leaves what is there already; the next start goes on from it, a stop ends it."""
        deadline = _START_DEADLINE if spec.deadline is None else spec.deadline + _LATER
        async with self._call("start the session", deadline):
            return await self._start(spec, report)

    async def stop(self, ref: SessionRef) -> None:
        """See `Provider`: returns when no pod is left. The volume stays."""
        async with self._call("stop the session", self.options.stop_deadline * 2):
            if await self._namespaces.owned(ref) is not None:
                # Without a Deployment, too: its pods may be there yet.
                await self._scale(ref, 0)
                await self._ended(ref)

    async def delete(self, ref: SessionRef) -> None:
        """See `Provider`: uninstalls the release and deletes the namespace, whoever put what into it."""
        async with self._call("delete the session", self.options.delete_deadline * 2 + 300.0):
            namespace = await self._namespaces.owned(ref)
            if namespace is None:
                return
            if namespace.metadata.deletion_timestamp is None:
                await self._releases.uninstall(ref)
            await self._namespaces.delete(namespace)

    async def inspect(self, ref: SessionRef) -> Observation:
        """See `Provider`."""
        async with self._call("inspect the session", 60.0):
            seen = await self._look(ref)
            return replace(seen, endpoints=await self._endpoints(ref)) if seen.state is State.RUNNING else seen

    async def exec(self, ref: SessionRef, argv: Sequence[str]) -> tuple[int, bytes]:
        """See `Provider`: in the first container that runs, of preview, chat and vscode.

        Raises ProviderFailure (`NotRunning`, `ExecTimeout`). Cancelling ends the connection; Kubernetes leaves it to
        the command whether it goes on without one.
        """
        async with self._call("run a command in the session", self.options.exec_deadline * 2):
            pod, container = await self._running(ref)
            try:
                async with asyncio.timeout(self.options.exec_deadline) as timer:
                    return await self.cluster.exec(ref.namespace, pod, container, argv, deadline=_START_DEADLINE)
            except TimeoutError:
                if not timer.expired():
                    raise
                seconds = self.options.exec_deadline
                raise ProviderFailure("ExecTimeout", f"The command did not end within {seconds:.0f} seconds.") from None

    async def endpoints(self, ref: SessionRef) -> Endpoints:
        """Where the session is reached, from its Services and Ingresses as they are."""
        async with self._call("look at the session's services", 60.0):
            return await self._endpoints(ref)

    async def watch(self) -> AsyncIterator[tuple[SessionRef, Observation]]:
        """See `Provider`. Says nothing: the bridge watches for all sessions at once. Ends by `close`."""
        await self._closed.wait()
        nothing: tuple[tuple[SessionRef, Observation], ...] = ()
        for one in nothing:
            yield one

    async def close(self) -> None:
        """End what is under way, and the connections. Sessions run on. Idempotent."""
        self._closed.set()
        for timer in self._calls:
            # One that is ending already cannot be told to.
            if not timer.expired():
                timer.reschedule(asyncio.get_running_loop().time())
        await self._idle.wait()
        await self.cluster.close()
        if self._kubeconfig is not None:
            self._kubeconfig.close()

    @asynccontextmanager
    async def _call(self, doing: str, deadline: float) -> AsyncIterator[None]:
        """A call, bounded by `deadline` seconds and by `close`, with the API's refusals in the user's words."""
        if self._closed.is_set():
            raise ProviderUnavailable(f"The provider {self._name!r} is closed.")
        timer = asyncio.timeout(deadline)
        self._calls.add(timer)
        self._idle.clear()
        try:
            async with timer:
                yield
        except TimeoutError:
            if not timer.expired():
                raise
            why = "the provider is being closed" if self._closed.is_set() else f"not within {deadline:.0f} seconds"
            raise ProviderUnavailable(f"The cluster could not {doing}: {why}.") from None
        except ApiRefused as error:
            raise api_failure(error, doing) from error
        finally:
            self._calls.discard(timer)
            if not self._calls:
                self._idle.set()

    async def _start(self, spec: SessionSpec, report: Report) -> Endpoints:
        ref, began, heard = spec.ref, monotonic(), ""

        async def told(reason: str, message: str) -> None:
            nonlocal heard
            heard = message
            await report(reason, message)

        for _ in range(_ROUNDS):
            namespace = await self._namespaces.claim(ref, told)
            chart = await self._chart(spec.machine.options)
            secret = await self._put_environment(spec, namespace)
            values = values_of(spec, self.options, secret)
            wanted = self._releases.wanted(chart, values)
            patience = None
            if spec.deadline is not None and self._releases.way_back(namespace, wanted) is not None:
                patience = max(spec.deadline - min(_WAY_BACK, spec.deadline / 3) - (monotonic() - began), 0.0)
            try:
                async with asyncio.timeout(patience) as timer:
                    changed = await self._releases.deploy(ref, namespace, chart, values, told)
                    running = await self._bring_up(ref, told)
            except (ProviderFailure, ApiRefused, TimeoutError) as error:
                if isinstance(error, TimeoutError) and not timer.expired():
                    raise
                failure = _failure_of(error, monotonic() - began, heard)
                # As it is by now: what was good may have been lost on the way.
                there = await self._namespaces.owned(ref)
                way_back = self._releases.way_back(there, wanted) if there is not None else None
                if way_back is None or not isinstance(failure, ProviderFailure):
                    raise failure from error
                raise await self._roll_back(ref, *way_back, chart, failure, report) from error
            if running:
                await self._releases.settle(ref, namespace, wanted)
                if changed:
                    await self._drop_environments(ref, but=secret)
                return await self._endpoints(ref)
            await told("Deploying", "The session was deleted or stopped by hand while it started: starting it anew.")
            await asyncio.sleep(ROLLOUT_INTERVAL)
        raise ProviderFailure(
            "TakenAway",
            f"The session was taken away again and again while it started ({_ROUNDS} times): find out who deletes or"
            f" stops it. A chart other than ours must make a Deployment named {ref.container_name}.",
        )

    async def _chart(self, machine: Mapping[str, Any]) -> Chart:
        """The chart that the options of a machine config name, or else the provider's."""
        ref = machine.get("chart") or self.options.chart or str(CHART)
        version = machine.get("chart_version") or self.options.chart_version
        return await asyncio.to_thread(find_chart, ref, version)

    async def _bring_up(self, ref: SessionRef, report: Report) -> bool:
        """Scale up and wait until the session is ready; False: somebody has taken it away meanwhile.

        Raises ProviderFailure with what keeps it from running.
        """
        if not await self._scale(ref, 1):
            return False
        told: tuple[str, str] | None = None
        while True:
            seen = await self._look(ref)
            if seen.state is State.RUNNING:
                return True
            if seen.state is State.FAILED:
                raise ProviderFailure(seen.reason, seen.message)
            if seen.state is not State.STARTING:
                return False
            if told != (told := (seen.reason, seen.message)):
                await report(*told)
            await asyncio.sleep(ROLLOUT_INTERVAL)

    async def _roll_back(
        self, ref: SessionRef, revision: int, digest: str, chart: Chart, failure: ProviderFailure, report: Report
    ) -> ProviderFailure:
        """Go back to a revision that was good, and wait for it: what to tell of it all."""
        log.warning("rolling back", session=ref.session_id, revision=revision, reason=failure.reason)
        await report("RollingBack", f"{failure} Going back to what ran before.")
        try:
            await self._releases.roll_back(ref, revision, chart)
            running = await self._bring_up(ref, report)
        except (ProviderFailure, ApiRefused) as error:
            return ProviderFailure(failure.reason, f"{failure} Going back to what ran before failed, too: {error}")
        namespace = await self._namespaces.owned(ref)
        if not running or namespace is None:
            return failure
        await self._releases.settle(ref, namespace, digest)
        return RolledBack(f"{failure} The session runs on as it was before the change.", await self._endpoints(ref))

    async def _put_environment(self, spec: SessionSpec, namespace: Namespace) -> str:
        """Put the environment into a Secret, whose name is another for another content: a rollback finds its own."""
        content = dict(spec.env)
        if spec.repo_url is not None:
            content["REPO_URL"] = spec.repo_url
        if spec.branch is not None:
            content["REPO_BRANCH"] = spec.branch
        # By the namespace's uid, so that nobody has tables of what short secrets look like.
        digest = hmac.new(
            namespace.metadata.uid.encode(), orjson.dumps(content, option=orjson.OPT_SORT_KEYS), hashlib.sha256
        )
        name = f"session-env-{digest.hexdigest()[:10]}"
        body = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {
                "name": name,
                "labels": {
                    INSTANCE: self.options.instance,
                    PROJECT: str(spec.project_uuid),
                    SESSION: str(spec.ref.session_id),
                    _COMPONENT: "environment",
                },
            },
            "type": "Opaque",
            "data": {key: b64encode(value.encode()).decode() for key, value in content.items()},
        }
        path = f"/api/v1/namespaces/{spec.ref.namespace}/secrets"
        try:
            await self.cluster.create(path, body, Partial)
        except ApiRefused as error:
            if error.reason != "AlreadyExists":
                raise
            # Whoever changed it by hand: now it is as it should be.
            await self.cluster.replace(f"{path}/{name}", body, Partial)
        return name

    async def _drop_environments(self, ref: SessionRef, *, but: str) -> None:
        """Delete the Secrets of what no longer runs, and is no longer gone back to."""
        path = f"/api/v1/namespaces/{ref.namespace}/secrets"
        selector = f"{SESSION}={ref.session_id},{_COMPONENT}=environment"
        async for page in self.cluster.list(path, Partial, label_selector=selector):
            for secret in page.items:
                if secret.metadata.name != but:
                    await _unless_absent(self.cluster.delete(f"{path}/{secret.metadata.name}"))

    async def _scale(self, ref: SessionRef, replicas: int) -> bool:
        """Whether there is a Deployment to be scaled."""
        return await _unless_absent(self.cluster.scale(f"{_deployments(ref)}/{ref.container_name}", replicas))

    async def _ended(self, ref: SessionRef) -> None:
        """Return when no pod is left that may run: nobody removes one that was evicted.

        Raises ProviderFailure (`StopTimeout`), naming those that are left.
        """
        left: list[Pod] = []
        try:
            async with asyncio.timeout(self.options.stop_deadline) as timer:
                while True:
                    deployment = await self._deployment(ref)
                    left = [pod for pod in await self._pods(ref) if pod.status.phase not in ("Failed", "Succeeded")]
                    seen = deployment is None or (
                        deployment.status.observed_generation >= deployment.metadata.generation
                        and deployment.status.replicas == 0
                    )
                    if seen and not left:
                        return
                    await asyncio.sleep(POLL_INTERVAL)
        except TimeoutError:
            if not timer.expired():
                raise
        names = ", ".join(f"{pod.metadata.name} (node {pod.spec.node_name or 'none'})" for pod in left) or "its pods"
        raise ProviderFailure(
            "StopTimeout",
            f"After {self.options.stop_deadline:.0f} seconds still not ended: {names}. See whether the node is well.",
        )

    async def _look(self, ref: SessionRef) -> Observation:
        """What there is of a session, without its endpoints."""
        evidence = await self._evidence(ref)
        seen = diagnose(evidence, self.rules, datetime.now(UTC))
        if seen.state in (State.STARTING, State.FAILED) and (whose := crashed(evidence)):
            # A second look, with the last words of what crashed.
            logs = {one: await self._last_words(ref, *one) for one in whose}
            seen = diagnose(replace(evidence, previous_logs=logs), self.rules, datetime.now(UTC))
        return seen

    async def _evidence(self, ref: SessionRef) -> Evidence:
        """All that a diagnosis needs; of what runs well, only that."""
        namespace = await self._namespaces.owned(ref)
        if namespace is None:
            return Evidence(namespace=None, deployment=None)
        evidence = Evidence(namespace=namespace, deployment=await self._deployment(ref), pods=await self._pods(ref))
        if diagnose(evidence, self.rules, datetime.now(UTC)).state in (State.RUNNING, State.STOPPED, State.ABSENT):
            return evidence
        inside = f"/api/v1/namespaces/{ref.namespace}"
        return replace(
            evidence,
            events=await _all(self.cluster.list(f"{inside}/events", Event)),
            claims=await _all(self.cluster.list(f"{inside}/persistentvolumeclaims", Claim)),
        )

    async def _last_words(self, ref: SessionRef, pod: str, container: str) -> list[str]:
        """The last lines that a container wrote before it crashed; none when they are gone already."""
        try:
            async with self.cluster.logs(ref.namespace, pod, container, previous=True, tail=_LAST_LINES) as arriving:
                return [line.decode(errors="replace") async for lines in arriving for line in lines]
        except ApiRefused:
            return []

    async def _deployment(self, ref: SessionRef) -> Deployment | None:
        try:
            return await self.cluster.get(f"{_deployments(ref)}/{ref.container_name}", Deployment)
        except ApiRefused as error:
            if error.status != 404:
                raise
            return None

    async def _pods(self, ref: SessionRef) -> list[Pod]:
        path = f"/api/v1/namespaces/{ref.namespace}/pods"
        selector = f"{INSTANCE}={self.options.instance},{SESSION}={ref.session_id}"
        return await _all(self.cluster.list(path, Pod, label_selector=selector))

    async def _running(self, ref: SessionRef) -> tuple[str, str]:
        """A pod, and its container to run commands in."""
        for pod in await self._pods(ref) if await self._namespaces.owned(ref) is not None else ():
            if pod.metadata.deletion_timestamp is None:
                running = {one.name for one in pod.status.container_statuses if one.state.running is not None}
                for name in (*SERVICES, *sorted(running)):
                    if name in running:
                        return pod.metadata.name, name
        raise ProviderFailure("NotRunning", "The session does not run: start it first.")

    async def _endpoints(self, ref: SessionRef) -> Endpoints:
        services = f"/api/v1/namespaces/{ref.namespace}/services"
        ingresses = f"/apis/networking.k8s.io/v1/namespaces/{ref.namespace}/ingresses"
        return endpoints_of(
            ref,
            await _all(self.cluster.list(services, Service)),
            await _all(self.cluster.list(ingresses, Ingress)),
        )

    async def _permissions(self) -> None:
        """Raise ProviderUnavailable, naming what the cluster does not let us do of what sessions need."""
        room = asyncio.Semaphore(_QUESTIONS)

        async def may(verb: str, group: str, resource: str) -> bool:
            plural, _, part = resource.partition("/")
            async with room:
                return await self.cluster.can_i(verb, plural, group=group, subresource=part)

        try:
            async with asyncio.TaskGroup() as asking:
                asked = [(asking.create_task(may(*need), name="permission"), *need) for need in _NEEDED]
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        missing: dict[str, list[str]] = {}
        for permitted, verb, _, resource in asked:
            if not permitted.result():
                missing.setdefault(resource, []).append(verb)
        if missing:
            what = "; ".join(f"{', '.join(verbs)} {resource}" for resource, verbs in missing.items())
            raise ProviderUnavailable(
                f"The cluster does not permit all that sessions need. Missing: {what}."
                " Bind the account to the ClusterRole of the chart cluster-code."
            )


def _failure_of(error: Exception, seconds: float, heard: str) -> ProviderFailure | ProviderUnavailable:
    """What to tell of what has ended a start."""
    if isinstance(error, ProviderFailure):
        return error
    if isinstance(error, ApiRefused):
        return api_failure(error, "start the session")
    return ProviderFailure(
        "StartTimeout", f"The session was not ready within {seconds:.0f} seconds. It was waiting for: {heard}"
    )


def _deployments(ref: SessionRef) -> str:
    return f"/apis/apps/v1/namespaces/{ref.namespace}/deployments"


async def _all(pages: AsyncIterable[Page[T]]) -> list[T]:
    return [one async for page in pages for one in page.items]


async def _unless_absent(call: Awaitable[Any]) -> bool:
    """Whether what the call is about was there."""
    try:
        await call
    except ApiRefused as error:
        if error.status != 404:
            raise
        return False
    return True
