"""What can be set about `cluster-code dev`."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.settings import variable


@dataclass(frozen=True, slots=True)
class DevSettings:
    """The first administrator, who is made when there is none."""

    admin_email: str = variable(
        "ADMIN_EMAIL",
        "str",
        "admin@localhost",
        help="Address of the first administrator that `cluster-code dev` makes.",
    )
    admin_password: str = variable(
        "ADMIN_PASSWORD", "str", "", help="Its password; empty: one is made and printed once.", secret=True
    )
