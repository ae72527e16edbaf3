"""The gate of a container: whether Traefik sends it requests, while it runs.

Labels of a container cannot be changed, and Traefik sends requests to whatever runs and has them, unless it has a
health check that does not say `healthy`. So each container of an app has a health check that says whether a file is
there that can be executed, `/.cluster-code/open`; we put it in, or put one in its place that cannot be.

Docker begins a check by making a process in the container, which takes 50 ms of a processor: far too much for each app
in each second. So a check does not look once and end: it waits, looking every 100 ms, until what it would say differs
from what was said last, for 30 seconds at most. A change is so told at once, and an open gate takes two processes a
minute.
What was said last is kept in /dev/shm, which each start of a container begins anew: a folder is there while the last
check has said `healthy` and none has begun since. A check that was killed leaves none, and so the next tells at once.

    held = rmdir("/dev/shm/.cluster-code") succeeds
    repeat 300 times if held, 5 times if not:
        opened = access("/.cluster-code/open", executable)
        stop if opened differs from held
        sleep 100 ms
    if opened: mkdir("/dev/shm/.cluster-code")
    exit with 0 if opened, 1 if not

An image may be made of nothing but one program, so the check is a program of its own that needs nothing else: 320 bytes
that are written out below, each instruction with its name.
"""

from __future__ import annotations

import asyncio
import io
import struct
import tarfile
from typing import Any

from orchestrator.deployments.contract import StepFailed
from orchestrator.docker.engine import Engine

_FOLDER = ".cluster-code"
_PROGRAM = f"{_FOLDER}/gate"
_DOOR = f"{_FOLDER}/open"
_MARK = "/dev/shm/.cluster-code"  # noqa: S108  In the container.

# In nanoseconds. It takes this long from a container's start to its first check, and from one check to the next.
_INTERVAL = 250_000_000
# A check ends by itself after 30 seconds; where a container gets little of the processor it takes longer.
_TIMEOUT = 3600 * 1_000_000_000
# So many checks in a row must say no: one that could not begin, for want of memory, must not take an app off.
_RETRIES = 2

# Seconds between two looks at what the engine says of a gate.
_LOOK = 0.05

_AMD64 = """
41 bd 9c ff ff ff     mov r13d, AT_FDCWD
44 89 ef              mov edi, r13d
48 8d 35 a4 00 00 00  lea rsi, mark
ba 00 02 00 00        mov edx, AT_REMOVEDIR
b8 07 01 00 00        mov eax, unlinkat
0f 05                 syscall
31 ed                 xor ebp, ebp          # ebp: 0 if held, 1 if not
bb 2c 01 00 00        mov ebx, 300          # ebx: looks that are left
85 c0                 test eax, eax
74 07                 jz look
ff c5                 inc ebp
bb 05 00 00 00        mov ebx, 5
44 89 ef        look: mov edi, r13d
48 8d 35 68 00 00 00  lea rsi, door
ba 01 00 00 00        mov edx, X_OK
b8 0d 01 00 00        mov eax, faccessat
0f 05                 syscall
45 31 e4              xor r12d, r12d        # r12: 0 if opened, 1 if not
85 c0                 test eax, eax
41 0f 95 c4           setnz r12b
41 39 ec              cmp r12d, ebp
75 16                 jne tell
ff cb                 dec ebx
74 12                 jz tell
48 8d 3d 33 00 00 00  lea rdi, pause
31 f6                 xor esi, esi
b8 23 00 00 00        mov eax, nanosleep
0f 05                 syscall
eb c6                 jmp look
45 85 e4        tell: test r12d, r12d
75 16                 jnz leave
44 89 ef              mov edi, r13d
48 8d 35 3d 00 00 00  lea rsi, mark
ba c0 01 00 00        mov edx, 0700
b8 02 01 00 00        mov eax, mkdirat
0f 05                 syscall
44 89 e7       leave: mov edi, r12d
b8 e7 00 00 00        mov eax, exit_group
0f 05                 syscall
0f 1f 00              nop
"""
_ARM64 = """
60 0c 80 92           mov x0, AT_FDCWD
81 05 00 10           adr x1, mark
02 40 80 d2           mov x2, AT_REMOVEDIR
68 04 80 d2           mov x8, unlinkat
01 00 00 d4           svc 0
13 00 80 d2           mov x19, 0            # x19: 0 if held, 1 if not
94 25 80 d2           mov x20, 300          # x20: looks that are left
60 00 00 b4           cbz x0, look
33 00 80 d2           mov x19, 1
b4 00 80 d2           mov x20, 5
60 0c 80 92     look: mov x0, AT_FDCWD
a1 03 00 10           adr x1, door
22 00 80 d2           mov x2, X_OK
08 06 80 d2           mov x8, faccessat
01 00 00 d4           svc 0
1f 00 00 f1           cmp x0, 0
f5 07 9f 9a           cset x21, ne          # x21: 0 if opened, 1 if not
bf 02 13 eb           cmp x21, x19
01 01 00 54           b.ne tell
94 06 00 f1           subs x20, x20, 1
c0 00 00 54           b.eq tell
e0 01 00 10           adr x0, pause
01 00 80 d2           mov x1, 0
a8 0c 80 d2           mov x8, nanosleep
01 00 00 d4           svc 0
f1 ff ff 17           b look
d5 00 00 b5     tell: cbnz x21, leave
60 0c 80 92           mov x0, AT_FDCWD
21 02 00 10           adr x1, mark
02 38 80 d2           mov x2, 0700
48 04 80 d2           mov x8, mkdirat
01 00 00 d4           svc 0
e0 03 15 aa    leave: mov x0, x21
c8 0b 80 d2           mov x8, exit_group
01 00 00 d4           svc 0
1f 20 03 d5           nop
"""
# By what an engine calls its machine; with the number that ELF has for it.
_MACHINES = {"amd64": (62, _AMD64), "arm64": (183, _ARM64)}
_BASE = 0x400000
_HEADERS = 64 + 56


def health_check() -> dict[str, Any]:
    """The `Healthcheck` of a container that has a gate. It says `healthy` while the gate is open."""
    return {"Test": ["CMD", f"/{_PROGRAM}"], "Interval": _INTERVAL, "Timeout": _TIMEOUT, "Retries": _RETRIES}


def program(arch: str) -> bytes:
    """What a check runs, as an ELF file. Raises StepFailed (`UnsupportedPlatform`)."""
    if arch not in _MACHINES:
        raise StepFailed("UnsupportedPlatform", f"Apps run on amd64 and arm64; the Docker engine's machine is {arch}.")
    machine, listing = _MACHINES[arch]
    code = b"".join(bytes.fromhex(line[:22].partition("  ")[0]) for line in listing.strip().splitlines())
    # `pause`, `door` and `mark` follow the code, in the places that it knows them by.
    body = code + struct.pack("<qq", 0, 100_000_000) + f"/{_DOOR}\0{_MARK}\0".encode()
    size = _HEADERS + len(body)
    identity = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header = struct.pack("<HHIQQQIHHHHHH", 2, machine, 1, _BASE + _HEADERS, 64, 0, 0, 64, 56, 1, 64, 0, 0)
    # One segment that is read and executed: all of the file.
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, _BASE, _BASE, size, size, 0x10000)
    return identity + header + segment + body


async def install(engine: Engine, container: str) -> None:
    """Put the check into a container that was made and not started, its gate closed. Raises StepFailed."""
    arch = (await engine.json("GET", "/version"))["Arch"]
    await engine.containers.put_archive(container, "/", _tar(_PROGRAM, program(arch), 0o755))


async def swing(engine: Engine, container: str, *, opened: bool) -> None:
    """Open the gate of a container, or close it. The engine knows of the one in 100 ms, of the other in a second."""
    await engine.containers.put_archive(container, "/", _tar(_DOOR, b"", 0o755 if opened else 0o644))


async def opens(engine: Engine, container: str) -> None:
    """Return when the engine says that the gate is open, or that the container does not run. Has no deadline."""
    while is_running(found := await engine.containers.inspect(container)) and not is_open(found):  # noqa: ASYNC110
        await asyncio.sleep(_LOOK)


async def closes(engine: Engine, container: str) -> None:
    """Return when the engine no longer says that the gate is open. Has no deadline."""
    while is_open(await engine.containers.inspect(container)):  # noqa: ASYNC110  What changes is elsewhere.
        await asyncio.sleep(_LOOK)


def is_running(found: dict[str, Any] | None) -> bool:
    """Whether a container runs, by what the engine says of it (`inspect`)."""
    return found is not None and bool(found["State"]["Running"])


def is_open(found: dict[str, Any] | None) -> bool:
    """Whether Traefik sends requests to a container: it runs, and no check says otherwise."""
    if found is None or not found["State"]["Running"]:
        return False
    return bool((found["State"].get("Health") or {"Status": "healthy"})["Status"] in ("healthy", "none"))


def _tar(name: str, content: bytes, mode: int) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        folder = tarfile.TarInfo(_FOLDER)
        folder.type, folder.mode = tarfile.DIRTYPE, 0o755
        archive.addfile(folder)
        file = tarfile.TarInfo(name)
        file.mode, file.size = mode, len(content)
        archive.addfile(file, io.BytesIO(content))
    return packed.getvalue()
