"""A headless Chromium driven over its debugging pipe (Chrome DevTools Protocol); needs the program and nothing else."""

import base64
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BINARY = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)


class Chromium:
    """One page of one browser.

    Attributes:
        complaints: what the browser logged as errors: refused by policy, thrown, not loaded.
    """

    def __init__(self, profile: Path):
        to_read, to_write = os.pipe()
        from_read, from_write = os.pipe()
        # The browser wants its ends as 3 and 4, where they may be already: move them out of the way first.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 100) for end in (to_read, from_write)]
        words = [
            str(BINARY), "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--no-first-run", f"--user-data-dir={profile}", "about:blank",
        ]  # fmt: skip
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{ends[0]} 4>&{ends[1]}', "bash", *words],
            pass_fds=ends, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for end in (to_read, from_write, *ends):
            os.close(end)
        self._to, self._from = to_write, from_read
        self._held, self._count, self._session = b"", 0, ""
        self.complaints: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "DOM"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command and its result."""
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                assert "error" not in answer, (method, answer)
                return answer["result"]
            kind, about = answer.get("method"), answer.get("params", {})
            if kind == "Log.entryAdded" and about["entry"]["level"] == "error":
                self.complaints.append(about["entry"]["text"])
            elif kind == "Runtime.exceptionThrown":
                self.complaints.append(str(about["exceptionDetails"]))
            elif kind == "Page.javascriptDialogOpening":
                self.complaints.append("a dialog: " + about["message"])

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._held:
            block = os.read(self._from, 1 << 20)
            assert block, "the browser has ended"
            self._held += block
        whole, _, self._held = self._held.partition(b"\0")
        return json.loads(whole)

    def open(self, url: str) -> None:
        """Goes to a page and waits until it is there."""
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def value(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, expression: str, seconds: float = 20) -> None:
        """Waits until an expression is true."""
        deadline = time.monotonic() + seconds
        while not self.value(expression):
            assert time.monotonic() < deadline, (
                expression,
                self.complaints,
                self.value("document.body.innerText"),
            )
            time.sleep(0.05)

    def type(self, text: str) -> None:
        """Types into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, code: int) -> None:
        """Presses and releases one key."""
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text
            )

    def drop(self, path: Path) -> None:
        """Drops a file into the middle of the page."""
        data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=300, y=300, data=data)

    def screenshot(self, path: Path) -> None:
        """Writes what the page looks like as PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        """Ends the browser."""
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self._to)
        os.close(self._from)


@contextlib.contextmanager
def chromium(profile: Path) -> Iterator[Chromium]:
    """A browser that is closed at the end."""
    browser = Chromium(profile)
    try:
        yield browser
    finally:
        browser.close()
