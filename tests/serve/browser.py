"""A real browser in front of a real server, and what a person does there."""

import json
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from benchmarks.serving.servers import free_port
from playwright.sync_api import Browser, BrowserContext, Page, Route, ViewportSize, expect, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium")
PATIENCE_MS = 20_000
EVENT = "data: {}\n\n"
expect.set_options(timeout=PATIENCE_MS)


@contextmanager
def server(key: str = "") -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Its address and its process."""
    port = free_port()
    command = [sys.executable, "-m", "tests.serve.browser_server", str(port), *([key] if key else [])]
    process = subprocess.Popen(command, cwd=ROOT)
    address = f"http://127.0.0.1:{port}/"
    try:
        deadline = time.monotonic() + 60
        while not answers(f"{address}health"):
            assert process.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "the server did not come up"
            time.sleep(0.05)
        yield address, process
    finally:
        process.kill()
        process.wait()


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@contextmanager
def chromium() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("needs Debian's chromium (apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Person:
    """One visitor with a browser profile of their own, who notes what goes wrong on the page."""

    def __init__(self, context: BrowserContext, address: str) -> None:
        self.context, self.address = context, address
        self.page = context.new_page()
        self.faults: list[str] = []
        self.foreign: list[str] = []
        self.page.on("pageerror", lambda fault: self.faults.append(str(fault)))
        self.page.on("dialog", lambda dialog: (self.faults.append(f"dialog {dialog.message}"), dialog.dismiss()))
        self.page.on("console", lambda line: self.note(line.text))
        self.page.on("request", lambda request: self.foreign.append(request.url) if self.is_foreign(request.url) else 0)

    def note(self, line: str) -> None:
        if "Content Security Policy" in line:
            self.faults.append(line)

    def is_foreign(self, url: str) -> bool:
        return not url.startswith(self.address)

    def come(self, model: str = "quick") -> Page:
        self.page.goto(self.address)
        expect(self.page.locator("#model")).to_be_enabled()
        self.page.select_option("#model", model)
        return self.page

    def say(self, text: str, *, wait: bool = True) -> None:
        self.page.locator("#input").fill(text)
        self.page.locator("#input").press("Enter")
        if wait:
            self.settled()

    def settled(self) -> None:
        """Until every answer has ended."""
        expect(self.page.locator(".turn:last-child .answer").first).to_be_visible()
        expect(self.page.locator(".answer[aria-busy]")).to_have_count(0)

    def answers(self) -> list[str]:
        return self.page.locator(".answer .prose").all_inner_texts()

    def asked(self, prompts: list[str]) -> None:
        """What the conversation has of the person."""
        expect(self.page.locator(".bubble")).to_have_text(prompts)

    def requests_of(self, act: Callable[[], None]) -> list[dict[str, Any]]:
        """Bodies of the chats that are asked for meanwhile."""
        seen: list[dict[str, Any]] = []

        def look(route: Route) -> None:
            seen.append(json.loads(route.request.post_data or "null"))
            route.continue_()

        self.page.route("**/v1/chat/completions", look)
        act()
        self.page.unroute("**/v1/chat/completions")
        return seen

    def next_reply(self, status: int, body: str, headers: dict[str, str] | None = None) -> None:
        """What the server would say to the next chat only."""
        kind = "text/event-stream" if status == 200 else "application/json"
        self.page.route(
            "**/v1/chat/completions",
            lambda route: route.fulfill(status=status, body=body, content_type=kind, headers=headers or {}),
            times=1,
        )


def pieces(*texts: str) -> str:
    """The beginning of a stream."""
    return "".join(EVENT.format(json.dumps({"choices": [{"index": 0, "delta": {"content": text}}]})) for text in texts)


def error(message: str, code: str = "") -> str:
    return json.dumps({"error": {"message": message, "type": "x", "param": None, "code": code or None}})


DONE = EVENT.format('{"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}') + EVENT.format("[DONE]")
PHONE: ViewportSize = {"width": 360, "height": 740}
WIDE: ViewportSize = {"width": 1280, "height": 860}


@contextmanager
def visit(browser: Browser, address: str, **options: Any) -> Iterator[Person]:
    """A visitor, whose page must have had no fault and asked nobody else for anything."""
    context = browser.new_context(**({"viewport": WIDE} | options))
    context.set_default_timeout(PATIENCE_MS)
    person = Person(context, address)
    yield person
    context.close()
    assert not person.faults
    assert not person.foreign


def stats_of(person: Person) -> re.Match[str] | None:
    text = person.page.locator(".stats").last.inner_text()
    return re.fullmatch(r"(\d+) tokens? · ([\d.]+) tokens/s · first after [\d.]+ m?s", text)
