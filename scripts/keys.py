"""`secrets rotate`: what apps keep secret, under the newest key."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.settings import GatewaySettings
from orchestrator.deployments.rotation import Rotated
from orchestrator.deployments.rotation import rotate as rotate_all
from orchestrator.deployments.secrets import Keyring
from orchestrator.errors import SettingsError
from orchestrator.settings import load
from scripts import target

if TYPE_CHECKING:
    from environs import Env


async def rotate(env: Env) -> Rotated:
    """Encrypt everything with the first key of SECRETS_KEY. Raises SettingsError without one."""
    keys = Keyring(load(GatewaySettings, env).secrets_key)
    if not keys:
        raise SettingsError("SECRETS_KEY is not set: put the new key first, and the old ones behind it")
    async with target.connection(env) as connection:
        return await rotate_all(connection, keys)
