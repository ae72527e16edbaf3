"""Several gateways on one port, each a process of its own (SO_REUSEPORT), and the process that looks after them.

The kernel spreads new connections over those that listen. A worker that ends is started again, with back-off; a signal
is passed on to all of them, and the supervisor ends when the last has. Whatever becomes of the supervisor, its workers
do not outlive it: the kernel kills them then (prctl(2), PR_SET_PDEATHSIG).

Each worker is a whole replica: it reads the event log itself, and has its own connections to the database.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic

import structlog

from gateway import siblings, waiting
from gateway.port import reserved
from gateway.settings import GatewaySettings
from orchestrator.database import backoff
from orchestrator.process import Signals

log = structlog.get_logger("gateway.supervisor")

_PR_SET_PDEATHSIG = 1
# Seconds that a worker must have run for its end to be the first one again.
_STABLE = 60.0
# Seconds until a worker is started again, at first (about) and at most.
_PAUSE = 0.5
_LONGEST_PAUSE = 10.0
# Seconds between two looks whether a worker listens.
_LOOK = 0.1
_WRONG_SETTINGS, _HURRIED = 2, 130


@dataclass(frozen=True, slots=True)
class Worker:
    """What a worker knows of its place: its number, its supervisor, and the folder where the workers meet."""

    number: int
    supervisor: int
    folder: Path

    @classmethod
    def parse(cls, text: str) -> Worker:
        """The inverse of `str`. Raises ValueError."""
        number, supervisor, folder = text.split(":", 2)
        return cls(int(number), int(supervisor), Path(folder))

    def __str__(self) -> str:
        return f"{self.number}:{self.supervisor}:{self.folder}"

    def begin(self) -> None:
        """Be killed when the supervisor ends, however it ends; say who we are in each line of the log."""
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        # It may have ended before the call.
        if os.getppid() != self.supervisor:
            sys.exit(1)
        structlog.contextvars.bind_contextvars(worker=self.number)


async def supervise(settings: GatewaySettings, signals: Signals, *, count: int) -> int:
    """Run `count` workers until asked to stop; the exit code. Raises SettingsError when the port cannot be had."""
    with reserved(settings) as port, tempfile.TemporaryDirectory(prefix="cluster-code-") as folder:
        return await _Supervisor(replace(settings, port=port), Path(folder), signals).run(count)


class _Supervisor:
    def __init__(self, settings: GatewaySettings, folder: Path, signals: Signals) -> None:
        self._settings = settings
        self._folder = folder
        self._signals = signals
        self._processes: dict[int, asyncio.subprocess.Process] = {}
        # How workers ended after the end was asked for, or for good.
        self._codes: list[int] = []

    async def run(self, count: int) -> int:
        self._signals.ready = True
        slots = [asyncio.create_task(self._keep(number), name=f"worker {number}") for number in range(1, count + 1)]
        lobby = asyncio.create_task(self._receive(), name="lobby")
        stopping = asyncio.create_task(self._signals.stopping.wait(), name="stopping")
        # What each signal that we get becomes.
        signals = [signal.SIGTERM, signal.SIGTERM, signal.SIGKILL]
        left = {*slots, lobby, stopping}
        while left & {*slots}:
            try:
                done, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
            except asyncio.CancelledError:
                # Another signal hurries; one more does not wait at all.
                log.warning("hurrying the workers", signal=signals[0].name)
                done = {stopping}
            for slot in done & {*slots}:
                slot.result()
            if stopping in done:
                lobby.cancel()
                self._send(signals.pop(0) if len(signals) > 1 else signals[0])
        for task in (lobby, stopping):
            task.cancel()
        await asyncio.wait({lobby, stopping})
        if not lobby.cancelled():
            lobby.result()
        return _worst(self._codes)

    async def _receive(self) -> None:
        """Answer at the port, in place of the workers, until the first of them listens."""
        async with waiting.answering(self._settings, reuse_port=True):
            while not siblings.numbers(self._folder):  # noqa: ASYNC110  A file in a folder wakes nobody.
                await asyncio.sleep(_LOOK)

    async def _keep(self, number: int) -> None:
        """Keep one worker running until the end is asked for."""
        failures, first = 0, True
        stopping = self._signals.stopping
        while not stopping.is_set():
            began = monotonic()
            code = await self._once(number)
            if stopping.is_set():
                self._codes.append(code)
                return
            if code == _WRONG_SETTINGS and first:
                # The others will say the same. Later on, what runs is worth more than what cannot be started again.
                self._codes.append(code)
                stopping.set()
                return
            first = False
            failures = failures + 1 if monotonic() - began < _STABLE else 1
            pause = backoff(failures, base=_PAUSE / 2, cap=_LONGEST_PAUSE)
            log.error("a worker has ended; it is started again", worker=number, code=code, pause=round(pause, 2))
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await stopping.wait()

    async def _once(self, number: int) -> int:
        """Run a worker until it ends; its exit code, or the negative number of the signal that killed it."""
        siblings.path(self._folder, number).unlink(missing_ok=True)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "gateway", "--worker", str(Worker(number, os.getpid(), self._folder)),
            env={**os.environ, "PORT": str(self._settings.port)}, stdin=asyncio.subprocess.DEVNULL,
            # A Ctrl-C at the terminal is ours to pass on.
            start_new_session=True,
        )  # fmt: skip
        log.info("worker started", worker=number, pid=process.pid)
        self._processes[number] = process
        if self._signals.stopping.is_set():
            process.terminate()
        code = await process.wait()
        del self._processes[number]
        log.info("worker ended", worker=number, pid=process.pid, code=code)
        return code

    def _send(self, number: signal.Signals) -> None:
        for process in self._processes.values():
            with suppress(ProcessLookupError):
                process.send_signal(number)


def _worst(codes: list[int]) -> int:
    """The supervisor's exit code, from its workers'."""
    if _WRONG_SETTINGS in codes:
        return _WRONG_SETTINGS
    # A worker that was told to end before it listened for signals was ended by the first one.
    failed = [code for code in codes if code not in (0, -signal.SIGTERM)]
    if not failed:
        return 0
    return _HURRIED if set(failed) <= {_HURRIED, -signal.SIGKILL} else 1
