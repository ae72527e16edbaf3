"""Sessions on this machine: a directory and some processes each, without any isolation but their users' good will.

For one developer, or a team that trusts its members: all sessions run as the user who runs the orchestrator. `launch`
limits what they use; nothing keeps them from one another's files.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from orchestrator import git
from orchestrator.children.leaders import Leaders
from orchestrator.children.processes import SERVICE, end
from orchestrator.errors import ProviderFailure, ProviderUnavailable
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
from orchestrator.providers.operations import Operations, finish, in_thread
from orchestrator.providers.options import LocalOptions
from orchestrator.providers.running import RunningSession, selection_of
from orchestrator.providers.supervise import Ports
from orchestrator.providers.workspace import Directory

log = structlog.get_logger("provider.local")


class LocalProvider:
    """`Provider` by processes of this machine. Takes its directory at the first call, gives it back by `close`."""

    def __init__(self, data_dir: Path, sink: LogSink, options: LocalOptions | Mapping[str, Any] | None = None) -> None:
        self._options = options if isinstance(options, LocalOptions) else LocalOptions.load(options or {})
        self._directory = Directory(Path(self._options.directory) if self._options.directory else data_dir)
        self._leaders = Leaders(self._directory.path / "leaders.json")
        self._sink = sink
        self._ports = Ports()
        self._operations = Operations()
        self._changes = Changes()
        self._sessions: dict[int, RunningSession] = {}
        self._opening = asyncio.Lock()
        self._opened = False
        self._closing = False

    async def check(self) -> str:
        """See `Provider`. The first time, what a killed process has left running here is ended."""
        await self._open()
        self._directory.check()
        return f"this machine, with sessions in {self._directory.path}"

    async def start(self, spec: SessionSpec, report: Report) -> Endpoints:
        """See `Provider`. A workspace that is there keeps what the user did to it. Cancelling ends what was started."""
        await self._open()
        work = partial(self._start, spec, report)
        return await self._operations.run("start", spec.ref.session_id, work, undo=True)

    async def stop(self, ref: SessionRef) -> None:
        """See `Provider`. Cancelling the call does not cancel the stop."""
        await self._open()
        await self._operations.run("stop", ref.session_id, partial(self._end, ref.session_id))

    async def delete(self, ref: SessionRef) -> None:
        """See `Provider`. Cancelling the call does not cancel the delete."""
        await self._open()
        # Refuses an id that leads elsewhere, before anything is done.
        self._directory.files(ref.session_id)
        await self._operations.run("delete", ref.session_id, partial(self._delete, ref.session_id))

    async def inspect(self, ref: SessionRef) -> Observation:
        """See `Provider`."""
        await self._open()
        session = self._sessions.get(ref.session_id)
        if session is not None:
            return session.observe()
        if self._directory.files(ref.session_id).root.is_dir():
            return Observation(State.STOPPED, "Stopped", "Its files are there; nothing runs.")
        return Observation(State.ABSENT, "Absent", "There is nothing of it here.")

    async def exec(self, ref: SessionRef, argv: Sequence[str]) -> tuple[int, bytes]:
        """See `Provider`: in the workspace, with the environment of the session, its output and its errors together.

        Raises ProviderFailure (`NotRunning`, `ExecTimeout`). Cancelling ends the command.
        """
        await self._open()
        session = self._sessions.get(ref.session_id)
        if session is None or not session.started or session.failure is not None:
            raise ProviderFailure("NotRunning", "The session does not run: start it first.")
        return await session.exec(argv)

    def watch(self) -> AsyncIterator[tuple[SessionRef, Observation]]:
        """See `Provider`. For one watcher at a time, who is told what happened before, too. Ends by `close`."""
        return self._changes.read()

    async def close(self) -> None:
        """End all sessions' processes, and let another process take the directory. Idempotent."""
        self._closing = True
        self._changes.close()
        await self._operations.close()
        ends = [self._end(session_id) for session_id in list(self._sessions)]
        for result in await asyncio.gather(*ends, return_exceptions=True):
            if isinstance(result, BaseException):
                log.error("a session could not be ended", error=str(result))
        async with self._opening:
            self._directory.release()

    async def _open(self) -> None:
        """Take hold of the directory, once. Raises ProviderUnavailable."""
        async with self._opening:
            if self._closing:
                raise ProviderUnavailable("The local provider is closed.")
            if not self._opened:
                await self._take()
                self._opened = True

    async def _take(self) -> None:
        """Hold the directory, and end the processes that a killed process has left running there."""
        try:
            await in_thread(self._directory.hold)
            left = selection_of(self._directory.instance, leaders=await in_thread(self._leaders.left))
            ended = await end(left, grace=min(self._options.stop_grace, 1.0))
            await in_thread(self._leaders.clear)
        except BaseException:
            self._directory.release()
            raise
        if ended:
            log.warning("ended processes that were left behind", processes=ended)

    async def _start(self, spec: SessionSpec, report: Report) -> Endpoints:
        """A start, alone with its session. What does not succeed leaves nothing running."""
        session_id = spec.ref.session_id
        current = self._sessions.get(session_id)
        if current is not None and current.spec == spec and current.observe().state is State.RUNNING:
            return current.endpoints
        await self._end(session_id)
        files = self._directory.files(session_id)
        session = RunningSession(
            spec, files, self._directory.instance, self._leaders, self._options, self._sink, self._changed
        )
        self._sessions[session_id] = session
        try:
            await self._prepare(session, report)
            services = session.launch(self._ports)
            await self._report(session, report, "StartingServices", f"Starting {', '.join(services) or 'no service'}.")
            await session.get_ready()
        except BaseException as error:
            await finish(session.end(grace=0), name=f"undo start {session_id}")
            if not isinstance(error, ProviderFailure):
                del self._sessions[session_id]
            else:
                session.failure = error
            raise
        session.started = True
        return session.endpoints

    async def _prepare(self, session: RunningSession, report: Report) -> None:
        """Make the session's files, and its workspace unless it is there."""
        files, spec = session.files, session.spec
        try:
            await in_thread(files.prepare)
            if spec.repo_url is None:
                if not await in_thread(lambda: files.has_work):
                    session.say("no repository is set: the workspace begins empty")
                await in_thread(lambda: files.workspace.mkdir(exist_ok=True))
                return
            repository = git.parse(spec.repo_url, self._options.repo_schemes)
            if spec.branch is not None:
                git.check_branch(spec.branch)
            if await in_thread(lambda: files.has_work):
                came_from = files.read_state().get("repository")
                if came_from not in (None, str(repository)):
                    session.say(f"the workspace is kept as it is; it was cloned from {came_from}", "git")
                return
            await self._clone(session, repository, report)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ProviderFailure("DiskFull", "There is no room left for the session's files.") from error
            raise ProviderUnavailable(f"The session's files cannot be made: {error.strerror}.") from error

    async def _clone(self, session: RunningSession, repository: git.Repository, report: Report) -> None:
        files, spec = session.files, session.spec
        branch = f" (branch {spec.branch})" if spec.branch is not None else ""
        await self._report(session, report, "Cloning", f"Cloning {repository}{branch}")
        clone = git.Clone(
            repository,
            spec.branch,
            files.incoming,
            self._options.repo_schemes,
            self._options.clone_deadline,
            {**session.markers, SERVICE: "git"},
            files.home,
            self._options.ssh_key,
            spec.machine.disk_bytes,
        )
        await clone.make(lambda line: session.say(line, "git"))
        await in_thread(files.adopt)
        await in_thread(lambda: files.write_state(repository=str(repository), branch=spec.branch))

    async def _report(self, session: RunningSession, report: Report, reason: str, message: str) -> None:
        session.progress = (reason, message)
        await report(reason, message)

    async def _end(self, session_id: int) -> None:
        """End the session's processes, also those that we know nothing of."""
        session = self._sessions.get(session_id)
        if session is not None:
            await session.end(grace=self._options.stop_grace)
            del self._sessions[session_id]
        else:
            await end(selection_of(self._directory.instance, session_id), grace=self._options.stop_grace)
        self._changes.forget(session_id)

    async def _delete(self, session_id: int) -> None:
        await self._end(session_id)
        await in_thread(partial(self._directory.remove, session_id))

    def _changed(self, session: RunningSession) -> None:
        """Something happened to a service: tell it, and end what is left of a session that has failed."""
        if self._closing or not session.started or session.failure is not None:
            return
        observation = session.observe()
        self._changes.put(session.spec.ref, observation)
        if observation.state is State.FAILED:
            session.failure = ProviderFailure(observation.reason, observation.message)
            self._operations.begin("fail", session.spec.ref.session_id, partial(self._end_failed, session))

    async def _end_failed(self, session: RunningSession) -> None:
        if self._sessions.get(session.spec.ref.session_id) is session:
            await session.end(grace=self._options.stop_grace)
