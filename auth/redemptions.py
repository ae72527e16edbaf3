"""Short tokens that are shown at the same moment are spent together: after a gateway's end, thousands come at once."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from auth.errors import Unauthenticated

if TYPE_CHECKING:
    import asyncpg

    from auth.claims import ShortClaims
    from auth.tokens import ShortGrant, Tokens

# Tokens of one statement.
_MOST = 256


class Redemptions:
    """Spends short tokens in one statement at a time: who comes while one is under way shares the next."""

    def __init__(self, pool: asyncpg.Pool, tokens: Tokens, timeout: float) -> None:
        """`timeout`: seconds to wait for a free connection of the pool."""
        self._pool = pool
        self._tokens = tokens
        self._timeout = timeout
        self._waiting: list[tuple[ShortClaims, asyncio.Future[ShortGrant]]] = []
        self._task: asyncio.Task[None] | None = None

    async def redeem(self, token: str) -> ShortGrant:
        """As `Tokens.redeem_short`; also raises what the pool and the database raise.

        Cancelling leaves open whether the token is spent.
        """
        short = self._tokens.read_short(token)
        answer = asyncio.get_running_loop().create_future()
        self._waiting.append((short, answer))
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="redemptions")
        grant: ShortGrant = await answer
        return grant

    async def _run(self) -> None:
        try:
            while self._waiting:
                batch, self._waiting = self._waiting[:_MOST], self._waiting[_MOST:]
                await self._spend(batch)
        finally:
            self._task = None

    async def _spend(self, batch: list[tuple[ShortClaims, asyncio.Future[ShortGrant]]]) -> None:
        try:
            async with self._pool.acquire(timeout=self._timeout) as sql:
                answers = await self._tokens.redeem_many(sql, [short for short, _ in batch])
        except Exception as error:  # noqa: BLE001  It is told to everybody who waits for it.
            for _, waiting in batch:
                if not waiting.done():
                    waiting.set_exception(error)
            return
        for (_, waiting), answer in zip(batch, answers, strict=True):
            if waiting.done():
                continue
            if isinstance(answer, Unauthenticated):
                waiting.set_exception(answer)
            else:
                waiting.set_result(answer)
