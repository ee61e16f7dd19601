"""Experiment trackers of Hugging Face Accelerate (TensorBoard, W&B, …) beside a run's own log."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import LoggerType

from dvirl.runs.errors import DvirlError
from dvirl.runs.log import Line

TRACKERS = ("auto", "none", *LoggerType.list())
"""Names to choose from: auto is TensorBoard if it is installed, all is every installed tracker."""
Track = Callable[[Line], None]
"""Takes the figures of one step, `step` among them; values that are not numbers are ignored."""


def installed_trackers(name: str) -> list[str]:
    """The installed trackers that a name of `TRACKERS` stands for.

    Raises:
        DvirlError: for one that is not installed.
    """
    installed = [str(tracker.value) for tracker in get_available_trackers()]
    several = {"none": [], "all": installed, "auto": list({"tensorboard"}.intersection(installed))}
    if name not in {*several, *installed}:
        raise DvirlError(
            f"tracker is {name!r}, which is not installed; installed are {', '.join(installed) or 'none'}"
        )
    return several.get(name, [name])


@contextmanager
def tracking(name: str, run_dir: Path, settings: Mapping[str, Any]) -> Iterator[Track]:
    """Start the trackers of a name, and finish them at the end; those that write files do so in `run_dir/dvirl`.

    Raises:
        DvirlError: for one that is not installed.
    """
    trackers = []
    for installed in installed_trackers(name):
        kind = LOGGER_TYPE_TO_CLASS[installed]
        tracker = kind("dvirl", str(run_dir)) if kind.requires_logging_directory else kind("dvirl")
        tracker.store_init_configuration(dict(settings))
        trackers.append(tracker)

    def track(figures: Line) -> None:
        numbers = {key: value for key, value in figures.items() if isinstance(value, int | float)}
        for tracker in trackers:
            tracker.log(numbers, step=figures["step"])

    try:
        yield track
    finally:
        for tracker in trackers:
            tracker.finish()
