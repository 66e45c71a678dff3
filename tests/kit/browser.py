"""Headless Chromium through its driver's WebDriver protocol: what a page draws, says and looks like."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import system_packages

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


class Browser:
    """One window."""

    def __init__(self, address: str, session: str) -> None:
        self.address, self.session = address, session

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.address}/session/{self.session}{path}", data, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"]) from None

    def open(self, path: Path) -> None:
        self.call("POST", "/url", {"url": path.as_uri()})

    def run(self, script: str, *arguments: Any) -> Any:
        """The value that ``script`` returns."""
        return self.call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def _element(self, css: str) -> dict[str, str]:
        found: dict[str, str] = self.call("POST", "/element", {"using": "css selector", "value": css})
        return found

    def point_at(self, css: str, x: int = 0, y: int = 0) -> None:
        """Moves the mouse to an element's middle, and so many pixels from there."""
        move = {"type": "pointerMove", "duration": 0, "x": x, "y": y, "origin": self._element(css)}
        self.call("POST", "/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": [move]}]})

    def click(self, css: str) -> None:
        self.call("POST", f"/element/{self._element(css)[ELEMENT]}/click", {})

    def messages(self) -> list[dict[str, Any]]:
        """What the console says, errors of the page among it."""
        found: list[dict[str, Any]] = self.call("POST", "/se/log", {"type": "browser"})
        return found

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("GET", "/screenshot")))


@contextlib.contextmanager
def browser(width: int = 1280, height: int = 1400) -> Iterator[Browser]:
    """Starts Chromium with its driver, and ends them."""
    driver = system_packages.program("chromedriver", "chromium-driver")
    chromium = system_packages.program("chromium", "chromium")
    with tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True) as profile:
        environment = {**os.environ, "HOME": profile}
        said = Path(profile, "chromedriver.txt")
        with said.open("wb") as file:
            process = subprocess.Popen([driver, "--port=0"], stdout=file, stderr=subprocess.STDOUT, env=environment)
        try:
            deadline = time.monotonic() + 120
            while not (port := re.search(r"successfully on port (\d+)", said.read_text())):
                assert process.poll() is None, said.read_text()
                assert time.monotonic() < deadline, "chromedriver did not start within 120 s"
                time.sleep(0.1)
            address = f"http://127.0.0.1:{port[1]}"
            arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
                         f"--window-size={width},{height}", f"--user-data-dir={profile}/profile"]  # fmt: skip
            wanted = {
                "browserName": "chrome",
                "goog:loggingPrefs": {"browser": "ALL"},
                "goog:chromeOptions": {"binary": chromium, "args": arguments},
            }
            body = json.dumps({"capabilities": {"alwaysMatch": wanted}}).encode()
            with urllib.request.urlopen(urllib.request.Request(f"{address}/session", body), timeout=120) as answer:
                session = json.load(answer)["value"]["sessionId"]
            window = Browser(address, session)
            try:
                yield window
            finally:
                window.call("DELETE", "")
        finally:
            process.terminate()
            process.wait(20)
