"""How many requests an address or a user may make, in this process.

Rates are written and parsed as the library `limits` has them, and counted by its sliding window counter. The counting
is done here: the library's own storage starts a task on every hit, which walks over all keys, and asking it for what
the headers say takes a fifth of the time of a whole request.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from time import monotonic

import limits
from aiohttp import web

from gateway.problems import Problem
from gateway.settings import GatewaySettings
from orchestrator.errors import SettingsError

# Seconds between looks for counters whose window has passed.
_SWEEP_INTERVAL = 60.0


@dataclass(slots=True)
class _Counter:
    """One window's requests, and those of the window before it. `number` counts the windows since the clock began."""

    number: int
    count: int = 0
    before: int = 0


class Limit:
    """One rate, for everybody who is counted by it."""

    def __init__(self, text: str, *, variable: str, clock: Callable[[], float] = monotonic) -> None:
        """`text` is a rate such as `1200/minute`; `off` or empty: no limit. Raises SettingsError, naming `variable`."""
        self._rate = _parse(text, variable)
        self._seconds = self._rate.get_expiry() if self._rate else 1
        self._amount = str(self._rate.amount) if self._rate else ""
        self._clock = clock
        self._counters: dict[str, _Counter] = {}
        self._sweep_at = clock() + _SWEEP_INTERVAL

    def take(self, who: str) -> dict[str, str]:
        """Count one request of `who`. Returns the `RateLimit-*` headers; raises Problem (429) when there were too many.

        A refused request is not counted, so that a client which keeps trying is let in as soon as the window allows.
        """
        if self._rate is None:
            return {}
        now = self._clock()
        if now >= self._sweep_at:
            self._sweep(now)
        number, passed = divmod(now, self._seconds)
        counter = self._counter(who, int(number))
        # Requests of the window before count for the share of it that the sliding window still covers.
        used = counter.count + counter.before * (1 - passed / self._seconds)
        left = self._rate.amount - int(used)
        wait = str(max(1, ceil(self._seconds - passed)))
        if left < 1:
            raise Problem(
                429,
                f"Too many requests: the limit is {self._rate}. Try again in {wait} s.",
                headers={**self._headers(0, wait), "Retry-After": wait},
            )
        counter.count += 1
        return self._headers(left - 1, wait)

    def _headers(self, remaining: int, wait: str) -> dict[str, str]:
        return {"RateLimit-Limit": self._amount, "RateLimit-Remaining": str(remaining), "RateLimit-Reset": wait}

    def _counter(self, who: str, number: int) -> _Counter:
        counter = self._counters.get(who)
        if counter is None:
            counter = self._counters[who] = _Counter(number)
        elif counter.number != number:
            counter.before = counter.count if counter.number == number - 1 else 0
            counter.number, counter.count = number, 0
        return counter

    def _sweep(self, now: float) -> None:
        self._sweep_at = now + _SWEEP_INTERVAL
        oldest = int(now // self._seconds) - 1
        self._counters = {who: counter for who, counter in self._counters.items() if counter.number >= oldest}

    def __len__(self) -> int:
        """How many are counted."""
        return len(self._counters)


class Limits:
    """All the limits of one gateway."""

    def __init__(self, settings: GatewaySettings) -> None:
        self.address = Limit(settings.rate_limit_address, variable="RATE_LIMIT_ADDRESS")
        self.user = Limit(settings.rate_limit_user, variable="RATE_LIMIT_USER")
        self.login = Limit(settings.rate_limit_login, variable="RATE_LIMIT_LOGIN")
        self.hooks = Limit(settings.rate_limit_hooks, variable="RATE_LIMIT_HOOKS")


LIMITS = web.AppKey("limits", Limits)


def _parse(text: str, variable: str) -> limits.RateLimitItem | None:
    # A variable that is empty counts as not set, so that only a word can say it.
    if text in ("", "off"):
        return None
    try:
        return limits.parse(text)
    except ValueError as error:
        raise SettingsError(f"{variable}: {text!r} is no rate such as 1200/minute, nor off.") from error


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
