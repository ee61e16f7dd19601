"""Training from the command line: `dvirl train`, or `python -m dvirl.train_dvi`."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from transformers import HfArgumentParser

from dvirl.config import DVIConfig, from_mapping, from_namespace, read_yaml, with_help
from dvirl.errors import DvirlError
from dvirl.trace import read_metrics
from dvirl.trainer import DVITrainer


def parse_args(argv: Sequence[str]) -> DVIConfig:
    """Settings from flags, on top of a YAML file if `--config` names one.

    Raises:
        DvirlError: for an unknown or bad setting; unknown flags end the program as argparse does, with exit code 2.
    """
    parser = HfArgumentParser(with_help(DVIConfig), prog="dvirl train", description="Train a draft while it generates.")
    parser.add_argument("--config", default="", help="YAML file of settings; flags override it")
    path = parser.parse_known_args(["--config", _config_path(argv)])[0].config
    if path:
        values = read_yaml(path)
        from_mapping(DVIConfig, values, path)
        parser.set_defaults(**values)
    args = parser.parse_args(list(argv))
    del args.config
    return from_mapping(DVIConfig, vars(args), "arguments")


def _config_path(argv: Sequence[str]) -> str:
    for flag, value in zip(argv, [*argv[1:], ""], strict=True):
        if flag == "--config":
            return value
        if flag.startswith("--config="):
            return flag.removeprefix("--config=")
    return ""


def main(args: Namespace | DVIConfig) -> DVITrainer:
    """Train by the given settings, and print where the results are.

    Args:
        args: settings, or a namespace with some of their names; what is missing takes its default.

    Returns:
        The trainer, its run done.

    Raises:
        DvirlError: for bad settings, a bad source, or a run folder that holds a run already.
    """
    trainer = DVITrainer(from_namespace(DVIConfig, args))
    trainer.train()
    run_dir = Path(trainer.config.run_dir)
    metrics = read_metrics(run_dir / "metrics.jsonl")
    if len(metrics):
        tenth = max(1, len(metrics) // 10)
        first, last = (part.accept_rate.mean() for part in (metrics.head(tenth), metrics.tail(tenth)))
        print(f"accept rate: {first:.3f} over the first {tenth} steps, {last:.3f} over the last {tenth}")
    counters = trainer.counters
    print(
        f"time: {counters.rollout_s:.0f} s generation, {counters.fast_s:.0f} s drafting and fast updates, "
        f"{counters.slow_s:.0f} s slow updates"
    )
    print(f"log: {run_dir / 'metrics.jsonl'}")
    print(f"checkpoint: {run_dir / 'checkpoints' / f'step-{counters.step:06d}'}")
    return trainer


if __name__ == "__main__":
    try:
        main(parse_args(sys.argv[1:]))
    except DvirlError as error:
        print(f"dvirl: {error}", file=sys.stderr)
        sys.exit(2)
