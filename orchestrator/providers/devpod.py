"""Sessions from a repository's devcontainer.json, wherever DevPod can run them, by the `devpod` command.

What DevPod knows of a session is in the home of its tenant on this disk (`devpod_home`), so that one orchestrator at a
time has the provider. Containers, and the services in them, go on while none has; the next one asks DevPod what runs,
and makes the ways to it again (`devpod_session`).
"""

from __future__ import annotations

import asyncio
import re
import shlex
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from uuid import uuid4

import structlog

from orchestrator.children.processes import INSTANCE, Selection, end
from orchestrator.errors import ProviderFailure, ProviderUnavailable
from orchestrator.machine_fields import flatten
from orchestrator.machine_schema import errors_for_kind
from orchestrator.providers import devpod_troubles as troubles
from orchestrator.providers.changes import Changes
from orchestrator.providers.contract import (
    Endpoints,
    LogSink,
    Observation,
    Report,
    SessionRef,
    SessionSpec,
    State,
)
from orchestrator.providers.devpod_command import DevPod
from orchestrator.providers.devpod_services import Definition, define
from orchestrator.providers.devpod_session import CONNECTION, Attachment, Place
from orchestrator.providers.devpod_workspaces import Seen, Workspaces
from orchestrator.providers.operations import Operations, finish, in_thread
from orchestrator.providers.options import DevPodOptions
from orchestrator.providers.supervise import Ports
from orchestrator.providers.workspace import Directory

log = structlog.get_logger("provider.devpod")

# DevPod's names, and what it takes for a branch behind the `@`.
_NAME = re.compile(r"[a-z0-9-]{1,48}\Z")
_BRANCH = re.compile(r"[A-Za-z0-9./_-]+\Z")
# Bytes of a command's output that are kept.
_MOST_OUTPUT = 1 << 20
# Bytes of one line of a file of environment variables: DevPod stops reading at a longer one.
_LONGEST_LINE = 60_000
# Seconds that setting up DevPod's own provider may take: it may download it.
_SET_UP_DEADLINE = 120.0
# Seconds for which an inspection waits for the services of a session that was just found running.
_REATTACH_PATIENCE = 10.0
_DELETE_ATTEMPTS = 3
# Asked for at once, when all sessions are looked at.
_LOOKS = 4
# Seconds that `devpod up` gets to end when it is not wanted any more, which gives back its lock.
_UP_GRACE = 2.0
# What DevPod says while it brings up a session, and what that is for the user.
_STAGES = {
    "Clone repository": "Cloning",
    "Inspecting image": "PreparingImage",
    "Build": "BuildingImage",
    "Pull": "PullingImage",
    "Setup container": "SettingUp",
    "Running ": "RunningCommands",
}
_UNKNOWN = re.compile(r"workspace .*(?:doesn't|does not) exist|could(?:n't| not) find workspace", re.IGNORECASE)
# Runs a command, prints the beginning of its output, and then its exit code: DevPod answers every failure with 1.
_EXEC = """
cd {folder} || exit
exec 3>&1
code=$({{ {{ ({command}) 2>&1; echo $? >&4; }} | {{ head -c {most} >&3; cat >/dev/null; }}; }} 4>&1)
printf '\\n%s %s\\n' {mark} "$code"
"""


class DevPodProvider:
    """`Provider` by DevPod. Takes its directory at the first call, gives it back by `close`."""

    def __init__(
        self,
        name: str,
        data_dir: Path,
        sink: LogSink,
        options: DevPodOptions,
        *,
        endpoint: str | None = None,
        credentials: Mapping[str, str] | None = None,
    ) -> None:
        """`endpoint` is the host that DevPod's own provider works at; `credentials` are secret options of it."""
        self._options = options
        self._directory = Directory(Path(options.directory) if options.directory else data_dir / "devpod" / name)
        self._sink = sink
        self._devpod = DevPod(options)
        self._workspaces = Workspaces(
            options, self._directory, self._devpod, sink, endpoint=endpoint, credentials=credentials or {}
        )
        self._ports = Ports()
        self._operations = Operations()
        self._changes = Changes()
        self._attached: dict[int, Attachment] = {}
        # What those that are being started run from, and what they wait for.
        self._specs: dict[int, SessionSpec] = {}
        self._progress: dict[int, tuple[str, str]] = {}
        self._opening = asyncio.Lock()
        self._reconciling: asyncio.Task[None] | None = None
        self._closing = False

    async def check(self) -> str:
        """See `Provider`. The first time, what a killed process has left running here is ended."""
        await self._open()
        self._directory.check()
        return f"DevPod {await self._devpod.check()} with its provider {self._options.provider!r}"

    async def start(self, spec: SessionSpec, report: Report) -> Endpoints:
        """See `Provider`. A workspace that is there keeps what the user did to it."""
        await self.check()
        work = partial(self._start, spec, report)
        return await self._operations.run("start", spec.ref.session_id, work, undo=True)

    async def stop(self, ref: SessionRef) -> None:
        """See `Provider`. Cancelling the call does not cancel the stop."""
        await self.check()
        await self._operations.run("stop", ref.session_id, partial(self._stop, ref))

    async def delete(self, ref: SessionRef) -> None:
        """See `Provider`. Cancelling the call does not cancel the delete."""
        await self.check()
        await self._operations.run("delete", ref.session_id, partial(self._delete, ref))

    async def inspect(self, ref: SessionRef) -> Observation:
        """See `Provider`. The ways to a session that runs without them are made again."""
        await self.check()
        session_id = ref.session_id
        if session_id in self._progress:
            return Observation(State.STARTING, *self._progress[session_id])
        attachment = self._attached.get(session_id)
        if attachment is not None and attachment.failure is not None:
            return attachment.observe()
        seen = await self._workspaces.status(ref)
        if seen is not Seen.RUNNING:
            return _observation(seen)
        if attachment is not None:
            return attachment.observe()
        return await self._operations.run("attach", session_id, partial(self._reattach, ref), undo=True)

    async def exec(self, ref: SessionRef, argv: Sequence[str]) -> tuple[int, bytes]:
        """See `Provider`: where the repository is, its output and its errors together.

        Raises ProviderFailure (`NotRunning`, `ExecTimeout`). Cancelling ends the connection, and the command with it
        unless it ignores that.
        """
        await self._open()
        attachment = self._attached.get(ref.session_id)
        if attachment is None or attachment.failure is not None:
            raise ProviderFailure("NotRunning", "The session does not run: start it first.")
        mark = uuid4().hex
        script = _EXEC.format(
            folder=shlex.quote(attachment.place.folder), command=shlex.join(argv), most=_MOST_OUTPUT, mark=mark
        )
        try:
            outcome = await self._devpod.run(
                "ssh", attachment.place.name, *CONNECTION, "--command", shlex.join(["sh", "-c", script]),
                home=attachment.place.home, deadline=self._options.exec_deadline, session_id=ref.session_id,
                capture=_MOST_OUTPUT + 100,
            )  # fmt: skip
        except TimeoutError as error:
            raise ProviderFailure(
                "ExecTimeout", f"The command did not end within {self._options.exec_deadline:g} s, and was given up."
            ) from error
        output, found, code = outcome.output.rpartition(f"\n{mark} ".encode())
        if not found:
            raise troubles.of(outcome.said, "run the command")
        return int(code), output

    def watch(self) -> AsyncIterator[tuple[SessionRef, Observation]]:
        """See `Provider`. For one watcher at a time, who is told what happened before, too. Ends by `close`."""
        return self._changes.read()

    async def close(self) -> None:
        """Give up all connections, and let another process take the directory. Containers go on. Idempotent."""
        self._closing = True
        self._changes.close()
        if self._reconciling is not None:
            self._reconciling.cancel()
            await asyncio.wait({self._reconciling})
        await self._operations.close()
        for session_id in list(self._attached):
            await self._detach(session_id)
        async with self._opening:
            self._directory.release()

    # Opening.

    async def _open(self) -> None:
        """Take hold of the directory, once. Raises ProviderUnavailable."""
        async with self._opening:
            if self._closing:
                raise ProviderUnavailable("The provider is closed.")
            if self._reconciling is None:
                await self._take()
                self._reconciling = asyncio.create_task(self._reconcile(), name="devpod reconcile")

    async def _take(self) -> None:
        """Hold the directory, and clear away what a killed process has left: its processes, and what it handed over."""
        try:
            await in_thread(self._directory.hold)
            self._devpod.instance = self._directory.instance
            ended = await end(Selection({INSTANCE: self._directory.instance}), grace=0)
            await in_thread(self._directory.clear)
        except BaseException:
            self._directory.release()
            raise
        if ended:
            log.warning("ended processes that were left behind", processes=ended)

    # Starting.

    async def _start(self, spec: SessionSpec, report: Report) -> Endpoints:
        """A start, alone with its session. One that fails leaves a container, perhaps, and no connections."""
        session_id = spec.ref.session_id
        current = self._attached.get(session_id)
        if (
            current is not None
            and self._specs.get(session_id) == replace(spec, deadline=None)
            and current.observe().state is State.RUNNING
            and await self._workspaces.status(spec.ref) is Seen.RUNNING
        ):
            return current.endpoints
        await self._detach(session_id)
        try:
            await self._progressed(session_id, report, "Preparing", "Preparing DevPod.")
            return await self._bring_up(spec, report)
        except BaseException:
            await finish(self._detach(session_id), name=f"undo start {session_id}")
            raise
        finally:
            self._progress.pop(session_id, None)

    async def _bring_up(self, spec: SessionSpec, report: Report) -> Endpoints:
        ref, machine = spec.ref, spec.machine
        if wrong := flatten(errors_for_kind("devpod", {"services": machine.services, "options": machine.options})):
            raise ProviderFailure("InvalidMachineConfig", f"The machine config {machine.name!r}: {'; '.join(wrong)}.")
        services = define(machine.services)
        home, name = self._workspaces.home(ref), self._workspaces.name(ref)
        await self._workspaces.up(spec, partial(self._progressed, ref.session_id, report))
        before = await in_thread(partial(home.recall, ref.session_id))
        state = {
            "folder": await in_thread(partial(home.folder, name)) or f"/workspaces/{name}",
            "services": {key: dict(value) for key, value in machine.services.items()},
            "ports": before.get("ports", {}),
        }
        await in_thread(lambda: home.remember(ref.session_id, **state))
        names = ", ".join(machine.services) or "no service"
        await self._progressed(ref.session_id, report, "StartingServices", f"Starting {names}.")
        attachment = self._attach(Place(ref, home.path, name, state["folder"]), services, state["ports"])
        self._specs[ref.session_id] = replace(spec, deadline=None)
        await attachment.get_ready(self._options.ready_deadline)
        state["ports"] = dict(attachment.local_ports)
        await in_thread(lambda: home.remember(ref.session_id, **state))
        return attachment.endpoints

    async def _progressed(self, session_id: int, report: Report, reason: str, message: str) -> None:
        self._progress[session_id] = (reason, message)
        await report(reason, message)

    # Stopping and deleting.

    async def _stop(self, ref: SessionRef) -> None:
        await self._detach(ref.session_id)
        await self._workspaces.stop(ref)

    async def _delete(self, ref: SessionRef) -> None:
        await self._detach(ref.session_id)
        await self._workspaces.remove(ref)

    # Looking.

    async def _reattach(self, ref: SessionRef) -> Observation:
        """Make the ways to a container that an orchestrator before us has started."""
        if (attachment := self._attached.get(ref.session_id)) is not None:
            return attachment.observe()
        home, name = self._workspaces.home(ref), self._workspaces.name(ref)
        state = await in_thread(partial(home.recall, ref.session_id))
        if not state:
            return Observation(State.STOPPED, "NotStarted", "Its start was not finished.")
        place = Place(ref, home.path, name, state["folder"])
        attachment = self._attach(place, define(state["services"]), state["ports"])
        try:
            await attachment.get_ready(_REATTACH_PATIENCE)
        except ProviderFailure:
            # What is told of it is what is seen; it goes on trying.
            pass
        except BaseException:
            await finish(self._detach(ref.session_id), name=f"undo attach {ref.session_id}")
            raise
        return attachment.observe()

    async def _reconcile(self) -> None:
        """Look at all sessions again and again, for ever."""
        while True:
            await asyncio.sleep(self._options.reconcile_interval)
            try:
                await self._look_at_all()
            except Exception:
                log.exception("the sessions could not be looked at")

    async def _look_at_all(self) -> None:
        turn = asyncio.Semaphore(_LOOKS)

        async def look(attachment: Attachment) -> None:
            async with turn:
                await self._look(attachment)

        async with asyncio.TaskGroup() as group:
            for attachment in [one for one in self._attached.values() if one.failure is None]:
                group.create_task(look(attachment))

    async def _look(self, attachment: Attachment) -> None:
        """Tell of a session whose container runs no more."""
        ref = attachment.place.ref
        try:
            seen = await self._workspaces.status(ref)
        except ProviderUnavailable as error:
            log.warning("a session could not be looked at", session=ref.session_id, error=str(error))
            return
        if seen is not Seen.RUNNING and self._attached.get(ref.session_id) is attachment:
            self._operations.begin("lose", ref.session_id, partial(self._lose, attachment, _observation(seen)))

    async def _lose(self, attachment: Attachment, observation: Observation) -> None:
        ref = attachment.place.ref
        if self._attached.get(ref.session_id) is attachment and attachment.failure is None:
            await self._detach(ref.session_id)
            self._changes.put(ref, observation)

    # The ways to what runs.

    def _attach(self, place: Place, services: Sequence[Definition], ports: Mapping[str, int]) -> Attachment:
        attachment = Attachment(
            place,
            services,
            self._devpod,
            self._options,
            self._ports,
            self._sink,
            is_running=partial(self._workspaces.runs, place.ref),
            changed=self._changed,
        )
        self._attached[place.ref.session_id] = attachment
        attachment.attach(ports)
        return attachment

    async def _detach(self, session_id: int) -> None:
        attachment = self._attached.pop(session_id, None)
        self._specs.pop(session_id, None)
        self._changes.forget(session_id)
        if attachment is not None:
            await attachment.end()

    def _changed(self, attachment: Attachment) -> None:
        """Tell the watcher; end what is left of a session that has failed."""
        ref = attachment.place.ref
        if self._closing or ref.session_id in self._progress or self._attached.get(ref.session_id) is not attachment:
            return
        self._changes.put(ref, attachment.observe())
        if attachment.failure is not None:
            self._operations.begin("fail", ref.session_id, partial(self._end_failed, attachment))

    async def _end_failed(self, attachment: Attachment) -> None:
        ref = attachment.place.ref
        if self._attached.get(ref.session_id) is attachment:
            await attachment.end()
            await self._workspaces.stop(ref)


def _observation(seen: Seen) -> Observation:
    """What a session is for whoever asks, when its container does not run."""
    if seen is Seen.BUSY:
        return Observation(State.STARTING, "Busy", "DevPod is busy with the session's container.")
    if seen is Seen.STOPPED:
        return Observation(State.STOPPED, "Stopped", "Its files are there; its container does not run.")
    return Observation(State.ABSENT, "Absent", "DevPod has no container for it.")
