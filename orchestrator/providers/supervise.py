"""One service of a session: launched, awaited until it answers, and launched again when it crashes.

`Service.run` is the whole life; it ends when it is cancelled, when its end is wanted (`let_end`) and comes, and when it
fails for good: then `failure` says why. Cancelling leaves its processes to whoever cancels: all of a session's are
ended together.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import structlog

from orchestrator.children.leaders import Leaders
from orchestrator.children.output import Stream, Tail, drain, open_pipe
from orchestrator.children.processes import Limits, Selection, end, ending, spawn
from orchestrator.errors import ProviderFailure
from orchestrator.providers.contract import Endpoint, LogLine, LogSink
from orchestrator.providers.operations import in_thread
from orchestrator.providers.options import LocalOptions

log = structlog.get_logger("provider.local")

HOST = "127.0.0.1"
# Where ports of ours are looked for: below those that Linux gives to outgoing connections, which could take one in the
# moment between our look and the service's bind.
_PORTS = range(20000, 32768)
# Seconds that one probe may take.
_PROBE_TIMEOUT = 5.0
# Seconds. No back-off grows further.
_LONGEST_DELAY = 60.0
_PLACEHOLDER = re.compile(r"\{(port|host|directory|python)\}")


class Phase(StrEnum):
    """How far a service is."""

    STARTING = "starting"
    READY = "ready"
    CRASHED = "crashed"  # It is launched again in a moment.
    FAILED = "failed"


class Ports:
    """The ports that services were promised, so that no two get the same."""

    def __init__(self) -> None:
        self._promised: set[int] = set()

    def promise(self, wanted: int) -> int:
        """A port that nobody listens on: the one wanted, or any for 0. Raises OSError when there is none."""
        if wanted:
            if wanted in self._promised or not _is_free(wanted):
                raise OSError(f"the port {wanted} is taken")
            self._promised.add(wanted)
            return wanted
        first = random.randrange(len(_PORTS))
        for number in range(len(_PORTS)):
            port = _PORTS[(first + number) % len(_PORTS)]
            if port not in self._promised and _is_free(port):
                self._promised.add(port)
                return port
        raise OSError("no port is free")

    def give_back(self, port: int) -> None:
        """The service is gone."""
        self._promised.discard(port)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As servers do: a connection of the last one that lingers is no hindrance.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


@dataclass(frozen=True, slots=True)
class Definition:
    """What the machine config says of a service, and the surroundings that the session gives it."""

    session_id: int
    name: str
    # With its placeholders; the program is a path.
    command: tuple[str, ...]
    # 0: any that is free.
    port: int
    path: str
    # The HTTP path that tells whether it is ready; None: it is as soon as it accepts connections.
    ready: str | None
    # The session's, as it is, and the service's own, with its placeholders.
    session_env: Mapping[str, str]
    env: Mapping[str, str]
    directory: Path
    limits: Limits
    markers: Mapping[str, str]

    def fill(self, text: str, port: int) -> str:
        """A word of the command or a value of the environment, its placeholders replaced, other braces left alone."""
        values = {"port": str(port), "host": HOST, "directory": str(self.directory), "python": sys.executable}
        return _PLACEHOLDER.sub(lambda found: values[found[1]], text)


class Service:
    """A service that is kept running. `changed` is called after each change of `phase`."""

    def __init__(
        self,
        definition: Definition,
        options: LocalOptions,
        ports: Ports,
        leaders: Leaders,
        sink: LogSink,
        changed: Callable[[], None],
    ) -> None:
        self.definition = definition
        self.phase = Phase.STARTING
        self.port = 0
        # What a crash says, for people.
        self.trouble = ""
        self.failure: ProviderFailure | None = None
        self._options = options
        self._ports = ports
        self._leaders = leaders
        self._sink = sink
        self._changed = changed
        self._crashes = 0
        self._tail = Tail()
        self._probed = "it was not asked yet"
        self._stopping = False
        self._leader: int | None = None
        # Ends with the first readiness, or with the failure.
        self.first: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def endpoint(self) -> Endpoint:
        """Where it is reached."""
        path = self.definition.path
        return Endpoint(f"http://{HOST}:{self.port}{path}", path)

    @property
    def leader(self) -> int | None:
        """The process that was launched, while it runs."""
        return self._leader

    def let_end(self) -> None:
        """From now on its end is wanted: it is not launched again."""
        self._stopping = True

    def not_ready(self) -> ProviderFailure:
        """The failure of a service that does not get ready in time."""
        return ProviderFailure(
            "NotReady",
            f"{self.definition.name} was not ready within {self._options.ready_deadline:g} s: {self._probed}."
            f"{self._last_lines()}",
        )

    async def run(self) -> None:
        """Keep it running until cancelled, or until it fails for good."""
        try:
            while self.failure is None and not self._stopping:
                await self._one_life()
        except Exception as error:
            log.exception("a service's supervision failed", service=self.definition.name)
            self._fail(ProviderFailure("InternalError", f"{self.definition.name} cannot be supervised: {error}"))
        finally:
            self._ports.give_back(self.port)

    async def _one_life(self) -> None:
        """Launch it and see it to its end; then wait as long as so many crashes in a row ask for."""
        loop = asyncio.get_running_loop()
        self._promise_port()
        if self.failure is not None:
            return
        began = loop.time()
        try:
            how = await self._launch()
        except (OSError, ValueError) as error:
            how = f"cannot be launched: {getattr(error, 'strerror', None) or error}"
        if self._stopping:
            return
        if loop.time() - began >= self._options.stable_after:
            self._crashes = 0
        self._crashes += 1
        self.trouble = f"{self.definition.name} {how}"
        if self._crashes >= self._options.crashes:
            self._fail(
                ProviderFailure("CrashLoop", f"{self.trouble}, {self._crashes} times in a row.{self._last_lines()}")
            )
            return
        delay = min(self._options.restart_delay * 2 ** (self._crashes - 1), _LONGEST_DELAY)
        self._say(f"{self.trouble}; it is started again in {delay:g} s")
        self._enter(Phase.CRASHED)
        await asyncio.sleep(delay)
        self._enter(Phase.STARTING)

    def _promise_port(self) -> None:
        """The port of the last life again, if it can be had; a fixed one, or none, and it has failed."""
        self._ports.give_back(self.port)
        try:
            try:
                self.port = self._ports.promise(self.port or self.definition.port)
            except OSError:
                if self.definition.port:
                    raise
                self.port = self._ports.promise(0)
        except OSError as error:
            self.port = 0
            self._fail(ProviderFailure("PortTaken", f"{self.definition.name} cannot be started: {error}."))

    async def _launch(self) -> str:
        """One process, from its launch to its end: how it ended. Raises OSError, ValueError: it cannot be launched."""
        definition = self.definition
        streams: list[Stream] = []
        try:
            writes: list[int] = []
            try:
                for kind in ("stdout", "stderr"):
                    stream, write = await open_pipe(partial(Stream, partial(self._line, kind), self._left_out))
                    streams.append(stream)
                    writes.append(write)
                process = await spawn(
                    [definition.fill(word, self.port) for word in definition.command],
                    cwd=definition.directory, env=self._environment(), stdout=writes[0], stderr=writes[1],
                    limits=definition.limits, seed=definition.session_id,
                )  # fmt: skip
            finally:
                for write in writes:
                    os.close(write)
            self._leader = process.pid
            # First of all: from here on, the next start finds what it leaves, should we be killed.
            await in_thread(partial(self._leaders.add, definition.session_id, process.pid))
            how = await self._watch(process)
            if not self._stopping:
                # What it leaves behind would hold its port, and its streams.
                await end(Selection(definition.markers, {process.pid}), grace=0)
                await in_thread(partial(self._leaders.forget, definition.session_id, process.pid))
            await drain(*streams, timeout=1)
            return how
        finally:
            self._leader = None
            for stream in streams:
                stream.close()

    async def _watch(self, process: asyncio.subprocess.Process) -> str:
        """Wait until it is ready, then until it ends; one that is not ready in time is ended. How it ended."""
        ended = asyncio.create_task(process.wait(), name=f"{self.definition.name} ends")
        ready = asyncio.create_task(self._until_ready(), name=f"{self.definition.name} gets ready")
        try:
            async with asyncio.timeout(self._options.ready_deadline):
                await asyncio.wait({ended, ready}, return_when=asyncio.FIRST_COMPLETED)
            if ready.done() and not ended.done():
                ready.result()
                self._is_ready()
            return ending(await ended)
        except TimeoutError:
            return f"was not ready within {self._options.ready_deadline:g} s ({self._probed})"
        finally:
            ended.cancel()
            ready.cancel()
            await asyncio.wait({ended, ready})

    async def _until_ready(self) -> None:
        delay = 0.02
        while not await self._probe():
            await asyncio.sleep(delay)
            delay = min(delay * 1.5, 0.5)

    async def _probe(self) -> bool:
        """Ask once whether it is ready."""
        try:
            async with asyncio.timeout(_PROBE_TIMEOUT):
                if self.definition.ready is None:
                    _, writer = await asyncio.open_connection(HOST, self.port)
                    writer.close()
                    return True
                url = f"http://{HOST}:{self.port}{self.definition.ready}"
                async with aiohttp.request("GET", url, allow_redirects=False) as answer:
                    self._probed = f"{self.definition.ready} answers {answer.status}"
                    return answer.status < 500
        except TimeoutError:
            self._probed = f"it does not answer within {_PROBE_TIMEOUT:g} s"
        except (OSError, aiohttp.ClientError):
            self._probed = f"nothing answers on its port {self.port}"
        return False

    def _is_ready(self) -> None:
        self._enter(Phase.READY)
        if not self.first.done():
            self.first.set_result(None)

    def _fail(self, failure: ProviderFailure) -> None:
        self.failure = failure
        self._say(str(failure).partition("\n")[0])
        self._enter(Phase.FAILED)
        if not self.first.done():
            self.first.set_result(None)

    def _enter(self, phase: Phase) -> None:
        self.phase = phase
        self._changed()

    def _environment(self) -> dict[str, str]:
        definition = self.definition
        own = {name: definition.fill(value, self.port) for name, value in definition.env.items()}
        return {**definition.session_env, "PORT": str(self.port), "HOST": HOST, **own, **definition.markers}

    def _line(self, stream: str, line: str) -> None:
        self._tail.add(line)
        self._sink(LogLine(self.definition.session_id, self.definition.name, stream, line))

    def _left_out(self, lines: int) -> None:
        self._say(f"{lines} lines were left out: it prints too much")

    def _say(self, line: str) -> None:
        self._sink(LogLine(self.definition.session_id, self.definition.name, "system", line))

    def _last_lines(self) -> str:
        return f" Its last lines:\n{self._tail}" if str(self._tail) else ""


def define(name: str, service: Mapping[str, Any], **surroundings: Any) -> Definition:
    """A definition from the machine config's entry, which is valid, and what the session adds."""
    return Definition(
        name=name,
        port=service.get("port", 0),
        path=service.get("path", "/"),
        ready=service.get("ready"),
        env=service.get("env", {}),
        **surroundings,
    )
