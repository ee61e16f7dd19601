"""Stopping a run in good order: after Ctrl-C, Jupyter's interrupt or SIGTERM it ends what it is doing first."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from tqdm import tqdm


@dataclass
class Stop:
    """The signal that asked to stop; 0 as long as none has."""

    signal: int = 0


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Note a first SIGINT or SIGTERM, and act on it at the end; a second one stops at once.

    Only the main thread gets signals; in others nothing changes.

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

    handlers = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if stop.signal == signal.SIGINT:
        raise KeyboardInterrupt
    if stop.signal:
        raise SystemExit(128 + stop.signal)
