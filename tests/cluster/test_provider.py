"""The Kubernetes provider on a real cluster: sessions come, stop, change, go, and nothing of them is left."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import pytest
import pytest_asyncio
import yaml
from structlog.testing import capture_logs

from orchestrator.cluster.access import Kubeconfig
from orchestrator.cluster.client import Cluster
from orchestrator.cluster.helm import Helm
from orchestrator.cluster.objects import INSTANCE, PROJECT, SESSION, Pod
from orchestrator.errors import ProviderFailure, ProviderUnavailable
from orchestrator.providers.contract import Endpoint, Machine, RolledBack, SessionRef, SessionSpec, State
from orchestrator.providers.kubernetes import CHART, KubernetesProvider
from orchestrator.providers.options import KubernetesOptions
from orchestrator.providers.releases import GOOD
from tests.cluster.conftest import IMAGE, absent, eventually, removed_after, there
from tests.conftest import no_task_left

# Pods take their time where the machine is busy.
pytestmark = pytest.mark.timeout(240)

# Values of our own chart.
DEFAULTS = Path(__file__).parents[1] / "charts" / "values" / "cluster-code" / "defaults.yaml"
SECRET = "correct-horse-battery"
SERVE = "mkdir -p /tmp/w && echo hi > /tmp/w/index.html && exec httpd -f -p $PORT -h /tmp/w"
# Fits into the quota beside the session.
SMALL = {"cpu": "1m", "memory": "1Mi"}
# What makes a session small, and quick to begin and to end.
VALUES = {
    "terminationGracePeriodSeconds": 0,
    "services": {"preview": {"readinessProbe": {"httpGet": {"path": "/", "port": 3000}, "periodSeconds": 1}}},
}


def spec(services: dict[str, Any] | None = None, *, env: dict[str, str] | None = None, **values: Any) -> SessionSpec:
    """A session of a project of its own; without services one that answers HTTP."""
    project = uuid4()
    preview = {"image": IMAGE, "command": ["sh", "-c", SERVE]}
    return SessionSpec(
        SessionRef(42, str(project), "session-42"),
        project,
        None,
        None,
        env or {},
        Machine(
            "test", cpu=0.2, memory_bytes=64 << 20, disk_bytes=10 << 20,
            services={"preview": preview} if services is None else services, options={"values": VALUES | values},
        ),
    )  # fmt: skip


def changed(session: SessionSpec, **service: Any) -> SessionSpec:
    """The session with another machine config."""
    preview = {**session.machine.services["preview"], **service}
    return replace(session, machine=replace(session.machine, services={"preview": preview}))


@dataclass
class Heard:
    """What a provider reported."""

    reports: list[tuple[str, str]] = field(default_factory=list)
    happened: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, reason: str, message: str) -> None:
        self.reports.append((reason, message))
        self.happened.set()

    @property
    def reasons(self) -> list[str]:
        return [reason for reason, _ in self.reports]


@pytest.fixture
def heard() -> Heard:
    return Heard()


MakeProvider = Callable[..., KubernetesProvider]


@pytest.fixture(scope="module")
def instance() -> Iterator[str]:
    """An installation of these tests' own. What they leave in the cluster goes in the end, all at once."""
    instance = f"test-{uuid4()}"
    yield instance
    if path := os.environ.get("KUBECONFIG"):
        asyncio.run(_sweep(path, instance))


async def _sweep(kubeconfig: str, instance: str) -> None:
    async with Cluster(Kubeconfig(kubeconfig), timeout=30.0) as cluster, AsyncExitStack() as stack:
        for one in await objects(cluster, "/api/v1/namespaces", label_selector=f"{INSTANCE}={instance}"):
            await stack.enter_async_context(removed_after(cluster, one["metadata"]["name"]))


@pytest_asyncio.fixture
async def make(kubeconfig: Path, instance: str) -> AsyncIterator[MakeProvider]:
    """Makes providers; in the end they are closed, and no helm may be left."""
    made: list[KubernetesProvider] = []

    def make(**options: Any) -> KubernetesProvider:
        given = {"kubeconfig": str(kubeconfig), "instance": instance, "delete_deadline": 60, **options}
        provider = KubernetesProvider("test", KubernetesOptions.load(given))
        made.append(provider)
        return provider

    async with no_task_left():
        yield make
        for provider in made:
            await provider.close()
    assert [one.cmdline() for one in psutil.Process().children(recursive=True) if "helm" in one.name()] == []


@pytest_asyncio.fixture
async def account(cluster: Cluster, kubeconfig: Path, tmp_path: Path) -> AsyncIterator[Path]:
    """A kubeconfig of one who has just the rights that our own chart gives to orchestrators."""
    name = f"test-{uuid4()}"
    helm = await asyncio.create_subprocess_exec(
        Helm()._find(), "template", "x", str(CHART.with_name("cluster-code")), "--show-only=templates/rbac.yaml",
        f"--values={DEFAULTS}", stdout=subprocess.PIPE,
    )  # fmt: skip
    rendered, _ = await helm.communicate()
    role = next(one for one in yaml.safe_load_all(rendered) if one["kind"] == "ClusterRole")
    group = "rbac.authorization.k8s.io"
    roles, bindings = (f"/apis/{group}/v1/{one}" for one in ("clusterroles", "clusterrolebindings"))
    await cluster.create(roles, {"metadata": {"name": name}, "rules": role["rules"]}, dict)
    bound = {
        "metadata": {"name": name},
        "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": name},
        "subjects": [{"apiGroup": group, "kind": "User", "name": name}],
    }
    await cluster.create(bindings, bound, dict)
    config = yaml.safe_load(kubeconfig.read_text())
    config["users"][0]["user"]["as"] = name
    path = tmp_path / "kubeconfig"
    path.write_text(yaml.safe_dump(config))
    yield path
    await cluster.delete(f"{bindings}/{name}")
    await cluster.delete(f"{roles}/{name}")


@pytest.fixture
def provider(make: MakeProvider) -> KubernetesProvider:
    return make()


async def objects(cluster: Cluster, path: str, label_selector: str = "") -> list[dict[str, Any]]:
    """What there is, as the API has it."""
    return [one async for page in cluster.list(path, dict, label_selector=label_selector) for one in page.items]


def inside(session: SessionSpec, kind: str, api: str = "/api/v1") -> str:
    return f"{api}/namespaces/{session.ref.namespace}/{kind}"


def namespace_of(session: SessionSpec) -> str:
    return f"/api/v1/namespaces/{session.ref.namespace}"


async def shell(provider: KubernetesProvider, session: SessionSpec, script: str) -> str:
    code, output = await provider.exec(session.ref, ["sh", "-c", script])
    assert code == 0, output
    return output.decode().strip()


async def revisions(provider: KubernetesProvider, session: SessionSpec) -> list[tuple[str, str]]:
    """`(revision, status)` of the session's release, as Helm keeps them."""
    found = await objects(provider.cluster, inside(session, "secrets"), label_selector="owner=helm")
    labels = [one["metadata"]["labels"] for one in found]
    return sorted((one["version"], one["status"]) for one in labels)


async def test_a_session_lives_its_life(make: MakeProvider, account: Path, heard: Heard) -> None:
    provider = make(kubeconfig=str(account))
    # Volumes of this cluster belong to root, whatever fsGroup says.
    session = spec(env={"GREETING": "hello"}, storage={"permissionsImage": IMAGE})
    ref = session.ref
    await provider.check()
    assert (await provider.inspect(ref)).state is State.ABSENT
    endpoints = await provider.start(session, heard)
    assert endpoints.preview == Endpoint(f"http://session-42-preview.{ref.namespace}.svc:3000/preview", "/preview")
    assert (endpoints.chat, endpoints.vscode) == (None, None)
    services = await objects(provider.cluster, inside(session, "services"))
    addresses = {one["metadata"]["name"]: one["spec"]["clusterIP"] for one in services}
    assert endpoints.ip_address == addresses["session-42"]
    assert heard.reasons[0] == "Deploying"
    assert len(set(heard.reports)) == len(heard.reports)
    running = await provider.inspect(ref)
    assert (running.state, running.endpoints) == (State.RUNNING, endpoints)
    assert (
        await shell(provider, session, "echo $GREETING; echo kept > /workspace/file; cat /tmp/w/index.html")
        == "hello\nhi"
    )

    # What runs from the same spec is left alone.
    pods = await objects(provider.cluster, inside(session, "pods"))
    heard.reports.clear()
    assert await provider.start(session, heard) == endpoints
    assert heard.reports == []
    assert await revisions(provider, session) == [("1", "deployed")]
    assert [one["metadata"]["uid"] for one in await objects(provider.cluster, inside(session, "pods"))] == [
        one["metadata"]["uid"] for one in pods
    ]

    for _ in range(2):
        await provider.stop(ref)
        assert await objects(provider.cluster, inside(session, "pods")) == []
        assert (await provider.inspect(ref)).state is State.STOPPED
    with pytest.raises(ProviderFailure, match="does not run"):
        await provider.exec(ref, ["true"])
    assert await provider.start(session, heard) == endpoints
    assert await shell(provider, session, "cat /workspace/file") == "kept"
    assert await revisions(provider, session) == [("1", "deployed")]

    for _ in range(2):
        await provider.delete(ref)
        assert await absent(provider.cluster, namespace_of(session))
    assert (await provider.inspect(ref)).state is State.ABSENT
    await provider.stop(ref)


async def test_a_change_that_cannot_run_is_rolled_back_with_its_environment(
    provider: KubernetesProvider, heard: Heard
) -> None:
    first = spec(env={"MODE": "first", "OLD": "1"})
    await provider.start(first, heard)
    second = changed(replace(first, env={"MODE": "second"}), args=["-c", SERVE, "again"], command=["sh"])
    await provider.start(second, heard)
    assert await shell(provider, second, "echo $MODE,$OLD") == "second,"
    assert [status for _, status in await revisions(provider, first)] == ["superseded", "deployed"]

    bad = changed(replace(second, env={"MODE": "third"}), image="bench.local/nothing:1")
    await provider.stop(bad.ref)
    with pytest.raises(RolledBack, match=r"bench\.local/nothing:1.* runs on as it was before") as back:
        await provider.start(bad, heard)
    assert back.value.endpoints.preview is not None
    assert "RollingBack" in heard.reasons
    assert await shell(provider, second, "echo $MODE") == "second"
    assert (await provider.inspect(second.ref)).state is State.RUNNING

    # What the chart refuses changes nothing, and what was good before still is.
    with pytest.raises(RolledBack, match=r"The chart refuses the session's values: .*image"):
        await provider.start(changed(second, image=""), heard)
    assert await provider.start(second, heard) == back.value.endpoints
    # One that only does not come up ends in time to go back.
    with pytest.raises(RolledBack, match=r"not ready within .* runs on as it was before"):
        await provider.start(replace(changed(second, command=["sleep", "1000"]), deadline=12.0), heard)
    assert await shell(provider, second, "echo $MODE") == "second"
    environments = await objects(
        provider.cluster, inside(first, "secrets"), label_selector="app.kubernetes.io/component=environment"
    )
    assert len(environments) <= 2


async def test_a_start_can_be_cancelled_anywhere_and_a_delete_leaves_nothing(
    provider: KubernetesProvider, heard: Heard
) -> None:
    sessions = [spec() for _ in range(4)]

    async def cancelled(number: int, session: SessionSpec) -> None:
        told = Heard()
        start = asyncio.create_task(provider.start(session, told))
        await told.happened.wait()
        # Into helm's work, and past it.
        await asyncio.sleep(number * 0.2)
        start.cancel()
        with pytest.raises(asyncio.CancelledError):
            await start

    await asyncio.gather(*(cancelled(number, session) for number, session in enumerate(sessions)))
    # One is gone on with, the others are not.
    await provider.start(sessions[1], heard)
    await asyncio.gather(*(provider.delete(session.ref) for session in sessions))
    for session in sessions:
        assert await absent(provider.cluster, namespace_of(session))


async def test_what_was_taken_away_by_hand_comes_back(provider: KubernetesProvider, heard: Heard) -> None:
    session = spec()
    endpoints = await provider.start(session, heard)
    await provider.cluster.delete(inside(session, "deployments/session-42", "/apis/apps/v1"))
    await provider.cluster.delete(inside(session, "services/session-42"))
    assert (await provider.inspect(session.ref)).state is not State.RUNNING
    again = await provider.start(session, heard)
    assert again.preview == endpoints.preview

    await provider.stop(session.ref)
    taken = [inside(session, f"{kind}/session-42") for kind in ("persistentvolumeclaims", "resourcequotas")]
    taken.append(inside(session, "networkpolicies/session-42", "/apis/networking.k8s.io/v1"))
    taken.append(inside(session, "services/session-42-preview"))
    for path in taken:
        await provider.cluster.delete(path)
        await eventually(lambda path=path: absent(provider.cluster, path))
    await provider.start(session, heard)
    assert [await there(provider.cluster, path) for path in taken] == [True] * len(taken)

    # Helm's own records, too: it takes over what is there.
    for revision, _ in await revisions(provider, session):
        damaged = {"data": {"release": "eHh4"}}
        await provider.cluster.patch(
            inside(session, f"secrets/sh.helm.release.v1.session-42.v{revision}"), damaged, dict
        )
    await provider.start(changed(session, path="/elsewhere"), heard)
    assert await revisions(provider, session) == [("1", "deployed")]

    # There is nothing to go back to when what was good is not known any more, or is no more.
    await provider.cluster.patch(inside(session, "secrets/sh.helm.release.v1.session-42.v1"), damaged, dict)
    with pytest.raises(ProviderFailure, match=r"bench\.local/nothing:1") as lost:
        await provider.start(changed(session, image="bench.local/nothing:1"), heard)
    assert lost.value.reason == "ImagePull"
    assert "oing back" not in str(lost.value)
    await provider._namespaces.annotate(session.ref, {GOOD: "99 0123"})
    with pytest.raises(ProviderFailure, match=r"bench\.local/nothing:1.* Going back to what ran before failed, too"):
        await provider.start(changed(session, image="bench.local/nothing:1"), heard)

    await provider.cluster.patch(inside(session, "secrets/sh.helm.release.v1.session-42.v1"), damaged, dict)
    await provider.delete(session.ref)
    assert await absent(provider.cluster, namespace_of(session))


async def test_a_release_that_a_crash_left_pending_is_gone_on_with(
    provider: KubernetesProvider, heard: Heard, kubeconfig: Path
) -> None:
    session = spec()
    await provider._namespaces.claim(session.ref, heard)
    values = {
        "instance": provider.options.instance, "session": "42", "envSecret": "", "networkPolicy": {"enabled": False},
        "terminationGracePeriodSeconds": 0,
        "services": {
            "preview": {"image": "bench.local/nothing:1"}, "chat": {"enabled": False}, "vscode": {"enabled": False},
        },
    }  # fmt: skip
    helm = await asyncio.create_subprocess_exec(
        provider._helm._find(), "upgrade", "--install", "--wait", "session-42", str(CHART), "--values=-",
        f"--namespace={session.ref.namespace}", f"--kubeconfig={kubeconfig}",
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    assert helm.stdin is not None
    helm.stdin.write(json.dumps(values).encode())
    helm.stdin.close()
    await eventually(lambda: there(provider.cluster, inside(session, "deployments/session-42", "/apis/apps/v1")))
    helm.send_signal(signal.SIGKILL)
    await helm.wait()
    assert await revisions(provider, session) == [("1", "pending-install")]
    with pytest.raises(ProviderFailure, match=r"The chart refuses .*image") as refused:
        await provider.start(changed(session, image=""), heard)
    # There is nothing to go back to.
    assert refused.value.reason == "InvalidValues"
    await provider.start(session, heard)
    # With or without one more, for what Helm could not merge.
    assert [status for _, status in await revisions(provider, session)][-1] == "deployed"


async def test_a_namespace_that_is_not_ours_is_never_touched(
    provider: KubernetesProvider, make: MakeProvider, heard: Heard
) -> None:
    session = spec()
    body = {
        "metadata": {"name": session.ref.namespace, "labels": {INSTANCE: "another", PROJECT: session.ref.namespace}}
    }
    made = await provider.cluster.create("/api/v1/namespaces", body, dict)
    try:
        with pytest.raises(ProviderFailure, match="already and does not belong to this Cluster Code") as taken:
            await provider.start(session, heard)
        assert taken.value.reason == "NamespaceTaken"
        assert (await provider.inspect(session.ref)).state is State.ABSENT
        await provider.stop(session.ref)
        await provider.delete(session.ref)
        with pytest.raises(ProviderFailure, match="does not run"):
            await provider.exec(session.ref, ["true"])
        now = await provider.cluster.get(namespace_of(session), dict)
        assert now["metadata"] == made["metadata"]
        # helm would keep its records there, and the environment its Secret.
        left = await objects(provider.cluster, inside(session, "secrets"))
        assert [one["type"] for one in left if one["type"] != "kubernetes.io/service-account-token"] == []
    finally:
        await provider.cluster.delete(namespace_of(session))


async def test_a_namespace_of_ours_goes_with_all_that_others_put_there_and_says_what_holds_it(
    make: MakeProvider, heard: Heard
) -> None:
    provider = make(delete_deadline=8)
    session = spec()
    await provider._namespaces.claim(session.ref, heard)
    junk = {"metadata": {"name": "junk"}, "data": {"a": "b"}}
    held = {"metadata": {"name": "held", "finalizers": ["example.com/hold"]}}
    for body in (junk, held):
        await provider.cluster.create(inside(session, "configmaps"), body, dict)
    try:
        with pytest.raises(ProviderFailure, match=r"configmaps/held \(finalizer example\.com/hold\)") as blocked:
            await provider.delete(session.ref)
        assert blocked.value.reason == "DeleteBlocked"
        # A start waits for it, says so, and makes it anew.
        heard.happened.clear()
        start = asyncio.create_task(make().start(session, heard))
        await heard.happened.wait()
        assert heard.reasons[-1] == "NamespaceTerminating"
    finally:
        await provider.cluster.patch(inside(session, "configmaps/held"), {"metadata": {"finalizers": None}}, dict)
    await start
    assert await absent(provider.cluster, inside(session, "configmaps/junk"))


def command_lines() -> set[bytes]:
    """All that can be seen of the processes that run on our behalf."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        try:
            found.add(Path(f"/proc/{process.pid}/cmdline").read_bytes())
        except OSError:
            continue
    return found


async def test_secrets_are_nowhere_but_in_the_secret(
    provider: KubernetesProvider, heard: Heard, kubeconfig: Path
) -> None:
    session = replace(
        spec(env={"PASSWORD": SECRET}), repo_url=f"https://user:{SECRET}@example.org/shop.git", branch="main"
    )
    seen: set[bytes] = set()
    with capture_logs() as logs:
        start = asyncio.create_task(provider.start(session, heard))
        while not start.done():
            seen |= command_lines()
            await asyncio.sleep(0.005)
        await start
    assert any(b"helm" in one for one in seen)
    helm = await asyncio.create_subprocess_exec(
        provider._helm._find(), "get", "all", "session-42",
        f"--namespace={session.ref.namespace}", f"--kubeconfig={kubeconfig}", stdout=subprocess.PIPE,
    )  # fmt: skip
    kept, _ = await helm.communicate()
    assert b"session-env-" in kept
    events = await objects(provider.cluster, inside(session, "events"))
    pods = await objects(provider.cluster, inside(session, "pods"))
    assert events
    for place in (seen, logs, kept.decode(), events, pods, heard.reports):
        assert SECRET not in repr(place)
    assert await shell(provider, session, "echo $PASSWORD $REPO_URL $REPO_BRANCH") == (
        f"{SECRET} https://user:{SECRET}@example.org/shop.git main"
    )


async def test_what_the_account_may_not_do_is_told_in_one_sentence(
    make: MakeProvider, powerless_kubeconfig: Path, heard: Heard
) -> None:
    provider = make(kubeconfig=str(powerless_kubeconfig))
    with pytest.raises(ProviderUnavailable, match=r"does not permit .*create, get, .*ClusterRole of the chart"):
        await provider.check()
    session = spec()
    with pytest.raises((ProviderFailure, ProviderUnavailable), match=r"get.*namespaces"):
        await provider.start(session, heard)


async def test_a_cluster_that_does_not_answer_is_unavailable(
    make: MakeProvider, kubeconfig: Path, tmp_path: Path, heard: Heard
) -> None:
    config = yaml.safe_load(kubeconfig.read_text())
    config["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:9"
    nowhere = tmp_path / "kubeconfig"
    nowhere.write_text(yaml.safe_dump(config))
    provider = make(kubeconfig=str(nowhere))
    session = spec()
    for call in (
        provider.check, lambda: provider.start(session, heard), lambda: provider.stop(session.ref),
        lambda: provider.delete(session.ref), lambda: provider.inspect(session.ref),
        lambda: provider.exec(session.ref, ["true"]),
    ):  # fmt: skip
        with pytest.raises(ProviderUnavailable, match=r"127\.0\.0\.1:9"):
            await call()


async def test_closing_ends_what_is_under_way(provider: KubernetesProvider, heard: Heard) -> None:
    session = changed(spec(), command=["sleep", "1000"])
    watcher = asyncio.create_task(_watched(provider))
    start = asyncio.create_task(provider.start(session, heard))
    await heard.happened.wait()
    # Whoever comes second comes upon calls that are ending.
    closing = asyncio.create_task(provider.close())
    while not any(timer.expired() for timer in provider._calls):
        await asyncio.sleep(0)
    await provider.close()
    await closing
    with pytest.raises(ProviderUnavailable, match="closed"):
        await start
    assert await watcher == []
    with pytest.raises(ProviderUnavailable, match="'test' is closed"):
        await provider.stop(session.ref)
    await provider.close()


async def _watched(provider: KubernetesProvider) -> list[Any]:
    return [one async for one in provider.watch()]


async def test_commands_run_where_the_session_runs_until_its_pods_are_gone(make: MakeProvider, heard: Heard) -> None:
    provider = make(exec_deadline=3, stop_deadline=3)
    services = {
        "chat": {"image": IMAGE, "command": ["sh", "-c", SERVE]},
        "vscode": {"image": IMAGE, "command": ["sh", "-c", SERVE]},
    }
    session = spec(services)
    await provider.start(session, heard)
    assert await shell(provider, session, "echo $PORT") == "3001"
    assert await provider.exec(session.ref, ["sh", "-c", "echo no >&2; exit 3"]) == (3, b"no\n")
    with pytest.raises(ProviderFailure, match="did not end within 3 seconds"):
        await provider.exec(session.ref, ["sleep", "1000"])

    # What has ended, an evicted pod for instance, is nobody's to remove.
    ended = {
        "metadata": {"name": "ended", "labels": {INSTANCE: provider.options.instance, SESSION: "42"}},
        "spec": {
            "restartPolicy": "Never", "terminationGracePeriodSeconds": 0,
            "containers": [{"name": "ended", "image": IMAGE, "command": ["true"], "resources": {"requests": SMALL}}],
        },
    }  # fmt: skip
    await provider.cluster.create(inside(session, "pods"), ended, dict)
    await eventually(lambda: _phase(provider, session, "ended", "Succeeded"))
    running = await objects(provider.cluster, inside(session, "pods"), label_selector="app.kubernetes.io/name")
    pod = f"pods/{running[0]['metadata']['name']}"
    await provider.cluster.patch(inside(session, pod), {"metadata": {"finalizers": ["example.com/hold"]}}, dict)
    try:
        with pytest.raises(ProviderFailure, match=r"After 3 seconds still not ended: session-42-.*node") as hangs:
            await provider.stop(session.ref)
        assert hangs.value.reason == "StopTimeout"
    finally:
        await provider.cluster.patch(inside(session, pod), {"metadata": {"finalizers": None}}, dict)
    await make().stop(session.ref)
    assert [one["metadata"]["name"] for one in await objects(provider.cluster, inside(session, "pods"))] == ["ended"]

    # Pods may be there without their Deployment.
    await provider.start(session, heard)
    await provider.cluster.delete(inside(session, "deployments/session-42", "/apis/apps/v1"), propagation="Orphan")
    with pytest.raises(ProviderFailure, match=r"still not ended: session-42-"):
        await provider.stop(session.ref)


async def _phase(provider: KubernetesProvider, session: SessionSpec, pod: str, phase: str) -> bool:
    found = await provider.cluster.get(inside(session, f"pods/{pod}"), Pod)
    return found.status.phase == phase


async def test_a_chart_without_the_sessions_deployment_is_given_up(
    make: MakeProvider, heard: Heard, tmp_path: Path
) -> None:
    (tmp_path / "templates").mkdir()
    (tmp_path / "Chart.yaml").write_text("{apiVersion: v2, name: other, version: 1.0.0}")
    (tmp_path / "templates" / "all.yaml").write_text("{apiVersion: v1, kind: ConfigMap, metadata: {name: other}}")
    provider = make(chart=str(tmp_path))
    session = spec()
    with pytest.raises(ProviderFailure, match=r"must make a Deployment named session-42\.") as given_up:
        await provider.start(session, heard)
    assert given_up.value.reason == "TakenAway"
    await provider.delete(session.ref)
