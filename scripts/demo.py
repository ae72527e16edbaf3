"""`cluster-code demo`: a client's whole way, shown as it happens, against a running server.

    register, sign in -> short token -> /ws -> project -> session: running -> preview -> deleted

On a cluster the way is the same, every pod and event of it shown; there it ends with the namespace gone.
It speaks only what `docs/protocol.md` and the OpenAPI document say, and exits 0 only if all of it happened.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any

import aiohttp

from orchestrator.errors import ClusterCodeError
from scripts import cluster
from scripts.demo_client import Account, Client, server
from scripts.demo_repository import DemoFailed, Repository, served

if TYPE_CHECKING:
    from environs import Env

_STEPS = 11
# Seconds for all of it; where containers run, images may have to be pulled first.
_DEADLINE, _LONG_DEADLINE = 120.0, 300.0
# And for the session to go after a failure.
_LEAVING = 45.0


@dataclass(frozen=True, slots=True)
class Options:
    """What the demonstration is asked to do; None: the default."""

    account: Account
    url: str | None = None
    repo: str | None = None
    branch: str | None = None
    provider: str | None = None
    machine_config: str | None = None
    # Seconds for all of it.
    deadline: float | None = None


def main(env: Env, options: Options) -> int:
    """Run it; returns the exit code. Raises DemoFailed when no server runs."""
    client = Client(server(env, options.url), steps=_STEPS)
    demo = Demo(client, options)
    return client.run(demo.run, options.deadline or (_LONG_DEADLINE if options.provider else _DEADLINE))


class Demo:
    """One run."""

    def __init__(self, client: Client, options: Options) -> None:
        self._client = client
        self._options = options
        # Of a session in a cluster: its pods by name, as they were told last.
        self._pods: dict[str, dict[str, Any]] = {}

    async def run(self) -> None:
        """All of it. Raises DemoFailed, aiohttp.ClientError; what was made is taken away again in any case."""
        async with AsyncExitStack() as stack:
            await self._client.sign_in(self._options.account)
            socket, position = await self._client.connect(stack)
            in_cluster = await self._provider_kind() == "kubernetes"
            repository = None if in_cluster and not self._options.repo else await self._repository(stack)
            project = await stack.enter_async_context(self._project(repository))
            async with self._session(project) as session_id:
                session = await self._started(socket, position, session_id)
                if in_cluster:
                    await self._look_at_pods(socket)
                    await self._look_from_afar(session)
                else:
                    await self._look(session, repository)
            await self._until(socket, session_id, "deleted")
            if in_cluster:
                await self._gone(session["namespace"])

    async def _provider_kind(self) -> str:
        """The kind of the provider that the session will run at. Raises DemoFailed when there is none such, or down."""
        self._client.next("finding a provider")
        name = self._options.provider
        if name is None and (config := self._options.machine_config) is not None:
            configs = (await self._client.call("GET", "/machine-configs"))["items"]
            name = next((one["provider"] for one in configs if one["name"] == config), None)
        found = {one["name"]: one for one in (await self._client.call("GET", "/providers"))["items"] if one["enabled"]}
        if name is None:
            defaults = [one for one in found.values() if one["is_default"] or len(found) == 1]
            return str(defaults[0]["kind"]) if defaults else ""
        if name not in found:
            raise DemoFailed(
                f"the server has no provider {name!r} (it has: {', '.join(sorted(found)) or 'none'}). For one that is"
                " a Kubernetes cluster start it with KUBECONFIG set: `KUBECONFIG=~/.kube/config make run`"
            )
        if found[name]["state"] == "down":
            raise DemoFailed(f"the provider {name!r} is down: {found[name]['message']}")
        return str(found[name]["kind"])

    async def _repository(self, stack: AsyncExitStack) -> Repository:
        self._client.next("finding a repository")
        if self._options.repo:
            return Repository(self._options.repo)
        page = f"<!doctype html><title>Demo</title><h1>It runs</h1><p>{secrets.token_hex(16)}</p>\n"
        repository = await stack.enter_async_context(served({"index.html": page}))
        self._client.say(f"made a small repository, served at {repository.url}")
        return repository

    @asynccontextmanager
    async def _project(self, repository: Repository | None) -> AsyncIterator[dict[str, Any]]:
        self._client.next("creating a project")
        workspaces = await self._client.call("GET", "/workspaces")
        body = {"workspace_id": workspaces["items"][0]["id"], "name": "Demo"}
        if repository is not None:
            body["repo_url"] = repository.url
        if self._options.branch:
            body["branch"] = self._options.branch
        project = await self._client.call("POST", "/projects", body)
        self._client.say(
            f"project {project['id']} ({project['uuid']})" + (f" of {repository.url}" if repository else "")
        )
        try:
            yield project
        finally:
            await self._delete_project(project["id"])

    async def _delete_project(self, project_id: int) -> None:
        """After a failure its session may still be on its way out."""
        began, problem = monotonic(), ""
        while monotonic() < began + _LEAVING:
            try:
                await self._client.call("DELETE", f"/projects/{project_id}")
            except DemoFailed as error:
                if not problem:
                    self._client.say("the project is deleted as soon as its session is")
                problem = str(error)
                await asyncio.sleep(0.5)
            else:
                return
        self._client.say(f"the project {project_id} is left behind: {problem}")

    @asynccontextmanager
    async def _session(self, project: dict[str, Any]) -> AsyncIterator[int]:
        """A session, whose deletion is asked for at the end."""
        self._client.next("creating a session")
        body = {"project_id": project["id"]}
        for name in ("provider", "machine_config"):
            if given := getattr(self._options, name):
                body[name] = given
        session = await self._client.call("POST", "/sessions", body)
        try:
            yield session["id"]
            self._client.next("deleting the session")
        finally:
            await self._client.call("DELETE", f"/sessions/{session['id']}")

    async def _started(self, socket: aiohttp.ClientWebSocketResponse, position: str, session_id: int) -> dict[str, Any]:
        """The session once it runs, as the socket told it."""
        await self._client.subscribe(socket, f"session:{session_id}", position)
        return await self._until(socket, session_id, "running")

    async def _look(self, session: dict[str, Any], repository: Repository | None) -> None:
        self._client.next("fetching the preview")
        url = session["preview_url"]
        if not url:
            raise DemoFailed("the session runs, and has no preview")
        async with self._client.http.get(url) as answer:
            page = await answer.text()
        if answer.status != 200 or (repository is not None and repository.page not in page):
            raise DemoFailed(f"{url} answers {answer.status}, and not with the repository's page")
        self._client.say(f"{url} answers {answer.status} with {len(page)} characters, as it should")

    async def _look_at_pods(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        """Show that its pods are ready, as the socket told."""
        self._client.next("waiting for its pods")
        while not any(pod["ready"] for pod in self._pods.values()):
            await self._message(socket)
        for name, pod in self._pods.items():
            ready = sum(one["ready"] for one in pod["containers"] if not one["init"])
            count = sum(not one["init"] for one in pod["containers"])
            self._client.say(f"pod {name} on {pod['node'] or 'no node'}: {ready} of {count} containers ready")

    async def _look_from_afar(self, session: dict[str, Any]) -> None:
        """What the preview answers, from here or by way of the API server; of a cluster, neither need be possible."""
        self._client.next("fetching the preview")
        url = session["preview_url"] or ""
        try:
            async with self._client.http.get(url) as answer:
                self._client.say(f"{url} answers {answer.status} with {len(await answer.text())} characters")
        except (aiohttp.ClientError, TimeoutError):
            self._client.say(f"{url or 'the preview'} is reached from within the cluster only")
            await self._ask_for_page(url)

    async def _ask_for_page(self, url: str) -> None:
        if not cluster.configured():
            return
        try:
            async with cluster.reached() as own:
                page = await cluster.page(own, url)
        except (ClusterCodeError, ValueError) as error:
            self._client.say(f"nor does the API server reach it for us: {error}")
        else:
            self._client.say(f"the API server reaches it for us: {page.strip()}")

    async def _gone(self, namespace: str) -> None:
        """Show that the cluster has it no more, where it is ours to ask. Raises DemoFailed when it still has."""
        self._client.next("looking for the namespace")
        if not cluster.configured():
            self._client.say(f"the namespace {namespace} is gone, says the server; with KUBECONFIG it is asked")
            return
        try:
            async with cluster.reached() as own:
                gone = await cluster.gone(own, namespace)
        except ClusterCodeError as error:
            self._client.say(f"the cluster cannot be asked for the namespace {namespace}: {error}")
            return
        if not gone:
            raise DemoFailed(f"the session is deleted, and the cluster still has its namespace {namespace}")
        self._client.say(f"the namespace {namespace} is gone: the cluster has none of that name")

    async def _until(self, socket: aiohttp.ClientWebSocketResponse, session_id: int, status: str) -> dict[str, Any]:
        """Print what comes until the session has that status. Raises DemoFailed when it fails."""
        while True:
            message = await self._message(socket)
            data = message["data"]
            if message["event_type"] != "session.status" or data["id"] != session_id:
                continue
            self._client.at(f"{data['status']}: {data['message'] or data['reason']}")
            if data["status"] == status:
                return dict(data)
            if data["status"] == "error":
                raise DemoFailed(f"the session failed ({data['reason']}): {data['message']}")

    async def _message(self, socket: aiohttp.ClientWebSocketResponse) -> dict[str, Any]:
        message = await self._client.message(socket)
        if message["event_type"] == "session.pod":
            pod = message["data"]
            self._pods[pod["pod"]] = pod
            if pod["change"] == "deleted":
                del self._pods[pod["pod"]]
        return message
