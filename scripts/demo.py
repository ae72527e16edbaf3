"""`cluster-code demo`: a client's whole way, shown as it happens, against a running server.

    register, sign in -> short token -> /ws -> project -> session: running -> preview -> deleted

On a cluster the way is the same, every pod and event of it shown; there it ends with the namespace gone.
It speaks only what `docs/protocol.md` and the OpenAPI document say, and exits 0 only if all of it happened.
"""

from __future__ import annotations

import asyncio
import secrets
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any

import aiohttp
import orjson
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from orchestrator.errors import ClusterCodeError
from scripts import cluster, display, target
from scripts.demo_repository import DemoFailed, Repository, served

if TYPE_CHECKING:
    from environs import Env

_STEPS = 11
# Seconds that one answer may take.
_ANSWER = 15.0
# Seconds for all of it; a cluster may have to pull images first.
_DEADLINE, _CLUSTER_DEADLINE = 120.0, 300.0
# And for the session to go after a failure.
_LEAVING = 45.0


@dataclass(frozen=True, slots=True)
class Options:
    """What the demonstration is asked to do; None: the default."""

    url: str | None = None
    repo: str | None = None
    branch: str | None = None
    email: str | None = None
    password: str | None = None
    provider: str | None = None
    machine_config: str | None = None
    # Seconds for all of it.
    deadline: float | None = None


def main(env: Env, options: Options) -> int:
    """Run it; returns the exit code. Raises DemoFailed when no server runs."""
    url = options.url or _running(env)
    return asyncio.run(_bounded(url.rstrip("/"), options))


def _running(env: Env) -> str:
    running = target.instance(env).running()
    if running is None:
        raise DemoFailed("no server runs here: start one by `make run` (or name one by --url)")
    return running.url


async def _bounded(url: str, options: Options) -> int:
    console = Console(highlight=False, soft_wrap=True)
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=20), TimeElapsedColumn(),
        console=console, transient=True,
    ) as progress:  # fmt: skip
        demo = Demo(url, options, progress)
        deadline = options.deadline or (_CLUSTER_DEADLINE if options.provider else _DEADLINE)
        try:
            async with asyncio.timeout(deadline):
                await demo.run()
        except TimeoutError:
            problem = f"it took longer than {deadline:g} s; it was at: {demo.step}"
        except (DemoFailed, aiohttp.ClientError) as error:
            problem = f"{error or type(error).__name__} (at: {demo.step})"
        else:
            console.print("[bold green]All of it happened.[/]")
            return 0
    print(f"cluster-code: the demonstration failed: {problem}", file=sys.stderr)
    return 1


class Demo:
    """One run. `step` is what it is doing."""

    def __init__(self, url: str, options: Options, progress: Progress) -> None:
        self.step = "starting"
        self._url = url
        self._options = options
        self._progress = progress
        self._bar = progress.add_task(self.step, total=_STEPS)
        self._headers: dict[str, str] = {}
        # Of a session in a cluster: its pods by name, as they were told last.
        self._pods: dict[str, dict[str, Any]] = {}

    async def run(self) -> None:
        """All of it. Raises DemoFailed, aiohttp.ClientError; what was made is taken away again in any case."""
        async with AsyncExitStack() as stack:
            timeout = aiohttp.ClientTimeout(total=_ANSWER)
            self._http = await stack.enter_async_context(aiohttp.ClientSession(timeout=timeout))
            await self._sign_in()
            socket, position = await self._connect(stack)
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

    async def _sign_in(self) -> None:
        self._next("signing in")
        email, password = self._options.email, self._options.password
        if not email or not password:
            email, password = f"demo-{secrets.token_hex(6)}@localhost", secrets.token_urlsafe(15)
            await self._call("POST", "/auth/register", {"email": email, "password": password, "name": "Demo"})
        answer = await self._call("POST", "/auth/login", {"email": email, "password": password})
        self._headers["Authorization"] = f"Bearer {answer['access_token']}"
        self._say(f"signed in as {email}")

    async def _connect(self, stack: AsyncExitStack) -> tuple[aiohttp.ClientWebSocketResponse, str]:
        """The open socket, and the position from which nothing is missed."""
        self._next("swapping the main token for a short one")
        short = await self._call("POST", "/auth")
        self._say(f"a short token, good for {short['expires_in']} s and one connection")
        self._next("connecting to /ws")
        protocols = ("cluster-code.v1", f"bearer.{short['short_token']}")
        socket = await stack.enter_async_context(self._http.ws_connect(f"{self._url}/ws", protocols=protocols))
        connected = await self._message(socket)
        if connected["event_type"] != "connected":
            raise DemoFailed(f"the first frame is {connected['event_type']!r} and not 'connected'")
        return socket, connected["data"]["position"]

    async def _provider_kind(self) -> str:
        """The kind of the provider that the session will run at. Raises DemoFailed when there is none such, or down."""
        self._next("finding a provider")
        name = self._options.provider
        if name is None and (config := self._options.machine_config) is not None:
            configs = (await self._call("GET", "/machine-configs"))["items"]
            name = next((one["provider"] for one in configs if one["name"] == config), None)
        found = {one["name"]: one for one in (await self._call("GET", "/providers"))["items"] if one["enabled"]}
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
        self._next("finding a repository")
        if self._options.repo:
            return Repository(self._options.repo, "")
        page = f"<!doctype html><title>Demo</title><h1>It runs</h1><p>{secrets.token_hex(16)}</p>\n"
        repository = await stack.enter_async_context(served(page))
        self._say(f"made a small repository, served at {repository.url}")
        return repository

    @asynccontextmanager
    async def _project(self, repository: Repository | None) -> AsyncIterator[dict[str, Any]]:
        self._next("creating a project")
        workspaces = await self._call("GET", "/workspaces")
        body = {"workspace_id": workspaces["items"][0]["id"], "name": "Demo"}
        if repository is not None:
            body["repo_url"] = repository.url
        if self._options.branch:
            body["branch"] = self._options.branch
        project = await self._call("POST", "/projects", body)
        self._say(f"project {project['id']} ({project['uuid']})" + (f" of {repository.url}" if repository else ""))
        try:
            yield project
        finally:
            await self._delete_project(project["id"])

    async def _delete_project(self, project_id: int) -> None:
        """After a failure its session may still be on its way out."""
        began, problem = monotonic(), ""
        while monotonic() < began + _LEAVING:
            try:
                await self._call("DELETE", f"/projects/{project_id}")
            except DemoFailed as error:
                if not problem:
                    self._say("the project is deleted as soon as its session is")
                problem = str(error)
                await asyncio.sleep(0.5)
            else:
                return
        self._say(f"the project {project_id} is left behind: {problem}")

    @asynccontextmanager
    async def _session(self, project: dict[str, Any]) -> AsyncIterator[int]:
        """A session, whose deletion is asked for at the end."""
        self._next("creating a session")
        body = {"project_id": project["id"]}
        for name in ("provider", "machine_config"):
            if given := getattr(self._options, name):
                body[name] = given
        session = await self._call("POST", "/sessions", body)
        try:
            yield session["id"]
            self._next("deleting the session")
        finally:
            await self._call("DELETE", f"/sessions/{session['id']}")

    async def _started(self, socket: aiohttp.ClientWebSocketResponse, position: str, session_id: int) -> dict[str, Any]:
        """The session once it runs, as the socket told it."""
        subscribe = {"action": "subscribe", "channel": f"session:{session_id}", "since": position, "id": "demo"}
        await socket.send_str(orjson.dumps(subscribe).decode())
        return await self._until(socket, session_id, "running")

    async def _look(self, session: dict[str, Any], repository: Repository | None) -> None:
        self._next("fetching the preview")
        url = session["preview_url"]
        if not url:
            raise DemoFailed("the session runs, and has no preview")
        async with self._http.get(url) as answer:
            page = await answer.text()
        if answer.status != 200 or (repository is not None and repository.page not in page):
            raise DemoFailed(f"{url} answers {answer.status}, and not with the repository's page")
        self._say(f"{url} answers {answer.status} with {len(page)} characters, as it should")

    async def _look_at_pods(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        """Show that its pods are ready, as the socket told."""
        self._next("waiting for its pods")
        while not any(pod["ready"] for pod in self._pods.values()):
            await self._message(socket)
        for name, pod in self._pods.items():
            ready = sum(one["ready"] for one in pod["containers"] if not one["init"])
            count = sum(not one["init"] for one in pod["containers"])
            self._say(f"pod {name} on {pod['node'] or 'no node'}: {ready} of {count} containers ready")

    async def _look_from_afar(self, session: dict[str, Any]) -> None:
        """What the preview answers, from here or by way of the API server; of a cluster, neither need be possible."""
        self._next("fetching the preview")
        url = session["preview_url"] or ""
        try:
            async with self._http.get(url) as answer:
                self._say(f"{url} answers {answer.status} with {len(await answer.text())} characters")
        except (aiohttp.ClientError, TimeoutError):
            self._say(f"{url or 'the preview'} is reached from within the cluster only")
            await self._ask_for_page(url)

    async def _ask_for_page(self, url: str) -> None:
        if not cluster.configured():
            return
        try:
            async with cluster.reached() as own:
                page = await cluster.page(own, url)
        except (ClusterCodeError, ValueError) as error:
            self._say(f"nor does the API server reach it for us: {error}")
        else:
            self._say(f"the API server reaches it for us: {page.strip()}")

    async def _gone(self, namespace: str) -> None:
        """Show that the cluster has it no more, where it is ours to ask. Raises DemoFailed when it still has."""
        self._next("looking for the namespace")
        if not cluster.configured():
            self._say(f"the namespace {namespace} is gone, says the server; with KUBECONFIG set the cluster is asked")
            return
        try:
            async with cluster.reached() as own:
                gone = await cluster.gone(own, namespace)
        except ClusterCodeError as error:
            self._say(f"the cluster cannot be asked for the namespace {namespace}: {error}")
            return
        if not gone:
            raise DemoFailed(f"the session is deleted, and the cluster still has its namespace {namespace}")
        self._say(f"the namespace {namespace} is gone: the cluster has none of that name")

    async def _until(self, socket: aiohttp.ClientWebSocketResponse, session_id: int, status: str) -> dict[str, Any]:
        """Print what comes until the session has that status. Raises DemoFailed when it fails."""
        while True:
            message = await self._message(socket)
            data = message["data"]
            if message["event_type"] == "error":
                raise DemoFailed(f"the socket says: {data['message']}")
            if message["event_type"] != "session.status" or data["id"] != session_id:
                continue
            self._progress.update(self._bar, description=f"{data['status']}: {data['message'] or data['reason']}")
            if data["status"] == status:
                return dict(data)
            if data["status"] == "error":
                raise DemoFailed(f"the session failed ({data['reason']}): {data['message']}")

    async def _message(self, socket: aiohttp.ClientWebSocketResponse) -> dict[str, Any]:
        frame = await socket.receive()
        if frame.type is not aiohttp.WSMsgType.TEXT:
            raise DemoFailed(f"the server closed the socket ({socket.close_code} {frame.extra or ''})".rstrip())
        message: dict[str, Any] = orjson.loads(frame.data)
        self._progress.console.print(display.line(message))
        if message["event_type"] == "session.pod":
            pod = message["data"]
            self._pods[pod["pod"]] = pod
            if pod["change"] == "deleted":
                del self._pods[pod["pod"]]
        return message

    async def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else orjson.dumps(body)
        headers = self._headers | ({"Content-Type": "application/json"} if data else {})
        async with self._http.request(method, f"{self._url}/api/v1{path}", data=data, headers=headers) as answer:
            content = await answer.read()
            if answer.status >= 400:
                raise DemoFailed(f"{method} {path} answers {answer.status}: {_detail(content)}")
            return orjson.loads(content) if content else None

    def _next(self, step: str) -> None:
        self.step = step
        self._progress.update(self._bar, advance=1, description=step)

    def _say(self, text: str) -> None:
        self._progress.console.print(Text(f"  {text}", style="dim"))


def _detail(content: bytes) -> str:
    """What a problem document says."""
    try:
        document = orjson.loads(content)
        detail = str(document["detail"])
        errors = {name: " ".join(lines) for name, lines in document.get("errors", {}).items()}
        return detail + "".join(f" {name}: {wrong}" for name, wrong in errors.items() if wrong not in detail)
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        return content[:200].decode(errors="replace")
