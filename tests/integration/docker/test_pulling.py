"""Images that a real engine pulls from a registry, and registries that do not give them."""

from __future__ import annotations

import asyncio
import base64
import json
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from orchestrator.docker import images
from orchestrator.docker.images import configured, registry
from orchestrator.errors import EngineRefused, ImagePullFailed
from tests.docker import Owned, Registry


@pytest_asyncio.fixture
async def server() -> AsyncIterator[Registry]:
    async with Registry() as server:
        yield server


async def test_an_image_is_pulled_with_its_progress_in_a_few_lines(
    owned: Owned, server: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "_PROGRESS", 0.2)
    server.rate = 1e7
    large = random.Random(1).randbytes(5_000_000)
    image = server.add(f"team/{owned.instance}", "1", {"large": large}, labels=owned.labels)
    said: list[str] = []
    await owned.engine.images.pull(image, say=said.append)
    found = await owned.engine.images.inspect(image)
    assert found is not None
    assert found["Config"]["Labels"] == owned.labels
    assert said[-1] == f"Status: Downloaded newer image for {image}"
    assert any(line.startswith("Downloading: ") and line.endswith(" %)") for line in said)
    assert len(said) < 10
    assert [one["Id"] for one in await owned.engine.images.list(owned.labels)] == [found["Id"]]
    await owned.engine.images.tag(image, f"{owned.instance}:two")
    await owned.engine.images.remove(image)
    assert await owned.engine.images.inspect(image) is None
    assert (await owned.engine.images.inspect(f"{owned.instance}:two") or {})["Id"] == found["Id"]
    for _ in range(2):
        await owned.engine.images.remove(f"{owned.instance}:two")


async def test_what_is_no_name_of_an_image_leads_to_nothing_else(owned: Owned) -> None:
    for name in ("../containers", "a//b", "./a", "a/"):
        with pytest.raises(EngineRefused, match="no name of an image"):
            await owned.engine.images.inspect(name)
    with pytest.raises(ImagePullFailed, match="no name of an image") as refused:
        await owned.engine.images.pull("Team/web")
    assert refused.value.reason == "ImageNotFound"


async def test_a_registry_is_shown_credentials(
    owned: Owned, server: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    server.password = "hunter2"
    image = server.add(owned.instance, "1", {"a": "b"}, labels=owned.labels)
    with pytest.raises(ImagePullFailed, match=server.host) as refused:
        await owned.engine.images.pull(image)
    assert refused.value.reason == "RegistryUnauthorized"
    with pytest.raises(ImagePullFailed) as refused:
        await owned.engine.images.pull(image, auth={"username": "user", "password": "hunter3"})
    assert refused.value.reason == "RegistryUnauthorized"
    assert "hunter3" not in str(refused.value)
    await owned.engine.images.pull(image, auth={"username": "user", "password": "hunter2"})
    await owned.engine.images.remove(image)
    auth = base64.b64encode(b"user:hunter2").decode()
    (tmp_path / "config.json").write_text(json.dumps({"auths": {f"https://{server.host}/v1/": {"auth": auth}}}))
    await owned.engine.images.pull(image)
    assert await owned.engine.images.inspect(image)


async def test_a_pull_that_fails_says_why(owned: Owned, server: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImagePullFailed, match=f"{server.host} has no image") as failed:
        await owned.engine.images.pull(f"{server.host}/nothing:1")
    assert failed.value.reason == "ImageNotFound"
    with pytest.raises(ImagePullFailed, match="cannot be reached") as failed:
        await owned.engine.images.pull("127.0.0.1:1/nothing")
    assert failed.value.reason == "RegistryUnreachable"
    with pytest.raises(EngineRefused, match="invalid reference format"):
        await owned.engine.images.pull("No Name")
    server.fault = 503
    with pytest.raises(ImagePullFailed) as failed:
        await owned.engine.images.pull(f"{server.host}/nothing")
    assert failed.value.reason == "RegistryUnreachable"
    server.fault = 0
    monkeypatch.setattr(images, "_SILENCE", 0.5)
    with pytest.raises(ImagePullFailed, match=f"{server.host} cannot be reached .it did not answer in time") as failed:
        await owned.engine.images.pull(f"{server.host}/silent")
    assert failed.value.reason == "RegistryUnreachable"


async def test_a_cancelled_pull_ends(owned: Owned, server: Registry) -> None:
    server.rate = 1000
    image = server.add(owned.instance, "1", {"large": random.Random(2).randbytes(1_000_000)}, labels=owned.labels)
    pulling = asyncio.create_task(owned.engine.images.pull(image))
    async with asyncio.timeout(30):
        while not any("/blobs/" in path for path in server.asked):
            await asyncio.sleep(0.01)
    pulling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pulling
    assert await owned.engine.images.inspect(image) is None


def test_credentials_are_found_by_the_registry_of_an_image(tmp_path: Path) -> None:
    hub = "https://index.docker.io/v1/"
    assert [registry(image) for image in ("a", "a/b:1", "docker.io/a", "ghcr.io/a/b", "localhost/a", "h:5000/a")] == [
        hub, hub, hub, "ghcr.io", "localhost", "h:5000",
    ]  # fmt: skip
    assert configured({"DOCKER_CONFIG": str(tmp_path)}) == {}
    auths = {
        "https://index.docker.io/v1/": {"auth": base64.b64encode(b"ann:a:b").decode()},
        "ghcr.io": {"identitytoken": "token"},
        "broken": {"auth": "%"},
        "helped": {},
    }
    (tmp_path / "config.json").write_text(json.dumps({"auths": auths, "credsStore": "desktop"}))
    assert configured({"DOCKER_CONFIG": str(tmp_path)}) == {
        hub: {"username": "ann", "password": "a:b", "serveraddress": hub},
        "ghcr.io": {"identitytoken": "token", "serveraddress": "ghcr.io"},
    }
    (tmp_path / "config.json").write_text("{")
    assert configured({"DOCKER_CONFIG": str(tmp_path)}) == {}
