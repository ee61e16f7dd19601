"""One training run as an experiment: inject, evaluate, train, evaluate, report: `dvirl experiment`."""

import sys
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dvirl import plots
from dvirl.config import DVIConfig
from dvirl.experiments.experiment import DVIExperiment, Experiment
from dvirl.models.drafters import Draft
from dvirl.runs import errors, settings
from dvirl.runs.log import read_metrics
from dvirl.train_dvi import make_trainer

parse_args = partial(
    settings.parse_args, DVIExperiment, "dvirl experiment", "Train a draft, and evaluate it on both ends."
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
    torch.set_num_threads(config.threads)
    experiment, trainer = Experiment(config), make_trainer(settings.narrowed(DVIConfig, config))

    def train() -> dict[str, Any]:
        trainer.train()
        return {"counters": vars(trainer.counters)}

    def draw(path: Path) -> None:
        plots.learning_curve(read_metrics(Path(config.run_dir) / "metrics.jsonl"), save=path)

    return experiment.run(Draft(trainer.model, trainer.loaded, config.target), train, draw)


if __name__ == "__main__":
    sys.exit(errors.guarded(lambda argv: main(parse_args(argv)), sys.argv[1:]))
