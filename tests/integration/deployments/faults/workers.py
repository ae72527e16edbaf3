"""Workers as processes that can be killed, forked from one that has imported all there is to import.

    python -m tests.integration.deployments.faults.workers DATABASE_URL SETTINGS

Each line on standard input begins a worker, whose process id is the answer. The end of the input ends them all, and
gives back what they had.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

from orchestrator.database import guard, listen, open_pool
from orchestrator.deployments import release
from orchestrator.deployments.deployer import Deployer
from orchestrator.settings import DatabaseSettings, DeploySettings

# No Traefik has to be waited for.
release.LETS_GO = 0.1
release.STEADY = 0.3


def main() -> None:
    database = DatabaseSettings(url=sys.argv[1], pool_size=4)
    given = json.loads(sys.argv[2])
    settings = DeploySettings(**{**given, "directory": Path(given["directory"])})
    # Whoever is killed is nobody's to wait for.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    begun = []
    for _ in sys.stdin:
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            # Standard output is for the answers.
            os.dup2(2, 1)
            with suppress(asyncio.CancelledError):
                asyncio.run(_work(database, settings))
            os._exit(0)
        begun.append(pid)
        print(pid, flush=True)
    for pid in begun:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    # With SIGCHLD ignored this returns when there is none any more.
    with suppress(ChildProcessError):
        os.wait()


async def _work(database: DatabaseSettings, settings: DeploySettings) -> None:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    pool = await open_pool(database, name="worker")
    deployer = Deployer(settings, database, pool)
    tasks = [
        asyncio.create_task(listen(database, {"deployments": deployer.wakeup})),
        *(asyncio.create_task(guard(name, iteration)) for name, iteration in deployer.roots().items()),
    ]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await deployer.worker.drain(0.1)
        for each in tasks:
            each.cancel()
        await asyncio.wait(tasks)
        await deployer.close()
        await pool.close()


if __name__ == "__main__":
    main()
