"""What a session's containers show, as an Observation: pure functions over what a Docker engine says of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from orchestrator.machine_kinds import SERVICES
from orchestrator.providers import docker_containers
from orchestrator.providers.contract import Endpoint, Endpoints, Observation, State
from orchestrator.providers.symptoms import plain

# The restart policy of a container that was stopped on purpose.
NOT_WANTED = "no"
# What the engine calls a container that does not run and that it does not start by itself.
_ENDED = frozenset({"created", "exited", "dead", "removing"})


@dataclass(frozen=True, slots=True)
class Sight:
    """One container, as the engine shows it."""

    id: str
    service: str
    # All services of its session.
    services: frozenset[str]
    made_from: str
    # Whether it shall run: `stop` takes that off it, and nothing else does.
    wanted: bool
    # The engine's word: created, running, paused, restarting, removing, exited or dead.
    status: str
    # Of the last run that has ended; `began` is of the one that goes on.
    exit_code: int
    out_of_memory: bool
    began: datetime | None
    ended: datetime | None
    # How often the engine has started it again since somebody started it.
    restarts: int
    # What its own check says: "" (it has none), starting, healthy or unhealthy; and its last words.
    health: str
    health_said: str
    # None: not reached from here.
    endpoint: Endpoint | None
    ready_path: str | None
    address: str | None
    # Of the engine's machine, that it is published at.
    published: int | None

    @property
    def stands_still(self) -> bool:
        """Whether it does not run, nor will by itself."""
        return self.status in _ENDED

    def up(self, now: datetime) -> float:
        """Seconds since it runs; 0: it does not."""
        return (now - self.began).total_seconds() if self.status == "running" and self.began else 0.0


@dataclass(slots=True)
class Memory:
    """What was seen of a container before, that the engine does not tell any more."""

    # When the run began that was found to be ready.
    ready: datetime | None = None
    # Restarts up to the last time that it was up for long.
    forgiven: int = 0
    # How the last run ended: exit code, and whether for want of memory.
    exit: tuple[int, bool] | None = None


@dataclass(frozen=True, slots=True)
class Rules:
    """Of `DockerOptions`."""

    crashes: int = 5
    stable_after: float = 60.0


@dataclass(frozen=True, slots=True)
class Scene:
    """A session's containers, and what is known besides."""

    sights: Sequence[Sight]
    # Whether there is a volume of the session.
    volume: bool = False
    memories: Mapping[str, Memory] = field(default_factory=dict)
    # By a container's id, why it is not ready though it runs.
    unready: Mapping[str, str] = field(default_factory=dict)
    # By a container's id, the last that it wrote.
    words: Mapping[str, Sequence[str]] = field(default_factory=dict)


def read(inspected: Mapping[str, Any], *, url_host: str | None) -> Sight:
    """A container from what the engine says of it. `url_host`: in place of the address that it is published at."""
    config, state = inspected["Config"], inspected["State"]
    marks = config["Labels"] or {}
    health = state.get("Health") or {}
    address = _address(inspected)
    path, port = marks.get(docker_containers.PATH, "/"), marks.get(docker_containers.PORT, "")
    at = _reached(inspected, port, address, url_host)
    return Sight(
        id=inspected["Id"],
        service=marks.get(docker_containers.SERVICE, ""),
        services=frozenset(docker_containers.services_of(marks)),
        made_from=marks.get(docker_containers.MADE_FROM, ""),
        wanted=inspected["HostConfig"]["RestartPolicy"]["Name"] != NOT_WANTED,
        status=state["Status"],
        exit_code=state["ExitCode"],
        out_of_memory=state["OOMKilled"],
        began=moment(state["StartedAt"]),
        ended=moment(state["FinishedAt"]),
        restarts=inspected["RestartCount"],
        health="" if health.get("Status") in (None, "none") else health["Status"],
        health_said=_last_check(health),
        endpoint=None if at is None else Endpoint(f"http://{at}{path}", path),
        ready_path=marks.get(docker_containers.READY),
        address=address,
        published=int(bound[0]["HostPort"]) if (bound := _bindings(inspected, port)) else None,
    )


def moment(text: str) -> datetime | None:
    """A time as the engine writes it, in UTC; None: never."""
    whole, _, rest = text.partition(".")
    fraction = rest.rstrip("Z")[:6]
    found = datetime.fromisoformat(f"{whole.rstrip('Z')}.{fraction:0<6}").replace(tzinfo=UTC)
    return found if found.year > 1 else None


def endpoints_of(sights: Collection[Sight]) -> Endpoints:
    """Where the services are reached, and the address of the first of them in its network."""
    by_service = {sight.service: sight for sight in sights}
    ordered = [by_service[name] for name in SERVICES if name in by_service]
    return Endpoints(
        ip_address=next((sight.address for sight in ordered if sight.address), None),
        **{sight.service: sight.endpoint for sight in ordered},
    )


def remember(memory: Memory, sight: Sight, rules: Rules, now: datetime) -> None:
    """Note what the engine will have forgotten by the next look."""
    if sight.up(now) >= rules.stable_after:
        memory.forgiven, memory.exit = sight.restarts, None
    elif sight.status in ("restarting", "exited"):
        memory.exit = (sight.exit_code, sight.out_of_memory)


def crashed(scene: Scene) -> Iterator[Sight]:
    """Those whose last words would tell more."""
    for sight in scene.sights:
        if sight.status == "restarting" or (_crashes(sight, scene) and not sight.stands_still):
            yield sight


def diagnose(scene: Scene, rules: Rules, now: datetime) -> Observation:
    """What the session is and why, without its endpoints. Never raises."""
    sights = scene.sights
    if all(sight.stands_still for sight in sights):
        if sights or scene.volume:
            return Observation(State.STOPPED, "Stopped", "Its files are there; nothing runs.")
        return Observation(State.ABSENT, "Absent", "There is nothing of it here.")
    missing = sights[0].services - {sight.service for sight in sights if not sight.stands_still}
    if missing:
        names = ", ".join(name for name in SERVICES if name in missing)
        return Observation(State.ABSENT, "Incomplete", f"{names} was stopped or removed by hand.")
    loops = [sight for sight in sights if _loops(sight, scene, rules, now)]
    if loops:
        return Observation(State.FAILED, *_loop(loops[0], scene))
    for sight in sights:
        if sight.status == "restarting" or _often(sight, scene, rules, now):
            return Observation(
                State.STARTING, "Restarting", f"{sight.service} {_exit(sight, scene)}. It is being started again."
            )
        if sight.status == "paused":
            return Observation(State.STARTING, "Paused", f"{sight.service} was paused by hand: have it unpaused.")
        if sight.health == "unhealthy":
            said = f": {sight.health_said}" if sight.health_said else ""
            return Observation(State.STARTING, "Unhealthy", f"The health check of {sight.service} fails{said}.")
    for sight in sights:
        if sight.health == "starting":
            said = f"The health check of {sight.service} has not succeeded yet."
            return Observation(State.STARTING, "NotReady", said)
        if problem := scene.unready.get(sight.id):
            return Observation(State.STARTING, "NotReady", f"{sight.service} is not ready yet: {problem}.")
    return Observation(State.RUNNING, "Ready", "All services answer.")


def last_words(lines: Sequence[str]) -> str:
    """The end of what a container wrote, as a part of a sentence."""
    told = next((line for line in reversed(lines) if line.strip()), "")
    return f"; its last line: {plain(told)}" if told else ""


def _crashes(sight: Sight, scene: Scene) -> int:
    """How often it was started again in a row."""
    memory = scene.memories.get(sight.id)
    return sight.restarts - (memory.forgiven if memory is not None else 0)


def _often(sight: Sight, scene: Scene, rules: Rules, now: datetime) -> bool:
    return _crashes(sight, scene) >= rules.crashes and sight.up(now) < rules.stable_after


def _loops(sight: Sight, scene: Scene, rules: Rules, now: datetime) -> bool:
    if not _often(sight, scene, rules, now):
        return False
    if sight.status == "running":
        # How the last run ended the engine tells in between only; a loop comes there again.
        return _ending(sight, scene)[0] is not None
    # The run that has just ended may have been a long one.
    ran = sight.began and sight.ended and (sight.ended - sight.began).total_seconds()
    return not ran or ran < rules.stable_after


def _loop(sight: Sight, scene: Scene) -> tuple[str, str]:
    times = f"{_crashes(sight, scene)} times in a row{last_words(scene.words.get(sight.id, ()))}"
    code, out_of_memory = _ending(sight, scene)
    if out_of_memory:
        what = "was killed, since it used more memory than it may"
        return "OOMKilled", f"{sight.service} {what}, {times}; give it more memory in the machine config."
    return "CrashLoop", f"{sight.service} {_words_of(code)}, {times}."


def _ending(sight: Sight, scene: Scene) -> tuple[int | None, bool]:
    if sight.status == "restarting":
        return sight.exit_code, sight.out_of_memory
    memory = scene.memories.get(sight.id)
    return memory.exit if memory is not None and memory.exit is not None else (None, False)


def _exit(sight: Sight, scene: Scene) -> str:
    code, out_of_memory = _ending(sight, scene)
    what = "was killed, since it used more memory than it may" if out_of_memory else _words_of(code)
    return what + last_words(scene.words.get(sight.id, ()))


def _words_of(code: int | None) -> str:
    if code is None:
        return "ended"
    if code in (126, 127):
        return f"ended with exit code {code} (its command cannot be run)"
    if 128 < code < 160:
        return f"ended with exit code {code} (signal {code - 128})"
    return f"ended with exit code {code}"


def _address(inspected: Mapping[str, Any]) -> str | None:
    networks = (inspected["NetworkSettings"].get("Networks") or {}).values()
    return next((network["IPAddress"] for network in networks if network["IPAddress"]), None)


def _reached(inspected: Mapping[str, Any], port: str, address: str | None, url_host: str | None) -> str | None:
    """`host:port`."""
    if not _bindings(inspected, port):
        return f"{address}:{port}" if address else None
    published = (inspected["NetworkSettings"].get("Ports") or {}).get(f"{port}/tcp") or []
    if not published:
        return None
    host = url_host or published[0]["HostIp"]
    return f"[{host}]:{published[0]['HostPort']}" if ":" in host else f"{host}:{published[0]['HostPort']}"


def _bindings(inspected: Mapping[str, Any], port: str) -> Sequence[Mapping[str, str]]:
    """What was asked for when it was made."""
    found: Sequence[Mapping[str, str]] = (inspected["HostConfig"].get("PortBindings") or {}).get(f"{port}/tcp") or ()
    return found


def _last_check(health: Mapping[str, Any]) -> str:
    said = (health.get("Log") or [{}])[-1].get("Output", "")
    return plain(said)
