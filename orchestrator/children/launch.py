"""The last step before a session's process: limits itself, ties its life to ours, and becomes the program.

Run as a file of its own, `python -I -S launch.py parent=PID [limit=N ...] -- PROGRAM [ARGUMENT ...]`, so that nothing
has to run between fork and exec in the orchestrator, where threads make that unsafe (subprocess, "preexec_fn"). Imports
little: it runs for every process that is started.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1
# What a shell answers: sysexits have nothing that fits better.
CANNOT_RUN, NOT_FOUND = 126, 127

# The name of each option and the limit that it sets. `memory` is the private writable memory (setrlimit(2), RLIMIT_DATA
# since Linux 4.7): RLIMIT_AS would count what runtimes such as V8 reserve and never touch, tens of gigabytes.
_LIMITS = {
    "memory": resource.RLIMIT_DATA,
    "cpu_seconds": resource.RLIMIT_CPU,
    "file_bytes": resource.RLIMIT_FSIZE,
}


def parse(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The options before `--` and the command after it."""
    end = arguments.index("--")
    return dict(argument.split("=", 1) for argument in arguments[:end]), list(arguments[end + 1 :])


def die_with(parent: int) -> None:
    """Be killed when the process that started us ends, however it ends (prctl(2), PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # It may have ended before the call.
    if os.getppid() != parent:
        os._exit(CANNOT_RUN)


def limit(options: dict[str, str]) -> None:
    """Set the limits that are given, lower ones that are there already staying, and never leave a core file."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for name, kind in _LIMITS.items():
        if name in options:
            hard = resource.getrlimit(kind)[1]
            most = int(options[name])
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(kind, (most, most))
    if "cpus" in options:
        os.sched_setaffinity(0, [int(cpu) for cpu in options["cpus"].split(",")])


def main(arguments: Sequence[str]) -> int:
    """Become the program; returns only when that fails."""
    options, command = parse(arguments)
    die_with(int(options["parent"]))
    limit(options)
    # Python ignores it, and what is ignored stays so over exec. SIGXFSZ is left ignored: a file that gets too large is
    # then an error that the program can tell of, instead of its death.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        os.execv(command[0], command)  # noqa: S606  No shell is wanted.
    except OSError as error:
        os.write(2, f"cannot run {command[0]}: {error.strerror}\n".encode())
        return NOT_FOUND if isinstance(error, FileNotFoundError) else CANNOT_RUN


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
