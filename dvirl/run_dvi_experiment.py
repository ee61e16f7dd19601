"""One training run as an experiment: inject, evaluate, train, evaluate, report: `dvirl experiment`."""

import sys
from argparse import Namespace
from pathlib import Path

from dvirl import cli, plots
from dvirl.config import DVIConfig
from dvirl.experiments.experiment import DVIExperiment, run_experiment
from dvirl.runs import settings
from dvirl.train_dvi import make_trainer

parse_args = settings.command_line(
    DVIExperiment, "dvirl experiment", "Train a draft, and evaluate it on both ends."
)
"""Settings from flags; see `settings.parse_args`."""


def main(args: Namespace | DVIExperiment) -> Path:
    """Run it, and return `results/<name of run_dir>.json`.

    Args:
        args: settings, or a namespace with some of their names; what is missing takes its default.

    Raises:
        DvirlError: for bad settings or a bad source, or where there are results of this name already.
    """
    config = settings.from_namespace(DVIExperiment, args)
    return run_experiment(config, DVIConfig, make_trainer, plots.learning_curve)


if __name__ == "__main__":
    sys.exit(cli.main(["experiment", *sys.argv[1:]]))
