"""Who may do what: one table, one function that decides.

`decide` is pure. What it needs is looked up by its callers (`tenants.role_in`), so that each rule can be tested as a
row of the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum

from auth.errors import Forbidden, NotVisible


class Role(IntEnum):
    """A member's role in a workspace. Each includes what the lower ones may do."""

    VIEWER = 1
    MEMBER = 2
    ADMIN = 3
    OWNER = 4


class Scope(StrEnum):
    """What a token may be used for. A token without scopes may do all that its user may."""

    READ = "read"
    WRITE = "write"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Identity:
    """Who calls, by which token."""

    user_id: int
    email: str
    is_admin: bool
    # None: everything.
    scopes: frozenset[str] | None = None
    # Patterns of foreign channels, such as `app:*`, that the token names.
    channels: tuple[str, ...] = ()
    # Unix seconds at which the token ends; None: a token that never does.
    expires_at: float | None = None
    # The token's id (`jti` of a JWT, `api:{id}` of an API token).
    token_id: str = ""


@dataclass(frozen=True, slots=True)
class Rule:
    """The least role in the object's workspace, and the scope, that an action takes. No role: administrators only."""

    role: Role | None
    scope: Scope


class Action(StrEnum):
    """Everything that can be permitted."""

    WORKSPACE_READ = "workspace.read"
    WORKSPACE_UPDATE = "workspace.update"
    WORKSPACE_DELETE = "workspace.delete"
    MEMBER_READ = "member.read"
    MEMBER_WRITE = "member.write"
    PROJECT_READ = "project.read"
    PROJECT_WRITE = "project.write"
    PROJECT_DELETE = "project.delete"
    SESSION_READ = "session.read"
    SESSION_WRITE = "session.write"
    APP_READ = "app.read"
    APP_WRITE = "app.write"
    APP_DELETE = "app.delete"
    DEPLOYMENT_READ = "deployment.read"
    DEPLOYMENT_WRITE = "deployment.write"
    USER_ADMIN_READ = "user.admin-read"
    USER_ADMIN_WRITE = "user.admin-write"
    PROVIDER_WRITE = "provider.write"
    MACHINE_CONFIG_WRITE = "machine-config.write"
    CLUSTER_READ = "cluster.read"
    BROADCAST_PRESENCE = "broadcast.presence"
    CONNECTION_READ = "connection.read"
    CONNECTION_CLOSE = "connection.close"
    TOKEN_REVOKE = "token.revoke"  # noqa: S105  An action's name.


TABLE: dict[Action, Rule] = {
    Action.WORKSPACE_READ: Rule(Role.VIEWER, Scope.READ),
    Action.WORKSPACE_UPDATE: Rule(Role.ADMIN, Scope.WRITE),
    Action.WORKSPACE_DELETE: Rule(Role.OWNER, Scope.WRITE),
    Action.MEMBER_READ: Rule(Role.VIEWER, Scope.READ),
    Action.MEMBER_WRITE: Rule(Role.ADMIN, Scope.WRITE),
    Action.PROJECT_READ: Rule(Role.VIEWER, Scope.READ),
    Action.PROJECT_WRITE: Rule(Role.MEMBER, Scope.WRITE),
    Action.PROJECT_DELETE: Rule(Role.ADMIN, Scope.WRITE),
    Action.SESSION_READ: Rule(Role.VIEWER, Scope.READ),
    Action.SESSION_WRITE: Rule(Role.MEMBER, Scope.WRITE),
    Action.APP_READ: Rule(Role.VIEWER, Scope.READ),
    Action.APP_WRITE: Rule(Role.MEMBER, Scope.WRITE),
    Action.APP_DELETE: Rule(Role.ADMIN, Scope.WRITE),
    Action.DEPLOYMENT_READ: Rule(Role.VIEWER, Scope.READ),
    Action.DEPLOYMENT_WRITE: Rule(Role.MEMBER, Scope.WRITE),
    Action.USER_ADMIN_READ: Rule(None, Scope.ADMIN),
    Action.USER_ADMIN_WRITE: Rule(None, Scope.ADMIN),
    Action.PROVIDER_WRITE: Rule(None, Scope.ADMIN),
    Action.MACHINE_CONFIG_WRITE: Rule(None, Scope.ADMIN),
    Action.CLUSTER_READ: Rule(None, Scope.ADMIN),
    Action.BROADCAST_PRESENCE: Rule(None, Scope.ADMIN),
    Action.CONNECTION_READ: Rule(None, Scope.ADMIN),
    Action.CONNECTION_CLOSE: Rule(None, Scope.ADMIN),
    Action.TOKEN_REVOKE: Rule(None, Scope.ADMIN),
}


def has_scope(identity: Identity, scope: Scope) -> bool:
    """Whether the token may be used so. `write` includes `read`, `admin` includes both."""
    if identity.scopes is None:
        return True
    order = list(Scope)
    return any(wider in identity.scopes for wider in order[order.index(scope) :])


def decide(identity: Identity, action: Action, role: Role | None = None, *, what: str = "object") -> None:
    """Return when `identity`, holding `role` in the object's workspace (None: no member), may do `action`.

    Raises NotVisible when the caller may not even know that the object exists, Forbidden when it may see but not do.
    `what` names the object in the message. An administrator is the owner of everything, within its token's scopes.
    """
    rule = TABLE[action]
    if not identity.is_admin and rule.role is not None and role is None:
        raise NotVisible(f"There is no such {what}.")
    if not has_scope(identity, rule.scope):
        raise Forbidden(f"This token lacks the scope {rule.scope.value!r} that {action.value} takes.")
    if identity.is_admin:
        return
    if rule.role is None:
        raise Forbidden(f"Only administrators may do this ({action.value}).")
    if role is not None and role < rule.role:
        raise Forbidden(
            f"{action.value} takes the role {rule.role.name.lower()} in the workspace; yours is {role.name.lower()}."
        )
