from __future__ import annotations

import asyncio
import gc
import weakref

import pytest

from gateway import garbage


class Ring:
    """Refers to itself: only the collector ends it."""

    def __init__(self) -> None:
        self.itself = self


def new_objects(number: int) -> list[list[int]]:
    return [[] for _ in range(number)]


async def test_what_stays_is_left_alone_and_young_rings_are_found() -> None:
    thresholds, callbacks = gc.get_threshold(), len(gc.callbacks)
    with garbage.settled():
        before = gc.get_freeze_count()
        kept = new_objects(200_000)
        assert gc.get_freeze_count() - before > 100_000
        assert sum(gc.get_count()) < 100_000
        ring = weakref.ref(Ring())
        more = new_objects(200_000)
        assert ring() is None
        assert len(kept) == len(more)
    assert gc.get_freeze_count() == 0
    assert gc.get_threshold() == thresholds
    assert len(gc.callbacks) == callbacks


async def test_old_rings_are_found_once_they_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(garbage, "_LOOK", 1)
    monkeypatch.setattr(garbage, "_SLACK", -1_000_000_000)
    with garbage.settled():
        ring = Ring()
        seen = weakref.ref(ring)
        kept = new_objects(100_000)
        del ring
        kept += new_objects(100_000)
        await asyncio.sleep(0)
        assert seen() is None
        assert gc.get_freeze_count() > len(kept)
