"""Drafters by name: those that ship, those in folders, and those of runs; and how one is written to ship."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from dvirl.config import DraftSettings
from dvirl.lora import attach_draft
from dvirl.models.loading import LoadedModel, load
from dvirl.runs import checkpoint
from dvirl.runs import folder as run_folder
from dvirl.runs.errors import DvirlError
from dvirl.runs.settings import from_mapping, read_yaml
from kangaroo.kangaroo_model import KangarooModel

WEIGHTS = tuple(Path(__file__).parents[2] / name for name in ("weights", "dvirl_weights"))
"""Where shipped drafters lie, a folder each: in the repository, and beside the packages of a wheel."""


@dataclass(frozen=True)
class Draft:
    """A draft to judge.

    Attributes:
        model: drafts and verifies.
        loaded: the same weights, with their tokenizer.
        target: what the verifier's deep layers read, base or adapted.
    """

    model: KangarooModel
    loaded: LoadedModel
    target: str = "base"


@dataclass(frozen=True, kw_only=True)
class LoadedDrafter(Draft):
    """A trained draft that was read from a folder; nothing of it takes gradients.

    Attributes:
        peft_model: PEFT's view of the model, which holds lora_S.
        folder: where it was read.
    """

    peft_model: PeftModel
    folder: Path


def drafter_folder(name_or_folder: str | Path) -> Path:
    """The folder of a drafter, by its path or the name that it ships under.

    Raises:
        DvirlError: if there is none; the message lists the names.
    """
    for folder in (Path(name_or_folder), *(root / name_or_folder for root in WEIGHTS)):
        if (folder / checkpoint.DRAFTER).exists():
            return folder
    names = sorted(path.parent.name for root in WEIGHTS for path in root.glob(f"*/{checkpoint.DRAFTER}"))
    expected = f"a folder with {checkpoint.DRAFTER}, lora_S/ and config.yaml, or one of the shipped ones"
    raise DvirlError(
        f"no drafter {str(name_or_folder)!r}; expected {expected} ({', '.join(names) or 'none are'})"
    )


def _drafter_settings(path: Path) -> tuple[DraftSettings, str]:
    """The settings in a drafter's `config.yaml`, and the fingerprint of the model that it was made for."""
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
    name_or_folder: str | Path,
    loaded: LoadedModel | None = None,
    dtype: str = "auto",
    device: str = "auto",
) -> LoadedDrafter:
    """Load a drafter that `export` wrote, or that of a run's checkpoint, and its model.

    Args:
        name_or_folder: a shipped name or a folder.
        loaded: a freshly loaded model, which is changed in place; the one it was made for if not given.
        dtype, device: with which that model is loaded, as in `load`.

    Raises:
        DvirlError: if there is no such drafter, or it is incomplete or was made for another model.
    """
    return _load(drafter_folder(name_or_folder), loaded, dtype, device, ["lora_S"])


def open_draft(name: str, dtype: str, device: str) -> LoadedDrafter:
    """What drafts under this name: a run with its newest checkpoint, or a drafter, shipped or in a folder.

    A run brings its verifier: lora_D if it was trained, and what the deep layers read.

    Raises:
        DvirlError: if there is none.
    """
    shipped = Path(name) / "drafter"
    if shipped.is_dir():  # a distillation exports its drafter into its run's folder
        return load_drafter(shipped, None, dtype, device)
    if not (Path(name) / "checkpoints").is_dir():
        return load_drafter(name, None, dtype, device)
    folder = checkpoint.newest(name)
    adapters = [adapter for adapter in ("lora_S", "lora_D") if (folder / adapter).is_dir()]
    drafter = _load(folder, None, dtype, device, adapters)
    settings = run_folder.run_settings(name)
    return replace(drafter, target=settings.get("target", drafter.target))


def _load(
    folder: Path,
    loaded: LoadedModel | None,
    dtype: str,
    device: str,
    adapters: list[str],
) -> LoadedDrafter:
    """Load drafter and adapters of a folder that ships a drafter, or of a checkpoint, whose settings are its run's."""
    path = folder / "config.yaml"
    in_run = folder.absolute().parent.parent / "config.yaml"
    if in_run.exists() and not path.exists():
        path = in_run
    settings, fingerprint = _drafter_settings(path)
    loaded = loaded or load(settings.model_name, dtype, device, settings.chat_format)
    if loaded.fingerprint != fingerprint:
        raise DvirlError(
            f"{folder}: made for the model {fingerprint}, but {loaded.name!r} is {loaded.fingerprint}"
        )
    try:
        # The draft starts with any vocabulary of the right size; its own is read with its weights.
        peft_model, model = attach_draft(loaded.model, settings, deep="lora_D" in adapters)
    except DvirlError as error:
        raise DvirlError(f"{folder}: {error}") from error
    checkpoint.load_weights(folder, peft_model, model, adapters)
    model.requires_grad_(False)
    return LoadedDrafter(model, loaded, peft_model=peft_model, folder=folder)


def export(
    folder: Path,
    peft_model: PeftModel,
    model: KangarooModel,
    config: DraftSettings,
    loaded: LoadedModel,
    **made: Any,
) -> None:
    """Write a drafter to ship, in bfloat16, whole or not at all: `lora_S/`, `drafter.safetensors`, `config.yaml`.

    Args:
        folder: where; `load_drafter` reads it.
        peft_model, model: hold lora_S and the drafter.
        config: of the run that made it.
        loaded: the model that it drafts for.
        made: how it was made and what it reached, plain numbers and text.
    """
    with run_folder.atomic_directory(folder) as scratch:
        peft_model.peft_config["lora_S"].base_model_name_or_path = loaded.name
        checkpoint.save_adapters(peft_model, scratch, ["lora_S"])
        weights = scratch / "lora_S/adapter_model.safetensors"
        save_file(_halved(load_file(weights)), weights, metadata={"format": "pt"})
        save_file(_halved(model.drafter_state()), scratch / checkpoint.DRAFTER)
        run_folder.write_config(scratch, config, loaded, made=made)


def _halved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Floating-point tensors in bfloat16, others as they are."""
    floats = {name: tensor.bfloat16() for name, tensor in tensors.items() if tensor.is_floating_point()}
    return {**tensors, **floats}
