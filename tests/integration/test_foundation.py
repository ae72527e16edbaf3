from __future__ import annotations

import asyncio

import migrations
from orchestrator.database import Pool, require_schema


async def schema(pool: Pool) -> list[tuple[object, ...]]:
    async with pool.acquire() as connection:
        rows = await connection.fetch(
            """SELECT table_name::text, column_name::text, data_type::text, coalesce(column_default::text, ''),
                      is_nullable::text
                 FROM information_schema.columns WHERE table_schema = 'public' AND table_name NOT LIKE '%yoyo%'
            UNION ALL SELECT tablename, indexname, indexdef, '', '' FROM pg_indexes
                       WHERE schemaname = 'public' AND tablename NOT LIKE '%yoyo%'
            UNION ALL SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid), '', '' FROM pg_constraint
                       WHERE connamespace = 'public'::regnamespace AND conrelid::regclass::text NOT LIKE '%yoyo%'
            UNION ALL SELECT event_object_table, trigger_name, action_statement, event_manipulation, ''
                        FROM information_schema.triggers
            UNION ALL SELECT proname, prosrc, '', '', '' FROM pg_proc WHERE pronamespace = 'public'::regnamespace
            ORDER BY 1, 2, 3, 4"""
        )
        return [tuple(row) for row in rows]


async def test_up_down_and_up_again_gives_the_same_schema(pool: Pool, database_url: str) -> None:
    before = await schema(pool)
    taken_back = await asyncio.to_thread(migrations.rollback, database_url, 99)
    assert taken_back == list(reversed(migrations.known()))
    assert await schema(pool) == []
    assert await asyncio.to_thread(migrations.apply, database_url) == migrations.known()
    assert await schema(pool) == before
    await require_schema(pool)


async def test_concurrent_applies_apply_each_migration_once(database_url: str) -> None:
    await asyncio.to_thread(migrations.rollback, database_url, 99)
    applied = await asyncio.gather(*(asyncio.to_thread(migrations.apply, database_url) for _ in range(4)))
    assert sorted(one for process in applied for one in process) == migrations.known()
