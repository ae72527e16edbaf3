"""What apps keep secret, at rest."""

from __future__ import annotations

import base64
import os

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from orchestrator.deployments.contract import AppSecrets
from orchestrator.deployments.secrets import Keyring, deploy_key
from orchestrator.errors import Invalid, SecretsUnreadable, SettingsError

SECRETS = AppSecrets(env={"TOKEN": "s3cret-ünï"}, deploy_key="-----BEGIN", deploy_user="ann", deploy_token="t0ken")


def _key() -> str:
    return base64.b64encode(os.urandom(32)).decode()


def test_secrets_come_back_and_are_not_to_be_seen_in_what_is_stored() -> None:
    keys = Keyring([_key()])
    sealed = keys.encrypt_secrets(SECRETS, 7)
    assert sealed is not None
    assert keys.decrypt_secrets(sealed, 7) == SECRETS
    for value in ("s3cret", "BEGIN", "t0ken", "TOKEN"):
        assert value.encode() not in sealed
        assert value not in repr(keys.decrypt_secrets(sealed, 7))
    assert keys.encrypt_secrets(SECRETS, 7) != sealed, "the same nonce twice"


def test_no_secrets_need_no_key() -> None:
    keys = Keyring([])
    assert not keys
    assert keys.encrypt_secrets(AppSecrets(), 7) is None
    assert keys.decrypt_secrets(None, 7) == AppSecrets()
    with pytest.raises(Invalid, match="SECRETS_KEY") as caught:
        keys.encrypt_secrets(SECRETS, 7)
    assert caught.value.field == "secrets"


def test_secrets_moved_to_another_app_or_purpose_cannot_be_read() -> None:
    keys = Keyring([_key()])
    sealed = keys.encrypt_secrets(SECRETS, 7) or b""
    with pytest.raises(SecretsUnreadable):
        keys.decrypt_secrets(sealed, 8)
    with pytest.raises(SecretsUnreadable):
        keys.decrypt(sealed, app_id=7, purpose="hook")


def test_the_first_key_encrypts_and_all_decrypt() -> None:
    old, new = _key(), _key()
    before = Keyring([old]).encrypt_secrets(SECRETS, 7)
    both = Keyring([new, old])
    assert both.decrypt_secrets(before, 7) == SECRETS
    after = both.encrypt_secrets(SECRETS, 7)
    assert Keyring([new]).decrypt_secrets(after, 7) == SECRETS
    for keys, sealed in ((Keyring([new]), before), (Keyring([old]), after), (Keyring([]), before)):
        with pytest.raises(SecretsUnreadable, match="SECRETS_KEY"):
            keys.decrypt_secrets(sealed, 7)


@pytest.mark.parametrize("place", [0, 1, 12, 13, -1])
def test_what_was_changed_in_the_database_is_refused(place: int) -> None:
    keys = Keyring([_key()])
    sealed = bytearray(keys.encrypt_secrets(SECRETS, 7) or b"")
    sealed[place] ^= 1
    with pytest.raises(SecretsUnreadable):
        keys.decrypt_secrets(bytes(sealed), 7)
    for short in range(15):
        with pytest.raises(SecretsUnreadable):
            keys.decrypt_secrets(bytes(sealed[:short]), 7)


def test_keys_are_taken_in_both_alphabets_with_or_without_padding() -> None:
    raw = b"\xfb\xff" * 16
    sealed = Keyring([base64.b64encode(raw).decode()]).encrypt_secrets(SECRETS, 7)
    for text in (base64.urlsafe_b64encode(raw).decode(), base64.b64encode(raw).decode().rstrip("=")):
        assert Keyring([f" {text}\n"]).decrypt_secrets(sealed, 7) == SECRETS


@pytest.mark.parametrize("key", ["", "not-base64!", base64.b64encode(b"short").decode(), "ü" * 44])
def test_a_wrong_key_stops_the_start_and_is_not_told(key: str) -> None:
    with pytest.raises(SettingsError, match="key 2 is not 32 bytes in base64") as caught:
        Keyring([_key(), key])
    assert not key or key not in str(caught.value)


def _private_keys() -> list[str]:
    openssh = (Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    keys = [ed25519.Ed25519PrivateKey.generate(), rsa.generate_private_key(65537, 2048)]
    written = [key.private_bytes(*openssh).decode() for key in keys]
    return [*written, keys[1].private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption()).decode()]


def test_a_deploy_key_is_kept_as_ssh_reads_it() -> None:
    for key in _private_keys():
        # As a browser's text field sends it.
        assert deploy_key(key.strip().replace("\n", "\r\n")) == key


def test_the_numbers_of_a_deploy_key_are_not_looked_into() -> None:
    # That the primes of a large key are primes would take seconds, for which nobody else is served.
    numbers = rsa.generate_private_key(65537, 2048).private_numbers()
    other = rsa.RSAPrivateNumbers(
        numbers.p, numbers.q, numbers.d + 2, numbers.dmp1, numbers.dmq1, numbers.iqmp, numbers.public_numbers
    ).private_key(unsafe_skip_rsa_key_validation=True)
    key = other.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()).decode()
    assert deploy_key(key) == key


def test_what_is_no_private_key_or_needs_a_passphrase_is_refused_and_not_repeated() -> None:
    locked = ed25519.Ed25519PrivateKey.generate().private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"passphrase")
    )
    (key, *_) = _private_keys()
    for wrong in ("nonsense", "ssh-ed25519 AAAA", key[: len(key) // 2], key.replace("b3Blb", "xxxxx"), locked.decode()):
        with pytest.raises(Invalid, match="without a passphrase") as caught:
            deploy_key(wrong)
        assert caught.value.field == "deploy_key"
        assert wrong not in str(caught.value)
        assert caught.value.__cause__ is None
