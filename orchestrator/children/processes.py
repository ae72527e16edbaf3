"""Processes: started through `launch`, found again by the markers in their environment, and ended, all of them.

A process group is not enough: a process leaves it with setsid(2). The environment is inherited whatever a process does,
but for one that empties it; such a one is found as long as it stays in the session (setsid(2) again) of a service that
we launched, also by the next start after a `kill -9` (`leaders`). One that does both escapes.
"""

from __future__ import annotations

import asyncio
import math
import os
import signal
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import structlog

from orchestrator.children import launch
from orchestrator.errors import ProviderUnavailable

log = structlog.get_logger("provider.local")

INSTANCE = "CLUSTER_CODE_INSTANCE"
SESSION = "CLUSTER_CODE_SESSION"
SERVICE = "CLUSTER_CODE_SERVICE"

# Seconds that SIGKILL may take: longer, and the process hangs in the kernel.
_KILL_DEADLINE = 10.0


@dataclass(frozen=True, slots=True)
class Limits:
    """What one process may use; None: no limit."""

    # Bytes of private writable memory.
    memory: int | None = None
    # Cores, rounded up to whole ones.
    cpu: float | None = None
    # Seconds of CPU time until the process is killed.
    cpu_seconds: int | None = None
    # Bytes of the largest file that it may write.
    file_bytes: int | None = None


async def spawn(
    argv: Sequence[str],
    *,
    cwd: Path,
    env: Mapping[str, str],
    stdout: int,
    stderr: int,
    limits: Limits | None = None,
    seed: int = 0,
) -> asyncio.subprocess.Process:
    """Start a program, given by its path, as the leader of a session of its own that dies with us.

    `seed` spreads processes that are limited to a few cores over all of them. Raises OSError, ValueError. Cancelling
    ends what was started.
    """
    return await asyncio.create_subprocess_exec(
        sys.executable, "-I", "-S", launch.__file__, f"parent={os.getpid()}", *_options(limits or Limits(), seed),
        "--", *argv,
        cwd=cwd, env=dict(env), stdin=asyncio.subprocess.DEVNULL, stdout=stdout, stderr=stderr, start_new_session=True,
    )  # fmt: skip


def _options(limits: Limits, seed: int) -> Iterator[str]:
    for name in ("memory", "cpu_seconds", "file_bytes"):
        if (value := getattr(limits, name)) is not None:
            yield f"{name}={value}"
    if limits.cpu is not None:
        cores = sorted(os.sched_getaffinity(0))
        wanted = math.ceil(limits.cpu)
        if wanted < len(cores):
            yield "cpus=" + ",".join(str(cores[(seed + number) % len(cores)]) for number in range(wanted))


@dataclass(frozen=True, slots=True)
class Selection:
    """Which processes: those that carry all of the markers, and those in the sessions of the leaders."""

    markers: Mapping[str, str]
    leaders: Collection[int] = ()

    def find(self) -> list[psutil.Process]:
        """Those of our own user that live now, ourselves excepted. Reads /proc, which blocks for milliseconds."""
        needles = {f"{name}={value}".encode() for name, value in self.markers.items()}
        found = []
        for pid in psutil.pids():
            if pid == os.getpid() or not self._matches(pid, needles):
                continue
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                # Once more: the number may have gone to another process in between. From here on, psutil watches that.
                if self._matches(pid, needles) and _lives(process):
                    found.append(process)
        return found

    def _matches(self, pid: int, needles: set[bytes]) -> bool:
        try:
            if Path(f"/proc/{pid}").stat().st_uid != os.geteuid():
                return False
            if self.leaders and os.getsid(pid) in self.leaders:
                return True
            # No markers mark nothing: every process carries all of none.
            return bool(needles) and needles <= set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
        except OSError:
            return False


async def end(selection: Selection, *, grace: float) -> int:
    """End all processes of a selection: SIGTERM, `grace` seconds, then SIGKILL until none is left. How many there were.

    Raises ProviderUnavailable when one does not end even so, which only the kernel can cause.
    """
    found = await asyncio.to_thread(selection.find)
    count = len(found)
    if found and grace > 0:
        _signal(found, signal.SIGTERM)
        await _gone(found, grace)
        found = await asyncio.to_thread(selection.find)
    deadline = time.monotonic() + _KILL_DEADLINE
    while found:
        if time.monotonic() > deadline:
            raise ProviderUnavailable(f"The process {found[0].pid} does not end, even when killed: see what holds it.")
        _signal(found, signal.SIGKILL)
        await _gone(found, 1.0)
        found = await asyncio.to_thread(selection.find)
    return count


def _signal(processes: list[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        try:
            process.send_signal(number)
            # A stopped process takes the signal only when it goes on.
            process.send_signal(signal.SIGCONT)
        except psutil.NoSuchProcess:
            continue
        except psutil.AccessDenied:
            log.warning("a process may not be ended", pid=process.pid)


async def _gone(processes: list[psutil.Process], timeout: float) -> None:
    """Return when all have ended, or after `timeout` seconds."""
    delay = 0.005
    deadline = time.monotonic() + timeout
    while any(_lives(process) for process in processes) and time.monotonic() < deadline:
        await asyncio.sleep(delay)
        delay = min(delay * 2, 0.1)


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def ending(returncode: int) -> str:
    """How a process ended, in words: `exited with code 1`, `was killed by SIGSEGV`."""
    if returncode >= 0:
        return f"exited with code {returncode}"
    try:
        return f"was killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"was killed by signal {-returncode}"
