"""The debug page as a user sees it: in Chromium, of real sessions whose machines come, work, fail and go.

Everywhere, the page must not complain (no error in the console), and must ask nobody but this host.
"""

from __future__ import annotations

import gzip
import importlib.resources
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pytest
import uvicorn
from hosts.browser import PROGRAM, unavailable
from playwright.sync_api import Browser, Locator, Page, Route, expect, sync_playwright

import bigmachine
from bigmachine.inside import monitor, server
from bigmachine.machine import Machine
from bigmachine.session import Session
from bigmachine.testing import TestSystem
from bigmachine.testing.conformance import eventually

browser_needed = [pytest.mark.slow, pytest.mark.skipif(bool(unavailable()), reason=unavailable())]

SCRIPT = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script>"
"""What a page that took a text for markup would show."""

SOON = 60.0
"""Seconds after which what should have happened will not: two browsers beside other work on two cores are slow."""

TICK = 0.2
"""Seconds between two documents, in here: so that nothing waits for long."""


class Busy:
    """A service that has something to do."""

    def spin(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            burn()

    def nap(self, seconds: float) -> None:
        time.sleep(seconds)

    def say(self, text: str) -> None:
        print(text, flush=True)

    def die_when_watched(self) -> None:
        while "bigmachine-sampler" not in [thread.name for thread in threading.enumerate()]:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    def fail(self) -> None:
        raise ValueError("it cannot be")


class Reluctant:
    """A service that is never set up."""

    def setup(self, b: Session) -> None:
        raise RuntimeError(f"there is no disk {SCRIPT}")


def burn() -> int:
    return sum(range(2000))


@dataclass
class Look:
    """A page under test, and what must not have happened on it."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    asked: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.page.on("console", lambda said: self.complaints.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.asked.add(str(urlsplit(request.url).hostname)))

    def check(self) -> None:
        assert self.complaints == []
        assert self.asked <= {"localhost", "127.0.0.1", "None"}  # None: of what the page itself has made, to be saved.


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=PROGRAM, args=["--no-sandbox"])


Open = Callable[..., Page]


@pytest.fixture
def looks(browser: Browser) -> Iterator[list[Look]]:
    opened: list[Look] = []
    yield opened
    for look in opened:
        look.check()
        look.page.context.close()


@pytest.fixture
def look(browser: Browser, looks: list[Look], monkeypatch: pytest.MonkeyPatch) -> Open:
    """Opens the page of a session; further arguments are Chromium's (``viewport``, ``color_scheme``)."""
    monkeypatch.setattr(monitor, "INTERVAL", TICK)
    expect.set_options(timeout=1000 * SOON)

    def opened(session: Session, fragment: str = "", **how: Any) -> Page:
        debug = server.start(session, "localhost:0")
        assert debug is not None
        session.at_end(debug.close)
        page = browser.new_context(**how).new_page()
        page.set_default_timeout(1000 * SOON)
        looks.append(Look(page))
        page.goto(debug.address + fragment)
        return page

    return opened


@pytest.fixture
def system() -> TestSystem:
    return TestSystem()


@pytest.fixture
def session(system: TestSystem) -> Iterator[Session]:
    with bigmachine.start(system) as b:
        yield b


@pytest.fixture
def local() -> Iterator[tuple[Session, Machine, Machine]]:
    """Two machines that are processes of their own; they share nothing with the driver."""
    with bigmachine.start("local", http="off") as b:
        one, two = b.start(2, {"Busy": Busy()})
        for machine in (one, two):
            machine.wait(timeout=SOON)
        yield b, one, two


def row(page: Page, machine: Machine) -> Locator:
    return page.locator("#view-machines table[aria-label=machines] tbody tr").filter(has_text=machine.id)


# -- Machines ------------------------------------------------------------------------------------------------------------


class TestMachines:
    pytestmark = browser_needed

    def test_they_come_and_fail(self, look: Open, session: Session, system: TestSystem) -> None:
        page = look(session)
        expect(page.get_by_text("no machine has been started yet")).to_be_visible()

        one, two = session.start(2, {"Busy": Busy()})
        for machine in (one, two):
            expect(row(page, machine).locator(".badge")).to_have_text("RUNNING")
            expect(row(page, machine)).to_contain_text(machine.addr.split("/")[2])
        expect(page.locator("#counts")).to_have_text("2 running")
        expect(page).to_have_title(re.compile("2 running"))

        system.kill(one)
        expect(row(page, one).locator(".badge")).to_have_text("STOPPED")
        assert one.error is not None
        expect(row(page, one).locator("td.now")).to_contain_text(str(one.error).splitlines()[0])
        expect(page.locator("#counts")).to_have_text("1 running1 stopped")
        expect(row(page, two).locator(".badge")).to_have_text("RUNNING")

    def test_one_that_cannot_start_says_at_which_step_and_why(self, look: Open, session: Session) -> None:
        (machine,) = session.start(1, {"Reluctant": Reluctant()})
        page = look(session)
        expect(row(page, machine).locator("td.now")).to_contain_text("there is no disk <img")

        row(page, machine).click()
        sheet = page.get_by_role("complementary", name="machine")
        expect(sheet.locator(".warnings")).to_contain_text("RuntimeError")
        expect(sheet.locator(".boot li.failed .name")).to_have_text("setup")
        expect(sheet.locator(".boot li .name").first).to_have_text(machine.timeline[0].name)
        expect(sheet.get_by_role("button", name="CPU profile")).to_be_disabled()
        assert page.title() != "broken"
        assert page.locator("img").count() == 0

    def test_what_a_machine_does_now_and_has_done(self, look: Open, session: Session) -> None:
        (machine,) = session.start(1, {"Busy": Busy()})
        with pytest.raises(ValueError, match="cannot be"):
            machine.call("Busy.fail")
        nap = machine.submit("Busy.nap", SOON)
        page = look(session)
        expect(row(page, machine).locator("td.now")).to_contain_text("Busy.nap")

        page.keyboard.press("2")
        failed = page.locator("#view-methods tbody tr").filter(has_text="Busy.fail")
        expect(failed.locator("td.count").first).to_have_text("1")
        expect(failed.locator("td.errors").first).to_have_text("1")
        expect(failed.locator("td.p99").last).to_have_text(re.compile(r"\d (µs|ms|s)"))
        nap.cancel()

    def test_with_the_keyboard_alone(self, look: Open, session: Session) -> None:
        machines = session.start(3, {"Busy": Busy()})
        page = look(session)
        expect(page.locator("#view-machines tr.opens")).to_have_count(3)

        page.keyboard.press("j")
        expect(row(page, machines[0])).to_be_focused()
        page.keyboard.press("ArrowDown")
        page.keyboard.press("j")
        page.keyboard.press("k")
        expect(row(page, machines[1])).to_be_focused()
        page.keyboard.press("Enter")
        sheet = page.get_by_role("complementary", name="machine")
        expect(sheet.get_by_role("heading", name=machines[1].id)).to_be_focused()
        expect(page).to_have_url(re.compile(f"#machines/{machines[1].id}$"))
        page.keyboard.press("Escape")
        expect(sheet).to_be_hidden()
        expect(row(page, machines[1])).to_be_focused()

        page.keyboard.press("/")
        page.keyboard.type(machines[2].id)
        expect(page.locator("#view-machines tr.opens")).to_have_count(1)
        page.keyboard.press("Escape")
        expect(page.locator("#view-machines tr.opens")).to_have_count(3)
        page.keyboard.press("Escape")
        page.keyboard.press("?")
        expect(page.get_by_role("dialog", name="keys")).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.get_by_role("dialog", name="keys")).to_be_hidden()
        for key, name in enumerate(("Machines", "Methods", "Logs", "Events", "Profiles"), 1):
            page.keyboard.press(str(key))
            expect(page.get_by_role("tab", name=name)).to_have_attribute("aria-selected", "true")
            expect(page.get_by_role("tabpanel", name=name)).to_be_visible()

    def test_what_is_wrong_with_one_is_said(self, look: Open, session: Session, system: TestSystem) -> None:
        lent, full = session.start(2, {"Busy": Busy()})
        for machine in (lent, full):
            machine.wait(timeout=SOON)
        page = look(session)
        system.notice(lent)
        expect(row(page, lent).locator("td.now .warn")).to_contain_text("will be taken away")
        full.unhealthy = "memory is 97 % full"
        expect(row(page, full).locator("td.now .bad")).to_have_text("memory is 97 % full")
        saved = {"machine": full.id, "time": time.time(), "reason": "memory", "files": ["/tmp/x/heap.pb.gz"]}
        session.captures.append(saved)

        row(page, full).click()
        warnings = page.get_by_role("complementary", name="machine").locator(".warnings")
        expect(warnings).to_contain_text("/tmp/x/heap.pb.gz")
        page.keyboard.press("Escape")
        page.keyboard.press("4")
        expect(page.get_by_role("table", name="captures")).to_contain_text("/tmp/x/heap.pb.gz")

    def test_what_else_there_is_can_be_had(self, look: Open, session: Session) -> None:
        (machine,) = session.start(1, {"Busy": Busy()})
        machine.wait(timeout=SOON)
        page = look(session)
        links = {link.get_attribute("href") for link in page.locator("footer a").all()}
        assert links == {"status", "logs", "vars", "metrics", "pprof/", "bundle"}
        for link in sorted(links - {"bundle"}):  # That one takes a while, and has tests of its own.
            answer = page.context.request.get(f"{page.url}{link}")
            assert answer.ok, link

    def test_columns_sort(self, look: Open, session: Session) -> None:
        machines = session.start(3, {"Busy": Busy()})
        page = look(session)
        expect(page.locator("#view-machines tr.opens")).to_have_count(3)
        shown = page.locator("#view-machines tr.opens td.machine b")
        ids = sorted(machine.id for machine in machines)

        head = page.get_by_role("button", name="Machine", exact=True)
        head.click()
        expect(shown).to_have_text(ids)
        head.click()
        expect(shown).to_have_text(ids[::-1])
        expect(page.locator("th", has=head)).to_have_attribute("aria-sort", "descending")
        head.click()
        expect(shown).to_have_text([machine.id for machine in machines])

    def test_events_tell_what_happened(self, look: Open, session: Session) -> None:
        (machine,) = session.start(1, {"Busy": Busy()})
        machine.wait(timeout=SOON)
        page = look(session, "#events")
        view = page.locator("#view-events")
        moved = view.locator("tr").filter(has_text="machine.state").filter(has_text="RUNNING")
        expect(moved).to_contain_text(machine.id)

        session.events.emit("call.failed", machine.id, method="Busy.fail", error=SCRIPT)
        expect(view.locator("td.kind.bad").first).to_have_text("call.failed")
        view.get_by_role("searchbox").fill("busy.fail")
        expect(view.locator("tbody tr:visible")).to_have_count(1)
        assert page.title() != "broken"


def many(entry: dict[str, Any], count: int) -> list[dict[str, Any]]:
    history = {name: [(7 * step) % 90 for step in range(90)] for name in ("memory", "cpu", "load", "calls")}
    ids = [f"m-{number:06x}" for number in range(count)]
    return [{**entry, "id": id, "address": f"https://10.0.0.1:443/{id}/", "history": history} for id in ids]


@pytest.mark.slow
@pytest.mark.skipif(bool(unavailable()), reason=unavailable())
def test_of_200_machines_only_what_has_changed_is_drawn_again(look: Open, session: Session) -> None:
    (machine,) = session.start(1, {"Busy": Busy()})
    machine.wait(timeout=SOON)
    tick = 0
    template: dict[str, Any] = {}

    def answer(route: Route) -> None:
        nonlocal tick
        if not template:
            template.update(route.fetch().json())
        tick += 1
        machines = many(template["machines"][0], 200)
        machines[17] = {**machines[17], "unhealthy": f"memory is short, {tick}"}
        value = {**template, "tick": tick, "machines": machines, "counts": {"RUNNING": 200}}
        route.fulfill(json=value, headers={"ETag": f'"{tick}"'})

    page = look(session, "#methods")  # Not yet looking at machines.
    page.context.route("**/status.json", answer)
    page.keyboard.press("1")
    rows = page.locator("#view-machines tr.opens")
    expect(rows).to_have_count(200)
    expect(rows.nth(17)).to_contain_text("memory is short")
    page.evaluate("""() => {
        window.touched = {};
        const seen = (changes) => {
            for (const { target } of changes) {
                const id = target.closest("tr")?.querySelector("b").textContent ?? "none";
                window.touched[id] = (window.touched[id] ?? 0) + 1;
            }
        };
        const all = { subtree: true, childList: true, attributes: true };
        new MutationObserver(seen).observe(document.querySelector("#view-machines tbody"), all);
    }""")
    before = tick
    while tick < before + 4:
        with page.expect_response("**/status.json"):
            pass
    touched = page.evaluate("window.touched")

    assert set(touched) == {"m-000011"}, "rows that say what they said are left alone"
    filtering = page.locator("#view-machines").get_by_role("searchbox")
    filtering.fill("m-0000c7")
    expect(rows).to_have_count(1)
    filtering.fill("memory short")
    expect(rows.locator("td.machine b")).to_have_text(["m-000011"])


# -- Logs ----------------------------------------------------------------------------------------------------------------


def shown(page: Page) -> Locator:
    """Lines of machines: not the session's own, which says where the page is."""
    return page.locator("ol.log li:visible").filter(has_not_text="status at")


class TestLogs:
    pytestmark = browser_needed

    def test_lines_come_and_are_filtered(self, look: Open, local: tuple[Session, Machine, Machine]) -> None:
        b, one, two = local
        one.call("Busy.say", "the first line")
        page = look(b, "#logs")
        lines = shown(page)
        expect(lines).to_have_text([re.compile(rf"{one.id} the first line$")])

        two.call("Busy.say", f"second \x1b[31mred {SCRIPT}")
        expect(lines).to_have_count(2)
        expect(lines.nth(1)).to_contain_text(f"{two.id} second red <img src=x")
        assert page.title() != "broken"

        page.keyboard.press("/")
        page.keyboard.type("FIRST")
        expect(lines).to_have_text([re.compile("the first line")])
        page.keyboard.press("Escape")
        expect(lines).to_have_count(2)
        page.get_by_role("combobox", name="machine").select_option(two.id)
        expect(lines).to_have_text([re.compile("second")])
        one.call("Busy.say", "not to be seen")
        two.call("Busy.say", "third")
        expect(lines).to_have_text([re.compile("second"), re.compile("third")])

    def test_paused_it_stands_still_and_catches_up(self, look: Open, local: tuple[Session, Machine, Machine]) -> None:
        b, one, _ = local
        one.call("Busy.say", "before")
        page = look(b, "#logs")
        lines = shown(page)
        expect(lines).to_have_count(1)
        page.get_by_role("button", name="Pause").click()
        one.call("Busy.say", "meanwhile")
        eventually(lambda: b.logs.last(1)[0].text == "meanwhile", "the line has arrived")
        with page.expect_response("**/status.json"):  # The page lives on.
            expect(lines).to_have_count(1)
        page.get_by_role("button", name="Go on").click()
        expect(lines).to_have_text([re.compile("before"), re.compile("meanwhile")])

    def test_those_of_a_machine_from_its_details(self, look: Open, local: tuple[Session, Machine, Machine]) -> None:
        b, one, two = local
        one.call("Busy.say", "of one")
        two.call("Busy.say", "of two")
        page = look(b, f"#machines/{two.id}")
        page.get_by_role("button", name="Logs of it").click()
        expect(shown(page)).to_have_text([re.compile("of two")])


# -- Profiles ------------------------------------------------------------------------------------------------------------


def take(page: Page, kind: str = "profile") -> None:
    panel = page.locator("#view-profiles")
    panel.locator("select[name=kind]").select_option(kind)
    if kind == "profile":
        panel.locator("input[name=seconds]").fill("0.6")
    panel.get_by_role("button", name="Take").click()
    expect(panel.locator(".result h2")).to_be_visible()
    expect(panel.get_by_role("button", name="Cancel")).to_be_hidden()


def frame(page: Page, name: str) -> Locator:
    return page.get_by_role("treeitem", name=re.compile(rf"^{re.escape(name)}\b")).first


class TestProfiles:
    pytestmark = browser_needed

    def test_what_is_busy_is_wide(self, look: Open, local: tuple[Session, Machine, Machine]) -> None:
        b, one, two = local
        one.submit("Busy.spin", 10 * SOON)
        two.submit("Busy.nap", 10 * SOON)
        page = look(b, "#profiles")
        take(page)

        expect(page.locator(".result h2")).to_contain_text("3 processes")
        whole = frame(page, "all").bounding_box()
        spin = frame(page, "Busy.spin").bounding_box()
        assert whole is not None
        assert spin is not None
        assert spin["width"] > whole["width"] / 2
        told = re.compile(r"test_inside_page\.py:\d+, \d+\.\d %: ")
        expect(frame(page, "burn")).to_have_attribute("aria-label", told)
        expect(page.locator(".result td.function").filter(has_text="burn")).to_be_visible()

        # Without what stands around a call, the method comes first; with it, later.
        expect(frame(page, "Busy.spin")).to_have_attribute("aria-level", "2")
        page.get_by_label("without what is around calls").uncheck()
        expect(frame(page, "Busy.spin")).not_to_have_attribute("aria-level", "2")
        page.get_by_label("without what is around calls").check()

        page.get_by_label("value").select_option("wall")
        expect(frame(page, "Busy.nap")).to_be_visible()
        page.get_by_label("only method").select_option("nap")
        expect(frame(page, "Busy.spin")).to_be_hidden()
        expect(frame(page, "Busy.nap")).to_have_attribute("aria-label", re.compile("100.0 %"))
        page.get_by_label("split by").select_option("machine")
        expect(frame(page, f"machine {two.id}")).to_be_visible()

    def test_walking_and_zooming_with_the_keyboard(self, look: Open, local: tuple[Session, Machine, Machine]) -> None:
        b, one, _ = local
        one.submit("Busy.spin", 10 * SOON)
        page = look(b, "#profiles")
        take(page)
        frame(page, "all").focus()
        page.keyboard.press("ArrowDown")
        expect(frame(page, "Busy.spin")).to_be_focused()
        expect(page.get_by_role("tooltip")).to_contain_text("itself")
        page.keyboard.press("ArrowDown")
        expect(frame(page, "burn")).to_be_focused()

        page.keyboard.press("Enter")
        zoomed, whole = frame(page, "burn").bounding_box(), frame(page, "all").bounding_box()
        assert zoomed is not None
        assert whole is not None
        assert zoomed["width"] == pytest.approx(whole["width"], abs=1)
        expect(frame(page, "burn")).to_be_focused()
        page.keyboard.press("Escape")
        page.keyboard.press("Escape")
        page.keyboard.press("/")
        page.keyboard.type("burn")
        expect(frame(page, "burn")).to_have_attribute("data-found", "yes")
        expect(frame(page, "Busy.spin")).to_have_attribute("data-found", "no")
        expect(page.locator("output.tally")).to_have_text(re.compile(r"\d+\.\d % is in what was found"))

    def test_two_machines_are_compared(self, look: Open, local: tuple[Session, Machine, Machine]) -> None:
        b, one, two = local
        one.submit("Busy.spin", 10 * SOON)
        two.submit("Busy.nap", 10 * SOON)
        page = look(b, "#profiles")
        take(page)
        page.get_by_label("value").select_option("wall")
        page.get_by_label("only machine").select_option(one.addr)
        page.get_by_label("compare with").select_option(f"1 {two.addr}")

        expect(frame(page, "Busy.spin")).to_have_attribute("aria-label", re.compile(r"B 0\.0 %.*−\d+\.\d points in B"))
        expect(frame(page, "Busy.nap")).to_have_attribute("aria-label", re.compile(r"A 0\.0 %.*\+\d+\.\d points in B"))
        red, blue = colour(frame(page, "Busy.nap")), colour(frame(page, "Busy.spin"))
        assert red[0] > red[2]
        assert blue[2] > blue[0]

    def test_who_is_missing_is_said(self, look: Open, local: tuple[Session, Machine, Machine]) -> None:
        b, one, two = local
        spinning, dying = one.submit("Busy.spin", 10 * SOON), two.submit("Busy.die_when_watched")
        page = look(b, "#profiles")
        take(page)
        with pytest.raises(bigmachine.errors.Unreachable):
            dying.result(SOON)
        expect(page.locator(".missing")).to_contain_text(re.compile(rf"missing: {re.escape(two.addr)} 0 \(.*SIGKILL"))
        expect(frame(page, "Busy.spin")).to_be_visible()
        spinning.cancel()

    def test_what_is_shown_can_be_had_for_pprof(self, look: Open, local: tuple[Session, Machine, Machine]) -> None:
        b, _, _ = local
        page = look(b, "#profiles")
        take(page, "threads")
        with page.expect_download() as started:
            page.get_by_role("link", name="Download").click()
        assert re.fullmatch(r"threads-\d{6}\.pb\.gz", started.value.suggested_filename)
        assert b"threads" in gzip.decompress(started.value.path().read_bytes())
        expect(page.locator(".take code")).to_have_text(
            f"go tool pprof -http=: '{page.url.split('#')[0]}pprof/threads'"
        )

    def test_of_one_machine_from_its_details(self, look: Open, local: tuple[Session, Machine, Machine]) -> None:
        b, one, _ = local
        page = look(b, f"#machines/{one.id}")
        page.get_by_role("button", name="Stacks").click()
        expect(page.locator(".result h2")).to_contain_text("1 process")
        expect(page.locator("select[name=machine]")).to_have_value(one.id)

    def test_what_cannot_be_is_said(self, look: Open, looks: list[Look], session: Session) -> None:
        page = look(session, "#profiles")
        page.locator("form.take").evaluate("form => form.noValidate = true")
        page.get_by_label("seconds").fill("-1")
        page.get_by_role("button", name="Take").click()
        expect(page.get_by_role("status").filter(has_text="seconds")).to_contain_text("-1")
        (complaint,) = looks[0].complaints
        assert "400" in complaint
        looks[0].complaints.clear()

    def test_a_profile_can_be_cancelled(self, look: Open, session: Session) -> None:
        page = look(session, "#profiles")
        page.get_by_label("seconds").fill("3000")
        page.get_by_role("button", name="Take").click()
        expect(page.get_by_role("status").filter(has_text="s to go")).to_be_visible()
        page.get_by_role("button", name="Cancel").click()
        expect(page.get_by_role("status").filter(has_text="cancelled")).to_be_visible()


# -- How it looks --------------------------------------------------------------------------------------------------------


def colour(element: Locator, which: str = "backgroundColor") -> tuple[float, ...]:
    text = element.evaluate(f"node => getComputedStyle(node).{which}")
    return tuple(float(each) for each in re.findall(r"[\d.]+", text)[:3])


def contrast(one: tuple[float, ...], two: tuple[float, ...]) -> float:
    """As WCAG defines it."""

    def luminance(rgb: tuple[float, ...]) -> float:
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (each / 255 for each in rgb)]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    light, dark = sorted((luminance(one), luminance(two)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


class TestLooks:
    pytestmark = browser_needed

    @pytest.mark.parametrize("view", ["machines", "methods", "logs", "events", "profiles"])
    def test_a_phone_scrolls_only_downwards(self, look: Open, session: Session, view: str) -> None:
        (machine,) = session.start(1, {"Busy": Busy()})
        machine.call("Busy.nap", 0.0)
        session.events.emit("call.failed", machine.id, error="no_way_to_break_this_line_" * 20)
        session.say("no_way_to_break_this_line_" * 20)
        page = look(session, f"#{view}", viewport={"width": 360, "height": 740})
        if view == "profiles":
            take(page, "threads")
        elif view == "logs":
            expect(page.locator("ol.log li").first).to_be_visible()
        else:
            expect(page.locator(f"#view-{view} tbody tr").first).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        if view == "machines":
            row(page, machine).click()
            expect(page.get_by_role("complementary", name="machine").locator(".boot li").first).to_be_visible()
            assert page.evaluate("document.querySelector('.sheet').scrollWidth") <= 360

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_it_can_be_read(self, look: Open, session: Session, scheme: str) -> None:
        session.start(1, {"Busy": Busy()})
        page = look(session, "#profiles", color_scheme=scheme)
        take(page, "threads")
        back = colour(page.locator("body"))
        assert (sum(back) < 380) == (scheme == "dark")
        page.evaluate("document.body.append(Object.assign(document.createElement('p'), {id: 'probe'}))")
        probe = page.locator("#probe")
        paint = "(node, [ink, paper]) => Object.assign(node.style, {color: ink, background: paper})"
        inks = [f"var(--{name})" for name in ("text", "soft", "link", "bad", "warn", "good")]
        papers = ["var(--back)", "var(--panel)"]
        for paper in papers:
            for ink in inks:
                probe.evaluate(paint, [ink, paper])
                assert contrast(colour(probe, "color"), colour(probe)) >= 4.5, (ink, paper)
            for hue in range(12):
                probe.evaluate("(node, hue) => Object.assign(node, {className: hue}).style.color = ''", f"hue{hue}")
                assert contrast(colour(probe, "color"), colour(probe)) >= 4.5, (hue, paper)
        for each in page.get_by_role("treeitem").all()[:40]:
            assert contrast(colour(each, "color"), colour(each)) >= 4.5

    def test_a_driver_that_is_gone_is_missed_and_found_again(
        self, look: Open, looks: list[Look], session: Session
    ) -> None:
        (machine,) = session.start(1, {"Busy": Busy()})
        page = look(session)
        expect(row(page, machine)).to_be_visible()
        expect(page.locator("#live")).to_have_text("live")

        page.context.set_offline(True)
        expect(page.get_by_role("alert")).to_contain_text("connection lost")
        expect(row(page, machine)).to_be_visible()
        page.context.set_offline(False)
        expect(page.get_by_role("alert")).to_be_hidden()
        expect(page.locator("#live")).to_have_text("live")
        assert all("ERR_INTERNET_DISCONNECTED" in each for each in looks[0].complaints)
        looks[0].complaints.clear()

    def test_under_another_prefix_in_another_application(
        self, browser: Browser, looks: list[Look], session: Session
    ) -> None:
        (machine,) = session.start(1, {"Busy": Busy()})
        app = session.handle_debug(prefix="/ops/one")
        config = uvicorn.Config(app, log_config=None, lifespan="off", ws="none", http="h11")
        serving = uvicorn.Server(config)
        with socket.create_server(("127.0.0.1", 0)) as sock:
            thread = threading.Thread(target=serving.run, args=([sock],))
            thread.start()
            try:
                page = browser.new_context().new_page()
                page.set_default_timeout(1000 * SOON)
                looks.append(Look(page))
                page.goto(f"http://127.0.0.1:{sock.getsockname()[1]}/ops/one/#profiles")
                take(page, "threads")
                expect(page.locator(".take code")).to_contain_text("/ops/one/pprof/threads")
                page.keyboard.press("1")
                expect(row(page, machine)).to_be_visible()
                page.goto("about:blank")
            finally:
                serving.should_exit = True
                thread.join()

    def test_another_run_at_the_same_address_takes_its_place(
        self, look: Open, looks: list[Look], session: Session
    ) -> None:
        (machine,) = session.start(1, {"Busy": Busy()})
        page = look(session)
        expect(row(page, machine)).to_be_visible()
        page.evaluate("window.stayed = true")
        session.shutdown()
        expect(page.get_by_role("alert")).to_be_visible()

        with bigmachine.start(TestSystem()) as b:
            debug = server.start(b, urlsplit(page.url).netloc)
            assert debug is not None
            b.at_end(debug.close)
            (other,) = b.start(1, {"Busy": Busy()})
            expect(row(page, other)).to_be_visible()
            expect(row(page, machine)).to_have_count(0)
            expect(page.get_by_role("alert")).to_be_hidden()
            page.keyboard.press("4")
            expect(page.locator("#view-events tbody tr").filter(has_text=other.id).first).to_be_visible()
            expect(page.locator("#view-events tbody tr").filter(has_text=machine.id)).to_have_count(0)
            assert page.evaluate("window.stayed")
            page.goto("about:blank")  # The page would miss this one, too.
        looks[0].complaints = [each for each in looks[0].complaints if "ERR_" not in each]


# -- Its files -----------------------------------------------------------------------------------------------------------


MARKUP = ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(")
ABSOLUTE = ("http://", "https://", 'href="/', 'src="/')


def test_nothing_becomes_markup_and_everything_is_relative() -> None:
    files = importlib.resources.files("bigmachine.inside") / "page"
    names = [file.name for file in files.iterdir()]
    assert {"index.html", "page.css", "page.js", "flame.js", "icon.svg"} <= set(names)
    for file in files.iterdir():
        text = file.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
        for bad in MARKUP + ABSOLUTE:
            assert bad not in text, (file.name, bad)
    page = (files / "index.html").read_text("utf-8")
    assert not re.search(r"<script(?![^>]* src=)|<style|\sstyle=|\son\w+=", page), "the content policy forbids it"
