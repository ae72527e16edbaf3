"""What is kept secret, encrypted anew with the newest key, so that older ones can be dropped."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.database import Connection
from orchestrator.deployments import apps
from orchestrator.deployments.secrets import Keyring
from orchestrator.errors import NotFound, SecretsUnreadable


@dataclass(frozen=True, slots=True)
class Rotated:
    """How many secrets were encrypted anew, and the apps some of whose no key opens, which were left as they are."""

    renewed: int
    unreadable: tuple[str, ...]


async def rotate(connection: Connection, keys: Keyring) -> Rotated:
    """Encrypt with the first key whatever is encrypted with another; app by app, each in a transaction of its own.

    It may be ended at any moment and begun again.
    """
    renewed = 0
    unreadable = []
    for row in await connection.fetch("SELECT id, name FROM apps ORDER BY id"):
        try:
            async with connection.transaction():
                renewed += await _rotate(connection, keys, row["id"])
        except NotFound:
            continue
        except SecretsUnreadable:
            unreadable.append(row["name"])
    return Rotated(renewed, tuple(unreadable))


async def _rotate(connection: Connection, keys: Keyring, app_id: int) -> int:
    # Who holds the app's row is the only one to write or copy its secrets.
    app = await apps.lock(connection, app_id)
    renewed = 0
    for column, sealed, purpose in (("secrets", app.secrets, "secrets"), ("hook_secret", app.hook_secret, "hook")):
        if sealed is not None and (new := keys.renewed(sealed, app_id=app_id, purpose=purpose)) is not None:
            await connection.execute(f"UPDATE apps SET {column} = $2 WHERE id = $1", app_id, new)  # noqa: S608  Our own names.
            renewed += 1
    # Many deployments share what their app has had.
    for row in await connection.fetch(
        "SELECT DISTINCT secrets FROM deployments WHERE app_id = $1 AND secrets IS NOT NULL", app_id
    ):
        if (new := keys.renewed(row["secrets"], app_id=app_id, purpose="secrets")) is not None:
            await connection.execute(
                "UPDATE deployments SET secrets = $3 WHERE app_id = $1 AND secrets = $2", app_id, row["secrets"], new
            )
            renewed += 1
    return renewed
