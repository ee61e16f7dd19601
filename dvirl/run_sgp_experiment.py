"""One fine-tuning as an experiment: inject, evaluate, train, evaluate, report: `dvirl sgp-experiment`."""

import sys
from argparse import Namespace
from pathlib import Path

from dvirl import cli, plots
from dvirl.config import SGPConfig
from dvirl.experiments.experiment import SGPExperiment, run_experiment
from dvirl.runs import settings
from dvirl.train_sgp import make_trainer

parse_args = settings.command_line(
    SGPExperiment, "dvirl sgp-experiment", "Fine-tune, and evaluate on both ends."
)
"""Settings from flags; see `settings.parse_args`."""


def main(args: Namespace | SGPExperiment) -> Path:
    """Run it, and return `results/<name of run_dir>.json`; arguments and errors as in `run_dvi_experiment.main`."""
    config = settings.from_namespace(SGPExperiment, args)
    return run_experiment(config, SGPConfig, make_trainer, plots.losses)


if __name__ == "__main__":
    sys.exit(cli.main(["sgp-experiment", *sys.argv[1:]]))
