"""What hands and nodes do to a session that runs: it comes back, and says what has happened."""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from orchestrator.errors import ApiRefused
from orchestrator.sessions.record import Session
from tests.cluster.faults.account import prove
from tests.cluster.faults.ground import Away, Ground

pytestmark = pytest.mark.timeout(300)

Take = Callable[[Ground, Session, str], Awaitable[None]]


def _inside(session: Session, kind: str = "pods") -> str:
    return f"/api/v1/namespaces/{session.namespace}/{kind}"


async def _delete(ground: Ground, session: Session, pod: str) -> None:
    await ground.cluster.delete(f"{_inside(session)}/{pod}")


async def _evict(ground: Ground, session: Session, pod: str) -> None:
    for version in ("policy/v1", "policy/v1beta1"):
        body = {
            "apiVersion": version,
            "kind": "Eviction",
            "metadata": {"name": pod, "namespace": session.namespace},
        }
        try:
            await ground.cluster.create(f"{_inside(session)}/{pod}/eviction", body, dict)
        except ApiRefused as error:
            # 1.20 does not know the first, today's clusters not the second.
            if version == "policy/v1" and error.status in (400, 404, 415):
                continue
            raise
        return


async def _starve(ground: Ground, session: Session, pod: str) -> None:
    code, output = await ground.cluster.exec(session.namespace, pod, "preview", ["touch", "/tmp/eat"])
    assert code == 0, output


async def _remove(ground: Ground, session: Session, _: str) -> None:
    await ground.cluster.delete(f"/api/v1/namespaces/{session.namespace}")


async def test_a_session_comes_back_whatever_was_taken_from_it(ground: Ground) -> None:
    await ground.configure()
    await ground.worker()

    async def case(take: Take, *, same: bool, says: str) -> None:
        session = await ground.runs(await ground.create(), "first")
        before = await ground.pod(session)
        begun = len(await ground.history(session.id))
        await take(ground, session, before["metadata"]["name"])

        async def told() -> bool:
            return any(status != "running" for status, *_ in (await ground.history(session.id))[begun:])

        await ground.until(told, take.__name__)
        again = await ground.runs(session.id, "first")
        after = await ground.pod(again)
        assert (after["metadata"]["uid"] == before["metadata"]["uid"]) is same
        lines = (await ground.history(session.id))[begun:]
        print(take.__name__, *lines, sep="\n   ")
        assert {status for status, *_ in lines} <= {"starting", "pending", "running"}, lines
        assert any(says in message for *_, message in lines), lines
        assert (again.preview_url, again.preview_path) == (session.preview_url, session.preview_path)

    # Of a pod that ends at once nothing is left by which to say what became of it.
    async with asyncio.TaskGroup() as cases:
        cases.create_task(case(_delete, same=False, says=""))
        cases.create_task(case(_evict, same=False, says=""))
        cases.create_task(case(_starve, same=True, says="used more memory than its 32Mi"))
        cases.create_task(case(_remove, same=False, says="was no longer there"))
    await ground.nothing_is_left()
    assert await prove(ground) > 0
    await ground.stop()


async def test_a_release_that_a_crash_left_pending_is_gone_on_with(ground: Ground, tmp_path: Path) -> None:
    """helm is made to wait for the pods, so that the crash certainly comes while it works."""
    waits = tmp_path / "waits"
    helm = tmp_path / "helm"
    real = shutil.which("helm", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert real is not None
    helm.write_text(
        f"""#!/bin/sh
if [ -e {shlex.quote(str(waits))} ] && [ "$1" = upgrade ]; then set -- "$@" --wait; fi
exec {shlex.quote(real)} "$@"
"""
    )
    helm.chmod(0o755)
    await ground.configure(helm=str(helm))

    async def crash(session_id: int, status: str) -> None:
        session = await ground.get(session_id)
        worker = await ground.worker()

        async def pending() -> bool:
            try:
                return status in await ground.revisions(session)
            except Away:
                return False

        await ground.until(pending, status)
        await ground.kill(worker)
        assert status in await ground.revisions(session)

    waits.touch()
    session_id = await ground.create()
    await crash(session_id, "pending-install")
    waits.unlink()
    worker = await ground.worker()
    session = await ground.runs(session_id, "first")
    assert await ground.revisions(session) == ["deployed"]

    await ground.kill(worker)
    waits.touch()
    await ground.change(session_id, "second")
    await crash(session_id, "pending-upgrade")
    waits.unlink()
    await ground.worker()
    session = await ground.runs(session_id, "second")
    assert (await ground.revisions(session))[-1] == "deployed"
    assert not any(status.startswith("pending-") for status in await ground.revisions(session))
    await ground.nothing_is_left()
    await prove(ground)
    await ground.stop()
