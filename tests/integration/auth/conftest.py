"""What the tests of identity share: settings, users, and a clock's worth of JWTs made by hand."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import asyncpg
import pytest

from auth import accounts, tenants
from auth.accounts import User
from auth.permissions import Identity
from auth.tenants import Workspace
from auth.tokens import Tokens, TokenSettings

SECRET = "9f2c1b7d4e8a6053c1d2e3f4a5b6978812345678"

MakeUser = Callable[..., Awaitable[User]]


@pytest.fixture
def settings() -> TokenSettings:
    return TokenSettings(secret=SECRET)


@pytest.fixture
def tokens(settings: TokenSettings) -> Tokens:
    return Tokens(settings)


@pytest.fixture
def make_user(connection: asyncpg.Connection) -> MakeUser:
    """Registers a user who has no password; `is_admin` is passed on."""

    async def make(email: str = "ann@example.org", name: str = "Ann", **options: bool) -> User:
        return await accounts.register(connection, email, None, name, **options)

    return make


@pytest.fixture
async def ann(make_user: MakeUser) -> User:
    return await make_user()


@pytest.fixture
async def bob(make_user: MakeUser) -> User:
    return await make_user("bob@example.org", "Bob")


@pytest.fixture
async def workspace(connection: asyncpg.Connection, ann: User) -> Workspace:
    return await tenants.create(connection, " shared ", ann.id)


def identity(user: User, *, is_admin: bool = False) -> Identity:
    return Identity(user.id, user.email, is_admin)


async def personal(connection: asyncpg.Connection, user: User) -> int:
    return await connection.fetchval("SELECT id FROM workspaces WHERE personal_user_id = $1", user.id)
