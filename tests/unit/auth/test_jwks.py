from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from auth.errors import IssuerUnavailable, Unauthenticated
from auth.jwks import KeyCache


class Issuer:
    """Publishes keys, counts who asks, and may be away, slow or mad."""

    def __init__(self) -> None:
        self.keys: dict[str, str] = {"a": "key a", "b": "key b"}
        self.fetches = 0
        self.error: Exception | None = None
        self.answers = asyncio.Event()
        self.answers.set()
        self.now = 1000.0
        self.cache: KeyCache[str] = KeyCache("https://issuer/keys", self.fetch, self.parse, clock=lambda: self.now)

    async def fetch(self, url: str) -> Mapping[str, Any]:
        assert url == "https://issuer/keys"
        self.fetches += 1
        await self.answers.wait()
        if self.error is not None:
            raise self.error
        return dict(self.keys)

    @staticmethod
    def parse(document: Mapping[str, Any]) -> Mapping[str, str]:
        if not document:
            raise ValueError("no keys")
        return document


@pytest.fixture
def issuer() -> Issuer:
    return Issuer()


async def test_keys_are_fetched_once_for_all_who_wait(issuer: Issuer) -> None:
    issuer.answers.clear()
    finding = [asyncio.create_task(issuer.cache.find(kid)) for kid in "abab"]
    await asyncio.sleep(0)
    issuer.answers.set()
    assert await asyncio.gather(*finding) == ["key a", "key b", "key a", "key b"]
    assert issuer.fetches == 1


async def test_an_unknown_key_is_asked_for_every_30_seconds_at_most(issuer: Issuer) -> None:
    assert await issuer.cache.find("a") == "key a"
    issuer.keys["c"] = "key c"
    issuer.now += 29
    for _ in range(5):
        with pytest.raises(Unauthenticated, match="does not publish"):
            await issuer.cache.find("c")
    assert issuer.fetches == 1
    issuer.now += 1
    assert await issuer.cache.find("c") == "key c"
    with pytest.raises(Unauthenticated):
        await issuer.cache.find("made up")
    assert issuer.fetches == 2


async def test_without_an_id_only_an_only_key_is_found(issuer: Issuer) -> None:
    with pytest.raises(Unauthenticated, match="kid"):
        await issuer.cache.find(None)
    del issuer.keys["b"]
    issuer.now += 30
    with pytest.raises(Unauthenticated, match="does not publish"):
        await issuer.cache.find("made up")
    assert await issuer.cache.find(None) == "key a"


async def test_an_issuer_that_was_never_reached_is_unavailable_and_asked_again_soon(issuer: Issuer) -> None:
    issuer.error = OSError("connection refused")
    for _ in range(3):
        with pytest.raises(IssuerUnavailable):
            await issuer.cache.find("a")
    assert issuer.fetches == 1
    issuer.error = None
    issuer.now += 5
    assert await issuer.cache.find("a") == "key a"
    assert issuer.fetches == 2


async def test_an_answer_that_holds_no_key_is_no_answer(issuer: Issuer) -> None:
    issuer.keys.clear()
    with pytest.raises(IssuerUnavailable):
        await issuer.cache.find("a")


async def renewed(issuer: Issuer) -> None:
    task = issuer.cache._background
    assert task is not None
    assert task.get_name() == "oidc keys"
    await task


async def test_after_an_hour_the_old_keys_answer_while_new_ones_are_fetched(issuer: Issuer) -> None:
    await issuer.cache.find("a")
    issuer.keys = {"c": "key c"}
    issuer.now += 3599
    assert await issuer.cache.find("a") == "key a"
    assert issuer.fetches == 1
    issuer.now += 1
    issuer.answers.clear()
    for _ in range(3):
        assert await issuer.cache.find("a") == "key a"
    issuer.answers.set()
    await renewed(issuer)
    assert issuer.fetches == 2
    with pytest.raises(Unauthenticated):
        await issuer.cache.find("a")
    assert await issuer.cache.find("c") == "key c"


async def test_stale_keys_serve_while_the_issuer_is_away(issuer: Issuer) -> None:
    await issuer.cache.find("a")
    issuer.error = TimeoutError()
    issuer.now += 7200
    assert await issuer.cache.find("a") == "key a"
    await renewed(issuer)
    assert await issuer.cache.find("a") == "key a"
    with pytest.raises(IssuerUnavailable):
        await issuer.cache.find("c")
    assert issuer.fetches == 2
    issuer.now += 5
    issuer.error = None
    assert await issuer.cache.find("b") == "key b"
    await renewed(issuer)
    assert issuer.fetches == 3


async def test_a_request_that_goes_away_spoils_nothing_for_the_others(issuer: Issuer) -> None:
    issuer.answers.clear()
    first, second = (asyncio.create_task(issuer.cache.find("a")) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    issuer.answers.set()
    assert await second == "key a"
    assert first.cancelled()


async def test_close_ends_the_fetch_in_the_background(issuer: Issuer) -> None:
    await issuer.cache.close()
    await issuer.cache.find("a")
    issuer.answers.clear()
    issuer.now += 3600
    await issuer.cache.find("a")
    await issuer.cache.close()
    assert issuer.cache._background is not None
    assert issuer.cache._background.cancelled()
