"""A cluster by what a provider's row says: an endpoint and a token, or a whole kubeconfig; for us, and for helm."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.cluster.helm import ReleaseBroken
from orchestrator.providers.kubernetes import KubernetesProvider
from orchestrator.providers.registry import open_provider


@pytest.mark.parametrize("whole", [False, True])
async def test_endpoint_and_credentials_lead_to_the_cluster(
    token_kubeconfig: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    text = token_kubeconfig.read_text()
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "missing"))
    provider = open_provider(
        "kubernetes", "east", {}, data_dir=tmp_path, sink=lambda _: None, **(_whole(text) if whole else _parts(text))
    )
    assert isinstance(provider, KubernetesProvider)
    try:
        assert (await provider.check()).startswith("Kubernetes v1.")
        # Helm did ask the cluster.
        with pytest.raises(ReleaseBroken):
            await provider._helm.manifest("none-such", "default", deadline=60.0)
    finally:
        await provider.close()
    assert list(tmp_path.iterdir()) == []


def _whole(kubeconfig: str) -> dict[str, Any]:
    return {"credentials": {"kubeconfig": kubeconfig}}


def _parts(kubeconfig: str) -> dict[str, Any]:
    found = yaml.safe_load(kubeconfig)
    cluster, user = found["clusters"][0]["cluster"], found["users"][0]["user"]
    authority = base64.b64decode(cluster["certificate-authority-data"]).decode()
    credentials = {"token": user["token"], "certificate_authority": authority}
    return {"endpoint": cluster["server"], "credentials": credentials}
