"""Native handlers over real sockets: what they get, give, and what comes of it."""

from __future__ import annotations

import io
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import h11
import pytest
from live import GET, HIGH_WATER, SOON, Answer, Endless, Held, Live, chunk, get, post

from prefork import ClientDisconnected, Request, RequestError, Response
from prefork.native import BODY_THREADS

PLAIN = "text/plain; charset=utf-8"
EXPECT = "Expect: 100-continue"


def answered(serve, result: Any, request: bytes = GET, **options: Any) -> Answer:
    """The answer that a handler's result becomes."""
    return serve(lambda _: result, **options).ask(request)


def logged(live: Live) -> str:
    """What was logged at the end: every line that comes has come."""
    live.stop()
    return live.log.text


# ---- What a handler may return -------------------------------------------------------


class Text(str):
    pass


class Data(bytes):
    pass


@pytest.mark.parametrize(
    "result",
    [
        pytest.param("hé".encode(), id="bytes"),
        pytest.param("hé", id="str"),
        pytest.param(bytearray("hé".encode()), id="bytearray"),
        pytest.param(memoryview("hé".encode()), id="memoryview"),
        pytest.param(Data("hé".encode()), id="bytes-subclass"),
        pytest.param(Text("hé"), id="str-subclass"),
        pytest.param(Response("hé".encode()), id="Response-bytes"),
        pytest.param(Response("hé"), id="Response-str"),
        pytest.param(Response(bytearray("hé".encode())), id="Response-bytearray"),
        pytest.param(Response("hé", headers={"X": "y"}), id="Response-with-headers"),
    ],
)
def test_what_is_whole_becomes_a_body_of_known_length(serve, result):
    answer = answered(serve, result)
    assert (answer.status, answer.body) == (200, "hé".encode())
    assert answer["content-length"] == "3" and answer["content-type"] == PLAIN


@pytest.mark.parametrize(
    "result",
    [
        pytest.param([b"h", b"i"], id="list-of-bytes"),
        pytest.param(["h", b"", bytearray(b"i")], id="list-of-mixed"),
        pytest.param((b"h", b"i"), id="tuple"),
        pytest.param(iter([b"h", b"i"]), id="iterator"),
        pytest.param((part for part in ("h", "i")), id="generator"),
        pytest.param(io.BytesIO(b"hi"), id="file"),
        pytest.param(Response([b"h", b"i"]), id="Response-list"),
        pytest.param(Response(iter([b"h", b"i"])), id="Response-iterator"),
        pytest.param(Response(iter("hi"), headers={"X": "y"}), id="Response-str-parts"),
    ],
)
def test_what_comes_in_parts_becomes_a_chunked_body(serve, result):
    answer = answered(serve, result)
    assert (answer.status, answer.body) == (200, b"hi")
    assert answer["transfer-encoding"] == "chunked" and "content-length" not in answer


def test_an_empty_part_does_not_end_a_stream(serve):
    assert answered(serve, [b"", b"a", b"", b"b", b""]).body == b"ab"


def test_a_stream_without_parts_is_an_empty_answer(serve):
    answer = answered(serve, iter([]))
    assert (answer.status, answer.body, answer["content-length"]) == (200, b"", "0")


@pytest.mark.parametrize("result", [None, 42, {"a": 1}, object(), 1.5, True])
def test_what_is_no_answer_is_a_500_and_the_log_says_what_would_be(serve, result):
    live = serve(lambda _: result)
    assert live.ask().status == 500
    assert live.log.until(
        f"the handler returned {type(result).__name__}; return bytes, str, Response or "
        "an iterator of bytes"
    )


def test_a_500_names_the_request_in_the_log(serve):
    live = serve(lambda _: None)
    live.ask(get("/some%0awhere"))
    assert "<Request GET /some%0awhere> failed" in live.log.until("TypeError")


def test_a_part_of_the_wrong_kind_cuts_the_answer_off_and_is_named(serve):
    live = serve(lambda _: ["body", 404])
    with pytest.raises(h11.RemoteProtocolError):
        live.ask()
    assert live.log.until("a streamed answer is made of bytes or str, not 404")


# ---- Response ------------------------------------------------------------------------

FIELDS = [("X-One", "1"), ("X-Two", "2")]


class Items:
    def items(self):
        return iter(FIELDS)


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param(dict(FIELDS), id="dict"),
        pytest.param(FIELDS, id="list"),
        pytest.param(tuple(FIELDS), id="tuple"),
        pytest.param(Items(), id="object-with-items"),
        pytest.param([(n.encode(), v.encode()) for n, v in FIELDS], id="bytes"),
    ],
)
@pytest.mark.parametrize("body", [b"hi", [b"h", b"i"]], ids=["whole", "streamed"])
def test_header_fields_are_sent_as_given(serve, headers, body):
    answer = answered(serve, Response(body, headers=headers))
    assert (answer["x-one"], answer["x-two"], answer.body) == ("1", "2", b"hi")


def test_a_repeated_field_is_sent_each_time(serve):
    cookies = [("Set-Cookie", "a=1"), ("Set-Cookie", "b=2")]
    answer = answered(serve, Response(b"", headers=cookies))
    assert answer.all("set-cookie") == ["a=1", "b=2"]


def test_a_field_value_may_be_latin_1(serve):
    assert answered(serve, Response(b"", headers={"X": "é"}))["x"] == "é"


@pytest.mark.parametrize("headers", [None, {"X": "y"}], ids=["alone", "among-headers"])
def test_content_type_replaces_the_default(serve, headers):
    response = Response("<p>", headers=headers, content_type="text/html")
    assert answered(serve, response)["content-type"] == "text/html"


def test_a_content_type_field_replaces_the_default(serve):
    response = Response("{}", headers={"Content-Type": "application/json"})
    assert answered(serve, response)["content-type"] == "application/json"


@pytest.mark.parametrize("name", ["Date", "Server"])
@pytest.mark.parametrize("body", [b"hi", [b"h", b"i"]], ids=["whole", "streamed"])
def test_the_app_may_say_what_the_server_says_by_default(serve, name, body):
    response = Response(body, headers={name: "mine"})
    assert answered(serve, response)[name.lower()] == "mine"


@pytest.mark.parametrize(
    ("status", "reason"),
    [(201, "Created"), (404, "Not Found"), (599, ""), (999, ""), (200, "OK")],
)
@pytest.mark.parametrize("headers", [None, {"X": "y"}], ids=["plain", "with-headers"])
def test_a_status_is_sent_with_its_reason(serve, status, reason, headers):
    answer = answered(serve, Response(b"hi", status=status, headers=headers))
    assert (answer.status, answer.reason, answer.body) == (status, reason, b"hi")


@pytest.mark.parametrize("status", [-200, 0, 20, 100, 101, 199, 1000, 70000])
@pytest.mark.parametrize("headers", [None, {"X": "y"}], ids=["plain", "with-headers"])
def test_a_status_that_is_none_is_a_500(serve, status, headers):
    live = serve(lambda _: Response(b"hi", status=status, headers=headers))
    assert live.ask().status == 500
    assert live.log.until("status is not between")


def test_a_response_may_be_returned_again_and_again(serve):
    response = Response(b"hi", headers=FIELDS)
    live = serve(lambda _: response)
    with live.client() as client:
        assert [client.ask().body for _ in range(3)] == [b"hi"] * 3


# ---- What the server does not let through --------------------------------------------

FORGED = ["a\r\nX-Evil: 1", "a\nb", "a\rb", "a\0b", "a\x7fb", "\r\n"]


@pytest.mark.parametrize("value", FORGED)
@pytest.mark.parametrize("body", [b"hi", [b"h", b"i"]], ids=["whole", "streamed"])
def test_a_forged_value_is_a_500_and_named_in_the_log(serve, value, body):
    live = serve(lambda _: Response(body, headers={"X-Mine": value}))
    answer = live.ask()
    assert answer.status == 500 and "x-evil" not in answer
    assert live.log.until(f"'X-Mine': {value!r}")


@pytest.mark.parametrize("name", ["X\r\nY", "X\n", "X Y", "X:", "", "\0", "Näme"])
def test_a_forged_name_is_a_500_and_named_in_the_log(serve, name):
    live = serve(lambda _: Response(b"hi", headers={name: "value"}))
    assert live.ask().status == 500
    assert live.log.until(f"{name!r}: 'value'")


@pytest.mark.parametrize("value", FORGED)
@pytest.mark.parametrize("headers", [None, {"X": "y"}], ids=["alone", "among-headers"])
def test_a_forged_content_type_is_a_500_and_named_in_the_log(serve, value, headers):
    live = serve(lambda _: Response(b"hi", headers=headers, content_type=value))
    assert live.ask().status == 500
    assert live.log.until(f"'Content-Type': {value!r}")


@pytest.mark.parametrize("value", ["€", 5, None])
def test_a_value_that_is_no_latin_1_text_is_a_500_and_named(serve, value):
    live = serve(lambda _: Response(b"hi", headers={"X": value}))
    assert live.ask().status == 500
    assert repr(value) in live.log.until("a header field must be")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("Connection", "keep-alive"),
        ("Connection", "upgrade"),
        ("Keep-Alive", "timeout=5"),
        ("Proxy-Connection", "close"),
        ("TE", "trailers"),
        ("Trailer", "X"),
        ("Transfer-Encoding", "chunked"),
        ("Upgrade", "websocket"),
    ],
)
def test_a_hop_by_hop_field_is_refused_and_named(serve, name, value):
    live = serve(lambda _: Response(b"hi", headers={name: value}))
    assert live.ask().status == 500
    assert f"'{name}': '{value}'" in live.log.until("hop-by-hop")


@pytest.mark.parametrize("value", ["close", "Close", "x-mine, close"])
def test_the_app_may_have_the_connection_closed(serve, value):
    client = serve(lambda _: Response(b"hi", headers={"Connection": value})).client()
    answer = client.ask()
    assert answer.closes and answer.body + client.rest() == b"hi"


# ---- Length and framing --------------------------------------------------------------


def test_the_right_content_length_is_sent_once(serve):
    answer = answered(serve, Response(b"hello", headers={"Content-Length": "5"}))
    assert (answer["content-length"], answer.body) == ("5", b"hello")


@pytest.mark.parametrize("length", ["4", "6", "-1", "five", "", "5, 5", "+5", "05"])
def test_a_wrong_content_length_of_a_whole_body_is_a_500(serve, length):
    live = serve(lambda _: Response(b"hello", headers={"Content-Length": length}))
    assert live.ask().status == 500
    assert live.log.until(f"'Content-Length': '{length}'")


def test_two_content_lengths_are_a_500(serve):
    twice = [("Content-Length", "5"), ("Content-Length", "5")]
    live = serve(lambda _: Response(b"hello", headers=twice))
    assert live.ask().status == 500
    assert live.log.until("Content-Length is malformed or contradictory")


def test_a_stream_of_announced_length_is_not_chunked(serve):
    response = Response([b"hel", b"lo"], headers={"Content-Length": "5"})
    answer = answered(serve, response)
    assert (answer.body, answer["content-length"]) == (b"hello", "5")
    assert "transfer-encoding" not in answer


def test_a_stream_shorter_than_announced_is_cut_off_and_logged(serve):
    live = serve(lambda _: Response([b"hel"], headers={"Content-Length": "5"}))
    client = live.client()
    client.send(GET)
    assert client.rest().endswith(b"\r\n\r\nhel")
    assert live.log.until("shorter than its Content-Length")


def test_a_stream_longer_than_announced_is_cut_off_and_logged(serve):
    parts = [b"hel", b"lo, world"]
    live = serve(lambda _: Response(parts, headers={"Content-Length": "5"}))
    client = live.client()
    client.send(GET)
    body = client.rest().partition(b"\r\n\r\n")[2]
    assert b"hello".startswith(body)
    assert live.log.until("longer than its Content-Length")


@pytest.mark.parametrize(
    "result",
    [b"hello", "hello", Response(b"hello"), Response(b"hello", headers={"X": "y"})],
    ids=["bytes", "str", "Response", "Response-with-headers"],
)
def test_head_is_answered_as_get_without_the_body(serve, result):
    client = serve(lambda _: result).client()
    answers = [client.ask(get(method=method)) for method in ("GET", "HEAD", "GET")]
    assert [a.body for a in answers] == [b"hello", b"", b"hello"]
    assert answers[0].undated == answers[1].undated


def test_head_of_a_stream_is_answered_as_get_without_the_body(serve):
    client = serve(lambda _: iter([b"hello"])).client()
    answers = [client.ask(get(method=method)) for method in ("GET", "HEAD", "GET")]
    assert answers[1].body == b""
    assert answers[0].undated == answers[1].undated


def test_head_of_an_endless_stream_ends_and_closes_the_stream(serve):
    endless = Endless()
    live = serve(lambda _: iter(endless))
    assert live.ask(get(method="HEAD")).status == 200
    assert endless.closed.wait(SOON) and endless.pulled == len(endless.part)


def test_head_may_announce_any_length(serve):
    response = Response(b"", headers={"Content-Length": "1000"})
    answer = answered(serve, response, get(method="HEAD"))
    assert (answer.status, answer["content-length"]) == (200, "1000")


@pytest.mark.parametrize("status", [204, 304])
@pytest.mark.parametrize("body", [b"hello", [b"hello"]], ids=["whole", "streamed"])
def test_a_status_without_a_body_drops_it(serve, status, body):
    client = serve(lambda _: Response(body, status=status)).client()
    answers = [client.ask() for _ in range(2)]
    assert [(a.status, a.body) for a in answers] == [(status, b"")] * 2


def test_204_has_no_content_length(serve):
    response = Response(b"", status=204, headers={"Content-Length": "0"})
    assert "content-length" not in answered(serve, response)


# ---- What a handler gets -------------------------------------------------------------

COOKIES = 'Cookie: a=1; b="x y"; a=2; broken; =c; d='
QUERY = "/?a=1&a=2&b=%20+%C3%A9&c&%FF=%FF"
REPEATED = get("/", "X-A: 1", "Accept: text/*", "x-a: 2", "COOKIE: c=1", "Cookie: d=2")
BODY = post(b'{"a": [1, "\xc3\xa9"]}')
ATTRIBUTES: dict[str, tuple[bytes, Callable[[Request], Any], Any]] = {
    "method": (get(), lambda r: r.method, "GET"),
    "method-as-sent": (get(method="pUrge"), lambda r: r.method, "pUrge"),
    "method-head": (get(method="HEAD"), lambda r: r.method, "HEAD"),
    "target": (get("/a%20b?c"), lambda r: r.target, b"/a%20b?c"),
    "path": (get("/a/b"), lambda r: r.path, "/a/b"),
    "path-decoded": (get("/a%20%C3%A9%2Fb"), lambda r: r.path, "/a é/b"),
    "path-not-UTF-8": (get("/%ff%C3"), lambda r: r.path, "/��"),
    "path-wrong-escape": (get("/%zz%"), lambda r: r.path, "/%zz%"),
    "path-dots": (get("/a/../b//c/."), lambda r: r.path, "/a/../b//c/."),
    "path-absolute": (get("http://a/b?c"), lambda r: r.path, "/b"),
    "path-absolute-empty": (get("http://a"), lambda r: r.path, "/"),
    "path-asterisk": (get("*", method="OPTIONS"), lambda r: r.path, "*"),
    "raw_path": (get("/a%20%ff?c"), lambda r: r.raw_path, b"/a%20%ff"),
    "raw_path-empty": (get("http://a?c"), lambda r: r.raw_path, b"/"),
    "query_string": (get("/?a=1&b=%20"), lambda r: r.query_string, b"a=1&b=%20"),
    "query_string-two-marks": (get("/?a?b"), lambda r: r.query_string, b"a?b"),
    "query_string-none": (get("/"), lambda r: r.query_string, b""),
    "query": (
        get(QUERY),
        lambda r: dict(r.query),
        {"a": "1", "b": "  é", "c": "", "�": "�"},
    ),
    "query-get": (get(QUERY), lambda r: r.query.get("x", "none"), "none"),
    "query-get_all": (get(QUERY), lambda r: r.query.get_all("a"), ["1", "2"]),
    "query-in": (get(QUERY), lambda r: ("c" in r.query, "x" in r.query), (True, False)),
    "query-len": (get(QUERY), lambda r: len(r.query), 4),
    "query-none": (get("/"), lambda r: dict(r.query), {}),
    "headers-any-case": (
        get("/", "X-Mine: 1"),
        lambda r: [r.headers[n] for n in ("x-mine", "X-MINE", "X-Mine", b"x-mine")],
        ["1"] * 4,
    ),
    "headers-get": (REPEATED, lambda r: r.headers.get("accept"), "text/*"),
    "headers-get-default": (get(), lambda r: r.headers.get("x", "none"), "none"),
    "headers-get-none": (get(), lambda r: r.headers.get("x"), None),
    "headers-joined": (REPEATED, lambda r: r.headers["x-a"], "1, 2"),
    "headers-cookies-joined": (REPEATED, lambda r: r.headers["cookie"], "c=1; d=2"),
    "headers-get_all": (REPEATED, lambda r: r.headers.get_all("X-A"), ["1", "2"]),
    "headers-get_all-none": (get(), lambda r: r.headers.get_all("x"), []),
    "headers-in": (
        REPEATED,
        lambda r: [n in r.headers for n in ("ACCEPT", "x-b", "€", 5, None)],
        [True, False, False, False, False],
    ),
    "headers-iter": (
        REPEATED,
        lambda r: list(r.headers),
        ["host", "x-a", "accept", "cookie"],
    ),
    "headers-len": (REPEATED, lambda r: len(r.headers), 4),
    "headers-keys": (get(), lambda r: list(r.headers.keys()), ["host"]),
    "headers-values": (get(), lambda r: list(r.headers.values()), ["a"]),
    "headers-items": (get(), lambda r: list(r.headers.items()), [("host", "a")]),
    "headers-eq": (get(), lambda r: r.headers == {"host": "a"}, True),
    "headers-eq-self": (REPEATED, lambda r: r.headers == r.headers, True),
    "headers-ne": (get(), lambda r: r.headers == {"host": "b"}, False),
    "headers-ne-other": (get(), lambda r: r.headers == "host", False),
    "headers-raw": (
        get("/", "X-Mine:   a \xe9\t"),
        lambda r: r.headers.raw,
        [(b"Host", b"a"), (b"X-Mine", b"a \xe9")],
    ),
    "headers-latin-1": (get("/", "X: \xe9"), lambda r: r.headers["x"], "é"),
    "headers-empty-value": (get("/", "X:"), lambda r: r.headers["x"], ""),
    "headers-host": (get("http://b/"), lambda r: r.headers["host"], "b"),
    "headers-repr": (get(), lambda r: repr(r.headers), "Headers([('host', 'a')])"),
    "cookies": (
        get("/", COOKIES),
        lambda r: r.cookies,
        {"a": "1", "b": "x y", "d": ""},
    ),
    "cookies-repeated": (REPEATED, lambda r: r.cookies, {"c": "1", "d": "2"}),
    "cookies-none": (get(), lambda r: r.cookies, {}),
    "body": (post(b"hello"), lambda r: r.body, b"hello"),
    "body-again": (post(b"hello"), lambda r: r.body is r.body, True),
    "body-none": (get(), lambda r: r.body, b""),
    "text": (post("hé".encode()), lambda r: r.text(), "hé"),
    "json": (BODY, lambda r: r.json(), {"a": [1, "é"]}),
    "stream": (post(b"hello"), lambda r: b"".join(r.stream()), b"hello"),
    "stream-none": (get(), lambda r: list(r.stream()), []),
    "content_length": (post(b"hello"), lambda r: r.content_length, 5),
    "scheme": (get(), lambda r: r.scheme, "http"),
    "http_version": (get(), lambda r: r.http_version, "1.1"),
    "http_version-1.0": (b"GET / HTTP/1.0\r\n\r\n", lambda r: r.http_version, "1.0"),
    "http_version-1.2": (
        b"GET / HTTP/1.2\r\nHost: a\r\n\r\n",
        lambda r: r.http_version,
        "1.1",
    ),
    "repr": (get("/a%20b?c"), repr, "<Request GET /a%20b?c>"),
}


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_a_handler_sees(serve, name):
    request, look, expected = ATTRIBUTES[name]
    seen = []
    serve(lambda r: seen.append(look(r)) or b"").ask(request)
    assert seen == [expected]


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_who_keeps_a_request_sees_after_the_connection_and_the_server(serve, name):
    request, look, expected = ATTRIBUTES[name]
    kept = []
    live = serve(lambda r: kept.append(r) or b"")
    live.ask(request)
    live.stop()
    assert look(kept[0]) == expected


@pytest.mark.parametrize("name", ["client", "server"])
@pytest.mark.parametrize("when", ["in the handler", "later"])
def test_a_request_knows_both_ends_of_its_connection(serve, name, when):
    kept, seen = [], []

    def handler(request: Request) -> bytes:
        kept.append(request)
        if when == "in the handler":
            seen.append(getattr(request, name))
        return b""

    live = serve(handler)
    client = live.client()
    ends = {"client": client.socket.getsockname(), "server": live.address}
    client.ask()
    live.stop()
    seen.append(getattr(kept[0], name))
    assert set(seen) == {ends[name]}


@pytest.mark.parametrize("name", ["client", "server"])
def test_a_unix_socket_has_no_addresses(serve, tmp_path, name):
    seen = []
    live = serve(lambda r: seen.append(getattr(r, name)) or b"", f"unix:{tmp_path}/s")
    live.ask()
    assert seen == [("", 0)]


def test_a_missing_header_is_a_key_error(serve):
    kept = []
    serve(lambda r: kept.append(r) or b"").ask()
    with pytest.raises(KeyError, match="x-mine"):
        kept[0].headers["x-mine"]


def test_headers_cannot_be_changed(serve):
    kept = []
    serve(lambda r: kept.append(r) or b"").ask()
    with pytest.raises(TypeError):
        kept[0].headers["x"] = "y"


def test_a_query_of_too_many_fields_is_the_peers_fault(serve):
    live = serve(lambda request: str(len(request.query)))
    assert live.ask(get("/?" + "a&" * 2000)).status == 400
    assert logged(live) == ""


def test_kept_requests_are_not_overwritten_by_later_ones(serve):
    kept = []
    live = serve(lambda request: kept.append(request) or b"")
    client = live.client()
    client.send(b"".join(post(b"body %d" % n, target=f"/{n}") for n in range(100)))
    assert [client.answer().status for _ in range(100)] == [200] * 100
    assert [request.path for request in kept] == [f"/{n}" for n in range(100)]
    assert [request.body for request in kept] == [b"body %d" % n for n in range(100)]


def test_a_request_may_be_read_in_a_thread_while_others_are_answered(serve):
    with ThreadPoolExecutor(4) as pool:
        seen: list[Future[tuple[str, str, bytes]]] = []

        def look(request: Request) -> tuple[str, str, bytes]:
            return request.path, request.headers["x-mine"], request.body

        def handler(request: Request) -> bytes:
            seen.append(pool.submit(look, request))
            return b""

        client = serve(handler).client()
        for n in range(200):
            client.ask(post(b"%d" % n, f"X-Mine: {n}", target=f"/{n}"))
    expected = [(f"/{n}", str(n), b"%d" % n) for n in range(200)]
    assert [future.result() for future in seen] == expected


# ---- Early hints ---------------------------------------------------------------------

HINT = ("link", "</style.css>; rel=preload")


def test_early_hints_come_before_the_answer(serve):
    def handler(request: Request) -> bytes:
        request.inform(103, [HINT])
        return b"hi"

    answer = serve(handler).ask()
    assert (answer.interim, answer.body) == ([(103, [HINT])], b"hi")


def test_early_hints_arrive_while_the_handler_still_works(serve):
    held = Held()

    def handler(request: Request) -> bytes:
        request.inform(103, [HINT])
        held.wait()
        return b"hi"

    client = serve(handler).client()
    client.send(GET)
    assert client.until(b"\r\n\r\n").startswith(b"HTTP/1.1 103 Early Hints\r\n")
    held.let_go()
    assert client.answer().body == b"hi"


def test_a_handler_in_a_thread_of_its_own_may_give_hints(serve):
    def handler(request: Request) -> bytes:
        request.inform(103, [HINT])
        return request.body

    client = serve(handler).client()
    answer = client.ask(post(b"", EXPECT).replace(b"h: 0", b"h: 5"), on_100=b"hello")
    assert [status for status, _ in answer.interim] == [103, 100]
    assert answer.body == b"hello"


def test_http_1_0_gets_no_hints(serve):
    def handler(request: Request) -> bytes:
        request.inform(103, [HINT])
        return b"hi"

    client = serve(handler).client()
    client.send(b"GET / HTTP/1.0\r\n\r\n")
    assert client.rest().startswith(b"HTTP/1.1 200 OK\r\n")


@pytest.mark.parametrize("value", FORGED)
def test_forged_hints_are_a_500(serve, value):
    def handler(request: Request) -> bytes:
        request.inform(103, [("X-Mine", value)])
        return b"hi"

    live = serve(handler)
    answer = live.ask()
    assert (answer.status, answer.interim) == (500, [])
    assert live.log.until("ProtocolError")


@pytest.mark.parametrize("name", ["Content-Length", "transfer-encoding", "Connection"])
def test_hints_that_would_frame_a_body_are_a_500(serve, name):
    def handler(request: Request) -> bytes:
        request.inform(103, [HINT, (name, "5")])
        return b"hi"

    live = serve(handler)
    answer = live.ask()
    assert (answer.status, answer.interim) == (500, [])
    assert live.log.until("the server sets it")


@pytest.mark.parametrize("status", [99, 100, 101, 200])
def test_only_interim_answers_can_be_given_as_such(serve, status):
    def handler(request: Request) -> bytes:
        request.inform(status, [])
        return b"hi"

    live = serve(handler)
    assert live.ask().status == 500
    assert live.log.until("ProtocolError")


# ---- Handlers that raise -------------------------------------------------------------


def test_a_handler_that_raises_is_a_500_with_its_traceback_in_the_log(serve):
    def handler(request: Request) -> bytes:
        raise LookupError("nobody home")

    live = serve(handler)
    answer = live.ask()
    assert (answer.status, answer.body) == (500, b"Internal Server Error\n")
    text = live.log.until("LookupError: nobody home")
    assert "Traceback" in text and 'raise LookupError("nobody home")' in text


def test_the_connection_is_kept_after_a_500(serve):
    def handler(request: Request) -> bytes:
        return {"/": b"hi"}[request.path]

    live = serve(handler)
    client = live.client()
    assert [client.ask(get(path)).status for path in ("/x", "/")] == [500, 200]
    assert live.log.until("KeyError")


def test_what_the_peer_did_wrong_is_answered_with_its_status_and_not_logged(serve):
    def handler(request: Request) -> bytes:
        raise RequestError("no such page", 404)

    live = serve(handler)
    answer = live.ask()
    assert (answer.status, answer.body) == (404, b"no such page\n")
    assert logged(live) == ""


def test_a_refusal_with_an_impossible_status_is_a_500(serve):
    def handler(request: Request) -> bytes:
        raise RequestError("no such page", 40)

    live = serve(handler)
    assert live.ask().status == 500
    assert live.log.until("status is not between")


def test_a_stream_that_raises_before_its_first_byte_is_a_500(serve):
    def parts() -> Iterator[bytes]:
        raise LookupError("nobody home")
        yield b"never"

    live = serve(lambda _: Response(parts(), status=201, headers={"X-Mine": "1"}))
    answer = live.ask()
    assert answer.status == 500 and "x-mine" not in answer
    assert live.log.until("LookupError: nobody home")


def test_a_stream_that_raises_behind_its_first_byte_is_cut_off(serve):
    def parts() -> Iterator[bytes]:
        yield b"begun"
        raise LookupError("nobody home")

    live = serve(lambda _: parts())
    client = live.client()
    client.send(GET)
    assert client.rest().endswith(b"5\r\nbegun\r\n")
    assert live.log.until("LookupError: nobody home")


def test_a_cut_off_answer_without_framing_ends_in_a_reset(serve):
    def parts() -> Iterator[bytes]:
        yield b"begun"
        sent.wait(SOON)
        raise LookupError("nobody home")

    sent = threading.Event()
    live = serve(lambda _: parts())
    client = live.client()
    client.send(b"GET / HTTP/1.0\r\n\r\n")
    sent.set()
    with pytest.raises(ConnectionResetError):
        client.rest()
    assert live.log.until("LookupError: nobody home")


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()], ids=repr)
def test_an_exit_in_a_handler_ends_the_server_but_is_answered(serve, error):
    def handler(request: Request) -> bytes:
        if request.path == "/exit":
            raise error
        return b"hi"

    live = serve(handler)
    client = live.client()
    client.send(get("/") + get("/exit"))
    assert [client.answer().status for _ in range(2)] == [200, 500]
    assert live.ended() is error


def test_an_exit_in_a_stream_ends_the_server(serve):
    def parts() -> Iterator[bytes]:
        yield b"begun"
        raise SystemExit(3)

    live = serve(lambda _: parts())
    client = live.client()
    client.send(GET)
    assert isinstance(live.ended(), SystemExit)


def test_who_waits_for_a_body_is_told_when_the_server_ends(serve):
    raised: queue.SimpleQueue[BaseException] = queue.SimpleQueue()

    def handler(request: Request) -> bytes:
        if request.path == "/exit":
            raise SystemExit(3)
        try:
            return request.body
        except BaseException as error:
            raised.put(error)
            raise

    live = serve(handler)
    client = live.client()
    client.send(ANNOUNCED)
    client.until(b"100 Continue\r\n\r\n")
    live.client().send(get("/exit"))
    assert isinstance(live.ended(), SystemExit)
    assert isinstance(raised.get(timeout=SOON), ClientDisconnected)


def test_a_client_that_left_is_not_worth_a_line_in_the_log(serve):
    def handler(request: Request) -> bytes:
        raise ClientDisconnected("gone")

    live = serve(handler)
    client = live.client()
    client.send(GET)
    assert client.rest() == b""
    assert logged(live) == ""


# ---- Large answers -------------------------------------------------------------------


@pytest.mark.parametrize("headers", [None, {"X": "y"}], ids=["plain", "with-headers"])
def test_a_large_body_reaches_a_slow_reader_whole(serve, headers):
    body = os.urandom(8 << 20)
    live = serve(lambda _: Response(body, headers=headers))
    client = live.client(receive_buffer=4096)
    client.send(GET)
    live.until(lambda stats: stats["bytes_out"] > 0)
    assert client.answer().body == body


@pytest.mark.parametrize(
    "wrap",
    [bytes, Response, lambda body: Response(body, headers=FIELDS), lambda body: [body]],
    ids=["bytes", "Response", "Response-with-headers", "streamed"],
)
def test_a_large_body_is_borrowed_until_it_is_sent(serve, wrap):
    body = os.urandom(8 << 20)
    live = serve(lambda _: wrap(body))
    before = sys.getrefcount(body)
    client = live.client(receive_buffer=4096)
    client.send(GET)
    live.until(lambda stats: stats["requests"] == 1 and stats["bytes_out"] > 0)
    assert sys.getrefcount(body) > before
    client.answer()
    live.until(lambda stats: stats["lent"] == 0)
    assert sys.getrefcount(body) == before


def test_a_large_body_is_given_back_when_the_client_leaves(serve):
    body = os.urandom(8 << 20)
    live = serve(lambda _: body)
    before = sys.getrefcount(body)
    client = live.client(receive_buffer=4096)
    client.send(GET)
    live.until(lambda stats: stats["bytes_out"] > 0)
    client.reset()
    live.until(lambda stats: stats["connections"] == 0)
    assert sys.getrefcount(body) == before


def test_a_large_body_is_given_back_when_the_server_ends(serve):
    body = os.urandom(8 << 20)
    live = serve(lambda request: sys.exit() if request.path == "/exit" else body)
    before = sys.getrefcount(body)
    client = live.client(receive_buffer=4096)
    client.send(GET)
    live.until(lambda stats: stats["bytes_out"] > 0)
    live.client().send(get("/exit"))
    assert isinstance(live.ended(), SystemExit)
    assert sys.getrefcount(body) == before


# ---- Streamed answers ----------------------------------------------------------------


@pytest.mark.parametrize("size", [100, 16384, 65536])
def test_a_stream_is_not_pulled_far_ahead_of_its_reader(serve, size):
    endless = Endless(size)
    live = serve(lambda _: iter(endless), write_timeout=0.2)
    client = live.client(receive_buffer=4096)
    client.send(GET)
    assert endless.closed.wait(SOON)
    assert endless.pulled - live.stats()["bytes_out"] <= 2 * HIGH_WATER + size


def test_a_stream_goes_on_when_its_reader_reads(serve):
    endless = Endless()
    client = serve(lambda _: iter(endless)).client(receive_buffer=4096)
    client.send(GET)
    size = 0
    while size < 8 << 20:
        size += len(client.receive())
    assert endless.pulled >= size - 65536
    client.close()
    assert endless.closed.wait(SOON)


@pytest.mark.parametrize("leave", ["close", "reset"])
def test_a_stream_is_closed_when_its_reader_leaves(serve, leave):
    endless = Endless()
    live = serve(lambda _: iter(endless))
    client = live.client()
    client.send(GET)
    client.until(b"xxx")
    getattr(client, leave)()
    assert endless.closed.wait(SOON)
    live.until(lambda stats: stats["connections"] == 0)
    assert logged(live) == ""


def test_a_stream_that_ends_is_closed(serve):
    closed = threading.Event()

    class File(io.BytesIO):
        def close(self) -> None:
            closed.set()

    assert answered(serve, File(b"ab")).body == b"ab"
    assert closed.wait(SOON)


def test_what_close_raises_is_logged_and_harms_nobody(serve):
    def parts() -> Iterator[bytes]:
        try:
            yield from Endless()
        finally:
            raise LookupError("in close")

    live = serve(lambda request: parts() if request.path == "/" else b"hi")
    client = live.client()
    client.send(GET)
    client.until(b"xxx")
    client.reset()
    assert live.log.until("LookupError: in close")
    assert live.ask(get("/other")).body == b"hi"


def test_a_stream_does_not_hold_up_other_requests(serve):
    live = serve(lambda r: iter(Endless(100)) if r.path == "/stream" else b"hi")
    reader = live.client()
    reader.send(get("/stream"))
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set() and reader.receive():
            pass

    thread = threading.Thread(target=read)
    thread.start()
    with live.client() as client:
        assert [client.ask().body for _ in range(20)] == [b"hi"] * 20
    stop.set()
    thread.join()


# ---- Request bodies ------------------------------------------------------------------


def echo(request: Request) -> bytes:
    return request.body


def test_a_chunked_body_is_put_together(serve):
    message = get("/", "Transfer-Encoding: chunked", method="POST")
    body = chunk(b"hello, ") + chunk(b"world") + chunk(b"")
    assert serve(echo).ask(message + body).body == b"hello, world"


def test_a_chunked_body_may_come_byte_by_byte(serve):
    message = get("/", "Transfer-Encoding: chunked", method="POST")
    message += chunk(b"hello, ") + chunk(b"world") + b"0\r\nX-Trailer: 1\r\n\r\n"
    client = serve(echo).client()
    for n in range(len(message)):
        client.send(message[n : n + 1])
    assert client.answer().body == b"hello, world"


def test_a_chunked_body_has_no_announced_length(serve):
    live = serve(lambda request: str(request.content_length))
    message = get("/", "Transfer-Encoding: chunked", method="POST")
    assert live.ask(message + chunk(b"hello") + chunk(b"")).body == b"None"


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_large_body_arrives_whole(serve, framing):
    body = os.urandom(4 << 20)
    if framing == "length":
        message = post(body)
    else:
        parts = [body[n : n + 50000] for n in range(0, len(body), 50000)]
        message = get("/", "Transfer-Encoding: chunked", method="POST")
        message += b"".join(map(chunk, [*parts, b""]))
    client = serve(echo).client()
    sender = threading.Thread(target=client.send, args=[message])
    sender.start()
    assert client.answer().body == body
    sender.join()


def test_a_body_that_nobody_reads_does_not_spoil_the_next_request(serve):
    client = serve(lambda request: request.path).client()
    client.send(post(b"GET /evil HTTP/1.1\r\nHost: a\r\n\r\n") + get("/next"))
    assert [client.answer().body for _ in range(2)] == [b"/", b"/next"]


# ---- Expect: 100-continue ------------------------------------------------------------

ANNOUNCED = post(b"", EXPECT).replace(b"Length: 0", b"Length: 5")


def test_100_is_sent_when_the_handler_reads(serve):
    answer = serve(echo).client().ask(ANNOUNCED, on_100=b"hello")
    assert (answer.interim, answer.body) == ([(100, [])], b"hello")


def test_100_is_not_sent_before_the_handler_reads(serve):
    held = Held()

    def handler(request: Request) -> bytes:
        held.wait()
        return request.body

    client = serve(handler).client()
    client.send(ANNOUNCED)
    assert held.begun.wait(SOON) and client.is_quiet()
    held.let_go()
    assert client.answer(on_100=b"hello").body == b"hello"


def test_an_answer_without_reading_comes_without_100_and_closes(serve):
    client = serve(lambda _: Response("no", status=403)).client()
    answer = client.ask(ANNOUNCED)
    assert (answer.status, answer.interim, answer.closes) == (403, [], True)
    assert client.rest() == b""


def test_a_body_sent_without_waiting_for_100_is_read(serve):
    client = serve(echo).client()
    client.send(ANNOUNCED + b"hello" + GET)
    assert [client.answer().body for _ in range(2)] == [b"hello", b""]


def test_a_stream_may_answer_who_waits_for_100(serve):
    live = serve(lambda request: iter([b"got ", request.body]))
    assert live.client().ask(ANNOUNCED, on_100=b"hello").body == b"got hello"


def test_http_1_0_is_never_told_to_continue(serve):
    client = serve(echo).client()
    client.send(ANNOUNCED.replace(b"HTTP/1.1", b"HTTP/1.0"))
    assert client.is_quiet()
    client.send(b"hello")
    assert client.rest().startswith(b"HTTP/1.1 200 OK\r\n")


def test_a_slow_uploader_does_not_hold_up_other_requests(serve):
    live = serve(echo)
    slow = live.client()
    slow.send(ANNOUNCED)
    assert slow.until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    slow.send(b"he")
    assert live.ask(post(b"quick")).body == b"quick"
    slow.send(b"llo")
    assert slow.answer().body == b"hello"


def test_uploads_that_stall_behind_the_100_do_not_hold_up_another(serve):
    live = serve(echo)
    stalled = [live.client() for _ in range(BODY_THREADS)]
    for client in stalled:
        client.send(ANNOUNCED)
        client.until(b"100 Continue\r\n\r\n")
    assert live.client().ask(ANNOUNCED, on_100=b"quick").body == b"quick"
    for client in stalled:
        client.send(b"hello")
        assert client.answer().body == b"hello"


def test_an_upload_broken_off_behind_the_100_is_quiet(serve):
    raised: queue.SimpleQueue[BaseException] = queue.SimpleQueue()

    def handler(request: Request) -> bytes:
        try:
            return request.body
        except BaseException as error:
            raised.put(error)
            raise

    live = serve(handler)
    client = live.client()
    client.send(ANNOUNCED)
    client.until(b"\r\n\r\n")
    client.send(b"he")
    client.reset()
    assert isinstance(raised.get(timeout=SOON), ClientDisconnected)
    assert logged(live) == ""


def test_an_upload_that_ends_too_early_is_answered_400(serve):
    live = serve(echo)
    client = live.client()
    client.send(ANNOUNCED)
    client.until(b"\r\n\r\n")
    client.send(b"he")
    client.half_close()
    assert client.answer().status == 400
    assert logged(live) == ""


def test_a_handler_that_raises_instead_of_reading_is_a_500(serve):
    def handler(request: Request) -> bytes:
        raise LookupError("nobody home")

    live = serve(handler)
    answer = live.client().ask(ANNOUNCED)
    assert (answer.status, answer.interim, answer.closes) == (500, [], True)
    assert live.log.until("LookupError: nobody home")


# ---- Bodies that are streamed --------------------------------------------------------

STREAMED = get("/", "Transfer-Encoding: chunked", method="POST")


@pytest.mark.contract("option: stream_request_body")
def test_a_handler_may_start_before_the_body_has_arrived(serve):
    parts: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def handler(request: Request) -> bytes:
        for part in request.stream():
            parts.put(part)
        return b"done"

    client = serve(handler, stream_request_body=True).client()
    client.send(STREAMED)
    for part in (b"one", b"two"):
        client.send(chunk(part))
        assert parts.get(timeout=SOON) == part
    client.send(chunk(b""))
    assert client.answer().body == b"done"


def test_body_waits_for_a_body_that_is_on_its_way(serve):
    held = Held()

    def handler(request: Request) -> bytes:
        held.begun.set()
        return request.body + request.body

    client = serve(handler, stream_request_body=True).client()
    client.send(STREAMED + chunk(b"he"))
    assert held.begun.wait(SOON)
    client.send(chunk(b"llo") + chunk(b""))
    assert client.answer().body == b"hellohello"


def test_an_answer_may_come_before_the_body(serve):
    client = serve(lambda _: b"early", stream_request_body=True).client()
    client.send(STREAMED)
    assert client.answer().body == b"early"


def test_what_a_handler_does_not_read_is_not_taken_in(serve):
    held = Held()

    def handler(request: Request) -> bytes:
        held.wait()
        return str(len(request.body)).encode()

    live = serve(handler, stream_request_body=True)
    client = live.client()
    size = 16 << 20
    sender = threading.Thread(target=client.send, args=[post(bytes(size))])
    sender.start()
    assert held.begun.wait(SOON) and client.is_quiet()
    assert live.stats()["bytes_in"] <= 4 * HIGH_WATER
    held.let_go()
    assert client.answer().body == str(size).encode()
    sender.join()


@pytest.mark.contract("option: stream_request_body")
def test_a_body_too_large_is_a_413_while_it_is_streamed(serve):
    seen: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def handler(request: Request) -> bytes:
        try:
            for part in request.stream():
                seen.put(part)
        except RequestError as error:
            seen.put(error.status)
            raise
        return b"never"

    live = serve(handler, stream_request_body=True, max_request_body_size=10)
    client = live.client()
    client.send(STREAMED + chunk(b"hello"))
    assert seen.get(timeout=SOON) == b"hello"
    client.send(chunk(b"world!"))
    answer = client.answer()
    assert (answer.status, answer.closes) == (413, True)
    assert seen.get(timeout=SOON) == 413
    assert logged(live) == ""


def test_an_upload_that_stalls_is_a_408(serve):
    live = serve(echo, stream_request_body=True, read_timeout=0.1)
    answer = live.client().ask(STREAMED + chunk(b"he"))
    assert (answer.status, answer.closes) == (408, True)
    assert logged(live) == ""


def test_a_malformed_upload_is_a_400(serve):
    live = serve(echo, stream_request_body=True)
    answer = live.client().ask(STREAMED + b"5\nhello\r\n")
    assert (answer.status, answer.closes) == (400, True)
    assert logged(live) == ""


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("what", ["stream", "body"])
def test_a_body_is_not_waited_for_behind_the_handler(serve, threads, what):
    def lazily(request: Request) -> Iterator[bytes]:
        yield request.body

    def handler(request: Request) -> Iterator[bytes]:
        if what == "stream":
            return (part for part in request.stream())
        return lazily(request)

    live = serve(handler, stream_request_body=True, threads=threads)
    assert live.client().ask(STREAMED + chunk(b"he")).status == 500
    assert "before" in live.log.until("RuntimeError")
    assert live.ask().status == 200


def test_a_body_is_not_waited_for_in_the_handler_of_another_request(serve):
    held, kept = Held(), []

    def handler(request: Request) -> bytes:
        if request.method == "GET":
            return kept[0].body
        kept.append(request)
        held.wait()
        return request.body

    live = serve(handler, stream_request_body=True)
    client = live.client()
    client.send(STREAMED)
    assert held.begun.wait(SOON)
    assert live.ask().status == 500 and live.log.until("RuntimeError")
    held.let_go()
    client.send(chunk(b"hello") + chunk(b""))
    assert client.answer().body == b"hello"


def test_a_helper_that_waits_for_the_body_hears_that_the_request_is_over(serve):
    heard: queue.SimpleQueue[BaseException] = queue.SimpleQueue()

    def read(request: Request) -> None:
        try:
            for _ in request.stream():
                held.begun.set()
        except Exception as error:
            heard.put(error)

    def handler(request: Request) -> bytes:
        threading.Thread(target=read, args=[request]).start()
        held.let_go()
        return b"early"

    held = Held()
    client = serve(handler, stream_request_body=True).client()
    client.send(STREAMED + chunk(b"he"))
    assert client.answer().body == b"early"
    assert isinstance(heard.get(timeout=SOON), (ClientDisconnected, RuntimeError))


class Busy:
    """Keeps the loop's thread from its work until it is let go."""

    def __init__(self, live: Live) -> None:
        self.live = live
        self.held = Held()
        live.core.call(self.held.wait)
        assert self.held.begun.wait(SOON)

    def until_called(self) -> None:
        """Await that another thread wants something of the loop."""
        deadline = time.monotonic() + SOON
        while not self.live.core.ready:
            assert time.monotonic() < deadline

    def let_go(self) -> None:
        self.held.let_go()


def test_a_client_that_leaves_when_its_body_is_asked_for_harms_nobody(serve):
    held, raised = Held(), []

    def handler(request: Request) -> bytes:
        if request.method == "GET":
            return b"hi"
        held.wait()
        try:
            return request.body
        except ClientDisconnected as error:
            raised.append(error)
            raise

    live = serve(handler, stream_request_body=True)
    client = live.client()
    client.send(STREAMED)
    assert held.begun.wait(SOON)
    busy = Busy(live)
    held.let_go()
    busy.until_called()
    client.reset()
    busy.let_go()
    assert live.ask().body == b"hi"
    assert logged(live) == "" and len(raised) == 1


@pytest.mark.parametrize("when", ["before", "amid"])
@pytest.mark.parametrize("threads", [1, 2])
def test_who_would_inform_hears_that_the_server_has_ended(serve, threads, when):
    held, heard = Held(), Future()

    def handler(request: Request) -> bytes:
        if request.path == "/exit":
            sys.exit(3)
        held.wait()
        try:
            request.inform(103, [])
        except BaseException as error:
            heard.set_result(error)
            raise
        return b"hi"

    live = serve(handler, stream_request_body=True, threads=threads)
    client = live.client()
    client.send(STREAMED)
    assert held.begun.wait(SOON)
    if when == "before":
        live.client().send(get("/exit"))
        assert isinstance(live.ended(), SystemExit)
        held.let_go()
    else:
        busy = Busy(live)
        live.core.call(sys.exit, 3)
        held.let_go()
        deadline = time.monotonic() + SOON
        while not live.server._desk.dispatcher.asked:
            assert time.monotonic() < deadline
        busy.let_go()
    assert isinstance(heard.result(SOON), ClientDisconnected)
    assert isinstance(live.ended(), SystemExit)


def test_an_exit_in_a_handler_with_a_body_on_its_way_is_a_500(serve):
    live = serve(lambda _: sys.exit(3), stream_request_body=True)
    assert live.client().ask(STREAMED).status == 500


# ---- Other threads -------------------------------------------------------------------


def test_a_head_may_be_read_by_a_thread_while_the_body_arrives(serve):
    seen: queue.SimpleQueue[Request] = queue.SimpleQueue()
    live = serve(lambda request: request.method, header_received=seen.put)
    client = live.client()
    sender = threading.Thread(target=client.send, args=[post(bytes(32 << 20))])
    sender.start()
    request = seen.get(timeout=SOON)
    told = set()
    while sender.is_alive():
        told.add((request.method, request.target, request.headers["host"]))
    assert client.answer().body == b"POST" and told <= {("POST", b"/", "a")}


def test_an_answer_from_another_thread_is_refused_while_the_loop_works(serve):
    held = Held()
    raised: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def parts() -> Iterator[bytes]:
        yield bytes(16 << 20)
        yield b"end"

    def write(request: Request) -> None:
        held.wait()
        try:
            request.write(b"x")
            raised.put(None)
        except Exception as error:
            raised.put(error)

    def handler(request: Request) -> Iterator[bytes]:
        threading.Thread(target=write, args=[request]).start()
        return parts()

    client = serve(handler).client()
    client.send(GET)
    head = client.until(b"\r\n\r\n")  # the loop sleeps until there is room
    held.let_go()
    assert "in its loop's thread only" in str(raised.get(timeout=SOON))
    client.unread = head + client.unread
    assert client.answer().body[16 << 20 :] == b"end"


def test_a_field_iterator_that_ends_the_request_is_an_error_and_no_crash(serve):
    def handler(request: Request) -> Response:
        def fields() -> Iterator[tuple[str, str]]:
            request.abort()
            yield "X", "y"

        request.begin(200, fields())
        return Response()

    live = serve(handler)
    client = live.client()
    client.send(GET)
    assert client.rest() == b""
    live.log.until("the request was answered already")


# ---- Pipelining and HTTP/1.0 ---------------------------------------------------------


def test_pipelined_requests_are_answered_in_order(serve):
    def handler(request: Request) -> Any:
        kind = request.path[1]
        number = request.path[2:].encode()
        if kind == "s":
            return (part for part in (b"s", b"", number))
        if kind == "l":
            return number.ljust(100_000, b"l")
        if kind == "p":
            return Response(request.body, headers={"X": "y"})
        if kind == "e":
            raise LookupError("nobody home")
        return b"f" + number

    live = serve(handler)
    client = live.client()
    kinds = "fslpfefslsfplffs" * 4
    for n, kind in enumerate(kinds):
        body = b"p%d" % n
        target = f"/{kind}{n}"
        client.send(post(body, target=target) if kind == "p" else get(target))
    for n, kind in enumerate(kinds):
        body = client.answer().body
        if kind == "e":
            assert body == b"Internal Server Error\n"
        else:
            assert (
                body.rstrip(b"l") == {"l": b"%d"}.get(kind, kind.encode() + b"%d") % n
            )
    assert live.log.until("LookupError")


def test_pipelined_requests_behind_one_in_a_thread_wait_for_it(serve):
    live = serve(lambda request: request.path.encode() + request.body)
    client = live.client()
    client.send(ANNOUNCED + b"hello" + get("/next"))
    assert [client.answer().body for _ in range(2)] == [b"/hello", b"/next"]


def test_requests_pipelined_by_the_hundred_are_all_answered(serve):
    client = serve(lambda request: request.path).client()
    client.send(b"".join(get(f"/{n}") for n in range(1000)))
    answers = [client.answer().body.decode() for _ in range(1000)]
    assert answers == [f"/{n}" for n in range(1000)]


def test_who_pipelines_and_does_not_read_is_not_served_without_bound(serve):
    live = serve(lambda _: bytes(50_000), write_timeout=0.2)
    client = live.client(receive_buffer=4096)
    client.send(GET * 2000)
    live.until(lambda stats: stats["connections"] == 0)
    assert live.stats()["requests"] < 1000


def test_http_1_0_is_closed_behind_its_answer(serve):
    client = serve(lambda _: b"hi").client()
    client.send(b"GET / HTTP/1.0\r\n\r\n")
    answer = client.answer()
    assert answer.closes and answer.body + client.rest() == b"hi"


def test_http_1_0_is_kept_on_request(serve):
    client = serve(lambda _: b"hi").client()
    request = b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"
    for _ in range(2):
        answer = client.ask(request)
        assert (answer["connection"], answer.body) == ("keep-alive", b"hi")


def test_a_stream_to_http_1_0_ends_with_the_connection(serve):
    client = serve(lambda _: [b"h", b"i"]).client()
    answer = client.ask(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
    assert answer.closes and "transfer-encoding" not in answer
    assert answer.body == b"hi"
