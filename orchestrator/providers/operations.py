"""One thing at a time with a session, to its end.

What a call does runs in a task of its own, so that a caller who is cancelled never leaves a session half done, and so
that nobody else begins before it is done. A start whose caller is cancelled is cancelled too, once, and undoes itself;
a stop and a delete go on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import structlog

from orchestrator.errors import ProviderUnavailable

log = structlog.get_logger("providers")

T = TypeVar("T")


class Operations:
    """The operations that are under way, at most one for each session."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._undone: set[asyncio.Task[Any]] = set()
        # Those whose failure somebody will be told.
        self._awaited: set[asyncio.Task[Any]] = set()
        self._closed = False
        self._locks: WeakValueDictionary[int, asyncio.Lock] = WeakValueDictionary()

    async def run(self, name: str, session_id: int, work: Callable[[], Awaitable[T]], *, undo: bool = False) -> T:
        """Do `work` when nothing else is done with the session; what it returns or raises.

        Cancelling leaves it to go on in the background, unless `undo`: then it is cancelled, and waited for.
        """
        task = self.begin(name, session_id, work, undo=undo)
        self._awaited.add(task)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            self._awaited.discard(task)
            if undo:
                _cancel(task)
                await asyncio.wait({task})
            caller = asyncio.current_task()
            if caller is not None and not caller.cancelling():
                raise ProviderUnavailable("The provider is being closed.") from None
            raise

    def begin(
        self, name: str, session_id: int, work: Callable[[], Awaitable[T]], *, undo: bool = False
    ) -> asyncio.Task[T]:
        """The same in the background; a failure is logged."""
        if self._closed:
            raise ProviderUnavailable("The provider is closed.")
        task = asyncio.create_task(self._alone(session_id, work), name=f"{name} {session_id}")
        self._tasks.add(task)
        if undo:
            self._undone.add(task)
        task.add_done_callback(self._done)
        return task

    async def close(self) -> None:
        """Cancel what undoes itself, and wait for the rest."""
        self._closed = True
        while self._tasks:
            for task in self._undone:
                _cancel(task)
            await asyncio.wait(self._tasks)

    async def _alone(self, session_id: int, work: Callable[[], Awaitable[T]]) -> T:
        lock = self._locks.get(session_id)
        if lock is None:
            lock = self._locks[session_id] = asyncio.Lock()
        async with lock:
            return await work()

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        self._undone.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and task not in self._awaited:
            log.warning("an operation failed", operation=task.get_name(), error=str(error))
        self._awaited.discard(task)


def _cancel(task: asyncio.Task[Any]) -> None:
    """Once only: a second time would hit the undoing."""
    if not task.cancelling():
        task.cancel()


async def finish(work: Coroutine[Any, Any, T], *, name: str) -> T:
    """Do `work` to its end even when cancelled meanwhile; the cancellation is raised after it."""
    task = asyncio.create_task(work, name=name)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise


async def in_thread(work: Callable[[], T]) -> T:
    """Do what blocks in a thread. A thread cannot be cancelled, so that it is always waited for."""
    return await finish(asyncio.to_thread(work), name="provider thread")
