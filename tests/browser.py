"""A headless Chromium for tests of pages, driven through the DevTools protocol over two pipes: no package is needed.

    with Browser() as browser:
        page = browser.open(folder / "index.html", width=390, height=844)
        page.press("ArrowLeft")
        assert page.evaluate("document.title") == "..."
        page.screenshot(folder / "phone.png")
        assert not page.errors and page.requests == [page.address]

A machine without a browser skips these tests and says so (`needs_browser`); with ADVGRPO_BROWSER=required they fail
instead. Debian: `apt-get install chromium`. `python -m tests.browser PAGE OUT.png [WIDTH HEIGHT]` takes a picture of a
whole page.
"""

from __future__ import annotations

import base64
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome-headless-shell")
_SECONDS = 60.0  # for any one answer of the browser: the machine may be busy
# Chromium reads its commands from descriptor 3 and answers on 4.
_TAKE_PIPES = """
import fcntl, os, sys
high = [fcntl.fcntl(int(each), fcntl.F_DUPFD, 10) for each in sys.argv[1:3]]  # either may be 3 or 4 already
os.dup2(high[0], 3)
os.dup2(high[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
_SWITCHES = (
    "--headless", "--remote-debugging-pipe", "--no-first-run", "--no-default-browser-check", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-extensions", "--disable-sync",
    "--disable-gpu", "--disable-dev-shm-usage", "--mute-audio", "--lang=en",
)  # fmt: skip
_KEYS = {  # key -> (code, Windows key code, text)
    "ArrowLeft": ("ArrowLeft", 37, ""), "ArrowUp": ("ArrowUp", 38, ""), "ArrowRight": ("ArrowRight", 39, ""),
    "ArrowDown": ("ArrowDown", 40, ""), "Enter": ("Enter", 13, "\r"), "Escape": ("Escape", 27, ""),
    "Tab": ("Tab", 9, ""), "Backspace": ("Backspace", 8, ""), "Home": ("Home", 36, ""), "End": ("End", 35, ""),
    " ": ("Space", 32, " "),
}  # fmt: skip


def find_browser() -> str | None:
    """The program, or None where none is installed."""
    return next((found for name in _NAMES if (found := shutil.which(name))), None)


needs_browser = pytest.mark.skipif(
    find_browser() is None and os.environ.get("ADVGRPO_BROWSER") != "required",
    reason=f"no browser is installed (looked for {', '.join(_NAMES)}): apt-get install chromium",
)


class Page:
    """One tab.

    Attributes:
        address: what was opened.
        errors: uncaught exceptions of scripts and messages of level error, as text; [] is what a test wants.
        requests: addresses that were asked for since it was opened, but for data: and blob: ones.
    """

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session
        self.address, self.errors, self.requests = "", [], []

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the protocol on this tab."""
        return self._browser.call(method, self._session, **parameters)

    def go(self, address: str | Path) -> None:
        """Open a file or a URL and wait until it has loaded."""
        self.address = address.resolve().as_uri() if isinstance(address, Path) else address
        self.errors, self.requests = [], []
        failed = self._loading("Page.navigate", url=self.address).get("errorText")
        assert not failed, f"{self.address}: {failed}"

    def reload(self) -> None:
        self._loading("Page.reload")

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression; a promise is awaited. AssertionError for an exception in it."""
        options = {"returnByValue": True, "awaitPromise": True, "userGesture": True}
        found = self.call("Runtime.evaluate", expression=script, **options)
        assert "exceptionDetails" not in found, f"{script}: {_described(found['exceptionDetails'])}"
        return found["result"].get("value")

    def wait(self, script: str, seconds: float = _SECONDS) -> Any:
        """The first truthy value of the expression."""
        ends = time.monotonic() + seconds
        while not (value := self.evaluate(script)):
            assert time.monotonic() < ends, f"{script} is still {value!r} after {seconds:g} s"
            time.sleep(0.05)
        return value

    def press(self, key: str, *, shift: bool = False) -> None:
        """A key, down and up: a character or a name of KeyboardEvent.key, such as "ArrowLeft" or "Tab"."""
        code, number, text = _KEYS.get(key, ("", ord(key[0].upper()), key))
        event = {"key": key, "code": code, "windowsVirtualKeyCode": number, "modifiers": 8 * shift}
        self.call("Input.dispatchKeyEvent", type="keyDown", **event, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def type(self, text: str) -> None:
        """Into what has the focus."""
        self.call("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        """A real click into the middle of the first element that matches, scrolled into view."""
        middle = (
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); "
            "e.scrollIntoView({block: 'center', behavior: 'instant'}); "
            "const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2] })()"
        )
        x, y = self.evaluate(middle)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def resize(self, width: int, height: int) -> None:
        """The viewport in CSS pixels; as a phone (touch, viewport tag honoured) below 600."""
        phone = width < 600
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)

    def prefer(self, **features: str) -> None:
        """Media features, such as color_scheme="dark", reduced_motion="reduce"."""
        wanted = [{"name": f"prefers-{name.replace('_', '-')}", "value": value} for name, value in features.items()]
        self.call("Emulation.setEmulatedMedia", features=wanted)

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """PNG of what is seen, or of the whole page."""
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole, **self._clip(whole))
        path.write_bytes(base64.b64decode(found["data"]))

    def close(self) -> None:
        self.call("Page.close")

    def _clip(self, whole: bool) -> dict[str, Any]:
        size = self.call("Page.getLayoutMetrics")["cssContentSize"] if whole else None
        return {"clip": {**size, "scale": 1}} if size else {}

    def _loading(self, method: str, **parameters: Any) -> dict[str, Any]:
        loaded = self._browser.expect("Page.loadEventFired", self._session)
        answer = self.call(method, **parameters)
        if not answer.get("errorText"):
            assert loaded.wait(_SECONDS), f"{self.address} has not loaded after {_SECONDS:g} s"
        return answer

    def heard(self, method: str, parameters: dict[str, Any]) -> None:
        """An event of the protocol."""
        if method == "Runtime.exceptionThrown":
            self.errors.append(_described(parameters["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "assert"):
            self.errors.append(" ".join(str(each.get("value", "")) for each in parameters["args"]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.errors.append(parameters["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            url = parameters["request"]["url"]
            self.requests += [] if url.startswith(("data:", "blob:")) else [url]


class Browser:
    """A headless Chromium with a profile of its own, gone at the end of the `with`.

    Attributes:
        downloads: folder in which downloads arrive.
    """

    def __enter__(self) -> Browser:
        program = find_browser()
        assert program, f"no browser is installed (looked for {', '.join(_NAMES)})"
        self._home = Path(tempfile.mkdtemp(prefix="advgrpo-browser-"))
        self.downloads = self._home / "downloads"
        self.downloads.mkdir()
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        switches = [
            *_SWITCHES,
            *(["--no-sandbox"] if os.geteuid() == 0 else []),
            f"--user-data-dir={self._home}/profile",
        ]
        with (self._home / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _TAKE_PIPES, str(theirs_in), str(theirs_out), program, *switches, "about:blank"],
                pass_fds=(theirs_in, theirs_out),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        os.close(theirs_in)
        os.close(theirs_out)
        self._out = os.fdopen(ours_out, "wb", buffering=0)
        self._next, self._answers, self._pages, self._expected = 0, {}, {}, []
        self._lock = threading.Lock()
        threading.Thread(target=self._listen, args=(ours_in,), daemon=True).start()
        behavior = {"behavior": "allow", "downloadPath": str(self.downloads)}
        self.call("Browser.setDownloadBehavior", **behavior)
        return self

    def __exit__(self, *exception: object) -> None:
        with suppress(Exception):
            self.call("Browser.close")
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._out.close()
        shutil.rmtree(self._home, ignore_errors=True)

    def open(self, address: str | Path, width: int = 1280, height: int = 800, **features: str) -> Page:
        """A new tab; `features` as of `Page.prefer`."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self._pages[session] = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.resize(width, height)
        page.prefer(**features)
        page.go(address)
        return page

    def downloaded(self, name: str) -> Path:
        """The file of this name, once it has arrived."""
        path, ends = self.downloads / name, time.monotonic() + _SECONDS
        while not path.exists():
            assert time.monotonic() < ends, (
                f"{name} has not arrived: {sorted(p.name for p in self.downloads.iterdir())}"
            )
            time.sleep(0.05)
        return path

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """A command of the protocol and its answer; AssertionError for an error, or none within a minute."""
        with self._lock:
            self._next += 1
            number, answer = self._next, queue.SimpleQueue()
            self._answers[number] = answer
            message = {
                "id": number,
                "method": method,
                "params": parameters,
                **({"sessionId": session} if session else {}),
            }
            left = memoryview(json.dumps(message).encode() + b"\0")
            while left:
                left = left[self._out.write(left) :]
        try:
            found = answer.get(timeout=_SECONDS)
        except queue.Empty:
            raise AssertionError(f"{method}: no answer after {_SECONDS:g} s\n{self._log()}") from None
        assert found is not None, f"{method}: the browser has ended\n{self._log()}"
        assert "error" not in found, f"{method}: {found['error']['message']}"
        return found["result"]

    def expect(self, method: str, session: str) -> threading.Event:
        """Set by the next such event."""
        event = threading.Event()
        self._expected.append((method, session, event))
        return event

    def _log(self) -> str:
        return (self._home / "log").read_text(errors="replace")[-2000:]

    def _listen(self, descriptor: int) -> None:
        with os.fdopen(descriptor, "rb") as stream:
            rest = b""
            while part := stream.read1(2**20):
                *messages, rest = (rest + part).split(b"\0")
                for message in messages:
                    self._take(json.loads(message))
        for answer in list(self._answers.values()):
            answer.put(None)

    def _take(self, message: dict[str, Any]) -> None:
        if "id" in message:
            self._answers.pop(message["id"]).put(message)
            return
        session = message.get("sessionId", "")
        if session in self._pages:
            self._pages[session].heard(message["method"], message["params"])
        for each in [e for e in self._expected if e[:2] == (message["method"], session)]:
            self._expected.remove(each)
            each[2].set()


def _described(details: dict[str, Any]) -> str:
    return details.get("exception", {}).get("description") or details["text"]


def main(arguments: list[str]) -> None:
    page, out, *size = arguments
    address = page if "://" in page else Path(page)
    with Browser() as browser:
        browser.open(address, *map(int, size)).screenshot(Path(out), whole=True)


if __name__ == "__main__":
    main(sys.argv[1:])
