"""What can be set about tokens. Wrong or unsafe settings are a ValueError, one clear line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias
from urllib.parse import urlsplit

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

AlgorithmName: TypeAlias = Literal["HS256", "EdDSA", "RS256"]
PrivateKey: TypeAlias = Ed25519PrivateKey | RSAPrivateKey
PublicKey: TypeAlias = Ed25519PublicKey | RSAPublicKey

# Bytes. RFC 7518, 3.2: a key for HS256 is at least as long as the hash.
SHORTEST_SECRET = 32
# Bits. RFC 7518, 3.3.
SHORTEST_RSA_KEY = 2048
# A secret with fewer different characters was typed, not drawn.
_FEWEST_CHARACTERS = 8
_EXAMPLES = ("changeme", "change-me", "change_me", "change this", "example", "placeholder", "default", "insecure")


@dataclass(frozen=True, slots=True)
class TokenSettings:
    """How tokens are signed and which are believed."""

    # For HS256: at least 32 random bytes.
    secret: str = field(default="", repr=False)
    algorithm: AlgorithmName = "HS256"
    # PEM, for EdDSA (Ed25519) and RS256. The public key follows from the private one; given too, it must belong to it.
    private_key: str | None = field(default=None, repr=False)
    public_key: str | None = None
    # `iss` and `aud` of main tokens. Short tokens have the audience `{audience}/ws`.
    issuer: str = "cluster-code"
    audience: str = "cluster-code"
    # Seconds that the clocks of this service's machines and the issuer's may differ.
    leeway: float = 10.0
    # Seconds that each kind of token lives.
    access_ttl: float = 3600.0
    short_ttl: float = 60.0
    refresh_ttl: float = 30 * 86400.0
    # The outside issuer whose tokens are believed as well; its `iss`, where its keys are, and the `aud` that means us.
    oidc_issuer: str | None = None
    oidc_jwks_url: str | None = None
    oidc_audience: str | None = None

    def __post_init__(self) -> None:
        """Check all of it. Raises ValueError."""
        if not self.issuer or not self.audience:
            raise ValueError("the issuer and the audience of tokens must not be empty")
        if self.leeway < 0:
            raise ValueError(f"the leeway must not be negative, and is {self.leeway:g}")
        for name in ("access_ttl", "short_ttl", "refresh_ttl"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be greater than 0 seconds, and is {getattr(self, name):g}")
        if self.algorithm == "HS256":
            _check_secret(self.secret)
        elif self.algorithm in ("EdDSA", "RS256"):
            self.load_keys()
        else:
            raise ValueError(f"the algorithm must be HS256, EdDSA or RS256, not {self.algorithm!r}")
        if self.oidc_issuer:
            self._check_oidc()

    def load_keys(self) -> tuple[PrivateKey, PublicKey]:
        """The pair of keys for EdDSA or RS256. Raises ValueError, without a word of the key, when there is none."""
        wanted: tuple[type[PrivateKey], str] = (
            (Ed25519PrivateKey, "Ed25519") if self.algorithm == "EdDSA" else (RSAPrivateKey, "RSA")
        )
        kind, kind_name = wanted
        if not self.private_key:
            raise ValueError(f"{self.algorithm} needs a private key: {kind_name}, PEM, without a pass phrase")
        try:
            private = load_pem_private_key(self.private_key.encode(), password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            # Not chained: the reasons of the parser may quote the key.
            raise ValueError("the private key is no PEM without a pass phrase that can be read") from None
        if not isinstance(private, kind):
            raise ValueError(f"{self.algorithm} needs an {kind_name} key, and the private key is of another kind")
        if isinstance(private, RSAPrivateKey) and private.key_size < SHORTEST_RSA_KEY:
            raise ValueError(f"the RSA key must have {SHORTEST_RSA_KEY} bits or more, and has {private.key_size}")
        public = private.public_key()
        if self.public_key and not _is_same(self.public_key, public):
            raise ValueError("the public key does not belong to the private key")
        return private, public

    def _check_oidc(self) -> None:
        if self.oidc_issuer == self.issuer:
            raise ValueError("the outside issuer must have another name than this service's own issuer")
        if not self.oidc_audience:
            raise ValueError(
                "the audience that outside tokens must have is not set: without it, tokens that the issuer made for "
                "others would be believed"
            )
        url = urlsplit(self.oidc_jwks_url or "")
        if url.scheme not in ("https", "http") or not url.netloc:
            raise ValueError("the URL of the outside issuer's keys (JWKS) must be given, and be https:// or http://")


def _check_secret(secret: str) -> None:
    size = len(secret.encode(errors="surrogatepass"))
    if size < SHORTEST_SECRET:
        raise ValueError(f"the secret that signs tokens must have {SHORTEST_SECRET} bytes or more, and has {size}")
    if len(set(secret)) < _FEWEST_CHARACTERS or any(example in secret.lower() for example in _EXAMPLES):
        raise ValueError("the secret that signs tokens is an example or made by hand: draw a random one")
    if secret.lstrip().startswith(("-----BEGIN", "ssh-", "{")):
        raise ValueError("the secret that signs tokens looks like a key: HS256 takes plain random characters")


def _is_same(pem: str, public: PublicKey) -> bool:
    try:
        given = load_pem_public_key(pem.encode())
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError("the public key is no PEM that can be read") from None
    der = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return given.public_bytes(*der) == public.public_bytes(*der)
