"""What gateways tell and ask one another, over the event log: it reaches every replica, in order.

Each replica says that it is there, every HEARTBEAT seconds. So whoever asks all of them knows how many answers to wait
for, and can say whether the answer is complete. A question is an entry of the log, and so is each answer: replicas need
no way to each other but the one that they have anyhow.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Any

import structlog

from gateway.realtime.feed import Feed
from orchestrator.database import Wakeup
from orchestrator.errors import LogUnavailable
from orchestrator.eventlog.contract import EventLog
from orchestrator.events import GATEWAY, Event

log = structlog.get_logger("gateway.replicas")

# `data` of each holds `replica`, the id of who says it.
# With `is_new` (a boolean), everybody else says so at once, too.
ALIVE = "gateway.alive"
GONE = "gateway.gone"
# `id`, `question` (its name) and `data`.
QUESTION = "gateway.question"
# `id` of the question, and `data`.
ANSWER = "gateway.answer"

# Seconds.
HEARTBEAT = 5.0
# A replica that has said nothing for so long is taken for dead: it has missed three heartbeats.
SILENCE = 3 * HEARTBEAT + 1
# How long to wait for the answers of the others.
DEADLINE = 1.0
# How long the goodbye may take.
_GOODBYE = 1.0

# What a replica answers to the data of a question: anything that orjson can write.
Answer = Callable[[Mapping[str, Any]], Any]


@dataclass(frozen=True, slots=True)
class Answers:
    """What the replicas have answered, by their ids. `complete`: all that are known to live have."""

    by_replica: Mapping[str, Any]
    complete: bool


@dataclass(slots=True, eq=False)
class _Pending:
    expected: set[str]
    answers: dict[str, Any]
    done: asyncio.Event = field(default_factory=asyncio.Event)

    def take(self, replica: str, data: Any) -> None:
        self.answers[replica] = data
        self.look()

    def look(self) -> None:
        if self.expected <= self.answers.keys():
            self.done.set()


class Replicas:
    """This replica among the others. `run` it; the feed hands over what the others say."""

    def __init__(self, event_log: EventLog, feed: Feed) -> None:
        # The host is for the operator who looks for it.
        self.id = f"{socket.gethostname()[:64]}-{token_hex(4)}"
        # For the metrics: questions asked here, and those of them that some replica did not answer in time.
        self.asked = 0
        self.incomplete = 0
        self._log = event_log
        self._feed = feed
        self._questions: dict[str, Answer] = {}
        # Replicas, this one too, each with the loop time at which the log last told of it.
        self._heard: dict[str, float] = {}
        # The log has told of this one: what comes now is said now, and not what a starting feed reads.
        self._joined = False
        self._pending: dict[str, _Pending] = {}
        self._outgoing: list[Event] = []
        self._wakeup = Wakeup()
        feed.obey(ALIVE, self._alive)
        feed.obey(GONE, self._gone)
        feed.obey(QUESTION, self._question)
        feed.obey(ANSWER, self._answer)

    def on(self, question: str, answer: Answer) -> None:
        """Answer a question by calling `answer` with its data. It must be quick, and raise nothing."""
        self._questions[question] = answer

    @property
    def alive(self) -> set[str]:
        """The replicas that live, as far as this one knows; itself too, when it has lately heard itself."""
        oldest = asyncio.get_running_loop().time() - SILENCE
        self._heard = {replica: at for replica, at in self._heard.items() if at >= oldest}
        return set(self._heard)

    async def ask(self, question: str, data: Mapping[str, Any]) -> Answers:
        """Put a question to all replicas, this one too, and gather the answers for up to DEADLINE seconds.

        What is asked is done here even when the log is away; then the answers are not complete. Cancelling stops the
        waiting; the others may be asked all the same.
        """
        self.asked += 1
        alive = self.alive
        pending = _Pending(alive | {self.id}, {self.id: self._questions[question](data)})
        pending.look()
        number = token_hex(8)
        self._pending[number] = pending
        reason = "" if self.id in alive else "the log is not heard here"
        try:
            async with asyncio.timeout(DEADLINE):
                # Also when no other is known: one may have begun this very moment.
                await self._log.publish([self._event(QUESTION, id=number, question=question, data=data)])
                await pending.done.wait()
        except (TimeoutError, LogUnavailable) as error:
            reason = str(error) or "no answer in time"
        finally:
            del self._pending[number]
        if reason:
            self.incomplete += 1
            missing = sorted(pending.expected - pending.answers.keys())
            log.warning("not all replicas have answered", question=question, missing=missing, reason=reason)
        return Answers(pending.answers, complete=not reason)

    async def run(self) -> None:
        """Say that this replica is there, and answer, for ever. Cancelling says goodbye, for up to a second."""
        loop, beat = asyncio.get_running_loop(), 0.0
        try:
            while True:
                if (now := loop.time()) >= beat:
                    beat = now + HEARTBEAT
                    self._say(ALIVE, is_new=not self._joined)
                await self._publish()
                await self._wakeup.wait(max(0.0, beat - loop.time()))
        finally:
            with suppress(LogUnavailable, TimeoutError):
                async with asyncio.timeout(_GOODBYE):
                    await self._log.publish([self._event(GONE)])

    async def _publish(self) -> None:
        outgoing, self._outgoing = self._outgoing, []
        if outgoing:
            try:
                await self._log.publish(outgoing)
            except LogUnavailable as error:
                # Who asked says that the answer is not complete.
                log.warning("nothing can be told to the other replicas", error=str(error))

    def _say(self, event_type: str, **data: Any) -> None:
        self._outgoing.append(self._event(event_type, **data))
        self._wakeup.set()

    def _event(self, event_type: str, **data: Any) -> Event:
        return Event(event_type, GATEWAY, {"replica": self.id, **data})

    def _hear(self, data: Mapping[str, Any]) -> str | None:
        """Note who speaks, and return it; None for what was said before this replica joined."""
        replica: str = data["replica"]
        if replica == self.id:
            self._joined = True
        if not self._joined:
            return None
        self._heard[replica] = asyncio.get_running_loop().time()
        return replica

    def _alive(self, data: Mapping[str, Any]) -> None:
        if self._hear(data) not in (None, self.id) and data["is_new"]:
            log.info("another replica has begun", replica=data["replica"])
            self._say(ALIVE, is_new=False)

    def _gone(self, data: Mapping[str, Any]) -> None:
        if (replica := self._hear(data)) is not None:
            log.info("another replica has ended", replica=replica)
            del self._heard[replica]
            for pending in self._pending.values():
                pending.expected.discard(replica)
                pending.look()

    def _question(self, data: Mapping[str, Any]) -> None:
        answer = self._questions.get(data["question"])
        # One of a later version is not for this one; its own it has answered already.
        if self._hear(data) not in (None, self.id) and answer is not None:
            self._say(ANSWER, id=data["id"], data=answer(data["data"]))

    def _answer(self, data: Mapping[str, Any]) -> None:
        replica = self._hear(data)
        if replica is not None and (pending := self._pending.get(data["id"])) is not None:
            pending.take(replica, data["data"])
