"""Sessions at a Docker engine: a container for each service, one network a project, one volume a session.

Every step looks at what is there and goes on from it, so that a call that was cancelled, or an orchestrator that was
killed, leaves nothing that the next call cannot take up. The engine itself keeps containers running, through crashes
and its own restarts; what happens to them is told by `watch`, what they write is followed by `follow`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Collection, Iterable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from time import monotonic
from urllib.parse import urlsplit

import structlog

from orchestrator.docker import labels
from orchestrator.docker.engine import Engine
from orchestrator.errors import EngineRefused, ProviderFailure, ProviderUnavailable
from orchestrator.machine_kinds import SERVICES
from orchestrator.providers import docker_sights
from orchestrator.providers.contract import (
    Endpoints,
    Journal,
    LogLine,
    LogSink,
    Observation,
    Report,
    SessionRef,
    SessionSpec,
    State,
)
from orchestrator.providers.docker_containers import Container, Names, containers_of
from orchestrator.providers.docker_filling import Filling
from orchestrator.providers.docker_looking import Looking
from orchestrator.providers.docker_output import Outputs
from orchestrator.providers.docker_placing import lacks_init, port_taken, put, refusal
from orchestrator.providers.docker_pulling import Pulls
from orchestrator.providers.docker_sights import Memory, Rules, Scene, Sight, diagnose
from orchestrator.providers.operations import in_thread
from orchestrator.providers.options import DockerOptions
from orchestrator.providers.probing import unready
from orchestrator.providers.workspace import remove_tree

log = structlog.get_logger("provider.docker")

# Times that others may take away what a start has just made.
_ROUNDS = 3
# Ports that are tried when somebody has the one that was chosen.
_PORTS_TRIED = 20
# Seconds between two looks at what is coming up: the first, and the longest.
_SOON, _LATER = 0.05, 0.5
# Of the output of a container that has crashed.
_LAST_LINES = 20


class DockerProvider:
    """`Provider` by one engine. `registries` are users and passwords (`user:password`) by the registry's host.

    Clones are made in `directory`, which is ours.
    """

    def __init__(
        self,
        name: str,
        options: DockerOptions,
        engine: Engine,
        *,
        directory: Path,
        sink: LogSink,
        registries: Mapping[str, str] | None = None,
    ) -> None:
        self._name = name
        self._options = options
        self._engine = engine
        self._directory = directory / f"docker-{name}"
        self._sink = sink
        self._pulls = Pulls(engine, registries or {})
        self._names = Names(options.instance)
        self._rules = Rules(options.crashes, options.stable_after)
        self._cores: float | None = None
        self._init = options.init
        # By session, then by container.
        self._memories: dict[int, dict[str, Memory]] = {}

    async def check(self) -> str:
        """See `Provider`."""
        info = await self._engine.info()
        if info.os != "linux":
            raise ProviderUnavailable(f"The Docker engine at {self._engine.host} runs {info.os}, and not Linux.")
        self._cores = float(info.cpus)
        return f"Docker {info.version} at {self._engine.host} ({info.cpus} cores, {info.memory_bytes >> 20} MiB)"

    async def start(self, spec: SessionSpec, report: Report) -> Endpoints:
        """See `Provider`. Cancelling leaves what is there already; the next start goes on from it, a stop ends it."""
        for _ in range(_ROUNDS):
            try:
                return await self._start(spec, report)
            except EngineRefused as error:
                gone = error
                if error.status not in (404, 409) and "ambiguous" not in str(error):
                    break
                # What was there a moment ago may be gone: somebody tidies up, or the project's last session goes.
                log.info("starting anew", session=spec.ref.session_id, error=str(error))
        raise refusal(gone, "the session") from gone

    async def stop(self, ref: SessionRef) -> None:
        """See `Provider`: containers are kept as they ended, until the next start replaces them."""
        async with self._refusals("stop"):
            await _all(self._end(sight) for sight in await self._see(ref))

    async def delete(self, ref: SessionRef) -> None:
        """See `Provider`: its containers, its volume, and the network with the project's last session."""
        marks = self._names.of_session(ref)
        async with self._refusals("delete"):
            there = await self._engine.containers.list(marks)
            await _all(self._engine.containers.remove(one["Id"], volumes=True) for one in there)
            for volume in await self._engine.volumes.list(marks):
                await self._engine.volumes.remove(volume["Name"])
            await self._leave_network(ref)
        # Of a clone that was killed.
        await in_thread(lambda: remove_tree(self._clones(ref)))
        self._memories.pop(ref.session_id, None)

    async def inspect(self, ref: SessionRef) -> Observation:
        """See `Provider`."""
        async with self._refusals("inspect"):
            return await self._look(ref)

    async def exec(self, ref: SessionRef, argv: Sequence[str]) -> tuple[int, bytes]:
        """See `Provider`: in the first container that runs, of preview, chat and vscode.

        Raises ProviderFailure (`NotRunning`, `ExecTimeout`). Cancelling, and the deadline, leave the command running.
        """
        running = {sight.service: sight.id for sight in await self._see(ref) if sight.status == "running"}
        container = next((running[name] for name in SERVICES if name in running), None)
        if container is None:
            raise ProviderFailure("NotRunning", "The session does not run: start it first.")
        seconds = self._options.exec_deadline
        try:
            async with asyncio.timeout(seconds) as timer, self._refusals("run a command in"):
                return await self._engine.containers.exec(container, argv, timeout=seconds * 2)
        except TimeoutError:
            if not timer.expired():
                raise
            raise ProviderFailure("ExecTimeout", f"The command did not end within {seconds:g} seconds.") from None

    async def watch(self) -> AsyncIterator[tuple[SessionRef, Observation]]:
        """See `Provider`: what the engine tells of our containers, looked at; what is not well is looked at again."""
        looking = Looking(self._engine, self._names, self.inspect, again_after=self._options.stable_after)
        async with aclosing(looking.read()) as seen:
            async for one in seen:
                yield one

    async def follow(self, journal: Journal) -> None:
        """Hand on what all containers write, until cancelled. Raises what the journal's database does."""
        await Outputs(self._engine, self._names, journal).run()

    async def close(self) -> None:
        """End what is under way, and the connections. Sessions run on. Idempotent."""
        await self._engine.close()

    async def _end(self, sight: Sight) -> None:
        if sight.wanted:
            # From now on neither the engine nor a start takes it for one that was only interrupted.
            policy = {"RestartPolicy": {"Name": docker_sights.NOT_WANTED}}
            try:
                await self._engine.containers.update(sight.id, policy)
            except EngineRefused as error:
                if error.status != 404:
                    raise
        await self._engine.containers.stop(sight.id, self._options.stop_grace)

    # A start. --------------------------------------------------------------------------------------------------------

    async def _start(self, spec: SessionSpec, report: Report) -> Endpoints:
        ref = spec.ref
        if self._cores is None:
            await self.check()
        wanted = containers_of(spec, self._options, cores=self._cores or 1.0)
        filling = Filling(self._engine, spec, self._options, self._clones(ref))
        filling.repository()
        if not self._init:
            wanted = [one.without_init() for one in wanted]
        images = await self._pulls.images(wanted, report, partial(self._say, ref))
        there = {sight.service: sight for sight in await self._see(ref)}
        missing = [one for one in wanted if not _runs(there.get(one.service), one.made_from(images[one.image]))]
        if missing:
            names = ", ".join(one.service for one in missing)
            await self._tidy(ref, wanted)
            await self._engine.networks.ensure(self._names.network(ref), self._names.of_project(ref))
            # Beside what runs nothing is put into the workspace.
            if all(one.stands_still for one in there.values()):
                await filling.make(missing[0].image, report, lambda line: self._say(ref, line, "git"))
            await report("StartingServices", f"Starting {names}.")
            for one in missing:
                before = there.get(one.service)
                if not await self._resume(one, images[one.image], before):
                    await self._run(one, images[one.image], before)
        return await self._get_ready(ref, report)

    async def _tidy(self, ref: SessionRef, wanted: Collection[Container]) -> None:
        """Remove containers of services that the session has no more."""
        keep = {one.service for one in wanted}
        for sight in await self._see(ref):
            if sight.service not in keep:
                await self._engine.containers.remove(sight.id, volumes=True)

    async def _resume(self, wanted: Container, image_id: str, before: Sight | None) -> bool:
        """Start a container again that nobody has stopped on purpose: the engine was, or its machine."""
        if before is None or not before.wanted or before.made_from != wanted.made_from(image_id):
            return False
        try:
            await self._engine.containers.start(before.id)
        except EngineRefused as error:
            log.info("not started again, but made anew", container=wanted.name, error=str(error))
            return False
        return True

    async def _run(self, wanted: Container, image_id: str, before: Sight | None) -> None:
        """Make and start one container, in place of what has its name. Raises ProviderFailure, EngineRefused."""
        first, last = self._options.ports
        # People have the old address in their browsers.
        ports = [before.published] if before is not None and before.published else []
        while len(ports) < _PORTS_TRIED:
            ports.append(random.randint(first, last))
        for port in ports:
            config = wanted.to_create(image_id, publish=self._options.publish, port=port)
            try:
                container = await put(self._engine, wanted.name, config)
                await self._engine.containers.start(container)
            except EngineRefused as error:
                if port_taken(error):
                    continue
                if lacks_init(error) and self._init:
                    log.warning("the engine has no init: sessions run without", provider=self._name, error=str(error))
                    self._init = False
                    wanted = wanted.without_init()
                    continue
                if error.status in (404, 409):
                    raise
                raise refusal(error, wanted.service) from error
            return
        raise ProviderFailure(
            "NoPort",
            f"No port of the Docker engine's machine was found free from {first} to {last} ({_PORTS_TRIED} tried):"
            " have an operator widen the option `ports`.",
        )

    async def _get_ready(self, ref: SessionRef, report: Report) -> Endpoints:
        """Return when all services answer. Raises ProviderFailure with what keeps them from it."""
        deadline = monotonic() + self._options.ready_deadline
        wait, told = _SOON, ""
        while True:
            seen = await self._look(ref)
            if seen.state is State.RUNNING and seen.endpoints is not None:
                return seen.endpoints
            if seen.state is State.FAILED:
                raise ProviderFailure(seen.reason, seen.message)
            if seen.state is not State.STARTING:
                raise EngineRefused(404, f"the session was taken away while it started: {seen.message}")
            if monotonic() >= deadline:
                raise await self._too_late(ref, seen)
            if seen.reason != told:
                told = seen.reason
                await report(seen.reason, seen.message)
            await asyncio.sleep(wait)
            wait = min(wait * 1.5, _LATER)

    async def _too_late(self, ref: SessionRef, seen: Observation) -> ProviderFailure:
        seconds = self._options.ready_deadline
        words = ""
        for sight in await self._see(ref):
            if seen.message.startswith(f"{sight.service} "):
                words = docker_sights.last_words(await self._last_lines(sight))
        return ProviderFailure(
            "NotReady", f"The session was not ready within {seconds:g} seconds. {seen.message.rstrip('.')}{words}."
        )

    # What is there. --------------------------------------------------------------------------------------------------

    async def _see(self, ref: SessionRef) -> list[Sight]:
        """The session's containers, but for the one that fills its workspace."""
        found = []
        for one in await self._engine.containers.list(self._names.of_session(ref)):
            inspected = await self._engine.containers.inspect(one["Id"])
            # One may have gone meanwhile.
            if inspected is not None:
                sight = docker_sights.read(inspected, url_host=self._url_host)
                if sight.service:
                    found.append(sight)
        return found

    async def _look(self, ref: SessionRef) -> Observation:
        """What there is of a session now; services that have not answered yet are asked."""
        seen, now = await self._see(ref), datetime.now(UTC)
        if not seen:
            self._memories.pop(ref.session_id, None)
            volume = await self._engine.volumes.inspect(self._names.volume(ref))
            ours = volume is not None and labels.matches(volume["Labels"], self._names.of_session(ref))
            return diagnose(Scene((), volume=ours), self._rules, now)
        before = self._memories.get(ref.session_id, {})
        memories = self._memories[ref.session_id] = {one.id: before.get(one.id, Memory()) for one in seen}
        for one in seen:
            docker_sights.remember(memories[one.id], one, self._rules, now)
        scene = Scene(seen, memories=memories)
        observation = diagnose(scene, self._rules, now)
        if observation.state is State.RUNNING:
            observation = diagnose(replace(scene, unready=await self._ask(scene)), self._rules, now)
        elif whose := list(docker_sights.crashed(scene)):
            # A second look, with the last words of what crashed.
            words = {one.id: await self._last_lines(one) for one in whose}
            observation = diagnose(replace(scene, words=words), self._rules, now)
        if observation.state is not State.RUNNING:
            return observation
        return replace(observation, endpoints=docker_sights.endpoints_of(seen))

    async def _ask(self, scene: Scene) -> dict[str, str]:
        """Why services are not ready, by container. What was ready once is, until it ends."""
        asked = [one for one in scene.sights if scene.memories[one.id].ready != one.began]
        answers = await asyncio.gather(*(unready(one.endpoint, one.ready_path) for one in asked))
        for one, answer in zip(asked, answers, strict=True):
            if answer is None:
                scene.memories[one.id].ready = one.began
        return {one.id: answer for one, answer in zip(asked, answers, strict=True) if answer is not None}

    async def _last_lines(self, sight: Sight) -> list[str]:
        try:
            async with aclosing(self._engine.logs(sight.id, tail=_LAST_LINES)) as lines:
                return [line async for _, _, line in lines]
        except EngineRefused as error:
            log.debug("no last lines", container=sight.id, error=str(error))
            return []

    @property
    def _url_host(self) -> str | None:
        """In place of an address that stands for all of the engine's machine."""
        if self._options.url_host is not None or self._options.publish not in ("0.0.0.0", "::"):  # noqa: S104
            return self._options.url_host
        return urlsplit(self._engine.host).hostname or "127.0.0.1"

    # The rest. -------------------------------------------------------------------------------------------------------

    async def _leave_network(self, ref: SessionRef) -> None:
        """Remove the project's network, unless another session is in it, or it is somebody else's."""
        marks = self._names.of_project(ref)
        if await self._engine.containers.list(marks):
            return
        network = await self._engine.networks.inspect(self._names.network(ref))
        if network is None or not labels.matches(network["Labels"], marks):
            return
        try:
            await self._engine.networks.remove(network["Id"])
        except EngineRefused as error:
            if error.status != 403:
                raise
            # Somebody has put a container of his own into it.
            log.warning("a network is left", network=network["Name"], error=str(error))

    def _clones(self, ref: SessionRef) -> Path:
        return self._directory / str(ref.session_id)

    def _say(self, ref: SessionRef, line: str, service: str = "session") -> None:
        self._sink(LogLine(ref.session_id, service, "system", line))

    @asynccontextmanager
    async def _refusals(self, doing: str) -> AsyncIterator[None]:
        try:
            yield
        except EngineRefused as error:
            raise ProviderFailure(
                "EngineRefused", f"The Docker engine could not {doing} the session: {error}"
            ) from error


def _runs(sight: Sight | None, made_from: str) -> bool:
    """Whether a container does what is wanted, so that it is left alone."""
    return sight is not None and sight.made_from == made_from and sight.status in ("running", "restarting")


async def _all(calls: Iterable[Awaitable[None]]) -> None:
    """Await all; then raise what the first of them raised."""
    results = await asyncio.gather(*calls, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
