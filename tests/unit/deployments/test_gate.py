"""The program that a container's health check runs."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import pytest

from orchestrator.deployments import gate
from orchestrator.deployments.contract import StepFailed

MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}


@pytest.mark.parametrize(("arch", "machine"), [("amd64", 62), ("arm64", 183)])
def test_it_is_one_small_static_program_for_each_machine(arch: str, machine: int) -> None:
    program = gate.program(arch)
    assert program[:7] == b"\x7fELF\x02\x01\x01"
    assert int.from_bytes(program[18:20], "little") == machine
    assert len(program) == 323
    # What the instructions refer to is where they look for it.
    assert program[120 + 0xA0 :] == b"/.cluster-code/open\0/dev/shm/.cluster-code\0"


def test_other_machines_are_told_so() -> None:
    with pytest.raises(StepFailed, match="Apps run on amd64 and arm64; the Docker engine's machine is riscv64"):
        gate.program("riscv64")


def test_a_gate_that_was_never_opened_is_closed(tmp_path: Path) -> None:
    assert not Path("/.cluster-code/open").exists()
    program = tmp_path / "gate"
    program.write_bytes(gate.program(MACHINES[platform.machine()]))
    program.chmod(0o755)
    assert os.access(program, os.X_OK)
    assert subprocess.run([program], check=False, timeout=30).returncode == 1
