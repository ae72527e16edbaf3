"""One deployment, from its claim to its end: its steps one after the other, each told as it begins and as it ends.

Whatever a worker finds was done by one that died is done again, from the last step whose result can be used: what is
live goes on with `drain`, what has an image with `run`, the rest begins with `clone`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from uuid import UUID

import structlog

from orchestrator.database import UNAVAILABLE, Connection, Pool, backoff
from orchestrator.deployments import directories, leases, masking, record
from orchestrator.deployments.contract import (
    UNSTEADY,
    AppSecrets,
    AppSettings,
    Image,
    Source,
    Status,
    Step,
    StepFailed,
    Task,
)
from orchestrator.deployments.leases import LeaseLost
from orchestrator.deployments.logs import DeploymentLog
from orchestrator.deployments.record import After, Deployment
from orchestrator.deployments.secrets import Keyring
from orchestrator.errors import EngineRefused, Invalid, NotFound, ProviderUnavailable, SecretsUnreadable
from orchestrator.settings import DeploySettings

if TYPE_CHECKING:
    from prometheus_client import Histogram

log = structlog.get_logger("deployments")
T = TypeVar("T")

# How often a worker may take a deployment and die.
MAX_DEATHS = 3
# The reason while the engine is waited for.
ENGINE_AWAY = "DockerUnavailable"
# Seconds between two attempts of a step whose engine is away, at most.
_PATIENCE = 5.0
# Seconds that the remains of a cancelled deployment, and of a failed one, get to be removed; then they are the sweep's.
_CANCEL_DEADLINE = 3.0
_FAIL_DEADLINE = 30.0
# Seconds that the last words of a worker which ends get to be stored.
_FLUSH_DEADLINE = 2.0


class Steps(Protocol):
    """What a worker does at the engine and with git, as `contract` says. All may raise ProviderUnavailable."""

    async def clone(self, task: Task) -> Source:
        """Raises StepFailed."""

    async def build(self, task: Task, source: Source) -> Image:
        """Raises StepFailed."""

    async def run(self, task: Task, image: Image) -> str:
        """The id of a container that serves nobody yet. Raises StepFailed."""

    async def probe(self, task: Task, container: str) -> None:
        """Return when it is healthy. Raises StepFailed."""

    async def swap(self, task: Task, container: str) -> None:
        """Return when it serves, beside the one before. Raises StepFailed."""

    async def drain(self, task: Task) -> None:
        """Have those before serve no more. Raises StepFailed, with UNSTEADY where they serve on instead."""

    async def clean(self, task: Task) -> None:
        """Remove those before, and images that are not kept. Raises StepFailed, as `drain` does."""

    async def image_ids(self, app_id: int) -> set[str]:
        """The ids of those that the engine has of an app."""

    async def discard(self, task: Task) -> None:
        """Remove its container, and the image that it built. Raises StepFailed."""

    def url(self, task: Task) -> str:
        """Where the app answers."""


class CancelRequested(Exception):
    """Somebody asked for the deployment's end."""


class Pipeline:
    """Works on one claimed deployment.

    `deploy` brings it to its end. Instead of that, or once that was cancelled or has raised CancelRequested, `cancel`
    does; `give_back` leaves it to another worker. `close` in any case. Where a method raises LeaseLost, another worker
    has it already, and nothing more is written. `durations` observes the steps, by name and outcome.
    """

    def __init__(
        self,
        deployment: Deployment,
        *,
        settings: DeploySettings,
        pool: Pool,
        steps: Steps,
        keys: Keyring,
        durations: Histogram,
        on_stored: Callable[[int], None],
    ) -> None:
        if deployment.lease_owner is None:
            raise ValueError(f"deployment {deployment.id} is not claimed")
        self.deployment = deployment
        self.owner: UUID = deployment.lease_owner
        self._settings = settings
        self._pool = pool
        self._steps = steps
        self._keys = keys
        self._durations = durations
        self._on_stored = on_stored
        self._directory = directories.of_claim(settings.directory, deployment.id, self.owner)
        self._opened: tuple[Task, DeploymentLog] | None = None
        self._secrets: list[str] = []
        # Why it cannot even begin.
        self._unfit: StepFailed | None = None
        self._writer: asyncio.Task[None] | None = None
        self._began = monotonic()
        # It comes to its end already: that it shall be cancelled is of no interest.
        self._ending = False
        # Its last write, which gives the lease up, is under way or done.
        self.finishing = False

    async def deploy(self) -> None:
        """Carry it out, or record why that cannot be. Raises LeaseLost, CancelRequested."""
        task, _ = await self._open()
        worn_out = self.deployment.attempts > MAX_DEATHS
        try:
            if self.deployment.status != Status.LIVE:
                if self._unfit is not None:
                    raise self._unfit
                if worn_out:
                    raise StepFailed("WorkerDied", _worn_out(self.deployment.step))
                await self._bring_to_life(task)
            if not worn_out:
                await self._tidy(task)
        except StepFailed as error:
            await self._fail(task, error)
        else:
            await self._finish(Status.LIVE)

    async def cancel(self) -> None:
        """End it, and remove what it has made. Raises LeaseLost."""
        self._ending = True
        task, _ = await self._open()
        task.say("Cancelled.\n")
        removed = await self._discard(task, _CANCEL_DEADLINE)
        steps = self.deployment.steps
        if steps and steps[-1]["status"] == "running":
            steps = record.ended(steps, "cancelled", monotonic() - self._began)
        await self._finish(
            Status.CANCELLED,
            reason="Cancelled",
            message="Cancelled, as requested.",
            steps=steps,
            image=None,
            image_id=None,
        )
        if not removed:
            # Traefik had to let go of it first. It is nobody else's, whoever holds the app now.
            await self._discard(task, _FAIL_DEADLINE)

    async def give_back(self) -> None:
        """Leave it to another worker."""
        try:
            async with asyncio.timeout(_FLUSH_DEADLINE):
                if self._opened is not None:
                    await self._opened[1].flush()
                async with self._pool.acquire() as connection:
                    await leases.release(connection, self.deployment.id, self.owner)
        except UNAVAILABLE as error:
            # Then the lease runs out by itself.
            log.warning("lease not given back", deployment=self.deployment.id, error=str(error) or type(error).__name__)

    async def close(self) -> None:
        """Forget its working directory, and what of its log was not stored."""
        if self._writer is not None:
            self._writer.cancel()
            await asyncio.wait([self._writer])
        await directories.remove(self._directory)

    async def _bring_to_life(self, task: Task) -> None:
        image = await self._image(task)
        container = await self._step(
            Step.RUN, lambda: self._steps.run(task, image), lambda container: {"container": container}
        )
        await self._step(Step.PROBE, lambda: self._steps.probe(task, container))
        await self._step(
            Step.SWAP,
            lambda: self._steps.swap(task, container),
            lambda _: {"status": Status.LIVE, "url": self._steps.url(task)},
        )

    async def _image(self, task: Task) -> Image:
        """The image to run: of the deployment that is rolled back to, of a worker that died, or a new one."""
        if self.deployment.image and self.deployment.image_id:
            return Image(self.deployment.image, self.deployment.image_id)
        source = await self._step(
            Step.CLONE,
            lambda: self._steps.clone(task),
            lambda source: {"commit_id": source.commit_id, "commit_message": source.subject},
        )
        return await self._step(
            Step.BUILD,
            lambda: self._steps.build(task, source),
            lambda image: {"image": image.name, "image_id": image.id},
        )

    async def _tidy(self, task: Task) -> None:
        """It serves. What cannot be tidied up now is the sweep's. Raises StepFailed where it does not stay up."""
        for step, work in ((Step.DRAIN, self._steps.drain), (Step.CLEAN, self._steps.clean)):
            try:
                await self._step(step, lambda work=work: work(task))  # type: ignore[misc]
            except StepFailed as error:
                if error.reason == UNSTEADY:
                    raise
                log.warning("not tidied up", deployment=task.deployment_id, step=step.value, error=str(error))
        try:
            there = await self._steps.image_ids(task.app_id)
        except (ProviderUnavailable, EngineRefused) as error:
            log.warning("images not seen", deployment=task.deployment_id, error=str(error))
        else:
            await self._stubbornly(lambda connection: leases.forget_images(connection, task.app_id, there))

    async def _step(
        self,
        step: Step,
        work: Callable[[], Awaitable[T]],
        changes: Callable[[T], dict[str, Any]] = lambda _: {},
    ) -> T:
        """Do one step, as often as its engine goes away, and record it with what it `changes`."""
        _, lines = await self._open()
        lines.begin(step)
        self._began = monotonic()
        await self._write(step=step.value, steps=record.begun(self.deployment.steps, step.value))
        outcome = "interrupted"
        try:
            result = await self._patiently(step, work)
            outcome = "done"
        except StepFailed as error:
            outcome = "failed"
            lines.say(f"{error}\n")
            await lines.flush()
            await self._write(steps=self._ended("failed"))
            raise
        finally:
            self._durations.labels(step.value, outcome).observe(monotonic() - self._began)
        # Who sees that a step has ended has seen all of its log.
        await lines.flush()
        await self._write(steps=self._ended("done"), reason="", message="", **changes(result))
        return result

    def _ended(self, status: str) -> list[dict[str, Any]]:
        return record.ended(self.deployment.steps, status, monotonic() - self._began)

    async def _patiently(self, step: Step, work: Callable[[], Awaitable[T]]) -> T:
        """What the work returns. Raises StepFailed, also where the engine refuses, and for faults of our own."""
        failures = 0
        while True:
            try:
                return await work()
            except ProviderUnavailable as error:
                failures += 1
                log.warning("step waits for the engine", step=step.value, error=str(error), failures=failures)
                if failures == 1:
                    self._say(f"Waiting: {error}\n")
                    await self._write(reason=ENGINE_AWAY, message=f"Waiting for the Docker engine. {error}")
                await asyncio.sleep(error.retry_after or backoff(failures, cap=_PATIENCE))
            except EngineRefused as error:
                raise StepFailed("DockerRefused", f"The Docker engine refuses: {error}") from error
            except Invalid as error:
                raise StepFailed("InvalidSettings", f"{error.field}: {error}") from error
            except StepFailed:
                raise
            except Exception as error:
                log.exception("step broke off", deployment=self.deployment.id, step=step.value)
                raise StepFailed(
                    "InternalError", f"The step {step.value} broke off: tell an operator, whose logs say why."
                ) from error

    async def _fail(self, task: Task, error: StepFailed) -> None:
        self._ending = True
        await self._write(reason=error.reason, message=str(error))
        await self._discard(task, _FAIL_DEADLINE)
        await self._finish(Status.FAILED, reason=error.reason, message=str(error), image=None, image_id=None)

    async def _discard(self, task: Task, deadline: float) -> bool:
        """Remove what it has made, as far as that can be done now; False: the rest is the sweep's."""
        try:
            async with asyncio.timeout(deadline):
                await self._steps.discard(task)
            return True
        except (ProviderUnavailable, EngineRefused, StepFailed, TimeoutError) as error:
            log.warning("left to the sweep", deployment=task.deployment_id, error=str(error) or type(error).__name__)
        except Exception:
            # What has failed must come to its end, or its app would never be deployed again.
            log.exception("left to the sweep", deployment=task.deployment_id)
        return False

    async def _finish(self, status: Status, **changes: Any) -> None:
        """Record the end, once all of the log is stored, and let go of it."""
        _, lines = await self._open()
        await lines.close()
        self.finishing = True
        await self._write(
            **{"reason": "", "message": "", **changes},
            status=status,
            finished_at=After(0),
            lease_owner=None,
            lease_expires_at=None,
        )

    async def _write(self, **changes: Any) -> None:
        """Record and tell changes as soon as the database takes them. Raises LeaseLost, CancelRequested."""
        # They quote what builds, apps and repositories say.
        for text in ("message", "commit_message"):
            if changes.get(text):
                changes[text] = masking.masked(changes[text], self._secrets)
        await self._stubbornly(lambda connection: self._write_once(connection, changes), last="finished_at" in changes)

    async def _write_once(self, connection: Connection, changes: dict[str, Any]) -> None:
        async with connection.transaction():
            before = await leases.hold(connection, self.deployment.id, self.owner)
            if before.cancel_requested and before.status == Status.DEPLOYING and not self._ending:
                raise CancelRequested
            if changes.get("status") == Status.LIVE and before.status != Status.LIVE:
                await leases.retire_others(connection, before)
            written = await record.write(connection, before, **changes)
            if before.status == Status.LIVE and written.status == Status.FAILED:
                await leases.reinstate(connection, written)
            if "finished_at" in changes:
                # The next one of the app can begin.
                await connection.execute("NOTIFY deployments")
        self.deployment = written

    async def _stubbornly(self, once: Callable[[Connection], Awaitable[T]], *, last: bool = False) -> T | None:
        """What `once` returns, however long the database is away: whoever holds the lease cancels this in time.

        `last`: it gives the lease up, so that one which is lost after a failure is one that was written.
        """
        failures = 0
        while True:
            try:
                async with self._pool.acquire() as connection:
                    return await once(connection)
            except LeaseLost:
                if last and failures:
                    return None
                raise
            except UNAVAILABLE as error:
                failures += 1
                log.warning("database away", deployment=self.deployment.id, error=str(error) or type(error).__name__)
                await asyncio.sleep(backoff(failures, cap=1.0))

    def _say(self, text: str) -> None:
        if self._opened is not None:
            self._opened[1].say(text)

    async def _open(self) -> tuple[Task, DeploymentLog]:
        """The task and its log, made once. Raises LeaseLost where the row is gone."""
        if self._opened is None:
            try:
                await self._stubbornly(self._open_once)
            except NotFound as error:
                raise LeaseLost(str(error)) from error
        if self._opened is None:
            raise AssertionError("opened")
        return self._opened

    async def _open_once(self, connection: Connection) -> None:
        deployment = self.deployment
        try:
            app, secrets = await record.recipe(connection, deployment, self._keys)
        except SecretsUnreadable as error:
            self._unfit = StepFailed("SecretsUnreadable", str(error))
            app, secrets = AppSettings(), AppSecrets()
        self._secrets = [*secrets.values(), *masking.credentials(deployment.repo_url)]
        lines = DeploymentLog(
            self._pool,
            deployment_id=deployment.id,
            app_id=deployment.app_id,
            owner=self.owner,
            secrets=self._secrets,
            limit=self._settings.log_bytes,
            on_stored=self._on_stored,
        )
        if await lines.resume(connection):
            lines.say("\nAnother worker goes on.\n")
        try:
            await directories.make(self._directory)
        except OSError as error:
            self._unfit = StepFailed("NoDirectory", f"The worker cannot write to DEPLOY_DIR: {error.strerror}.")
        task = Task(
            app_id=deployment.app_id,
            app_name=deployment.app_name,
            workspace_id=deployment.workspace_id,
            deployment_id=deployment.id,
            number=deployment.number,
            repo_url=deployment.repo_url,
            branch=deployment.branch,
            commit_id=deployment.commit_id,
            settings=app,
            secrets=secrets,
            directory=self._directory,
            say=lines.say,
            image=deployment.image if deployment.cause == "rollback" else None,
        )
        self._writer = asyncio.create_task(lines.run(), name=f"log of deployment {deployment.id}")
        self._opened = task, lines


def _worn_out(step: str) -> str:
    return (
        f"The worker has died {MAX_DEATHS} times during this deployment, the last time "
        + (f"in the step {step}" if step else "before its first step")
        + ": perhaps it takes more memory than there is."
    )
