"""The ways to a session that runs: the ports that lead to its services, its services' output, and whether they answer.

All of it is connections that `devpod ssh` makes and that we keep: one for the ports, one for the output (and to start
the services, see `devpod_services`). They are made again when they are lost, which the services do not notice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import structlog

from orchestrator.children.output import Tail
from orchestrator.errors import ProviderFailure, ProviderUnavailable
from orchestrator.providers.contract import Endpoint, Endpoints, LogLine, LogSink, Observation, SessionRef, State
from orchestrator.providers.devpod_command import DevPod, Outcome
from orchestrator.providers.devpod_services import Definition, Following, script
from orchestrator.providers.devpod_troubles import telling
from orchestrator.providers.options import DevPodOptions
from orchestrator.providers.probing import unready
from orchestrator.providers.supervise import HOST, Ports

log = structlog.get_logger("provider.devpod")

# What every connection is made with: it shall lend the container nothing, and say nothing but what it is told to.
CONNECTION = ("--start-services=false", "--agent-forwarding=false")
# Questions in a row that a service which was ready may leave unanswered: it may be busy.
_PATIENCE = 3
# Seconds. No wait for the next question, or for the next connection, is longer.
_LONGEST_PROBE = 1.0
_LONGEST_DELAY = 30.0
# Seconds for which nothing answers until the connection is made anew: it may be dead without knowing it.
_STUCK = 30.0


@dataclass(frozen=True, slots=True)
class Place:
    """A session, as DevPod has it."""

    ref: SessionRef
    home: Path
    # Its name there.
    name: str
    # Where the repository is in the container.
    folder: str


class Attachment:
    """From `attach` to `end`. `is_running` says whether the container runs, `changed` that `observe` may differ."""

    def __init__(
        self,
        place: Place,
        services: Sequence[Definition],
        devpod: DevPod,
        options: DevPodOptions,
        ports: Ports,
        sink: LogSink,
        *,
        is_running: Callable[[], Awaitable[bool]],
        changed: Callable[[Attachment], None],
    ) -> None:
        self.place = place
        self.failure: ProviderFailure | None = None
        self._services = services
        self._devpod = devpod
        self._options = options
        self._ports = ports
        self._sink = sink
        self._is_running = is_running
        self._changed = changed
        self._began = False
        # By service: its port here, and the one that it had; whether it answers, why not, its last lines, its crashes.
        self._local: dict[str, int] = {}
        self._wanted: dict[str, int] = {}
        self._ready: set[str] = set()
        self._why: dict[str, str] = {}
        self._tails = {service.name: Tail() for service in services}
        self._crashes: dict[str, int] = {}
        # Set when something was heard that makes it worth to ask at once.
        self._doubt = {service.name: asyncio.Event() for service in services}
        self._stuck = asyncio.Event()
        self._settled = asyncio.Event()
        self._trouble = ""
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def endpoints(self) -> Endpoints:
        """Where its services are reached."""
        found = {service.name: endpoint for service in self._services if (endpoint := self._endpoint(service))}
        return Endpoints(ip_address=HOST, **found)

    @property
    def local_ports(self) -> Mapping[str, int]:
        """The ports on this machine, by service."""
        return dict(self._local)

    def attach(self, wanted: Mapping[str, int]) -> None:
        """Make the connections, at the ports that are wanted where these are free."""
        self._wanted = dict(wanted)
        if not self._services:
            self._settled.set()
            return
        if any(service.command for service in self._services):
            # First: they begin while the ports are connected, and DevPod makes one connection after the other.
            self._spawn("services", self._keep(self._follow))
        self._spawn("ports", self._keep(self._forward))
        for service in self._services:
            self._spawn(service.name, self._ask(service))

    async def get_ready(self, deadline: float) -> None:
        """Return when all services answer. Raises ProviderFailure when one fails, or does not within `deadline` s."""
        try:
            async with asyncio.timeout(deadline):
                await self._settled.wait()
        except TimeoutError:
            raise self._not_ready(deadline) from None
        if self.failure is not None:
            raise self.failure
        self._began = True

    def observe(self) -> Observation:
        """What is seen of it now, its container running."""
        if self.failure is not None:
            return Observation(State.FAILED, self.failure.reason, str(self.failure))
        missing = [service.name for service in self._services if service.name not in self._ready]
        if not missing:
            return Observation(State.RUNNING, "Ready", "All services answer.", self.endpoints)
        name = missing[0]
        reason = "Restarting" if self._began else "StartingServices"
        return Observation(State.STARTING, reason, f"{name}: {self._why.get(name, 'it was not asked yet')}.")

    async def end(self) -> None:
        """Give up the connections; the container and its services go on."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for port in self._local.values():
            self._ports.give_back(port)

    def _spawn(self, name: str, work: Awaitable[None]) -> None:
        async def supervised() -> None:
            try:
                await work
            except Exception as error:
                log.exception("a connection's supervision failed", session=self.place.ref.session_id, what=name)
                self._fail(ProviderFailure("InternalError", f"{name} cannot be supervised: {error}"))

        self._tasks.append(asyncio.create_task(supervised(), name=f"session {self.place.ref.session_id} {name}"))

    async def _keep(self, once: Callable[[], Awaitable[None]]) -> None:
        """Make a connection again and again, with growing waits between, as long as the container runs."""
        loop = asyncio.get_running_loop()
        failures = 0
        while True:
            began = loop.time()
            try:
                await once()
            except ProviderUnavailable as error:
                self._trouble = str(error)
            failures = 1 if loop.time() - began > _LONGEST_DELAY else failures + 1
            for doubt in self._doubt.values():
                doubt.set()
            # DevPod starts a container that it is to connect to: one that was stopped shall stay so.
            await asyncio.sleep(min(self._options.restart_delay * 2 ** (failures - 1), _LONGEST_DELAY))
            while not await self._is_running():  # noqa: ASYNC110  There is no event: DevPod has to be asked.
                await asyncio.sleep(self._options.reconcile_interval)

    async def _forward(self) -> None:
        """Connect the ports, until the connection ends or seems dead."""
        self._promise()
        arguments = [
            word
            for service in self._services
            # Servers for development often listen at ::1 only.
            for word in ("-L", f"{HOST}:{self._local[service.name]}:localhost:{service.port}")
        ]
        self._stuck.clear()
        connection = asyncio.create_task(self._connect(*arguments), name="devpod ports")
        stuck = asyncio.create_task(self._stuck.wait(), name="devpod ports stuck")
        try:
            await asyncio.wait({connection, stuck}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stuck.cancel()
            connection.cancel()
            await asyncio.wait({connection, stuck})
        if not connection.cancelled():
            self._trouble = telling(connection.result().said)

    async def _follow(self) -> None:
        """Start the services that do not run, and read what they write, until the connection ends."""
        token = uuid4().hex
        command = script(self._services, self.place.folder, token)
        if command is None:
            return
        following = Following(token, output=self._line, ended=self._ended)
        outcome = await self._connect("--command", command, take=following)
        self._trouble = telling(outcome.said)

    async def _connect(self, *arguments: str, take: Callable[[str], None] | None = None) -> Outcome:
        place = self.place
        return await self._devpod.run(
            "ssh", place.name, *CONNECTION, *arguments,
            home=place.home, deadline=None, session_id=place.ref.session_id, take=take,
        )  # fmt: skip

    def _promise(self) -> None:
        """A port of this machine for each service: the last one, unless somebody else took it. Raises as `Ports`."""
        for service in self._services:
            name = service.name
            if name in self._local:
                self._wanted[name] = self._local.pop(name)
                self._ports.give_back(self._wanted[name])
            try:
                self._local[name] = self._ports.promise(self._wanted.get(name, 0))
            except OSError:
                self._local[name] = self._promise_any()

    def _promise_any(self) -> int:
        try:
            return self._ports.promise(0)
        except OSError as error:
            raise ProviderUnavailable(f"The session's ports cannot be opened: {error}.") from error

    async def _ask(self, service: Definition) -> None:
        """Ask a service whether it is ready, for ever."""
        loop = asyncio.get_running_loop()
        delay, unanswered, answered_at = 0.05, 0, loop.time()
        name = service.name
        while True:
            self._doubt[name].clear()
            why = await unready(self._endpoint(service), service.ready)
            if why is None:
                delay, unanswered, answered_at = 0.05, 0, loop.time()
                self._is_ready(name)
                await _within(self._doubt[name], self._options.reconcile_interval)
                continue
            unanswered += 1
            self._why[name] = why
            if unanswered >= _PATIENCE or self._doubt[name].is_set():
                self._is_unready(name)
            if loop.time() - answered_at > _STUCK:
                answered_at = loop.time()
                self._stuck.set()
            await asyncio.sleep(delay)
            delay = min(delay * 1.5, _LONGEST_PROBE)

    def _is_ready(self, name: str) -> None:
        if name in self._ready:
            return
        self._ready.add(name)
        if len(self._ready) == len(self._services):
            self._settled.set()
            self._changed(self)

    def _is_unready(self, name: str) -> None:
        if name in self._ready:
            self._ready.discard(name)
            self._changed(self)

    def _line(self, name: str, line: str) -> None:
        self._tails[name].add(line)
        self._sink(LogLine(self.place.ref.session_id, name, "stdout", line))

    def _ended(self, name: str, code: int, delay: int) -> None:
        """A service has ended, and is started again after `delay` seconds: 1 when it has lived long enough before."""
        crashes = self._crashes[name] = 1 if delay == 1 else self._crashes.get(name, 0) + 1
        if crashes >= self._options.crashes:
            how = f"{name} exited with code {code}, {crashes} times in a row.{self._last_lines(name)}"
            self._fail(ProviderFailure("CrashLoop", how))
            return
        self._why[name] = f"it exited with code {code}"
        self._sink(
            LogLine(
                self.place.ref.session_id,
                name,
                "system",
                f"{name} exited with code {code}; it is started again in {delay} s",
            )
        )
        self._doubt[name].set()
        self._is_unready(name)

    def _fail(self, failure: ProviderFailure) -> None:
        if self.failure is None:
            self.failure = failure
            self._settled.set()
            self._changed(self)

    def _not_ready(self, deadline: float) -> ProviderFailure:
        name = next(service.name for service in self._services if service.name not in self._ready)
        why = self._why.get(name, "it was not asked yet")
        trouble = f" DevPod says: {self._trouble}" if self._trouble else ""
        return ProviderFailure(
            "NotReady", f"{name} was not ready within {deadline:g} s: {why}.{self._last_lines(name)}{trouble}"
        )

    def _last_lines(self, name: str) -> str:
        return f" Its last lines:\n{self._tails[name]}" if str(self._tails[name]) else ""

    def _endpoint(self, service: Definition) -> Endpoint | None:
        port = self._local.get(service.name)
        return Endpoint(f"http://{HOST}:{port}{service.path}", service.path) if port else None


async def _within(event: asyncio.Event, seconds: float) -> None:
    """Return when the event is set, or after so many seconds."""
    waiting = asyncio.create_task(event.wait())
    try:
        await asyncio.wait({waiting}, timeout=seconds)
    finally:
        waiting.cancel()
