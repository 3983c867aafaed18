"""An authority of the tests' own, what it vouches for as files, and who trusts it."""

from __future__ import annotations

import datetime
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509 import ocsp
from programs import connect, read_all

NOW = datetime.datetime.now(datetime.timezone.utc)
DAY = datetime.timedelta(days=1)
CLOSE = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"


@dataclass(frozen=True)
class Issued:
    """A certificate and its key, in files."""

    cert: Path
    key: Path
    serial: str  # as getpeercert() tells it

    @property
    def files(self) -> dict[str, str]:
        """As listen_and_serve_tls() takes them."""
        return {"cert_file": str(self.cert), "key_file": str(self.key)}

    @property
    def options(self) -> dict[str, str]:
        """As Server takes them."""
        return {"certfile": str(self.cert), "keyfile": str(self.key)}

    @property
    def flags(self) -> list[str]:
        """As the command takes them."""
        return ["--certfile", str(self.cert), "--keyfile", str(self.key)]

    def move_to(self, other: Issued) -> Issued:
        """Rename our files over those of another: first the key, as anybody may."""
        self.key.replace(other.key)
        self.cert.replace(other.cert)
        return Issued(other.cert, other.key, self.serial)


class Authority:
    """Issues certificates into a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ca = trustme.CA()
        self.cas = directory / "ca.pem"
        self.ca.cert_pem.write_to_path(self.cas)

    def issue(
        self,
        *names: str,
        file: str = "",
        directory: Path | None = None,
        password: bytes | None = None,
        **more: Any,
    ) -> Issued:
        """One for these names, localhost by default, and 127.0.0.1."""
        directory = directory or self.directory
        names = names or ("localhost",)
        leaf = self.ca.issue_cert(*names, "127.0.0.1", **more)
        cert = directory / f"{file or 'server'}.pem"
        key = cert.with_suffix(".key")
        cert.write_bytes(b"".join(pem.bytes() for pem in leaf.cert_chain_pems))
        key.write_bytes(encrypted(leaf.private_key_pem.bytes(), password))
        serial = ssl._ssl._test_decode_cert(str(cert))["serialNumber"]  # type: ignore
        return Issued(cert, key, serial)

    def expired(self) -> Issued:
        return self.issue(not_before=NOW - 2 * DAY, not_after=NOW - DAY)

    def says_good(self, issued: Issued) -> bytes:
        """An OCSP response that a certificate is good, in DER (RFC 6960)."""
        ca = x509.load_pem_x509_certificate(self.ca.cert_pem.bytes())
        key: Any = serialization.load_pem_private_key(
            self.ca.private_key_pem.bytes(), None
        )
        builder = ocsp.OCSPResponseBuilder().add_response(
            cert=x509.load_pem_x509_certificates(issued.cert.read_bytes())[0],
            issuer=ca,
            algorithm=hashes.SHA1(),
            cert_status=ocsp.OCSPCertStatus.GOOD,
            this_update=NOW - DAY,
            next_update=NOW + DAY,
            revocation_time=None,
            revocation_reason=None,
        )
        builder = builder.responder_id(ocsp.OCSPResponderEncoding.HASH, ca)
        response = builder.sign(key, hashes.SHA256())
        return response.public_bytes(serialization.Encoding.DER)

    def trusting(self, client: Issued | None = None, **more: Any) -> ssl.SSLContext:
        """A client's context; client is what it presents."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.ca.configure_trust(context)
        if client is not None:
            context.load_cert_chain(client.cert, client.key)
        for name, value in more.items():
            setattr(context, name, value)
        return context


def encrypted(pem: bytes, password: bytes | None) -> bytes:
    if password is None:
        return pem
    return serialization.load_pem_private_key(pem, None).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(password),
    )


@contextmanager
def dial(
    address: str,
    context: ssl.SSLContext,
    name: str = "localhost",
    session: ssl.SSLSession | None = None,
) -> Iterator[ssl.SSLSocket]:
    """A connection over TLS to host:port or unix:path."""
    with connect(address) as sock:
        with context.wrap_socket(sock, server_hostname=name, session=session) as secure:
            yield secure


def tell(
    address: str,
    context: ssl.SSLContext,
    name: str = "localhost",
    message: bytes = CLOSE,
) -> bytes:
    """The whole answer to a message, to the close; which must be announced."""
    with dial(address, context, name) as secure:
        secure.sendall(message)
        return read_all(secure)


def body(address: str, context: ssl.SSLContext, name: str = "localhost") -> str:
    """The body of an answer that is a 200."""
    head, _, rest = tell(address, context, name).partition(b"\r\n\r\n")
    assert head.split()[1] == b"200", head
    return rest.decode()


def serial(address: str, context: ssl.SSLContext, name: str = "localhost") -> str:
    """Of the certificate that a new connection is shown."""
    with dial(address, context, name) as secure:
        found = secure.getpeercert()
        assert found
        return str(found["serialNumber"])
