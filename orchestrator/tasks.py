"""Work that must come to its end although its caller is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import structlog

log = structlog.get_logger("tasks")
T = TypeVar("T")


async def to_the_end(work: Coroutine[Any, Any, T], *, name: str, on_cancel: Callable[[], None] | None = None) -> T:
    """Await `work`, in a task of its own, to its end; a cancellation meanwhile goes on when it is done.

    For final writes and for closing: what bounds the work is in the work. `on_cancel` is told of each cancellation,
    and may hurry it. When the caller is cancelled, what the work raised is logged.
    """
    task = asyncio.get_running_loop().create_task(work, name=name)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
            if on_cancel is not None:
                on_cancel()
    if cancelled is None:
        return task.result()
    if not task.cancelled() and (failed := task.exception()) is not None:
        log.info("work ended without effect", task=name, error=str(failed) or type(failed).__name__)
    raise cancelled
