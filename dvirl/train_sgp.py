"""Shallow-gradient fine-tuning from the command line: `dvirl sgp`."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dvirl.config import Resumable, SGPConfig
from dvirl.data.sources import Prompt, read_prompts
from dvirl.models.loading import LoadedModel, load_for
from dvirl.runs import loop, settings
from dvirl.runs.errors import DvirlError
from dvirl.sgp import SGPResult, SGPTrainer


@dataclass(frozen=True)
class SGPRun(Resumable, SGPConfig):
    """Settings of a run, and whether it is one that goes on."""


parse_args = settings.command_line(SGPRun, "dvirl sgp", "Fine-tune the shallow layers on supervised records.")
"""Settings from flags; see `settings.parse_args`."""


def make_trainer(
    config: SGPConfig, loaded: LoadedModel | None = None, records: Sequence[Prompt] | None = None
) -> SGPTrainer:
    """A trainer with the model and the records that its settings name.

    Args:
        config: all settings.
        loaded: a freshly loaded model, which is changed in place; by default `config.model_name`.
        records: prompts with responses; by default read from `config.records_path`.

    Raises:
        DvirlError: for settings that do not fit the model or the records, or a bad source.
    """
    torch.set_num_threads(config.threads)
    if records is None:
        if not config.records_path:
            raise DvirlError(
                "records_path is empty; expected a JSON or JSONL file or a hub id of supervised records"
            )
        records = read_prompts("supervised", config.records_path, config.on_bad_row)
    loaded = loaded or load_for(config)
    return SGPTrainer(config, loaded, records)


def main(args: Namespace | SGPConfig) -> SGPResult:
    """Train, and print what changed and where the results are; arguments and errors as in `train_dvi.main`."""
    config = settings.from_namespace(SGPRun, args)
    run = settings.narrowed(SGPConfig, config)
    if isinstance(config, SGPRun) and config.resume:
        trainer = loop.resume(make_trainer, SGPConfig, config.resume, run, config.accept_changes)
        print(f"{config.resume}: {trainer.position} of {trainer.length} steps are done")
    else:
        trainer = make_trainer(run)
    result = trainer.train()
    for name, before in result.before.items():
        print(f"held-out {name}: {before:.4g} before, {result.after[name]:.4g} after")
    print(f"log: {trainer.log}\ncheckpoint: {result.checkpoint}")
    return result
