"""Sessions from a repository's devcontainer.json, wherever DevPod can run them, by the `devpod` command.

What DevPod knows of a session is in the home of its tenant on this disk (`devpod_home`), so that one orchestrator at a
time has the provider. Containers, and the services in them, go on while none has; the next one asks DevPod what runs,
and makes the ways to it again (`devpod_session`).
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

import structlog

from orchestrator import git
from orchestrator.children.processes import INSTANCE, Selection, end
from orchestrator.errors import ProviderFailure, ProviderUnavailable
from orchestrator.machine_schema import errors_for_kind, flatten
from orchestrator.providers import devpod_troubles as troubles
from orchestrator.providers.changes import Changes
from orchestrator.providers.contract import (
    Endpoints,
    LogLine,
    LogSink,
    Observation,
    Report,
    SessionRef,
    SessionSpec,
    State,
)
from orchestrator.providers.devpod_command import DevPod, Outcome, Said
from orchestrator.providers.devpod_home import Handover, Home, fingerprint
from orchestrator.providers.devpod_services import Definition, define
from orchestrator.providers.devpod_session import CONNECTION, Attachment, Place
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


class Seen(StrEnum):
    """What `devpod status` says."""

    RUNNING = "Running"
    STOPPED = "Stopped"
    # Something between.
    BUSY = "Busy"
    # DevPod knows the session, and where it should be there is nothing.
    GONE = "NotFound"
    # DevPod does not know it.
    UNKNOWN = "Unknown"


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
        self._provider_options = _provider_options(options, endpoint, credentials or {})
        self._secrets = [value for value in (credentials or {}).values() if len(value) > 2]
        self._devpod = DevPod(options)
        self._ports = Ports()
        self._operations = Operations()
        self._changes = Changes()
        self._attached: dict[int, Attachment] = {}
        # What those that are being started run from, and what they wait for.
        self._specs: dict[int, SessionSpec] = {}
        self._progress: dict[int, tuple[str, str]] = {}
        self._setting_up = asyncio.Lock()
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
        seen = await self._status(ref)
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
            and await self._status(spec.ref) is Seen.RUNNING
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
        repository = self._repository(spec)
        home, name = self._home(ref), self._name(ref)
        await self._set_up(home)
        if await in_thread(partial(home.has_begun_only, name)):
            # A clone that was cut off counts as whole for DevPod.
            self._say(ref, Said("info", "the session's first start was not finished: it is begun again"))
            await self._remove(ref)
        made_by = fingerprint(dict(machine.options))
        before = await in_thread(partial(home.recall, ref.session_id))
        recreate = bool(before) and before.get("made_by") != made_by
        await self._up(spec, home, repository, report, recreate=recreate)
        if (seen := await self._status(ref)) is not Seen.RUNNING:
            raise ProviderFailure("NotRunning", f"DevPod has brought up the session, and says that it is {seen.value}.")
        folder = await in_thread(partial(home.folder, name)) or f"/workspaces/{name}"
        names = ", ".join(machine.services) or "no service"
        await self._progressed(ref.session_id, report, "StartingServices", f"Starting {names}.")
        attachment = self._attach(Place(ref, home.path, name, folder), services, before.get("ports") or {})
        self._specs[ref.session_id] = replace(spec, deadline=None)
        await attachment.get_ready(self._options.ready_deadline)
        state = {
            "made_by": made_by,
            "folder": folder,
            "services": {key: dict(value) for key, value in machine.services.items()},
            "ports": dict(attachment.local_ports),
        }
        await in_thread(lambda: home.remember(ref.session_id, **state))
        return attachment.endpoints

    def _repository(self, spec: SessionSpec) -> git.Repository:
        """The project's repository, if DevPod can be told of it. Raises ProviderFailure."""
        if spec.repo_url is None:
            raise ProviderFailure(
                "NoRepository", "A DevPod session is made from a repository: set the project's repository URL."
            )
        repository = git.parse(spec.repo_url, self._options.repo_schemes)
        path = urlsplit(repository.url).path if "://" in repository.url else repository.url.partition(":")[2]
        if "@" in path or "?" in repository.url:
            # What follows an `@` is a branch for DevPod, and the URL is in its files for all time.
            raise ProviderFailure(
                "InvalidRepository", "DevPod takes no repository URL with an '@' or a '?' in its path."
            )
        if spec.branch is not None:
            git.check_branch(spec.branch)
            if not _BRANCH.match(spec.branch):
                raise ProviderFailure(
                    "InvalidBranch", "DevPod takes branches of letters, digits, '.', '/', '_' and '-' only."
                )
        return repository

    async def _up(
        self, spec: SessionSpec, home: Home, repository: git.Repository, report: Report, *, recreate: bool
    ) -> None:
        """`devpod up`, told to the session's log. Raises what `troubles` makes of its failure."""
        ref, name = spec.ref, self._name(spec.ref)
        handover = Handover(self._directory.files(ref.session_id).root)
        stages: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
        stage = ""

        def hear(said: Said) -> None:
            nonlocal stage
            self._say(ref, said)
            found = next((reason for words, reason in _STAGES.items() if said.text.startswith(words)), stage)
            if found != stage:
                stage = found
                stages.put_nowait((stage, said.text if stage != "Cloning" else _cloning(repository, spec.branch)))

        telling = asyncio.create_task(self._tell(ref.session_id, stages, report), name=f"devpod up {name} progress")
        try:
            env = await in_thread(partial(self._git, repository, handover))
            arguments = [*await in_thread(partial(self._arguments, spec, home, handover))]
            if recreate:
                arguments.append("--recreate")
            outcome = await self._devpod.run(
                "up", _source(repository, spec.branch), "--id", name, *arguments,
                home=home.path, deadline=self._options.up_deadline, session_id=ref.session_id, env=env,
                hear=hear, hide=partial(self._hide, home, repository), grace=_UP_GRACE,
            )  # fmt: skip
        except TimeoutError as error:
            raise ProviderFailure(
                "StartTimeout", f"DevPod did not bring up the session within {self._options.up_deadline:g} s."
            ) from error
        finally:
            telling.cancel()
            await asyncio.wait({telling})
            await finish(
                asyncio.to_thread(self._directory.remove, ref.session_id), name=f"end of handover {ref.session_id}"
            )
        if outcome.code != 0:
            asked = git.Git(repository, self._options.repo_schemes, {}, home.path, home.path)
            raise troubles.of_up(outcome.said, asked, spec.branch)

    def _arguments(self, spec: SessionSpec, home: Home, handover: Handover) -> Iterator[str]:
        """What is said of the session beside its repository. Raises ProviderFailure."""
        options = spec.machine.options
        yield from ("--provider", self._options.provider, "--ide", "none", "--open-ide=false")
        yield from ("--ssh-config", str(home.ssh_config(spec.ref.session_id)))
        for option in ("devcontainer_path", "devcontainer_image", "fallback_image"):
            if option in options:
                yield from (f"--{option.replace('_', '-')}", options[option])
        if options.get("clone", "full") != "full":
            yield from ("--git-clone-strategy", options["clone"])
        if options.get("submodules"):
            yield "--git-clone-recursive-submodules"
        for name, value in options.get("provider_options", {}).items():
            yield from ("--provider-option", f"{name}={value}")
        env = {name: value for name, value in spec.env.items() if value}
        for name in spec.env.keys() - env.keys():
            self._say(
                spec.ref, Said("info", f"the environment variable {name} is left out: DevPod takes none without value")
            )
        for name, value in env.items():
            if "\n" in value or "\0" in value or len(value.encode()) > _LONGEST_LINE:
                raise ProviderFailure(
                    "InvalidEnvironment",
                    f"The project's environment variable {name!r} cannot be handed to DevPod:"
                    " it has several lines, or is longer than 60 kB.",
                )
        if env:
            yield from ("--workspace-env-file", str(handover.environment(env)))

    def _git(self, repository: git.Repository, handover: Handover) -> dict[str, str]:
        """The environment that makes git, which DevPod runs, as careful as ours (`git`), and gives it the credentials.

        Those are in a file for the time of the start: DevPod writes its environment down, and shows it to the
        devcontainer.json. Where DevPod clones elsewhere, it asks git here for the credentials and hands them on.
        """
        settings = {
            "core.hooksPath": "/dev/null",
            "core.fsmonitor": "false",
            "protocol.ext.allow": "never",
            "credential.helper": "",
        }
        if repository.url.startswith("http") and (repository.username or repository.password):
            file = handover.credentials(repository.username, repository.password)
            parts = urlsplit(repository.url)
            settings[f"credential.{parts.scheme}://{parts.netloc}.helper"] = (
                f'!f() {{ test "$1" = get && cat {shlex.quote(str(file))}; }}; f'
            )
        environment = {
            "GIT_TERMINAL_PROMPT": "0",
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_ALLOW_PROTOCOL": ":".join(self._options.repo_schemes),
            "GIT_CONFIG_COUNT": str(len(settings)),
        }
        for number, (name, value) in enumerate(settings.items()):
            environment[f"GIT_CONFIG_KEY_{number}"] = name
            environment[f"GIT_CONFIG_VALUE_{number}"] = value
        return environment

    async def _set_up(self, home: Home) -> None:
        """See that DevPod has its own provider in this home, with the options of now. Raises ProviderFailure."""
        options = self._options
        state = fingerprint(options.provider, options.source, self._provider_options)
        async with self._setting_up:
            await in_thread(home.make)
            known = await in_thread(partial(home.has_provider, options.provider))
            if known and await in_thread(partial(home.is_set_up, state)):
                return
            if not known:
                source = options.source or options.provider
                await self._provider(home, "add", source, "--name", options.provider, "--use=false")
            elif options.source is not None:
                await self._provider(home, "update", options.provider, options.source, "--use=false")
            await in_thread(partial(home.write_options, options.provider, self._provider_options))
            # Without options of its own it does nothing unless the desktop application asks for it.
            await self._provider(home, "set-options", options.provider, env={"DEVPOD_UI": "true"})
            await in_thread(partial(home.set_up, state))

    async def _provider(self, home: Home, *arguments: str, env: Mapping[str, str] | None = None) -> None:
        try:
            outcome = await self._devpod.run(
                "provider", *arguments, home=home.path, deadline=_SET_UP_DEADLINE, env=env, hide=self._hidden
            )
        except TimeoutError as error:
            raise ProviderUnavailable(
                f"DevPod could not set up its provider {self._options.provider!r} within {_SET_UP_DEADLINE:g} s."
            ) from error
        if outcome.code != 0:
            raise troubles.of(outcome.said, f"set up its provider {self._options.provider!r}")

    async def _tell(self, session_id: int, stages: asyncio.Queue[tuple[str, str]], report: Report) -> None:
        while True:
            await self._progressed(session_id, report, *await stages.get())

    async def _progressed(self, session_id: int, report: Report, reason: str, message: str) -> None:
        self._progress[session_id] = (reason, message)
        await report(reason, message)

    # Stopping and deleting.

    async def _stop(self, ref: SessionRef) -> None:
        await self._detach(ref.session_id)
        if await self._status(ref) is not Seen.RUNNING:
            return
        outcome = await self._ask(ref, "stop", self._options.stop_deadline)
        # Its exit code is not to be trusted either way.
        if await self._status(ref) is Seen.RUNNING:
            raise troubles.of(outcome.said, "stop the session")

    async def _delete(self, ref: SessionRef) -> None:
        await self._detach(ref.session_id)
        await self._remove(ref)

    async def _remove(self, ref: SessionRef) -> None:
        """Delete what DevPod has of the session, and see that it is so. Raises ProviderFailure, ProviderUnavailable."""
        home, name = self._home(ref), self._name(ref)
        if not await in_thread(lambda: home.is_there):
            return
        seen = await self._status(ref)
        for _ in range(_DELETE_ATTEMPTS):
            if seen is Seen.UNKNOWN:
                break
            # By force only what is not there any more: else DevPod would forget what goes on running.
            force = ("--force",) if seen is Seen.GONE else ()
            outcome = await self._ask(ref, "delete", self._options.delete_deadline, *force)
            seen = await self._status(ref)
        else:
            if seen is not Seen.UNKNOWN:
                raise troubles.of(outcome.said, f"delete the session, which is {seen.value} still")
        await in_thread(partial(home.forget, ref.session_id, name))

    # Looking.

    async def _status(self, ref: SessionRef) -> Seen:
        """What DevPod says of a session. Raises ProviderUnavailable when it does not."""
        home = self._home(ref)
        if not await in_thread(lambda: home.is_there):
            return Seen.UNKNOWN
        deadline = self._options.status_deadline
        outcome = await self._ask(ref, "status", deadline + 5, "--output", "json", "--timeout", f"{deadline:g}s")
        for line in outcome.printed:
            if (seen := _state(line)) is not None:
                return seen
        if any(_UNKNOWN.search(said.text) for said in outcome.said):
            return Seen.UNKNOWN
        trouble = troubles.of(outcome.said, "tell the session's status")
        raise trouble if isinstance(trouble, ProviderUnavailable) else ProviderUnavailable(str(trouble))

    async def _ask(self, ref: SessionRef, command: str, deadline: float, *arguments: str) -> Outcome:
        """A command about one session. Raises ProviderUnavailable when it does not end in time."""
        home = self._home(ref)
        hear = None if command == "status" else partial(self._say, ref)
        try:
            return await self._devpod.run(
                command, self._name(ref), *arguments,
                home=home.path, deadline=deadline, session_id=ref.session_id, hear=hear,
                hide=partial(self._hide, home, None),
            )  # fmt: skip
        except TimeoutError as error:
            raise ProviderUnavailable(f"`devpod {command}` did not end within {deadline:g} s.") from error

    async def _reattach(self, ref: SessionRef) -> Observation:
        """Make the ways to a container that an orchestrator before us has started."""
        if (attachment := self._attached.get(ref.session_id)) is not None:
            return attachment.observe()
        home, name = self._home(ref), self._name(ref)
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
            for attachment in list(self._attached.values()):
                group.create_task(look(attachment))

    async def _look(self, attachment: Attachment) -> None:
        """Tell of a session whose container runs no more."""
        ref = attachment.place.ref
        try:
            seen = await self._status(ref)
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
            is_running=partial(self._runs, place.ref),
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

    async def _runs(self, ref: SessionRef) -> bool:
        try:
            return await self._status(ref) is Seen.RUNNING
        except ProviderUnavailable:
            return False

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
            await self._ask(ref, "stop", self._options.stop_deadline)

    # Names, and words.

    def _home(self, ref: SessionRef) -> Home:
        return Home(self._directory.path / "tenants" / str(ref.workspace_id))

    def _name(self, ref: SessionRef) -> str:
        name = f"{self._options.instance}-{ref.container_name}"
        if not _NAME.match(name):
            raise ProviderFailure("InvalidName", f"DevPod does not take {name!r} for the name of a session.")
        return name

    def _say(self, ref: SessionRef, said: Said) -> None:
        line = said.text if said.level in ("info", "debug", "done") else f"{said.level}: {said.text}"
        self._sink(LogLine(ref.session_id, "devpod", "system", line))

    def _hide(self, home: Home, repository: git.Repository | None, line: str) -> str:
        if repository is not None:
            line = repository.hide(line)
        return self._hidden(line.replace(str(home.path), "~"))

    def _hidden(self, line: str) -> str:
        for secret in self._secrets:
            line = line.replace(secret, "***")
        return line


def _provider_options(options: DevPodOptions, endpoint: str | None, credentials: Mapping[str, str]) -> dict[str, str]:
    """What DevPod's own provider is to work with."""
    found = dict(options.options)
    if endpoint is not None:
        found["DOCKER_HOST" if options.provider == "docker" else "HOST"] = endpoint
    elif options.provider == "docker" and (host := os.environ.get("DOCKER_HOST")):
        # As for everything else of Docker's: DevPod alone would take no notice of it.
        found.setdefault("DOCKER_HOST", host)
    return {**found, **credentials}


def _source(repository: git.Repository, branch: str | None) -> str:
    return repository.url if branch is None else f"{repository.url}@{branch}"


def _cloning(repository: git.Repository, branch: str | None) -> str:
    return f"Cloning {repository}." if branch is None else f"Cloning {repository} (branch {branch})."


def _state(line: str) -> Seen | None:
    """What a line of `devpod status --output json` says; None when it is none."""
    try:
        return Seen(json.loads(line)["state"])
    except (ValueError, KeyError, TypeError):
        return None


def _observation(seen: Seen) -> Observation:
    """What a session is for whoever asks, when its container does not run."""
    if seen is Seen.BUSY:
        return Observation(State.STARTING, "Busy", "DevPod is busy with the session's container.")
    if seen is Seen.STOPPED:
        return Observation(State.STOPPED, "Stopped", "Its files are there; its container does not run.")
    return Observation(State.ABSENT, "Absent", "DevPod has no container for it.")
