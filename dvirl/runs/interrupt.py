"""Stopping a run in good order: after Ctrl-C, Jupyter's interrupt or SIGTERM it ends what it is doing first."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from tqdm import tqdm


@contextmanager
def handled(handler: Callable[[int, FrameType | None], object], *numbers: int) -> Iterator[None]:
    """Let a handler take these signals inside. Only the main thread gets signals; in others nothing changes."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@dataclass
class Stop:
    """The signal that asked to stop; 0 as long as none has."""

    signal: int = 0


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Note a first SIGINT or SIGTERM, and act on it at the end; a second one stops at once; see `handled`.

    Raises:
        KeyboardInterrupt: at the end, if SIGINT asked.
        SystemExit: at the end, with code 143, if SIGTERM asked.
    """
    stop = Stop()

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.signal:
            raise KeyboardInterrupt
        stop.signal = number
        tqdm.write(
            "stopping after these prompts, with a checkpoint; ask again to stop at once", file=sys.stderr
        )

    with handled(ask, signal.SIGINT, signal.SIGTERM):
        yield stop
    if stop.signal == signal.SIGINT:
        raise KeyboardInterrupt
    if stop.signal:
        raise SystemExit(128 + stop.signal)
