"""A Kubernetes API that fails as it is told to, and a client of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from orchestrator.cluster.access import find
from orchestrator.cluster.client import Cluster
from tests.kubernetes import KubernetesApi


@pytest_asyncio.fixture
async def api() -> AsyncIterator[KubernetesApi]:
    """The API, empty."""
    async with KubernetesApi(token="first") as api:
        yield api


@pytest.fixture
def kubeconfig(api: KubernetesApi, tmp_path: Path) -> Path:
    """What the client is configured by."""
    return api.write_kubeconfig(tmp_path / "kubeconfig")


@pytest_asyncio.fixture
async def cluster(kubeconfig: Path) -> AsyncIterator[Cluster]:
    """A client of the API."""
    cluster = Cluster(find(str(kubeconfig)))
    yield cluster
    await cluster.close()
