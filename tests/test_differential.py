"""The core against llhttp and h11: a short run of the differential fuzzer.

tests/fuzz/differential.py runs as long as one likes; here the seeds are fixed.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).with_name("fuzz")))

from differential import (
    Core,
    CoreError,
    End,
    Request,
    Verdict,
    ask_h11,
    ask_llhttp,
    disagreement,
    examples,
    findings,
    minimised,
    read_end,
)
from streams import Streams

STREAMS = 2000
GET = Request(b"GET", b"/", b"")
POST = Request(b"POST", b"/", b"hello")


@pytest.fixture(scope="module")
def core() -> Iterator[Core]:
    with Core() as core:
        yield core


# ---- The run -------------------------------------------------------------------------


def test_others_disagree_with_no_http_case(core: Core) -> None:
    assert list(findings(core, examples(), Counter())) == []


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_others_disagree_with_no_stream(core: Core, seed: int) -> None:
    tally: Counter[str] = Counter()
    streams = islice(Streams(seed, examples()), STREAMS)
    assert list(findings(core, streams, tally)) == []
    assert min(tally["accepted"], tally["cut short"], tally["refused"]) > STREAMS / 20


class Repairing(Core):
    """One that takes CR and LF alone for line ends."""

    def ask(self, data: bytes) -> Verdict:
        return super().ask(re.sub(rb"\r\n?|\n", b"\r\n", data))


def test_a_core_that_repairs_line_ends_is_found_out() -> None:
    with Repairing() as core:
        streams = islice(Streams(1, examples()), STREAMS)
        assert next(findings(core, streams, Counter()), None) is not None


# ---- The judge -----------------------------------------------------------------------


def judged(ours: Verdict, llhttp: Verdict, h11: Verdict) -> str | None:
    return disagreement(ours, {"llhttp": llhttp, "h11": h11})


def test_a_request_that_both_others_refuse_is_an_error() -> None:
    refused = Verdict([GET], End.REFUSED)
    assert judged(Verdict([GET, POST], End.WHOLE), refused, refused)


def test_a_request_that_one_other_takes_is_none() -> None:
    ours = Verdict([GET, POST], End.WHOLE)
    assert judged(ours, ours, Verdict([GET], End.REFUSED)) is None


def test_to_refuse_what_others_take_is_none() -> None:
    theirs = Verdict([GET, POST], End.WHOLE)
    assert judged(Verdict([GET], End.REFUSED), theirs, theirs) is None


def test_a_silent_parser_leaves_the_judgement_to_the_other() -> None:
    ours, silent = Verdict([GET, POST], End.WHOLE), Verdict([GET], End.SILENT)
    assert judged(ours, silent, Verdict([GET], End.REFUSED))
    assert judged(ours, silent, ours) is None
    assert judged(ours, silent, silent) is None


@pytest.mark.parametrize("name", Request._fields)
def test_another_reading_of_a_request_is_an_error(name: str) -> None:
    ours = Verdict([POST], End.WHOLE)
    theirs = Verdict([POST._replace(**{name: b"other"})], End.WHOLE)
    assert judged(ours, ours, theirs)


def test_a_request_that_we_overlook_is_an_error() -> None:
    theirs = Verdict([GET, POST], End.WHOLE)
    assert judged(Verdict([GET], End.WHOLE), theirs, theirs)


# ---- Its parts -----------------------------------------------------------------------

STREAMS_AND_ENDS = [
    (b"", [], End.WHOLE),
    (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" * 2, [GET, GET], End.WHOLE),
    (b"GET / HTTP/1.1\r\nHost: a\r\n\r\nGET", [GET], End.REFUSED),
    (b"GET / HTTP/1.0\r\n\r\n", [GET], End.CLOSED),
    (
        b"POST / HTTP/1.0\r\nConnection: keep-alive\r\nContent-Length: 5\r\n\r\nhello",
        [POST],
        End.WHOLE,
    ),
    (
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n"
        b"Connection: close\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        [POST],
        End.CLOSED,
    ),
]


@pytest.mark.parametrize(("stream", "requests", "end"), STREAMS_AND_ENDS)
def test_all_read_the_same(
    core: Core, stream: bytes, requests: list[Request], end: End
) -> None:
    verdicts = core.ask(stream), ask_llhttp(stream), ask_h11(stream)
    assert verdicts == (Verdict(requests, end),) * 3


def test_the_core_asks_for_a_body_that_is_held_back(core: Core) -> None:
    fields = b"Host: a\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n"
    head = b"POST / HTTP/1.1\r\n" + fields
    assert core.ask(head + b"hello") == Verdict([POST], End.WHOLE)
    assert core.ask(head + b"hell") == Verdict([], End.REFUSED)


@pytest.mark.parametrize("statuses", [[], [204, 204], [400], [204, 400, 400]])
def test_an_answer_too_few_or_too_many_is_an_error(statuses: list[int]) -> None:
    answers = b"".join(b"HTTP/1.1 %d X\r\n\r\n" % status for status in statuses)
    with pytest.raises(CoreError):
        read_end(answers, accepted=1)


def test_the_same_seed_gives_the_same_streams() -> None:
    one, two = (list(islice(Streams(1, examples()), 100)) for _ in range(2))
    assert one == two


def test_what_is_not_needed_is_left_out() -> None:
    assert minimised(b"hello, world", lambda s: b"," in s and b"w" in s) == b",w"
