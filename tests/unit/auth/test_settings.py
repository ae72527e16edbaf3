from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from auth.tokens import Tokens, TokenSettings

SECRET = "9f2c1b7d4e8a6053c1d2e3f4a5b6978812345678"


def pem(key: object, encryption: object = None) -> str:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption()).decode()


def public_pem(key: object) -> str:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


ED = ed25519.Ed25519PrivateKey.generate()
RSA = rsa.generate_private_key(65537, 2048)
OIDC = {"oidc_issuer": "https://issuer", "oidc_jwks_url": "https://issuer/keys", "oidc_audience": "us"}


@pytest.mark.parametrize(
    "given",
    [
        {"secret": SECRET},
        {"secret": SECRET, **OIDC},
        {"algorithm": "EdDSA", "private_key": pem(ED)},
        {"algorithm": "EdDSA", "private_key": pem(ED), "public_key": public_pem(ED)},
        {"algorithm": "RS256", "private_key": pem(RSA), "public_key": public_pem(RSA)},
    ],
)
def test_good_settings_are_taken_and_show_no_secret(given: dict[str, str]) -> None:
    settings = TokenSettings(**given)
    assert SECRET not in repr(settings)
    assert "PRIVATE" not in repr(settings)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "32 bytes or more, and has 0"),
        ({"secret": "x1y2z3"}, "32 bytes or more, and has 6"),
        ({"secret": "changeme-changeme-changeme-changeme"}, "is an example or made by hand"),
        ({"secret": "This-Is-An-Example-Secret-0123456789"}, "is an example or made by hand"),
        ({"secret": "0" * 64}, "is an example or made by hand"),
        ({"secret": public_pem(RSA)}, "looks like a key"),
        ({"secret": '{"kty": "oct", "k": "abcdefghijklmnopqrstuvwxyz"}'}, "looks like a key"),
        ({"secret": SECRET, "algorithm": "none"}, "must be HS256, EdDSA or RS256, not 'none'"),
        ({"secret": SECRET, "issuer": ""}, "must not be empty"),
        ({"secret": SECRET, "audience": ""}, "must not be empty"),
        ({"secret": SECRET, "leeway": -1}, "leeway must not be negative"),
        ({"secret": SECRET, "short_ttl": 0}, "short_ttl must be greater than 0"),
        ({"secret": SECRET, "access_ttl": float("nan")}, "access_ttl must be greater than 0"),
        ({"algorithm": "EdDSA", "secret": SECRET}, "needs a private key"),
        ({"algorithm": "EdDSA", "private_key": "junk"}, "no PEM"),
        ({"algorithm": "EdDSA", "private_key": public_pem(ED)}, "no PEM"),
        ({"algorithm": "EdDSA", "private_key": pem(ED, BestAvailableEncryption(b"x"))}, "no PEM without a pass phrase"),
        ({"algorithm": "EdDSA", "private_key": pem(RSA)}, "of another kind"),
        ({"algorithm": "RS256", "private_key": pem(ec.generate_private_key(ec.SECP256R1()))}, "of another kind"),
        ({"algorithm": "RS256", "private_key": pem(rsa.generate_private_key(65537, 1024))}, "2048 bits"),  # noqa: S505  It must be refused.
        ({"algorithm": "RS256", "private_key": pem(RSA), "public_key": public_pem(ED)}, "does not belong"),
        ({"algorithm": "RS256", "private_key": pem(RSA), "public_key": "junk"}, "no PEM"),
        ({"secret": SECRET, **OIDC, "oidc_issuer": "cluster-code"}, "another name"),
        ({"secret": SECRET, **OIDC, "oidc_audience": None}, "audience"),
        ({"secret": SECRET, **OIDC, "oidc_jwks_url": None}, "https://"),
        ({"secret": SECRET, **OIDC, "oidc_jwks_url": "file:///etc/passwd"}, "https://"),
    ],
)
def test_wrong_or_unsafe_settings_are_one_clear_line(given: dict[str, str], says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        TokenSettings(**given)
    message = str(caught.value)
    assert "\n" not in message
    for name in ("secret", "private_key"):
        assert not given.get(name) or given[name] not in message


def test_an_outside_issuer_needs_something_that_fetches() -> None:
    with pytest.raises(ValueError, match="fetch"):
        Tokens(TokenSettings(secret=SECRET, **OIDC))


def test_a_key_of_another_format_is_no_secret() -> None:
    with pytest.raises(ValueError, match="looks like a key") as caught:
        Tokens(TokenSettings(secret='[{"kty": "oct", "k": "abcdefghijklmnopqrstuvwxyz"}]'))
    assert "kty" not in str(caught.value)
