from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from environs import Env

from gateway.token_settings import token_settings
from orchestrator.errors import SettingsError

SECRET = "kX3v9Qw7Lm2Zp8Rt5Yb1Nc6Hd4Gf0Js-"
ALL = [
    "JWT_SECRET", "JWT_ALGORITHM", "JWT_PRIVATE_KEY_FILE", "JWT_PUBLIC_KEY_FILE", "JWT_ISSUER", "JWT_AUDIENCE",
    "ACCESS_TOKEN_TTL", "REFRESH_TOKEN_TTL", "OIDC_ISSUER", "OIDC_JWKS_URL", "OIDC_AUDIENCE",
]  # fmt: skip


@pytest.fixture
def env(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ALL:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def pem(tmp_path: Path) -> Path:
    path = tmp_path / "key.pem"
    path.write_bytes(
        Ed25519PrivateKey.generate().private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return path


def test_every_variable_arrives(env: pytest.MonkeyPatch) -> None:
    given = {
        "JWT_SECRET": SECRET, "JWT_ISSUER": "us", "JWT_AUDIENCE": "them", "ACCESS_TOKEN_TTL": "60",
        "REFRESH_TOKEN_TTL": "120", "OIDC_ISSUER": "https://id.example.org", "OIDC_AUDIENCE": "cluster",
        "OIDC_JWKS_URL": "https://id.example.org/jwks",
    }  # fmt: skip
    for name, value in given.items():
        env.setenv(name, value)
    settings = token_settings(Env())
    assert (settings.secret, settings.issuer, settings.audience) == (SECRET, "us", "them")
    assert (settings.access_ttl, settings.refresh_ttl) == (60.0, 120.0)
    assert (settings.oidc_issuer, settings.oidc_jwks_url) == ("https://id.example.org", "https://id.example.org/jwks")
    assert settings.oidc_audience == "cluster"


def test_a_secret_of_the_callers_stands_in_for_one_that_is_not_set(env: pytest.MonkeyPatch) -> None:
    assert token_settings(Env(), secret=SECRET).secret == SECRET


def test_keys_come_from_files(env: pytest.MonkeyPatch, tmp_path: Path) -> None:
    env.setenv("JWT_ALGORITHM", "EdDSA")
    env.setenv("JWT_PRIVATE_KEY_FILE", str(pem(tmp_path)))
    settings = token_settings(Env())
    assert settings.private_key is not None
    assert settings.private_key.startswith("-----BEGIN PRIVATE KEY")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "JWT_SECRET is not set"),
        ({"JWT_SECRET": "short"}, "32 bytes"),
        ({"JWT_SECRET": SECRET, "JWT_ALGORITHM": "none"}, "JWT_ALGORITHM must be one of"),
        ({"JWT_SECRET": SECRET, "ACCESS_TOKEN_TTL": "0"}, "ACCESS_TOKEN_TTL must be greater than 0"),
        ({"JWT_SECRET": SECRET, "ACCESS_TOKEN_TTL": "soon"}, "ACCESS_TOKEN_TTL: 'soon'"),
        ({"JWT_ALGORITHM": "EdDSA"}, "JWT_PRIVATE_KEY_FILE is not set"),
        ({"JWT_ALGORITHM": "EdDSA", "JWT_PRIVATE_KEY_FILE": "/nowhere/key"}, "JWT_PRIVATE_KEY_FILE: cannot read"),
        ({"JWT_SECRET": SECRET, "OIDC_ISSUER": "https://id.example.org"}, "OIDC"),
    ],
)
def test_what_is_wrong_is_one_line_without_the_secret(
    env: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for name, value in variables.items():
        env.setenv(name, value)
    with pytest.raises(SettingsError, match=message) as refusal:
        token_settings(Env())
    assert "\n" not in str(refusal.value)
    assert SECRET not in str(refusal.value)


def test_a_key_file_that_is_no_text_is_refused(env: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(b"\xff\xfe\x00")
    env.setenv("JWT_ALGORITHM", "EdDSA")
    env.setenv("JWT_PRIVATE_KEY_FILE", str(path))
    with pytest.raises(SettingsError, match="JWT_PRIVATE_KEY_FILE: cannot read"):
        token_settings(Env())
