"""Shallow-gradient fine-tuning from the command line: `dvirl sgp`."""

from argparse import Namespace
from functools import partial

from dvirl import settings
from dvirl.config import SGPConfig
from dvirl.sgp import SGPResult, SGPTrainer

parse_args = partial(settings.parse_args, SGPConfig, "dvirl sgp", "Fine-tune the shallow layers on supervised records.")
"""Settings from flags; see `settings.parse_args`."""


def main(args: Namespace | SGPConfig) -> SGPResult:
    """Train, and print what changed and where the results are; arguments and errors as in `train_dvi.main`."""
    config = settings.from_namespace(SGPConfig, args)
    result = SGPTrainer(config).train()
    for name, before in result.before.items():
        print(f"held-out {name}: {before:.4g} before, {result.after[name]:.4g} after")
    print(f"log: {config.run_dir}/metrics.jsonl\ncheckpoint: {result.checkpoint}")
    return result
