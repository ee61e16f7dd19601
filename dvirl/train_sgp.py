"""Shallow-gradient fine-tuning from the command line: `dvirl sgp`."""

from argparse import Namespace
from dataclasses import dataclass
from functools import partial

from dvirl.config import Resumable, SGPConfig
from dvirl.runs import checkpoint, settings
from dvirl.sgp import SGPResult, SGPTrainer


@dataclass(frozen=True)
class SGPRun(Resumable, SGPConfig):
    """Settings of a run, and whether it is one that goes on."""


parse_args = partial(settings.parse_args, SGPRun, "dvirl sgp", "Fine-tune the shallow layers on supervised records.")
"""Settings from flags; see `settings.parse_args`."""


def main(args: Namespace | SGPConfig) -> SGPResult:
    """Train, and print what changed and where the results are; arguments and errors as in `train_dvi.main`."""
    config = settings.from_namespace(SGPRun, args)
    run = settings.narrowed(SGPConfig, config)
    if isinstance(config, SGPRun) and config.resume:
        trainer: SGPTrainer = checkpoint.go_on(SGPTrainer, SGPConfig, config.resume, run, config.accept_changes)
        print(f"{config.resume}: {trainer.done} of {trainer.num_steps} steps are done")
    else:
        trainer = SGPTrainer(run)
    result = trainer.train()
    for name, before in result.before.items():
        print(f"held-out {name}: {before:.4g} before, {result.after[name]:.4g} after")
    print(f"log: {trainer.config.run_dir}/metrics.jsonl\ncheckpoint: {result.checkpoint}")
    return result
