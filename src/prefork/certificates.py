"""Certificates: where they are, whether they can be served with, and when they change.

    Files, Data     where one certificate and its key are: in files, in memory
    Certificates    those of one server, and how they are used; load() makes a Tls
    Watch           tells that the files hold something else than before

A master loads them before it binds, so what is wrong with them is raised there: the
true OSError of a file that cannot be read, CertificateError for what is in it. Workers
that are forked share what it has loaded; those that run the program again load it anew.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from prefork import _files, _tls, log
from prefork.config import FILE, Config, wrong
from prefork.errors import CertificateError, ConfigError

VERSIONS = {"1.2": 0x0303, "1.3": 0x0304}
VERIFY = {"none": 0, "optional": 1, "required": 2}
MOST_LINKS = 40  # as the kernel follows


# ---- Where they are ------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """A certificate with its chain, and its key, as PEM; OCSP as DER."""

    cert: bytes
    key: bytes = field(repr=False)
    ocsp: bytes | None = None

    @property
    def encrypted(self) -> bool:
        return b"ENCRYPTED" in self.key


@dataclass(frozen=True)
class Files:
    """Paths; the key may be with the certificate."""

    cert: str
    key: str = ""
    ocsp: str = ""

    @classmethod
    def named(cls, cert_file: Any, key_file: Any) -> Files:
        """Those of listen_and_serve_tls(), checked."""
        return cls(_path("cert_file", cert_file), _path("key_file", key_file))

    def read(self) -> Pair:
        cert = _read(self.cert, "certificate")
        key = _read(self.key, "key") if self.key else cert
        return Pair(cert, key, _read(self.ocsp, "OCSP response") if self.ocsp else None)

    @property
    def paths(self) -> list[str]:
        return [path for path in (self.cert, self.key, self.ocsp) if path]

    def __str__(self) -> str:
        return self.cert if not self.key else f"{self.cert} with key {self.key}"


@dataclass(frozen=True)
class Data:
    """PEM in memory."""

    cert: bytes
    key: bytes = field(repr=False)
    paths = ()

    @classmethod
    def named(cls, cert_data: Any, key_data: Any) -> Data:
        """That of listen_and_serve_tls_embed(), checked."""
        for name, data in (("cert_data", cert_data), ("key_data", key_data)):
            if not isinstance(data, (bytes, bytearray, memoryview)):
                raise ConfigError(f"{name} must be bytes, not {type(data).__name__}")
        return cls(bytes(cert_data), bytes(key_data))

    def read(self) -> Pair:
        return Pair(self.cert, self.key)

    def __str__(self) -> str:
        return "cert_data with key_data"


def _path(name: str, value: Any) -> str:
    try:
        path: str = FILE.convert(value)
    except (TypeError, ValueError):
        raise wrong(name, FILE.wants, value) from None
    if not path:
        raise wrong(name, FILE.wants, value)
    return path


def _read(path: str, what: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        code = error.errno or 0
        text = f"cannot read the {what}: {_reason(code)}"
        raise OSError(code, text, path) from None


def _reason(code: int) -> str:
    reason = os.strerror(code)
    return reason[:1].lower() + reason[1:]


# ---- Those of a server ---------------------------------------------------------------


class Certificates:
    """What a server is to be known by, and how it is used: its options say that."""

    def __init__(self, config: Config, places: Sequence[Files | Data]) -> None:
        self.config = config
        self.places = places
        self.found: list[_tls.Certificate] = []
        self.digests: list[bytes | int] = []  # of the files, before they were loaded

    @classmethod
    def of(cls, config: Config) -> Certificates | None:
        """Those that the options name; None if they name none."""
        if not config.certfile:
            _refuse_leftovers(config)
            return None
        count = len(config.certfile)
        keys = config.keyfile or ("",) * count
        responses = (*config.ocsp_file, *("",) * count)
        rows = zip(config.certfile, keys, responses, strict=False)
        return cls(config, [Files(*row) for row in rows])

    @classmethod
    def chosen(cls, config: Config, place: Files | Data | None) -> Certificates | None:
        """The one that a call names, or else those that the options name."""
        if place is None:
            return cls.of(config)
        for name in ("certfile", "keyfile"):
            if getattr(config, name):
                wants = "left out where the call names a certificate"
                raise wrong(name, wants, list(getattr(config, name)))
        if config.tls_watch and not place.paths:
            raise ConfigError("tls_watch must be off: there are no files to watch")
        return cls(config, [place])

    @property
    def paths(self) -> list[str]:
        """The files that they come from."""
        cas = [self.config.ca_certs] if self.config.ca_certs else []
        return [*(path for place in self.places for path in place.paths), *cas]

    def load(self) -> _tls.Tls:
        """Read and check all of them. Raises OSError and CertificateError."""
        self.digests = [_digest(path) for path in self.paths]
        tls, self.found = self._open(), []
        password = self.config.keyfile_password
        secret = None if password is None else password.encode()
        for place in self.places:
            pair = place.read()
            self._add(tls, place, pair.cert, pair.key, secret, pair.ocsp)
        return tls

    def check(self) -> None:
        """As load() does, for somebody else's server, who may know a key's password."""
        tls, self.found = self._open(), []
        for place in self.places:
            pair = place.read()
            if not pair.encrypted:
                self._add(tls, place, pair.cert, pair.key)

    def _add(self, tls: _tls.Tls, place: Files | Data, *what: bytes | None) -> None:
        """Have tls.add() take it; an error names the place."""
        try:
            self.found.append(tls.add(*what))  # type: ignore[arg-type]
        except CertificateError as error:
            raise CertificateError(f"{place}: {error}") from None

    def _open(self) -> _tls.Tls:
        config = self.config
        ca = _read(config.ca_certs, "CAs") if config.ca_certs else None
        older, newer = split_ciphers(config.ciphers)
        try:
            return _tls.Tls(
                min_version=VERSIONS[config.tls_min],
                ciphers=older,
                ciphersuites=newer,
                verify=VERIFY[config.cert_reqs],
                ca=ca,
                kernel=config.tls_ktls,
            )
        except CertificateError as error:
            raise CertificateError(f"{self._at_fault()}: {error}") from None

    def _at_fault(self) -> str:
        """Of a Tls without certificates: the ciphers, if they are wrong alone."""
        older, newer = split_ciphers(self.config.ciphers)
        try:
            _tls.Tls(ciphers=older, ciphersuites=newer)
        except CertificateError:
            return f"ciphers {self.config.ciphers}"
        return str(self.config.ca_certs)

    def describe(self) -> Iterator[str]:
        """A line for each that was loaded."""
        for found in self.found:
            yield f"certificate of {_whose(found)}, until {_day(found.not_after)}"

    def warn(self, logger: log.Logger) -> None:
        """Log which of those that were loaded are not valid today."""
        now = time.time()
        for found in self.found:
            if now > found.not_after:
                day = _day(found.not_after)
                logger.warning("certificate of %s expired %s", _whose(found), day)
            elif now < found.not_before:
                day = _day(found.not_before)
                text = "certificate of %s is not valid before %s"
                logger.warning(text, _whose(found), day)


def _refuse_leftovers(config: Config) -> None:
    """Raise ConfigError for options that would do nothing, or less than they say."""
    for name in ("keyfile", "ocsp_file"):
        if getattr(config, name):
            raise ConfigError(f"certfile must name the certificate of {name}")
    if config.cert_reqs != "none" or config.tls_watch:
        what = "tls_watch" if config.tls_watch else f"cert_reqs {config.cert_reqs}"
        raise ConfigError(f"certfile must name a certificate for {what}")


def split_ciphers(text: str | None) -> tuple[str | None, str | None]:
    """The ciphers of TLS 1.2 and those of TLS 1.3, which OpenSSL keeps apart."""
    names = [name for name in re.split("[:, ]+", text or "") if name]
    newer = [name for name in names if name.startswith("TLS_")]
    older = [name for name in names if not name.startswith("TLS_")]
    return ":".join(older) or None, ":".join(newer) or None


def _whose(found: _tls.Certificate) -> str:
    return ", ".join(found.names) or found.subject


def _day(when: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(when))


# ---- Changes -------------------------------------------------------------------------


class Watch:
    """Over the directories that the paths lead through.

    What counts is what the files hold, not which events there were: a file is written
    over, another is renamed over it, a link on the way leads elsewhere. Raises OSError
    if the system does not let them be watched.

    known is what they held before: a change may be older than the watch.
    """

    def __init__(
        self, paths: Iterable[str], known: list[bytes | int] | None = None
    ) -> None:
        self.paths = [os.path.abspath(path) for path in paths]
        self.events = _open_events()
        try:
            for path in self.paths:
                self._follow(path)
        except OSError:
            self.events.close()
            raise
        self.known = self._digests() if known is None else known

    def fileno(self) -> int:
        """Readable when something has happened: then call read()."""
        return self.events.fileno()

    def read(self) -> None:
        """Take note of what has happened, and of where the paths lead now."""
        self.events.read()
        for path in self.paths:
            with contextlib.suppress(OSError):  # one above is watched, and tells
                self._follow(path)

    def differs(self) -> bool:
        """Whether the files hold something else than at the last call."""
        before, self.known = self.known, self._digests()
        return before != self.known

    def _follow(self, path: str) -> None:
        """Those above the last may be others', and closed to us."""
        *above, last = way(path)
        for directory in above:
            with contextlib.suppress(OSError):
                self.events.add(directory)
        try:
            self.events.add(last)
        except OSError as error:
            raise _unwatched(error, last) from None

    def _digests(self) -> list[bytes | int]:
        return [_digest(path) for path in self.paths]

    def close(self) -> None:
        self.events.close()


def _open_events() -> _files.FileWatch:
    try:
        return _files.FileWatch()
    except OSError as error:
        raise _unwatched(error) from None


LIMITS = {
    errno.EMFILE: "; raise fs.inotify.max_user_instances",
    errno.ENOSPC: "; raise fs.inotify.max_user_watches",
}


def _unwatched(error: OSError, *path: str) -> OSError:
    code = error.errno or 0
    text = f"tls_watch cannot watch: {_reason(code)}{LIMITS.get(code, '')}"
    return OSError(code, text, *path)


def _digest(path: str) -> bytes | int:
    try:
        with open(path, "rb") as file:
            return hashlib.sha256(file.read()).digest()
    except OSError as error:
        return error.errno or 0


def way(path: str) -> list[str]:
    """The directories in which a change may have this path lead to something else.

    These are, in the end, the one it ends in and before that the one above; before
    them those that hold a link on the way there.
    """
    found: list[str] = []
    here, ahead, links = "/", _parts(path), 0
    while ahead:
        name = ahead.pop(0)
        step = os.path.normpath(os.path.join(here, name))
        target = _target(step) if links < MOST_LINKS else None
        if target is not None:
            links += 1
            found.append(here)
            here = "/" if os.path.isabs(target) else here
            ahead = [*_parts(target), *ahead]
        elif ahead:
            here = step
    return [*found, os.path.dirname(here), here]


def _target(step: str) -> str | None:
    try:
        return os.readlink(step)
    except OSError:
        return None


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part]
