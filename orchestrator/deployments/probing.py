"""Whether a container that was started can serve: asked until it can, it has ended, or its time is up."""

from __future__ import annotations

import asyncio
import re
from contextlib import aclosing, asynccontextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any

import aiohttp
import structlog
from yarl import URL

from orchestrator.deployments import labels, masking
from orchestrator.deployments.contract import StepFailed, Task
from orchestrator.docker.engine import Engine
from orchestrator.errors import EngineRefused, ProviderUnavailable
from orchestrator.providers.symptoms import plain
from orchestrator.settings import DeploySettings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

log = structlog.get_logger("deployments")

# Seconds: for one answer; for one connection; between two attempts, at first and at most.
_ANSWER = 5.0
_CONNECT = 2.0
_FIRST, _LONGEST = 0.05, 1.0
# Seconds that the last output of a container gets to arrive.
_LAST_WORDS = 5.0
# Lines among which one that is not blank is looked for, and characters of it that are looked at.
_LAST_LINES = 10
_LONGEST_LINE = 4096
_ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)")
# Where servers listen that were told no port.
_USUAL_PORTS = (80, 3000, 3001, 4000, 4200, 5000, 5173, 8000, 8080, 8081, 8443, 8888, 9000)
_REFUSED = "refused"
# Reasons, of containers that have ended.
_ENDED = ("Crashed", "OutOfMemory")


async def probe(engine: Engine, task: Task, container: str, settings: DeploySettings) -> None:
    """Return when the app answers at its container's address; what the container writes meanwhile is said.

    One that does not run at first, since its engine was restarted, is started. Raises StepFailed: `Crashed`,
    `OutOfMemory`, `WrongPort`, `Unreachable` (its network cannot be reached from here), `NotHealthy`, `ContainerGone`.
    """
    app = task.settings
    asked = f"GET {app.health_path} at port {app.port}" if app.health_path else f"a connection to port {app.port}"
    task.say(f"Waiting for {asked}, for {settings.probe_deadline:g} seconds at most.\n")
    if not (await _inspect(engine, container))["State"]["Running"]:
        await engine.containers.start(container)
    began = asyncio.get_running_loop().time()
    async with _output(engine, task, container), aiohttp.ClientSession() as session:
        await _until_healthy(engine, task, container, settings, session)
    task.say(f"It answers, after {asyncio.get_running_loop().time() - began:.1f} seconds.\n")


async def _until_healthy(
    engine: Engine, task: Task, container: str, settings: DeploySettings, session: aiohttp.ClientSession
) -> None:
    answer, address, wait = "nothing", "", _FIRST
    try:
        async with asyncio.timeout(settings.probe_deadline) as timer:
            while True:
                found = await _inspect(engine, container)
                if not found["State"]["Running"] or found["RestartCount"]:
                    raise await ended(engine, task, found)
                address = _address(found, settings.network)
                answer = await _attempt(session, address, task, settings)
                if not answer:
                    return
                await asyncio.sleep(wait)
                wait = min(wait * 1.5, _LONGEST)
    except TimeoutError:
        if not timer.expired():
            raise
    raise await _unhealthy(engine, task, container, address, answer, settings)


async def ended(engine: Engine, task: Task, found: dict[str, Any]) -> StepFailed:
    """Why a container that should run does not, by what the engine says of it, and by what it said last itself."""
    state = found["State"]
    if state.get("OOMKilled"):
        limit = found["HostConfig"].get("Memory") or 0
        of = f" of {limit / (1 << 20):.0f} MiB" if limit else ""
        return StepFailed(
            "OutOfMemory", f"The app used more memory than its limit{of}, and was ended: raise the limit."
        )
    ran = _seconds_between(state.get("StartedAt"), state.get("FinishedAt"))
    after = "" if ran is None else f" after {ran:.1f} seconds"
    last = await _last_line(engine, task, found["Id"])
    said = f"; its last line: {last}." if last else ", and said nothing."
    return StepFailed("Crashed", f"The app ended{after} with exit code {state['ExitCode']}{said}")


async def _last_line(engine: Engine, task: Task, container: str) -> str:
    """What an app said last that is not blank, fit for a sentence; "" where nothing can be had."""
    last = ""
    try:
        async with asyncio.timeout(_LAST_WORDS), aclosing(engine.logs(container, tail=_LAST_LINES)) as lines:
            async for _, _, line in lines:
                last = line if line.strip() else last
    except (ProviderUnavailable, EngineRefused, TimeoutError) as error:
        log.debug("no last line", container=container, error=str(error) or type(error).__name__)
    # Masked as a whole: of a secret that is cut something would be left.
    shown = masking.masked(last[:_LONGEST_LINE], task.secrets.values())
    return plain(_ANSI.sub("", shown))


async def _inspect(engine: Engine, container: str) -> dict[str, Any]:
    found = await engine.containers.inspect(container)
    if found is None:
        raise StepFailed("ContainerGone", "Somebody removed the container before it could serve: deploy again.")
    return found


def _address(found: dict[str, Any], network: str) -> str:
    there = found["NetworkSettings"]["Networks"].get(network) or {}
    return str(there.get("IPAddress") or there.get("GlobalIPv6Address") or "")


async def _attempt(session: aiohttp.ClientSession, address: str, task: Task, settings: DeploySettings) -> str:
    """What is wrong; "" when the app can serve."""
    app = task.settings
    if not address:
        return "has no address"
    if not app.health_path:
        return await _connects(address, app.port)
    path, _, query = app.health_path.partition("?")
    url = URL.build(scheme="http", host=address, port=app.port, path=path, query_string=query)
    host = labels.hosts(task.app_name, (), settings.base_domain)[0]
    headers = {"Host": host, "User-Agent": "cluster-code", "Connection": "close"}
    bound = aiohttp.ClientTimeout(total=_ANSWER, sock_connect=_CONNECT)
    try:
        async with session.get(url, headers=headers, allow_redirects=False, timeout=bound) as response:
            return "" if 200 <= response.status < 400 else f"answers {response.status}"
    except aiohttp.ConnectionTimeoutError:
        return "cannot be reached"
    except TimeoutError:
        return f"does not answer within {_ANSWER:g} seconds"
    except aiohttp.ClientConnectorError as error:
        return _refusal(error.os_error)
    except aiohttp.ClientError as error:
        return f"hangs up ({type(error).__name__})"
    except OSError as error:
        return _refusal(error)


async def _connects(address: str, port: int) -> str:
    try:
        async with asyncio.timeout(_CONNECT):
            _, writer = await asyncio.open_connection(address, port)
    except TimeoutError:
        return "cannot be reached"
    except OSError as error:
        return _refusal(error)
    writer.transport.abort()
    return ""


def _refusal(error: OSError) -> str:
    return _REFUSED if isinstance(error, ConnectionRefusedError) else "cannot be reached"


async def _unhealthy(
    engine: Engine, task: Task, container: str, address: str, answer: str, settings: DeploySettings
) -> StepFailed:
    """What to tell the user, once the time is up."""
    app, within = task.settings, f"within {settings.probe_deadline:g} seconds"
    if answer in ("cannot be reached", "has no address"):
        return StepFailed(
            "Unreachable",
            f"The app could not be reached {within}: an orchestrator that runs in a container must be in the Docker"
            f" network {settings.network}.",
        )
    if answer != _REFUSED:
        return StepFailed("NotHealthy", f"{app.health_path} {answer}, {within} not anything between 200 and 399.")
    if others := await _listening(engine, container, address, app.port):
        seen = " and ".join(map(str, others))
        return StepFailed(
            "WrongPort", f"Nothing listens on port {app.port}, but something does on {seen}: correct the app's port."
        )
    return StepFailed(
        "NotHealthy",
        f"Nothing listens on port {app.port} {within}: the app must listen there on all addresses (0.0.0.0), not only"
        " on 127.0.0.1. PORT in its environment says which port it is.",
    )


async def _listening(engine: Engine, container: str, address: str, wrong: int) -> list[int]:
    """Other ports that take connections: those that the image names, and the usual ones."""
    found = await _inspect(engine, container)
    named = [int(port.partition("/")[0]) for port in found["Config"].get("ExposedPorts") or {} if "/udp" not in port]
    ports = sorted({*named[:20], *_USUAL_PORTS} - {wrong})
    answers = await asyncio.gather(*(_connects(address, port) for port in ports))
    return [port for port, answer in zip(ports, answers, strict=True) if not answer]


@asynccontextmanager
async def _output(engine: Engine, task: Task, container: str) -> AsyncIterator[None]:
    """Say what the container writes, from its start; its last words too, if it has ended."""
    follower = asyncio.create_task(_follow(engine, task, container), name=f"output of {task.container}")
    try:
        yield
    except StepFailed as error:
        if error.reason in _ENDED:
            await asyncio.wait([follower], timeout=_LAST_WORDS)
        raise
    finally:
        follower.cancel()
        await asyncio.wait([follower])


async def _follow(engine: Engine, task: Task, container: str) -> None:
    try:
        async for _, _, line in engine.logs(container, follow=True):
            task.say(f"{line}\n")
    except (ProviderUnavailable, EngineRefused) as error:
        # Whoever asks for the container itself is told the same.
        task.say(f"No more of its output can be had: {error}\n")


def _seconds_between(began: str | None, finished: str | None) -> float | None:
    try:
        seconds = (datetime.fromisoformat(finished or "") - datetime.fromisoformat(began or "")).total_seconds()
    except ValueError:
        return None
    # What never began or ended did so in the year 1.
    return seconds if 0 <= seconds < 365 * 86400 else None
