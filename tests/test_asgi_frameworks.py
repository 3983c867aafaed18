"""Apps of FastAPI, Starlette, Django, Litestar, Quart and BlackSheep over real sockets,
through httpx.

Each framework serves the same small site, written as its manual does it; every test
asks all of them. Django has no lifespan; it and BlackSheep have no background tasks.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
import queue
import re
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import blacksheep
import django
import fastapi
import httpx
import litestar
import pytest
import quart
from django import http
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.urls import path as route
from litestar import response as litestar_response
from litestar.background_tasks import BackgroundTask as LitestarTask
from litestar.datastructures import UploadFile
from litestar.enums import RequestEncodingType
from litestar.params import Body
from live import SOON, Live
from starlette import responses
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.routing import Route

FILE = bytes(range(256)) * 4096  # 1 MiB
UPLOAD = hashlib.sha256(b"seed").digest() * (5 << 15)  # 5 MiB
DIGEST = hashlib.sha256(UPLOAD).hexdigest()
LINES = [f"line {n}\n" for n in range(100)]
EVENTS = [f"data: {n}\n\n" for n in range(3)]

told: queue.SimpleQueue[str] = queue.SimpleQueue()  # by apps, of what no answer tells


async def lines() -> AsyncIterator[str]:
    for line in LINES:
        await asyncio.sleep(0)
        yield line


async def events() -> AsyncIterator[str]:
    for event in EVENTS:
        await asyncio.sleep(0.001)
        yield event


async def endless() -> AsyncIterator[str]:
    """What only the client's departure ends."""
    try:
        while True:
            yield "x" * 1000
            await asyncio.sleep(0)
    finally:
        told.put("left")


async def later() -> None:
    await asyncio.sleep(0.001)
    told.put("background")


async def digest(parts: AsyncIterator[bytes]) -> str:
    found = hashlib.sha256()
    async for part in parts:
        found.update(part)
    return found.hexdigest()


@asynccontextmanager
async def lifespan(app: Any) -> AsyncIterator[dict[str, Any]]:
    yield {"answer": 42}
    told.put("shutdown")


# ---- The site, six times -------------------------------------------------------------


def starlette_app(path: Path) -> Any:
    async def hello(request: Any) -> Any:
        return responses.PlainTextResponse("hello")

    async def echo_json(request: Any) -> Any:
        return responses.JSONResponse({"got": await request.json()})

    async def form(request: Any) -> Any:
        async with request.form() as fields:
            data = await fields["file"].read()
            name = fields["name"]
        return responses.JSONResponse([name, hashlib.sha256(data).hexdigest()])

    async def upload(request: Any) -> Any:
        return responses.PlainTextResponse(await digest(request.stream()))

    async def stream(request: Any) -> Any:
        return responses.StreamingResponse(lines(), media_type="text/plain")

    async def sse(request: Any) -> Any:
        return responses.StreamingResponse(events(), media_type="text/event-stream")

    async def forever(request: Any) -> Any:
        return responses.StreamingResponse(endless(), media_type="text/plain")

    async def file(request: Any) -> Any:
        return responses.FileResponse(path)

    async def background(request: Any) -> Any:
        return responses.PlainTextResponse("hello", background=BackgroundTask(later))

    async def state(request: Any) -> Any:
        return responses.JSONResponse({"answer": request.state.answer})

    async def error(request: Any) -> Any:
        raise LookupError("nobody home")

    async def echo_path(request: Any) -> Any:
        found = {"path": request.url.path, "query": request.query_params["q"]}
        return responses.JSONResponse(found | {"rest": request.path_params["rest"]})

    routes = [
        Route("/", hello),
        Route("/json", echo_json, methods=["POST"]),
        Route("/form", form, methods=["POST"]),
        Route("/upload", upload, methods=["POST"]),
        Route("/stream", stream),
        Route("/sse", sse),
        Route("/forever", forever),
        Route("/file", file),
        Route("/background", background),
        Route("/state", state),
        Route("/error", error),
        Route("/path/{rest:path}", echo_path),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


def fastapi_app(path: Path) -> Any:
    app = fastapi.FastAPI(lifespan=lifespan)

    @app.middleware("http")
    async def middleware(request: fastapi.Request, call_next: Any) -> Any:
        return await call_next(request)

    @app.get("/", response_class=responses.PlainTextResponse)
    def hello() -> str:  # in a thread
        return "hello"

    @app.post("/json")
    async def echo_json(got: Any = fastapi.Body()) -> Any:  # noqa: B008
        return {"got": got}

    @app.post("/form")
    async def form(
        file: fastapi.UploadFile,
        name: str = fastapi.Form(),
    ) -> Any:
        return [name, hashlib.sha256(await file.read()).hexdigest()]

    @app.post("/upload", response_class=responses.PlainTextResponse)
    async def upload(request: fastapi.Request) -> str:
        return await digest(request.stream())

    @app.get("/stream")
    async def stream() -> Any:
        return responses.StreamingResponse(lines(), media_type="text/plain")

    @app.get("/sse")
    async def sse() -> Any:
        return responses.StreamingResponse(events(), media_type="text/event-stream")

    @app.get("/forever")
    async def forever() -> Any:
        return responses.StreamingResponse(endless(), media_type="text/plain")

    @app.get("/file")
    async def file() -> Any:
        return responses.FileResponse(path)

    @app.get("/background", response_class=responses.PlainTextResponse)
    async def background(tasks: fastapi.BackgroundTasks) -> str:
        tasks.add_task(later)
        return "hello"

    @app.get("/state")
    async def state(request: fastapi.Request) -> Any:
        return {"answer": request.state.answer}

    @app.get("/error")
    async def error() -> Any:
        raise LookupError("nobody home")

    @app.get("/path/{rest:path}")
    async def echo_path(request: fastapi.Request, rest: str, q: str) -> Any:
        return {"path": request.url.path, "query": q, "rest": rest}

    return app


def django_app(path: Path) -> Any:
    async def hello(request: Any) -> Any:
        return http.HttpResponse("hello")

    async def echo_json(request: Any) -> Any:
        return http.JsonResponse({"got": json.loads(request.body)})

    def form(request: Any) -> Any:  # in a thread
        data = request.FILES["file"].read()
        found = [request.POST["name"], hashlib.sha256(data).hexdigest()]
        return http.JsonResponse(found, safe=False)

    def upload(request: Any) -> Any:
        return http.HttpResponse(hashlib.sha256(request.read()).hexdigest())

    async def stream(request: Any) -> Any:
        return http.StreamingHttpResponse(lines(), content_type="text/plain")

    async def sse(request: Any) -> Any:
        return http.StreamingHttpResponse(events(), content_type="text/event-stream")

    async def forever(request: Any) -> Any:
        return http.StreamingHttpResponse(endless(), content_type="text/plain")

    def file(request: Any) -> Any:
        return http.FileResponse(path.open("rb"))

    async def error(request: Any) -> Any:
        raise LookupError("nobody home")

    async def echo_path(request: Any, rest: str) -> Any:
        found = {"path": request.path, "query": request.GET["q"], "rest": rest}
        return http.JsonResponse(found)

    class Urls:
        urlpatterns = [
            route("", hello),
            route("json", echo_json),
            route("form", form),
            route("upload", upload),
            route("stream", stream),
            route("sse", sse),
            route("forever", forever),
            route("file", file),
            route("error", error),
            route("path/<path:rest>", echo_path),
        ]

    if not settings.configured:
        settings.configure(
            ALLOWED_HOSTS=["*"],
            SECRET_KEY="x",
            MIDDLEWARE=["django.middleware.common.CommonMiddleware"],
            DATA_UPLOAD_MAX_MEMORY_SIZE=None,
            LOGGING_CONFIG=None,
        )
        django.setup()
    settings.ROOT_URLCONF = Urls
    return get_asgi_application()


def litestar_app(path: Path) -> Any:
    text, plain = litestar.MediaType.TEXT, "text/plain"

    @asynccontextmanager
    async def lived(app: litestar.Litestar) -> AsyncIterator[None]:
        app.state.answer = 42
        yield
        told.put("shutdown")

    @litestar.get("/", media_type=text)
    async def hello() -> str:
        return "hello"

    @litestar.post("/json", status_code=200)
    async def echo_json(data: Any) -> dict[str, Any]:
        return {"got": data}

    @litestar.post("/form", status_code=200)
    async def form(
        data: dict[str, Any] = Body(media_type=RequestEncodingType.MULTI_PART),  # noqa: B008
    ) -> list[str]:
        file: UploadFile = data["file"]
        return [data["name"], hashlib.sha256(await file.read()).hexdigest()]

    @litestar.post("/upload", media_type=text, status_code=200)
    async def upload(request: litestar.Request[Any, Any, Any]) -> str:
        return await digest(request.stream())

    @litestar.get("/stream")
    async def stream() -> litestar_response.Stream:
        return litestar_response.Stream(lines(), media_type=plain)

    @litestar.get("/sse")
    async def sse() -> litestar_response.Stream:
        return litestar_response.Stream(events(), media_type="text/event-stream")

    @litestar.get("/forever")
    async def forever() -> litestar_response.Stream:
        return litestar_response.Stream(endless(), media_type=plain)

    @litestar.get("/file")
    async def file() -> litestar_response.File:
        return litestar_response.File(path)

    @litestar.get("/background", media_type=text)
    async def background() -> litestar.Response[str]:
        return litestar.Response("hello", background=LitestarTask(later))

    @litestar.get("/state")
    async def state(state: litestar.datastructures.State) -> dict[str, int]:
        return {"answer": state.answer}

    @litestar.get("/error")
    async def error() -> None:
        raise LookupError("nobody home")

    @litestar.get("/path/{rest:path}")
    async def echo_path(
        request: litestar.Request[Any, Any, Any], rest: str, q: str
    ) -> dict[str, str]:
        return {"path": request.url.path, "query": q, "rest": rest.removeprefix("/")}

    handlers = [hello, echo_json, form, upload, stream, sse, forever, file]
    handlers += [background, state, error, echo_path]
    return litestar.Litestar(
        handlers, lifespan=[lived], request_max_body_size=None, openapi_config=None
    )


def quart_app(path: Path) -> Any:
    app = quart.Quart(__name__)
    app.config["MAX_CONTENT_LENGTH"] = None

    @app.before_serving
    async def startup() -> None:
        app.config["ANSWER"] = 42

    @app.after_serving
    async def shutdown() -> None:
        told.put("shutdown")

    @app.get("/")
    async def hello() -> Any:
        return "hello"

    @app.post("/json")
    async def echo_json() -> Any:
        return {"got": await quart.request.get_json()}

    @app.post("/form")
    async def form() -> Any:
        fields, files = await quart.request.form, await quart.request.files
        data = files["file"].read()
        return [fields["name"], hashlib.sha256(data).hexdigest()]

    @app.post("/upload")
    async def upload() -> Any:
        return await digest(quart.request.body)

    @app.get("/stream")
    async def stream() -> Any:
        return lines(), {"Content-Type": "text/plain"}

    @app.get("/sse")
    async def sse() -> Any:
        return events(), {"Content-Type": "text/event-stream"}

    @app.get("/forever")
    async def forever() -> Any:
        return endless(), {"Content-Type": "text/plain"}

    @app.get("/file")
    async def file() -> Any:
        return await quart.send_file(path)

    @app.get("/background")
    async def background() -> Any:
        app.add_background_task(later)
        return "hello"

    @app.get("/state")
    async def state() -> Any:
        return {"answer": app.config["ANSWER"]}

    @app.get("/error")
    async def error() -> Any:
        raise LookupError("nobody home")

    @app.get("/path/<path:rest>")
    async def echo_path(rest: str) -> Any:
        args = quart.request.args
        return {"path": quart.request.path, "query": args["q"], "rest": rest}

    return app


def blacksheep_app(path: Path) -> Any:
    app = blacksheep.Application(router=blacksheep.Router())
    get, post = app.router.get, app.router.post

    def streamed(parts: Callable[[], AsyncIterator[str]], kind: bytes) -> Any:
        async def provide() -> AsyncIterator[bytes]:
            async for part in parts():
                yield part.encode()

        return blacksheep.Response(
            200, content=blacksheep.StreamedContent(kind, provide)
        )

    @app.lifespan
    async def lived() -> AsyncIterator[None]:
        app.services.register(dict, instance={"answer": 42})
        yield
        told.put("shutdown")

    @get("/")
    async def hello() -> Any:
        return blacksheep.text("hello")

    @post("/json")
    async def echo_json(request: blacksheep.Request) -> Any:
        return blacksheep.json({"got": await request.json()})

    @post("/form")
    async def form(request: blacksheep.Request) -> Any:
        parts = {part.name: part.data for part in await request.multipart()}
        data = parts[b"file"]
        return blacksheep.json(
            [parts[b"name"].decode(), hashlib.sha256(data).hexdigest()]
        )

    @post("/upload")
    async def upload(request: blacksheep.Request) -> Any:
        return blacksheep.text(await digest(request.stream()))

    @get("/stream")
    async def stream() -> Any:
        return streamed(lines, b"text/plain")

    @get("/sse")
    async def sse() -> Any:
        return streamed(events, b"text/event-stream")

    @get("/forever")
    async def forever() -> Any:
        return streamed(endless, b"text/plain")

    @get("/file")
    async def file() -> Any:
        return blacksheep.file(path.read_bytes(), "application/octet-stream")

    @get("/state")
    async def state(found: dict) -> Any:
        return blacksheep.json(found)

    @get("/error")
    async def error() -> Any:
        raise LookupError("nobody home")

    @get("/path/*")
    async def echo_path(request: blacksheep.Request) -> Any:
        rest = unquote(request.route_values["tail"])
        found = {"path": request.path, "query": request.query["q"][0], "rest": rest}
        return blacksheep.json(found)

    return app


APPS: dict[str, Callable[[Path], Any]] = {
    "starlette": starlette_app,
    "fastapi": fastapi_app,
    "django": django_app,
    "litestar": litestar_app,
    "quart": quart_app,
    "blacksheep": blacksheep_app,
}


# ---- A server for each ---------------------------------------------------------------


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "file.bin"
    path.write_bytes(FILE)
    return path


@pytest.fixture(scope="module", params=APPS)
def framework(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def live(framework: str, path: Path) -> Iterator[Live]:
    with Live(APPS[framework](path)) as live:
        yield live
        found = set(re.findall(r"^\w+(?:Error|Exception)\b", live.log.text, re.M))
        assert found <= {"LookupError"}
    if framework != "django":
        assert told.get(timeout=SOON) == "shutdown"
    assert told.empty()


@pytest.fixture(scope="module")
def site(live: Live) -> Iterator[httpx.Client]:
    address = "http://{}:{}".format(*live.address)
    with httpx.Client(base_url=address, timeout=SOON) as client:
        yield client


# ---- What is asked -------------------------------------------------------------------


def test_an_app_is_known_as_asgi(live):
    assert live.server.interface == "asgi"


def test_hello(site):
    answer = site.get("/")
    assert (answer.status_code, answer.text) == (200, "hello")
    assert answer.headers["content-length"] == "5"


def test_head_has_no_body(site, framework):
    answer = site.head("/")
    without = {"fastapi": 405, "litestar": 405, "blacksheep": 404}
    status = without.get(framework, 200)  # those serve no HEAD that is not asked for
    assert (answer.text, answer.status_code) == ("", status)
    assert site.get("/").text == "hello"


@pytest.mark.parametrize("value", [{"a": [1, "é", None]}, "x" * 100_000])
def test_json(site, value):
    assert site.post("/json", json=value).json() == {"got": value}


def test_a_form_with_a_file(site):
    files = {"file": ("file.bin", UPLOAD, "application/octet-stream")}
    answer = site.post("/form", data={"name": "Zoë"}, files=files)
    assert answer.json() == ["Zoë", DIGEST]


def test_an_upload_of_known_length(site):
    assert site.post("/upload", content=UPLOAD).text == DIGEST


def test_a_chunked_upload(site):
    parts = (UPLOAD[n : n + 100_000] for n in range(0, len(UPLOAD), 100_000))
    assert site.post("/upload", content=parts).text == DIGEST


def test_a_streamed_answer(site):
    answer = site.get("/stream")
    assert answer.text == "".join(LINES)
    assert answer.headers["transfer-encoding"] == "chunked"


def test_server_sent_events(site):
    with site.stream("GET", "/sse") as answer:
        assert "".join(answer.iter_text()) == "".join(EVENTS)
    assert answer.headers["content-type"].startswith("text/event-stream")


def test_a_client_that_leaves_ends_what_is_streamed_to_it(site, live):
    with site.stream("GET", "/forever") as answer:
        next(answer.iter_raw())

    def has_told(stats: dict[str, Any]) -> bool:
        live.run(gc.collect)  # Django leaves its generator to the collector
        return not told.empty()

    live.until(has_told)
    assert told.get(timeout=SOON) == "left"


def test_a_file(site):
    answer = site.get("/file")
    assert answer.content == FILE
    assert answer.headers["content-length"] == str(len(FILE))


def test_a_background_task_runs_behind_the_answer(site, framework):
    if framework in ("django", "blacksheep"):
        pytest.skip("it has none")
    assert site.get("/background").text == "hello"
    assert told.get(timeout=SOON) == "background"


def test_what_the_lifespan_has_made_is_there(site, framework):
    if framework == "django":
        pytest.skip("Django has no lifespan")
    assert site.get("/state").json() == {"answer": 42}


def test_an_error_is_a_500_and_the_next_request_is_served(site):
    assert site.get("/error").status_code == 500
    assert site.get("/").text == "hello"


@pytest.mark.parametrize("rest", ["a", "a b", "é", "a/b", "100%"])
def test_a_path(site, rest):
    answer = site.get(f"/path/{quote(rest)}?q=%C3%A9+%26")
    found = answer.json()
    assert (found["rest"], found["query"]) == (rest, "é &")
    assert unquote(found["path"]) == f"/path/{rest}"


def test_many_at_a_time(site):
    def ask(n: int) -> str:
        return site.post("/upload", content=b"%d" % n * 1000).text

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(ask, range(100)))
    assert texts == [hashlib.sha256(b"%d" % n * 1000).hexdigest() for n in range(100)]
