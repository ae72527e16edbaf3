"""The errors of identity. The gateway answers the status that stands beside each.

AuthError
├── Unauthenticated   no credential, or one that is wrong, expired, spent or revoked   401
├── Forbidden         known, may see the object, but may not do this                   403
├── NotVisible        no such object, or one that the caller may not see               404
├── Taken             the name, address or membership exists already                   409
├── Unacceptable      well-formed, but not allowed (a role that may not be given)      422
└── IssuerUnavailable the outside issuer's keys cannot be fetched now                  503
"""

from __future__ import annotations


class AuthError(Exception):
    """The base of the errors of identity. Every message is a sentence for the person who reads it."""


class Unauthenticated(AuthError):
    """No credential, or one that is wrong, expired, spent or revoked. The message says which."""


class Forbidden(AuthError):
    """The caller may see the object, but may not do this to it."""


class NotVisible(AuthError):
    """No such object, or one that the caller may not see: the two are told alike on purpose."""


class Taken(AuthError):
    """What should be made exists already. `field` names the field as the client does."""

    def __init__(self, message: str, *, field: str) -> None:
        super().__init__(message)
        self.field = field


class Unacceptable(AuthError):
    """A value that identity refuses. `field` names it as the client does."""

    def __init__(self, message: str, *, field: str) -> None:
        super().__init__(message)
        self.field = field


class IssuerUnavailable(AuthError):
    """The keys of the outside issuer cannot be fetched now."""
