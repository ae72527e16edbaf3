"""The yardstick: an aiohttp handler that makes the queries given, dumps their rows with orjson, and does nothing else.

    python -m tests.benchmarks.bare PORT QUERIES

QUERIES is a pickled `{"url": str, "routes": {path: [(sql, arguments), ...]}}`.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import orjson
import uvloop
from aiohttp import web

from orchestrator.database import prepare


def _handler(statements: list[tuple[str, tuple[Any, ...]]]) -> Any:
    async def handle(request: web.Request) -> web.Response:
        async with request.app["pool"].acquire() as connection:
            results = []
            for sql, arguments in statements:
                if arguments or sql.lstrip()[:6].upper() in ("SELECT", "WITH  ", "INSERT", "UPDATE"):
                    results.append(await connection.fetch(sql, *arguments))
                else:
                    await connection.execute(sql)
        rows = [dict(row) for result in results for row in result]
        return web.Response(body=orjson.dumps(rows, default=str), content_type="application/json")

    return handle


def main() -> None:
    plan = pickle.loads(Path(sys.argv[2]).read_bytes())  # noqa: S301  Written by the benchmark itself.

    async def pool(app: web.Application) -> AsyncIterator[None]:
        async with asyncpg.create_pool(plan["url"], min_size=1, max_size=10, init=prepare) as app["pool"]:
            yield

    app = web.Application()
    app.cleanup_ctx.append(pool)
    for path, statements in plan["routes"].items():
        app.router.add_route("*", path, _handler(statements))
    uvloop.install()
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), print=None, access_log=None)


if __name__ == "__main__":
    main()
