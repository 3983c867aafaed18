"""Addresses and the sockets that listen on them, made and kept by the master.

An address is text, in the forms that users type: ":8080", "host:port", "[::1]:8080",
"unix:/path", "fd://3". It is parsed (ConfigError), resolved and bound (the true
OSError, worded with the address and the remedy) before any worker exists.

With reuseport each slot has a socket of its own. The kernel keeps those of one address
in a list, in the order of their listen(); one that closes is replaced by the last. We
keep the same list, so that a slot that is given up can be taken out of the choice.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from prefork import _listeners
from prefork.config import Config
from prefork.errors import ConfigError, NoReuseportError

FORMS = "HOST:PORT, :PORT, [IPV6]:PORT, unix:PATH or fd://N"
ANY = {"tcp4": "0.0.0.0", "tcp6": "::", "tcp": "::"}
FAMILIES = {
    "tcp4": socket.AF_INET,
    "tcp6": socket.AF_INET6,
    "tcp": socket.AF_UNSPEC,
}


@dataclass(frozen=True)
class Address:
    """A parsed address: host and port, the path of a unix socket, or a descriptor."""

    text: str
    host: str = ""
    port: int = 0
    path: str = ""
    fd: int = -1


@dataclass(frozen=True)
class Place:
    """A resolved address, as the kernel takes it."""

    family: int
    host: str  # numeric, or a path
    port: int = 0
    flags: int = 0


# ---- Text to place -----------------------------------------------------------------


def parse(text: str, network: str) -> Address:
    """Split an address; ConfigError if it has none of the known forms."""
    if text.startswith("unix:") or network == "unix":
        return Address(text, path=_unix_path(text))
    if text.startswith("fd:"):
        return Address(text, fd=_number(text))
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not colon or (":" in host and not bracketed):
        raise ConfigError(f"address must be {FORMS}, not {text!r}")
    if not (port.isascii() and port.isdigit() and int(port) <= 65535):
        raise ConfigError(f"port must be between 0 and 65535, not {port!r} in {text!r}")
    return Address(text, host=host[1:-1] if bracketed else host, port=int(port))


def _unix_path(text: str) -> str:
    path = text.removeprefix("unix:")
    if path.startswith("//"):
        path = path[2:]
    if not path:
        raise ConfigError(f"address must name the socket's path, not {text!r}")
    return path


def _number(text: str) -> int:
    digits = text.removeprefix("fd:").removeprefix("//")
    if not (digits.isascii() and digits.isdigit() and int(digits) < 2**31):
        raise ConfigError(f"address must be fd://N, like fd://3, not {text!r}")
    return int(digits)


def resolve(address: Address, network: str) -> list[Place]:
    """Where to listen; what follows the first place is tried if that is not there."""
    if address.path:
        return [Place(socket.AF_UNIX, address.path)]
    dual = network == "tcp" and address.host in ("", "::")
    only = 0 if dual else _listeners.SOCKET_V6ONLY
    if not address.host:
        host = ANY[network]
        wide = socket.AF_INET6 if ":" in host else socket.AF_INET
        places = [Place(wide, host, address.port, only)]
        if network == "tcp":  # a machine without IPv6
            places.append(Place(socket.AF_INET, ANY["tcp4"], address.port))
        return places
    family, host = _lookup(address, network)
    flags = only if family == socket.AF_INET6 else 0
    return [Place(family, host, address.port, flags)]


def _lookup(address: Address, network: str) -> tuple[int, str]:
    family = FAMILIES[network]
    if ":" in address.host and network == "tcp4":
        raise ConfigError(
            f"address {address.text} is IPv6, but network is tcp4; use tcp or tcp6"
        )
    try:
        found = socket.getaddrinfo(address.host, None, family, socket.SOCK_STREAM)
    except socket.gaierror as error:
        text = f"cannot resolve {address.host!r} in {address.text}: {error.strerror}"
        raise socket.gaierror(error.errno, text) from None
    found.sort(key=lambda entry: entry[0] != socket.AF_INET)
    host = socket.getnameinfo(found[0][4], socket.NI_NUMERICHOST)[0]
    return found[0][0], host


# ---- Place to socket ---------------------------------------------------------------

REMEDIES = {
    errno.EADDRINUSE: "stop what listens there, or choose another address",
    errno.EACCES: "choose a port from 1024 up, or a directory you may write to",
    errno.EPERM: "choose an address that you may use",
    errno.EADDRNOTAVAIL: "choose an address that this machine has",
    errno.EAFNOSUPPORT: "this machine has no IPv6: use network tcp4",
    errno.ENOENT: "create the socket's directory",
    errno.ENOTDIR: "choose a path whose parent is a directory",
    errno.ENAMETOOLONG: "choose a path of at most 107 bytes",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}
NO_IPV6 = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)


def _worded(error: OSError, text: str) -> OSError:
    code = error.errno or 0
    if code == errno.ENOPROTOOPT:
        return NoReuseportError(
            code, "this kernel has no SO_REUSEPORT; use reuseport=False"
        )
    remedy = f"; {REMEDIES[code]}" if code in REMEDIES else ""
    reason = os.strerror(code)
    reason = reason[:1].lower() + reason[1:]
    return OSError(code, f"cannot listen on {text}: {reason}{remedy}")


@dataclass(frozen=True)
class Way:
    """How sockets are opened, whatever their place."""

    backlog: int
    flags: int
    mode: int  # of a unix socket's file, -1: by umask


def _open(place: Place, way: Way) -> socket.socket:
    flags = way.flags | place.flags
    fd = _listeners.listen(
        place.family, place.host, place.port, way.backlog, way.mode, flags
    )
    return socket.socket(fileno=fd)


def _open_first(places: Sequence[Place], text: str, way: Way) -> socket.socket:
    for place in places:
        try:
            return _open(place, way)
        except OSError as error:
            if place is places[-1] or error.errno not in NO_IPV6:
                raise _worded(error, text) from None
    raise AssertionError("no place to listen")


def _adopt(address: Address) -> socket.socket:
    """A copy of an inherited descriptor, which itself stays as it is."""
    try:
        _listeners.check_listener(address.fd)
        return socket.socket(fileno=os.dup(address.fd))
    except OSError as error:
        code = error.errno or 0
        raise OSError(
            code,
            f"cannot listen on {address.text}: descriptor {address.fd} is no "
            "listening stream socket; have it inherited, as by systemd or "
            "subprocess pass_fds",
        ) from None


class Listener:
    """One address and what listens on it: a shared socket, or one for each slot.

    sockets are in the kernel's order. Belongs to the thread that made it.
    """

    def __init__(
        self,
        address: Address,
        sockets: list[socket.socket],
        again: Callable[[], socket.socket] | None = None,
    ) -> None:
        self.sockets = sockets
        self.again = again  # opens one more, if each slot has its own
        self.closing: list[socket.socket] = []  # of sockets, those given up
        self.borrowed = address.fd >= 0
        self.blocking = os.get_blocking(sockets[0].fileno())
        self.name = sockets[0].getsockname()
        self.path = os.path.abspath(self.name) if self._has_file() else ""
        self.inode = None if self.borrowed else _inode(self.path)
        self.text = f"unix:{self.path}" if self.path else self._words(address.text)

    def _has_file(self) -> bool:
        return isinstance(self.name, str) and self.name != ""

    def _words(self, text: str) -> str:
        return join(*self.name[:2]) if isinstance(self.name, tuple) else text

    @property
    def shared(self) -> bool:
        return self.again is None

    def socket_of(self, slot: int) -> socket.socket:
        """What the worker in this slot accepts from, as the listener was made."""
        return self.sockets[0 if self.shared else slot]

    def open_slot(self) -> socket.socket:
        """What the worker in one more slot accepts from."""
        if self.again is None:
            return self.sockets[0]
        sock = self.again()
        self.sockets.append(sock)
        self._spread()
        return sock

    def avoid(self, sock: socket.socket) -> None:
        """Give a slot's socket no new connection: its worker is about to leave."""
        if self.shared:
            return
        self.closing.append(sock)
        self._spread()
        _listeners.quiesce(sock.fileno())

    def close_slot(self, sock: socket.socket) -> None:
        """Close the socket of a slot that is given up, whoever else may hold it."""
        if self.shared:
            return
        at = self.sockets.index(sock)
        self.sockets[at] = self.sockets[-1]  # as the kernel does it
        self.sockets.pop()
        if sock in self.closing:
            self.closing.remove(sock)
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        sock.close()
        self._spread()

    def _spread(self) -> None:
        places = [self.sockets.index(sock) for sock in self.closing]
        if self.sockets and len(places) < len(self.sockets):
            _listeners.spread(self.sockets[0].fileno(), len(self.sockets), places)

    def quiesce(self) -> None:
        """Take no new connection; what has arrived can still be accepted.

        An inherited listener lives on with whoever gave it, so it goes on listening.
        """
        self.remove()
        for sock in self.sockets if not self.borrowed else ():
            _listeners.quiesce(sock.fileno())

    def remove(self) -> None:
        """Unlink a unix socket's file, if it still is ours."""
        if self.path and self.inode and _inode(self.path) == self.inode:
            os.unlink(self.path)
        self.inode = None

    def close(self) -> None:
        """Close the sockets: what still waits in their queues is reset."""
        self.remove()
        if self.borrowed:
            with contextlib.suppress(OSError):
                os.set_blocking(self.sockets[0].fileno(), self.blocking)
        for sock in self.sockets:
            sock.close()


def _inode(path: str) -> tuple[int, int] | None:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def join(host: str, port: int) -> str:
    """host:port, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def listen(text: str, config: Config, slots: int) -> Listener:
    """Parse, resolve, bind and listen.

    With reuseport each slot gets a socket, all of one address and port; a unix socket
    and an inherited one are always shared. Raises ConfigError or OSError, and leaves
    nothing open then.
    """
    address = parse(text, config.network)
    if address.fd >= 0:
        return Listener(address, [_adopt(address)])
    places = resolve(address, config.network)
    each = config.reuseport and not address.path
    way = Way(config.backlog, _flags(config, address), _mode(config))
    sockets = [_open_first(places, text, way)]
    again = None
    try:
        if each:
            same = _place_of(sockets[0], places)
            again = functools.partial(_open_first, [same], text, way)
            sockets += [again() for _ in range(slots - 1)]
        return Listener(address, sockets, again)
    except BaseException:
        for sock in sockets:
            sock.close()
        raise


def _mode(config: Config) -> int:
    return -1 if config.unix_mode is None else config.unix_mode


def _flags(config: Config, address: Address) -> int:
    if address.path:
        return 0
    flags = _listeners.SOCKET_REUSEPORT if config.reuseport else 0
    return flags | (_listeners.SOCKET_DEFER_ACCEPT if config.defer_accept else 0)


def reserve(text: str, config: Config) -> Listener:
    """Bind, but leave it to others to listen: workers that open their own sockets.

    A socket of a SO_REUSEPORT group that listened would be given connections, too.
    """
    address = parse(text, config.network)
    if address.path or address.fd >= 0:
        raise ConfigError(
            f"command_producer with reuseport needs an address that each worker can "
            f"bind for itself, not {text!r}"
        )
    (place, *others) = resolve(address, config.network)
    try:
        return Listener(address, [_bind(place)])
    except OSError as error:
        if not others or error.errno not in NO_IPV6:
            raise _worded(error, text) from None
        return Listener(address, [_bind(others[0])])


def _bind(place: Place) -> socket.socket:
    sock = socket.socket(place.family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if place.family == socket.AF_INET6:
            only = int(place.flags & _listeners.SOCKET_V6ONLY != 0)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only)
        sock.bind((place.host, place.port))
    except BaseException:
        sock.close()
        raise
    return sock


def _place_of(sock: socket.socket, places: Sequence[Place]) -> Place:
    """The place that was taken, with the port that the kernel chose."""
    place = next(place for place in places if place.family == sock.family)
    if sock.family == socket.AF_UNIX:
        return place
    return Place(place.family, place.host, sock.getsockname()[1], place.flags)


def listen_all(
    texts: Iterable[str],
    config: Config,
    slots: int,
    on_close: Callable[[Callable[[], None]], object],
) -> list[Listener]:
    """A Listener for each address; on_close gets each one's close() as it is made."""
    listeners = []
    for text in texts:
        listener = listen(text, config, slots)
        on_close(listener.close)
        listeners.append(listener)
    return listeners
