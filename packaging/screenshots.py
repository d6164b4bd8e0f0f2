"""Make the pictures in README.md, of a real session in a real browser:

    python packaging/screenshots.py          # → docs/status.png, docs/phone.png, docs/flame.png

It takes playwright and Debian's Chromium, as the tests of the page do.
"""

from __future__ import annotations

import random
import re
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import bigmachine
from bigmachine import driver
from bigmachine.inside import server
from bigmachine.machine import Machine

if TYPE_CHECKING:
    from playwright.sync_api import Browser

DOCS = Path(__file__).parents[1] / "docs"
CHROMIUM = "/usr/bin/chromium"
FOR = 24.0
"""Seconds of work before the first picture: lines of figures want some."""

WORDS = ["flame", "graph", "machine", "session", "driver", "service", "worker", "supervisor", "keepalive", "profile"]


class Texts:
    """Something to do that has parts: words of texts are counted."""

    @bigmachine.parallel
    def count(self, seed: int, lines: int) -> int:
        """How often the most frequent word occurs in that many lines."""
        chance = random.Random(seed)
        tally: Counter[str] = Counter()
        for number in range(lines):
            tally.update(tokens(line(chance)))
            if number % 20_000 == 0:
                print(f"{number} of {lines} lines, {len(tally)} different words", flush=True)
        return max(tally.values(), default=0)

    def spelling(self, word: str) -> str:
        """The nearest word that we know."""
        time.sleep(0.002)
        return min(WORDS, key=lambda known: distance(known, word))


def line(chance: random.Random) -> str:
    return " ".join(chance.choice(WORDS) for _ in range(12)) + "."


def tokens(text: str) -> list[str]:
    return [stem(word) for word in re.findall(r"\w+", text.lower())]


def stem(word: str) -> str:
    return re.sub(r"(ion|ing|er|s)$", "", word)


def distance(one: str, two: str) -> int:
    row = list(range(len(two) + 1))
    for i, a in enumerate(one, 1):
        previous, row[0] = row[0], i
        for j, b in enumerate(two, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (a != b))
    return row[-1]


def main() -> None:
    with driver.start(system="local", http="off") as b:
        machines = b.start(6, {"Texts": Texts()})
        debug = server.start(b, "localhost:3333")
        assert debug is not None
        b.at_end(debug.close)
        for machine in machines:
            machine.wait()
        photograph(debug.address, machines)


def work(machines: Sequence[Machine], seconds: float) -> None:
    """Keep all but the last busy, each with as much as suits it."""
    until = time.monotonic() + seconds
    calls = [machine.submit("Texts.count", index, 40_000 * (index + 1)) for index, machine in enumerate(machines[:-1])]
    while time.monotonic() < until:
        machines[-1].call("Texts.spelling", "supervizor")
        for index, call in enumerate(calls):
            if call.done():
                calls[index] = machines[index].submit("Texts.count", index, 40_000 * (index + 1))


def photograph(address: str, machines: Sequence[Machine]) -> None:
    from playwright.sync_api import sync_playwright  # Machines run this program, too, and have none.

    DOCS.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_context(viewport={"width": 1180, "height": 510}).new_page()
        page.goto(address)
        for _ in range(int(FOR)):
            work(machines, 1.0)
            page.wait_for_timeout(1)  # Lets the page ask.
        page.screenshot(path=DOCS / "status.png")
        phone(browser, address, machines[1], DOCS / "phone.png")
        page.set_viewport_size({"width": 1180, "height": 560})
        page.keyboard.press("5")
        page.locator("input[name=seconds]").fill("4")
        page.get_by_role("button", name="Take").click()
        work(machines, 6.0)
        page.locator(".result h2").wait_for()
        page.get_by_role("treeitem", name=re.compile("^Texts.count")).first.wait_for()
        page.screenshot(path=DOCS / "flame.png")
        browser.close()


def phone(browser: Browser, address: str, machine: Machine, file: Path) -> None:
    """The details of a machine, in the dark."""
    page = browser.new_context(viewport={"width": 380, "height": 700}, color_scheme="dark").new_page()
    page.goto(f"{address}#machines/{machine.id}")
    page.locator(".sheet .boot li").first.wait_for()
    page.locator(".sheet td.method").first.wait_for()
    page.screenshot(path=file)
    page.context.close()


if __name__ == "__main__":
    main()
