"""Certificates, and PostgreSQL programs that can use them."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from datetime import datetime, timedelta, timezone
from pathlib import Path

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

from .databases import NoServerError
from .postgres import packaged_programs


def programs_with_tls() -> Path:
    """The directory of PostgreSQL programs built with TLS, which those of the package are not."""
    candidates = list(packaged_programs().values())
    if pg_config := shutil.which("pg_config"):
        said = subprocess.run([pg_config, "--bindir"], capture_output=True, text=True, check=True)
        candidates.append(Path(said.stdout.strip()))
    for bin_dir in candidates:
        program = shutil.which("postgres", path=bin_dir)
        # The name of the library that it loads; asking it would need a database.
        if program and b"libssl" in Path(program).read_bytes():
            return bin_dir
    raise NoServerError(
        "The tests of TLS need PostgreSQL's server programs, built with OpenSSL and found by the "
        "pg_config in PATH: on Debian and Ubuntu, apt-get install postgresql libpq-dev"
    )


class Authority:
    """An authority whose certificates name localhost, and so do not fit 127.0.0.1."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._ca = trustme.CA()
        self.server = self._ca.issue_cert("localhost")
        self.root = self._write("root.crt", self._ca.cert_pem.bytes())

    def revocations(self, *revoked: trustme.LeafCert) -> Path:
        """The list of these certificates."""
        key = serialization.load_pem_private_key(self._ca.private_key_pem.bytes(), None)
        assert isinstance(key, EllipticCurvePrivateKey)
        now = datetime.now(timezone.utc)
        builder = x509.CertificateRevocationListBuilder(
            issuer_name=x509.load_pem_x509_certificate(self._ca.cert_pem.bytes()).subject,
            last_update=now,
            next_update=now + timedelta(days=1),
        )
        for leaf in revoked:
            serial = x509.load_pem_x509_certificate(leaf.cert_chain_pems[0].bytes()).serial_number
            entry = x509.RevokedCertificateBuilder(serial, now).build()
            builder = builder.add_revoked_certificate(entry)
        signed = builder.sign(key, hashes.SHA256())
        return self._write("root.crl", signed.public_bytes(serialization.Encoding.PEM))

    def client(self, user: str) -> str:
        """Parameters that name a certificate for this user and its key."""
        leaf = self._ca.issue_cert(f"{user}@example.com", common_name=user)
        certificate = self._write("client.crt", leaf.cert_chain_pems[0].bytes())
        key = self._write("client.key", leaf.private_key_pem.bytes())
        return f"sslcert={certificate}&sslkey={key}"

    def files_of_server(self) -> dict[str, bytes]:
        return {
            "server.crt": self.server.cert_chain_pems[0].bytes(),
            "server.key": self.server.private_key_pem.bytes(),
            "root.crt": self.root.read_bytes(),
        }

    def server_context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.server.configure_cert(context)
        return context

    def _write(self, name: str, content: bytes) -> Path:
        path = self._directory / name
        path.write_bytes(content)
        return path
