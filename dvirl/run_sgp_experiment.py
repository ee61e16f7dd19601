"""One fine-tuning as an experiment: inject, evaluate, train, evaluate, report: `dvirl sgp-experiment`."""

import sys
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dvirl import cli, plots
from dvirl.config import SGPConfig
from dvirl.experiments.experiment import SGPExperiment, refuse_existing, run_experiment
from dvirl.models.drafters import Draft
from dvirl.runs import settings
from dvirl.train_sgp import make_trainer

parse_args = settings.command_line(
    SGPExperiment, "dvirl sgp-experiment", "Fine-tune, and evaluate on both ends."
)
"""Settings from flags; see `settings.parse_args`."""


def main(args: Namespace | SGPExperiment) -> Path:
    """Run it, and return `results/<name of run_dir>.json`; arguments and errors as in `run_dvi_experiment.main`."""
    config = settings.from_namespace(SGPExperiment, args)
    refuse_existing(config)
    trainer = make_trainer(settings.narrowed(SGPConfig, config))
    draft = Draft(trainer.model, trainer.loaded)

    def train() -> dict[str, Any]:
        return {"held_out": asdict(trainer.train())}

    return run_experiment(config, draft, train, plots.losses)


if __name__ == "__main__":
    sys.exit(cli.main(["sgp-experiment", *sys.argv[1:]]))
