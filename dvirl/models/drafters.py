"""Drafters by name: those that ship, and those in folders."""

from dataclasses import dataclass, fields
from pathlib import Path

from peft import PeftModel

from dvirl.config import DraftSettings
from dvirl.lora import attach_draft
from dvirl.models.loading import LoadedModel, load
from dvirl.runs import checkpoint
from dvirl.runs.errors import DvirlError
from dvirl.runs.settings import from_mapping, read_yaml
from kangaroo.kangaroo_model import KangarooModel

WEIGHTS = tuple(Path(__file__).parents[2] / name for name in ("weights", "dvirl_weights"))
"""Where shipped drafters lie, a folder each: in the repository, and beside the packages of a wheel."""


@dataclass(frozen=True)
class LoadedDrafter:
    """A model with its trained draft, nothing of which takes gradients.

    Attributes:
        model: drafts and verifies.
        loaded: the model that it drafts for, the same weights.
        peft_model: PEFT's view of them, which holds lora_S.
        folder: where the drafter was read.
    """

    model: KangarooModel
    loaded: LoadedModel
    peft_model: PeftModel
    folder: Path


def drafter_folder(name_or_folder: str | Path) -> Path:
    """The folder of a drafter, by its path or the name that it ships under.

    Raises:
        DvirlError: if there is none; the message lists the names.
    """
    found = (path for path in (Path(name_or_folder), *(root / name_or_folder for root in WEIGHTS)))
    for folder in found:
        if (folder / checkpoint.DRAFTER).exists():
            return folder
    names = sorted(path.parent.name for root in WEIGHTS for path in root.glob(f"*/{checkpoint.DRAFTER}"))
    expected = f"a folder with {checkpoint.DRAFTER}, lora_S/ and config.yaml, or one of the shipped ones"
    raise DvirlError(f"no drafter {str(name_or_folder)!r}; expected {expected} ({', '.join(names) or 'none are'})")


def _drafter_settings(path: Path) -> tuple[DraftSettings, str]:
    """What drafts by a drafter's `config.yaml`, and the fingerprint of the model that it was made for."""
    content = read_yaml(path)
    try:
        values = {spec.name: content["config"][spec.name] for spec in fields(DraftSettings)}
        return from_mapping(DraftSettings, values, str(path)), content["model"]["fingerprint"]
    except (KeyError, TypeError) as error:
        raise DvirlError(f"{path}: expected a drafter's settings under 'config' and 'model'") from error


def made_for(name_or_folder: str | Path, loaded: LoadedModel) -> bool:
    """Whether a drafter was made for this model; errors as in `load_drafter`."""
    return _drafter_settings(drafter_folder(name_or_folder) / "config.yaml")[1] == loaded.fingerprint


def load_drafter(
    name_or_folder: str | Path, loaded: LoadedModel | None = None, dtype: str = "auto", device: str = "auto"
) -> LoadedDrafter:
    """Load a drafter that `checkpoint.export` wrote, or that of a run's checkpoint, and its model.

    Args:
        name_or_folder: a shipped name or a folder.
        loaded: a freshly loaded model, which is changed in place; the one it was made for if not given.
        dtype, device: to load that one with, as in `load`.

    Raises:
        DvirlError: if there is no such drafter, or it is incomplete or was made for another model.
    """
    folder = drafter_folder(name_or_folder)
    about = (path / "config.yaml" for path in (folder, *folder.absolute().parents[1:2]))  # a checkpoint's is its run's
    settings, made_for = _drafter_settings(next(filter(Path.exists, about), folder / "config.yaml"))
    loaded = loaded or load(settings.model_name, dtype, device, settings.chat_format)
    if loaded.fingerprint != made_for:
        raise DvirlError(f"{folder}: made for the model {made_for}, but {loaded.name!r} is {loaded.fingerprint}")
    try:
        peft_model, model = attach_draft(loaded.model, settings)  # not yet with the drafter's own vocabulary
    except DvirlError as error:
        raise DvirlError(f"{folder}: {error}") from error
    checkpoint.load(folder, peft_model, model, draft_only=True)
    model.requires_grad_(False)
    return LoadedDrafter(model, loaded, peft_model, folder)
