"""Stopping a run in good order: Ctrl-C, Jupyter's interrupt and SIGTERM ask it to end behind what it is doing."""

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
    """The signal that asked to stop; 0 if none has."""

    signal: int = 0


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Inside, a first SIGINT or SIGTERM is only noted, and carried out at the end; a second one stops at once.

    Outside the main thread, which alone gets signals, nothing changes.

    Raises:
        KeyboardInterrupt: at the end, if SIGINT asked.
        SystemExit: at the end, with code 143, if SIGTERM asked.
    """
    stop = Stop()

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.signal:
            raise KeyboardInterrupt
        stop.signal = number
        tqdm.write("stopping behind these prompts, with a checkpoint; ask again to stop at once", file=sys.stderr)

    there = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)} if there else {}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stop.signal == signal.SIGINT:
        raise KeyboardInterrupt
    if stop.signal:
        raise SystemExit(128 + stop.signal)
