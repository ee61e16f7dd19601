"""One browser for all tests, and the built book by HTTP and as files."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from chromium import MISSING, chromium, program, serving

BUILT = Path(__file__).parents[1] / "_build"


def pytest_sessionstart() -> None:
    """Without a browser there is nothing to test; and Ctrl-C is heard, which a shell's background jobs ignore."""
    if not program():
        pytest.exit(MISSING, returncode=2)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def page():
    """A tab."""
    with chromium() as tab:
        yield tab


@pytest.fixture(scope="session")
def origins():
    """The two ways to read: where the folder of all builds begins, by HTTP and as files."""
    with serving(BUILT) as address:
        yield {"http": address, "file": f"{BUILT.as_uri()}/"}
