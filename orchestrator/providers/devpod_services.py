"""The services of a session in its container: a shell script that starts them there, and what its output means.

DevPod knows nothing of services: it lets a command run in the container over a connection of its own. A service must
outlive that connection (a network that stumbles, an orchestrator that is replaced), so the script leaves each in the
background, under a loop that starts it again when it ends, and then follows what they write to files. Run again, it
leaves alone what runs as it is to run. It needs a shell and the common commands (POSIX, and `tail -F`), busybox's will
do.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.providers.devpod_home import fingerprint

# Begins a line of ours in a service's file. No program prints it by accident.
_MARK = "\x1e"
# Lines of each file that are read when the following begins: those since our mark count, it is never far back.
_BACKLOG = 1000
# Bytes of output that are kept in the container, for each service.
_MOST_BYTES = 16 << 20

# Run as `sh -c LOOP cluster-code-preview-1f2e… FOLDER DIRECTORY preview COMMAND…`. A life of a minute is no crash.
_LOOP = r"""
cd "$1" || exit 1
d=$2 n=$3; shift 3
echo $$ >"$d/$n.pid"
trap '' HUP
trap '[ -z "$p" ] || kill "$p"; exit 0' TERM
delay=1
while :; do
  began=$(date +%s)
  "$@" >>"$d/$n.log" 2>&1 </dev/null & p=$!
  wait "$p"; code=$?
  [ $(($(date +%s) - began)) -lt 60 ] || delay=1
  printf '\036ended %s %s\n' "$code" "$delay" >>"$d/$n.log"
  sleep "$delay"
  [ "$delay" -ge 30 ] || delay=$((delay * 2))
done
"""
_BEGIN = r"""
d=${TMPDIR:-/tmp}/.cluster-code-$(id -u)
mkdir -p "$d" && chmod 700 "$d" || exit 1
leader=; command -v setsid >/dev/null 2>&1 && leader=setsid
runs() { [ -n "$1" ] && tr '\0' ' ' <"/proc/$1/cmdline" 2>/dev/null | grep -qF "$2"; }
service() {
  n=$1 mark=$2; shift 2
  pid=$(cat "$d/$n.pid" 2>/dev/null)
  if ! runs "$pid" " $mark "; then
    runs "$pid" " cluster-code-$n-" && kill "$pid"
    : >"$d/$n.log"
    $leader sh -c "$loop" "$mark" "$folder" "$d" "$n" "$@" </dev/null >/dev/null 2>&1 &
  fi
  printf '\036follow %s\n' "$token" >>"$d/$n.log"
}
"""
_FOLLOW = r"""
cd "$d" || exit 1
while sleep 60 && kill -0 $$ 2>/dev/null; do
  for f in *.log; do [ "$(wc -c <"$f")" -lt "$most" ] || : >"$f"; done
done </dev/null >/dev/null 2>&1 &
exec tail -v -n "$backlog" -F "$@"
"""


@dataclass(frozen=True, slots=True)
class Definition:
    """A service as a machine config has it."""

    name: str
    # Where it listens in the container.
    port: int
    path: str
    # The HTTP path that tells whether it is ready; None: it is as soon as it accepts connections.
    ready: str | None
    # None: the devcontainer.json starts it.
    command: tuple[str, ...] | None
    env: Mapping[str, str]


def define(services: Mapping[str, Mapping[str, Any]]) -> tuple[Definition, ...]:
    """The services of a machine config, which is valid."""
    return tuple(
        Definition(
            name,
            service["port"],
            service.get("path", "/"),
            service.get("ready"),
            tuple(service["command"]) if service.get("command") else None,
            service.get("env", {}),
        )
        for name, service in services.items()
    )


def script(services: Sequence[Definition], folder: str, token: str) -> str | None:
    """The command that starts the services that have one, and follows their output; None when none has.

    `folder` is where they start; `token` tells this following from others. To be run by any shell.
    """
    started = [service for service in services if service.command is not None]
    if not started:
        return None
    values = {"loop": _LOOP, "folder": folder, "token": token, "most": str(_MOST_BYTES), "backlog": str(_BACKLOG)}
    lines = [f"{name}={shlex.quote(value)}" for name, value in values.items()]
    lines.append(_BEGIN)
    for service in started:
        own = {"PORT": str(service.port), **service.env}
        words = ["env", *(f"{name}={value}" for name, value in own.items()), *(service.command or ())]
        mark = f"cluster-code-{service.name}-{fingerprint(folder, words)[:12]}"
        lines.append(shlex.join(["service", service.name, mark, *words]))
    lines.append(shlex.join(["set", "--", *(f"{service.name}.log" for service in started)]))
    return shlex.join(["exec", "sh", "-c", "\n".join([*lines, _FOLLOW])])


class Following:
    """Reads the output of `tail -v -F` of several files: whose each line is, beginning with our mark in its file."""

    def __init__(
        self,
        token: str,
        *,
        output: Callable[[str, str], None],
        ended: Callable[[str, int, int], None],
    ) -> None:
        """`output` takes a service and a line; `ended` a service, its exit code, and the seconds to its start."""
        self._token = token
        self._output = output
        self._ended = ended
        self._service = ""
        # Lines of each service that came before our mark: with more than could, the mark was not to be seen.
        self._before: dict[str, int] = {}
        self._followed: set[str] = set()
        # `tail` prints an empty line before each name.
        self._blank = False

    def __call__(self, line: str) -> None:
        """Take the next line."""
        if line.startswith("==> ") and line.endswith(".log <=="):
            self._service = line[4:-8]
            self._blank = False
            return
        if self._blank:
            self._blank = False
            self._take("")
        if line:
            self._take(line)
        else:
            self._blank = True

    def _take(self, line: str) -> None:
        service = self._service
        if line.startswith(_MARK):
            self._marked(service, line[1:].split())
        elif service in self._followed:
            self._output(service, line)
        else:
            self._before[service] = self._before.get(service, 0) + 1
            if self._before[service] > _BACKLOG:
                self._followed.add(service)

    def _marked(self, service: str, words: list[str]) -> None:
        if words[:1] == ["follow"]:
            if words[1:] == [self._token]:
                self._followed.add(service)
        elif words[:1] == ["ended"] and len(words) == 3 and service in self._followed:
            code, delay = words[1:]
            if code.isdecimal() and delay.isdecimal():
                self._ended(service, int(code), int(delay))
