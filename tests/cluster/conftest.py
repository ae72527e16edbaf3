"""A real Kubernetes, where KUBECONFIG names one: a client of it, and a namespace for each test."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TypeVar

import pytest
import pytest_asyncio

from orchestrator.cluster.access import Kubeconfig
from orchestrator.cluster.client import Cluster
from orchestrator.cluster.objects import Namespace, Partial
from orchestrator.errors import ApiRefused

T = TypeVar("T")

IMAGE = os.environ.get("TEST_IMAGE", "bench.local/busybox:1")
# Seconds. Deleting a namespace takes Kubernetes some ten, and more when it is busy.
DEADLINE = 60.0
_NAMESPACES = "/api/v1/namespaces"
_HOW_TO_GET_ONE = "no Kubernetes: set KUBECONFIG to one that tests may use"


@pytest.fixture
def kubeconfig() -> Path:
    """The file that leads to the cluster; without one the test is skipped, with `CI` set it fails."""
    if path := os.environ.get("KUBECONFIG"):
        return Path(path)
    if os.environ.get("CI"):
        pytest.fail(_HOW_TO_GET_ONE, pytrace=False)
    pytest.skip(_HOW_TO_GET_ONE)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Tell in one line, and not in one for each test, that there is no Kubernetes."""
    report = yield
    if report.skipped and isinstance(report.longrepr, tuple) and _HOW_TO_GET_ONE in report.longrepr[2]:
        report.longrepr = (__file__, 1, report.longrepr[2])
    return report


def _beside(kubeconfig: Path, suffix: str) -> Path:
    path = kubeconfig.with_name(f"{kubeconfig.name}.{suffix}")
    if not path.exists():
        pytest.skip(f"only for a cluster with a {path.name} beside its kubeconfig")
    return path


@pytest.fixture
def token_kubeconfig(kubeconfig: Path) -> Path:
    """A file that leads to the cluster by an administrator's token, and nothing else."""
    return _beside(kubeconfig, "token")


@pytest.fixture
def powerless_kubeconfig(kubeconfig: Path) -> Path:
    """A file that leads to the cluster as a user without any rights."""
    return _beside(kubeconfig, "user")


@pytest_asyncio.fixture
async def cluster(kubeconfig: Path) -> AsyncIterator[Cluster]:
    """A client of the cluster, as administrator."""
    # Two cores run everything, the cluster too.
    async with Cluster(Kubeconfig(str(kubeconfig)), name="test", timeout=30.0) as cluster:
        yield cluster


@asynccontextmanager
async def removed_after(cluster: Cluster, namespace: str) -> AsyncIterator[str]:
    """Delete a namespace, if it was made, after the body, with all in it, and wait until it is gone."""
    try:
        yield namespace
    finally:
        path = f"{_NAMESPACES}/{namespace}"
        with suppress(ApiRefused):
            # Nothing that tests run is worth waiting for.
            await cluster.delete(f"/api/v1/namespaces/{namespace}/pods", grace=0)
        with suppress(ApiRefused):
            await cluster.delete(path)
        await eventually(lambda: absent(cluster, path))


@pytest_asyncio.fixture
async def namespace(cluster: Cluster) -> AsyncIterator[str]:
    """The UUID of a project, as text. Whoever needs its namespace makes it; it is deleted in the end."""
    async with removed_after(cluster, str(uuid.uuid4())) as namespace:
        yield namespace


@pytest_asyncio.fixture
async def made(cluster: Cluster, namespace: str) -> str:
    """`namespace`, which is there, and where pods can be made."""
    await cluster.create(_NAMESPACES, {"metadata": {"name": namespace}}, Namespace)
    await eventually(lambda: there(cluster, f"{_NAMESPACES}/{namespace}/serviceaccounts/default"))
    return namespace


async def there(cluster: Cluster, path: str) -> bool:
    """Whether there is an object at the path."""
    try:
        await cluster.get(path, Partial)
    except ApiRefused as error:
        if error.status != 404:
            raise
        return False
    return True


async def absent(cluster: Cluster, path: str) -> bool:
    """Whether there is none."""
    return not await there(cluster, path)


async def eventually(ask: Callable[[], Awaitable[T]], *, within: float = DEADLINE) -> T:
    """Ask until the answer is true, and return it. Raises TimeoutError."""
    async with asyncio.timeout(within):
        while not (answer := await ask()):
            await asyncio.sleep(0.1)
    return answer
