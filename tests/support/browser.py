"""A headless Chromium driven over the WebDriver protocol, which is JSON over HTTP: no library is needed.

with Browser.start(profile_folder) as browser:
    browser.open(path.as_uri())
    assert browser.run("return document.title") == "..."
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
)
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # key of an element's id in the protocol
WITHOUT_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def missing() -> str | None:
    """Why there is no browser to be tested with; None where there is."""
    if shutil.which("chromedriver") is None:
        return "no chromedriver (Debian: apt-get install chromium chromium-driver)"
    return None if _chromium() else "no chromium (Debian: apt-get install chromium chromium-driver)"


def _chromium() -> str | None:
    return next((found for name in CHROMIUMS if (found := shutil.which(name))), None)


@dataclass
class Browser:
    session: str  # its address

    @classmethod
    @contextlib.contextmanager
    def start(cls, profile: Path, width: int = 1280, height: int = 1000) -> Iterator[Browser]:
        """profile: an empty folder, which holds all that the browser writes."""
        arguments = [*ARGUMENTS, f"--user-data-dir={profile}", f"--window-size={width},{height}"]
        options = {"binary": _chromium(), "args": arguments}
        driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        try:
            assert driver.stdout is not None
            said = (re.search(rb"started successfully on port (\d+)", line) for line in driver.stdout)
            port = int(next(found for found in said if found)[1])
            address = f"http://127.0.0.1:{port}/session"
            wanted = {"capabilities": {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": options}}}
            browser = cls(f"{address}/{_ask('POST', address, wanted)['sessionId']}")
            try:
                yield browser
            finally:
                _ask("DELETE", browser.session)
        finally:
            driver.terminate()
            driver.communicate()

    def open(self, url: str) -> None:
        _ask("POST", f"{self.session}/url", {"url": "about:blank"})  # a change of the fragment alone loads nothing
        _ask("POST", f"{self.session}/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """What the body of a function returns."""
        return _ask("POST", f"{self.session}/execute/sync", {"script": script, "args": list(arguments)})

    def until(self, expression: str, *arguments: Any, seconds: float = 20) -> Any:
        """The value of `expression` as soon as it is true."""
        end = time.monotonic() + seconds
        while not (value := self.run(f"return {expression}", *arguments)):
            assert time.monotonic() < end, f"{expression} stayed {value!r}"
            time.sleep(0.02)
        return value

    def click(self, selector: str) -> None:
        _ask("POST", f"{self.session}/element/{self._element(selector)}/click", {})

    def type(self, selector: str, keys: str) -> None:
        _ask("POST", f"{self.session}/element/{self._element(selector)}/value", {"text": keys})

    def hover(self, selector: str) -> None:
        to = {"type": "pointerMove", "duration": 0, "x": 0, "y": 0, "origin": {ELEMENT: self._element(selector)}}
        _ask("POST", f"{self.session}/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": [to]}]})

    def resize(self, width: int, height: int) -> None:
        _ask("POST", f"{self.session}/window/rect", {"width": width, "height": height})

    def screenshot(self) -> bytes:
        return base64.b64decode(_ask("GET", f"{self.session}/screenshot"))

    def _element(self, selector: str) -> str:
        found = _ask("POST", f"{self.session}/element", {"using": "css selector", "value": selector})
        return str(found[ELEMENT])


def _ask(method: str, address: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"}, method=method)
    try:
        with WITHOUT_PROXY.open(request, timeout=60) as response:
            return json.load(response)["value"]
    except urllib.error.HTTPError as error:
        with error:
            raise AssertionError(f"{method} {address}: {json.load(error)['value']['message']}") from None
