"""Clients that speak TLS as the test wants it, and tell an end from a cut.

A Secure is a socket over TLS: the test says what is a record and what a segment of it.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from live import Client, Live

VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}


def only(version: str) -> dict[str, ssl.TLSVersion]:
    """What a context's attributes must be to speak just this version."""
    return dict.fromkeys(("minimum_version", "maximum_version"), VERSIONS[version])


class Secure:
    """A socket over TLS. A call of sendall() makes one record, or as many as it must;
    a record leaves in one segment, or in segments of `step` bytes.
    """

    def __init__(
        self,
        raw: socket.socket,
        context: ssl.SSLContext,
        name: str | None = "localhost",
        session: ssl.SSLSession | None = None,
        step: int = 0,
    ) -> None:
        self.raw = raw
        self.step = step
        self.into, self.out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(
            self.into, self.out, server_hostname=name, session=session
        )
        self._await(self.tls.do_handshake)

    def __getattr__(self, name: str) -> Any:
        """Timeouts, options and addresses are those of the socket beneath."""
        return getattr(self.raw, name)

    def _flush(self) -> None:
        data = self.out.read()
        step = self.step or max(len(data), 1)
        for at in range(0, len(data), step):
            self.raw.sendall(data[at : at + step])

    def _await(self, call: Callable[..., Any], *arguments: Any) -> Any:
        while True:
            try:
                result = call(*arguments)
            except ssl.SSLWantReadError:
                self._flush()
            except ssl.SSLError:
                with suppress(OSError):
                    self._flush()  # an alert that says so
                raise
            else:
                self._flush()
                return result
            if data := self.raw.recv(65536):
                self.into.write(data)
            else:
                self.into.write_eof()

    def sendall(self, data: bytes) -> None:
        for at in range(0, len(data), 16384):
            self._await(self.tls.write, data[at : at + 16384])

    send = sendall

    def recv(self, size: int) -> bytes:
        """What comes next; empty at close_notify. A cut is an ssl.SSLEOFError."""
        try:
            return self._await(self.tls.read, size)
        except ssl.SSLZeroReturnError:
            return b""

    def shutdown(self, how: int) -> None:
        """Say close_notify, and go on reading."""
        assert how == socket.SHUT_WR
        with suppress(ssl.SSLWantReadError):
            self.tls.unwrap()
        self._flush()

    def cut(self) -> None:
        """End the sending as an attacker would: without close_notify."""
        self.raw.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.raw.close()


class SecureClient(Client):
    """The client's end of one connection over TLS; `before` is said in clear."""

    socket: Secure

    def __init__(
        self,
        address: Any,
        context: ssl.SSLContext,
        *,
        before: bytes = b"",
        receive_buffer: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(address, receive_buffer)
        raw = self.socket
        try:
            raw.sendall(before)
            self.socket = Secure(raw, context, **options)
        except BaseException:
            raw.close()
            raise

    @property
    def tls(self) -> ssl.SSLObject:
        return self.socket.tls

    def is_ended(self) -> bool:
        """Whether the server says close_notify now, and then closes."""
        return self.receive() == b"" and self.socket.raw.recv(1) == b""


def dial(live: Live, context: ssl.SSLContext, **options: Any) -> SecureClient:
    """A new connection over TLS, which is closed with the server at the latest."""
    client = SecureClient(live.address, context, **options)
    live.clients.append(client)
    return client
