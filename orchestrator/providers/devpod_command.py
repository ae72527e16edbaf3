"""The `devpod` program: found, asked for its version, run within a deadline, heard, and ended with all that it started.

DevPod starts itself again as its own agent and as its own ssh server, and the docker command beside: all of them carry
our markers in their environment, and are ended together.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from uuid import uuid4

from orchestrator.children.output import Capture, Pipe, Stream, drain, open_pipe
from orchestrator.children.processes import INSTANCE, SERVICE, SESSION, Selection, end, spawn
from orchestrator.errors import ProviderUnavailable
from orchestrator.providers.operations import finish, in_thread
from orchestrator.providers.options import DevPodOptions

# The oldest whose flags and JSON are those that we use.
OLDEST = (0, 6, 0)
# What a build from source calls itself unless it is told otherwise.
_UNVERSIONED = (0, 0, 0)
_VERSION = re.compile(r"v?(\d+)\.(\d+)\.(\d+)")
_VERSION_DEADLINE = 15.0
# Of our own environment, what gets DevPod, and the git and docker that it runs, through the operator's network.
_NETWORK = (
    "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY",
    "SSL_CERT_FILE", "SSL_CERT_DIR", "GIT_SSL_CAINFO",
)  # fmt: skip
# Lines that are kept for the message about a failure.
_KEPT = 100
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True, slots=True)
class Said:
    """One line of DevPod's log. `level` is its own word (`info`, `warning`, `error`, `fatal`)."""

    level: str
    text: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a command ended: the last lines that it logged, and what it printed beside (as lines, and as bytes)."""

    code: int
    said: tuple[Said, ...]
    printed: tuple[str, ...]
    output: bytes = b""


class DevPod:
    """The program. `instance` marks its processes as this provider's."""

    def __init__(self, options: DevPodOptions) -> None:
        self._options = options
        self.instance = ""
        # What the file was when its version was last asked for, and that.
        self._known: tuple[object, tuple[int, ...]] | None = None

    async def check(self) -> str:
        """Its version, asked for when its file has changed. Raises ProviderUnavailable for none, and for an old one."""
        program = self._program()
        stat = await in_thread(Path(program).stat)
        state = (program, stat.st_mtime_ns, stat.st_size)
        if self._known is None or self._known[0] != state:
            self._known = (state, await self._version(program))
        version = self._known[1]
        if version < OLDEST and version != _UNVERSIONED:
            raise ProviderUnavailable(
                f"{program} is DevPod {_dotted(version)}, and sessions need {_dotted(OLDEST)} or newer: install one."
            )
        return _dotted(version)

    async def run(
        self,
        *arguments: str,
        home: Path,
        deadline: float | None,
        session_id: int = 0,
        env: Mapping[str, str] | None = None,
        hear: Callable[[Said], None] | None = None,
        take: Callable[[str], None] | None = None,
        capture: int = 0,
        hide: Callable[[str], str] = str,
        grace: float = 0.0,
    ) -> Outcome:
        """Run a command to its end, in a home that is there. However it ends, nothing that it started is left.

        `hear` is told each line of its log, `take` each other line of its standard output, of which with `capture` so
        many bytes are kept instead. What is to be ended has `grace` seconds for it. Raises TimeoutError after
        `deadline` seconds, and ProviderUnavailable when there is no program.
        """
        markers = {INSTANCE: self.instance, SESSION: str(session_id), SERVICE: f"devpod-{uuid4().hex}"}
        log = _Log(hear, take, hide)
        make_stdout = partial(Capture, capture) if capture else partial(Stream, log.stdout, log.left_out)
        pipes: list[Pipe] = []
        try:
            process = await self._spawn(
                arguments, pipes, (make_stdout, partial(Stream, log.stderr, log.left_out)), home,
                {**self._environment(home), **(env or {}), **markers},
            )  # fmt: skip
            try:
                async with asyncio.timeout(deadline):
                    code = await process.wait()
                grace = 0.0
            finally:
                await finish(end(Selection(markers), grace=grace), name=f"end of devpod {arguments[0]}")
                # It has ended: this is so that the loop knows it, too, before anybody closes that.
                await process.wait()
            # All who could write have ended.
            await drain(*pipes, timeout=5)
        finally:
            for pipe in pipes:
                pipe.close()
        output = pipes[0].output if isinstance(pipes[0], Capture) else b""
        return Outcome(code, tuple(log.said), tuple(log.printed), output)

    async def _spawn(
        self,
        arguments: Sequence[str],
        pipes: list[Pipe],
        makers: Sequence[Callable[[], Pipe]],
        home: Path,
        env: Mapping[str, str],
    ) -> asyncio.subprocess.Process:
        """Start the program with its output going into pipes that the makers make, which are added to `pipes`."""
        program = self._program()
        writes: list[int] = []
        try:
            for make in makers:
                pipe, write = await open_pipe(make)
                pipes.append(pipe)
                writes.append(write)
            return await spawn(
                [program, *arguments, "--log-output", "json"], cwd=home, env=env, stdout=writes[0], stderr=writes[1]
            )
        except OSError as error:
            raise ProviderUnavailable(f"{program} cannot be run: {error.strerror or error}.") from error
        finally:
            for write in writes:
                os.close(write)

    async def _version(self, program: str) -> tuple[int, ...]:
        try:
            # Any directory will do: asked for its version, it looks at none.
            outcome = await self.run("version", home=Path("/"), deadline=_VERSION_DEADLINE)
        except TimeoutError as error:
            raise ProviderUnavailable(f"{program} does not say its version within {_VERSION_DEADLINE:g} s.") from error
        found = _VERSION.search(" ".join(outcome.printed))
        if outcome.code != 0 or found is None:
            raise ProviderUnavailable(f"{program} is no DevPod: it does not say its version.")
        return tuple(int(part) for part in found.groups())

    def _program(self) -> str:
        found = shutil.which(self._options.binary)
        if found is None:
            raise ProviderUnavailable(
                f"There is no program {self._options.binary!r} on the orchestrator's machine: install DevPod"
                f" {_dotted(OLDEST)} or newer, or name it in the provider's option `binary`."
            )
        return found

    def _environment(self, home: Path) -> dict[str, str]:
        """Little, and nothing secret: DevPod keeps it, and a devcontainer.json may ask for it (`${localEnv:…}`)."""
        return {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(home),
            "DEVPOD_HOME": str(home),
            "LANG": "C.UTF-8",
            "LC_ALL": "C.UTF-8",
            "DEVPOD_DISABLE_TELEMETRY": "true",
            "DEVPOD_SKIP_VERSION_CHECK": "true",
            **{name: os.environ[name] for name in _NETWORK if name in os.environ},
            **self._options.env,
        }


class _Log:
    """Tells DevPod's log, JSON a line on either stream, from what its commands print."""

    def __init__(
        self,
        hear: Callable[[Said], None] | None,
        take: Callable[[str], None] | None,
        hide: Callable[[str], str],
    ) -> None:
        self.said: deque[Said] = deque(maxlen=_KEPT)
        self.printed: deque[str] = deque(maxlen=_KEPT)
        self._hear = hear
        self._take = take
        self._hide = hide

    def stdout(self, line: str) -> None:
        said = parse(line)
        if said is not None:
            self._say(said)
        elif self._take is not None:
            self._take(line)
        else:
            self.printed.append(line)

    def stderr(self, line: str) -> None:
        # What DevPod runs may print there what it likes.
        self._say(parse(line) or Said("info", _COLOUR.sub("", line)))

    def left_out(self, lines: int) -> None:
        self._say(Said("warning", f"{lines} lines were left out: it prints too much"))

    def _say(self, said: Said) -> None:
        if not said.text.strip():
            return
        said = Said(said.level, self._hide(said.text))
        self.said.append(said)
        if self._hear is not None:
            self._hear(said)


def parse(line: str) -> Said | None:
    """A line of the log; None when it is none."""
    if not line.startswith('{"'):
        return None
    try:
        entry = json.loads(line)
        level, text = entry["level"], entry["message"]
    except (ValueError, KeyError, TypeError):
        return None
    if not isinstance(level, str) or not isinstance(text, str):
        return None
    return Said(level, _COLOUR.sub("", text).rstrip())


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(str(part) for part in version)
