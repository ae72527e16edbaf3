"""Users that another service tells of over RabbitMQ."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from struct import pack
from typing import Any

import aiormq
import orjson
import pytest
import pytest_asyncio

from auth import accounts
from auth.errors import Taken
from orchestrator import user_sync
from orchestrator.database import Connection, Pool
from orchestrator.errors import Conflict
from orchestrator.events import USER_MESSAGES, USERS_QUEUE
from orchestrator.user_sync import Outcome, SyncedUser, UserSync
from tests.integration.eventlog.rabbit import PATIENCE, opened, plainly, send, send_raw

ADA = SyncedUser("7", "ada@example.org", "Ada")


async def apply(connection: Connection, user: SyncedUser, **options: Any) -> Outcome:
    async with connection.transaction():
        return await user_sync.apply(connection, user, **options)


async def told(connection: Connection) -> int:
    """Whose sockets were checked anew since this was last asked."""
    return await connection.fetchval("WITH gone AS (DELETE FROM outbox RETURNING 1) SELECT count(*) FROM gone")


async def test_a_user_comes_changes_and_goes_and_saying_it_again_changes_nothing(connection: Connection) -> None:
    renamed = SyncedUser("7", "ada@example.org", "Ada Lovelace")
    gone = SyncedUser("7", deleted=True)
    for user, outcomes in (
        (ADA, (Outcome.ADDED, Outcome.UNCHANGED)),
        (renamed, (Outcome.CHANGED, Outcome.UNCHANGED)),
        (gone, (Outcome.DELETED, Outcome.UNKNOWN)),
        (renamed, (Outcome.OUTDATED, Outcome.OUTDATED)),
    ):
        assert (await apply(connection, user), await apply(connection, user)) == outcomes
    assert await connection.fetchval("SELECT count(*) FROM users") == 0
    assert await told(connection) == 1


async def test_an_account_of_the_same_address_is_linked_and_its_sockets_are_checked(connection: Connection) -> None:
    own = await accounts.register(connection, "ADA@example.org", None, "Own")
    assert await apply(connection, ADA) is Outcome.LINKED
    assert await connection.fetchval("SELECT external_id FROM users WHERE id = $1", own.id) == "7"
    assert await told(connection) == 1


async def test_only_an_operator_links_an_administrator(connection: Connection) -> None:
    admin = await accounts.register(connection, "ADA@example.org", None, "Own", is_admin=True)
    with pytest.raises(Taken, match="administrator"):
        await apply(connection, ADA)
    assert await connection.fetchval("SELECT external_id FROM users WHERE id = $1", admin.id) is None
    assert await connection.fetchval("SELECT count(*) FROM synced_users") == 0
    assert await apply(connection, ADA, by_operator=True) is Outcome.LINKED
    # From then on it is the other service's, as any other.
    assert await apply(connection, SyncedUser("7", "ada@example.org", "A.")) is Outcome.CHANGED


async def test_blanks_around_an_id_make_no_other_user(connection: Connection) -> None:
    await apply(connection, ADA)
    assert await apply(connection, SyncedUser(" 7 ", deleted=True)) is Outcome.DELETED
    assert await apply(connection, SyncedUser(" 7", "ada@example.org", "Ada")) is Outcome.OUTDATED


async def test_a_deleted_user_comes_back_by_a_greater_version_or_by_the_operator(connection: Connection) -> None:
    await apply(connection, SyncedUser("7", "ada@example.org", "Ada", created=True, version=1))
    await apply(connection, SyncedUser("7", deleted=True, version=2))
    again = SyncedUser("7", "ada@example.org", "Ada", created=True)
    with pytest.raises(Conflict, match="The user '7' was deleted"):
        await apply(connection, again)
    assert await apply(connection, SyncedUser("7", "ada@example.org", "Ada", created=True, version=1)) == "outdated"
    assert await apply(connection, SyncedUser("7", "ada@example.org", "Ada", version=3)) == "added"
    await apply(connection, SyncedUser("7", deleted=True))
    assert await apply(connection, again, by_operator=True) == "added"
    # And is an ordinary one from then on.
    assert await apply(connection, SyncedUser("7", "ada@example.org", "A.")) == "changed"


async def test_one_that_owns_what_others_need_is_disabled_and_can_be_restored(connection: Connection) -> None:
    await apply(connection, ADA)
    await connection.execute(
        "INSERT INTO projects (workspace_id, name) SELECT id, 'shop' FROM workspaces WHERE personal_user_id IS NOT NULL"
    )
    gone = SyncedUser("7", deleted=True)
    assert [await apply(connection, gone), await apply(connection, gone)] == ["disabled", "unchanged"]
    assert await apply(connection, ADA, by_operator=True) == "restored"
    assert not await connection.fetchval("SELECT is_disabled FROM users")
    # Disabled by an administrator is not deleted.
    await connection.execute("UPDATE users SET is_disabled = true")
    assert await apply(connection, ADA) == "unchanged"
    assert await connection.fetchval("SELECT is_disabled FROM users")


async def test_a_deletion_that_comes_first_counts(connection: Connection) -> None:
    assert await apply(connection, SyncedUser("7", deleted=True, version=2)) == "unknown"
    assert await apply(connection, SyncedUser("7", "ada@example.org", "Ada", created=True, version=1)) == "outdated"


async def test_what_is_told_at_once_about_one_user_is_done_one_after_the_other(pool: Pool) -> None:
    async def one(number: int) -> Outcome:
        async with pool.acquire() as connection:
            return await apply(connection, SyncedUser("7", "ada@example.org", f"Ada {number}", version=number))

    outcomes = await asyncio.gather(*(one(number) for number in range(1, 11)))
    assert outcomes.count(Outcome.ADDED) == 1
    async with pool.acquire() as connection:
        assert await connection.fetchval("SELECT name FROM users") == "Ada 10"
        assert await connection.fetchval("SELECT version FROM synced_users") == 10


# Over RabbitMQ. ------------------------------------------------------------------------------------------------------


@pytest_asyncio.fixture
async def syncing(amqp_url: str, pool: Pool) -> AsyncIterator[str]:
    """The URL of a virtual host whose user messages are obeyed."""
    async with opened(amqp_url) as log:
        sync = asyncio.create_task(log.consume(USERS_QUEUE, [USER_MESSAGES], UserSync(pool).handle))
        yield amqp_url
        sync.cancel()
        await asyncio.wait([sync])


async def until(pool: Pool, query: str, wanted: object) -> None:
    found = None
    try:
        async with asyncio.timeout(PATIENCE):
            while (found := await pool.fetchval(query)) != wanted:
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"{query} gives {found!r}") from None


def user(number: int, name: str, **more: object) -> bytes:
    return orjson.dumps({"id": number, "email": f"u{number}@example.org", "name": name, **more})


async def test_what_was_published_before_anybody_consumed_is_obeyed_in_order(amqp_url: str, pool: Pool) -> None:
    async with opened(amqp_url):
        pass
    for number in range(20):
        await send(amqp_url, "auth.user.updated" if number else "auth.user.created", user(7, f"Ada {number}"))
    async with opened(amqp_url) as log:
        sync = asyncio.create_task(log.consume(USERS_QUEUE, [USER_MESSAGES], UserSync(pool).handle))
        await until(pool, "SELECT name FROM users", "Ada 19")
        sync.cancel()
        await asyncio.wait([sync])
    # Each of them once, and nothing else was done.
    names = "SELECT count(*) FROM audit_log WHERE action = 'user.sync'"
    assert await pool.fetchval(names) == 20


async def test_broken_ones_are_put_away_with_the_reason_and_hold_up_nobody(syncing: str, pool: Pool) -> None:
    await send(syncing, "auth.user.created", b"nonsense", message_id="broken")
    await send(syncing, "auth.user.created", user(1, "First"))
    await send(syncing, "auth.user.created", orjson.dumps({"id": 2, "email": "u1@example.org", "name": "Thief"}))
    await send(syncing, "auth.user.deleted", user(1, ""))
    await send(syncing, "auth.user.created", user(1, "Again"))
    await send(syncing, "auth.user.created", user(3, "Last"))
    await until(pool, "SELECT count(*) FROM users WHERE name = 'Last'", 1)
    assert await pool.fetchval("SELECT count(*) FROM users WHERE external_id IS NOT NULL") == 1
    async with plainly(syncing) as channel:
        reasons = []
        for _ in range(3):
            message = await channel.basic_get("cluster-code.dead-letter", no_ack=True)
            assert not isinstance(message.delivery, aiormq.spec.Basic.GetEmpty)
            reasons.append(message.header.properties.headers["reason"])
        assert isinstance((await channel.basic_get("cluster-code.dead-letter")).delivery, aiormq.spec.Basic.GetEmpty)
    assert reasons[0].startswith("not JSON")
    assert reasons[1] == "There is an account with the address 'u1@example.org' already."
    assert reasons[2].startswith("The user '1' was deleted")


async def test_a_message_that_cannot_be_obeyed_now_waits_and_those_behind_it_too(syncing: str, pool: Pool) -> None:
    await pool.execute("ALTER TABLE synced_users RENAME TO elsewhere")
    await send(syncing, "auth.user.created", user(7, "Ada"))
    await send(syncing, "auth.user.updated", user(7, "Ada Lovelace"))
    await pool.execute("ALTER TABLE elsewhere RENAME TO synced_users")
    await until(pool, "SELECT name FROM users", "Ada Lovelace")
    assert await pool.fetchval("SELECT count(*) FROM audit_log WHERE action = 'user.sync'") == 2


async def test_ids_that_cannot_be_stored_or_put_away_as_they_are_hold_up_nobody(syncing: str, pool: Pool) -> None:
    gone = orjson.dumps({"id": "a\0b"})
    await send(syncing, "auth.user.deleted", gone)
    await send_raw(syncing, "auth.user.deleted", gone, pack(">HB", 0x0080, 255) + b"\xff" * 255)
    await send(syncing, "auth.user.created", user(1, "Next"))
    await until(pool, "SELECT name FROM users", "Next")
    async with plainly(syncing) as channel:
        for _ in range(2):
            message = await channel.basic_get("cluster-code.dead-letter", no_ack=True)
            assert "control characters" in message.header.properties.headers["reason"]
