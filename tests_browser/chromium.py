"""A headless Chromium, driven by its DevTools protocol: what a reader's browser does, and what it complains of."""

from __future__ import annotations

import base64
import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from websocket import create_connection

MISSING = "make check-book needs Chromium; apt-get install chromium, or CHROMIUM=/path/to/it"
NAMES = ("chromium", "chromium-browser", "google-chrome")
LOADED = """document.readyState == 'complete' && [...document.images].every(image => image.complete)
    && !document.querySelector('.math:not(:has(mjx-container))')
    && document.getAnimations().every(one => one.playState != 'running')"""
STILL = {"name": "prefers-reduced-motion", "value": "reduce"}
PATIENCE = 30.0
"""Seconds that anything may take, such as a page until it is loaded and its equations are set."""


def program() -> str | None:
    """The Chromium that the variable CHROMIUM names, or one in the path, or None."""
    wished = os.environ.get("CHROMIUM")
    return shutil.which(wished) if wished else next(filter(None, map(shutil.which, NAMES)), None)


def until(found, seconds: float = PATIENCE):
    """Ask again and again until there is an answer; the last one, which is nothing if the time is up."""
    end = time.monotonic() + seconds
    while not (answer := found()) and time.monotonic() < end:
        time.sleep(0.05)
    return answer


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """A folder by HTTP on a free port; its address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args) -> None:
            pass

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@contextmanager
def chromium() -> Iterator[Page]:
    """A Chromium with one page; no name but 127.0.0.1 leads anywhere."""
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage",
               "--no-first-run", "--remote-debugging-port=0", "--remote-allow-origins=*",
               "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]  # fmt: skip
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        command = [program(), *options, f"--user-data-dir={folder}", "about:blank"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port = Path(folder, "DevToolsActivePort")
        try:
            assert until(lambda: port.exists() and port.read_text().count("\n")), "Chromium did not start"
            with urllib.request.urlopen(
                f"http://127.0.0.1:{port.read_text().split()[0]}/json", timeout=10
            ) as answer:
                tab = next(tab for tab in json.load(answer) if tab["type"] == "page")
            page = Page(tab["webSocketDebuggerUrl"])
            yield page
            page.socket.close()
        finally:
            process.terminate()
            process.wait()


class Page:
    """A tab: opens addresses, answers JavaScript, and keeps what the browser says meanwhile."""

    def __init__(self, address: str) -> None:
        self.socket = create_connection(address, timeout=60)
        self.number = 0
        self.events: list[dict] = []
        self.width, self.dark = 0, False
        self.patience = PATIENCE
        self.ready = False
        for domain in ("Network", "Runtime", "Log", "Page"):
            self.call(f"{domain}.enable")
        self.call("Network.setCacheDisabled", cacheDisabled=True)

    def call(self, method: str, **params) -> dict:
        """Ask for something by the protocol; its result."""
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": params}))
        while (message := json.loads(self.socket.recv())).get("id") != self.number:
            self.events.append(message)
        assert "error" not in message, f"{method}: {message}"
        return message["result"]

    def js(self, code: str):
        """What an expression is, promises awaited."""
        answer = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, f"{code}: {answer['exceptionDetails']}"
        return answer["result"].get("value")

    def said(self, method: str) -> list[dict]:
        """The events of a kind since the page was opened."""
        return [event["params"] for event in self.events if event.get("method") == method]

    def look(self, width: int, dark: bool, height: int = 900) -> None:
        """Be so wide, a phone if narrow, and ask for light or dark pages, in which nothing moves."""
        self.width, self.dark = width, dark
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=width < 500)  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme, STILL])

    def open(self, address: str) -> None:
        """Go to an address and wait until nothing loads any more; `ready` says whether that came in time."""
        self.call("Page.navigate", url="about:blank")
        until(lambda: self.js("location.href") == "about:blank")
        self.events.clear()
        self.call("Page.navigate", url=address)
        self.settle(address)

    def settle(self, address: str) -> None:
        """Wait until the tab is at an address whose page is loaded."""
        there = f"location.href.startsWith({json.dumps(address)})"
        self.ready = until(lambda: self.js(f"{there} && {LOADED}") and not self.pending(), self.patience)

    def pending(self) -> set[str]:
        """Requests without an end yet."""
        ended = (*self.said("Network.loadingFinished"), *self.said("Network.loadingFailed"))
        started = {one["requestId"] for one in self.said("Network.requestWillBeSent")}
        return started - {one["requestId"] for one in ended}

    def screenshot(self, path: Path, longest: int = 6000) -> None:
        """The page from its top, at most so many pixels of it, as PNG."""
        height = min(longest, self.js("document.documentElement.scrollHeight"))
        self.look(self.width, self.dark, height)
        until(lambda: self.js(LOADED), self.patience)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def pdf(self, path: Path) -> None:
        """The page on A4 sheets, with page numbers."""
        number = '<div style="font-size: 8px; width: 100%; text-align: center"><span class="pageNumber"></span></div>'
        made = self.call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69, marginTop=0.6, marginBottom=0.7,
                         marginLeft=0.6, marginRight=0.6, printBackground=True, scale=0.85, displayHeaderFooter=True,
                         headerTemplate="<span></span>", footerTemplate=number, transferMode="ReturnAsBase64")  # fmt: skip
        path.write_bytes(base64.b64decode(made["data"]))


def print_page(folder: Path, path: Path) -> None:
    """Make a PDF of the page of a folder."""
    with serving(folder) as address, chromium() as page:
        page.look(1280, dark=False)
        page.open(f"{address}index.html")
        assert page.ready, "the page was not ready in time"
        page.pdf(path)


if __name__ == "__main__":
    print_page(Path(sys.argv[1]), Path(sys.argv[2]))
