"""The public keys of the outside OIDC issuer (RFC 7517): fetched when first needed, kept, renewed in the background.

Which keys are usable, and what a key is, is the business of the `parse` given (`auth.tokens`). This is only the cache.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Generic, TypeVar

import structlog

from auth.errors import IssuerUnavailable, Unauthenticated

log = structlog.get_logger("jwks")

Key = TypeVar("Key")
FetchJson = Callable[[str], Awaitable[Mapping[str, Any]]]

# Seconds. After this the keys are fetched anew, beside the request that notices: the old ones answer it.
REFRESH_AFTER = 3600.0
# Seconds between fetches for the sake of a key id that we do not know: anybody can make such ids up.
UNKNOWN_KEY_INTERVAL = 30.0
# Seconds until a fetch that failed is tried again.
RETRY_INTERVAL = 5.0
# Seconds that one fetch may take: requests wait for it, and they hold a database connection.
FETCH_DEADLINE = 5.0


class KeyCache(Generic[Key]):
    """The keys published at `url`, by their id (`kid`). Stale keys serve while the issuer does not answer."""

    def __init__(
        self,
        url: str,
        fetch_json: FetchJson,
        parse: Callable[[Mapping[str, Any]], Mapping[str, Key]],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._url = url
        self._fetch_json = fetch_json
        self._parse = parse
        self._clock = clock
        self._keys: Mapping[str, Key] = {}
        self._fetched_at = 0.0
        self._next_fetch_at = float("-inf")
        self._is_failing = False
        self._fetching = asyncio.Lock()
        self._background: asyncio.Task[None] | None = None

    async def find(self, kid: str | None) -> Key:
        """The key of that id; without an id the only key, when there is just one.

        Fetches when it must, together with whoever else waits for the same. Raises Unauthenticated when the issuer does
        not publish such a key, IssuerUnavailable when that cannot be told because it does not answer.
        """
        key = self._choose(kid)
        if key is not None:
            self._renew_in_background()
            return key
        await self._fetch()
        key = self._choose(kid)
        if key is not None:
            return key
        if self._is_failing:
            raise IssuerUnavailable("The keys of the token's issuer cannot be fetched now: try again in some seconds.")
        if kid is None:
            raise Unauthenticated("The token does not say which of its issuer's keys (kid) signed it.")
        raise Unauthenticated("The token is signed by a key that its issuer does not publish.")

    async def close(self) -> None:
        """End the fetch in the background, if there is one."""
        if self._background is not None:
            self._background.cancel()
            await asyncio.wait([self._background])

    def _choose(self, kid: str | None) -> Key | None:
        if kid is not None:
            return self._keys.get(kid)
        return next(iter(self._keys.values())) if len(self._keys) == 1 else None

    def _renew_in_background(self) -> None:
        now = self._clock()
        if now < self._fetched_at + REFRESH_AFTER or now < self._next_fetch_at:
            return
        if self._background is None or self._background.done():
            self._background = asyncio.create_task(self._fetch(), name="oidc keys")

    async def _fetch(self) -> None:
        """Fetch the keys, unless that was tried just now. Never raises for what the issuer does."""
        async with self._fetching:
            if self._clock() < self._next_fetch_at:
                return
            # Stands unless the fetch ends well, so that a request that is cancelled meanwhile proves nothing.
            self._is_failing = True
            try:
                async with asyncio.timeout(FETCH_DEADLINE):
                    document = await self._fetch_json(self._url)
                keys = self._parse(document)
            except Exception as error:  # noqa: BLE001  The fetcher is the caller's and the document a stranger's.
                log.warning("the issuer's keys cannot be had", url=self._url, error=repr(error))
                self._next_fetch_at = self._clock() + RETRY_INTERVAL
                return
            self._keys = keys
            self._is_failing = False
            self._fetched_at = self._clock()
            self._next_fetch_at = self._fetched_at + UNKNOWN_KEY_INTERVAL
