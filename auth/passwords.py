"""Passwords: argon2id, computed off the event loop by a few threads, so that sign-ins cannot take all memory and cores.

Hold no database connection while one of these is awaited: a hash takes some 50 ms of a core, and may wait for its turn.
Cancelling abandons the wait; the thread ends its computation, whose result is dropped.
"""

from __future__ import annotations

import asyncio
import unicodedata
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

from auth.errors import Unacceptable

SHORTEST = 8
# Characters. Enough for any pass phrase, and too little to make hashing slow.
LONGEST = 1024

# OWASP Password Storage Cheat Sheet: argon2id with 46 MiB and one lane, here with a second pass.
_hasher = PasswordHasher(time_cost=2, memory_cost=46 * 1024, parallelism=1, hash_len=32, salt_len=16)
# Two at a time: each takes a core and 46 MiB. Threads start with the first password.
_threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="passwords")


def _nobodys_hash() -> str:
    """A hash with the parameters of ours that no password has, so that checking an unknown user costs as much."""
    salt, digest = (b64encode(bytes(size)).decode().rstrip("=") for size in (_hasher.salt_len, _hasher.hash_len))
    parameters = f"m={_hasher.memory_cost},t={_hasher.time_cost},p={_hasher.parallelism}"
    return f"$argon2id$v=19${parameters}${salt}${digest}"


_NOBODYS_HASH = _nobodys_hash()


def check(password: str) -> str:
    """The password as it is hashed: in Unicode's normal form C (RFC 8265, 4.2), the same from every keyboard.

    Raises Unacceptable(field="password") unless it has 8 to 1024 characters, all of which can be stored.
    """
    normal = unicodedata.normalize("NFC", password)
    if not SHORTEST <= len(normal) <= LONGEST:
        raise Unacceptable(f"A password must have {SHORTEST} to {LONGEST} characters.", field="password")
    if "\x00" in normal or any("\ud800" <= character <= "\udfff" for character in normal):
        raise Unacceptable("A password must hold no NUL and no lone surrogates.", field="password")
    return normal


async def hash(password: str) -> str:  # noqa: A001  Read as `passwords.hash`.
    """The password's argon2id hash, salt and parameters included. Raises what `check` does."""
    normal = check(password)
    return await asyncio.get_running_loop().run_in_executor(_threads, _hasher.hash, normal)


async def verify(password: str, password_hash: str | None) -> bool:
    """Whether this is the password. Without a hash (unknown user, or one who has none) False, at the same cost."""
    try:
        normal = check(password)
    except Unacceptable:
        # No account can have it, so that the quick answer tells nothing about any.
        return False
    matches = await asyncio.get_running_loop().run_in_executor(
        _threads, _matches, password_hash or _NOBODYS_HASH, normal
    )
    return matches and password_hash is not None


def needs_rehash(password_hash: str) -> bool:
    """Whether the hash was made with other parameters than today's, so that it should be made anew at this sign-in."""
    return _hasher.check_needs_rehash(password_hash)


def _matches(password_hash: str, password: str) -> bool:
    try:
        return _hasher.verify(password_hash, password)
    except (VerificationError, InvalidHashError):
        return False
