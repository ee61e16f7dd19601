"""Experiment trackers of Hugging Face Accelerate (TensorBoard, W&B, …) beside a run's own log."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import LoggerType

from dvirl.runs.errors import DvirlError

TRACKERS = ("auto", "none", *LoggerType.list())
"""auto is TensorBoard if it is installed; all is every one that is."""


Track = Callable[[Mapping[str, Any]], None]
"""Takes one step's figures, `step` among them; what is no number is passed over."""


def installed_trackers(name: str) -> list[str]:
    """The trackers that a name of `TRACKERS` stands for.

    Raises:
        DvirlError: for one that is not installed.
    """
    there = [str(one.value) for one in get_available_trackers()]
    if name == "auto":
        return [one for one in there if one == "tensorboard"]
    if name not in ("none", "all", *there):
        raise DvirlError(f"tracker is {name!r}, which is not installed; installed are {', '.join(there) or 'none'}")
    return {"none": [], "all": there}.get(name, [name])


@contextmanager
def tracking(name: str, run_dir: Path, settings: Mapping[str, Any]) -> Iterator[Track]:
    """Inside, what is given to the trackers of a name reaches them; those that write files do so in `run_dir/dvirl`.

    Raises:
        DvirlError: for one that is not installed.
    """
    trackers = []
    for kind in map(LOGGER_TYPE_TO_CLASS.get, installed_trackers(name)):
        trackers.append(kind("dvirl", *([str(run_dir)] if kind.requires_logging_directory else [])))
        trackers[-1].store_init_configuration(dict(settings))

    def track(figures: Mapping[str, Any]) -> None:
        numbers = {key: value for key, value in figures.items() if isinstance(value, int | float)}
        for tracker in trackers:
            tracker.log(numbers, step=figures["step"])

    try:
        yield track
    finally:
        for tracker in trackers:
            tracker.finish()
