"""What the debug pages answer, on the driver's own server and mounted elsewhere: what there is, bad input, the end."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import re
import socket
import threading
import zipfile
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from debug_pages import PATH, Answer, Echo, ask, serving
from pprof_schema import read
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

import bigmachine
from bigmachine import State
from bigmachine.errors import UsageError
from bigmachine.inside import monitor, profiles, routes, server
from bigmachine.machine import Machine
from bigmachine.session import Session
from bigmachine.testing import TestSystem
from bigmachine.testing.conformance import SOON, eventually


class Counted:
    def setup(self, b: Session) -> None:
        self.event = threading.Event()
        self.entered = threading.Event()

    def count(self, n: int) -> int:
        return n + 1

    def fail(self) -> None:
        raise ValueError("it cannot be\nfor a reason")


class Place:
    """A session of its own, with a server and machines."""

    def __init__(self, machines: int) -> None:
        self.system = TestSystem()
        self.session = bigmachine.start(self.system)
        debug = server.start(self.session, "localhost:0")
        assert debug is not None
        self.served = debug
        self.machines = self.session.start(machines, {"Counted": Counted()}) if machines else []
        for machine in self.machines:
            machine.wait()

    def get(self, path: str, **headers: str) -> Answer:
        return ask(self.served, f"{PATH}/{path}", **headers)

    def json(self, path: str) -> Any:
        answer = self.get(path)
        assert (answer.status, answer.headers["content-type"]) == (200, "application/json"), answer
        return json.loads(answer.body)

    def close(self) -> None:
        self.session.shutdown()
        self.served.close()


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    """For all who only ask. Its machines have been called, and have said something."""
    found = Place(2)
    found.machines[0].call("Counted.count", 1)
    with pytest.raises(ValueError, match="it cannot be"):
        found.machines[1].call("Counted.fail")
    for machine in found.machines:
        feed = found.session.logs.feed(machine.id, lambda machine=machine: machine.addr)  # type: ignore[misc]
        feed.data("0", "stdout", b"one\ntwo <script>\nthree")
    yield found
    found.close()


@pytest.fixture
def own() -> Iterator[Place]:
    """For who changes something."""
    found = Place(0)
    yield found
    found.close()


# -- What there is -------------------------------------------------------------------------------------------------------


def test_the_way_to_the_page(place: Place) -> None:
    """Whatever is typed leads there, by relative addresses, which are right behind any proxy."""
    for path in ("/", PATH, f"{PATH}?x=1"):
        answer = ask(place.served, path)
        assert answer.status == 307
        there = answer.headers["location"]
        assert not there.startswith(("http", "/"))
    assert ask(place.served, "/").headers["location"] == "debug/bigmachine/"
    assert ask(place.served, f"{PATH}?x=1").headers["location"] == "bigmachine/?x=1"


def test_the_page_and_its_files(place: Place) -> None:
    page = place.get("")
    assert (page.status, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    named = re.findall(r'(?:src|href)="([^"#]+)"', page.body.decode())
    assert named
    for each in named:
        assert not urlsplit(each).netloc
        assert not each.startswith("/")
        assert place.get(each).status == 200, each
    scripts = [place.get(each).headers["content-type"] for each in named if each.endswith(".js")]
    assert set(scripts) == {"text/javascript; charset=utf-8"}


@pytest.mark.parametrize(
    "path", ["static/", "static/none.js", "static/../routes.py", "static/%2e%2e/routes.py", "static//etc/passwd"]
)
def test_no_other_files(place: Place, path: str) -> None:
    assert place.get(path).status == 404


def test_what_is_not_there(place: Place) -> None:
    for path in (f"{PATH}/nothing", f"{PATH}/status/", "/nothing", "/debug", f"{PATH}x/", f"{PATH}/machines/"):
        answer = ask(place.served, path)
        assert (answer.status, answer.headers["content-type"]) == (404, "text/plain; charset=utf-8")
        assert answer.line == f"there is nothing at {path}; the page is at {PATH}/"


def test_status_as_json(place: Place) -> None:
    answer = place.get("status.json")
    value = json.loads(answer.body)
    assert value["session"]["name"] == place.session.name
    assert [each["id"] for each in value["machines"]] == [each.id for each in place.machines]
    zipped = place.get("status.json", Accept_Encoding="br, gzip")
    assert zipped.headers["content-encoding"] == "gzip"
    assert zipped.headers["vary"] == "Accept-Encoding"
    assert json.loads(gzip.decompress(zipped.body)).keys() == value.keys()


def test_who_has_it_already_gets_nothing(own: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "INTERVAL", 3600.0)
    first = own.get("status.json")
    again = own.get("status.json", If_None_Match=f'"other", {first.headers["etag"]}')
    assert (again.status, again.body, again.headers["etag"]) == (304, b"", first.headers["etag"])
    assert own.get("status.json", If_None_Match='"other"').status == 200


def test_status_as_text(place: Place) -> None:
    text = place.get("status").body.decode()
    assert place.session.name in text
    assert all(machine.addr in text for machine in place.machines)
    assert "Counted.fail" in text


@pytest.mark.parametrize("path", ["status", "status.json", "", "logs", "logs?follow=1", "pprof/threads", "vars"])
def test_heads(place: Place, path: str) -> None:
    answer = ask(place.served, f"{PATH}/{path}", "HEAD")
    assert (answer.status, answer.body) == (200, b"")


def test_one_machine(place: Place) -> None:
    machine = place.machines[1]
    for named in (machine.id,):
        found = place.json(f"machines/{named}.json")
        assert found["address"] == machine.addr
        (fail,) = (each for each in found["methods"] if each["method"] == "Counted.fail")
        assert (fail["called"]["count"], fail["called"]["errors"]) == (1, 1)
    answer = place.get("machines/m-000000.json")
    assert (answer.status, answer.line) == (
        404,
        f"no such machine: 'm-000000'; there are {place.machines[0].id}, {machine.id}",
    )


def test_events(place: Place) -> None:
    found = place.json("events.json")
    numbers = [each["number"] for each in found["events"]]
    assert numbers == list(range(1, len(numbers) + 1))
    assert found["number"] >= numbers[-1]
    assert found["events"][0]["kind"] == "session.started"
    assert place.json(f"events.json?after={numbers[0]}&limit=1")["events"][0]["number"] == 2
    assert place.json(f"events.json?after={10**12}")["events"] == []


def test_variables(place: Place) -> None:
    found = place.json("vars")
    assert found["missing"] == {}
    assert set(found["machines"]) == {"driver", *(each.addr for each in place.machines)}
    for path in ("/metrics", f"{PATH}/metrics"):
        answer = ask(place.served, path)
        assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert b"bigmachine_rpc_calls_total{" in answer.body


def test_a_report(place: Place) -> None:
    answer = place.get("bundle")
    assert answer.status == 200
    assert answer.headers["content-disposition"] == f'attachment; filename="bigmachine-{place.session.name}.zip"'
    assert "status.json" in {name.rpartition("/")[2] for name in zipfile.ZipFile(io.BytesIO(answer.body)).namelist()}


# -- Logs ----------------------------------------------------------------------------------------------------------------


def test_logs_as_text(place: Place) -> None:
    first, second = (machine.addr for machine in place.machines)
    text = place.get("logs").body.decode()
    assert "bigmachine: status at http://localhost" in text
    assert f"{first}: one\n{first}: two <script>\n{second}: one\n" in text
    assert place.get("logs?n=1").body.decode() == f"{second}: two <script>\n"
    assert place.get("logs?n=0").body == b""
    for named in (place.machines[0].id, first):
        assert place.get(f"logs?machine={named}").body.decode() == f"{first}: one\n{first}: two <script>\n"
    assert first not in place.get("logs?machine=driver").body.decode()


def test_logs_as_json(place: Place) -> None:
    id = place.machines[0].id
    found = place.json(f"logs.json?machine={id}")
    assert [(line["process"], line["stream"], line["text"]) for line in found["lines"]] == [
        ("0", "stdout", "one"),
        ("0", "stdout", "two <script>"),
    ]
    assert (found["lost"], found["behind"]) == (0, False)
    assert [line["text"] for line in found["under_way"]] == ["three"]
    number = found["lines"][0]["number"]
    later = place.json(f"logs.json?after={number}&machine={id}&limit=1")
    assert ([line["text"] for line in later["lines"]], later["behind"]) == (["two <script>"], True)
    assert place.json("logs.json?after=0&text=two")["lines"][0]["text"] == "two <script>"
    assert place.json(f"logs.json?after={10**12}")["lines"] == []
    assert len(place.json("logs.json?n=2")["lines"]) == 2


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("logs?n=-1", "n must be a whole number, 0 or more: '-1'"),
        ("logs?n=many", "n must be a whole number, 0 or more: 'many'"),
        ("logs.json?after=%D9%A3", "after must be a whole number, 0 or more: '٣'"),
        (f"logs.json?limit={'9' * 30}", f"limit must be a whole number, 0 or more: '{'9' * 30}'"),
        ("events.json?after=x", "after must be a whole number, 0 or more: 'x'"),
        ("logs?follow=perhaps", "follow must be a whole number, 0 or more: 'perhaps'"),
    ],
)
def test_numbers_that_are_none(place: Place, path: str, line: str) -> None:
    answer = place.get(path)
    assert (answer.status, answer.line) == (400, line)


def test_logs_of_nobody(place: Place) -> None:
    for path in ("logs?machine=m-0", "logs.json?machine=m-0", "logs?machine=m-0&follow=1"):
        answer = place.get(path)
        assert answer.status == 404
        assert answer.line.startswith("no such machine: 'm-0'; there are m-")


def test_who_follows_gets_all_and_then_an_end() -> None:
    place = Place(1)
    (machine,) = place.machines
    got: list[Answer] = []
    follower = threading.Thread(target=lambda: got.append(place.get("logs?follow=1&n=0")))
    follower.start()
    feed = place.session.logs.feed(machine.id, lambda: machine.addr)
    eventually(lambda: place.served._thread is not None, "the follower's connection")
    for number in range(3000):
        feed.data("0", "stdout", b"line %d\n" % number)
    place.close()
    follower.join(SOON)
    assert not follower.is_alive()
    lines = got[0].body.decode().splitlines()
    assert lines[-1] == f"{machine.addr}: line 2999"


def test_a_follower_that_goes_away(
    own: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ended = threading.Event()
    following = routes.Debug._following

    async def watched(*args: Any) -> Any:
        try:
            async for piece in following(*args):
                yield piece
        finally:
            ended.set()

    monkeypatch.setattr(routes.Debug, "_following", watched)
    with socket.create_connection(("127.0.0.1", own.served.port), SOON) as sock:
        sock.sendall(f"GET {PATH}/logs?follow=1 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert sock.recv(4096)
        assert not ended.is_set()
    assert ended.wait(SOON)
    assert own.get("status").status == 200
    assert caplog.records == []


# -- Profiles ------------------------------------------------------------------------------------------------------------


def test_which_profiles_there_are(place: Place) -> None:
    page = place.get("pprof/").body.decode()
    assert all(f'href="{name}' in page for name in ("profile", "heap", "threads", "goroutine", "allocs"))
    assert place.get("pprof").headers["location"] == "pprof/"


def test_a_profile(place: Place) -> None:
    answer = place.get("pprof/profile?seconds=0.05")
    assert (answer.status, answer.headers["content-type"]) == (200, "application/octet-stream")
    assert answer.headers["content-disposition"] == 'attachment; filename="profile.pb.gz"'
    assert answer.headers["x-bigmachine-missing"] == "0"
    assert read(answer.body).types


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("pprof/profile", ("profile", 30.0, False, None)),
        ("pprof/profile?seconds=2.5&machine=driver", ("profile", 2.5, False, "driver")),
        ("pprof/heap?gc=1", ("heap", 30.0, True, None)),
        ("pprof/heap?gc=0", ("heap", 30.0, False, None)),
        ("pprof/allocs?gc=true", ("heap", 30.0, True, None)),
        ("pprof/goroutine?machine=", ("threads", 30.0, False, None)),
        ("flame.json?kind=heap&gc=1", ("heap", 30.0, True, None)),
        ("flame.json", ("profile", 30.0, False, None)),
    ],
)
def test_what_is_asked_for(place: Place, path: str, asked: tuple[object, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[tuple[object, ...]] = []

    def take(
        session: Any, kind: str, seconds: object, gc: bool, machine: object, gone: threading.Event
    ) -> profiles.Taken:
        got.append((kind, seconds, gc, machine))
        return profiles.take(session, "threads", 1.0, False, "driver", gone)

    monkeypatch.setattr(routes, "take", take)
    assert place.get(path).status == 200
    assert got == [asked]


def test_a_machine_by_either_name(place: Place) -> None:
    machine = place.machines[0]
    for named in (machine.id, machine.addr):
        labels = [labels for _, _, labels in read(place.get(f"pprof/threads?machine={named}").body).samples]
        assert {each["machine"] for each in labels} == {machine.addr}


def test_stacks_as_text(place: Place) -> None:
    for name in ("threads", "goroutine"):
        text = place.get(f"pprof/{name}?debug=1").body.decode()
        assert text.startswith("threads: ")
        assert "test_stacks_as_text" in text
    binary = place.get("pprof/threads?debug=0&machine=driver")
    assert {labels["machine"] for _, _, labels in read(binary.body).samples} == {"driver"}


def test_a_profile_for_the_page(place: Place) -> None:
    found = place.json("flame.json?kind=threads")
    assert found["kind"] == "threads"
    assert found["missing"] == []


@pytest.mark.parametrize("seconds", ["0", "-1", "1e9", "abc", "", "nan", "inf", "0x10"])
@pytest.mark.parametrize("path", ["pprof/profile?", "pprof/heap?", "flame.json?kind=profile&"])
def test_seconds_that_are_none(place: Place, path: str, seconds: str) -> None:
    answer = place.get(f"{path}seconds={seconds}")
    assert answer.status == 400
    assert answer.line == f"seconds of a profile must be a number above 0, at most 3600: '{seconds}'"


def test_profiles_that_there_are_not(place: Place) -> None:
    for path in ("pprof/mutex", "flame.json?kind=mutex", "pprof/Profile"):
        answer = place.get(path)
        assert answer.status == 404
        assert re.search("; there are profile, heap, .*threads, goroutine, allocs$", answer.line)
    answer = place.get("pprof/threads?machine=m-0")
    assert (answer.status, answer.line) == (
        404,
        f"no such machine: 'm-0'; there are {', '.join(each.id for each in place.machines)}",
    )


@pytest.mark.slow
def test_a_machine_that_dies_while_it_is_profiled() -> None:
    place = Place(2)
    alive, dead = place.machines
    got: list[Answer] = []
    asker = threading.Thread(target=lambda: got.append(place.get("pprof/profile?seconds=2")))
    asker.start()
    client = dict(dead.processes)["0"]
    eventually(lambda: place.served._serving is not None and client.connected, "a question to it")
    eventually(lambda: _asked(place), "the profile's beginning")
    place.system.kill(dead)
    asker.join(4 * SOON)
    (answer,) = got
    assert (answer.status, answer.headers["x-bigmachine-missing"]) == (200, "1")
    found = read(answer.body)
    assert any(f"{dead.addr} 0 is missing: " in comment for comment in found.comments)
    asked = place.get(f"pprof/threads?machine={dead.id}")
    assert asked.status == 400
    assert asked.line.startswith(f"no such machine is running: '{dead.id}'; there are driver, {alive.addr}")
    place.close()


def _asked(place: Place) -> bool:
    """Whether a profile is under way in this process, which the machines are, too."""
    return any(each.name == "bigmachine-profile" for each in threading.enumerate())


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[threading.Event]]:
    """Profiles take until they are cancelled; the events are theirs."""
    under_way: list[threading.Event] = []

    def take(
        session: Any, kind: str, seconds: object, gc: bool, machine: Machine | str | None, gone: threading.Event
    ) -> profiles.Taken:
        under_way.append(gone)
        gone.wait(60.0)
        raise profiles.Cancelled("the profile was cancelled")

    monkeypatch.setattr(routes, "take", take)
    yield under_way
    for event in under_way:
        event.set()


def test_a_client_that_goes_away_is_not_waited_for(own: Place, held: list[threading.Event]) -> None:
    with socket.create_connection(("127.0.0.1", own.served.port), SOON) as sock:
        sock.sendall(f"GET {PATH}/pprof/profile?seconds=3600 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        eventually(lambda: held, "the profile's beginning")
        assert not held[0].is_set()
    assert held[0].wait(SOON)


def test_who_comes_and_goes_does_not_begin_ever_more(own: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was begun for a client that has gone away goes on for a while, and counts."""
    goners: list[threading.Event] = []
    released = threading.Event()

    def take(session: Any, kind: str, seconds: object, gc: bool, machine: object, gone: threading.Event) -> profiles.Taken:
        goners.append(gone)
        assert released.wait(SOON)
        raise UsageError("it is over")

    monkeypatch.setattr(routes, "MAX_PROFILES", 1)
    monkeypatch.setattr(routes, "take", take)
    with socket.create_connection(("127.0.0.1", own.served.port), SOON) as sock:
        sock.sendall(f"GET {PATH}/pprof/profile HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        eventually(lambda: goners, "the profile's beginning")
    try:
        assert goners[0].wait(SOON)
        assert own.get("pprof/profile").status == 503
    finally:
        released.set()
    eventually(lambda: own.get("pprof/profile").line == "it is over", "room for another")


def test_only_so_many_at_once(own: Place, held: list[threading.Event]) -> None:
    got: list[Answer] = []
    askers = [threading.Thread(target=lambda: got.append(own.get("pprof/profile"))) for _ in range(routes.MAX_PROFILES)]
    for asker in askers:
        asker.start()
    eventually(lambda: len(held) == routes.MAX_PROFILES, "all of them")
    refused = own.get("pprof/profile")
    assert (refused.status, refused.headers["retry-after"]) == (503, "2")
    assert refused.line == "8 others are being answered, each by all machines: try again when one has ended"
    assert own.get("status").status == 200
    held[0].set()
    eventually(lambda: got, "the first one's end")
    assert (got[0].status, got[0].line) == (503, "the profile was cancelled")
    own.session.shutdown()
    for asker in askers:
        asker.join(SOON)
    assert [each.status for each in got] == [503] * routes.MAX_PROFILES
    assert all(each.is_set() for each in held)


# -- Mounted elsewhere ---------------------------------------------------------------------------------------------------


def call(app: Any, path: str, method: str = "GET", root: str = "", host: str = "any.example") -> Answer:
    """What the ASGI application `app` answers."""

    async def run() -> Answer:
        sent: list[Any] = []
        told = asyncio.Event()

        async def receive() -> Any:
            if not told.is_set():
                told.set()
                return {"type": "http.request", "body": b"", "more_body": False}
            await asyncio.Event().wait()

        async def send(message: Any) -> None:
            sent.append(message)

        where, _, query = path.partition("?")
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": where,
            "raw_path": where.encode(),
            "root_path": root,
            "query_string": query.encode(),
            "headers": [(b"host", host.encode())],
            "server": ("127.0.0.1", 80),
        }
        await app(scope, receive, send)
        headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        return Answer(sent[0]["status"], headers, b"".join(each.get("body", b"") for each in sent[1:]))

    return asyncio.run(run())


@pytest.fixture
def session() -> Iterator[Session]:
    with bigmachine.start(TestSystem()) as b:
        yield b


async def _home(request: Any) -> PlainTextResponse:
    return PlainTextResponse("home")


def _looks(app: Any, prefix: str, session: Session, root: str = "") -> None:
    """All that the page needs is there, under `prefix` and the server's own `root`."""
    assert json.loads(call(app, f"{root}{prefix}/status.json", root=root).body)["session"]["name"] == session.name
    assert call(app, f"{root}{prefix}/", root=root).status == 200
    assert call(app, f"{root}{prefix}/static/page.js", root=root).status == 200
    assert call(app, f"{root}{prefix}/pprof/threads?debug=1", root=root).status == 200
    assert call(app, f"{root}{prefix}/nothing", root=root).status == 404
    assert call(app, f"{root}{prefix}/status", "POST", root=root).status == 405
    assert "content-security-policy" in call(app, f"{root}{prefix}/status", root=root).headers
    assert call(app, f"{root}{prefix}", root=root).headers["location"].endswith(f"{prefix.rpartition('/')[2]}/")


def test_mounted_in_starlette(session: Session) -> None:
    app = Starlette(routes=[Route("/", _home)])
    assert session.handle_debug(app) is app
    _looks(app, "/debug/bigmachine", session)
    assert call(app, "/").body == b"home"


def test_mounted_in_what_is_mounted(session: Session) -> None:
    inner = session.handle_debug(Starlette(), prefix="/see")
    outer = Starlette(routes=[Mount("/tools", app=inner)])
    _looks(outer, "/tools/see", session)


def test_beside_a_bare_application(session: Session) -> None:
    seen: list[str] = []

    async def bare(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])
        if scope["type"] == "http":
            await PlainTextResponse("mine")(scope, receive, send)

    app = session.handle_debug(bare, prefix="/see/inside")
    assert app is not bare
    _looks(app, "/see/inside", session)
    assert call(app, "/").body == call(app, "/see").body == call(app, "/see/insider").body == b"mine"
    seen.clear()
    for kind in ("lifespan", "websocket"):
        asyncio.run(app({"type": kind, "path": "/ws", "headers": []}, None, None))
    assert seen == ["lifespan", "websocket"]


def test_behind_a_proxy_with_a_path_of_its_own(session: Session) -> None:
    _looks(session.handle_debug(None, prefix="/see"), "/see", session, root="/proxied")


def test_alone(session: Session) -> None:
    app = session.handle_debug(None, prefix="/see")
    _looks(app, "/see", session)
    assert call(app, "/").line == "there is nothing here but the debug page"
    said: list[str] = []

    async def live() -> None:
        kinds = iter(["lifespan.startup", "lifespan.shutdown"])

        async def receive() -> Any:
            return {"type": next(kinds)}

        async def send(message: Any) -> None:
            said.append(message["type"])

        await app({"type": "lifespan"}, receive, send)

    asyncio.run(live())
    assert said == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


def test_two_sessions_side_by_side(session: Session) -> None:
    with bigmachine.start(TestSystem()) as other:
        app = Starlette()
        session.handle_debug(app, "/one")
        other.handle_debug(app, "/two")
        _looks(app, "/one", session)
        _looks(app, "/two", other)


def test_in_what_has_a_method_to_mount(session: Session) -> None:
    """FastAPI, and whatever else has one."""

    class Framework:
        def __init__(self) -> None:
            self.mounted: dict[str, Any] = {}

        def mount(self, path: str, app: Any, name: str | None = None) -> None:
            self.mounted[path] = app

    framework = Framework()
    assert session.handle_debug(framework, "/see") is framework
    (app,) = framework.mounted.values()
    assert call(app, "/see/status", root="/see").status == 200


@pytest.mark.parametrize("prefix", ["", "/", "see", "/see/", "/s?e", "/{id}", "/a b", None])
def test_prefixes_that_are_none(session: Session, prefix: Any) -> None:
    with pytest.raises(
        UsageError, match=re.escape(f"not a prefix for the debug page: {prefix!r}; give a path such as")
    ):
        session.handle_debug(None, prefix)


def test_what_is_no_application(session: Session) -> None:
    with pytest.raises(UsageError, match="not an ASGI application: 7"):
        session.handle_debug(7)


def test_it_outlives_the_session() -> None:
    """The program's server goes on: it shows how things were at the end, and asks nobody."""
    before = serving()
    with bigmachine.start(TestSystem()) as b:
        machine = b.start(1, {"Echo": Echo()})[0]
        machine.call("Echo.echo", 1)
        app = b.handle_debug(None, prefix="/see")
        assert json.loads(call(app, "/see/status.json").body)["session"]["ended"] is None
    after = json.loads(call(app, "/see/status.json").body)
    assert after["session"]["ended"] is not None
    assert after["counts"] == {str(State.STOPPED): 1}
    assert call(app, "/see/logs?follow=1").status == 200
    assert call(app, "/see/pprof/threads").line == "the session has ended: there is nobody to ask any more"
    assert serving() <= before
