"""TLS as a kubeconfig or a service account wants it: from what stands there, and never from a file that stays."""

from __future__ import annotations

import ssl
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.errors import ProviderUnavailable


@dataclass(frozen=True, slots=True)
class Tls:
    """Whom to trust, and what to show, each as PEM. Without an authority: whom the machine trusts."""

    authority: bytes | None
    verify: bool = True
    certificate: bytes | None = None
    key: bytes | None = field(default=None, repr=False)

    def context(self, where: str) -> ssl.SSLContext:
        """Made anew. Raises ProviderUnavailable, which tells that what is wrong stands in `where`."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if not self.verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        elif self.authority is None:
            context.load_default_certs()
        else:
            try:
                context.load_verify_locations(cadata=self.authority.decode("ascii"))
            except (ssl.SSLError, ValueError):
                raise ProviderUnavailable(
                    f"{where} has a certificate authority that is no certificate (PEM)."
                ) from None
        if self.certificate and self.key:
            _present(context, self.certificate, self.key, where)
        return context


def _present(context: ssl.SSLContext, certificate: bytes, key: bytes, where: str) -> None:
    """Show a certificate (PEM) to servers. OpenSSL takes it from files only, which are gone when this returns."""
    with tempfile.TemporaryDirectory(prefix="cluster-code-") as folder:
        paths = Path(folder, "certificate"), Path(folder, "key")
        for path, content in zip(paths, (certificate, key), strict=True):
            path.touch(mode=0o600)
            path.write_bytes(content)
        try:
            # A key with a password would be asked for at the terminal.
            context.load_cert_chain(*paths, password="")
        except (ssl.SSLError, ValueError):
            raise ProviderUnavailable(
                f"{where} has a client certificate or a key that cannot be used: both must be PEM, belong together, and"
                " have no password."
            ) from None
