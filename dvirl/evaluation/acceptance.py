"""A finished run, judged by the step-by-step decoder on its held-out prompts: `dvirl acceptance RUN_DIR`."""

from dataclasses import dataclass
from pathlib import Path

from dvirl.config import DVIConfig
from dvirl.models.drafters import load_drafter
from dvirl.models.loading import LoadedModel
from dvirl.runs.checkpoint import newest
from dvirl.runs.folder import run_settings
from dvirl.runs.settings import from_mapping
from dvirl.train_dvi import make_trainer
from dvirl.trainer import DVITrainer
from kangaroo.kangaroo_model import KangarooModel


def open_run(run_dir: str | Path, **changes: object) -> tuple[DVITrainer, Path]:
    """The trainer of a run as it was before its first step, and the folder of its newest checkpoint.

    Args:
        run_dir: a run's folder, with `config.yaml` and at least one checkpoint.
        changes: settings of the run to replace, such as dtype and device.

    Raises:
        DvirlError: if the folder holds no run.
    """
    checkpoint, settings = newest(run_dir), {**run_settings(run_dir), **changes}
    return make_trainer(from_mapping(DVIConfig, settings, f"{run_dir}/config.yaml")), checkpoint


@dataclass(frozen=True)
class Draft:
    """A draft to judge: a model with it, the same model with its tokenizer, and what its verifier reads."""

    model: KangarooModel
    loaded: LoadedModel
    target: str = "base"


def open_draft(name: str, dtype: str, device: str) -> Draft:
    """What drafts by this name: a run as its newest checkpoint has it, or a drafter, shipped or in a folder.

    Raises:
        DvirlError: if there is none.
    """
    if (Path(name) / "checkpoints").is_dir() and not (Path(name) / "drafter").is_dir():
        trainer, checkpoint = open_run(name, dtype=dtype, device=device)
        trainer.load_checkpoint(checkpoint)
        return Draft(trainer.model, trainer.loaded, trainer.config.target)
    inside = Path(name) / "drafter"
    drafter = load_drafter(inside if inside.is_dir() else name, dtype=dtype, device=device)
    return Draft(drafter.model, drafter.loaded)
