"""What is kept secret, under another key."""

from __future__ import annotations

from orchestrator.database import Pool
from orchestrator.deployments import apps, record, rotation
from orchestrator.deployments.contract import AppSecrets
from orchestrator.deployments.rotation import Rotated
from orchestrator.deployments.secrets import Keyring
from tests.integration.deployments.conftest import KEYS, Place

OLD, NEW = "k" * 42 + "A", "n" * 42 + "A"


async def test_all_that_is_secret_is_encrypted_anew_and_stays_what_it_is(pool: Pool, place: Place) -> None:
    secrets = AppSecrets(env={"A": "a"}, deploy_token="t")
    app, plain = await place.app(secrets=secrets), await place.app("plain")
    deployments = [await place.enqueue(app) for _ in range(3)]
    lost = await place.app("lost", secrets=secrets)
    newest = Keyring([NEW])
    async with pool.acquire() as connection:
        await connection.execute("UPDATE apps SET secrets = '\\x01' WHERE id = $1", lost.id)
        # Both of the app, what its deployments share, and what the other one's webhooks are signed with.
        assert await rotation.rotate(connection, Keyring([NEW, OLD])) == Rotated(4, ("lost",))
        assert await rotation.rotate(connection, Keyring([NEW, OLD])) == Rotated(0, ("lost",))
        rotated = await apps.get(connection, app.id)
        assert rotated is not None
        assert newest.decrypt_secrets(rotated.secrets, app.id) == secrets
        for before in (app, plain):
            after = await apps.get(connection, before.id)
            assert after is not None
            opened = [
                keys.decrypt(one.hook_secret or b"", app_id=before.id, purpose="hook")
                for keys, one in ((KEYS, before), (newest, after))
            ]
            assert opened[0] == opened[1]
        for deployment in deployments:
            assert (await record.recipe(connection, deployment, newest))[1] == secrets
