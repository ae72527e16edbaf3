"""The client against a real API server: objects, watches, logs, commands, and ways to be let in."""

from __future__ import annotations

import asyncio
import base64
import uuid
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest
import yaml

from orchestrator.cluster.access import Kubeconfig, ServiceAccount
from orchestrator.cluster.client import EXEC_OUTPUT, Cluster
from orchestrator.cluster.objects import Deployment, Partial, Pod
from orchestrator.errors import ApiRefused, ProviderUnavailable
from tests.cluster.conftest import IMAGE, eventually


class _ConfigMap(msgspec.Struct):
    metadata: dict[str, Any]
    data: dict[str, str] = {}


class _TokenStatus(msgspec.Struct):
    token: str


class _TokenRequest(msgspec.Struct):
    status: _TokenStatus


def _maps(namespace: str) -> str:
    return f"/api/v1/namespaces/{namespace}/configmaps"


def _map(name: str, data: Mapping[str, str] | None = None, **metadata: Any) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name} | metadata,
        "data": dict(data or {}),
    }


async def _run(cluster: Cluster, namespace: str, script: str) -> Pod:
    """A pod with one container, `main`, that runs a script; returns once it has begun to."""
    container = {"name": "main", "image": IMAGE, "imagePullPolicy": "IfNotPresent", "command": ["sh", "-c", script]}
    spec = {"automountServiceAccountToken": False, "terminationGracePeriodSeconds": 0, "containers": [container]}
    path = f"/api/v1/namespaces/{namespace}/pods"
    await cluster.create(path, {"metadata": {"name": "one"}, "spec": spec}, Pod)

    async def begun() -> Pod | None:
        pod = await cluster.get(f"{path}/one", Pod)
        return pod if pod.status.phase == "Running" else None

    found = await eventually(begun)
    assert found is not None
    return found


async def _refused(asked: Any) -> tuple[int, str]:
    with pytest.raises(ApiRefused) as refused:
        await asked
    return refused.value.status, refused.value.reason


def _config(kubeconfig: Path) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(kubeconfig.read_text())
    return config


def _written(path: Path, config: dict[str, Any]) -> Kubeconfig:
    path.write_text(yaml.safe_dump(config))
    return Kubeconfig(str(path))


# Objects. ------------------------------------------------------------------------------------------------------------


async def test_an_object_is_made_read_changed_scaled_and_deleted(cluster: Cluster, made: str) -> None:
    path, one = _maps(made), f"{_maps(made)}/one"
    first = await cluster.create(path, _map("one", {"a": "1"}), _ConfigMap)
    assert await _refused(cluster.create(path, _map("one"), _ConfigMap)) == (409, "AlreadyExists")
    assert (await cluster.get(one, _ConfigMap)).data == {"a": "1"}

    assert (await cluster.patch(one, {"data": {"a": None, "b": "2"}}, _ConfigMap)).data == {"b": "2"}
    assert (await cluster.patch(one, {"data": {"c": "3"}}, _ConfigMap, kind="strategic")).data == {"b": "2", "c": "3"}
    replaced = await cluster.replace(one, _map("one", {"d": "4"}), _ConfigMap)
    assert replaced.data == {"d": "4"}
    old = _map("one", resourceVersion=first.metadata["resourceVersion"])
    assert await _refused(cluster.replace(one, old, _ConfigMap)) == (409, "Conflict")

    other = await cluster.patch(one, _map("one", {"d": "5"}), _ConfigMap, kind="apply", fieldManager="somebody")
    assert other.data == {"d": "5"}
    assert (await cluster.patch(one, _map("one", {"d": "6"}), _ConfigMap, kind="apply")).data == {"d": "6"}
    applied = await cluster.patch(f"{path}/two", _map("two", {"e": "7"}), _ConfigMap, kind="apply")
    assert applied.data == {"e": "7"}

    stale = cluster.delete(one, preconditions={"uid": str(uuid.uuid4())})
    assert await _refused(stale) == (409, "Conflict")
    await cluster.delete(one, preconditions={"uid": replaced.metadata["uid"]})
    assert await _refused(cluster.get(one, _ConfigMap)) == (404, "NotFound")
    assert await _refused(cluster.delete(one)) == (404, "NotFound")

    deployments = f"/apis/apps/v1/namespaces/{made}/deployments"
    template = {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "main", "image": IMAGE}]}}
    spec = {"replicas": 0, "selector": {"matchLabels": {"a": "b"}}, "template": template, "paused": True}
    await cluster.create(deployments, {"metadata": {"name": "web"}, "spec": spec}, Deployment)
    await cluster.scale(f"{deployments}/web", 2)
    assert (await cluster.get(f"{deployments}/web", Deployment)).spec.replicas == 2
    assert await _refused(cluster.scale(f"{deployments}/other", 1)) == (404, "NotFound")
    assert await _refused(cluster.get("/apis/nobody.example/v1/things", Partial)) == (404, "")


async def test_a_list_comes_in_pages_of_what_is_selected(cluster: Cluster, made: str) -> None:
    for number in range(7):
        await cluster.create(_maps(made), _map(f"map-{number}", labels={"odd": str(number % 2)}), _ConfigMap)

    async def names(**selected: Any) -> list[list[str]]:
        pages = cluster.list(_maps(made), Partial, **selected)
        return [[one.metadata.name for one in page.items if one.metadata.name[:4] == "map-"] async for page in pages]

    assert await names(label_selector="odd", limit=3) == [
        ["map-0", "map-1", "map-2"],
        ["map-3", "map-4", "map-5"],
        ["map-6"],
    ]
    assert await names(label_selector="odd=1") == [["map-1", "map-3", "map-5"]]
    assert await names(field_selector="metadata.name=map-4") == [["map-4"]]
    assert await names(label_selector="odd=2") == [[]]
    versions = {
        page.metadata.resource_version
        async for page in cluster.list(_maps(made), Partial, label_selector="odd", limit=2)
    }
    assert len(versions) == 1


async def test_the_cluster_says_what_it_is_and_what_we_may(cluster: Cluster) -> None:
    assert (await cluster.version()).git_version.startswith("v1.")
    assert await cluster.can_i("delete", "namespaces")
    assert await cluster.can_i("create", "pods", subresource="exec", namespace="default")


# Streams. ------------------------------------------------------------------------------------------------------------


async def test_a_watch_streams_lines_of_any_size_until_the_server_ends_it(cluster: Cluster, made: str) -> None:
    async for page in cluster.list(_maps(made), Partial):
        version = page.metadata.resource_version
    params = {"watch": "1", "resourceVersion": version, "labelSelector": "mine", "timeoutSeconds": "60"}
    seen: list[dict[str, Any]] = []
    async with cluster.stream(_maps(made), params) as arriving:
        labels = {"mine": "yes"}
        await cluster.create(_maps(made), _map("small", {"a": "ä\n"}, labels=labels), _ConfigMap)
        await cluster.create(_maps(made), _map("large", {"a": "x" * 1_000_000}, labels=labels), _ConfigMap)
        await cluster.delete(f"{_maps(made)}/small")
        async for lines in arriving:
            seen += [msgspec.json.decode(line) for line in lines]
            if len(seen) == 3:
                break
    told = [(line["type"], line["object"]["metadata"]["name"], len(line["object"]["data"]["a"])) for line in seen]
    assert told == [("ADDED", "small", 2), ("ADDED", "large", 1_000_000), ("DELETED", "small", 2)]

    async with cluster.stream(_maps(made), params | {"timeoutSeconds": "1", "labelSelector": "no=such"}) as arriving:
        assert [lines async for lines in arriving] == []


async def test_a_stream_that_falls_silent_is_given_up(cluster: Cluster) -> None:
    async with cluster.stream("/api/v1/nodes", {"watch": "1", "labelSelector": "no=such"}, idle=0.5) as arriving:
        with pytest.raises(ProviderUnavailable, match=r"The cluster test at \S+ has sent nothing for 0.5 sec"):
            await anext(arriving)


async def test_logs_are_read_followed_and_kept_of_the_run_before(cluster: Cluster, made: str) -> None:
    script = "echo first; echo; for i in $(seq 20000); do echo $i; done; sleep 1; echo -n last; sleep 1; exit 3"
    await _run(cluster, made, script)

    async def log(**asked: Any) -> list[bytes]:
        async with cluster.logs(made, "one", "main", **asked) as arriving:
            return [line async for lines in arriving for line in lines]

    followed = await log(follow=True)
    assert followed[:3] == [b"first", b"", b"1"]
    assert followed[-2:] == [b"20000", b"last"]
    assert len(followed) == 20_003

    async def restarted() -> bool:
        pod = await cluster.get(f"/api/v1/namespaces/{made}/pods/one", Pod)
        return pod.status.container_statuses[0].restart_count > 0

    await eventually(restarted)

    async def kept() -> bool:
        # A kubelet that is just removing that run says in a line that it has none; and the next run may end meanwhile.
        before = await log(previous=True, timestamps=True, tail=2)
        if [line.partition(b" ")[2] for line in before] != [b"20000", b"last"]:
            return False
        written = datetime.fromisoformat(before[0].split(b" ")[0][:26].decode() + "+00:00")
        later = await log(previous=True, since=written + timedelta(seconds=60))
        return not later and len(await log(previous=True, since=written - timedelta(seconds=60))) == 20_003

    await eventually(kept)
    status, _ = await _refused(_first(cluster, made, "one", "nobody"))
    assert status == 400
    assert await _refused(_first(cluster, made, "nobody", "main")) == (404, "NotFound")


async def _first(cluster: Cluster, namespace: str, pod: str, container: str) -> None:
    async with cluster.logs(namespace, pod, container) as arriving:
        await anext(arriving)


async def test_commands_give_their_exit_code_and_their_output(cluster: Cluster, made: str) -> None:
    await _run(cluster, made, "sleep 1000")

    async def sh(script: str, **asked: Any) -> tuple[int, bytes]:
        return await cluster.exec(made, "one", "main", ["sh", "-c", script], **asked)

    assert await sh("echo out; sleep 0.2; echo error >&2") == (0, b"out\nerror\n")
    assert await sh("exit 42") == (42, b"")
    assert await cluster.exec(made, "one", "main", ["echo", "a b", "&c=d", "ä"]) == (0, "a b &c=d ä\n".encode())
    code, output = await sh("head -c 5000000 /dev/zero; exit 1")
    assert (code, output) == (1, bytes(EXEC_OUTPUT))
    assert (await sh("kill -9 $$"))[0] == 137
    results = await asyncio.gather(*(sh(f"echo {number}") for number in range(5)))
    assert results == [(0, f"{number}\n".encode()) for number in range(5)]

    with pytest.raises(ProviderUnavailable, match="The command in one did not end within 1 seconds"):
        await sh("sleep 1000", deadline=1.0)
    task = asyncio.create_task(sh("sleep 1001"))

    async def begun() -> bool:
        return b"\nsleep 1001\n" in (await sh("ps -o args"))[1]

    await eventually(begun)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    with pytest.raises(ApiRefused, match='"no-such-program": executable file not found'):
        await cluster.exec(made, "one", "main", ["no-such-program"])
    with pytest.raises(ApiRefused, match="container other is not valid for pod one"):
        await cluster.exec(made, "one", "other", ["true"])
    with pytest.raises(ApiRefused, match='pods "two" not found'):
        await cluster.exec(made, "two", "main", ["true"])


# Ways to be let in. --------------------------------------------------------------------------------------------------


async def test_who_has_no_rights_is_refused_and_told_so(powerless_kubeconfig: Path, cluster: Cluster) -> None:
    async with Cluster(Kubeconfig(str(powerless_kubeconfig))) as powerless:
        assert not await powerless.can_i("list", "pods")
        for asked in (powerless.get("/api/v1/nodes", Partial), powerless.exec("default", "one", "main", ["true"])):
            with pytest.raises(ApiRefused, match="is forbidden: User") as refused:
                await asked
            assert (refused.value.status, refused.value.reason) == (403, "Forbidden")
        with pytest.raises(ApiRefused, match="cannot watch resource"):
            async with powerless.stream("/api/v1/pods", {"watch": "1"}):
                pass


async def test_certificates_may_be_in_files_beside_the_kubeconfig(
    kubeconfig: Path, token_kubeconfig: Path, tmp_path: Path
) -> None:
    config = _config(kubeconfig)
    for section, keys in (("clusters", ["certificate-authority"]), ("users", ["client-certificate", "client-key"])):
        held = config[section][0][section[:-1]]
        for key in keys:
            (tmp_path / key).write_bytes(base64.b64decode(held.pop(f"{key}-data")))
            held[key] = key
    async with Cluster(_written(tmp_path / "kubeconfig", config)) as cluster:
        assert await cluster.can_i("delete", "namespaces")


async def test_a_token_that_expires_is_read_again_from_its_file(token_kubeconfig: Path, tmp_path: Path) -> None:
    config, token = _config(token_kubeconfig), tmp_path / "token"
    right = config["users"][0]["user"].pop("token")
    config["users"][0]["user"]["tokenFile"] = "token"
    token.write_text("expired\n")
    async with Cluster(_written(tmp_path / "kubeconfig", config)) as cluster:
        with pytest.raises(ProviderUnavailable, match=r"\S+ does not let us in \(401\)"):
            await cluster.can_i("list", "pods")
        token.write_text(f"{right}\n")
        assert await cluster.can_i("list", "pods")
        with pytest.raises(ApiRefused, match='pods "one" not found'):
            await cluster.exec("default", "one", "main", ["true"])


async def test_in_a_pod_the_service_account_is_used_and_its_token_may_change(
    cluster: Cluster, made: str, kubeconfig: Path, token_kubeconfig: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    served = _config(kubeconfig)["clusters"][0]["cluster"]
    server = urlsplit(served["server"])
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", server.hostname)
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.port))
    (tmp_path / "ca.crt").write_bytes(base64.b64decode(served["certificate-authority-data"]))
    token = tmp_path / "token"
    token.write_text("expired")

    async with Cluster(ServiceAccount(tmp_path)) as inside:
        assert inside.access.in_cluster
        with pytest.raises(ProviderUnavailable, match="does not let us in"):
            await inside.can_i("list", "pods", namespace=made)
        request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
        account = f"/api/v1/namespaces/{made}/serviceaccounts/default/token"
        token.write_text((await cluster.create(account, request, _TokenRequest)).status.token)
        assert not await inside.can_i("list", "pods", namespace=made)
        with pytest.raises(
            ApiRefused, match=f'User "system:serviceaccount:{made}:default" cannot list resource "pods"'
        ):
            await inside.get(f"/api/v1/namespaces/{made}/pods", Partial)


async def test_a_server_that_is_not_trusted_is_not_shown_a_token(token_kubeconfig: Path, tmp_path: Path) -> None:
    config = _config(token_kubeconfig)
    served, token = config["clusters"][0]["cluster"], config["users"][0]["user"]["token"]
    authority = served.pop("certificate-authority-data")
    async with Cluster(_written(tmp_path / "kubeconfig", config)) as cluster:
        with pytest.raises(ProviderUnavailable, match="shows a certificate that is not trusted") as untrusted:
            await cluster.version()
        assert token not in repr(untrusted.getrepr(style="long", showlocals=False))
    served["certificate-authority-data"] = authority
    served["tls-server-name"] = "another.example"
    async with Cluster(_written(tmp_path / "kubeconfig", config)) as cluster:
        with pytest.raises(ProviderUnavailable, match=r"not trusted \(Hostname mismatch"):
            await cluster.version()
    served["insecure-skip-tls-verify"] = True
    async with Cluster(_written(tmp_path / "kubeconfig", config)) as cluster:
        assert await cluster.can_i("list", "pods")
