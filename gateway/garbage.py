"""The garbage collector of a process whose objects mostly stay: connections, and the history's events.

A collection stops the loop while it looks at everything that it has not been told to leave alone: 0.1 to 0.4 s for a
full history. But what stays there ends by itself, without a collector. So objects are looked at twice while they are
young, in numbers that the loop can bear, and then left alone (`gc.freeze`). Rings of objects that die later than that
are not found; should they come to many, everything is looked at once more.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from contextlib import contextmanager

# New objects that make a collection of the youngest (some ms), and how many of those make one of the next generation.
_YOUNG = 10_000
_MIDDLE = 4
# Freezes between two looks at how many are left alone (which walks through them), and what is no growth yet.
_LOOK = 200
_SLACK = 500_000


@contextmanager
def settled() -> Iterator[None]:
    """Collect like that while the body runs. What there is at its beginning is left alone at once."""
    loop = asyncio.get_running_loop()
    thresholds = gc.get_threshold()
    freezes = known = 0

    def look_at_all() -> None:
        nonlocal known
        gc.unfreeze()
        gc.collect()
        gc.freeze()
        known = gc.get_freeze_count()

    def collected(phase: str, info: dict[str, int]) -> None:
        nonlocal freezes
        if phase != "stop" or info["generation"] != 1:
            return
        gc.freeze()
        freezes += 1
        if freezes % _LOOK == 0 and gc.get_freeze_count() > 2 * known + _SLACK:
            # Not from within a collection.
            loop.call_soon_threadsafe(look_at_all)

    look_at_all()
    gc.set_threshold(_YOUNG, _MIDDLE, thresholds[2])
    gc.callbacks.append(collected)
    try:
        yield
    finally:
        gc.callbacks.remove(collected)
        gc.set_threshold(*thresholds)
        gc.unfreeze()
