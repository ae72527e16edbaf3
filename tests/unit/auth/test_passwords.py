from __future__ import annotations

import asyncio
import threading
import time

import pytest
from argon2 import PasswordHasher

from auth import passwords
from auth.errors import Unacceptable


async def test_a_password_matches_its_own_hash_only() -> None:
    password_hash = await passwords.hash("correct horse")
    assert password_hash.startswith("$argon2id$v=19$m=47104,t=2,p=1$")
    assert password_hash != await passwords.hash("correct horse")
    assert await passwords.verify("correct horse", password_hash)
    assert not await passwords.verify("correct horsf", password_hash)
    assert not await passwords.verify("correct horse", "no hash at all")


async def test_the_same_letters_from_another_keyboard_are_the_same_password() -> None:
    assert await passwords.verify("pa\u0308sswo\u0308rter", await passwords.hash("p\u00e4ssw\u00f6rter"))


@pytest.mark.parametrize("wrong", ["seven77", "", "x" * 1025, "null\x00null", "surrogate\ud800", "a\u0308" * 7])
async def test_what_is_no_password_is_refused_and_matches_nothing(wrong: str) -> None:
    with pytest.raises(Unacceptable) as caught:
        await passwords.hash(wrong)
    assert caught.value.field == "password"
    assert wrong == "" or wrong not in str(caught.value)
    assert not await passwords.verify(wrong, await passwords.hash("something else"))


@pytest.mark.parametrize("right", ["eight888", "x" * 1024, "\N{SNOWMAN}" * 8, " spaces  "])
def test_what_has_8_to_1024_characters_is_a_password(right: str) -> None:
    assert passwords.check(right) == right


async def test_nobodys_password_is_checked_at_the_cost_of_a_real_one() -> None:
    password_hash = await passwords.hash("correct horse")
    assert not await passwords.verify("correct horse", None)
    # argon2 itself takes the dummy for a hash made with today's parameters: it has the same work to do.
    assert not passwords.needs_rehash(passwords._NOBODYS_HASH)
    assert len(passwords._NOBODYS_HASH) == len(password_hash)


async def test_a_hash_with_older_parameters_is_to_be_made_anew() -> None:
    old = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1).hash("correct horse")
    assert passwords.needs_rehash(old)
    assert await passwords.verify("correct horse", old)
    assert not passwords.needs_rehash(await passwords.hash("correct horse"))


async def test_hashing_leaves_the_event_loop_free_and_uses_two_threads_at_most() -> None:
    longest = 0.0
    hashing = asyncio.gather(*(passwords.hash(f"password {number}") for number in range(6)))
    last = time.perf_counter()
    while not hashing.done():
        await asyncio.sleep(0.001)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    await hashing
    assert len([thread for thread in threading.enumerate() if thread.name.startswith("passwords")]) <= 2
    # One hash takes longer than this; six in a row on the loop would take much longer.
    assert longest < 0.25
