"""Accounts: those that register, those that another service syncs, and those that an outside issuer vouches for.

Each has a personal workspace, made in the same transaction. An account without a password hash cannot sign
in by password.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from hashlib import sha256
from typing import Any

import asyncpg

from auth import passwords, refresh
from auth.errors import NotVisible, Taken, Unacceptable, Unauthenticated
from auth.names import LONGEST_NAME, clean, clean_email

_COLUMNS = "id, external_id, email, name, is_admin, is_disabled, created_at, updated_at"


@dataclass(frozen=True, slots=True)
class User:
    """An account."""

    id: int
    # Its id at the outside issuer, or in the service that it is synced from.
    external_id: str | None
    email: str
    name: str
    is_admin: bool
    is_disabled: bool
    created_at: datetime
    updated_at: datetime


class Removal(StrEnum):
    """What `delete_synced` did."""

    DELETED = "deleted"
    # It owns what others may need; it can no longer sign in.
    DISABLED = "disabled"
    UNKNOWN = "unknown"


async def register(
    connection: asyncpg.Connection, email: str, password_hash: str | None, name: str, *, is_admin: bool = False
) -> User:
    """Make an account and its personal workspace, in one transaction.

    Takes the hash and not the password: await `passwords.hash` before a connection is taken, since it may wait long.
    Raises Taken(field="email") when there is an account of that address, in whatever case; Unacceptable(field=…).
    """
    email, name = clean_email(email), clean(name, field="name")
    async with connection.transaction():
        row = await connection.fetchrow(
            f"""INSERT INTO users (email, name, password_hash, is_admin) VALUES ($1, $2, $3, $4)
                ON CONFLICT (lower(email)) DO NOTHING RETURNING {_COLUMNS}""",  # noqa: S608  A constant.
            email,
            name,
            password_hash,
            is_admin,
        )
        if row is None:
            raise _email_taken(email)
        await _make_personal_workspace(connection, row["id"], name)
    return User(**row)


async def verify_login(pool: asyncpg.Pool, email: str, password: str) -> User:
    """The account of that address, when the password is its own. Raises Unauthenticated.

    Takes the pool, because no connection is held while the password is checked. An unknown address costs the same time
    and gets the same answer as a wrong password. A hash made with old parameters is replaced.
    """
    async with pool.acquire() as connection:
        row = await connection.fetchrow(
            f"SELECT {_COLUMNS}, password_hash FROM users WHERE lower(email) = lower($1)",  # noqa: S608  A constant.
            _storable(email.strip()),
        )
    password_hash = row["password_hash"] if row is not None else None
    if not await passwords.verify(password, password_hash) or row is None:
        raise Unauthenticated("The email or the password is wrong.")
    if row["is_disabled"]:
        raise Unauthenticated("This account is disabled: ask an administrator.")
    await _rehash_if_needed(pool, row["id"], password, password_hash)
    return _user(row)


async def verify_password(pool: asyncpg.Pool, user_id: int, password: str) -> bool:
    """Whether this is the user's password, as a change of password asks. Holds no connection while it is checked."""
    async with pool.acquire() as connection:
        password_hash = await connection.fetchval("SELECT password_hash FROM users WHERE id = $1", user_id)
    return await passwords.verify(password, password_hash)


async def get(connection: asyncpg.Connection, user_id: int) -> User:
    """The account. Raises NotVisible."""
    row = await connection.fetchrow(f"SELECT {_COLUMNS} FROM users WHERE id = $1", user_id)  # noqa: S608  A constant.
    if row is None:
        raise _no_such_user()
    return User(**row)


async def find_by_email(connection: asyncpg.Connection, email: str) -> User | None:
    """The account of that address, in whatever case; None when there is none."""
    row = await connection.fetchrow(
        f"SELECT {_COLUMNS} FROM users WHERE lower(email) = lower($1)",  # noqa: S608  A constant.
        _storable(email.strip()),
    )
    return User(**row) if row is not None else None


async def list_page(
    connection: asyncpg.Connection, *, page: int, page_size: int, query: str | None = None
) -> tuple[list[User], int]:
    """One page (from 1) of the accounts, newest first, and how many there are in all.

    `query` keeps those whose address or name contains it, in whatever case.
    """
    needle = _storable(query or "").lower()
    condition = "$1 = '' OR position($1 IN lower(email)) > 0 OR position($1 IN lower(name)) > 0"
    rows = await connection.fetch(
        f"SELECT {_COLUMNS} FROM users WHERE {condition} ORDER BY id DESC LIMIT $2 OFFSET $3",  # noqa: S608  Constants.
        needle,
        page_size,
        (page - 1) * page_size,
    )
    total = await connection.fetchval(f"SELECT count(*) FROM users WHERE {condition}", needle)  # noqa: S608  Constants.
    return [User(**row) for row in rows], total


async def names(connection: asyncpg.Connection, user_ids: Sequence[int]) -> dict[int, str]:
    """The names of those of the users that there are."""
    rows = await connection.fetch("SELECT id, name FROM users WHERE id = ANY($1::bigint[])", user_ids)
    return {row["id"]: row["name"] for row in rows}


async def update(
    connection: asyncpg.Connection,
    user_id: int,
    *,
    email: str | None = None,
    name: str | None = None,
    password_hash: str | None = None,
    is_admin: bool | None = None,
    is_disabled: bool | None = None,
) -> User:
    """Change what is given; None leaves as it is. In one transaction.

    A new password, and being disabled, void every main and refresh token issued until now: its bearer, the caller too,
    signs in again. API tokens stay, and do not work while the account is disabled.
    Raises NotVisible, Taken(field="email"), Unacceptable(field=…), also when no administrator would be left.
    """
    email = clean_email(email) if email is not None else None
    name = clean(name, field="name") if name is not None else None
    async with connection.transaction():
        if is_admin is False:
            await _require_another_admin(connection, user_id, field="is_admin")
        if is_disabled is True:
            await _require_another_admin(connection, user_id, field="is_disabled")
        voids_tokens = password_hash is not None or is_disabled is True
        try:
            async with connection.transaction():
                row = await connection.fetchrow(
                    f"""UPDATE users SET email = coalesce($2, email), name = coalesce($3, name),
                               password_hash = coalesce($4, password_hash), is_admin = coalesce($5, is_admin),
                               is_disabled = coalesce($6, is_disabled),
                               tokens_valid_from = CASE WHEN $7 THEN clock_timestamp() ELSE tokens_valid_from END,
                               updated_at = now()
                         WHERE id = $1 RETURNING {_COLUMNS}""",  # noqa: S608  A constant.
                    user_id,
                    email,
                    name,
                    password_hash,
                    is_admin,
                    is_disabled,
                    voids_tokens,
                )
        except asyncpg.UniqueViolationError as error:
            raise _email_taken(email or "") from error
        if row is None:
            raise _no_such_user()
        if voids_tokens:
            await refresh.revoke_all(connection, user_id)
    return User(**row)


async def delete(connection: asyncpg.Connection, user_id: int) -> None:
    """Delete an account, its tokens, its memberships and its personal workspace, in one transaction.

    What others may need does not go with it: raises Taken(field="projects") or Taken(field="apps") while its personal
    workspace has some, Taken(field="workspaces") while it is the only owner of another workspace; the message says what
    to do first. Raises NotVisible, and Unacceptable(field="is_admin") for the last administrator.
    """
    async with connection.transaction():
        await _require_another_admin(connection, user_id, field="is_admin")
        if await connection.fetchval("SELECT id FROM users WHERE id = $1 FOR UPDATE", user_id) is None:
            raise _no_such_user()
        await _require_nothing_owned(connection, user_id)
        await connection.execute("DELETE FROM users WHERE id = $1", user_id)


async def upsert_synced(connection: asyncpg.Connection, external_id: str, email: str, name: str) -> User:
    """Make or change the account that another service knows by `external_id`; its word on address and name is final.

    An account of the same address that belongs to nobody outside yet is taken over (`_link`). In one transaction.
    Raises Taken(field="email") when the address belongs to another outside account, Unacceptable(field=…).
    """
    external_id = clean(external_id, field="external_id", longest=255)
    email, name = clean_email(email), clean(name, field="name")
    async with connection.transaction():
        user = await _insert_or_link(connection, external_id, email, name, may_link=True, valid_from=None)
        if user is None:
            raise _email_taken(email)
        if (user.email, user.name) == (email, name):
            return user
        return await update(connection, user.id, email=email, name=name)


async def delete_synced(connection: asyncpg.Connection, external_id: str) -> Removal:
    """The other service has deleted its user: delete the account, or disable it while it owns what others may need.

    Raises Unacceptable(field="is_admin") for the last administrator.
    """
    user_id = await connection.fetchval("SELECT id FROM users WHERE external_id = $1", external_id)
    if user_id is None:
        return Removal.UNKNOWN
    async with connection.transaction():
        try:
            await delete(connection, user_id)
        except Taken:
            await update(connection, user_id, is_disabled=True)
            return Removal.DISABLED
    return Removal.DELETED


async def provision_oidc(
    connection: asyncpg.Connection,
    subject: str,
    *,
    email: str | None,
    email_verified: bool,
    name: str | None,
    issued_at: float,
) -> User:
    """The account of the outside issuer's `subject`, made at its first token, with its personal workspace.

    An existing local account of the same address is linked to it only when the issuer says that the address is
    verified; otherwise whoever can name an address at the issuer could take over its account here. `issued_at` (Unix
    seconds) is the moment of the token; what the linked account issued before it is void. In one transaction.
    Raises Unauthenticated when the address is another account's.
    """
    address = _address_or_stand_in(email, subject)
    shown = _name_or(name, address)
    async with connection.transaction():
        user = await _insert_or_link(connection, subject, address, shown, may_link=email_verified, valid_from=issued_at)
    if user is None:
        raise Unauthenticated(
            "The token's email belongs to another account here. Either that one is linked to another identity, or the "
            "issuer does not say that the address is verified: ask an administrator."
        )
    return user


async def _insert_or_link(
    connection: asyncpg.Connection,
    external_id: str,
    email: str,
    name: str,
    *,
    may_link: bool,
    valid_from: float | None,
) -> User | None:
    """The account of that outside id: found, made, or linked by its address. None: the address is another account's."""
    row = await connection.fetchrow(
        f"""INSERT INTO users (external_id, email, name) VALUES ($1, $2, $3)
            ON CONFLICT DO NOTHING RETURNING {_COLUMNS}""",  # noqa: S608  A constant.
        external_id,
        email,
        name,
    )
    if row is not None:
        await _make_personal_workspace(connection, row["id"], name)
        return User(**row)
    # A statement of its own, so that it sees what a concurrent request has just made.
    row = await connection.fetchrow(
        f"SELECT {_COLUMNS} FROM users WHERE external_id = $1",  # noqa: S608  A constant.
        external_id,
    )
    if row is not None:
        return User(**row)
    return await _link(connection, external_id, email, valid_from) if may_link else None


async def _link(connection: asyncpg.Connection, external_id: str, email: str, valid_from: float | None) -> User | None:
    """Give the local account of that address to its outside owner; None when it has one already.

    Nobody checked, when it was registered, that the address was the registrant's own. So its password and all its
    tokens end here: a stranger who registered it first must not keep a way in. An administrator was looked at by
    another one and keeps the password, the way in when the issuer is away.
    """
    row = await connection.fetchrow(
        f"""UPDATE users SET external_id = $1, password_hash = CASE WHEN is_admin THEN password_hash END,
                   tokens_valid_from = coalesce(to_timestamp($3), clock_timestamp()), updated_at = now()
             WHERE lower(email) = lower($2) AND external_id IS NULL RETURNING {_COLUMNS}""",  # noqa: S608  A constant.
        external_id,
        email,
        valid_from,
    )
    if row is None:
        return None
    await refresh.revoke_all(connection, row["id"])
    await connection.execute("DELETE FROM api_tokens WHERE user_id = $1", row["id"])
    return User(**row)


async def _make_personal_workspace(connection: asyncpg.Connection, user_id: int, name: str) -> None:
    await connection.execute(
        """WITH made AS (INSERT INTO workspaces (name, personal_user_id) VALUES ($2, $1) RETURNING id)
           INSERT INTO workspace_members (workspace_id, user_id, role) SELECT id, $1, 'owner' FROM made""",
        user_id,
        name,
    )


async def _require_another_admin(connection: asyncpg.Connection, user_id: int, *, field: str) -> None:
    """Refuse to lose the last administrator. Locks them all, in order, so that two cannot remove each other."""
    rows = await connection.fetch("SELECT id FROM users WHERE is_admin AND NOT is_disabled ORDER BY id FOR UPDATE")
    if [row["id"] for row in rows] == [user_id]:
        raise Unacceptable("This is the last administrator: make another one first.", field=field)


async def _require_nothing_owned(connection: asyncpg.Connection, user_id: int) -> None:
    # Until we commit, nobody adds a project or an app to what the user owns, and no other owner leaves it.
    await connection.execute(
        """SELECT FROM workspaces w JOIN workspace_members m ON m.workspace_id = w.id
            WHERE m.user_id = $1 AND m.role = 'owner' ORDER BY w.id FOR UPDATE OF w""",
        user_id,
    )
    if await connection.fetchval(
        """SELECT EXISTS (SELECT FROM projects p JOIN workspaces w ON w.id = p.workspace_id
                           WHERE w.personal_user_id = $1)""",
        user_id,
    ):
        raise Taken("The user's personal workspace has projects: delete them first.", field="projects")
    if await connection.fetchval(
        """SELECT EXISTS (SELECT FROM apps a JOIN workspaces w ON w.id = a.workspace_id
                           WHERE w.personal_user_id = $1)""",
        user_id,
    ):
        raise Taken(
            "The user's personal workspace has apps: delete them first, and wait until they are gone.", field="apps"
        )
    row = await connection.fetchrow(
        """SELECT w.id, w.name FROM workspaces w JOIN workspace_members m ON m.workspace_id = w.id
            WHERE m.user_id = $1 AND m.role = 'owner' AND w.personal_user_id IS DISTINCT FROM $1
              AND NOT EXISTS (SELECT FROM workspace_members o
                               WHERE o.workspace_id = w.id AND o.user_id <> $1 AND o.role = 'owner')
            ORDER BY w.id LIMIT 1""",
        user_id,
    )
    if row is not None:
        raise Taken(
            f"The user is the only owner of the workspace {row['name']!r} ({row['id']}): make another member its "
            "owner, or delete it, first.",
            field="workspaces",
        )


async def _rehash_if_needed(pool: asyncpg.Pool, user_id: int, password: str, password_hash: str | None) -> None:
    if password_hash is None or not passwords.needs_rehash(password_hash):
        return
    renewed = await passwords.hash(password)
    async with pool.acquire() as connection:
        await connection.execute(
            "UPDATE users SET password_hash = $3 WHERE id = $1 AND password_hash = $2", user_id, password_hash, renewed
        )


def _address_or_stand_in(email: str | None, subject: str) -> str:
    """The address, or one that cannot exist (RFC 6761, 6.4) for an issuer that names none."""
    if email:
        try:
            return clean_email(email)
        except Unacceptable as error:
            raise Unauthenticated("The token's email is malformed.") from error
    return f"{sha256(subject.encode()).hexdigest()[:40]}@oidc.invalid"


def _name_or(name: str | None, address: str) -> str:
    try:
        return clean(name or "", field="name")
    except Unacceptable:
        return address.partition("@")[0][:LONGEST_NAME]


def _storable(text: str) -> str:
    """Text to look for: what PostgreSQL cannot store is replaced by what nothing contains."""
    return text.encode(errors="replace").decode().replace("\x00", "\N{REPLACEMENT CHARACTER}")


def _user(row: asyncpg.Record) -> User:
    fields: dict[str, Any] = dict(row)
    del fields["password_hash"]
    return User(**fields)


def _no_such_user() -> NotVisible:
    return NotVisible("There is no such user.")


def _email_taken(email: str) -> Taken:
    return Taken(f"There is an account with the address {email!r} already.", field="email")
