"""Who a request is from, when proxies stand between: policy, and nothing but texts.

A proxy tells in header fields for whom it speaks, and anybody can write such fields. So
the chain is walked from its near end: the peer of the connection is certain; if it is
listed, the last entry is its word and names who connected to it; if that one is listed,
too, the entry before is its word; and so on to the first address that is not listed.
Whatever stands further left, the client may have made up.

A proxy writes either X-Forwarded-* or Forwarded (RFC 7239), and mostly hands on what it
finds in the other: one of them alone can be believed, so which one is an option.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)
from socket import AF_INET, AF_INET6, AF_UNIX
from typing import Any, NamedTuple

from prefork.errors import ConfigError

Address = tuple[str, int]
Network = IPv4Network | IPv6Network

FAMILIES = {4: int(AF_INET), 6: int(AF_INET6)}
EVERYBODY = ("0.0.0.0/0", "::/0", "unix")
KNOWN_HOSTS = 4096  # that trusts() and parse_node() remember
NODE_SIZE = 80  # no address with its port is longer
SCHEMES = {"http": "http", "https": "https", "ws": "http", "wss": "https"}


class Origin(NamedTuple):
    """What trusted proxies say of a request; None: they do not say."""

    client: Address  # port 0: unknown
    scheme: str | None = None  # "http" or "https"
    host: str | None = None  # as a Host field has it


# ---- The list ----------------------------------------------------------------------


class Trust:
    """Peers whose word counts: addresses, networks, "unix" for unix sockets, "*".

    standard: they write Forwarded, and not X-Forwarded-*. Raises ConfigError. May be
    asked by any thread.
    """

    def __init__(self, texts: str | Iterable[str], *, standard: bool = False) -> None:
        if isinstance(texts, str):
            texts = [part for part in texts.split(",") if part.strip()]
        entries = [text.strip() for text in texts]
        if "*" in entries:
            entries = [*entries, *EVERYBODY]
        named = [text for text in entries if text not in ("*", "unix")]
        self.unix = "unix" in entries
        self.networks = [parse_network(text) for text in named]
        self.standard = standard
        self.trusts = lru_cache(KNOWN_HOSTS)(self._trusts)

    def _trusts(self, host: str) -> bool:
        """Whether the peer of this address is listed; "" is one of a unix socket."""
        if not host:
            return self.unix
        try:
            address = ip_address(host)
        except ValueError:
            return False
        if isinstance(address, IPv6Address) and address.ipv4_mapped:
            address = address.ipv4_mapped
        return any(address in network for network in self.networks)

    def rows(self) -> list[tuple[int, bytes, int]]:
        """The list as the core takes it: family, address, prefix."""
        rows = [
            (FAMILIES[n.version], n.network_address.packed, n.prefixlen)
            for n in self.networks
        ]
        return [*rows, (int(AF_UNIX), b"", 0)] if self.unix else rows

    def origin(self, request: Any, client: Address) -> Origin:
        """Who a request is from that came from this peer."""
        get = request.headers.get
        if self.standard:
            return self.resolve(client, forwarded=get("forwarded"))
        return self.resolve(
            client,
            get("x-forwarded-for"),
            get("x-forwarded-proto"),
            get("x-forwarded-host"),
        )

    def resolve(
        self,
        client: Address,
        x_forwarded_for: str | None = None,
        x_forwarded_proto: str | None = None,
        x_forwarded_host: str | None = None,
        forwarded: str | None = None,
    ) -> Origin:
        """Who stands behind the peer that is the client of the connection.

        Values are those of the fields, repeated ones joined by commas; with forwarded
        the others are not looked at. What is malformed ends the walk at the last good
        address, and so does who wants to stay unknown. Of X-Forwarded-Proto and -Host
        the last value is taken, which is that of the nearest proxy; in Forwarded scheme
        and host are those that the client itself has used.
        """
        if not self.trusts(client[0]):
            return Origin(client)
        if forwarded is not None:
            return self._walk_elements(client, forwarded)
        return Origin(
            self._walk_addresses(client, x_forwarded_for or ""),
            SCHEMES.get(_last(x_forwarded_proto).lower()),
            parse_host(_last(x_forwarded_host)),
        )

    def _walk_addresses(self, client: Address, text: str) -> Address:
        for entry in reversed(text.split(",")):
            entry = entry.strip()
            if not entry:
                continue
            node = parse_node(entry)
            if node is None:
                return client
            client = node
            if not self.trusts(client[0]):
                return client
        return client

    def _walk_elements(self, client: Address, text: str) -> Origin:
        scheme = host = None
        for element in _elements(text):
            scheme = SCHEMES.get(element.get("proto", "").lower())
            host = parse_host(element.get("host", ""))
            node = parse_node(element.get("for", ""), standard=True)
            if node is None:
                break
            client = node
            if not self.trusts(client[0]):
                break
        return Origin(client, scheme, host)


def parse_network(text: str) -> Network:
    """A network, or an address as a network of one; ConfigError with the remedy."""
    try:
        network = ip_network(text)
    except ValueError:
        raise ConfigError(_remedy(text)) from None
    first = network.network_address
    if isinstance(first, IPv6Address) and first.ipv4_mapped and network.prefixlen >= 96:
        return ip_network((first.ipv4_mapped, network.prefixlen - 96))
    return network


def _remedy(text: str) -> str:
    try:
        network = ip_network(text, strict=False)
    except ValueError:
        return (
            f"{text!r} is no IP address, no network like 10.0.0.0/8, and neither "
            "unix nor *"
        )
    return f"{text!r} has bits behind its prefix; write {network}"


# ---- The fields --------------------------------------------------------------------

_V6 = "[0-9A-Fa-f:.]+"
_NODE = re.compile(
    rf"(?:\[(?P<v6>{_V6})\]|(?P<v4>[0-9.]+))"
    rf"(?::(?P<port>[0-9]{{1,5}}|_[A-Za-z0-9._-]+))?|(?P<bare>{_V6})"
)
_HOST = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~%-]+)(?::[0-9]{0,5})?")


def _last(text: str | None) -> str:
    return (text or "").rpartition(",")[2].strip()


def parse_host(text: str) -> str | None:
    """What may stand in a Host field, or None."""
    return text if _HOST.fullmatch(text) else None


def parse_node(text: str, *, standard: bool = False) -> Address | None:
    """An address and its port, 0 if there is none; None if it is malformed or hidden.

    IPv6 may stand in brackets, and must with a port; in Forwarded (standard) it always
    must, and a port may be hidden as the address may (RFC 7239 6).
    """
    return _parse_node(text, standard) if len(text) <= NODE_SIZE else None


@lru_cache(KNOWN_HOSTS)
def _parse_node(text: str, standard: bool) -> Address | None:
    match = _NODE.fullmatch(text)
    if match is None or (standard and match["bare"]):
        return None
    v6, port = match["v6"] or match["bare"], match["port"] or "0"
    if port[0] == "_":
        if not standard:
            return None
        port = "0"
    try:
        address = IPv6Address(v6) if v6 else IPv4Address(match["v4"])
    except ValueError:
        return None
    return (str(address), int(port)) if int(port) <= 65535 else None


_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_VALUE = r"[!#$%&'*+.^_`|~0-9A-Za-z:\[\]-]+"  # a port or brackets without quotes, too
_QUOTED = r'"(?:[^"\\]|\\.)*"'
_PAIR = re.compile(rf"({_TOKEN})=({_VALUE}|{_QUOTED})")
_ELEMENT = re.compile(
    rf"[ \t;]*(?:{_TOKEN}=(?:{_VALUE}|{_QUOTED})[ \t]*(?:;[ \t;]*|$))*"
)
_QUOTED_COMMAS = 8  # in one element; more is no address


def _elements(text: str) -> Iterator[dict[str, str]]:
    """The elements of Forwarded from the last to the first, until one is malformed.

    From the last: a quote that the client has left open must not swallow what its
    proxies have added behind it.
    """
    while text:
        start = len(text)
        for _ in range(_QUOTED_COMMAS):
            start = text.rfind(",", 0, start)
            element = _parse_element(text[start + 1 :])
            if element is not None or start < 0:
                break
        if element is None:
            return
        if element:
            yield element
        text = text[: max(start, 0)]


def _parse_element(text: str) -> dict[str, str] | None:
    """The pairs of one element; None if it is malformed, or has one name twice."""
    if not _ELEMENT.fullmatch(text):
        return None
    pairs = [(name.lower(), _unquoted(value)) for name, value in _PAIR.findall(text)]
    found = dict(pairs)
    return found if len(found) == len(pairs) else None


def _unquoted(value: str) -> str:
    return re.sub(r"\\(.)", r"\1", value[1:-1]) if value[0] == '"' else value
