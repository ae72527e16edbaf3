"""The charts on a real cluster: installed, upgraded, rolled back, uninstalled; and the rights of the service's role.

Every image is busybox, whose web server answers the probes.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml

from orchestrator.cluster.client import Cluster
from orchestrator.cluster.objects import Partial
from orchestrator.errors import ApiRefused
from orchestrator.providers.contract import Machine, SessionRef, SessionSpec, State
from orchestrator.providers.kubernetes import KubernetesProvider
from orchestrator.providers.options import KubernetesOptions
from tests.charts import chart
from tests.cluster.conftest import IMAGE, eventually, removed_after, there

# Several rollouts, beside others, on a machine that may be busy.
pytestmark = pytest.mark.timeout(300)

RELEASE = "session-42"
# Helm's own deadline, which names what was waited for.
WAIT = ("--wait", "--timeout", "120s")
# The volumes of the tests' cluster belong to root.
VOLUME = {"size": "10Mi", "permissionsImage": IMAGE}
SMALL = {"requests": {"cpu": "10m", "memory": "8Mi"}, "limits": {"cpu": "500m", "memory": "64Mi"}}


def serving(document: str, first: str = "true") -> list[str]:
    """A command that answers with this text at all of the probes' paths, as JSON, until there is a file /tmp/end."""
    write = " && ".join(f"printf '%s' \"{document}\" > /tmp/w/{path}" for path in ("index.html", "health", "ready"))
    serve = "rm -f /tmp/end && httpd -p $PORT -h /tmp/w && while [ ! -e /tmp/end ]; do sleep 1; done"
    return ["sh", "-c", f"{first} && mkdir -p /tmp/w && {write} && {serve}"]


@dataclass(frozen=True)
class Place:
    """A namespace of a test's own, and helm in it."""

    cluster: Cluster
    kubeconfig: Path
    namespace: str

    async def helm(self, verb: str, *arguments: str, values: dict[str, Any] | None = None) -> str:
        """Run helm; what it says, when it succeeds."""
        done = await self.tried(verb, *arguments, values=values)
        assert done.returncode == 0, done.stderr
        return str(done.stdout)

    async def tried(self, verb: str, *arguments: str, values: dict[str, Any] | None = None) -> Any:
        """Run helm; how it went."""
        given = ("--values", "-") if values is not None else ()
        target = ("--kubeconfig", str(self.kubeconfig), "--namespace", self.namespace)
        return await asyncio.to_thread(
            chart.helm, verb, *arguments, *given, *target, stdin=json.dumps(values), timeout=150
        )

    async def install(self, name: str, values: dict[str, Any], *arguments: str) -> str:
        """Install or upgrade a chart, and wait until it runs."""
        path = str(chart.CHARTS / name)
        return await self.helm("upgrade", RELEASE, path, "--install", *WAIT, *arguments, values=values)

    async def get(self, path: str) -> dict[str, Any]:
        """An object of the namespace: `apps/v1 deployments/web`, or `services/web`."""
        group, _, rest = path.rpartition(" ")
        root = f"/apis/{group}" if group else "/api/v1"
        return await self.cluster.get(f"{root}/namespaces/{self.namespace}/{rest}", dict)

    async def answer(self, service: str) -> dict[str, Any]:
        """What a Service answers: `name:port`."""
        return await self.get(f"services/{service}/proxy/")

    async def pod(self) -> str:
        """The pod that runs."""
        pods = await self.get("pods?labelSelector=app.kubernetes.io%2Finstance%3Dsession-42")
        (name,) = [one["metadata"]["name"] for one in pods["items"] if "deletionTimestamp" not in one["metadata"]]
        return str(name)

    async def run(self, container: str, script: str) -> tuple[int, str]:
        """Run a line of shell in a container."""
        argv = ["sh", "-c", script]
        code, out = await self.cluster.exec(self.namespace, await self.pod(), container, argv, deadline=60)
        return code, out.decode()

    async def left(self) -> list[str]:
        """What of ours is still there and stays: names of objects, with their kinds."""
        kinds = ["services", "persistentvolumeclaims", "resourcequotas", "limitranges", "apps/v1 deployments"]
        kinds += [f"networking.k8s.io/v1 {one}" for one in ("ingresses", "networkpolicies")]
        found = [(kind, one["metadata"]) for kind in kinds for one in (await self.get(kind))["items"]]
        return [f"{kind}/{metadata['name']}" for kind, metadata in found if "deletionTimestamp" not in metadata]


async def test_each_chart_is_installed_changed_rolled_back_and_removed(cluster: Cluster, kubeconfig: Path) -> None:
    """Side by side, since most of it is waiting for the cluster."""
    async with asyncio.TaskGroup() as group:
        for lives in (a_session, a_container, the_service):
            group.create_task(_in_a_place(lives, cluster, kubeconfig), name=lives.__name__)


async def _in_a_place(lives: Callable[[Place], Awaitable[None]], cluster: Cluster, kubeconfig: Path) -> None:
    async with removed_after(cluster, str(uuid4())) as namespace:
        path = "/api/v1/namespaces"
        await cluster.create(path, {"metadata": {"name": namespace}}, Partial)
        await eventually(lambda: there(cluster, f"{path}/{namespace}/serviceaccounts/default"))
        await lives(Place(cluster, kubeconfig, namespace))


async def a_session(place: Place) -> None:
    def values(said: str, **more: Any) -> dict[str, Any]:
        first = "echo started >> $WORKSPACE/starts"
        preview = {
            "image": IMAGE,
            "command": serving('{\\"said\\": \\"$SAID\\"}', first),
            "env": {"SAID": said},
            "ready": "/",
            "readOnlyRootFilesystem": True,
            "workspacePath": "/home/dev",
        }
        others = {"image": IMAGE, "command": serving("{}"), "ready": "/"}
        return {
            "session": "42",
            "services": {"preview": preview, "chat": others, "vscode": others},
            "resources": {"cpu": "500m", "memory": "96Mi", "requestPercent": {"cpu": 5}},
            "storage": VOLUME,
            "envSecret": "",
            "terminationGracePeriodSeconds": 0,
            "ingress": {"enabled": True, "host": "a.example.com"},
            # The API server's proxy comes from the node.
            "networkPolicy": {"enabled": True},
        } | more

    notes = await place.install("dev-session-template", values("one"))
    assert "preview: http://a.example.com/preview" in notes
    assert await place.answer(f"{RELEASE}-preview:3000") == {"said": "one"}
    assert await place.answer(f"{RELEASE}:vscode") == await place.answer(f"{RELEASE}-chat:3001") == {}
    assert await place.run("preview", "id -u; id -g") == (0, "1000\n1000\n")
    assert await place.run("preview", "touch /tmp/a && ! touch /a 2>/dev/null && echo $PORT") == (0, "3000\n")
    assert (await place.run("chat", "ls /var/run/secrets/kubernetes.io"))[0] != 0
    quota = await place.get(f"resourcequotas/{RELEASE}")
    assert (quota["spec"]["hard"]["pods"], quota["status"]["used"]["pods"]) == ("2", "1")
    volume = (await place.get(f"persistentvolumeclaims/{RELEASE}"))["metadata"]["uid"]

    # A smaller volume, and one of another class, cannot be had: what is there goes on.
    smaller = {"storage": VOLUME | {"size": "5Mi", "className": "no-such-class"}}
    await place.install("dev-session-template", values("two", **smaller))
    assert await place.answer(f"{RELEASE}-preview:3000") == {"said": "two"}
    assert await place.run("vscode", "cat /workspace/starts") == (0, "started\nstarted\n")
    claim = await place.get(f"persistentvolumeclaims/{RELEASE}")
    assert (claim["metadata"]["uid"], claim["spec"]["resources"]["requests"]["storage"]) == (volume, "10Mi")

    await place.helm("rollback", RELEASE, "1", *WAIT)
    assert await place.answer(f"{RELEASE}-preview:3000") == {"said": "one"}
    assert await place.run("preview", "wc -l < /home/dev/starts") == (0, "3\n")

    # Stopped, it keeps its volume.
    await place.helm("upgrade", RELEASE, str(chart.CHARTS / "dev-session-template"), values=values("one", replicas=0))
    await eventually(lambda: stopped(place))
    assert (await place.get(f"persistentvolumeclaims/{RELEASE}"))["metadata"]["uid"] == volume

    await place.helm("uninstall", RELEASE)
    assert await place.left() == []


async def stopped(place: Place) -> bool:
    return "replicas" not in (await place.get(f"apps/v1 deployments/{RELEASE}"))["status"]


async def a_container(place: Place) -> None:
    def values(said: str) -> dict[str, Any]:
        return {
            "image": IMAGE,
            "command": serving('{\\"said\\": \\"$SAID\\"}', "echo started >> $WORKSPACE/starts"),
            "env": {"SAID": said},
            "health": "/health",
            "resources": SMALL,
            "storage": VOLUME,
            "service": {"port": 80},
            "securityContext": {"readOnlyRootFilesystem": True},
            "terminationGracePeriodSeconds": 0,
        }

    notes = await place.install("dev-container", values("one"))
    assert f"port-forward service/{RELEASE} 80" in notes
    assert await place.answer(f"{RELEASE}:80") == {"said": "one"}
    assert await place.run("dev", "id -u; ! touch /a 2>/dev/null") == (0, "1000\n")

    await place.install("dev-container", values("two"))
    assert await place.answer(f"{RELEASE}:80") == {"said": "two"}
    # What ends is started again, with the volume as it was.
    assert await place.run("dev", "touch /tmp/end") == (0, "")
    await eventually(lambda: restarts(place))
    await place.helm("rollback", RELEASE, "1", *WAIT)
    assert await place.answer(f"{RELEASE}:80") == {"said": "one"}
    assert await place.run("dev", "wc -l < /workspace/starts") == (0, "4\n")

    await place.helm("uninstall", RELEASE)
    assert await place.left() == []


async def restarts(place: Place) -> int:
    pod = await place.get(f"pods/{await place.pod()}")
    return int(pod["status"]["containerStatuses"][0]["restartCount"])


async def the_service(place: Place) -> None:
    url = "postgresql://cluster:word@db.example.com/cluster"

    def values(level: str, *, migrates: bool = True) -> dict[str, Any]:
        document = '{\\"level\\": \\"$LOG_LEVEL\\", \\"url\\": \\"$DATABASE_URL\\"}'
        small = {"replicas": 1, "resources": SMALL, "terminationGracePeriodSeconds": 1}
        autoscaling = {"enabled": True, "minReplicas": 1}
        return {
            "image": {"repository": IMAGE.rpartition(":")[0], "tag": IMAGE.rpartition(":")[2]},
            "secrets": {"DATABASE_URL": url, "AMQP_URL": "amqp://mq.example.com", "JWT_SECRET": str(uuid4())},
            "settings": {"LOG_LEVEL": level},
            "machines": {"providers": [{"name": "here", "kind": "kubernetes"}]},
            "gateway": small | {"command": serving(document), "preStopSeconds": 0, "autoscaling": autoscaling},
            "orchestrator": small | {"command": serving(document, "export PORT=$ORCHESTRATOR_PORT")},
            "migration": {
                "command": ["sh", "-c", f'test "$DATABASE_URL" = {url if migrates else "another"}'],
                "importCommand": ["sh", "-c", 'grep -q "kind: kubernetes" "$0"'],
                "resources": SMALL,
                "retries": 0,
            },
        }

    notes = await place.install("cluster-code", values("info"))
    assert "cluster-code user create" in notes
    assert await place.answer(f"{RELEASE}:http") == {"level": "info", "url": url}
    assert await place.answer(f"{RELEASE}-orchestrator:http") == {"level": "info", "url": url}

    # Migrations that fail leave all as it was, and the Job to look at.
    done = await place.tried(
        "upgrade", RELEASE, str(chart.CHARTS / "cluster-code"), *WAIT, values=values("error", migrates=False)
    )
    assert done.returncode != 0
    assert "pre-upgrade hooks failed" in done.stderr
    assert (await place.get(f"batch/v1 jobs/{RELEASE}-migration"))["status"]["failed"] == 1
    assert await place.answer(f"{RELEASE}:http") == {"level": "info", "url": url}

    # A change of settings reaches what runs.
    await place.install("cluster-code", values("debug"))
    assert await place.answer(f"{RELEASE}:http") == {"level": "debug", "url": url}
    for kind in ("batch/v1 jobs", "configmaps", "secrets"):
        names = [one["metadata"]["name"] for one in (await place.get(kind))["items"]]
        assert not [name for name in names if name.startswith(f"{RELEASE}-migration")], kind

    await place.helm("rollback", RELEASE, "1", *WAIT)
    assert await place.answer(f"{RELEASE}:http") == {"level": "info", "url": url}

    await place.helm("uninstall", RELEASE)
    assert await place.left() == []
    role = f"{place.namespace}-{RELEASE}-orchestrator"
    with pytest.raises(ApiRefused, match="not found"):
        await place.cluster.get(f"/apis/rbac.authorization.k8s.io/v1/clusterroles/{role}", dict)


# What an orchestrator has no business with: (verb, group, resource).
REFUSED = [
    *(("create", "", one) for one in ("pods", "configmaps", "serviceaccounts", "serviceaccounts/token", "nodes/proxy")),
    *((verb, "", "pods") for verb in ("get", "update", "patch", "delete")),
    *((verb, "", "secrets") for verb in ("patch", "watch", "deletecollection")),
    *(("list", "", one) for one in ("nodes", "persistentvolumes", "configmaps", "serviceaccounts")),
    *((verb, "", "namespaces") for verb in ("update", "deletecollection")),
    *((verb, "apps", "deployments") for verb in ("update", "deletecollection")),
    *(("create", "apps", one) for one in ("daemonsets", "statefulsets", "replicasets")),
    *((verb, "rbac.authorization.k8s.io", "clusterroles") for verb in ("get", "create", "bind", "escalate")),
    *(("create", "rbac.authorization.k8s.io", one) for one in ("rolebindings", "clusterrolebindings")),
    *(("impersonate", "", one) for one in ("users", "groups", "serviceaccounts")),
]


# What the bridge watches, in all namespaces.
WATCHED = [
    *("/api/v1/namespaces", "/api/v1/pods", "/api/v1/events"),
    *("/apis/apps/v1/deployments", "/apis/networking.k8s.io/v1/ingresses"),
]


async def test_the_role_is_enough_for_sessions_and_for_nothing_else(
    cluster: Cluster, kubeconfig: Path, made: str, tmp_path: Path
) -> None:
    place = Place(cluster, kubeconfig, made)
    values = yaml.safe_load(chart.Case("cluster-code", "defaults").values.read_text())
    nothing_runs = {"gateway": {"replicas": 0}, "orchestrator": {"replicas": 0}, "migration": {"enabled": False}}
    await place.install("cluster-code", values | nothing_runs)
    account = await as_service_account(place, f"{RELEASE}-orchestrator", tmp_path)
    project = uuid4()
    ref = SessionRef(42, str(project), RELEASE)
    options = {"kubeconfig": str(account), "instance": f"test-{project}", "base_domain": "example.com"}
    provider = KubernetesProvider("test", KubernetesOptions.load(options))
    preview = {"image": IMAGE, "command": serving("{}", "echo it runs"), "ready": "/"}
    machine = Machine(
        *("test", 0.2, 64 << 20, 10 << 20),
        services={"preview": preview},
        options={"values": {"terminationGracePeriodSeconds": 0}},
    )
    spec = SessionSpec(ref, project, None, None, {"GREETING": "hello"}, machine)
    async with removed_after(place.cluster, str(project)):
        try:
            await lives(provider, spec)
            for path in WATCHED:
                async with provider.cluster.stream(path, {"watch": "1", "timeoutSeconds": "1"}) as arriving:
                    async for _ in arriving:
                        pass
            for verb, group, resource in REFUSED:
                plural, _, part = resource.partition("/")
                assert not await provider.cluster.can_i(verb, plural, group=group, subresource=part), (verb, resource)
            pods = f"/api/v1/namespaces/{place.namespace}/pods"
            with pytest.raises(ApiRefused, match='cannot create resource "pods"') as refused:
                await provider.cluster.create(pods, {"metadata": {"name": "mine"}}, Partial)
            assert (refused.value.status, refused.value.reason) == (403, "Forbidden")
        finally:
            await provider.close()
            # The role is nobody's namespace's.
            await place.helm("uninstall", RELEASE)


async def lives(provider: KubernetesProvider, spec: SessionSpec) -> None:
    """All that a provider does for a session."""
    ref = spec.ref
    await provider.check()
    endpoints = await provider.start(spec, silent)
    assert endpoints.preview is not None
    assert endpoints.preview.url == f"http://{ref.namespace}.example.com/preview"
    assert await provider.exec(ref, ["sh", "-c", "echo $GREETING"]) == (0, b"hello\n")
    pages = provider.cluster.list(f"/api/v1/namespaces/{ref.namespace}/pods", Partial)
    (pod,) = [one.metadata.name async for page in pages for one in page.items]
    async with provider.cluster.logs(ref.namespace, pod, "preview", follow=False) as arriving:
        assert [line async for lines in arriving for line in lines] == [b"it runs"]
    # Another size: an upgrade.
    await provider.start(replace(spec, machine=replace(spec.machine, memory_bytes=96 << 20)), silent)
    await provider.stop(ref)
    assert (await provider.inspect(ref)).state is State.STOPPED
    await provider.delete(ref)
    assert (await provider.inspect(ref)).state is State.ABSENT


@pytest.mark.parametrize("case", [one for one in chart.CASES if one.kubernetes == chart.RECENT], ids=str)
async def test_the_notes_say_what_to_do(case: chart.Case, cluster: Cluster, kubeconfig: Path) -> None:
    # What it is told of is only there beside the Prometheus operator.
    without = ("--set", "serviceMonitor.enabled=false") if case.chart == "cluster-code" else ()
    place = Place(cluster, kubeconfig, chart.NAMESPACE)
    path = str(chart.CHARTS / case.chart)
    said = await place.helm("install", RELEASE, path, "--dry-run=client", "--values", str(case.values), *without)
    notes = said.rpartition("NOTES:")[2]
    assert f"kubectl --namespace {place.namespace} rollout status deployment/{RELEASE}" in notes
    assert "%!" not in notes


async def as_service_account(place: Place, name: str, folder: Path) -> Path:
    """A kubeconfig that has no rights but those of a service account."""
    path = f"/api/v1/namespaces/{place.namespace}/serviceaccounts/{name}/token"
    token = await place.cluster.create(path, {"spec": {"expirationSeconds": 600}}, dict)
    config = yaml.safe_load(place.kubeconfig.read_text())
    current = next(one for one in config["contexts"] if one["name"] == config["current-context"])
    current["context"]["user"] = "account"
    config["users"] = [{"name": "account", "user": {"token": token["status"]["token"]}}]
    found = folder / "kubeconfig"
    found.write_text(yaml.safe_dump(config))
    found.chmod(0o600)
    return found


async def silent(reason: str, message: str) -> None:
    """What is reported on the way does not matter here."""
