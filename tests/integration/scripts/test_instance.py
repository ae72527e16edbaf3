"""The data directory: who holds it, and what is found in it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.deployments.secrets import Keyring
from orchestrator.errors import SettingsError
from scripts.instance import Instance, InUse, Running

_HOLDER = """
import sys
from pathlib import Path
from scripts.instance import Instance
with Instance(Path(sys.argv[1])).hold("the other"), Instance(Path(sys.argv[1])).announce("http://there", None):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def instance(tmp_path: Path) -> Instance:
    return Instance(tmp_path / "data")


def test_it_is_held_by_one_at_a_time(instance: Instance) -> None:
    assert not instance.held
    with instance.hold("one"):
        assert instance.held
        with pytest.raises(InUse) as caught, Instance(instance.directory).hold("two"):
            pass
        assert str(caught.value) == f"DATA_DIR: {instance.directory} is in use by one (pid {os.getpid()})"
    assert not instance.held
    with instance.hold("two"):
        assert instance.held


def test_a_server_is_found_while_it_is_announced(instance: Instance) -> None:
    assert instance.running() is None
    with instance.hold("dev"):
        assert instance.running() is None
        with instance.announce("http://here", "postgresql://here"):
            assert instance.running() == Running(os.getpid(), "http://here", "postgresql://here")
        assert instance.running() is None


def test_what_a_killed_process_left_does_not_count(instance: Instance) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(instance.directory)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[3],
    ) as process:  # fmt: skip
        assert process.stdout.readline() == b"held\n"
        assert instance.running() == Running(process.pid, "http://there", None)
        process.kill()
    assert (instance.directory / "dev.json").exists()
    assert instance.running() is None
    with instance.hold("dev"):
        assert not (instance.directory / "dev.json").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}'])
def test_an_announcement_that_cannot_be_read_is_one_line(instance: Instance, text: str) -> None:
    with instance.hold("dev"):
        (instance.directory / "dev.json").write_text(text)
        with pytest.raises(SettingsError, match=r"DATA_DIR: cannot read .*dev\.json"):
            instance.running()


def test_a_directory_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    instance = Instance(tmp_path / "file" / "data")
    message = f"DATA_DIR: cannot use {instance.directory}: Not a directory"
    with pytest.raises(SettingsError) as caught, instance.hold("dev"):
        pass
    assert str(caught.value) == message
    with pytest.raises(SettingsError) as caught:
        instance.running()
    assert str(caught.value) == message
    with pytest.raises(SettingsError) as caught:
        instance.jwt_secret()
    assert str(caught.value) == message


def test_secrets_are_made_once_and_for_the_owner_only(instance: Instance) -> None:
    instance.directory.mkdir()
    secret = instance.jwt_secret()
    assert len(secret) == 64
    assert instance.jwt_secret() == secret
    key = instance.secrets_key()
    assert Keyring([key])
    assert instance.secrets_key() == key
    assert sorted(path.name for path in instance.directory.iterdir()) == ["jwt-secret", "secrets-key"]
    for path in instance.directory.iterdir():
        assert path.stat().st_mode & 0o777 == 0o600
