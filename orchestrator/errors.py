"""The errors of the domain, in one tree.

The gateway turns each into a problem document, the admin commands into a line.

    ClusterCodeError
    ├── SettingsError            a setting is missing or wrong; the process exits with 2
    │   └── Unreachable          nothing answers where it points; perhaps later
    ├── SchemaOutdated           the database lacks migrations; the process exits with 2
    ├── NotFound                 no such object, or the caller may not see it              404
    ├── Conflict                 the object is in a state that forbids the request         409
    │   └── InUse                …which others' use of it is: it says whose
    │   └── SecretsUnreadable    …since no key of SECRETS_KEY opens what it keeps secret
    ├── Invalid                  well-formed, but wrong in a way that only the domain knows  422
    └── Unavailable              something outside does not answer; try again later         503
        ├── LogUnavailable       the event log
        └── ProviderUnavailable  the place where sessions run
    ProviderFailure              the provider did answer: this session cannot run, and why
    └── RolledBack               …but what ran before runs again (`providers.contract`)
    ApiRefused                   the Kubernetes API did answer, and refuses one request
    EngineRefused                the Docker engine did answer, and refuses one request
    └── ImagePullFailed          …since an image cannot be pulled, and why

Errors of identity live beside it, in `auth.errors`. Every message is a sentence for the person who will read it: what
was wrong, where, and what to do. None ever holds a secret.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class ClusterCodeError(Exception):
    """The base of all the errors that we raise on purpose."""


class SettingsError(ClusterCodeError):
    """A setting is missing or wrong."""


class Unreachable(SettingsError):
    """Nothing answers where a setting points: it is wrong, or what it points at is away."""


class SchemaOutdated(ClusterCodeError):
    """The database lacks migrations that this version of the code needs."""


class NotFound(ClusterCodeError):
    """No such object, or one that the caller may not see: the two are told alike on purpose."""


class Conflict(ClusterCodeError):
    """The object is in a state that forbids the request.

    `retry_after` (seconds) is set where waiting helps.
    """

    def __init__(self, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class SecretsUnreadable(Conflict):
    """No key of ours opens what is kept encrypted."""


class InUse(Conflict):
    """What is used by others stays. `by`: whose use it is, by kind, as JSON can hold it."""

    def __init__(self, message: str, **by: Any) -> None:
        super().__init__(message)
        self.by = by


class Invalid(ClusterCodeError):
    """A value that only the domain can tell to be wrong. `field` names it as the client does.

    `errors`, by field, are for where several are.
    """

    def __init__(self, message: str, *, field: str, errors: Mapping[str, Sequence[str]] | None = None) -> None:
        super().__init__(message)
        self.field = field
        self.errors = errors or {field: [message]}


class Unavailable(ClusterCodeError):
    """Something outside does not answer; the same request may succeed later."""


class LogUnavailable(Unavailable):
    """The event log does not take or give events now."""


class ProviderUnavailable(Unavailable):
    """The provider cannot be reached: says nothing about any session, whose last known status stands, marked stale.

    `retry_after` are the seconds that it asks to be left alone, where it does.
    """

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ProviderFailure(ClusterCodeError):
    """The provider answered that this session cannot run.

    `reason` is a CamelCase word for programs (`CloneFailed`, `ImagePull`, `CrashLoop`); the message is for the user.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class HeldElsewhere(ClusterCodeError):
    """Another orchestrator runs this provider, and looks after its sessions."""


class ApiRefused(ClusterCodeError):
    """The Kubernetes API answered a request with an error.

    `status` is HTTP's, `reason` the API's own word for it (`NotFound`, `Forbidden`, `AlreadyExists`, `Expired`, …; ""
    when the answer had none), `retry_after` the seconds it asks to wait, `details` its `status.details`. The message is
    the API's. What does not answer at all, or with 5xx or 429, is ProviderUnavailable.
    """

    def __init__(
        self,
        status: int,
        reason: str,
        message: str,
        *,
        retry_after: float | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.retry_after = retry_after
        self.details = details or {}


class EngineRefused(ClusterCodeError):
    """A Docker engine answered a request with an error: `status` is HTTP's, the message the engine's."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class ImagePullFailed(EngineRefused):
    """An image cannot be pulled. The message is for the user, and so is `reason`, a CamelCase word for programs:

    `ImageNotFound`, `RegistryUnauthorized` or `RegistryUnreachable`.
    """

    def __init__(self, reason: str, message: str, *, status: int = 500) -> None:
        super().__init__(status, message)
        self.reason = reason
