"""What proxies say in header fields: who is believed, how far, and who sees it."""

from __future__ import annotations

import ipaddress
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from live import Client, get

from prefork import ConfigError, Request, Server
from prefork.config import Config
from prefork.forwarded import Origin, Trust, parse_host, parse_node

PEER = ("10.0.0.1", 5000)
NEAR = Trust("10.0.0.0/8")


def client_of(text: str, trust: Trust = NEAR) -> tuple[str, int]:
    return trust.resolve(PEER, text).client


def standard(text: str, trust: Trust = NEAR) -> Origin:
    return trust.resolve(PEER, forwarded=text)


# ---- The list ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "inside", "outside"),
    [
        ("127.0.0.1", ["127.0.0.1"], ["127.0.0.2", "::1", ""]),
        ("10.0.0.0/8", ["10.255.0.1", "::ffff:10.1.1.1"], ["11.0.0.1"]),
        (" 10.0.0.0/255.0.0.0 , ::1 ", ["10.1.1.1", "::1"], ["127.0.0.1"]),
        ("2001:db8::/32", ["2001:db8::9"], ["2001:db9::9", "::ffff:1.1.1.1"]),
        ("::ffff:10.0.0.0/104", ["10.1.1.1", "::ffff:10.1.1.1"], ["11.1.1.1"]),
        ("unix", [""], ["127.0.0.1"]),
        ("*", ["", "1.2.3.4", "::1", "::ffff:1.2.3.4"], ["nobody", "1.2.3"]),
        ("", [], ["", "127.0.0.1", "::1"]),
    ],
)
def test_a_list_trusts_its_own_and_no_others(texts, inside, outside):
    trust = Trust(texts)
    assert all(trust.trusts(host) for host in inside)
    assert not any(trust.trusts(host) for host in outside)
    assert Trust(texts.split(",") if texts else []).rows() == trust.rows()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("10.0.0.1/8", "'10.0.0.1/8' has bits behind its prefix; write 10.0.0.0/8"),
        ("localhost", "'localhost' is no IP address, no network like 10.0.0.0/8, "),
        ("10.0.0.0/33", "'10.0.0.0/33' is no IP address"),
        ("1.2.3.4:80", "'1.2.3.4:80' is no IP address"),
        ("UNIX", "and neither unix nor *"),
    ],
)
def test_a_wrong_entry_is_told_with_its_remedy(text, told):
    with pytest.raises(ConfigError) as caught:
        Trust(["::1", text])
    assert told in str(caught.value)
    with pytest.raises(ConfigError, match="^proxy_allow_from: "):
        Config(proxy_allow_from=["::1", text])


def test_answers_are_remembered_up_to_a_bound():
    trust = Trust("10.0.0.0/8")
    for n in range(10_000):
        trust.trusts(str(ipaddress.ip_address(n)))
    assert trust.trusts.cache_info().currsize <= 4096


# ---- X-Forwarded-* -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "client"),
    [
        ("192.0.2.1", ("192.0.2.1", 0)),
        ("192.0.2.1:4711", ("192.0.2.1", 4711)),
        ("6.6.6.6, 192.0.2.1", ("192.0.2.1", 0)),
        ("6.6.6.6, 192.0.2.1, 10.0.0.2", ("192.0.2.1", 0)),
        ("6.6.6.6,192.0.2.1,10.0.0.2,10.0.0.3", ("192.0.2.1", 0)),
        ("10.0.0.3, 10.0.0.2", ("10.0.0.3", 0)),
        ("2001:DB8::1", ("2001:db8::1", 0)),
        ("[2001:db8::1]", ("2001:db8::1", 0)),
        ("[2001:db8::1]:80", ("2001:db8::1", 80)),
        ("192.0.2.1, , 10.0.0.2,", ("192.0.2.1", 0)),
        ("", PEER),
        (" , ,", PEER),
        ("unknown", PEER),
        ("192.0.2.1, unknown", PEER),
        ("192.0.2.1, junk, 10.0.0.2", ("10.0.0.2", 0)),
        ("192.0.2.1, _hidden, 10.0.0.2:9", ("10.0.0.2", 9)),
        ("192.0.2.1, 10.0.0.2\t", ("192.0.2.1", 0)),
    ],
)
def test_the_client_is_the_rightmost_address_that_is_not_listed(text, client):
    assert client_of(text) == client


@pytest.mark.parametrize(
    "text",
    [
        *("1.2.3", "1.2.3.4.5", "1.2.3.256", "01.2.3.4", "a.b.c.d", "1.2.3.4:"),
        *("1.2.3.4:65536", "1.2.3.4:-1", "1.2.3.4:8x", "1.2.3.4:_x", "[1.2.3.4]"),
        *("[::1", "::1]", "[::1]80", "[::1]:", "[]", "::1%eth0", ":::", "²"),
        *("1.2.3.4 5.6.7.8", '"1.2.3.4"', "for=1.2.3.4", "unix:", "1.2.3.4:²"),
    ],
)
def test_a_malformed_address_is_none(text):
    assert parse_node(text) is None
    assert client_of(text) == PEER


def test_who_is_not_listed_is_not_listened_to():
    stranger = ("192.0.2.9", 7)
    told = NEAR.resolve(stranger, "1.1.1.1", "https", "a", "for=1.1.1.1;proto=https")
    assert told == Origin(stranger, None, None)


@pytest.mark.parametrize(
    ("text", "scheme"),
    [
        *(("https", "https"), ("HTTP", "http"), ("wss", "https"), ("ws", "http")),
        *(("http, https", "https"), ("https,http", "http"), (" https ", "https")),
        *(("ftp", None), ("", None), ("https,", None), ("https evil", None)),
        (None, None),
    ],
)
def test_the_scheme_is_the_last_value_and_one_of_two(text, scheme):
    assert NEAR.resolve(PEER, None, text).scheme == scheme


@pytest.mark.parametrize(
    ("text", "host"),
    [
        *(("a.example", "a.example"), ("a:8080", "a:8080"), ("[::1]:8", "[::1]:8")),
        *(("a, b.example", "b.example"), ("", None), (None, None)),
        *(("a b", None), ("a/b", None), ("u@a", None), ("a:b", None), ("a\tb", None)),
    ],
)
def test_the_host_is_the_last_value_if_it_may_be_one(text, host):
    assert NEAR.resolve(PEER, None, None, text).host == host


# ---- Forwarded -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "origin"),
    [
        ("for=192.0.2.1", (("192.0.2.1", 0), None, None)),
        ('For="192.0.2.1:47"', (("192.0.2.1", 47), None, None)),
        ("for=192.0.2.1:47", (("192.0.2.1", 47), None, None)),
        ('for="[2001:db8::1]"', (("2001:db8::1", 0), None, None)),
        ('for="[2001:db8::1]:47"', (("2001:db8::1", 47), None, None)),
        ('for="192.0.2.1:_port"', (("192.0.2.1", 0), None, None)),
        (
            "for=192.0.2.1;proto=https;host=a.example;by=10.0.0.1",
            (("192.0.2.1", 0), "https", "a.example"),
        ),
        (
            'for=192.0.2.1 ; proto=HTTPS ;host="a:1"',
            (("192.0.2.1", 0), "https", "a:1"),
        ),
        (";for=192.0.2.1;;proto=http;", (("192.0.2.1", 0), "http", None)),
        (
            "for=6.6.6.6;proto=ftp, for=192.0.2.1;proto=https, for=10.0.0.2;proto=http",
            (("192.0.2.1", 0), "https", None),
        ),
        ("for=192.0.2.1, for=10.0.0.2;proto=https", (("192.0.2.1", 0), None, None)),
        ("for=unknown;proto=https", (PEER, "https", None)),
        ("for=192.0.2.1, for=_gone;proto=https", (PEER, "https", None)),
        ("for=192.0.2.1, proto=https", (PEER, "https", None)),
        ("for=192.0.2.1, , for=10.0.0.2 ,", (("192.0.2.1", 0), None, None)),
        (r'for="192.0.2\.1"', (("192.0.2.1", 0), None, None)),
        ("for=[2001:db8::1]", (("2001:db8::1", 0), None, None)),
        ('for="2001:db8::1"', (PEER, None, None)),
        ("for=192.0.2.1, for", (PEER, None, None)),
        ("for=192.0.2.1, for=1;for=2", (PEER, None, None)),
        ("for=192.0.2.1, junk, for=10.0.0.2;host=b", (("10.0.0.2", 0), None, "b")),
        ('host="a, for=6.6.6.6";for=192.0.2.1', (("192.0.2.1", 0), None, None)),
        ('for="6.6.6.6, for=192.0.2.1;proto=http', (("192.0.2.1", 0), "http", None)),
        ('for="6.6.6.6, for=10.0.0.2;host=b', (("10.0.0.2", 0), None, "b")),
        ("", (PEER, None, None)),
    ],
)
def test_an_element_tells_client_scheme_and_host_of_one_hop(text, origin):
    assert standard(text) == origin


def test_forwarded_wins_where_both_are_given():
    told = NEAR.resolve(PEER, "1.1.1.1", "http", "x", "for=2.2.2.2;proto=https")
    assert told == Origin(("2.2.2.2", 0), "https", None)


ADDRESSES = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)).map(str)
TRUSTED = st.integers(1, 254).map(lambda n: f"10.0.0.{n}")
STRANGERS = ADDRESSES.filter(lambda host: not NEAR.trusts(host))


@given(st.text(max_size=200), STRANGERS, st.lists(TRUSTED, max_size=4))
def test_nothing_a_client_writes_changes_what_proxies_add(junk, client, proxies):
    chain = ",".join([junk, client, *proxies])
    assert client_of(chain) == (client, 0)
    nodes = [f'"[{n}]"' if ":" in n else n for n in (client, *proxies)]
    elements = [f"for={node};proto=https" for node in nodes]
    assert standard(", ".join([junk, *elements])) == ((client, 0), "https", None)


@given(st.text(alphabet='for=;,"\\ _[]:.1a', max_size=120))
def test_no_text_raises_or_brings_in_what_is_no_address(text):
    for origin in (standard(text), NEAR.resolve(PEER, text, text, text)):
        assert ipaddress.ip_address(origin.client[0])
        assert 0 <= origin.client[1] <= 65535
        assert origin.scheme in (None, "http", "https")
        assert origin.host is None or parse_host(origin.host)


def test_a_long_chain_is_walked_in_the_time_of_its_length():
    assert standard("," * 16000) == Origin(PEER)
    assert standard('"' + ",for=10.0.0.2" * 1200).client == ("10.0.0.2", 0)
    assert standard("for=1.1.1.1," + '"' + "," * 16000) == Origin(PEER)
    assert client_of("6.6.6.6," + "10.0.0.2," * 1600) == ("6.6.6.6", 0)


# ---- Over real sockets ---------------------------------------------------------------

SAID = [
    "X-Forwarded-For: 192.0.2.1",
    "X-Forwarded-Proto: https",
    "X-Forwarded-Host: a.example",
    "Forwarded: for=192.0.2.2;proto=http;host=b.example",
]


def tell(request: Request) -> str:
    names = [name.decode() for name, _ in request.headers.raw]
    told = [request.client[0], request.scheme, request.host, sorted(names)]
    return json.dumps(told)


async def tell_async(request: Request) -> str:
    return tell(request)


def ask(live, *lines: str) -> list:
    return json.loads(live.ask(get("/", *lines)).body)


@pytest.mark.parametrize("handler", [tell, tell_async])
def test_a_listed_peer_is_believed_by_default(serve, handler):
    client, scheme, host, names = ask(serve(handler), *SAID)
    assert (client, scheme, host) == ("192.0.2.1", "https", "a.example")
    assert len(names) == 5


def test_fields_that_come_in_several_lines_are_one_list(serve):
    lines = ["X-Forwarded-For: 6.6.6.6", SAID[0], "X-Forwarded-For: 127.0.0.1"]
    assert ask(serve(tell), *lines)[:3] == ["192.0.2.1", "http", "a"]


def test_forwarded_is_read_where_proxies_are_said_to_write_it(serve):
    live = serve(tell, forwarded_header="forwarded")
    assert ask(live, *SAID)[:3] == ["192.0.2.2", "http", "b.example"]
    assert ask(live, *SAID[:3])[:3] == ["127.0.0.1", "http", "a"]


def test_of_others_the_fields_are_dropped(serve):
    live = serve(tell, forwarded_allow_ips="192.0.2.0/24")
    told = ask(live, *SAID, "X-Other: a")
    assert told == ["127.0.0.1", "http", "a", ["Host", "X-Other"]]


def test_a_unix_socket_is_trusted_if_the_list_says_so(serve, tmp_path):
    for n, listed in enumerate(["unix", "*", "127.0.0.1,::1"]):
        live = serve(tell, f"unix:{tmp_path}/{n}", forwarded_allow_ips=listed)
        client = ask(live, *SAID)[0]
        assert client == ("" if "1" in listed else "192.0.2.1")


def test_what_was_told_stays_true_after_the_answer(serve):
    kept = []

    def handler(request: Request) -> bytes:
        kept.append(request)
        return b"hi"

    live = serve(handler)
    live.ask(get("/", *SAID))
    live.ask(get("/"))
    assert [r.client[0] for r in kept] == ["192.0.2.1", "127.0.0.1"]
    assert [r.scheme for r in kept] == ["https", "http"]
    assert [r.host for r in kept] == ["a.example", "a"]


def test_an_error_handler_sees_no_field_of_a_stranger(serve):
    def on_error(request: Request, error: Exception) -> str:
        return tell(request)

    live = serve(tell, forwarded_allow_ips="", error_handler=on_error)
    with Client(live.address) as client:
        client.send(b"GET / HTTP/1.1\r\nX-Forwarded-For: 6.6.6.6\r\n\r\n")
        assert json.loads(client.answer().body) == ["127.0.0.1", "http", "", []]


# ---- Options -------------------------------------------------------------------------


def test_the_variable_of_other_servers_is_the_default():
    def load(environ: dict[str, str], **given: str) -> tuple[str, ...]:
        return Config.load(given, environ=environ).forwarded_allow_ips

    foreign = {"FORWARDED_ALLOW_IPS": "10.0.0.0/8, unix"}
    own = {"PREFORK_FORWARDED_ALLOW_IPS": "::1"}
    assert load({}) == ("127.0.0.1", "::1")
    assert load(foreign) == ("10.0.0.0/8", "unix")
    assert load({"FORWARDED_ALLOW_IPS": ""}) == ()
    assert load(foreign | own) == ("::1",)
    assert load(foreign, forwarded_allow_ips="*") == ("*",)
    with pytest.raises(ConfigError, match=r"\(from FORWARDED_ALLOW_IPS\)$"):
        load({"FORWARDED_ALLOW_IPS": "me"})


def test_a_file_is_above_the_variable_of_other_servers(tmp_path):
    path = tmp_path / "prefork.toml"
    path.write_text('forwarded-allow-ips = ["::1"]')
    environ = {"FORWARDED_ALLOW_IPS": "*"}
    config = Config.load({"config_file": path}, environ=environ)
    assert config.forwarded_allow_ips == ("::1",)


def test_server_takes_the_options():
    assert Server(tell, proxy_protocol="auto").config.proxy_protocol == "auto"
    with pytest.raises(ConfigError, match="one of off, v1, v2, auto, not 'v3'"):
        Server(tell, proxy_protocol="v3")
