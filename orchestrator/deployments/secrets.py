"""What apps keep secret, encrypted at rest: AES-256-GCM under the keys of SECRETS_KEY.

The first key encrypts, all decrypt, so that a new one is put before the old ones and those are dropped when nothing is
encrypted under them any more. What is encrypted is bound to its app and its purpose: moved to another row it cannot be
read. A deployment's secrets are its app's, byte for byte, so that copying them takes no key.

    version (1 byte) · nonce (12 bytes) · ciphertext and tag
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Sequence

import orjson
from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key

from orchestrator.deployments.contract import AppSecrets
from orchestrator.errors import Invalid, SecretsUnreadable, SettingsError

_VERSION = b"\x01"
_NONCE = 12
_KEY = 32
_FIELDS = ("env", "deploy_key", "deploy_user", "deploy_token")


class Keyring:
    """The keys. False when there is none: then nothing can be kept secret."""

    __slots__ = ("_ciphers",)

    def __init__(self, keys: Sequence[str]) -> None:
        """`keys` as SECRETS_KEY has them. Raises SettingsError, which does not tell them."""
        self._ciphers = [AESGCM(_key(text, place)) for place, text in enumerate(keys, start=1)]

    def __bool__(self) -> bool:
        return bool(self._ciphers)

    def encrypt(self, plain: bytes, *, app_id: int, purpose: str, field: str) -> bytes:
        """For this app and purpose only. Raises Invalid for `field`, saying what to do, when there is no key."""
        if not self._ciphers:
            raise Invalid("Nothing can be kept secret here: an administrator must set SECRETS_KEY first.", field=field)
        nonce = os.urandom(_NONCE)
        return _VERSION + nonce + self._ciphers[0].encrypt(nonce, plain, _bound(app_id, purpose))

    def decrypt(self, sealed: bytes, *, app_id: int, purpose: str) -> bytes:
        """Raises SecretsUnreadable when none of the keys is the one that it was encrypted with."""
        return self._open(sealed, app_id, purpose)[0]

    def renewed(self, sealed: bytes, *, app_id: int, purpose: str) -> bytes | None:
        """The same, encrypted with the first key; None when it is. Raises SecretsUnreadable."""
        plain, place = self._open(sealed, app_id, purpose)
        return self.encrypt(plain, app_id=app_id, purpose=purpose, field=purpose) if place else None

    def _open(self, sealed: bytes, app_id: int, purpose: str) -> tuple[bytes, int]:
        """What was encrypted, and with which of the keys."""
        nonce, rest = sealed[1 : 1 + _NONCE], sealed[1 + _NONCE :]
        if sealed[:1] == _VERSION and len(nonce) == _NONCE:
            for place, cipher in enumerate(self._ciphers):
                try:
                    return cipher.decrypt(nonce, rest, _bound(app_id, purpose)), place
                except InvalidTag:
                    continue
        raise SecretsUnreadable(
            "The app's secrets cannot be read: SECRETS_KEY lacks the key that they were encrypted with. Put it back, "
            "or remove all of them and give them anew."
        )

    def encrypt_secrets(self, secrets: AppSecrets, app_id: int) -> bytes | None:
        """As `apps.secrets` and `deployments.secrets` have them; None for none. Raises Invalid (`secrets`)."""
        given = {name: value for name in _FIELDS if (value := getattr(secrets, name))}
        if not given:
            return None
        return self.encrypt(orjson.dumps(given), app_id=app_id, purpose="secrets", field="secrets")

    def decrypt_secrets(self, sealed: bytes | None, app_id: int) -> AppSecrets:
        """What `encrypt_secrets` made of them. Raises SecretsUnreadable."""
        if sealed is None:
            return AppSecrets()
        return AppSecrets(**orjson.loads(self.decrypt(sealed, app_id=app_id, purpose="secrets")))


def _bound(app_id: int, purpose: str) -> bytes:
    return f"app {app_id} {purpose}".encode()


def _key(text: str, place: int) -> bytes:
    # Both alphabets of base64, with or without padding.
    text = text.strip().rstrip("=").replace("-", "+").replace("_", "/")
    try:
        key = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != _KEY:
        raise SettingsError(f"SECRETS_KEY: key {place} is not 32 bytes in base64 (`openssl rand -base64 32`)")
    return key


def deploy_key(text: str) -> str:
    """A private key as ssh reads it, with the line end that it insists on. Raises Invalid (`deploy_key`)."""
    key = text.replace("\r\n", "\n").strip() + "\n"
    load = load_ssh_private_key if key.startswith("-----BEGIN OPENSSH") else load_pem_private_key
    try:
        # Only the form is looked at: whether the primes of a large RSA key are such takes seconds, of everybody.
        load(key.encode(), password=None, unsafe_skip_rsa_key_validation=True)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        # Without the cause, which may quote the key.
        raise Invalid(
            "deploy_key must be a private key as ssh-keygen writes it, without a passphrase.", field="deploy_key"
        ) from None
    return key
