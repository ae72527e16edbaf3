"""A session that runs here: its services, and what is seen of it."""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any
from uuid import uuid4

from orchestrator.children.launch import NOT_FOUND
from orchestrator.children.leaders import Leaders
from orchestrator.children.output import Capture, drain, open_pipe
from orchestrator.children.processes import INSTANCE, SERVICE, SESSION, Limits, Selection, end, spawn
from orchestrator.errors import ProviderFailure
from orchestrator.machine_fields import flatten
from orchestrator.machine_schema import errors_for_kind
from orchestrator.providers.contract import Endpoints, LogLine, LogSink, Observation, SessionSpec, State
from orchestrator.providers.operations import finish, in_thread
from orchestrator.providers.options import LocalOptions
from orchestrator.providers.supervise import HOST, Definition, Phase, Ports, Service, define
from orchestrator.providers.workspace import SessionFiles

# Bytes of a command's output that are kept.
_MOST_OUTPUT = 1 << 20


class RunningSession:
    """From the beginning of a start to the end of the last process. `changed` is called when `observe` may differ."""

    def __init__(
        self,
        spec: SessionSpec,
        files: SessionFiles,
        instance: str,
        leaders: Leaders,
        options: LocalOptions,
        sink: LogSink,
        changed: Callable[[RunningSession], None],
    ) -> None:
        self.spec = spec
        self.files = files
        # What it waits for while it starts.
        self.progress = ("Starting", "The session is starting.")
        self.started = False
        # Why it does not run.
        self.failure: ProviderFailure | None = None
        self.markers = {INSTANCE: instance, SESSION: str(spec.ref.session_id)}
        self._leaders = leaders
        self._options = options
        self._sink = sink
        self._changed = changed
        self._services: list[Service] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._ending = False
        self._env = self._environment()

    @property
    def endpoints(self) -> Endpoints:
        """Where its services are reached."""
        return Endpoints(ip_address=HOST, **{service.definition.name: service.endpoint for service in self._services})

    def observe(self) -> Observation:
        """What is seen of it now."""
        failure = self.failure or next((service.failure for service in self._services if service.failure), None)
        if failure is not None:
            return Observation(State.FAILED, failure.reason, str(failure))
        if not self.started:
            return Observation(State.STARTING, *self.progress)
        trouble = [service.trouble for service in self._services if service.phase is not Phase.READY]
        if trouble:
            return Observation(State.STARTING, "Restarting", f"{'; '.join(trouble)}. It is being started again.")
        return Observation(State.RUNNING, "Ready", "All services answer.", self.endpoints)

    def say(self, line: str, service: str = "session") -> None:
        """Something for the session's log."""
        self._sink(LogLine(self.spec.ref.session_id, service, "system", line))

    def launch(self, ports: Ports) -> list[str]:
        """Launch the services; their names. Raises ProviderFailure, and then has launched none."""
        definitions = list(self._definitions())
        for definition in definitions:
            service = Service(definition, self._options, ports, self._leaders, self._sink, partial(self._changed, self))
            self._services.append(service)
            name = f"session {self.spec.ref.session_id} {definition.name}"
            self._tasks.append(asyncio.create_task(service.run(), name=name))
        return [definition.name for definition in definitions]

    async def get_ready(self) -> None:
        """Return when all services answer. Raises ProviderFailure when one fails, or does not in time."""
        deadline = asyncio.get_running_loop().time() + self._options.ready_deadline
        waiting = {service.first: service for service in self._services}
        while waiting:
            left = deadline - asyncio.get_running_loop().time()
            done, _ = await asyncio.wait(waiting, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            for first in done:
                if (failure := waiting.pop(first).failure) is not None:
                    raise failure
            if not done:
                raise next(iter(waiting.values())).not_ready()

    async def end(self, *, grace: float) -> None:
        """End all its processes, those that hide included. Raises ProviderUnavailable when one cannot be ended."""
        self._ending = True
        for service in self._services:
            service.let_end()
        leaders = {service.leader for service in self._services if service.leader is not None}
        try:
            await end(Selection(self.markers, leaders), grace=grace)
        finally:
            # Their last lines are read by now, or within a moment.
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=0.2)
                for task in self._tasks:
                    task.cancel()
                await asyncio.wait(self._tasks)
        # One may have been launched in the very moment.
        await end(Selection(self.markers), grace=0)
        await in_thread(partial(self._leaders.forget, self.spec.ref.session_id))

    async def exec(self, argv: Sequence[str]) -> tuple[int, bytes]:
        """Run a command in the workspace; what it leaves in the background lives until the session ends."""
        program = self._program(argv[0], self._env) if argv and argv[0] else None
        if program is None:
            return NOT_FOUND, f"{argv[0] if argv else ''}: not found\n".encode()
        markers = {**self.markers, SERVICE: f"exec-{uuid4().hex}"}
        capture, write = await open_pipe(partial(Capture, _MOST_OUTPUT))
        ended = False
        try:
            try:
                if self._ending:
                    raise ProviderFailure("NotRunning", "The session is being stopped.")
                process = await spawn(
                    [program, *argv[1:]], cwd=self.files.workspace, env={**self._env, **markers},
                    stdout=write, stderr=write, limits=self._limits({}), seed=self.spec.ref.session_id,
                )  # fmt: skip
            finally:
                os.close(write)
            async with asyncio.timeout(self._options.exec_deadline):
                returncode = await process.wait()
            ended = True
            # Who was left in the background may hold the pipe for ever.
            await drain(capture, timeout=0.5)
            # As a shell tells it: 128 and the number of the signal.
            return returncode if returncode >= 0 else 128 - returncode, capture.output
        except TimeoutError as error:
            raise ProviderFailure(
                "ExecTimeout", f"The command did not end within {self._options.exec_deadline:g} s, and was ended."
            ) from error
        finally:
            capture.close()
            if not ended:
                await finish(end(Selection(markers), grace=0), name="end of a command")

    def _definitions(self) -> Iterator[Definition]:
        machine = self.spec.machine
        entry = {"services": machine.services, "options": machine.options}
        if wrong := flatten(errors_for_kind("local", entry)):
            raise ProviderFailure("InvalidMachineConfig", f"The machine config {machine.name!r}: {'; '.join(wrong)}.")
        for name, service in machine.services.items():
            command = self._command(name, service)
            if command is not None:
                yield define(
                    name,
                    service,
                    session_id=self.spec.ref.session_id,
                    command=command,
                    session_env=self._env,
                    directory=self.files.workspace,
                    limits=self._limits(service),
                    markers={**self.markers, SERVICE: name},
                )

    def _command(self, name: str, service: Mapping[str, Any]) -> tuple[str, ...] | None:
        """The first command whose program is there, its program as a path; None when the service may do without."""
        choices = service["command"] if isinstance(service["command"][0], list) else [service["command"]]
        env = {**self._env, **service.get("env", {})}
        for words in choices:
            if words[0] == "{python}":
                return tuple(words)
            if (program := self._program(words[0], env)) is not None:
                return (program, *words[1:])
        wanted = " or ".join(words[0] for words in choices)
        if service.get("optional", False):
            self.say(f"{name} is left out: {wanted} is not installed here", name)
            return None
        raise ProviderFailure("CommandNotFound", f"{name} cannot be started: {wanted} is not installed here.")

    def _program(self, name: str, env: Mapping[str, str]) -> str | None:
        """The path of a program: looked up on the PATH, or, with a slash in it, in the workspace."""
        if "/" in name:
            name = str(self.files.workspace / name)
        return shutil.which(name, path=env["PATH"])

    def _limits(self, service: Mapping[str, Any]) -> Limits:
        machine = self.spec.machine
        return Limits(
            memory=machine.memory_bytes if service.get("limit_memory", True) else None,
            cpu=machine.cpu,
            cpu_seconds=machine.options.get("cpu_seconds"),
            file_bytes=machine.disk_bytes,
        )

    def _environment(self) -> dict[str, str]:
        """What every process gets: little, and nothing of the server's but its PATH. Raises ProviderFailure."""
        for name, value in self.spec.env.items():
            if not _fits_environment(name, value):
                raise ProviderFailure(
                    "InvalidEnvironment",
                    f"The project's environment variable {name!r} cannot be set: change its name or value.",
                )
        return {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(self.files.home),
            "TMPDIR": str(self.files.tmp),
            "USER": _user(),
            "LANG": "C.UTF-8",
            "TERM": "xterm-256color",
            **self._options.env,
            **self.spec.env,
            **self.markers,
        }


def _fits_environment(name: str, value: str) -> bool:
    if not name or "=" in name or "\0" in name + value:
        return False
    try:
        os.fsencode(name + value)
    except UnicodeEncodeError:
        return False
    return True


def _user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def selection_of(instance: str, session_id: int | None = None, leaders: Collection[int] = ()) -> Selection:
    """The processes of a session, or of all of them, whoever started them; and those in the sessions of the leaders."""
    markers = {INSTANCE: instance}
    return Selection(markers if session_id is None else {**markers, SESSION: str(session_id)}, leaders)
