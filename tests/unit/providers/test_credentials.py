"""Credentials by reference: found where they lie, never told."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
import yaml

from orchestrator.credentials import resolve
from orchestrator.errors import SettingsError
from orchestrator.providers.kubeconfig import PrivateKubeconfig, text


def test_a_variable_and_a_file_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLUSTER_TOKEN", "abc")
    (file := tmp_path / "ca.pem").write_text("one\ntwo\r\n\n")
    references = {"token": {"env": "CLUSTER_TOKEN"}, "ca": {"file": str(file)}}
    assert resolve(references) == {"token": "abc", "ca": "one\ntwo"}
    assert resolve({}) == {}


def test_what_is_missing_is_named_and_what_is_there_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("ABSENT", raising=False)
    (tmp_path / "binary").write_bytes(b"secret\xff")
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "large").write_bytes(b"x" * ((1 << 20) + 1))
    references = {
        "a": {"env": "ABSENT"}, "b": {"env": "EMPTY"},
        **{name: {"file": str(tmp_path / name)} for name in ("absent", "binary", "empty", "large")},
    }  # fmt: skip
    with pytest.raises(SettingsError) as refused:
        resolve(references)
    assert str(refused.value) == (
        "its credential 'a' is missing: the environment variable ABSENT of this process is not set; "
        "its credential 'b' is missing: the environment variable EMPTY of this process is not set; "
        f"its credential 'absent' is missing: the file {tmp_path}/absent cannot be read (No such file or directory); "
        f"its credential 'binary' is missing: the file {tmp_path}/binary is no text; "
        f"its credential 'empty' is missing: the file {tmp_path}/empty is empty; "
        f"its credential 'large' is missing: the file {tmp_path}/large is larger than 1 MiB, which no credential is."
    )


def test_an_endpoint_and_its_token_are_a_kubeconfig() -> None:
    made = yaml.safe_load(text("https://k8s:6443", {"token": "abc", "certificate_authority": "PEM"}) or "")
    assert made["clusters"][0]["cluster"] == {
        "server": "https://k8s:6443",
        "certificate-authority-data": base64.b64encode(b"PEM").decode(),
    }
    assert made["users"][0]["user"] == {"token": "abc"}
    assert text(None, {"kubeconfig": "whole"}) == "whole"
    assert text(None, {}) is None


def test_a_private_kubeconfig_is_gone_with_its_provider() -> None:
    private = PrivateKubeconfig("text")
    assert Path(private.path).read_text() == "text"
    # Not on a disk.
    assert str(Path(private.path).readlink()).startswith("/memfd:")
    private.close()
    private.close()
    assert not Path(private.path).exists()
