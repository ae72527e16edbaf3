"""A process of ours: how it begins, waits for what is away, takes signals and ends.

The first signal asks for the end: work under way is brought to its end within its grace. Another one hurries. Exit
codes: 0, it was asked to end; 1, something that it cannot do without has ended, which is logged; 2, a setting is
missing or wrong, which one line on stderr says; 130, it was hurried.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import structlog
import uvloop

from orchestrator import log_setup
from orchestrator.database import UNAVAILABLE, Pool, backoff, open_pool, require_schema
from orchestrator.errors import SchemaOutdated, SettingsError, Unreachable
from orchestrator.settings import DatabaseSettings, environment

if TYPE_CHECKING:
    from environs import Env

log = structlog.get_logger("process")

T = TypeVar("T")

# Seconds that connections of the pool get to be given back at the end.
_POOL_DEADLINE = 2.0
# Seconds between two attempts to reach what is away at the start, at most.
_PATIENCE = 5.0
_HURRIED = 130
_AWAY: tuple[type[BaseException], ...] = (Unreachable, *UNAVAILABLE)


class Signals:
    """The first signal asks for the end (`stopping`); before the start is done, and later ones, cancel the task."""

    def __init__(self, task: asyncio.Task[Any]) -> None:
        self.stopping = asyncio.Event()
        # The start is done: there is something to bring to its end.
        self.ready = False
        self._task = task

    @classmethod
    def taken(cls) -> Signals:
        """Takes the process's signals from now on, for the current task. Call it in the main thread."""
        task = asyncio.current_task()
        assert task is not None  # noqa: S101  For mypy: a coroutine runs in a task.
        signals = cls(task)
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, signals, number)
        return signals

    def __call__(self, number: signal.Signals) -> None:
        """Take one signal."""
        if self.ready and not self.stopping.is_set():
            log.info("ending; another signal hurries", signal=number.name)
            self.stopping.set()
        else:
            self._task.cancel()


# What a process does until it is asked to stop; it sets `signals.ready`. The exit code.
Work: TypeAlias = "Callable[[Env, Signals], Coroutine[Any, Any, int]]"


def run(name: str, work: Work) -> int:
    """Set up the logs, run `work` in an event loop, and return the exit code. `name` begins a wrong setting's line.

    A signal before the start is done ends it at once, with 0: there is nothing to lose yet.
    """
    env = environment()

    async def main() -> int:
        signals = Signals.taken()
        try:
            return await work(env, signals)
        except asyncio.CancelledError:
            return _HURRIED if signals.ready else 0

    try:
        log_setup.configure(env)
        code = uvloop.run(main())
        # All is done: a signal that comes now changes nothing about how it ended.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        return code
    except (SettingsError, SchemaOutdated) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except Exception:
        log.critical("the process has to end", exc_info=True)
        return 1


async def patiently(what: str, opened: Callable[[], Awaitable[T]]) -> T:
    """What `opened` returns, however long what it reaches for is away.

    Raises at once what waiting does not help: SettingsError, SchemaOutdated.
    """
    failures = 0
    while True:
        try:
            return await opened()
        except _AWAY as error:
            failures += 1
            log.warning("waiting at the start", what=what, error=str(error) or type(error).__name__, failures=failures)
            await asyncio.sleep(backoff(failures, cap=_PATIENCE))


@asynccontextmanager
async def pool(settings: DatabaseSettings, *, name: str) -> AsyncIterator[Pool]:
    """A pool on a database whose schema is current, once it answers. Raises SettingsError, SchemaOutdated."""
    opened = await patiently("database", lambda: open_pool(settings, name=name))
    try:
        await patiently("schema", lambda: require_schema(opened))
        yield opened
    finally:
        await close_pool(opened)


async def close_pool(opened: Pool) -> None:
    """Close it; connections that are not given back soon are cut."""
    try:
        async with asyncio.timeout(_POOL_DEADLINE):
            await opened.close()
    except TimeoutError:
        opened.terminate()


@asynccontextmanager
async def running(work: Coroutine[Any, Any, None], name: str) -> AsyncIterator[asyncio.Task[None]]:
    """`work` as a task, cancelled and waited for at the end; being cancelled meanwhile cancels it once more."""
    task = asyncio.create_task(work, name=name)
    try:
        yield task
    finally:
        hurried = None
        while not task.done():
            task.cancel()
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError as error:
                hurried = error
        if hurried:
            raise hurried


async def until_stopped(signals: Signals, *parts: Awaitable[Any]) -> None:
    """The start is done: return when asked to stop; raise when one of the parts ends, which none does by itself.

    The parts are their makers' to end; of those that are no tasks, only the waiting ends with this.
    """
    asked = asyncio.create_task(signals.stopping.wait(), name="stopping")
    futures = [asyncio.ensure_future(part) for part in parts]
    signals.ready = True
    try:
        done, _ = await asyncio.wait([asked, *futures], return_when=asyncio.FIRST_COMPLETED)
        for ended in done - {asked}:
            ended.result()
            raise RuntimeError(f"{ended} has ended")
    finally:
        asked.cancel()
        for part, future in zip(parts, futures, strict=True):
            if future is not part:
                future.cancel()
