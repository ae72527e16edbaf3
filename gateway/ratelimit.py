"""How many requests an address or a user may make: sliding windows of the library `limits`, in this process."""

from __future__ import annotations

import ipaddress
import time
from dataclasses import dataclass
from math import ceil

import limits
from aiohttp import web
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter

from gateway.problems import Problem
from gateway.settings import GatewaySettings
from orchestrator.errors import SettingsError

# Seconds between looks for counters whose window has passed.
_SWEEP_INTERVAL = 60.0


class SweptMemory(MemoryStorage):
    """The library's memory storage, which starts a task on every hit that walks over all keys; this one walks rarely.

    One event loop is the only caller and nothing awaits in between, so that the library's locks are spared too.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sweep_at = time.time() + _SWEEP_INTERVAL

    async def incr(self, key: str, expiry: float, amount: int = 1) -> int:
        """Add `amount` to the counter `key`, which expires `expiry` seconds after it began; returns the sum."""
        now = time.time()
        if now >= self._sweep_at:
            self._sweep(now)
        if self.expirations.get(key, 0) <= now:
            self.storage[key] = 0
            self.expirations[key] = now + expiry
        self.storage[key] += amount
        return self.storage[key]

    async def decr(self, key: str, amount: int = 1) -> int:
        """Take `amount` from the counter `key`, not below 0; returns what is left."""
        self.storage[key] = max(self.storage[key] - amount, 0)
        return self.storage[key]

    def _sweep(self, now: float) -> None:
        self._sweep_at = now + _SWEEP_INTERVAL
        for key in [key for key, end in self.expirations.items() if end <= now]:
            del self.expirations[key]
            self.storage.pop(key, None)


@dataclass(frozen=True, slots=True)
class Limit:
    """One limit: what it counts (`address`, `user`, `login`), and how many in how many seconds. None: no limit."""

    name: str
    item: limits.RateLimitItem | None


class Limits:
    """All the limits of one gateway."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._windows = SlidingWindowCounterRateLimiter(SweptMemory())
        self.address = _parse("address", "RATE_LIMIT_ADDRESS", settings.rate_limit_address)
        self.user = _parse("user", "RATE_LIMIT_USER", settings.rate_limit_user)
        self.login = _parse("login", "RATE_LIMIT_LOGIN", settings.rate_limit_login)

    async def take(self, limit: Limit, who: str) -> dict[str, str]:
        """Count one request of `who`. Returns the `RateLimit-*` headers; raises Problem (429) when there were too many.

        A refused request is not counted, so that a client which keeps trying is let in as soon as the window allows.
        """
        if limit.item is None:
            return {}
        taken = await self._windows.hit(limit.item, limit.name, who)
        stats = await self._windows.get_window_stats(limit.item, limit.name, who)
        wait = str(max(1, ceil(stats.reset_time - time.time())))
        headers = {
            "RateLimit-Limit": str(limit.item.amount),
            "RateLimit-Remaining": str(stats.remaining if taken else 0),
            "RateLimit-Reset": wait,
        }
        if not taken:
            raise Problem(
                429,
                f"Too many requests: the limit is {limit.item}. Try again in {wait} s.",
                headers={**headers, "Retry-After": wait},
            )
        return headers


LIMITS = web.AppKey("limits", Limits)


def _parse(name: str, variable: str, text: str) -> Limit:
    if not text:
        return Limit(name, None)
    try:
        return Limit(name, limits.parse(text))
    except ValueError as error:
        raise SettingsError(f"{variable}: {text!r} is no rate such as 1200/minute.") from error


def client_address(request: web.Request, trusted_proxies: int) -> str:
    """The address of the client, as the outermost trusted proxy saw it.

    Each proxy appends the address it was called from to X-Forwarded-For, so that only the last `trusted_proxies`
    entries can be believed; without enough of them the header is not.
    """
    remote = request.remote or "unknown"
    if trusted_proxies <= 0:
        return remote
    hops = [hop.strip() for line in request.headers.getall("X-Forwarded-For", ()) for hop in line.split(",")]
    if len(hops) < trusted_proxies:
        return remote
    try:
        return str(ipaddress.ip_address(hops[-trusted_proxies]))
    except ValueError:
        return remote


def limited_address(address: str) -> str:
    """What an address is counted as: an IPv6 client has a whole /64 to call from (RFC 6177)."""
    if ":" not in address:
        return address
    try:
        return str(ipaddress.IPv6Network((address.split("%")[0], 64), strict=False))
    except ValueError:
        return address
