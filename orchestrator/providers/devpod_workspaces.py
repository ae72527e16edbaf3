"""What DevPod has of each session (a workspace, in its words): brought up, looked at, stopped, deleted for certain."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Awaitable, Callable, Mapping
from enum import StrEnum
from functools import partial

from orchestrator import git
from orchestrator.errors import ProviderFailure, ProviderUnavailable
from orchestrator.providers import devpod_troubles as troubles
from orchestrator.providers.contract import LogLine, LogSink, SessionRef, SessionSpec
from orchestrator.providers.devpod_command import DevPod, Outcome, Said
from orchestrator.providers.devpod_home import Handover, Home, fingerprint
from orchestrator.providers.devpod_up import arguments, cloning, git_environment, repository_of, source
from orchestrator.providers.operations import finish, in_thread
from orchestrator.providers.options import DevPodOptions
from orchestrator.providers.workspace import Directory

# DevPod's names.
_NAME = re.compile(r"[a-z0-9-]{1,48}\Z")
# Seconds that setting up DevPod's own provider may take: it may download it.
_SET_UP_DEADLINE = 120.0
_DELETE_ATTEMPTS = 3
# Seconds that `devpod up` gets to end when it is not wanted any more, which gives back its lock.
_UP_GRACE = 2.0
# What DevPod says while it brings up a session, and what that is for the user.
_STAGES = {
    "Clone repository": "Cloning",
    "Inspecting image": "PreparingImage",
    "Build": "BuildingImage",
    "Pull": "PullingImage",
    "Setup container": "SettingUp",
    "Run command": "RunningCommands",
}
_UNKNOWN = re.compile(r"workspace .*(?:doesn't|does not) exist|could(?:n't| not) find workspace", re.IGNORECASE)

# Takes a reason and a message.
Progress = Callable[[str, str], Awaitable[None]]


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


class Workspaces:
    """All of one provider. Its caller sees to it that at most one thing at a time is done with each."""

    def __init__(
        self,
        options: DevPodOptions,
        directory: Directory,
        devpod: DevPod,
        sink: LogSink,
        *,
        endpoint: str | None,
        credentials: Mapping[str, str],
    ) -> None:
        self._options = options
        self._directory = directory
        self._devpod = devpod
        self._sink = sink
        self._provider_options = _provider_options(options, endpoint, credentials)
        self._secrets = [value for value in credentials.values() if len(value) > 2]
        self._setting_up = asyncio.Lock()

    def home(self, ref: SessionRef) -> Home:
        """The home of the session's tenant."""
        return Home(self._directory.path / "tenants" / str(ref.workspace_id))

    def name(self, ref: SessionRef) -> str:
        """How DevPod calls the session."""
        name = f"{self._options.instance}-{ref.container_name}"
        if not _NAME.match(name):
            raise ProviderFailure("InvalidName", f"DevPod does not take {name!r} for the name of a session.")
        return name

    async def up(self, spec: SessionSpec, progress: Progress) -> None:
        """Make its container run. Raises ProviderFailure, ProviderUnavailable.

        Cancelling ends DevPod, and leaves what the next `up` goes on from.
        """
        ref = spec.ref
        repository = repository_of(spec, self._options.repo_schemes)
        home, name = self.home(ref), self.name(ref)
        await self._set_up(home)
        if await in_thread(partial(home.has_begun_only, name)):
            # A clone that was cut off counts as whole for DevPod.
            self._say(ref, Said("info", "the session's first start was not finished: it is begun again"))
            await self.remove(ref)
        made_by = fingerprint(dict(spec.machine.options))
        made = await in_thread(partial(home.made_by, ref.session_id))
        await self._up(spec, home, repository, progress, recreate=made not in (None, made_by))
        if (seen := await self.status(ref)) is not Seen.RUNNING:
            raise ProviderFailure("NotRunning", f"DevPod has brought up the session, and says that it is {seen.value}.")
        await in_thread(partial(home.make_by, ref.session_id, made_by))

    async def stop(self, ref: SessionRef) -> None:
        """End its container, and keep its files. Raises ProviderFailure, ProviderUnavailable."""
        if await self.status(ref) is not Seen.RUNNING:
            return
        outcome = await self._ask(ref, "stop", self._options.stop_deadline)
        # Its exit code is not to be trusted either way.
        if await self.status(ref) is Seen.RUNNING:
            raise troubles.of(outcome.said, "stop the session")

    async def remove(self, ref: SessionRef) -> None:
        """Delete what DevPod has of the session, and see that it is so. Raises ProviderFailure, ProviderUnavailable."""
        home, name = self.home(ref), self.name(ref)
        if not await in_thread(lambda: home.is_there):
            return
        seen = await self.status(ref)
        for _ in range(_DELETE_ATTEMPTS):
            if seen is Seen.UNKNOWN:
                break
            # By force only what is not there any more: else DevPod would forget what goes on running.
            force = ("--force",) if seen is Seen.GONE else ()
            outcome = await self._ask(ref, "delete", self._options.delete_deadline, *force)
            seen = await self.status(ref)
        else:
            if seen is not Seen.UNKNOWN:
                raise troubles.of(outcome.said, f"delete the session, which is {seen.value} still")
        await in_thread(partial(home.forget, ref.session_id, name))

    async def status(self, ref: SessionRef) -> Seen:
        """What DevPod says of a session. Raises ProviderUnavailable when it does not."""
        home = self.home(ref)
        if not await in_thread(lambda: home.is_there):
            return Seen.UNKNOWN
        deadline = self._options.status_deadline
        outcome = await self._ask(ref, "status", deadline, "--output", "json", "--timeout", f"{deadline:g}s")
        for line in outcome.printed:
            if (seen := _state(line)) is not None:
                return seen
        if any(_UNKNOWN.search(said.text) for said in outcome.said):
            return Seen.UNKNOWN
        trouble = troubles.of(outcome.said, "tell the session's status")
        raise trouble if isinstance(trouble, ProviderUnavailable) else ProviderUnavailable(str(trouble))

    async def runs(self, ref: SessionRef) -> bool:
        """Whether its container runs; not when that cannot be told."""
        try:
            return await self.status(ref) is Seen.RUNNING
        except ProviderUnavailable:
            return False

    async def _up(
        self, spec: SessionSpec, home: Home, repository: git.Repository, progress: Progress, *, recreate: bool
    ) -> None:
        """`devpod up`, told to the session's log. Raises what `troubles` makes of its failure."""
        ref, name = spec.ref, self.name(spec.ref)
        handover = Handover(self._directory.files(ref.session_id).root)
        stages: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
        stage = ""
        again = ("--recreate",) if recreate else ()

        def hear(said: Said) -> None:
            nonlocal stage
            self._say(ref, said)
            found = next((reason for words, reason in _STAGES.items() if said.text.startswith(words)), stage)
            if found != stage:
                stage = found
                stages.put_nowait((stage, said.text if stage != "Cloning" else cloning(repository, spec.branch)))

        telling = asyncio.create_task(_tell(stages, progress), name=f"devpod up {name} progress")
        try:
            env = await in_thread(partial(git_environment, repository, self._options.repo_schemes, handover))
            ssh_config = home.ssh_config(ref.session_id)
            told = await in_thread(lambda: [*arguments(spec, self._options.provider, ssh_config, handover)])
            up = partial(
                self._devpod.run, "up", source(repository, spec.branch), "--id", name, *told, *again,
                home=home.path, deadline=self._options.up_deadline, session_id=ref.session_id, env=env,
                hear=hear, hide=partial(self._hide, home, repository), grace=_UP_GRACE,
            )  # fmt: skip
            outcome = await up()
            if outcome.code != 0 and troubles.is_cut_off(outcome.said):
                self._say(ref, Said("info", "DevPod has lost its connection to the container: once more"))
                outcome = await up()
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

    async def _ask(self, ref: SessionRef, command: str, deadline: float, *arguments: str) -> Outcome:
        """A command about one session. Raises ProviderUnavailable when it does not end in time."""
        home = self.home(ref)
        hear = None if command == "status" else partial(self._say, ref)
        try:
            return await self._devpod.run(
                command, self.name(ref), *arguments,
                home=home.path, deadline=deadline, session_id=ref.session_id, hear=hear,
                hide=partial(self._hide, home, None),
            )  # fmt: skip
        except TimeoutError as error:
            raise ProviderUnavailable(f"`devpod {command}` did not end within {deadline:g} s.") from error

    def _say(self, ref: SessionRef, said: Said) -> None:
        if said.text.startswith("Run 'ssh "):
            # That is for whoever has DevPod on a machine of his own.
            return
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


async def _tell(stages: asyncio.Queue[tuple[str, str]], progress: Progress) -> None:
    while True:
        await progress(*await stages.get())


def _provider_options(options: DevPodOptions, endpoint: str | None, credentials: Mapping[str, str]) -> dict[str, str]:
    """What DevPod's own provider is to work with."""
    found = dict(options.options)
    if endpoint is not None:
        found["DOCKER_HOST" if options.provider == "docker" else "HOST"] = endpoint
    elif options.provider == "docker" and (host := os.environ.get("DOCKER_HOST")):
        # As for everything else of Docker's: DevPod alone would take no notice of it.
        found.setdefault("DOCKER_HOST", host)
    return {**found, **credentials}


def _state(line: str) -> Seen | None:
    """What a line of `devpod status --output json` says; None when it is none."""
    try:
        return Seen(json.loads(line)["state"])
    except (ValueError, KeyError, TypeError):
        return None
