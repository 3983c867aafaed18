"""Streams for parsers to disagree about: assembled from a grammar, then damaged.

Most decisions are made as RFC 9112 has them, a few take an oddity from the tables, so
that a stream is mostly right and wrong in one or two places: parsers differ there, and
agree on garbage. Bodies hold what would be worth smuggling.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import TypeVar

from http_cases import decode

T = TypeVar("T")

ODD = 0.015
"""How likely a decision takes an oddity; a request is some twenty decisions."""

# ---- The tables ----------------------------------------------------------------------


def words(text: str) -> tuple[bytes, ...]:
    """Words in the notation of tests/http."""
    return tuple(decode(word) for word in text.split())


def fields(text: str) -> tuple[tuple[bytes, bytes], ...]:
    pairs = (word.split(b":", 1) for word in words(text))
    return tuple((name, value) for name, value in pairs)


NOTHING = (b"",)
SPACE = (b" ",)

METHODS = words("GET GET POST POST PUT HEAD OPTIONS DELETE")
ODD_METHODS = NOTHING + words(r"get QUERY CONNECT PRI M-SEARCH G\x20T G\0T G\x80")
TARGETS = words(r"/ /p?q=1 /%00 // /a?b?c /\\ http://b/x /;'\"|")
ODD_TARGETS = NOTHING + words(r"* a:80 /#f /\xc3\xa9 /\x20x /\x7f ?q ftp://b http:///")
VERSIONS = words("HTTP/1.1") * 9 + words("HTTP/1.0")
ODD_VERSIONS = NOTHING + words(
    r"""HTTP/1 HTTP/1.2 HTTP/0.9 HTTP/2.0 HTTP/1.10 HTTP/01.1 HTTP/1,1 HTTP/1.1\x20
    HTTP/\x201.1 http/1.1 ICE/1.0 RTSP/1.0"""
)

HOSTS = words("a a:80 [::1]:80 127.0.0.1")
ODD_HOSTS = NOTHING + words(r"a,b u@a a/p a:b a\x20b a\0 \xff")
FIELDS = fields(
    r"""X-A:b Accept:*/* Cookie:a=b;\x20c X-Empty: X-Text:caf\xe9\x20\x80 X-Tab:a\tb
    Content-Type:a/b Connection:keep-alive Connection:a,close Expect:100-continue
    Transfer_Encoding:chunked TE:trailers"""
)
ODD_FIELDS = fields(
    r"""Connection:close,\x20Host Connection:Upgrade Connection:Content-Length
    Connection:Transfer-Encoding Proxy-Connection:close Upgrade:h2c Expect:200-ok
    TE:chunked Content-Length:3 Host:b X:a\0b X:a\rb X:a\nb X:a\r\n\x20b X:\x01\x1f\x7f
    :x X\0:a X[:a X\x80:a"""
)
COLONS = words(":")
ODD_COLONS = NOTHING + words(r"\x20: \t: :: \x20 \0: :\r \x85: \r\n:")
SPACES = NOTHING + words(r"\x20 \x20 \x20 \t \x20\x20")
ODD_SPACES = words(r"\x0b \x0c \r \n \0 \xa0 \r\n\x20 \x20\r\n\t")
LINE_ENDS = words(r"\r\n")
ODD_LINE_ENDS = NOTHING + words(
    r"""\n \r \r\r\n \n\r \n\n \r\n\r\n \r\0\n \r\x20 \r\x0c\n \x0b \x85
    \x20\r\n \t\r\n \r\n\x20 \r\n\t"""
)

LENGTHS = words("%d")
ODD_LENGTHS = NOTHING + words(
    r"""+%d -%d 0%d 0x%d %d, ,%d %d,\x205 %d,%d %d\x20 \t%d\t %d_0 %d.0 %dx %de0 %d;
    %d\0 \x0b%d %d\xa0 1\x20%d"""
)
CODINGS = words("chunked chunked Chunked")
ODD_CODINGS = NOTHING + words(
    r"""chunked,\x20chunked gzip,\x20chunked chunked,\x20gzip chunked;a=b chunked\x20x
    ,chunked chunked, \"chunked\" xchunked chunkedx identity chun\r\n\x20ked
    chunked\0 chunked\x85 \x0bchunked \xa0chunked"""
)
SIZES = words("%x %X 0%x 000%x")
ODD_SIZES = NOTHING + words(
    r"""+%x -%x 0x%x %xh %xg %x_0 %x.0 %x, \x20%x %x\x20 %x\t %x\0 \x0b%x \r\n%x \xa0%x
    %x\x85 {0*17} {0*16}%x"""
)
OFF_BY = (1, -1, 2, 5, 16, 1 << 16, 1 << 32, 1 << 63, 1 << 64)
EXTENSIONS = NOTHING * 3 + words(r";a ;a=b ;a=b;c ;a=\"b\x20c;\\\"\"")
ODD_EXTENSIONS = words(
    r"""; ;; ;= =a a \x20;a ;\x20a ;a\x20=b ;a=\x20b ;a=\"b ;a=\"b\"c \"; ;a=\"\r\n\"
    ;a\rb ;a=\n ;a\0 ;\xff ;a=\x80"""
)
TRAILERS = NOTHING * 3 + words(r"X-T:\x20a\r\n")
ODD_TRAILERS = words(
    r"""Content-Length:5\r\n Transfer-Encoding:chunked\r\n Host:b\r\n
    Connection:close\r\n X\r\n :\x20a\r\n \x20X:a\r\n X\x20:a\r\n X:a\n X:\0\r\n X:a
    X:a\r\n\x20b\r\n GET\x20/\x20HTTP/1.1\r\n \r\n \n"""
)
BODIES = NOTHING + words(
    r"""hello hello \r\n \n \0\xff 0\r\n\r\n 5\r\nhello\r\n {x*17} {x*300}
    GET\x20/smuggled\x20HTTP/1.1\r\nHost:a\r\n\r\n"""
)
ODD_BODIES = words(r"{0123456789abcdef*300} {\r\n0\r\n\r\nGET\x20/\x20HTTP/1.1*300}")
GAPS = NOTHING
ODD_GAPS = words(r"\r\n \r\n\r\n \r\n\r\n\r\n \n \r \x20 \0 X")

TOKENS = words(
    r"""\r \n \0 \t \x20 \x0b \x0c \x80 \x85 \xa0 \xff \x01 \x1f \x7f : , ; = \" \\ # %
    \r\n \r\n\r\n \n\n \r\n\x20 0 5 f - _ + 0x chunked Content-Length 0\r\n\r\n
    Content-Length:5\r\n Transfer-Encoding:chunked\r\n Host:b\r\n
    GET\x20/\x20HTTP/1.1\r\nHost:a\r\n\r\n"""
)
DELIMITER = re.compile(rb"[\r\n:,;= ]")


class Streams(Iterator[bytes]):
    """An endless series of streams; the same seed gives the same series."""

    def __init__(self, seed: int, examples: Sequence[bytes]) -> None:
        self.random = Random(seed)
        self.examples = examples

    def __next__(self) -> bytes:
        """One stream: of the grammar or an example, or one behind the other."""
        kind = self.random.random()
        data = b"" if kind < 0.15 else self.requests()
        if kind < 0.25:
            data = self.pick(self.examples) + data
        for _ in range(self.pick((0, 0, 0, 1, 1, 2))):
            data = self.pick(MUTATIONS)(self, data)
        return data

    def pick(self, items: Sequence[T]) -> T:
        """random.choice() at a third of its price."""
        return items[int(self.random.random() * len(items))]

    def some(self, usual: Sequence[T], odd: Sequence[T]) -> T:
        return self.pick(odd if self.random.random() < ODD else usual)

    def off(self, size: int) -> int:
        """The size, or one that is wrong."""
        if self.random.random() >= ODD:
            return size
        return max(0, size + self.pick(OFF_BY))

    # -- the grammar --

    def requests(self) -> bytes:
        count = self.pick((1, 1, 1, 1, 2, 2, 3, 5))
        parts = (self.request() + self.some(GAPS, ODD_GAPS) for _ in range(count))
        return b"".join(parts)

    def request(self) -> bytes:
        lines, body = self.framed()
        for _ in range(self.pick((0, 0, 1, 1, 2))):
            lines.append(self.field(*self.some(FIELDS, ODD_FIELDS)))
        if self.random.random() >= ODD:
            lines.append(self.field(b"Host", self.some(HOSTS, ODD_HOSTS)))
        self.random.shuffle(lines)
        return b"".join((self.request_line(), *lines, self.line_end(), body))

    def request_line(self) -> bytes:
        method = self.some(METHODS, ODD_METHODS) + self.some(SPACE, SPACES + ODD_SPACES)
        target = self.some(TARGETS, ODD_TARGETS) + self.some(SPACE, SPACES + ODD_SPACES)
        return method + target + self.some(VERSIONS, ODD_VERSIONS) + self.line_end()

    def line_end(self) -> bytes:
        return self.some(LINE_ENDS, ODD_LINE_ENDS)

    def field(self, name: bytes, value: bytes) -> bytes:
        colon, before = self.some(COLONS, ODD_COLONS), self.some(SPACES, ODD_SPACES)
        after = self.some(NOTHING, SPACES + ODD_SPACES)
        return b"".join((name, colon, before, value, after, self.line_end()))

    def framed(self) -> tuple[list[bytes], bytes]:
        """The fields that frame a body, and the body as it is sent."""
        body = self.some(BODIES, ODD_BODIES)
        framing = self.random.random()
        if framing < 0.3:
            return [], b""
        lines = []
        if framing < 0.65 + ODD:
            digits = b"%d" % self.off(len(body))
            length = self.some(LENGTHS, ODD_LENGTHS).replace(b"%d", digits)
            lines.append(self.field(b"Content-Length", length))
        if framing >= 0.65:
            coding = self.some(CODINGS, ODD_CODINGS)
            lines.append(self.field(b"Transfer-Encoding", coding))
            body = self.chunked(body)
        return lines, body

    def chunked(self, body: bytes) -> bytes:
        sent = b""
        while body:
            n = self.random.randint(1, len(body))
            sent += self.chunk_head(n) + body[:n] + self.line_end()
            body = body[n:]
        trailer = self.some(TRAILERS, ODD_TRAILERS)
        return sent + self.chunk_head(0) + trailer + self.line_end()

    def chunk_head(self, size: int) -> bytes:
        form = self.some(SIZES, ODD_SIZES)
        digits = b"%X" if b"%X" in form else b"%x"
        text = form.replace(digits, digits % self.off(size))
        return text + self.some(EXTENSIONS, ODD_EXTENSIONS) + self.line_end()

    # -- damage --

    def spot(self, data: bytes) -> int:
        """Where to damage: often around a delimiter, where parsers decide."""
        at = self.random.randint(0, len(data))
        if self.random.random() < 0.5 and (found := DELIMITER.search(data, at)):
            return found.start() + self.pick((0, 1))
        return at

    def flip_bit(self, data: bytes) -> bytes:
        at, bit = self.spot(data), 1 << self.random.randrange(8)
        flipped = bytes(byte ^ bit for byte in data[at : at + 1])
        return data[:at] + flipped + data[at + 1 :]

    def insert(self, data: bytes) -> bytes:
        at = self.spot(data)
        return data[:at] + self.pick(TOKENS) + data[at:]

    def replace(self, data: bytes) -> bytes:
        at = self.spot(data)
        return data[:at] + self.pick(TOKENS) + data[at + 1 :]

    def delete(self, data: bytes) -> bytes:
        at = self.spot(data)
        return data[:at] + data[at + self.pick((1, 1, 2, 5)) :]

    def repeat(self, data: bytes) -> bytes:
        at = self.spot(data)
        end = at + self.pick((1, 2, 4, 32))
        return data[:end] + data[at:]

    def truncate(self, data: bytes) -> bytes:
        return data[: self.spot(data)]

    def change_line_end(self, data: bytes) -> bytes:
        at = data.find(b"\r\n", self.random.randint(0, len(data)))
        if at < 0:
            return data
        return data[:at] + self.pick(ODD_LINE_ENDS) + data[at + 2 :]

    def change_lines(self, data: bytes) -> bytes:
        """One line is duplicated, deleted, or changes places with another."""
        lines = data.splitlines(keepends=True) or [b""]
        a, b = self.random.randrange(len(lines)), self.random.randrange(len(lines))
        kind = self.random.randrange(3)
        if kind == 0:
            lines.insert(b, lines[a])
        elif kind == 1:
            del lines[a]
        else:
            lines[a], lines[b] = lines[b], lines[a]
        return b"".join(lines)

    def splice(self, data: bytes) -> bytes:
        other = self.pick(self.examples)
        return data[: self.spot(data)] + other[self.spot(other) :]


Mutation = Callable[[Streams, bytes], bytes]
MUTATIONS: tuple[Mutation, ...] = (
    *(Streams.insert, Streams.insert, Streams.replace, Streams.delete, Streams.repeat),
    *(Streams.flip_bit, Streams.truncate, Streams.splice),
    *(Streams.change_line_end, Streams.change_lines),
)
