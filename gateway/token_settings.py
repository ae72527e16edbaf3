"""How the settings of tokens come from the environment: `auth` itself knows no environment."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from environs import Env

from auth.settings import AlgorithmName, TokenSettings
from orchestrator.errors import SettingsError
from orchestrator.settings import load, positive, variable

_ALGORITHMS = ("HS256", "EdDSA", "RS256")


def _known_algorithm(value: str) -> str | None:
    return None if value in _ALGORITHMS else f"must be one of {', '.join(_ALGORITHMS)}, not {value!r}"


@dataclass(frozen=True, slots=True)
class TokenVariables:
    """The variables, as they are set."""

    secret: str = variable("JWT_SECRET", "str", "", help="Secret of HS256 tokens, at least 32 bytes.", secret=True)
    algorithm: str = variable("JWT_ALGORITHM", "str", "HS256", help="HS256, EdDSA or RS256.", check=_known_algorithm)
    private_key_file: str = variable(
        "JWT_PRIVATE_KEY_FILE", "str", "", help="PEM file that EdDSA and RS256 tokens are signed with."
    )
    public_key_file: str = variable(
        "JWT_PUBLIC_KEY_FILE", "str", "", help="PEM file that EdDSA and RS256 tokens are checked with."
    )
    issuer: str = variable("JWT_ISSUER", "str", "cluster-code", help="`iss` of our tokens.")
    audience: str = variable("JWT_AUDIENCE", "str", "cluster-code", help="`aud` of our main tokens.")
    # Seconds.
    access_ttl: float = variable(
        "ACCESS_TOKEN_TTL", "float", 3600.0, help="Seconds that a main token lives.", check=positive
    )
    refresh_ttl: float = variable(
        "REFRESH_TOKEN_TTL", "float", 30 * 86400.0, help="Seconds that a refresh token lives.", check=positive
    )
    oidc_issuer: str = variable("OIDC_ISSUER", "str", "", help="`iss` of an outside issuer whose tokens are taken.")
    oidc_jwks_url: str = variable("OIDC_JWKS_URL", "str", "", help="Where the outside issuer's keys are.")
    oidc_audience: str = variable("OIDC_AUDIENCE", "str", "", help="`aud` of the outside issuer's tokens.")


def token_settings(env: Env, *, secret: str | None = None) -> TokenSettings:
    """Read and check all of them. `secret` stands in for a JWT_SECRET that is not set (the embedded mode makes one).

    Raises SettingsError, one line that says which variable is wrong and never what a secret is.
    """
    given = load(TokenVariables, env)
    if given.algorithm == "HS256" and not (given.secret or secret):
        raise SettingsError("JWT_SECRET is not set: HS256 tokens need a secret of at least 32 bytes")
    if given.algorithm != "HS256" and not given.private_key_file:
        raise SettingsError(f"JWT_PRIVATE_KEY_FILE is not set: {given.algorithm} tokens are signed with it")
    private_key = _read("JWT_PRIVATE_KEY_FILE", given.private_key_file)
    public_key = _read("JWT_PUBLIC_KEY_FILE", given.public_key_file)
    try:
        return TokenSettings(
            secret=given.secret or secret or "",
            algorithm=cast(AlgorithmName, given.algorithm),
            private_key=private_key,
            public_key=public_key,
            issuer=given.issuer,
            audience=given.audience,
            access_ttl=given.access_ttl,
            refresh_ttl=given.refresh_ttl,
            oidc_issuer=given.oidc_issuer or None,
            oidc_jwks_url=given.oidc_jwks_url or None,
            oidc_audience=given.oidc_audience or None,
        )
    except ValueError as error:
        raise SettingsError(f"the settings of tokens (JWT_*, OIDC_*, *_TOKEN_TTL) are wrong: {error}") from error


def _read(name: str, path: str) -> str | None:
    if not path:
        return None
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{name}: cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
