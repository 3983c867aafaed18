"""Flask, Django, Bottle and Falcon apps over real sockets, through httpx.

Each framework serves the same small site, written as its manual does it; every test
asks all of them, with one thread and with eight. What they expect is what gunicorn
(gthread) gives as well, but for two things that it does worse: it joins Cookie fields
by a comma, and has no CONTENT_LENGTH for chunked uploads, so that most frameworks take
them for empty.
"""

from __future__ import annotations

import hashlib
import io
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from live import SOON, Client, Live, get

FILE = bytes(range(256)) * 4096  # 1 MiB
UPLOAD = hashlib.sha256(b"seed").digest() * (5 << 15)  # 5 MiB
DIGEST = hashlib.sha256(UPLOAD).hexdigest()
LINES = [f"line {n}\n" for n in range(100)]

Site = Callable[..., httpx.Client]


def sha256(stream: Any) -> str:
    digest = hashlib.sha256()
    while part := stream.read(65536):
        digest.update(part)
    return digest.hexdigest()


# ---- The site, four times ------------------------------------------------------------


def flask_app(path: Path) -> Any:
    import flask

    app = flask.Flask(__name__)
    request = flask.request

    @app.get("/")
    def hello() -> str:
        return "hello"

    @app.post("/json")
    def echo_json() -> Any:
        return flask.jsonify(got=request.get_json())

    @app.post("/form")
    def form() -> Any:
        file = request.files["file"]
        return {
            "name": request.form["name"],
            "file": file.filename,
            "sha256": sha256(file.stream),
        }

    @app.post("/upload")
    def upload() -> str:
        return sha256(request.stream)

    @app.get("/stream")
    def stream() -> Any:
        return flask.Response((line for line in LINES), mimetype="text/plain")

    @app.get("/file")
    def file() -> Any:
        return flask.send_file(path, conditional=True)

    @app.get("/cookies")
    def cookies() -> Any:
        response = flask.jsonify(dict(request.cookies))
        response.set_cookie("one", "1", httponly=True)
        response.set_cookie("two", "é")
        return response

    @app.get("/redirect")
    def redirect() -> Any:
        return flask.redirect("/?to=here")

    @app.get("/error")
    def error() -> Any:
        raise LookupError("nobody home")

    @app.route("/path/", defaults={"rest": ""})
    @app.route("/path/<path:rest>")
    def echo_path(rest: str) -> Any:
        return {"path": request.path, "query": request.args.get("q")}

    return app


def django_app(path: Path) -> Any:
    import django
    from django import http
    from django.conf import settings
    from django.core.wsgi import get_wsgi_application
    from django.urls import path as route
    from django.urls import re_path

    def echo_json(request: Any) -> Any:
        import json

        return http.JsonResponse({"got": json.loads(request.body)})

    def form(request: Any) -> Any:
        file = request.FILES["file"]
        return http.JsonResponse(
            {
                "name": request.POST["name"],
                "file": file.name,
                "sha256": sha256(file),
            }
        )

    def cookies(request: Any) -> Any:
        response = http.JsonResponse(request.COOKIES)
        response.set_cookie("one", "1", httponly=True)
        response.set_cookie("two", "é")
        return response

    def ranged(request: Any) -> Any:
        begin, end = span(request.headers.get("Range"))
        if begin is None:
            return http.FileResponse(path.open("rb"))
        response = http.HttpResponse(FILE[begin : end + 1], status=206)
        response["Content-Range"] = f"bytes {begin}-{end}/{len(FILE)}"
        return response

    def error(request: Any) -> Any:
        raise LookupError("nobody home")

    def echo_path(request: Any, rest: str) -> Any:
        return http.JsonResponse({"path": request.path, "query": request.GET.get("q")})

    class Urls:
        urlpatterns = [
            route("", lambda request: http.HttpResponse("hello")),
            route("json", echo_json),
            route("form", form),
            route("upload", lambda request: http.HttpResponse(sha256(request))),
            route(
                "stream",
                lambda request: http.StreamingHttpResponse(
                    iter(LINES), content_type="text/plain"
                ),
            ),
            route("file", ranged),
            route("cookies", cookies),
            route("redirect", lambda request: http.HttpResponseRedirect("/?to=here")),
            route("error", error),
            re_path("^/?path/(?P<rest>.*)$", echo_path),
        ]

    if not settings.configured:
        settings.configure(
            ALLOWED_HOSTS=["*"],
            SECRET_KEY="x",
            ROOT_URLCONF=Urls,
            MIDDLEWARE=["django.middleware.common.CommonMiddleware"],
            DATA_UPLOAD_MAX_MEMORY_SIZE=None,
            LOGGING_CONFIG=None,
        )
        django.setup()
    settings.ROOT_URLCONF = Urls
    return get_wsgi_application()


def span(value: str | None) -> tuple[Any, Any]:
    """The first and last byte that a Range field asks for."""
    if not value:
        return None, None
    begin, _, end = value.removeprefix("bytes=").partition("-")
    return int(begin), int(end or len(FILE) - 1)


def bottle_app(path: Path) -> Any:
    import bottle

    app = bottle.Bottle()
    request = bottle.request

    @app.get("/")
    def hello() -> str:
        return "hello"

    @app.post("/json")
    def echo_json() -> Any:
        return {"got": request.json}

    @app.post("/form")
    def form() -> Any:
        file = request.files["file"]
        return {
            "name": request.forms["name"],
            "file": file.raw_filename,
            "sha256": sha256(file.file),
        }

    @app.post("/upload")
    def upload() -> str:
        return sha256(request.body)

    @app.get("/stream")
    def stream() -> Iterator[str]:
        bottle.response.content_type = "text/plain"
        yield from LINES

    @app.get("/file")
    def file() -> Any:
        return bottle.static_file(path.name, str(path.parent))

    @app.get("/cookies")
    def cookies() -> Any:
        bottle.response.set_cookie("one", "1", httponly=True)
        bottle.response.set_cookie("two", "é".encode().decode("latin-1"))
        return dict(request.cookies)

    @app.get("/redirect")
    def redirect() -> Any:
        bottle.redirect("/?to=here", 302)

    @app.get("/error")
    def error() -> Any:
        raise LookupError("nobody home")

    @app.get("/path/<rest:re:.*>")
    def echo_path(rest: str) -> Any:
        return {"path": request.path, "query": request.query.q or None}

    return app


def falcon_app(path: Path) -> Any:
    import falcon

    class Resource:
        def __init__(self, get: Any = None, post: Any = None) -> None:
            if get is not None:
                self.on_get = get
            if post is not None:
                self.on_post = post

    def hello(request: Any, response: Any) -> None:
        response.text = "hello"

    def echo_json(request: Any, response: Any) -> None:
        response.media = {"got": request.get_media()}

    def form(request: Any, response: Any) -> None:
        told: dict[str, Any] = {}
        for part in request.get_media():
            if part.name == "file":
                told.update(file=part.filename, sha256=sha256(part.stream))
            else:
                told[part.name] = part.text
        response.media = told

    def upload(request: Any, response: Any) -> None:
        response.text = sha256(request.bounded_stream)

    def stream(request: Any, response: Any) -> None:
        response.content_type = "text/plain"
        response.stream = (line.encode() for line in LINES)

    def file(request: Any, response: Any) -> None:
        if request.range is None:
            response.set_stream(path.open("rb"), len(FILE))
            return
        begin, end = span(request.get_header("Range"))
        response.status = falcon.HTTP_206
        response.content_range = (begin, end, len(FILE))
        response.set_stream(io.BytesIO(FILE[begin : end + 1]), end + 1 - begin)

    def cookies(request: Any, response: Any) -> None:
        response.set_cookie("one", "1", secure=False)
        response.append_header("Set-Cookie", r'two="\303\251"')
        response.media = request.cookies

    def redirect(request: Any, response: Any) -> None:
        raise falcon.HTTPFound("/?to=here")

    def error(request: Any, response: Any) -> None:
        raise LookupError("nobody home")

    def echo_path(request: Any, response: Any) -> None:
        response.media = {"path": request.path, "query": request.get_param("q")}

    def reraise(request: Any, response: Any, raised: Exception, params: Any) -> None:
        raise raised

    app = falcon.App()
    app.add_error_handler(LookupError, reraise)
    app.add_route("/", Resource(hello))
    app.add_route("/json", Resource(post=echo_json))
    app.add_route("/form", Resource(post=form))
    app.add_route("/upload", Resource(post=upload))
    app.add_route("/stream", Resource(stream))
    app.add_route("/file", Resource(file))
    app.add_route("/cookies", Resource(cookies))
    app.add_route("/redirect", Resource(redirect))
    app.add_route("/error", Resource(error))
    app.add_sink(echo_path, "//?path/")
    return app


APPS = {
    "flask": flask_app,
    "django": django_app,
    "bottle": bottle_app,
    "falcon": falcon_app,
}


# ---- A server for each ---------------------------------------------------------------


@contextmanager
def serving(app: Any, threads: int) -> Iterator[str]:
    with Live(app, interface="wsgi", threads=threads) as live:
        yield "http://{}:{}".format(*live.address)
        assert set(re.findall(r"^\w+Error", live.log.text, re.M)) <= {"LookupError"}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "file.bin"
    path.write_bytes(FILE)
    return path


@pytest.fixture(
    scope="module",
    params=[(name, threads) for name in APPS for threads in (1, 8)],
    ids=lambda param: f"{param[0]}-{param[1]}",
)
def site(request: pytest.FixtureRequest, path: Path) -> Iterator[httpx.Client]:
    name, threads = request.param
    with serving(APPS[name](path), threads) as address:
        with httpx.Client(base_url=address, timeout=SOON) as client:
            yield client


# ---- What is asked -------------------------------------------------------------------


def test_hello(site):
    answer = site.get("/")
    assert (answer.status_code, answer.text) == (200, "hello")


def test_head_is_answered_as_get_without_the_body(site):
    answer = site.head("/")
    assert answer.text == "" and answer.status_code in (200, 405)  # falcon has no HEAD


def test_a_connection_is_kept(site):
    assert [site.get("/").headers.get("connection") for _ in range(3)] in (
        [None] * 3,
        ["keep-alive"] * 3,
    )


@pytest.mark.parametrize("value", [{"a": [1, "é", None]}, "x" * 100_000])
def test_json(site, value):
    assert site.post("/json", json=value).json() == {"got": value}


def test_a_form_with_a_file(site):
    files = {"file": ("ümlaut.bin", UPLOAD, "application/octet-stream")}
    answer = site.post("/form", data={"name": "Zoë"}, files=files)
    assert answer.json() == {"name": "Zoë", "file": "ümlaut.bin", "sha256": DIGEST}


def test_an_upload_of_known_length(site):
    assert site.post("/upload", content=UPLOAD).text == DIGEST


def test_a_chunked_upload(site):
    parts = (UPLOAD[n : n + 100_000] for n in range(0, len(UPLOAD), 100_000))
    answer = site.post("/upload", content=parts)
    assert answer.text == DIGEST


def test_an_empty_upload(site):
    expected = hashlib.sha256(b"").hexdigest()
    assert site.post("/upload", content=b"").text == expected
    assert site.post("/upload", content=iter([])).text == expected


def test_a_streamed_answer(site):
    answer = site.get("/stream")
    assert answer.text == "".join(LINES)
    assert answer.headers["transfer-encoding"] == "chunked"


def test_a_file(site):
    answer = site.get("/file")
    assert answer.content == FILE
    assert answer.headers["content-length"] == str(len(FILE))


@pytest.mark.parametrize(("begin", "end"), [(0, 0), (100, 299), (1000, "")])
def test_a_range_of_a_file(site, begin, end):
    answer = site.get("/file", headers={"Range": f"bytes={begin}-{end}"})
    last = len(FILE) - 1 if end == "" else end
    assert (answer.status_code, answer.content) == (206, FILE[begin : last + 1])
    assert answer.headers["content-range"] == f"bytes {begin}-{last}/{len(FILE)}"


def test_a_download_that_is_broken_off(site):
    with site.stream("GET", "/file") as answer:
        next(answer.iter_raw())
    assert site.get("/").text == "hello"


def test_cookies_that_are_set(site):
    answer = httpx.get(site.base_url.join("/cookies"))
    fields = answer.headers.get_list("set-cookie")
    assert sorted(field.partition("=")[0] for field in fields) == ["one", "two"]


def test_cookies_that_are_sent(site):
    cookies = {"a": "1", "b": "2"}
    answer = httpx.get(site.base_url.join("/cookies"), cookies=cookies)
    assert answer.json() == cookies


def test_cookies_in_several_fields(site):
    fields = [("Cookie", "a=1"), ("Cookie", "b=2")]
    answer = httpx.get(site.base_url.join("/cookies"), headers=fields)
    assert answer.json() == {"a": "1", "b": "2"}


def test_a_redirect(site):
    answer = site.get("/redirect")
    assert answer.status_code == 302
    assert answer.headers["location"].removeprefix(str(site.base_url)) in (
        "/?to=here",
        "?to=here",
    )
    assert site.get("/redirect", follow_redirects=True).text == "hello"


def test_a_page_that_is_not_there(site):
    assert site.get("/nowhere").status_code == 404


def test_an_error_is_a_500_and_the_next_request_is_served(site):
    assert site.get("/error").status_code == 500
    assert site.get("/").text == "hello"


@pytest.mark.parametrize(
    ("target", "decoded"),
    [
        ("/path/a", "/path/a"),
        ("/path/a%2Fb", "/path/a/b"),
        ("/path/a%20b+c", "/path/a b+c"),
        ("/path/%C3%A9", "/path/é"),
        ("/path/%E6%97%A5", "/path/日"),
        ("/path/100%25", "/path/100%"),
    ],
)
def test_a_path(site, target, decoded):
    answer = site.get(f"{target}?q=%C3%A9+%26")
    assert answer.json() == {"path": decoded, "query": "é &"}


TWO_SLASHES = {  # at the beginning, and amid a path
    "flask": (200, 308),  # redirects to what has one
    "django": (200, 200),
    "bottle": (404, 200),
    "falcon": (200, 200),
}


@pytest.mark.parametrize("place", [0, 1], ids=["beginning", "amid"])
def test_a_path_of_two_slashes_is_the_frameworks_to_judge(site, request, place):
    target = ("//path/a", "/path//a")[place]
    address = (site.base_url.host, site.base_url.port)
    with Client(address) as client:  # httpx would take a host out of it
        status = client.ask(get(target)).status
    assert status == TWO_SLASHES[request.node.callspec.params["site"][0]][place]


def test_many_at_a_time(site):
    def ask(n: int) -> str:
        return site.post("/upload", content=b"%d" % n * 1000).text

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(ask, range(100)))
    assert texts == [hashlib.sha256(b"%d" % n * 1000).hexdigest() for n in range(100)]


def test_requests_do_not_mix_their_environments(site):
    def ask(n: int) -> list[Any]:
        with httpx.Client(base_url=site.base_url) as client:
            paths = [f"/path/{n}-{i}" for i in range(10)]
            return [client.get(path).json()["path"] == path for path in paths]

    results: list[list[Any]] = []
    threads = [
        threading.Thread(target=lambda n=n: results.append(ask(n))) for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[True] * 10] * 8
