"""Training from the command line: `dvirl train`, or `python -m dvirl.train_dvi`."""

import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import torch

from dvirl import cli
from dvirl.config import DVIConfig, Resumable
from dvirl.data.stream import PromptSplit, load_prompts
from dvirl.models.loading import LoadedModel, load_for
from dvirl.runs import loop, settings
from dvirl.runs.checkpoint import step_folder
from dvirl.runs.log import read_metrics
from dvirl.runs.processes import Processes
from dvirl.trainer import DVITrainer


@dataclass(frozen=True)
class TrainConfig(Resumable, DVIConfig):
    """Settings of a run, and whether it is one that goes on."""


parse_args = settings.command_line(TrainConfig, "dvirl train", "Train a draft while it generates.")
"""Settings from flags; see `settings.parse_args`."""


def make_trainer(
    config: DVIConfig, loaded: LoadedModel | None = None, split: PromptSplit | None = None
) -> DVITrainer:
    """A trainer with the model and the prompts that its settings name.

    Args:
        config: all settings.
        loaded: a freshly loaded model, which is changed in place; by default `config.model_name`.
        split: prompts; by default read from `config.prompts_source`.

    Raises:
        DvirlError: for settings that do not fit the model or the prompts, or a bad source.
    """
    torch.set_num_threads(config.threads)
    processes = Processes(config.device)  # before the model, since they say which accelerator is whose
    loaded = loaded or load_for(config)
    split = split or processes.once(lambda: load_prompts(config, loaded))
    return DVITrainer(config, loaded, split)


def resume(
    run_dir: str | Path,
    config: DVIConfig | None = None,
    loaded: LoadedModel | None = None,
    split: PromptSplit | None = None,
    accept_changes: bool = False,
) -> DVITrainer:
    """A trainer that goes on with a run: `loop.resume` with the model and prompts of `make_trainer`."""
    return loop.resume(
        lambda run: make_trainer(run, loaded, split), DVIConfig, run_dir, config, accept_changes
    )


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
        trainer = make_trainer(run)
    if trainer.resumed and trainer.processes.first:
        print(f"{trainer.config.run_dir}: {trainer.position} of {trainer.length} prompts are done")
    trainer.train()
    if trainer.processes.first:
        _report(trainer)
    return trainer


def _report(trainer: DVITrainer) -> None:
    """Print what a run reached, and where it is."""
    metrics = read_metrics(trainer.log)
    if len(metrics):
        tenth = max(1, len(metrics) // 10)
        first = metrics.accept_rate.head(tenth).mean()
        last = metrics.accept_rate.tail(tenth).mean()
        print(f"acceptance rate: {first:.3f} over the first {tenth} steps, {last:.3f} over the last {tenth}")
    else:
        print(
            f"nothing was learned: {trainer.buffer.accepted_since_update} drafts were accepted in all, and the "
            f"first update waits for fast_batch = {trainer.config.fast_batch}; lower it, or give more prompts"
        )
    counters = trainer.counters
    print(
        f"time: {counters.rollout_s:.0f} s generation, {counters.fast_s:.0f} s drafting and fast updates, "
        f"{counters.slow_s:.0f} s slow updates"
    )
    print(f"log: {trainer.log}")
    print(f"checkpoint: {step_folder(trainer.run_dir, counters.step)}")


if __name__ == "__main__":
    sys.exit(cli.main(["train", *sys.argv[1:]]))
