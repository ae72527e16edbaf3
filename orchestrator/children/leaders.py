"""The leaders of the services' sessions (setsid(2)), on file: the next process finds by them what ours leaves behind.

    {"boot": "…", "leaders": [[4711, 123456], …]}    the number of each, and when it began, in ticks since the boot

A process may empty its environment, and with it our markers; the session is harder to leave unseen. Everything here
blocks for the disk: call it in a thread.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path

import structlog

log = structlog.get_logger("provider.local")


class Leaders:
    """The leaders whose sessions may have living processes. For any thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # By our session and the leader's number. None: it had ended before we looked.
        self._began: dict[tuple[int, int], int | None] = {}
        self._writing = threading.Lock()

    def add(self, session_id: int, pid: int) -> None:
        """Remember the leader. What the disk refuses is logged: the session works without it."""
        with self._writing:
            self._began[session_id, pid] = _began(pid)
            self._write()

    def forget(self, session_id: int, pid: int | None = None) -> None:
        """Nothing is left of what the leader led; without one: of what any leader of our session did."""
        with self._writing:
            self._began = {
                key: began for key, began in self._began.items() if key[0] != session_id or pid not in (None, key[1])
            }
            self._write()

    def left(self) -> set[int]:
        """Those of the last process, as far as their numbers are still theirs. None when the file tells nothing.

        The kernel gives a number to nobody else while it is some process's session: who is in a session without a
        leader was its child. That fails only for a session that ended after the last process, and whose number then
        went to a daemon of the same user.
        """
        try:
            kept = json.loads(self._path.read_bytes())
            if kept["boot"] != _boot():
                return set()
            # 0 would be every session that began outside of our container.
            return {pid for pid, began in kept["leaders"] if int(pid) > 1 and _began(pid) in (None, began)}
        except (OSError, ValueError, TypeError, LookupError):
            return set()

    def clear(self) -> None:
        """Nothing is left of any."""
        with self._writing:
            self._began.clear()
            self._write()

    def _write(self) -> None:
        leaders = [[pid, began] for (_, pid), began in self._began.items()]
        new = self._path.with_suffix(".new")
        try:
            # Not synced: it is of no use after the machine has gone down.
            new.write_text(json.dumps({"boot": _boot(), "leaders": leaders}))
            new.replace(self._path)
        except OSError as error:
            log.warning("the leaders of the services' sessions cannot be written down", error=str(error))


def _boot() -> str:
    """What process numbers are valid for: this boot, and in a container, this run of it."""
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {_began(1)}"


def _began(pid: int) -> int | None:
    """When a process began, in ticks since the boot, which no change of the clock shifts; None: there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    # Field 22 of proc_pid_stat(5), counted behind the name, which may contain anything.
    return int(stat.rpartition(b")")[2].split()[19])
