"""What can be set about `cluster-code dev`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from orchestrator.settings import variable


def _image(value: str) -> str | None:
    return None if re.fullmatch(r"(?!-)[!-~]{1,500}", value) else f"must be an image, not {value!r}"


@dataclass(frozen=True, slots=True)
class DevSettings:
    """The first administrator, who is made when there is none, and what the demonstration runs on a cluster."""

    admin_email: str = variable(
        "ADMIN_EMAIL",
        "str",
        "admin@localhost",
        help="Address of the first administrator that `cluster-code dev` makes.",
    )
    admin_password: str = variable(
        "ADMIN_PASSWORD", "str", "", help="Its password; empty: one is made and printed once.", secret=True
    )
    kubernetes_demo_image: str = variable(
        "KUBERNETES_DEMO_IMAGE",
        "str",
        "",
        help="Image, with busybox's `httpd`, of the machine config `kubernetes-small` that `cluster-code dev` makes"
        " where KUBECONFIG is set; empty: a busybox that the nodes hold already, else docker.io's.",
        check=_image,
    )
    docker_demo_image: str = variable(
        "DOCKER_DEMO_IMAGE",
        "str",
        "",
        help="The same of `docker-small` and `devpod-small`, made where there is Docker, and of `demo-deploy`;"
        " empty: a busybox that the engine has already, else docker.io's.",
        check=_image,
    )
