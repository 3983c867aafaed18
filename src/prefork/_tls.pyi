from prefork._core import Loop, Scoreboard

class Certificate:
    subject: str
    issuer: str
    serial: str
    names: tuple[str, ...]
    not_before: float
    not_after: float
    pem: str
    der: bytes

class Tls:
    def __init__(
        self,
        *,
        min_version: int = 0x0303,
        ciphers: str | None = None,
        ciphersuites: str | None = None,
        verify: int = 0,
        ca: bytes | None = None,
        kernel: bool = False,
    ) -> None: ...
    def add(
        self,
        cert: bytes,
        key: bytes | None = None,
        password: bytes | None = None,
        ocsp: bytes | None = None,
    ) -> Certificate: ...
    def secure(self, loop: Loop) -> None: ...
    def share_tickets(self, board: Scoreboard) -> None: ...

class Info:
    version: str
    version_number: int
    cipher: str
    cipher_number: int
    server_name: str | None
    alpn: str | None
    resumed: bool
    server: Certificate
    client: Certificate | None
    client_chain: tuple[Certificate, ...]
