"""What `cluster-code dev` makes of a KUBECONFIG: a provider, a size, and an image that the nodes have."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import structlog

from orchestrator import machine_import, machines
from orchestrator.database import Pool
from scripts import cluster
from tests.kubernetes import KubernetesApi, refused

NODES = "/api/v1/nodes"
DEFAULT = "docker.io/library/busybox:1.36"


@pytest_asyncio.fixture
async def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[KubernetesApi]:
    """An API server, and KUBECONFIG."""
    async with KubernetesApi() as api:
        monkeypatch.setenv("KUBECONFIG", str(api.write_kubeconfig(tmp_path / "kubeconfig")))
        yield api


def node(name: str, *images: list[str] | None, unschedulable: bool = False) -> dict[str, Any]:
    return {
        "metadata": {"name": name},
        "spec": {"unschedulable": unschedulable} if unschedulable else {},
        "status": {"images": [{"names": names, "sizeBytes": 1} for names in images]},
    }


async def imported(pool: Pool, image: str = "") -> None:
    async with pool.acquire() as connection:
        await cluster.import_provider(connection, image)


async def provider(pool: Pool) -> machines.ProviderRow:
    async with pool.acquire() as connection:
        return next(row for row in await machines.providers(connection) if row.name == "kubernetes")


async def images(pool: Pool) -> set[str]:
    """Of the services of the demonstration's machine config."""
    async with pool.acquire() as connection:
        (config,) = [one for one in await machines.machine_configs(connection) if one.name == "kubernetes-small"]
    assert set(config.services) == {"preview", "chat", "vscode"}
    return {service["image"] for service in config.services.values()}


def test_there_is_a_cluster_where_kubeconfig_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    assert not cluster.configured()
    monkeypatch.setenv("KUBECONFIG", "")
    assert not cluster.configured()
    monkeypatch.setenv("KUBECONFIG", "/somewhere")
    assert cluster.configured()


def test_in_a_pod_there_is_one_where_it_has_a_service_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.96.0.1")
    monkeypatch.setattr(cluster, "_ACCOUNT", tmp_path / "token")
    assert not cluster.configured()
    (tmp_path / "token").write_text("")
    assert cluster.configured()


async def test_the_provider_is_not_the_default_and_its_objects_are_its_own(pool: Pool) -> None:
    await imported(pool)
    first = await provider(pool)
    assert (first.kind, first.is_default, first.enabled) == ("kubernetes", False, True)
    assert first.options["instance"].startswith("dev-")
    assert await images(pool) == {DEFAULT}
    # Once is enough.
    await imported(pool, "another:1")
    assert await provider(pool) == first
    assert await images(pool) == {DEFAULT}


async def test_the_image_that_was_asked_for_is_there_from_the_first_moment(pool: Pool) -> None:
    await imported(pool, "registry.example.com/web:2")
    assert await images(pool) == {"registry.example.com/web:2"}


async def test_what_an_administrator_has_made_stays(pool: Pool) -> None:
    async with pool.acquire() as connection:
        await machine_import.apply(
            connection,
            machine_import.read_text(
                "providers: [{name: kubernetes, kind: kubernetes, options: {context: mine}, enabled: false}]",
                source="x",
            ),
        )
    await imported(pool)
    row = await provider(pool)
    assert (row.options, row.enabled) == ({"context": "mine"}, False)
    async with pool.acquire() as connection:
        assert await machines.machine_configs(connection) == []


async def test_a_machine_config_of_that_name_stays_whose_it_is(pool: Pool) -> None:
    async with pool.acquire() as connection:
        text = "{providers: [{name: mine, kind: devpod}], machine_configs: [{name: kubernetes-small, provider: mine}]}"
        await machine_import.apply(connection, machine_import.read_text(text, source="x"))
    await imported(pool)
    assert (await provider(pool)).kind == "kubernetes"
    async with pool.acquire() as connection:
        (config,) = await machines.machine_configs(connection)
    assert config.provider == "mine"


@pytest.mark.parametrize(
    ("nodes", "image"),
    [
        ([], DEFAULT),
        ([node("a", ["registry.example.com/other:1"])], DEFAULT),
        ([node("a", ["bench.local/busybox:1", "bench.local/pause:1"])], "bench.local/busybox:1"),
        # By a digest alone it has no name that a person would know; a toolbox of that name is another thing.
        ([node("a", ["docker.io/library/busybox@sha256:73aaf0"], ["quay.io/busybox/tools:1"], None)], DEFAULT),
        # One that only some have must be pulled, as ours.
        ([node("a", ["local/busybox:1"]), node("b", ["local/busybox:1", "other/busybox:2"])], "local/busybox:1"),
        ([node("a", ["local/busybox:1"]), node("b")], DEFAULT),
        # But for those that get no pods.
        ([node("a", ["local/busybox:1"]), node("b", unschedulable=True)], "local/busybox:1"),
        ([node("a", ["a.example.com/busybox:1"], [DEFAULT])], DEFAULT),
    ],
)
async def test_a_busybox_that_the_nodes_hold_is_taken(
    pool: Pool, api: KubernetesApi, nodes: list[dict[str, Any]], image: str
) -> None:
    for one in nodes:
        api.put(NODES, one)
    await imported(pool)
    with structlog.testing.capture_logs() as said:
        await cluster.fit_image(pool, "")
    assert await images(pool) == {image}
    assert [line["image"] for line in said if "image" in line] == [image]


async def test_who_may_not_see_the_nodes_gets_the_default(pool: Pool, api: KubernetesApi) -> None:
    api.put(NODES, node("a", ["local/busybox:1"]))
    api.fail("list", refused(403, "Forbidden", "nodes is forbidden"))
    await imported(pool)
    await cluster.fit_image(pool, "")
    assert await images(pool) == {DEFAULT}


async def test_the_setting_wins_and_may_be_changed_later(pool: Pool, api: KubernetesApi) -> None:
    api.put(NODES, node("a", ["local/busybox:1"]))
    await imported(pool, "mine:1")
    await cluster.fit_image(pool, "mine:1")
    assert await images(pool) == {"mine:1"}
    await cluster.fit_image(pool, "mine:2")
    assert await images(pool) == {"mine:2"}
    # Not set any more: what was chosen stays.
    await cluster.fit_image(pool, "")
    assert await images(pool) == {"mine:2"}


@pytest.mark.parametrize("image", ["", "mine:1"])
async def test_a_machine_config_that_somebody_changed_stays_as_it_is(
    pool: Pool, api: KubernetesApi, image: str
) -> None:
    api.put(NODES, node("a", ["local/busybox:1"]))
    await imported(pool)
    await pool.execute("UPDATE machine_configs SET cpu = 2 WHERE name = 'kubernetes-small'")
    await cluster.fit_image(pool, image)
    assert await images(pool) == {DEFAULT}
    await pool.execute("DELETE FROM machine_configs")
    await cluster.fit_image(pool, image)


async def test_a_cluster_that_is_away_is_waited_for(pool: Pool, api: KubernetesApi) -> None:
    api.put(NODES, node("a", ["local/busybox:1"]))
    await imported(pool)
    await api.refuse()
    task = asyncio.create_task(cluster.fit_image(pool, ""))
    with structlog.testing.capture_logs() as said:
        async with asyncio.timeout(20):
            while not any("not known yet" in line["event"] for line in said):
                await asyncio.sleep(0.02)
    assert not task.done()
    await api.listen()
    async with asyncio.timeout(30):
        await task
    assert await images(pool) == {"local/busybox:1"}


async def test_a_kubeconfig_that_is_none_is_told_and_nothing_changes(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (file := tmp_path / "kubeconfig").write_text("[]")
    monkeypatch.setenv("KUBECONFIG", str(file))
    await imported(pool)
    task = asyncio.create_task(cluster.fit_image(pool, ""))
    await asyncio.wait([task], timeout=1)
    task.cancel()
    await asyncio.wait([task])
    assert await images(pool) == {DEFAULT}
