"""`cluster-code demo-deploy`: from a push to an app that answers, shown as it happens, against a running server.

    app -> clone, build, run -> an answer through Traefik -> a broken commit (the old one serves on) -> a mended one
        -> rollback -> removed

Meanwhile the app is asked again and again: no request may fail. Exits 0 only if all of it happened.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import aiohttp
import orjson

from orchestrator.docker.engine import Engine
from orchestrator.docker.labels import APP
from orchestrator.errors import ClusterCodeError
from orchestrator.settings import DeploySettings, load
from scripts import front
from scripts.demo_client import Account, Client, server
from scripts.demo_repository import DemoFailed, Repository, served
from scripts.engine import busybox

if TYPE_CHECKING:
    from environs import Env

_STEPS = 14
# Seconds for all of it; images may have to be pulled first.
_DEADLINE = 300.0
# Seconds between two looks at the app.
_LOOK_EVERY = 0.02
# Seconds that its page gets to be the one that was deployed: Traefik has been told by then.
_SEEN_WITHIN = 10.0
_PORT = 8080
_IMAGE = "busybox:stable"
_DOCKERFILE = f"""\
ARG BASE={_IMAGE}
FROM $BASE
COPY index.html /www/index.html
CMD ["/bin/busybox", "httpd", "-f", "-p", "{_PORT}", "-h", "/www"]
"""
_BROKEN = f"""\
ARG BASE={_IMAGE}
FROM $BASE
CMD ["/bin/busybox", "sh", "-c", "echo 'The database cannot be found.' >&2; exit 3"]
"""


@dataclass(frozen=True, slots=True)
class Options:
    """What the demonstration is asked to do; None: the default."""

    account: Account
    url: str | None = None
    # Where a Traefik answers that follows the server's Docker engine.
    front: str | None = None
    # The image that the app stands on: any with busybox.
    image: str | None = None
    # Seconds for all of it.
    deadline: float | None = None


def main(env: Env, options: Options) -> int:
    """Run it; returns the exit code. Raises DemoFailed when no server runs, SettingsError."""
    client = Client(server(env, options.url), steps=_STEPS)
    demo = DeployDemo(client, options, load(DeploySettings, env))
    return client.run(demo.run, options.deadline or _DEADLINE)


@dataclass(slots=True)
class Looks:
    """What became of the requests to the app: how many answered which version, and what went wrong with others."""

    pages: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)


class DeployDemo:
    """One run."""

    def __init__(self, client: Client, options: Options, settings: DeploySettings) -> None:
        self._client = client
        self._options = options
        self._settings = settings
        self._name = f"demo-{secrets.token_hex(4)}"

    async def run(self) -> None:
        """All of it. Raises DemoFailed, aiohttp.ClientError; what was made is taken away again in any case."""
        client = self._client
        async with AsyncExitStack() as stack:
            await client.sign_in(self._options.account)
            self._socket, self._position = await client.connect(stack)
            engine = await stack.enter_async_context(Engine(self._settings.docker_host))
            await self._reach(engine)
            self._image = self._options.image or await busybox(engine.host) or _IMAGE
            here = await stack.enter_async_context(front.opened(client, engine, self._settings, self._options.front))
            repository = await stack.enter_async_context(served(self._version("1"), "The first version"))
            app = await stack.enter_async_context(self._app(repository, here))
            first = await self._deployed(app["id"], "live")
            host = urlsplit(first["url"]).netloc
            await self._seen(here, host, "1")
            async with self._looking(here, host) as looks:
                await self._push(app, repository, {"Dockerfile": _BROKEN}, "A version that cannot run", "failed")
                await self._push(app, repository, self._version("2"), "The second version", "live")
                await self._seen(here, host, "2")
                client.next("rolling back to the first version")
                await client.call("POST", f"/deployments/{first['id']}/rollback")
                await self._deployed(app["id"], "live")
                await self._seen(here, host, "1")
            await self._delete(app["id"])
            await self._gone(engine, app["id"])
        self._judge(looks)

    async def _reach(self, engine: Engine) -> None:
        self._client.next("reaching the Docker engine")
        try:
            info = await engine.info()
        except ClusterCodeError as error:
            raise DemoFailed(f"apps need Docker: {error}") from error
        self._client.say(f"Docker {info.version} at {engine.host}")

    def _version(self, version: str) -> dict[str, str]:
        """The files of a version of the app."""
        return {"Dockerfile": _DOCKERFILE, "index.html": f"<h1>Version {version} of {self._name}</h1>\n"}

    @asynccontextmanager
    async def _app(self, repository: Repository, here: str) -> AsyncIterator[dict[str, Any]]:
        """The app, whose first deployment is queued; it goes in the end, whatever happened."""
        client = self._client
        client.next("creating an app")
        workspaces = await client.call("GET", "/workspaces")
        body = {
            "workspace_id": workspaces["items"][0]["id"], "name": self._name, "repo_url": repository.url,
            "branch": "main", "port": _PORT, "health_path": "/", "build_args": {"BASE": self._image},
        }  # fmt: skip
        app: dict[str, Any] = await client.call("POST", "/apps", body)
        client.say(f"app {app['id']}, {self._name}, to be seen by way of {here}")
        try:
            yield app
        except BaseException:
            # It may be gone already.
            with suppress(DemoFailed):
                await asyncio.shield(client.call("DELETE", f"/apps/{app['id']}"))
            raise

    async def _deployed(self, app_id: int, status: str) -> dict[str, Any]:
        """Print the newest deployment's log until it ends; raises DemoFailed when not with `status`."""
        newest = (await self._client.call("GET", f"/apps/{app_id}/deployments"))["items"][0]
        channel = f"deployment:{newest['id']}"
        await self._client.subscribe(self._socket, channel, self._position)
        while True:
            message = await self._client.message(self._socket, twice="deployment.")
            if message["event_type"] != "deployment.status" or message["channel"] != channel:
                continue
            data: dict[str, Any] = message["data"]
            self._client.at(f"{data['status']}: {data['step']}")
            if data["finished_at"] is None:
                continue
            if data["status"] != status:
                raise DemoFailed(
                    f"deployment {data['number']} is {data['status']} ({data['reason']}): {data['message']}"
                )
            return data

    async def _push(
        self, app: dict[str, Any], repository: Repository, files: dict[str, str], message: str, status: str
    ) -> None:
        """A commit, told by a signed webhook as a Git host does, and what becomes of it."""
        client = self._client
        client.next(f"pushing: {message}")
        commit = await repository.commit(files, message)
        body = orjson.dumps({"branch": "main", "commit_id": commit})
        signature = hmac.new(app["hook_secret"].encode(), body, hashlib.sha256).hexdigest()
        headers = {
            "Content-Type": "application/json",
            "X-Signature-256": f"sha256={signature}",
            "X-Delivery-Id": secrets.token_hex(8),
        }
        url = f"{client.url}/api/v1/hooks/{app['id']}/generic"
        async with client.http.post(url, data=body, headers=headers) as answer:
            if answer.status >= 400:
                raise DemoFailed(f"the webhook answers {answer.status}: {(await answer.text())[:200]}")
        client.say(f"commit {commit[:12]}, and its webhook")
        await self._deployed(app["id"], status)

    async def _seen(self, here: str, host: str, version: str) -> None:
        """Wait until the app's page is that of the version."""
        wanted = self._version(version)["index.html"]
        until = monotonic() + _SEEN_WITHIN
        while (page := await self._page(self._client.http, here, host)) != wanted:
            if monotonic() > until:
                raise DemoFailed(f"http://{host} shows {page[:100]!r} and not version {version} by way of {here}")
            await asyncio.sleep(_LOOK_EVERY)
        self._client.say(f"http://{host} answers: {page.strip()}")

    async def _page(self, http: aiohttp.ClientSession, here: str, host: str) -> str:
        async with http.get(here, headers={"Host": host}) as answer:
            return await answer.text()

    @asynccontextmanager
    async def _looking(self, here: str, host: str) -> AsyncIterator[Looks]:
        """Ask for the page again and again, over connections that are kept and over new ones."""
        looks = Looks()
        tasks = [asyncio.create_task(self._look(here, host, looks, new=new), name="looks") for new in (False, True)]
        try:
            yield looks
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _look(self, here: str, host: str, looks: Looks, *, new: bool) -> None:
        pages = {self._version(version)["index.html"]: version for version in ("1", "2")}
        connector = aiohttp.TCPConnector(force_close=new)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=10)) as http:
            while True:
                try:
                    async with http.get(here, headers={"Host": host}) as answer:
                        page = await answer.text()
                    if answer.status == 200 and page in pages:
                        looks.pages[pages[page]] += 1
                    else:
                        looks.failed[f"status {answer.status}"] += 1
                except (aiohttp.ClientError, TimeoutError) as error:
                    looks.failed[type(error).__name__] += 1
                await asyncio.sleep(_LOOK_EVERY)

    async def _delete(self, app_id: int) -> None:
        self._client.next("removing the app")
        await self._client.call("DELETE", f"/apps/{app_id}")
        while True:
            message = await self._client.message(self._socket, twice="deployment.")
            if message["event_type"] == "app.deleted" and message["data"]["id"] == app_id:
                return

    async def _gone(self, engine: Engine, app_id: int) -> None:
        """Show that the engine has nothing of it. Raises DemoFailed when it still has."""
        self._client.next("looking for what is left")
        containers = [name for one in await engine.containers.list({APP: str(app_id)}) for name in one["Names"]]
        images = [name for one in await engine.images.list({APP: str(app_id)}) for name in one["RepoTags"] or ()]
        # Others may have an app of this number at the same engine.
        if left := [name for name in [*containers, *images] if self._name in name]:
            raise DemoFailed(f"the app is deleted, and Docker still has of it {', '.join(left)}")
        self._client.say("Docker has no container and no image of it")

    def _judge(self, looks: Looks) -> None:
        answered = ", ".join(f"{count} by version {version}" for version, count in sorted(looks.pages.items()))
        if looks.failed:
            raise DemoFailed(f"of the requests meanwhile failed: {dict(looks.failed)}; answered: {answered}")
        self._client.say(f"{looks.pages.total()} requests meanwhile, 0 failed ({answered})")
