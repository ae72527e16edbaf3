from __future__ import annotations

from itertools import product

import pytest

from auth.errors import Forbidden, NotVisible
from auth.permissions import TABLE, Action, Identity, Role, Scope, decide, has_scope

# The least role in the workspace and the least scope of the token; None: administrators only.
EXPECTED: dict[Action, tuple[str | None, str]] = {
    Action.WORKSPACE_READ: ("viewer", "read"),
    Action.WORKSPACE_UPDATE: ("admin", "write"),
    Action.WORKSPACE_DELETE: ("owner", "write"),
    Action.MEMBER_READ: ("viewer", "read"),
    Action.MEMBER_WRITE: ("admin", "write"),
    Action.PROJECT_READ: ("viewer", "read"),
    Action.PROJECT_WRITE: ("member", "write"),
    Action.PROJECT_DELETE: ("admin", "write"),
    Action.SESSION_READ: ("viewer", "read"),
    Action.SESSION_WRITE: ("member", "write"),
    Action.APP_READ: ("viewer", "read"),
    Action.APP_WRITE: ("member", "write"),
    Action.APP_DELETE: ("admin", "write"),
    Action.DEPLOYMENT_READ: ("viewer", "read"),
    Action.DEPLOYMENT_WRITE: ("member", "write"),
    Action.USER_ADMIN_READ: (None, "admin"),
    Action.USER_ADMIN_WRITE: (None, "admin"),
    Action.PROVIDER_WRITE: (None, "admin"),
    Action.MACHINE_CONFIG_WRITE: (None, "admin"),
    Action.CLUSTER_READ: (None, "admin"),
    Action.BROADCAST_PRESENCE: (None, "admin"),
    Action.CONNECTION_READ: (None, "admin"),
    Action.CONNECTION_CLOSE: (None, "admin"),
    Action.TOKEN_REVOKE: (None, "admin"),
}
ROLES = ["viewer", "member", "admin", "owner"]
SCOPES = ["read", "write", "admin"]
TOKENS: list[tuple[str, ...] | None] = [None, (), ("read",), ("write",), ("admin",), ("read", "write"), ("other",)]


def test_every_action_has_a_rule_and_an_expectation() -> None:
    assert set(TABLE) == set(Action) == set(EXPECTED)


def verdict(action: Action, role: Role | None, *, is_admin: bool, scopes: tuple[str, ...] | None) -> str:
    identity = Identity(1, "a@b", is_admin, scopes=None if scopes is None else frozenset(scopes))
    try:
        decide(identity, action, role, what="project")
    except NotVisible:
        return "not visible"
    except Forbidden:
        return "forbidden"
    return "allowed"


def expected(action: Action, role: Role | None, *, is_admin: bool, scopes: tuple[str, ...] | None) -> str:
    least_role, least_scope = EXPECTED[action]
    if not is_admin and least_role is not None and role is None:
        return "not visible"
    if scopes is not None and not any(scope in scopes for scope in SCOPES[SCOPES.index(least_scope) :]):
        return "forbidden"
    if is_admin:
        return "allowed"
    if least_role is None or role is None:
        return "forbidden"
    return "allowed" if ROLES.index(role.name.lower()) >= ROLES.index(least_role) else "forbidden"


@pytest.mark.parametrize("action", list(Action))
def test_each_role_each_scope_and_administrators_may_do_what_the_table_says(action: Action) -> None:
    for role, is_admin, scopes in product([None, *Role], [False, True], TOKENS):
        given = {"is_admin": is_admin, "scopes": scopes}
        assert verdict(action, role, **given) == expected(action, role, **given), (role, given)


def test_a_refusal_names_the_action_and_what_is_lacking() -> None:
    viewer = Identity(1, "a@b", is_admin=False)
    with pytest.raises(Forbidden, match=r"project\.write takes the role member in the workspace; yours is viewer"):
        decide(viewer, Action.PROJECT_WRITE, Role.VIEWER)
    with pytest.raises(NotVisible, match="There is no such session"):
        decide(viewer, Action.SESSION_READ, None, what="session")
    with pytest.raises(Forbidden, match="lacks the scope 'write'"):
        decide(Identity(1, "a@b", is_admin=True, scopes=frozenset({"read"})), Action.PROJECT_WRITE)
    with pytest.raises(Forbidden, match="Only administrators"):
        decide(viewer, Action.CLUSTER_READ, Role.OWNER)


def test_a_wider_scope_includes_the_narrower_ones() -> None:
    token = Identity(1, "a@b", is_admin=False, scopes=frozenset({"write"}))
    assert [has_scope(token, scope) for scope in Scope] == [True, True, False]
