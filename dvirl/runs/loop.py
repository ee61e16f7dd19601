"""The training loop under every trainer: run lock, log, progress bar, trackers, checkpoints, stopping and resuming."""

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch.optim import Optimizer
from tqdm import tqdm

from dvirl.runs import checkpoint
from dvirl.runs import folder as run_folder
from dvirl.runs.checkpoint import State
from dvirl.runs.errors import DvirlError
from dvirl.runs.interrupt import Stop, stoppable
from dvirl.runs.log import Line, cut_log, log_line
from dvirl.runs.processes import Processes
from dvirl.runs.settings import ModelSettings, defaults, from_mapping
from dvirl.runs.trackers import Track, installed_trackers, tracking
from kangaroo.kangaroo_model import KangarooModel


@dataclass(kw_only=True)
class Counters:
    """How far a run is; in every checkpoint.

    Attributes:
        step: updates so far.
        skipped: updates left out so far because a loss or gradient was not finite.
        wall_s: seconds of work so far, those before an interruption included; what counts as work is the trainer's.
    """

    step: int = 0
    skipped: int = 0
    wall_s: float = 0.0


def no_report(line: Line) -> None:
    """Drop a log line."""


class TrainingLoop(ABC):
    """Base of the trainers. A trainer says what one unit of work is; the loop does it until the run is finished.

    Args:
        config: all settings of the run.
        loaded: a freshly loaded model, which the trainer changes in place.
        checkpoint_every: steps between checkpoints, which fall between two units of work.
        keep_checkpoints: newest checkpoints that are kept, besides the best; 0 keeps all.
        tracker: where log lines go besides `metrics.jsonl`, a name of `trackers.TRACKERS`.

    Attributes:
        model, peft_model: the model with its draft, and PEFT's view of the same weights, for saving the adapters.
        counters: how far the run is.
        optimizers: those that it steps.
        length, unit: size of the whole run, and in what it is counted.
        shares_out: whether several processes can train together.
        processes: those that train together, of which this is one; only the first writes files and speaks.
        resumed: whether this run was begun before, by another trainer or this one.
        report: takes the log line of a step, as soon as it is known: to the log, the trackers and the progress bar.
            Outside `train` lines are dropped.

    Raises:
        DvirlError: for a tracker that is not installed, or several processes if this kind of trainer works alone.
    """

    config: ModelSettings
    model: KangarooModel
    peft_model: PeftModel
    counters: Counters
    optimizers: Iterable[Optimizer]
    length: int
    unit = "step"
    shares_out = False

    def __init__(
        self,
        config: ModelSettings,
        loaded: run_folder.Describable,
        checkpoint_every: int,
        keep_checkpoints: int = 0,
        tracker: str = "none",
    ) -> None:
        installed_trackers(tracker)
        torch.set_num_threads(config.threads)
        self.config = config
        self.loaded: Any = loaded
        self.processes = Processes(config.device)
        if self.processes.count > 1 and not self.shares_out:
            raise DvirlError(
                f"{self.processes.count} processes were started; expected one, which trains alone"
            )
        self.resumed = False
        self._checkpoint_every = checkpoint_every
        self._keep_checkpoints = keep_checkpoints
        self._tracker = tracker
        self._began = 0.0
        self.report: Track = no_report

    # What a trainer defines

    @abstractmethod
    def advance(self) -> None:
        """Do one unit of work, and `report` the log line of every step. A run can stop and be saved after it."""

    @abstractmethod
    def state_dict(self) -> State:
        """Everything but the weights: tensors under `tensors`, plain numbers under `numbers`."""

    @abstractmethod
    def load_state_dict(self, state: State) -> None:
        """Restore what `state_dict` gave."""

    def start(self) -> Sequence[Line]:
        """What is done once before the first unit of work of every start; return its log lines."""
        return []

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return Path(self.config.run_dir)

    @property
    def log(self) -> Path:
        """The run's log."""
        return self.run_dir / "metrics.jsonl"

    @property
    def position(self) -> int:
        """How much of `length` is done."""
        return self.counters.step

    def describe(self, line: Line) -> str:
        """What the progress bar says of a log line."""
        return f"step {line['step']}"

    @property
    def inputs(self) -> dict[str, str]:
        """Fingerprints of what the settings only name, such as the prompts of a file; a run goes on with the same."""
        return {}

    @property
    def finished(self) -> bool:
        """Whether the run is done."""
        return self.position >= self.length

    # The loop

    def train(self, show_progress: bool = True) -> object:
        """Train to the end of the run; log every step and write checkpoints into `run_dir`.

        Ctrl-C and SIGTERM end it after the unit of work at hand, with a checkpoint; called again, it goes on.

        Raises:
            DvirlError: if `run_dir` holds another run, another process uses it, or the disk is full.
        """
        first = self.processes.first
        self.processes.announce()
        with run_folder.run_lock(self.run_dir) if first else nullcontext(), stoppable() as stop:
            if first:
                self._start_log()
            self._began = time.perf_counter() - self.counters.wall_s
            for line in self.start():
                self._log_line(line)
            if not self.finished:
                self._run(stop, show_progress and first)
        return None

    def _start_log(self) -> None:
        """Begin the log of a new run, or cut it to the step that this one goes on from."""
        if self.log.exists() and self.counters.step == 0 and not self.resumed:
            raise DvirlError(f"run_dir {self.run_dir} already holds a run; choose another name, or remove it")
        run_folder.write_config(self.run_dir, self.config, self.loaded, inputs=self.inputs)
        self.log.touch()
        cut_log(self.log, self.counters.step)
        self.resumed = True  # also where it is stopped before its first step

    def _run(self, stop: Stop, show_progress: bool) -> None:
        """Work, log and save until the run is finished or one of the processes is asked to stop."""
        saved_step = self.counters.step
        saved = True
        asked = 0
        tracker = self._tracker if self.processes.first else "none"
        with (
            tracking(tracker, self.run_dir, asdict(self.config)) as track,
            tqdm(
                desc=self.run_dir.name,
                total=self.length,
                initial=self.position,
                unit=self.unit,
                disable=not show_progress,
            ) as bar,
        ):

            def report(line: Line) -> None:
                self._log_line(line)
                track(line)
                bar.update(self.position - bar.n)
                bar.set_postfix_str(self.describe(line))

            self.report = report
            try:
                while not self.finished:
                    asked = self.processes.largest(stop.signal)
                    if asked:
                        break
                    self.advance()
                    bar.update(self.position - bar.n)
                    saved = self.counters.step - saved_step >= self._checkpoint_every
                    if saved:
                        self.save_checkpoint()
                        saved_step = self.counters.step
            finally:
                self.report = no_report
        if not saved:
            self.save_checkpoint()
        # Only now: until here, a signal of its own would have been a process's second one, which ends it at once.
        stop.signal = stop.signal or asked

    def _log_line(self, line: Line) -> None:
        """Put a line into the log; the first process alone does."""
        if self.processes.first:
            log_line(self.log, line)

    def clock(self) -> None:
        """Bring `wall_s` up to date."""
        self.counters.wall_s = time.perf_counter() - self._began

    def say(self, message: str) -> None:
        """A line above the progress bar, from the first process alone."""
        if self.processes.first:
            tqdm.write(message, file=sys.stderr)

    def skip_update(self, step: int) -> None:
        """Count and report an update that was left out, since one bad batch must not end or spoil a run."""
        self.counters.skipped += 1
        self.say(f"step {step}: loss or gradient is not finite; the update is left out")

    # Checkpoints

    def save_checkpoint(self) -> Path:
        """Write a checkpoint of the run as it stands, and remove old ones; return its folder."""
        step = self.counters.step
        if self.finished:
            # Two thirds of a checkpoint are moments of optimizers, and no step will read them any more.
            for optimizer in self.optimizers:
                optimizer.state.clear()
        if self.processes.first:
            checkpoint.save(self.run_dir, step, self.peft_model, self.model, self.state_dict())
            if self._keep_checkpoints:
                checkpoint.prune(self.run_dir, self._keep_checkpoints)
        return checkpoint.step_folder(self.run_dir, step)

    def load_checkpoint(self, folder: str | Path) -> None:
        """Continue from a checkpoint of a run with the same settings.

        Raises:
            DvirlError: if it is incomplete or belongs to another model or settings.
        """
        self.load_state_dict(checkpoint.load(Path(folder), self.peft_model, self.model))
        begun = self.counters.step and not self.finished
        if begun and not any(optimizer.state for optimizer in self.optimizers):
            self.say(f"{folder}: the run was finished; it goes on, and its optimizers start again")

    def load_newest(self) -> None:
        """Continue from the newest checkpoint in `run_dir`, or from the beginning if there is none yet."""
        self.resumed = True
        if any(self.run_dir.glob("checkpoints/step-*")):
            self.load_checkpoint(checkpoint.newest(self.run_dir))


Config = TypeVar("Config", bound=ModelSettings)
Trainer = TypeVar("Trainer", bound=TrainingLoop)


def resume(
    make: Callable[[Config], Trainer],
    kind: type[Config],
    run_dir: str | Path,
    config: Config | None = None,
    accept_changes: bool = False,
) -> Trainer:
    """A trainer that goes on from the newest checkpoint of a run, or from its beginning if it has none yet.

    Args:
        make: makes a trainer from settings.
        kind: the class of the settings.
        run_dir: the run's folder, which may have been moved.
        config: the settings to go on with; by default the run's own.
        accept_changes: go on with other settings than the run's, or with other inputs.

    Raises:
        DvirlError: if the folder holds no run, or one of other settings, inputs or another model, or a broken
            checkpoint.
    """
    path = Path(run_dir) / "config.yaml"
    accept = "give --accept_changes true to go on with these"
    before = {**defaults(kind), **run_folder.run_settings(run_dir), "run_dir": str(run_dir)}
    config = replace(config or from_mapping(kind, before, str(path)), run_dir=str(run_dir))
    if not accept_changes:
        run_folder.refuse_other_settings(path, before, asdict(config), accept)
    trainer = make(config)
    fingerprint = run_folder.model_fingerprint(path)
    if fingerprint != trainer.loaded.fingerprint:
        raise DvirlError(
            f"{path}: the run is of the model {fingerprint}, and this one is {trainer.loaded.fingerprint}"
        )
    if not accept_changes:
        run_folder.refuse_other_inputs(path, trainer.inputs, accept)
    trainer.load_newest()
    return trainer
