"""The HTTP cases: Markdown in tests/http, read once, fed to the parser and to a server.

tests/http/README.md tells the notation. Run as a program, this module writes the cases
as the hexadecimal stream that tests/c/test_http_cases.c reads.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

DIRECTORY = Path(__file__).parent / "http"

ESCAPES = {"r": 13, "n": 10, "t": 9, "0": 0, "\\": 92, "{": 123, "}": 125, '"': 34}
NAMES = {value: name for name, value in ESCAPES.items()}

ATTRIBUTE = re.compile(r'(?P<name>[\w-]+)="(?P<value>(?:[^"\\]|\\.)*)"|(?P<word>\S+)')
REPEATED = re.compile(rb"(.)\1{63,}", re.DOTALL)


class CaseError(ValueError):
    """A case file breaks its notation; says where."""


@dataclass(frozen=True)
class Request:
    """One request as the application must see it; None is not checked."""

    method: bytes
    target: bytes
    body: bytes = b""
    path: bytes | None = None
    query: bytes | None = None
    version: bytes | None = None
    fields: dict[str, list[bytes]] = field(default_factory=dict)
    """By lower-case name, every value in order; an empty list: must be absent."""


@dataclass(frozen=True)
class Answer:
    """One answer as the peer must see it."""

    status: int
    request: Request | None = None
    error: str | None = None
    close: bool = False
    keep_alive: bool = False


@dataclass(frozen=True)
class Outcome:
    """The answers that a connection brings, in order."""

    answers: tuple[Answer, ...]
    eof: tuple[Answer, ...] | None = None
    """What follows the end of an incomplete input; None: the input is complete."""
    surplus: bool = False
    """The input goes on behind an answer that closes, as the peer itself asked for."""

    @property
    def closes(self) -> bool:
        return any(answer.close for answer in self.answers)


@dataclass(frozen=True)
class Case:
    """Bytes sent on one connection, and what comes of them."""

    file: str
    line: int
    name: str
    sentence: str
    sent: bytes
    outcome: Outcome

    @property
    def id(self) -> str:
        return f"{self.file}:{self.name}"

    @property
    def row(self) -> str:
        return self.name.partition(": ")[0]


# ---- Notation ------------------------------------------------------------------------


def decode(text: str) -> bytes:
    """The bytes that `text` denotes; a newline denotes nothing."""
    out, at = _decode(text, 0)
    if at < len(text):
        raise ValueError("'}' without '{'; write '\\}'")
    return out


def _decode(text: str, at: int) -> tuple[bytes, int]:
    out = bytearray()
    while at < len(text) and text[at] != "}":
        char = text[at]
        if char == "\\":
            value, at = _escape(text, at + 1)
            out.append(value)
        elif char == "{":
            repeated, at = _repetition(text, at + 1)
            out += repeated
        elif char == "\n":
            at += 1
        elif " " <= char <= "~":
            out.append(ord(char))
            at += 1
        else:
            raise ValueError(f"{char!r} must be written as \\xNN")
    return bytes(out), at


def _escape(text: str, at: int) -> tuple[int, int]:
    if text[at : at + 1] == "x":
        return int(text[at + 1 : at + 3], 16), at + 3
    try:
        return ESCAPES[text[at]], at + 1
    except (KeyError, IndexError):
        raise ValueError(f"unknown escape '\\{text[at : at + 1]}'") from None


def _repetition(text: str, at: int) -> tuple[bytes, int]:
    """What follows the '{' of '{text*count}'; the count stands behind the last '*'."""
    out, end = _decode(text, at)
    if text[end : end + 1] != "}":
        raise ValueError("'{' without '}'")
    head, star, count = text[at:end].rpartition("*")
    if not star or not count.isdecimal():
        raise ValueError("'{' begins a repetition, '{text*count}'; write '\\{'")
    return out[: -len(count) - 1] * int(count), end + 1


def encode(data: bytes) -> str:
    """Text that denotes `data`, one line of it a line."""

    def plain(part: bytes) -> str:
        return "".join(
            f"\\{NAMES[byte]}"
            if byte in NAMES and byte != 34
            else chr(byte)
            if 32 <= byte < 127
            else f"\\x{byte:02x}"
            for byte in part
        )

    out, at = "", 0
    for run in REPEATED.finditer(data):
        out += plain(data[at : run.start()])
        out += f"{{{plain(run[1])}*{len(run[0])}}}"
        at = run.end()
    return (out + plain(data[at:])).replace("\\r\\n", "\\r\\n\n").removesuffix("\n")


# ---- Outcomes ------------------------------------------------------------------------


def parse_answer(line: str) -> Answer:
    """One line of an outcome: `200 GET /p body="x" close`, `400 close FRAMING`."""
    words = line.split(" ", 3)
    status = int(words[0])
    if status < 200:
        return Answer(status)
    if status >= 400:
        request, rest = None, line[len(words[0]) :]
    elif len(words) < 3:
        raise ValueError(f"{line!r} lacks the method and target of its request")
    else:
        request = Request(decode(words[1]), decode(words[2]))
        rest = words[3] if len(words) > 3 else ""
    return _parse_rest(status, request, rest)


def _parse_rest(status: int, request: Request | None, rest: str) -> Answer:
    flags: set[str] = set()
    seen: dict[str, bytes] = {}
    fields: dict[str, list[bytes]] = {}
    for word in ATTRIBUTE.finditer(rest):
        name = word["name"]
        if name in ("body", "path", "query", "version"):
            seen[name] = decode(word["value"])
        elif name:
            fields.setdefault(name.lower(), []).append(decode(word["value"]))
        elif word["word"].startswith("!"):
            fields[word["word"][1:].lower()] = []
        else:
            flags.add(word["word"])
    if request:
        request = Request(request.method, request.target, **seen, fields=fields)
    elif seen or fields:
        raise ValueError("a refused request shows no attributes")
    close, keep_alive = "close" in flags, "keep-alive" in flags
    errors = sorted(flags - {"close", "keep-alive"})
    if len(errors) > 1 or errors and (request or not errors[0].isupper()):
        raise ValueError(f"unknown words: {' '.join(errors)}")
    if not request and not close:
        raise ValueError("a refusal closes: write 'close'")
    return Answer(status, request, errors[0] if errors else None, close, keep_alive)


def parse_outcome(text: str) -> Outcome:
    """The answers to the input, and those to its end if it is incomplete."""
    lines = text.splitlines()
    surplus = lines[-1:] == ["surplus"]
    if surplus:
        lines.pop()
    eof = None
    if "incomplete" in lines:
        at = lines.index("incomplete")
        eof = tuple(_parse_eof(lines[at + 1 :]))
        del lines[at:]
    outcome = Outcome(tuple(map(parse_answer, lines)), eof, surplus)
    if any(answer.close for answer in outcome.answers[:-1]):
        raise ValueError("only the last answer may close")
    if surplus and not outcome.closes:
        raise ValueError("'surplus' stands behind an answer that closes")
    if not lines and eof is None:
        raise ValueError("no outcome; an input that gets none is 'incomplete'")
    return outcome


def _parse_eof(lines: list[str]) -> Iterator[Answer]:
    if not lines:
        raise ValueError("after 'incomplete' comes 'eof: ...'")
    for line in lines:
        if not line.startswith("eof: "):
            raise ValueError(f"after 'incomplete' comes 'eof: ...', not {line!r}")
        if line != "eof: close":
            yield parse_answer(line[5:])


# ---- Files ---------------------------------------------------------------------------


def read_file(path: Path) -> Iterator[Case]:
    """The cases of one Markdown file."""
    start, name = 0, ""
    sentence: list[str] = []
    blocks: dict[str, str] = {}
    kind: str | None = None

    def finish() -> Case:
        try:
            outcome = parse_outcome(blocks["outcome"])
            sent = decode(blocks["http"])
        except KeyError as error:
            raise CaseError(f"{path}:{start}: {name}: no block {error}") from None
        except ValueError as error:
            raise CaseError(f"{path}:{start}: {name}: {error}") from None
        return Case(path.name, start, name, " ".join(sentence), sent, outcome)

    for number, line in enumerate(path.read_text("ascii").splitlines(), 1):
        if kind is not None:
            if line == "```":
                kind = None
            else:
                blocks[kind] += line + "\n"
        elif line.startswith("## "):
            if name:
                yield finish()
            start, name, sentence, blocks = number, line[3:], [], {}
        elif line.startswith("```"):
            kind = line[3:]
            if not name or kind not in ("http", "outcome") or kind in blocks:
                raise CaseError(f"{path}:{number}: misplaced or unknown block {line!r}")
            blocks[kind] = ""
        elif line and name:
            sentence.append(line)
    if kind is not None:
        raise CaseError(f"{path}:{start}: {name}: block {kind!r} has no end")
    if name:
        yield finish()


def read_all(directory: Path = DIRECTORY) -> list[Case]:
    """Every case of every file, in the order of the files' names."""
    files = sorted(set(directory.glob("*.md")) - {directory / "README.md"})
    return [case for file in files for case in read_file(file)]


# ---- The stream for the C runner -----------------------------------------------------


def write_stream(cases: Iterable[Case], out: TextIO) -> None:
    """One record a line, bytes in hexadecimal, `-` for none; see test_http_cases.c."""
    for case in cases:
        print("case", case.id.replace(" ", "_"), file=out)
        print("sent", case.sent.hex() or "-", file=out)
        interim = False
        for answer in case.outcome.answers:
            if answer.status == 100:
                interim = True
                continue
            _write_answer(answer, interim, out)
            interim = False
        if case.outcome.eof is not None:
            print("incomplete", int(interim), file=out)
        print("end", file=out)


def _write_answer(answer: Answer, interim: bool, out: TextIO) -> None:
    request = answer.request
    if request is None:
        print("error", answer.status, answer.error or "-", int(interim), file=out)
        return
    print(
        "request",
        request.method.hex(),
        request.target.hex(),
        request.body.hex() or "-",
        int(not answer.close),
        int(interim),
        file=out,
    )
    for name in ("path", "query", "version"):
        value: bytes | None = getattr(request, name)
        if value is not None:
            print(name, value.hex() or "-", file=out)
    for name, values in request.fields.items():
        text = ",".join(value.hex() for value in values)
        print("field", name.encode().hex(), len(values), text or "-", file=out)


if __name__ == "__main__":
    write_stream(read_all(), sys.stdout)
