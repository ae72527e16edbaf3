from __future__ import annotations

import pytest
from aiohttp.test_utils import make_mocked_request
from limits.aio.strategies import SlidingWindowCounterRateLimiter

from gateway import ratelimit
from gateway.problems import Problem
from gateway.ratelimit import Limits, SweptMemory, client_address, limited_address
from gateway.settings import GatewaySettings
from orchestrator.errors import SettingsError


async def test_requests_above_the_limit_are_refused_until_the_window_has_moved_on() -> None:
    limits = Limits(GatewaySettings(rate_limit_address="3/hour"))
    remaining = [(await limits.take(limits.address, "1.2.3.4"))["RateLimit-Remaining"] for _ in range(3)]
    assert remaining == ["2", "1", "0"]
    with pytest.raises(Problem) as refusal:
        await limits.take(limits.address, "1.2.3.4")
    assert refusal.value.status == 429
    assert 0 < int(refusal.value.headers["Retry-After"]) <= 3600
    assert refusal.value.headers["RateLimit-Limit"] == "3"
    assert refusal.value.headers["RateLimit-Remaining"] == "0"


async def test_each_who_and_each_limit_is_counted_alone() -> None:
    limits = Limits(GatewaySettings(rate_limit_address="1/hour", rate_limit_login="1/hour"))
    await limits.take(limits.address, "a")
    await limits.take(limits.address, "b")
    await limits.take(limits.login, "a")
    with pytest.raises(Problem):
        await limits.take(limits.login, "a")


async def test_an_empty_limit_is_none() -> None:
    limits = Limits(GatewaySettings(rate_limit_user=""))
    assert await limits.take(limits.user, "1") == {}


@pytest.mark.parametrize("rate", ["many", "10", "10/fortnight", "-1/minute"])
def test_a_rate_that_cannot_be_read_names_its_variable(rate: str) -> None:
    with pytest.raises(SettingsError, match="RATE_LIMIT_LOGIN"):
        Limits(GatewaySettings(rate_limit_login=rate))


async def test_counters_whose_time_has_passed_are_swept(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = SweptMemory()
    now = ratelimit.time.time()
    await storage.incr("old", 10)
    monkeypatch.setattr(ratelimit.time, "time", lambda: now + 61)
    await storage.incr("new", 10)
    assert set(storage.storage) == {"new"}
    monkeypatch.setattr(ratelimit.time, "time", lambda: now + 80)
    assert await storage.incr("new", 10) == 1
    assert await storage.decr("new", 5) == 0


async def test_the_storage_fits_the_strategy_of_the_library() -> None:
    windows = SlidingWindowCounterRateLimiter(SweptMemory())
    item = ratelimit.limits.parse("2/minute")
    assert [await windows.hit(item, "x") for _ in range(3)] == [True, True, False]


@pytest.mark.parametrize(
    ("forwarded", "proxies", "expected"),
    [
        (["1.1.1.1"], 0, "10.0.0.9"),
        (["1.1.1.1"], 1, "1.1.1.1"),
        (["6.6.6.6, 1.1.1.1"], 1, "1.1.1.1"),
        (["6.6.6.6, 1.1.1.1, 2.2.2.2"], 2, "1.1.1.1"),
        (["6.6.6.6", "1.1.1.1"], 1, "1.1.1.1"),
        (["1.1.1.1"], 2, "10.0.0.9"),
        ([], 1, "10.0.0.9"),
        (["evil"], 1, "10.0.0.9"),
        (["2001:DB8::1"], 1, "2001:db8::1"),
    ],
)
def test_only_what_trusted_proxies_appended_is_believed(forwarded: list[str], proxies: int, expected: str) -> None:
    request = make_mocked_request("GET", "/", headers=[("X-Forwarded-For", hop) for hop in forwarded])
    request = request.clone(remote="10.0.0.9")
    assert client_address(request, proxies) == expected


@pytest.mark.parametrize(
    ("address", "counted"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("unknown", "unknown"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("not:an:address", "not:an:address"),
    ],
)
def test_an_ipv6_client_is_its_network(address: str, counted: str) -> None:
    assert limited_address(address) == counted
