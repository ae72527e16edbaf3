"""Apps: what is deployed, and with what. What changes here is taken up by the next deployment.

A connection's jsonb codec must be set. Whoever calls opens the transaction.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from secrets import token_urlsafe
from typing import Any
from urllib.parse import urlsplit

from auth.errors import NotVisible, Taken
from orchestrator import events
from orchestrator.database import Connection
from orchestrator.deployments.contract import AppSecrets, AppSettings
from orchestrator.deployments.record import moment, own_channel, settings_of
from orchestrator.deployments.secrets import Keyring
from orchestrator.errors import Conflict, Invalid, NotFound
from orchestrator.eventlog import outbox
from orchestrator.events import Event

# Held while somebody looks whether a domain is free and takes it.
_DOMAINS_KEY = 0x646F6D61696E73
# Bytes.
_HOOK_SECRET = 32
# Of an app's secret variables, however many requests they came with; bytes, as of what one may bring.
_MOST_SECRETS = 256
_LARGEST_SECRETS = 256 << 10


@dataclass(frozen=True, slots=True)
class App:
    """A row of `apps`, with the deployment that serves. `secrets` and `hook_secret` are encrypted."""

    id: int
    workspace_id: int
    # None: the user was deleted.
    created_by: int | None
    name: str
    repo_url: str
    # None: the repository's own default branch.
    branch: str | None
    settings: AppSettings
    secrets: bytes | None = field(repr=False)
    hook_secret: bytes | None = field(repr=False)
    auto_deploy: bool
    deleting: bool
    message: str
    created_at: datetime
    updated_at: datetime
    live_deployment: int | None
    url: str | None


_LIVE = "(SELECT {} FROM deployments d WHERE d.app_id = apps.id AND d.status = 'live') AS {}"
_EXPRESSIONS = {"live_deployment": _LIVE.format("id", "live_deployment"), "url": _LIVE.format("url", "url")}
_COLUMNS = ", ".join(_EXPRESSIONS.get(declared.name, f"apps.{declared.name}") for declared in dataclasses.fields(App))
# Without what may be large, and is not shown there.
_IN_LISTS = _COLUMNS.replace("apps.settings", "apps.settings - '{env,build_args}'::text[] AS settings")


def public(app: App) -> dict[str, Any]:
    """The app as lists answer it and as events carry it: nothing secret, and nothing large."""
    settings = app.settings
    return {
        "id": app.id,
        "workspace_id": app.workspace_id,
        "created_by": app.created_by,
        "name": app.name,
        "repo_url": app.repo_url,
        "branch": app.branch,
        "dockerfile": settings.dockerfile,
        "port": settings.port,
        "health_path": settings.health_path,
        "cpu": settings.cpu,
        "memory": settings.memory_bytes,
        "domains": list(settings.domains),
        "keep_images": settings.keep_images,
        "auto_deploy": app.auto_deploy,
        "deleting": app.deleting,
        "message": app.message,
        "live_deployment": app.live_deployment,
        "url": app.url,
        "created_at": moment(app.created_at),
        "updated_at": moment(app.updated_at),
    }


async def get(connection: Connection, app_id: int) -> App | None:
    """One app."""
    return _app(await connection.fetchrow(f"SELECT {_COLUMNS} FROM apps WHERE id = $1", app_id))  # noqa: S608  Our own names.


async def lock(connection: Connection, app_id: int) -> App:
    """The row, held against other writers until the caller's transaction ends. Raises NotFound."""
    app = _app(
        await connection.fetchrow(
            f"SELECT {_COLUMNS} FROM apps WHERE id = $1 FOR NO KEY UPDATE OF apps",  # noqa: S608  Our own names.
            app_id,
        )
    )
    if app is None:
        raise NotFound(f"There is no app {app_id}.")
    return app


async def lock_to_change(connection: Connection, app_id: int) -> App:
    """The same, for what makes no sense with an app that goes. Raises Conflict then."""
    app = await lock(connection, app_id)
    if app.deleting:
        raise Conflict(f"The app {app.name} is being deleted.")
    return app


async def list_page(
    connection: Connection, *, workspace_ids: Sequence[int] | None, page: int, page_size: int
) -> tuple[list[App], int]:
    """One page (from 1) of the apps of these workspaces (None: of all), newest first, and how many there are in all.

    Their settings lack `env` and `build_args`.
    """
    scope = "FROM apps WHERE $1::bigint[] IS NULL OR workspace_id = ANY ($1)"
    rows = await connection.fetch(
        f"SELECT {_IN_LISTS} {scope} ORDER BY id DESC LIMIT $2 OFFSET $3",
        workspace_ids,
        page_size,
        (page - 1) * page_size,
    )
    total: int = await connection.fetchval(f"SELECT count(*) {scope}", workspace_ids)
    return [app for row in rows if (app := _app(row))], total


async def create(
    connection: Connection,
    keys: Keyring,
    *,
    workspace_id: int,
    created_by: int,
    name: str,
    repo_url: str,
    branch: str | None,
    auto_deploy: bool,
    settings: AppSettings,
    secrets: AppSecrets,
) -> tuple[App, str | None]:
    """Make an app, and what its webhooks are signed with, which is known in the clear this once; None without a key.

    What the values may be is for the caller to have checked. Raises NotVisible for the workspace, Taken for a name or a
    domain that another app has, Invalid for secrets that cannot be encrypted.
    """
    if await connection.fetchval("SELECT id FROM workspaces WHERE id = $1 FOR KEY SHARE", workspace_id) is None:
        raise NotVisible("There is no such workspace.")
    app_id: int = await connection.fetchval("SELECT nextval(pg_get_serial_sequence('apps', 'id'))")
    await _take_domains(connection, app_id, settings.domains)
    hook_secret, sealed = _new_hook_secret(keys, app_id) if keys else (None, None)
    made = await connection.fetchval(
        """INSERT INTO apps (id, workspace_id, created_by, name, repo_url, branch, auto_deploy, settings, secrets,
                             hook_secret)
           OVERRIDING SYSTEM VALUE VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
           ON CONFLICT (name) DO NOTHING RETURNING id""",
        app_id, workspace_id, created_by, name, repo_url, branch, auto_deploy, asdict(settings),
        keys.encrypt_secrets(secrets, app_id), sealed,
    )  # fmt: skip
    if made is None:
        raise Taken(f"There is an app with the name {name} already.", field="name")
    app = await lock(connection, app_id)
    await _tell(connection, events.APP_CREATED, app)
    return app, hook_secret


async def update(
    connection: Connection,
    keys: Keyring,
    app_id: int,
    *,
    columns: Mapping[str, Any],
    settings: Mapping[str, Any],
    secrets: Mapping[str, Any],
) -> App:
    """Change what is given: the columns `repo_url`, `branch`, `auto_deploy`; fields of AppSettings; secrets (`merged`).

    Raises NotFound, Conflict while it is being deleted and when its secrets cannot be read, Taken, Invalid.
    """
    app = await lock_to_change(connection, app_id)
    changed = replace(app.settings, **settings)
    if changed.domains != app.settings.domains:
        await _take_domains(connection, app_id, changed.domains)
    sealed = app.secrets
    if "deploy_token" not in secrets and _elsewhere(app.repo_url, columns.get("repo_url", app.repo_url)):
        _keep_token(keys.decrypt_secrets(sealed, app_id), app.repo_url)
    if secrets:
        before = AppSecrets() if _forgets_all(secrets) else keys.decrypt_secrets(app.secrets, app_id)
        sealed = keys.encrypt_secrets(merged(before, secrets), app_id)
    given = {"repo_url": app.repo_url, "branch": app.branch, "auto_deploy": app.auto_deploy, **columns}
    await connection.execute(
        """UPDATE apps SET repo_url = $2, branch = $3, auto_deploy = $4, settings = $5, secrets = $6,
                  updated_at = clock_timestamp() WHERE id = $1""",
        app_id, given["repo_url"], given["branch"], given["auto_deploy"], asdict(changed), sealed,
    )  # fmt: skip
    return await _told(connection, app_id)


def _elsewhere(old: str, new: str) -> bool:
    """Whether what is shown to the one host would be shown to another, or in clear."""
    return urlsplit(old)[:2] != urlsplit(new)[:2]


def _keep_token(before: AppSecrets, repo_url: str) -> None:
    """Whoever may change an app may not read its token, and so not have it sent to a host of their own."""
    if before.deploy_token:
        raise Invalid(
            f"The deploy_token is for {urlsplit(repo_url).netloc}: give the one for the new repo_url with it, or null.",
            field="deploy_token",
        )


def merged(before: AppSecrets, changes: Mapping[str, Any]) -> AppSecrets:
    """The secrets with these changes: `env` by name, where None removes one (or, in its place, all); others whole.

    Raises Invalid (`secrets`) when they become too many.
    """
    changed: dict[str, Any] = {name: value or "" for name, value in changes.items() if name != "env"}
    if "env" in changes:
        env = {**before.env, **changes["env"]} if changes["env"] is not None else {}
        changed["env"] = kept = {name: value for name, value in env.items() if value is not None}
        size = sum(len(name) + len(value.encode()) for name, value in kept.items())
        if len(kept) > _MOST_SECRETS or size > _LARGEST_SECRETS:
            raise Invalid(
                f"An app has {_MOST_SECRETS} secrets of {_LARGEST_SECRETS} bytes in all at most, and would have "
                f"{len(kept)} of {size}: remove some by null.",
                field="secrets",
            )
    return replace(before, **changed)


def _forgets_all(changes: Mapping[str, Any]) -> bool:
    """Nothing of what there was stays, so that it need not be read."""
    return all(declared.name in changes for declared in dataclasses.fields(AppSecrets)) and changes["env"] is None


async def renew_hook_secret(connection: Connection, keys: Keyring, app_id: int) -> str:
    """Have webhooks be signed with another secret from now on: that one, in the clear this once.

    Raises NotFound, Conflict while the app is being deleted, Invalid without a key to encrypt it.
    """
    await lock_to_change(connection, app_id)
    hook_secret, sealed = _new_hook_secret(keys, app_id)
    await connection.execute("UPDATE apps SET hook_secret = $2 WHERE id = $1", app_id, sealed)
    return hook_secret


def _new_hook_secret(keys: Keyring, app_id: int) -> tuple[str, bytes]:
    hook_secret = token_urlsafe(_HOOK_SECRET)
    return hook_secret, keys.encrypt(hook_secret.encode(), app_id=app_id, purpose="hook", field="hook_secret")


async def mark_deleting(connection: Connection, app_id: int) -> App:
    """Have a worker remove all that the app has, and then the app. Raises NotFound."""
    app = await lock(connection, app_id)
    if app.deleting:
        return app
    await connection.execute(
        """UPDATE apps SET deleting = true, message = '', next_attempt_at = clock_timestamp(), attempts = 0,
                  updated_at = clock_timestamp() WHERE id = $1""",
        app_id,
    )
    return await _told(connection, app_id)


async def tell_waiting(connection: Connection, app_id: int, message: str) -> None:
    """Say what keeps the removal waiting."""
    app = await lock(connection, app_id)
    if app.message != message:
        await connection.execute(
            "UPDATE apps SET message = $2, updated_at = clock_timestamp() WHERE id = $1", app_id, message
        )
        await _told(connection, app_id)


async def remove(connection: Connection, app_id: int) -> None:
    """Forget the app with its deployments and their logs, once nothing of it runs. Its name is free again."""
    app = await lock(connection, app_id)
    await connection.execute("DELETE FROM apps WHERE id = $1", app_id)
    await _tell(connection, events.APP_DELETED, app)


async def _take_domains(connection: Connection, app_id: int, domains: Sequence[str]) -> None:
    if not domains:
        return
    # Two that take the same one at once do so one after the other.
    await connection.execute("SELECT pg_advisory_xact_lock($1)", _DOMAINS_KEY)
    # What an app had when it was deployed last is routed to it until it is deployed again.
    taken = await connection.fetchrow(
        """SELECT domain, dropped
             FROM (SELECT settings -> 'domains' AS domains, false AS dropped FROM apps
                    WHERE id <> $1 AND settings -> 'domains' ?| $2::text[]
                    UNION ALL
                   SELECT settings -> 'domains', true FROM deployments
                    WHERE app_id <> $1 AND settings -> 'domains' ?| $2::text[]
                      AND status IN ('queued', 'deploying', 'live')) AS others,
                  jsonb_array_elements_text(domains) AS domain
            WHERE domain = ANY ($2::text[]) ORDER BY dropped, domain LIMIT 1""",
        app_id,
        list(domains),
    )
    if taken is not None:
        holds = "serves the domain {} until it is deployed again." if taken["dropped"] else "has the domain {}."
        raise Taken(f"Another app {holds.format(taken['domain'])}", field="domains")


async def _told(connection: Connection, app_id: int) -> App:
    app = await lock(connection, app_id)
    await _tell(connection, events.APP_UPDATED, app)
    return app


async def _tell(connection: Connection, event_type: str, app: App) -> None:
    channels = [
        *await own_channel(connection, app.created_by, app.workspace_id),
        events.workspace_channel(app.workspace_id),
    ]
    await outbox.add(connection, *(Event(event_type, channel, public(app)) for channel in channels))


def _app(row: Any) -> App | None:
    if row is None:
        return None
    fields = dict(row)
    return App(**{**fields, "settings": settings_of(fields["settings"])})
