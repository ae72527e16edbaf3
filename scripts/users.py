"""`user create` and `token issue`: accounts and tokens, for whoever holds the keys of the installation."""

from __future__ import annotations

import dataclasses
import re
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING

from auth import accounts, audit, passwords
from auth.channels import check_patterns
from auth.errors import NotVisible, Unauthenticated
from auth.permissions import Scope
from auth.tokens import Tokens
from gateway.token_settings import token_settings
from scripts import target

if TYPE_CHECKING:
    from environs import Env

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def generate_password() -> str:
    """A password that nobody guesses (120 bits) and that can be read out."""
    return secrets.token_urlsafe(15)


async def create(env: Env, email: str, name: str, password: str, *, admin: bool) -> accounts.User:
    """Make an account with its personal workspace. Raises Taken, Unacceptable."""
    password_hash = await passwords.hash(password)
    async with target.connection(env) as connection, connection.transaction():
        user = await accounts.register(connection, email, password_hash, name, is_admin=admin)
        await audit.record(connection, None, "user.create", f"user:{user.id}", by="cluster-code user create")
    return user


async def issue_token(
    env: Env, email: str, scopes: Sequence[str], channels: Sequence[str], expires_in: float | None
) -> str:
    """A main token of that user. Empty `scopes`: all that the user may.

    Raises NotVisible, Unauthenticated, Unacceptable.
    """
    check_patterns(channels)
    async with target.connection(env) as connection, connection.transaction():
        # The outside issuer's tokens are not ours to issue, and its keys nothing to fetch here.
        settings = dataclasses.replace(token_settings(env, secret=_kept_secret(env)), oidc_issuer=None)
        user = await accounts.find_by_email(connection, email)
        if user is None:
            raise NotVisible(f"There is no user with the address {email!r}.")
        if user.is_disabled:
            raise Unauthenticated(f"The account {email!r} is disabled: its tokens would be refused.")
        await audit.record(
            connection, None, "token.issue", f"user:{user.id}", scopes=list(scopes), channels=list(channels)
        )
        allowed = {Scope(scope) for scope in scopes} or None
        return Tokens(settings).issue_main(user.id, scopes=allowed, channels=channels, expires_in=expires_in)


def seconds(text: str) -> float:
    """What `90s`, `30m`, `1h` or `7d` means. Raises ValueError."""
    matched = re.fullmatch(r"([1-9][0-9]{0,8})([smhd])", text)
    if matched is None:
        raise ValueError(f"{text!r} is no duration: give a number and a unit, as in 90s, 30m, 1h or 7d")
    return float(int(matched[1]) * _UNITS[matched[2]])


def _kept_secret(env: Env) -> str | None:
    """The secret that the embedded mode keeps; with a database of the user's, JWT_SECRET must be set."""
    if env.str("JWT_SECRET", "") or env.str("DATABASE_URL", ""):
        return None
    return target.instance(env).jwt_secret()
