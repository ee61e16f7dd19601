"""What drafts, by name: drafters that ship, in folders and of runs, whole models; and how one is written to ship."""

import hashlib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from dvirl.config import DraftSettings, DVIConfig
from dvirl.lora import attach_draft
from dvirl.models.loading import LoadedModel, load
from dvirl.runs import checkpoint
from dvirl.runs import folder as run_folder
from dvirl.runs.errors import DvirlError
from dvirl.runs.files import Tensors, atomic_directory
from dvirl.runs.settings import Settings, from_mapping, number, read_yaml
from kangaroo.kangaroo_model import KangarooModel
from kangaroo.published import is_published, is_whole_model
from kangaroo.sgp_lora import lora_parameters

DEFAULT_DRAFTER = "smollm2-135m-k2-recurrent"
"""Name of the shipped drafter that is faster, on CPUs and on GPUs."""
WEIGHTS = tuple(Path(__file__).parents[2] / name for name in ("weights", "dvirl_weights"))
"""Where shipped drafters lie, a folder each: in the repository, and beside the packages of a wheel."""

LATER = {"feedback": False, "recurrent": False, "middle_layer": 0}
"""Settings that the first drafters did not have, as they were for them."""
BOS_EOS = ("bos_token", "eos_token")
"""Tokens by which two tokenizers may differ though all ids have the same texts."""
OF_BASE = ("num_attention_heads", "num_key_value_heads", "rms_norm_eps", "rope_theta", "rope_scaling")
"""What a trained drafter shares with its model; a published adapter has its own."""


@dataclass(frozen=True)
class DrafterOptions(Settings):
    """What the files of others leave open; the base of settings of commands that take a drafter."""

    model_name: str = ""
    """Model that verifies: the drafter's own by default; smollm2-135m for a whole model that drafts. A published
    Kangaroo adapter does not name its model."""
    exit_layer: int = number(0, 0, 1000)
    """k of a published Kangaroo adapter, which does not say it. Another drafter has its own: 0 takes any."""


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

    def fingerprint(self) -> str:
        """The sha256 of all weights that are not the model's: the drafter's and the adapters'."""
        digest = hashlib.sha256()
        weights = [*self.model.drafter_state().values()]
        if self.model.head == "frozen":  # it is the model's own, or that of a whole model that drafts
            weights.append(self.model.exit_proj.weight)
        adapters = lora_parameters(self.model.base_model, ["lora_S", "lora_D"])
        for tensor in (*weights, *adapters):
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class LoadedDrafter(Draft):
    """A trained draft that was read from a folder; nothing of it takes gradients.

    Attributes:
        peft_model: PEFT's view of the model, which holds lora_S.
        folder: where it was read.
        settings: what drafts.
    """

    peft_model: PeftModel
    folder: Path
    settings: DraftSettings


def drafter_folder(name_or_folder: str | Path) -> Path:
    """The folder of a drafter, by its path or the name that it ships under.

    Raises:
        DvirlError: if there is none; the message lists the names.
    """
    for root in (Path(), *WEIGHTS):
        folder = root / name_or_folder
        if (folder / checkpoint.DRAFTER).exists() or is_published(folder) or is_whole_model(folder):
            return folder
    names = sorted(path.parent.name for root in WEIGHTS for path in root.glob(f"*/{checkpoint.DRAFTER}"))
    raise DvirlError(
        f"no drafter {str(name_or_folder)!r}; expected a folder with {checkpoint.DRAFTER}, lora_S/ and config.yaml, "
        "a published Kangaroo adapter, a Llama with its tokenizer, or one of the shipped ones "
        f"({', '.join(names) or 'none are'})"
    )


def _drafter_settings(folder: Path) -> tuple[DraftSettings, str | None]:
    """The settings in a drafter's `config.yaml`, and the fingerprint of the model that it was made for."""
    path = folder / "config.yaml"
    in_run = folder.absolute().parent.parent / "config.yaml"
    if in_run.exists() and not path.exists():
        path = in_run  # a checkpoint's is its run's
    content = read_yaml(path)
    try:
        given = LATER | content["config"]
        values = {spec.name: given[spec.name] for spec in fields(DraftSettings)}
        return from_mapping(DraftSettings, values, str(path)), content["model"]["fingerprint"]
    except (KeyError, TypeError) as error:
        raise DvirlError(f"{path}: expected a drafter's settings under 'config' and 'model'") from error


def made_for(name_or_folder: str | Path, loaded: LoadedModel) -> bool:
    """Whether a drafter was made for this model; errors as in `load_drafter`."""
    return _drafter_settings(drafter_folder(name_or_folder))[1] == loaded.fingerprint


def _settings_of(folder: Path, has_model: bool, exit_layer: int) -> tuple[DraftSettings, str | None]:
    """The settings by which what is in a folder drafts, and the fingerprint of its model; None if that is not known."""
    if not (is_published(folder) or is_whole_model(folder)):
        return _drafter_settings(folder)
    if is_published(folder) and not (has_model and exit_layer):
        raise DvirlError(
            f"{folder}: a published Kangaroo adapter names neither its model nor its exit layer; "
            "expected --model_name and --exit_layer"
        )
    # As published, the exit head is the model's own lm_head. A fresh lora_S computes nothing. Where a whole model
    # drafts, the verifier may be split anywhere.
    return DraftSettings(exit_layer=exit_layer or 1, lora_rank=1, head="frozen", draft_vocab=0), None


def _draft_with(folder: Path, model: KangarooModel, loaded: LoadedModel) -> None:
    """Let the whole model in a folder draft, in the dtype of the model that verifies and on its device.

    Raises:
        DvirlError: if it cannot be loaded; for an id that has another text, or another BOS or EOS where both have one.
    """
    how = loaded.description()
    other = load(str(folder), how["dtype"], how["device"], "none")
    expected = _texts(loaded)
    found = _texts(other)
    for name in expected | found:
        text = found.get(name)
        wanted = expected.get(name)
        if text != wanted and (name not in BOS_EOS or (text and wanted)):
            raise DvirlError(
                f"{folder}: {name} is {text!r}, and {wanted!r} for the model that verifies; "
                "expected the same tokenizer"
            )
    model.draft_with(other.model)


def _texts(loaded: LoadedModel) -> dict[str, Any]:
    """The text of every id, in order, and those of BOS and EOS or None, by what a message calls them."""
    vocabulary = loaded.tokenizer.get_vocab()
    texts = {f"token {vocabulary[text]}": text for text in sorted(vocabulary, key=vocabulary.get)}
    named = loaded.tokenizer.special_tokens_map
    return texts | {role: named.get(role) for role in BOS_EOS}


def _read_into(folder: Path, peft_model: PeftModel, model: KangarooModel, loaded: LoadedModel) -> None:
    """Let what is in a folder draft."""
    # What the folder lacks, as a whole model's lacks lora_S, computes nothing and is the same each time.
    for parameter in lora_parameters(model.base_model, ["lora_S"]):
        parameter.data.zero_()
    if is_whole_model(folder):
        _draft_with(folder, model, loaded)
    else:
        checkpoint.load_weights(folder, peft_model, model, list(peft_model.peft_config))


def load_drafter(
    name_or_folder: str | Path,
    loaded: LoadedModel | None = None,
    dtype: str = "auto",
    device: str = "auto",
    model_name: str = "",
    exit_layer: int = 0,
    deep: bool = False,
) -> LoadedDrafter:
    """Load what drafts, and the model that verifies.

    A drafter is one that `export` wrote, that of a run's checkpoint, or a published Kangaroo adapter. A whole Llama
    with the same tokens drafts as well.

    Args:
        name_or_folder: a shipped name or a folder.
        loaded: a freshly loaded model, which is changed in place; `model_name` if not given.
        dtype, device: with which that model is loaded, as in `load`.
        model_name, exit_layer: see `DrafterOptions`.
        deep: load a checkpoint's lora_D as well.

    Raises:
        DvirlError: if there is no such drafter, or it is incomplete, or was made for another model or exit layer, or
            has other tokens.
    """
    folder = drafter_folder(name_or_folder)
    settings, fingerprint = _settings_of(folder, bool(loaded or model_name), exit_layer)
    if exit_layer not in (0, settings.exit_layer):
        raise DvirlError(f"exit_layer is {exit_layer}; {folder} was made for {settings.exit_layer}")
    loaded = loaded or load(model_name or settings.model_name, dtype, device, settings.chat_format)
    if fingerprint not in (None, loaded.fingerprint):
        raise DvirlError(
            f"{folder}: made for the model {fingerprint}, but {loaded.name!r} is {loaded.fingerprint}"
        )
    try:
        # The draft starts with any vocabulary of the right size; its own is read with its weights.
        peft_model, model = attach_draft(loaded.model, settings, deep=deep)
    except DvirlError as error:
        raise DvirlError(f"{folder}: {error}") from error
    _read_into(folder, peft_model, model, loaded)
    model.requires_grad_(False)
    return LoadedDrafter(model, loaded, peft_model=peft_model, folder=folder, settings=settings)


def open_draft(
    name: str, dtype: str, device: str, model_name: str = "", exit_layer: int = 0
) -> LoadedDrafter:
    """What drafts under this name: a run with its newest checkpoint, or a drafter as in `load_drafter`.

    A run brings its verifier: lora_D if it was trained, and what the deep layers read.

    Raises:
        DvirlError: if there is none.
    """
    options = (None, dtype, device, model_name, exit_layer)
    shipped = Path(name) / "drafter"
    if shipped.is_dir():  # a distillation exports its drafter into its run's folder
        return load_drafter(shipped, *options)
    if not (Path(name) / "checkpoints").is_dir():
        return load_drafter(name, *options)
    folder = checkpoint.newest(name)
    drafter = load_drafter(folder, *options, deep=(folder / "lora_D").is_dir())
    return replace(drafter, target=run_folder.run_settings(name).get("target", drafter.target))


def with_drafter(config: DVIConfig, model: KangarooModel) -> DVIConfig:
    """The settings of a run whose model has loaded a draft; those of a published adapter follow from it.

    Raises:
        DvirlError: if such an adapter has not the shape of its model, in which what a run trains is read again.
    """
    base = model.base_model.config
    adapter = model.adapter_model
    if adapter.config is base:
        return config
    for name in OF_BASE:
        own, expected = (getattr(shape, name) for shape in (adapter.config, base))
        if own != expected:
            raise DvirlError(
                f"{config.start_from}: {name} is {own}; expected the model's {expected} to train it"
            )
    return replace(
        config,
        drafter=adapter.kind,
        drafter_layers=len(adapter.layers),
        adapter_window=base.max_position_embeddings,  # it sees the whole text
    )


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
    with atomic_directory(folder) as scratch:
        peft_model.peft_config["lora_S"].base_model_name_or_path = loaded.name
        checkpoint.save_adapters(peft_model, scratch, ["lora_S"])
        weights = scratch / "lora_S/adapter_model.safetensors"
        save_file(_halved(load_file(weights)), weights, metadata={"format": "pt"})
        save_file(_halved(model.drafter_state()), scratch / checkpoint.DRAFTER)
        run_folder.write_config(scratch, config, loaded, made=made)


def _halved(tensors: Tensors) -> Tensors:
    """Floating-point tensors in bfloat16, others as they are."""
    floats = {name: tensor.bfloat16() for name, tensor in tensors.items() if tensor.is_floating_point()}
    return tensors | floats
