"""Training from the command line: `dvirl train`, or `python -m dvirl.train_dvi`."""

import sys
from argparse import Namespace
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dvirl.config import DVIConfig, Resumable
from dvirl.runs import errors, settings
from dvirl.runs.checkpoint import step_folder
from dvirl.runs.log import read_metrics
from dvirl.trainer import DVITrainer, resume


@dataclass(frozen=True)
class TrainConfig(Resumable, DVIConfig):
    """Settings of a run, and whether it is one that goes on."""


parse_args = partial(settings.parse_args, TrainConfig, "dvirl train", "Train a draft while it generates.")
"""Settings from flags; see `settings.parse_args`."""


def main(args: Namespace | DVIConfig) -> DVITrainer:
    """Train by the given settings, and print where the results are.

    Args:
        args: settings, or a namespace with some of their names; what is missing takes its default.

    Returns:
        The trainer, its run done.

    Raises:
        DvirlError: for bad settings, a bad source, a run folder that holds a run already, or none to resume.
    """
    config = settings.from_namespace(TrainConfig, args)
    run = settings.narrowed(DVIConfig, config)
    if isinstance(config, TrainConfig) and config.resume:
        trainer = resume(config.resume, run, accept_changes=config.accept_changes)
    else:
        trainer = DVITrainer(run)
    if trainer.resumed and trainer.processes.first:
        print(f"{trainer.config.run_dir}: {trainer.counters.prompts} of {run.num_prompts} prompts are done")
    trainer.train()
    if trainer.processes.first:
        _report(trainer)
    return trainer


def _report(trainer: DVITrainer) -> None:
    """Print what a run came to, and where it is."""
    run_dir = Path(trainer.config.run_dir)
    metrics = read_metrics(run_dir / "metrics.jsonl")
    if len(metrics):
        tenth = max(1, len(metrics) // 10)
        first, last = (part.accept_rate.mean() for part in (metrics.head(tenth), metrics.tail(tenth)))
        print(f"accept rate: {first:.3f} over the first {tenth} steps, {last:.3f} over the last {tenth}")
    counters = trainer.counters
    updates = f"{counters.fast_s:.0f} s drafting and fast updates, {counters.slow_s:.0f} s slow updates"
    print(f"time: {counters.rollout_s:.0f} s generation, {updates}")
    print(f"log: {run_dir / 'metrics.jsonl'}")
    print(f"checkpoint: {step_folder(run_dir, counters.step)}")


if __name__ == "__main__":
    sys.exit(errors.guarded(lambda argv: main(parse_args(argv)), sys.argv[1:]))
