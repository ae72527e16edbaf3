from __future__ import annotations

import asyncio

import asyncpg
import pytest
from argon2 import PasswordHasher

from auth import accounts, audit, passwords, projects, refresh, tenants
from auth.accounts import Removal
from auth.errors import NotVisible, Taken, Unacceptable, Unauthenticated
from auth.permissions import Identity, Role
from orchestrator.database import Pool, open_pool
from orchestrator.settings import DatabaseSettings
from tests.integration.auth.conftest import MakeUser


async def personal(connection: asyncpg.Connection, user_id: int) -> int:
    return await connection.fetchval("SELECT id FROM workspaces WHERE personal_user_id = $1", user_id)


async def test_registration_makes_the_user_and_the_personal_workspace(connection: asyncpg.Connection) -> None:
    user = await accounts.register(connection, " Ann@Example.org ", None, " Ann ")
    assert (user.email, user.name, user.is_admin, user.is_disabled, user.external_id) == (
        "Ann@Example.org", "Ann", False, False, None,
    )  # fmt: skip
    (workspace,), total = await tenants.list_for(connection, Identity(user.id, user.email, is_admin=False), 1, 10)
    assert (workspace.name, workspace.personal_user_id, workspace.role, total) == ("Ann", user.id, Role.OWNER, 1)
    assert await accounts.get(connection, user.id) == user
    assert await accounts.find_by_email(connection, "ANN@example.ORG") == user
    assert await accounts.find_by_email(connection, "bob@example.org\x00\ud800") is None


async def test_an_address_has_one_account_in_whatever_case(connection: asyncpg.Connection, pool: Pool) -> None:
    async def register(email: str) -> object:
        async with pool.acquire() as other:
            return await accounts.register(other, email, None, "Ann")

    cases = ["ann@example.org", "ANN@example.org", "Ann@Example.Org", "ann@EXAMPLE.org"]
    results = await asyncio.gather(*(register(email) for email in cases), return_exceptions=True)
    taken = [result for result in results if isinstance(result, Taken)]
    assert len(taken) == 3
    assert {error.field for error in taken} == {"email"}
    assert await connection.fetchval("SELECT count(*) FROM workspaces") == 1


async def test_registration_with_nonsense_is_refused(connection: asyncpg.Connection) -> None:
    for email, name, field in (("ann", "Ann", "email"), ("a@b", "A\x00", "name")):
        with pytest.raises(Unacceptable) as caught:
            await accounts.register(connection, email, None, name)
        assert caught.value.field == field


async def test_a_rolled_back_registration_leaves_nothing(connection: asyncpg.Connection) -> None:
    transaction = connection.transaction()
    await transaction.start()
    await accounts.register(connection, "ann@example.org", None, "Ann")
    await transaction.rollback()
    assert await connection.fetchval("SELECT count(*) FROM users") == 0


# Signing in


async def test_signing_in_takes_the_right_password(pool: Pool, connection: asyncpg.Connection) -> None:
    user = await accounts.register(connection, "ann@example.org", await passwords.hash("correct horse"), "Ann")
    assert await accounts.verify_login(pool, " ANN@example.org ", "correct horse") == user
    assert await accounts.verify_password(pool, user.id, "correct horse")
    assert not await accounts.verify_password(pool, user.id, "correct horsf")
    assert not await accounts.verify_password(pool, user.id + 1, "correct horse")


async def test_a_wrong_password_and_an_unknown_address_get_the_same_answer(
    pool: Pool, connection: asyncpg.Connection
) -> None:
    await accounts.register(connection, "ann@example.org", await passwords.hash("correct horse"), "Ann")
    await accounts.register(connection, "bob@example.org", None, "Bob")
    answers = set()
    for email, password in [
        ("ann@example.org", "wrong horse"),
        ("nobody@example.org", "correct horse"),
        ("bob@example.org", "correct horse"),
        ("ann@example.org", "x" * 5000),
        ("ann@example.org\x00\ud800", "correct horse"),
        ("ann@example.org", "\ud800\x00correct horse"),
    ]:
        with pytest.raises(Unauthenticated) as caught:
            await accounts.verify_login(pool, email, password)
        answers.add(str(caught.value))
    assert answers == {"The email or the password is wrong."}


async def test_that_an_account_is_disabled_is_told_only_to_who_has_the_password(
    pool: Pool, connection: asyncpg.Connection
) -> None:
    user = await accounts.register(connection, "ann@example.org", await passwords.hash("correct horse"), "Ann")
    await accounts.update(connection, user.id, is_disabled=True)
    with pytest.raises(Unauthenticated, match="disabled"):
        await accounts.verify_login(pool, "ann@example.org", "correct horse")
    with pytest.raises(Unauthenticated, match="email or the password"):
        await accounts.verify_login(pool, "ann@example.org", "wrong horse")


async def test_a_hash_with_old_parameters_is_replaced_at_sign_in(pool: Pool, connection: asyncpg.Connection) -> None:
    old = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1).hash("correct horse")
    user = await accounts.register(connection, "ann@example.org", old, "Ann")
    await accounts.verify_login(pool, "ann@example.org", "correct horse")
    renewed = await connection.fetchval("SELECT password_hash FROM users WHERE id = $1", user.id)
    assert renewed != old
    assert not passwords.needs_rehash(renewed)
    await accounts.verify_login(pool, "ann@example.org", "correct horse")


async def test_no_connection_is_held_while_a_password_is_checked(database_url: str) -> None:
    narrow = await open_pool(DatabaseSettings(url=database_url, pool_size=1), name="narrow")
    try:
        async with narrow.acquire() as connection:
            await accounts.register(connection, "ann@example.org", await passwords.hash("correct horse"), "Ann")
        signing_in = asyncio.gather(
            *(accounts.verify_login(narrow, "ann@example.org", "correct horse") for _ in range(4))
        )
        answered = 0
        while not signing_in.done():
            async with narrow.acquire(timeout=1) as connection:
                answered += await connection.fetchval("SELECT 1")
        await signing_in
        # With a connection held for each hash there would be four answers or so.
        assert answered > 20
    finally:
        await narrow.close()


# Changing


async def test_an_account_changes_where_it_is_told_to(connection: asyncpg.Connection, make_user: MakeUser) -> None:
    user = await make_user()
    assert await accounts.update(connection, user.id) == await accounts.get(connection, user.id)
    changed = await accounts.update(connection, user.id, email="ann@other.org", name="Anna", is_admin=True)
    assert (changed.email, changed.name, changed.is_admin, changed.is_disabled) == (
        "ann@other.org",
        "Anna",
        True,
        False,
    )
    assert changed.updated_at > user.updated_at
    with pytest.raises(NotVisible):
        await accounts.update(connection, user.id + 1, name="X")
    with pytest.raises(NotVisible):
        await accounts.get(connection, user.id + 1)


async def test_another_accounts_address_is_taken_and_the_transaction_goes_on(
    connection: asyncpg.Connection, make_user: MakeUser
) -> None:
    user = await make_user()
    await make_user("bob@example.org")
    async with connection.transaction():
        with pytest.raises(Taken) as caught:
            await accounts.update(connection, user.id, email="BOB@example.org")
        assert caught.value.field == "email"
        await accounts.update(connection, user.id, email="ANN@example.org")
    assert (await accounts.get(connection, user.id)).email == "ANN@example.org"


async def test_a_new_password_voids_the_refresh_tokens(connection: asyncpg.Connection, make_user: MakeUser) -> None:
    user = await make_user()
    token = await refresh.open_family(connection, user.id, 60)
    await accounts.update(connection, user.id, name="Anna")
    _, token = await refresh.rotate(connection, token, 60)
    await accounts.update(connection, user.id, password_hash="another")
    with pytest.raises(Unauthenticated, match="revoked"):
        await refresh.rotate(connection, token, 60)


async def test_the_last_administrator_stays(connection: asyncpg.Connection, make_user: MakeUser) -> None:
    first = await make_user(is_admin=True)
    second = await make_user("bob@example.org", is_admin=True)
    await accounts.update(connection, second.id, is_disabled=True)
    for change in (
        accounts.update(connection, first.id, is_admin=False),
        accounts.update(connection, first.id, is_disabled=True),
        accounts.delete(connection, first.id),
    ):
        with pytest.raises(Unacceptable, match="last administrator"):
            await change
    await accounts.update(connection, second.id, is_disabled=False)
    await accounts.update(connection, first.id, is_admin=False)


async def test_two_administrators_cannot_remove_each_other(
    pool: Pool, connection: asyncpg.Connection, make_user: MakeUser
) -> None:
    admins = [await make_user(f"{number}@example.org", is_admin=True) for number in range(4)]

    async def demote(user_id: int) -> None:
        async with pool.acquire() as other:
            await accounts.update(other, user_id, is_admin=False)

    results = await asyncio.gather(*(demote(admin.id) for admin in admins), return_exceptions=True)
    assert sum(isinstance(result, Unacceptable) for result in results) == 1
    assert await connection.fetchval("SELECT count(*) FROM users WHERE is_admin") == 1


async def test_accounts_are_listed_in_pages_newest_first(connection: asyncpg.Connection, make_user: MakeUser) -> None:
    users = [await make_user(f"user{number}@example.org", f"User {number}") for number in range(5)]
    assert await accounts.list_page(connection, page=1, page_size=2) == ([users[4], users[3]], 5)
    assert await accounts.list_page(connection, page=3, page_size=2) == ([users[0]], 5)
    assert await accounts.list_page(connection, page=9, page_size=2) == ([], 5)
    assert await accounts.list_page(connection, page=1, page_size=9, query="USER3@") == ([users[3]], 1)
    assert await accounts.list_page(connection, page=1, page_size=9, query="user 1") == ([users[1]], 1)
    for nothing in ("%", "_", "'; --", "\x00", "\ud800"):
        assert await accounts.list_page(connection, page=1, page_size=9, query=nothing) == ([], 0)


# Deleting


async def test_an_account_goes_with_all_that_is_its_own(connection: asyncpg.Connection, make_user: MakeUser) -> None:
    user, other = await make_user(), await make_user("bob@example.org")
    shared = await tenants.create(connection, "shared", other.id)
    await tenants.add_member(connection, shared.id, user.id, Role.ADMIN, by=Role.OWNER)
    project = await projects.create(connection, shared.id, name="p", created_by=user.id)
    await refresh.open_family(connection, user.id, 60)
    await audit.record(connection, user.id, "user.update", f"user:{user.id}")
    await accounts.delete(connection, user.id)
    assert await personal(connection, user.id) is None
    assert await tenants.role_in(connection, shared.id, user.id) is None
    assert (await projects.by_id(connection, project.id)).created_by is None
    assert await connection.fetchval("SELECT actor_id FROM audit_log") == user.id
    with pytest.raises(NotVisible):
        await accounts.delete(connection, user.id)


async def test_an_account_stays_while_its_workspaces_are_needed(
    connection: asyncpg.Connection, make_user: MakeUser
) -> None:
    user, other = await make_user(), await make_user("bob@example.org")
    project = await projects.create(connection, await personal(connection, user.id), name="p")
    with pytest.raises(Taken, match="has projects: delete them first") as caught:
        await accounts.delete(connection, user.id)
    assert caught.value.field == "projects"
    await projects.delete(connection, project.id)

    shared = await tenants.create(connection, "shared", user.id)
    with pytest.raises(Taken, match=r"only owner of the workspace 'shared'.*first") as caught:
        await accounts.delete(connection, user.id)
    assert caught.value.field == "workspaces"
    await tenants.add_member(connection, shared.id, other.id, Role.OWNER, by=Role.OWNER)
    await accounts.delete(connection, user.id)
    assert await tenants.role_in(connection, shared.id, other.id) is Role.OWNER


# Synced from another service


async def test_a_synced_account_follows_the_other_service(connection: asyncpg.Connection) -> None:
    made = await accounts.upsert_synced(connection, "ext-1", "ann@example.org", "Ann")
    assert made.external_id == "ext-1"
    assert await personal(connection, made.id) is not None
    assert await accounts.upsert_synced(connection, "ext-1", "ann@example.org", "Ann") == made
    changed = await accounts.upsert_synced(connection, "ext-1", "anna@example.org", "Anna")
    assert (changed.id, changed.email, changed.name) == (made.id, "anna@example.org", "Anna")
    with pytest.raises(Taken) as caught:
        await accounts.upsert_synced(connection, "ext-2", "ANNA@example.org", "Impostor")
    assert caught.value.field == "email"
    with pytest.raises(Unacceptable):
        await accounts.upsert_synced(connection, "", "x@example.org", "X")


async def test_a_synced_account_takes_over_the_local_one_of_its_address(
    pool: Pool, connection: asyncpg.Connection
) -> None:
    local = await accounts.register(connection, "ann@example.org", await passwords.hash("correct horse"), "Ann")
    synced = await accounts.upsert_synced(connection, "ext-1", "Ann@example.org", "Ann B")
    assert (synced.id, synced.external_id, synced.email, synced.name) == (local.id, "ext-1", "Ann@example.org", "Ann B")
    with pytest.raises(Unauthenticated):
        await accounts.verify_login(pool, "ann@example.org", "correct horse")


async def test_a_user_deleted_there_is_deleted_here_or_disabled_while_needed(connection: asyncpg.Connection) -> None:
    assert await accounts.delete_synced(connection, "ext-1") is Removal.UNKNOWN
    await accounts.upsert_synced(connection, "ext-1", "ann@example.org", "Ann")
    assert await accounts.delete_synced(connection, "ext-1") is Removal.DELETED
    assert await accounts.find_by_email(connection, "ann@example.org") is None

    user = await accounts.upsert_synced(connection, "ext-1", "ann@example.org", "Ann")
    await projects.create(connection, await personal(connection, user.id), name="p")
    assert await accounts.delete_synced(connection, "ext-1") is Removal.DISABLED
    assert (await accounts.get(connection, user.id)).is_disabled

    await accounts.update(connection, user.id, is_admin=True, is_disabled=False)
    with pytest.raises(Unacceptable, match="last administrator"):
        await accounts.delete_synced(connection, "ext-1")


# The audit log


async def test_a_deed_is_recorded_with_its_details(connection: asyncpg.Connection) -> None:
    await audit.record(connection, None, "user.create", "user:7", "127.0.0.1", scopes=["read"], name="O'Brien")
    row = await connection.fetchrow("SELECT actor_id, action, object, address, details FROM audit_log")
    assert tuple(row) == (None, "user.create", "user:7", "127.0.0.1", {"scopes": ["read"], "name": "O'Brien"})
