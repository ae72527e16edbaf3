"""The providers that are open in this process: opened, changed and closed as the table `providers` says.

Each is watched (what happens to its sessions by themselves; by a bridge, where it is of such a kind) and checked
regularly (`providers.state`). One whose sessions live in the process that opened it is opened by one orchestrator at a
time: the others wait for its lock (`holds`), leave its sessions alone meanwhile, and take them over when its holder
dies.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any, Protocol, TypeAlias

import structlog

from orchestrator import credentials
from orchestrator.database import UNAVAILABLE, Pool, backoff
from orchestrator.errors import ClusterCodeError, HeldElsewhere, ProviderUnavailable, SettingsError
from orchestrator.holds import Holds
from orchestrator.providers.contract import IN_PROCESS, WATCHED, Follower, LogSink, Observation, Provider
from orchestrator.sessions import leases

log = structlog.get_logger("providers")

# Seconds between two checks of each provider, and how long one may take.
CHECK_INTERVAL = 15.0
CHECK_DEADLINE = 10.0
# Seconds between two looks for what another orchestrator has let go of.
LOOK_INTERVAL = 1.0
# Seconds after which `checked_at` is written although nothing changed.
TOUCH_INTERVAL = 60.0
# Seconds for which a bridge that broke counts as broken: more than pass until it is tried again, and breaks again.
BROKEN_FOR = 60.0
# Seconds that a provider gets to close.
CLOSE_DEADLINE = 30.0


class OpenProvider(Protocol):
    """Makes the provider of a row: `providers.registry.open_provider`, or a test's."""

    def __call__(
        self,
        kind: str,
        name: str,
        options: Mapping[str, Any],
        *,
        endpoint: str | None,
        credentials: Mapping[str, str],
        data_dir: Path,
        sink: LogSink,
    ) -> Provider:
        """Raises ClusterCodeError when these do not make a provider. `credentials` are values, not references."""
        ...


# Looks after all sessions of a provider by its id and name, until cancelled: a bridge those of a kind in WATCHED, what
# follows output those of a Follower.
RunBridge: TypeAlias = Callable[[int, str, Any], Coroutine[Any, Any, None]]
# Told of a session's id and what its provider saw.
OnObservation: TypeAlias = Callable[[int, Observation], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class _Config:
    name: str
    kind: str
    endpoint: str | None
    options: Mapping[str, Any]
    # References: what they stand for is read when the provider is opened.
    credentials: Mapping[str, Any]
    enabled: bool

    @property
    def exclusive(self) -> bool:
        """Whether one orchestrator at a time may have it open."""
        return self.enabled and self.kind in IN_PROCESS


@dataclass(slots=True)
class _Member:
    """One row. `provider` is None when it is not open: `why` says so to the users of its sessions.

    `elsewhere`: another orchestrator has it open, or will have in a moment.
    """

    config: _Config
    # What it was opened with. Never logged.
    credentials: Mapping[str, str] = field(default_factory=dict, repr=False)
    provider: Provider | None = None
    why: str = ""
    elsewhere: bool = False
    # What looks after its sessions and their output while it is open.
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    # What the bridge died of last, and until when that is told (monotonic).
    broken: str = ""
    broken_until: float = field(default=0.0)
    # What was last written: (state, message), and when (monotonic).
    told: tuple[str, str] | None = None
    told_at: float = field(default=0.0)


class Fleet:
    """All providers of the table. `refresh` before use, `look` about once a second, `close` at the end."""

    def __init__(
        self,
        pool: Pool,
        holds: Holds,
        open_provider: OpenProvider,
        *,
        data_dir: Path,
        sink: LogSink,
        on_observation: OnObservation,
        on_change: Callable[[], None],
        run_bridge: RunBridge,
        follow: RunBridge,
    ) -> None:
        self._pool = pool
        self._holds = holds
        self._open_provider = open_provider
        self._data_dir = data_dir
        self._sink = sink
        self._on_observation = on_observation
        self._on_change = on_change
        self._run_bridge = run_bridge
        self._follow = follow
        self._members: dict[int, _Member] = {}
        self._held: frozenset[int] = frozenset()
        self._refreshing = asyncio.Lock()
        self._closed = False

    async def find(self, provider_id: int | None) -> Provider:
        """The open provider with this id, looked up in the table when it is new.

        Raises ProviderUnavailable, saying why there is none, HeldElsewhere, and what is in `database.UNAVAILABLE`.
        """
        if provider_id is not None and provider_id not in self._members:
            await self.refresh()
        member = self._members.get(provider_id) if provider_id is not None else None
        if member is None:
            raise ProviderUnavailable("The session's provider was removed.")
        if member.elsewhere:
            raise HeldElsewhere(member.why)
        if member.provider is None:
            raise ProviderUnavailable(member.why)
        return member.provider

    @property
    def held(self) -> frozenset[int]:
        """The providers that this orchestrator alone has open."""
        return self._held

    @property
    def watched(self) -> list[int]:
        """The open providers whose sessions a bridge looks after."""
        return [
            provider_id
            for provider_id, member in self._members.items()
            if member.provider is not None and member.config.kind in WATCHED
        ]

    @property
    def elsewhere(self) -> list[int]:
        """The providers that another orchestrator has open alone."""
        return [provider_id for provider_id, member in self._members.items() if member.elsewhere]

    def states(self) -> list[tuple[str, str, str]]:
        """`(name, kind, state)` of each that this orchestrator looks after, as it was found at the last check."""
        return [
            (member.config.name, member.config.kind, member.told[0] if member.told else "unknown")
            for member in self._members.values()
            if member.config.enabled and not member.elsewhere
        ]

    async def look(self) -> None:
        """Take what another orchestrator has let go of, and let go of what it has taken."""
        async with self._refreshing:
            exclusive = [provider_id for provider_id, member in self._members.items() if member.config.exclusive]
            if self._closed or await self._holds.look(exclusive) == self._held:
                return
        await self.refresh()

    async def refresh(self) -> None:
        """Open, reopen and close providers as the table says now, and as this orchestrator holds them."""
        async with self._refreshing:
            if self._closed:
                return
            async with self._pool.acquire() as connection:
                rows = await connection.fetch(
                    "SELECT id, name, kind, endpoint, options, credentials, enabled FROM providers ORDER BY id"
                )
            wanted = {row["id"]: _Config(*list(row)[1:]) for row in rows}
            found = await asyncio.to_thread(_resolved, wanted)
            changed = False
            for provider_id in [*self._members]:
                member = self._members[provider_id]
                config = wanted.get(provider_id)
                # One that could not be opened may fare better now; credentials are renewed where they lie.
                same = config == member.config and not _renewed(member, found.get(provider_id))
                if same and (member.provider or member.elsewhere or not member.config.enabled):
                    continue
                changed = changed or member.config != config
                await self._discard(provider_id)
            held = await self._holds.look([key for key, config in wanted.items() if config.exclusive])
            if taken := held - self._held:
                await self._take_over(taken)
            for provider_id in self._members.keys() & (held ^ self._held):
                # What another orchestrator has now, whose sessions it starts, must not run here, too.
                changed = True
                await self._discard(provider_id)
            self._held = held
            for provider_id, config in wanted.items():
                if provider_id in self._members:
                    continue
                if config.exclusive and provider_id not in held:
                    why = f"Another orchestrator runs the provider {config.name!r}."
                    self._members[provider_id] = _Member(config, why=why, elsewhere=True)
                else:
                    self._members[provider_id] = self._open(provider_id, config, found.get(provider_id, {}))
                    changed = True
        if changed:
            self._on_change()

    async def _take_over(self, provider_ids: Collection[int]) -> None:
        """Whoever worked on these providers' sessions does so no more: it has died, or they are none of its own now."""
        async with self._pool.acquire() as connection:
            count = await leases.void(connection, provider_ids)
        log.info("providers are ours now", providers=sorted(provider_ids), interrupted=count)

    async def _discard(self, provider_id: int) -> None:
        member = self._members.pop(provider_id)
        if member.provider is not None:
            await self._close(member)

    async def check(self) -> None:
        """Ask each open provider whether it can be used, all at once, and write down what changed."""
        members = {
            key: member for key, member in self._members.items() if member.config.enabled and not member.elsewhere
        }
        states = await asyncio.gather(*(_state(member) for member in members.values()))
        for (provider_id, member), state in zip(members.items(), states, strict=True):
            if state == member.told and monotonic() < member.told_at + TOUCH_INTERVAL:
                continue
            await self._tell(provider_id, state)
            recovered = state[0] == "up" and member.told is not None and member.told[0] != "up"
            if state != member.told:
                log.info("provider checked", provider=member.config.name, state=state[0], message=state[1])
            member.told, member.told_at = state, monotonic()
            if recovered:
                self._on_change()

    async def close(self) -> None:
        """Close all, each within a deadline."""
        self._closed = True
        async with self._refreshing:
            members, self._members = list(self._members.values()), {}
            await asyncio.gather(*(self._close(member) for member in members if member.provider is not None))
            # Not before: another orchestrator begins as soon as it can.
            self._holds.close()

    async def _tell(self, provider_id: int, state: tuple[str, str]) -> None:
        async with self._pool.acquire() as connection, connection.transaction():
            before = await connection.fetchval(
                "SELECT state FROM providers WHERE id = $1 FOR NO KEY UPDATE", provider_id
            )
            await connection.execute(
                "UPDATE providers SET state = $2, message = $3, checked_at = now() WHERE id = $1", provider_id, *state
            )
            if state[0] == "up" and before == "down":
                # Its sessions need not wait for the end of their back-off.
                await connection.execute(
                    """WITH due AS (
                           UPDATE sessions SET next_attempt_at = now()
                            WHERE id = ANY (ARRAY(
                                  SELECT id FROM sessions
                                   WHERE provider_id = $1 AND stale AND next_attempt_at > now()
                                     -- Whoever holds one looks after it just now.
                                     FOR NO KEY UPDATE SKIP LOCKED)) RETURNING id)
                       SELECT pg_notify('sessions', '') FROM due LIMIT 1""",
                    provider_id,
                )

    def _open(self, provider_id: int, config: _Config, found: Mapping[str, str] | SettingsError) -> _Member:
        member = _Member(config)
        if not config.enabled:
            member.why = f"The provider {config.name!r} is disabled."
            return member
        if isinstance(found, SettingsError):
            member.why = f"The provider {config.name!r} cannot be opened: {found}"
            return member
        member.credentials = found
        try:
            member.provider = self._open_provider(
                config.kind,
                config.name,
                config.options,
                endpoint=config.endpoint,
                credentials=found,
                data_dir=self._data_dir,
                sink=self._sink,
            )
        except Exception as error:
            reason = str(error) if isinstance(error, ClusterCodeError) else type(error).__name__
            member.why = f"The provider {config.name!r} cannot be opened: {reason}"
            log.exception("provider cannot be opened", provider=config.name, kind=config.kind)
            return member
        log.info("provider opened", provider=config.name, kind=config.kind)
        if config.kind in WATCHED:
            watch = self._bridge(provider_id, member, member.provider)
        else:
            watch = self._watch(config.name, member.provider)
        member.tasks.append(asyncio.create_task(watch, name=f"watch {config.name}"))
        if isinstance(member.provider, Follower):
            output = self._follow(provider_id, config.name, member.provider)
            member.tasks.append(asyncio.create_task(output, name=f"output of {config.name}"))
        return member

    async def _close(self, member: _Member) -> None:
        for task in member.tasks:
            task.cancel()
        if member.tasks:
            await asyncio.wait(member.tasks)
        try:
            if member.provider is not None:
                async with asyncio.timeout(CLOSE_DEADLINE):
                    await member.provider.close()
        except Exception:
            log.exception("provider does not close", provider=member.config.name)
        log.info("provider closed", provider=member.config.name)

    async def _watch(self, name: str, provider: Provider) -> None:
        """Pass on what a provider reports, for ever: a report that the database could not take is passed on again."""
        failures = 0
        while True:
            began = monotonic()
            try:
                async for ref, observation in provider.watch():
                    await self._pass_on(name, ref.session_id, observation)
                log.warning("watch ended by itself", provider=name)
            except ProviderUnavailable as error:
                log.warning("watch lost", provider=name, error=str(error))
            except Exception:
                log.exception("watch broke", provider=name)
            failures = failures + 1 if monotonic() - began < TOUCH_INTERVAL else 1
            await asyncio.sleep(backoff(failures, cap=30.0))

    async def _bridge(self, provider_id: int, member: _Member, provider: Provider) -> None:
        """Run the provider's bridge, for ever, whatever it dies of."""
        name, failures = member.config.name, 0
        while True:
            began = monotonic()
            try:
                await self._run_bridge(provider_id, name, provider)
                log.warning("bridge ended by itself", provider=name)
            except Exception as error:
                log.exception("bridge broke", provider=name)
                member.broken, member.broken_until = type(error).__name__, monotonic() + BROKEN_FOR
            failures = failures + 1 if monotonic() - began < TOUCH_INTERVAL else 1
            await asyncio.sleep(backoff(failures, cap=30.0))

    async def _pass_on(self, name: str, session_id: int, observation: Observation) -> None:
        failures = 0
        while True:
            try:
                return await self._on_observation(session_id, observation)
            except UNAVAILABLE as error:
                failures += 1
                log.warning("report waits", provider=name, error=str(error) or type(error).__name__, failures=failures)
                await asyncio.sleep(backoff(failures))


def _resolved(configs: Mapping[int, _Config]) -> dict[int, Mapping[str, str] | SettingsError]:
    """The credentials of each provider that names any, or why they cannot be had. Blocks for the disk."""
    found: dict[int, Mapping[str, str] | SettingsError] = {}
    for provider_id, config in configs.items():
        if config.enabled and config.credentials:
            try:
                found[provider_id] = credentials.resolve(config.credentials)
            except SettingsError as error:
                found[provider_id] = error
    return found


def _renewed(member: _Member, found: Mapping[str, str] | SettingsError | None) -> bool:
    """Whether an open provider has old credentials. While new ones are missing, the old ones do."""
    return member.provider is not None and isinstance(found, Mapping) and found != member.credentials


async def _state(member: _Member) -> tuple[str, str]:
    """`(state, message)` as the table has them."""
    if member.provider is None:
        return "down", member.why
    try:
        async with asyncio.timeout(CHECK_DEADLINE):
            await member.provider.check()
    except ProviderUnavailable as error:
        return "down", str(error)
    except TimeoutError:
        return "down", f"The provider did not answer within {CHECK_DEADLINE:.0f} seconds."
    except Exception as error:
        log.exception("check failed", provider=member.config.name)
        return "down", f"The check failed unexpectedly ({type(error).__name__})."
    if monotonic() < member.broken_until:
        return "down", (
            "What happens in the cluster is not followed: that failed unexpectedly, and is tried again"
            f" ({member.broken}). The orchestrator's log says more."
        )
    return "up", ""
