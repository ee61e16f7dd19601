"""A run on disk: config.yaml once, and checkpoints that appear whole or not at all."""

import hashlib
import json
import math
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dvirl.config import ModelSettings
from dvirl.runs.errors import DvirlError
from dvirl.runs.folder import _discard, atomic_directory, write_config
from dvirl.runs.log import parse_line, read_text
from kangaroo.kangaroo_model import KangarooModel
from kangaroo.sgp_lora import get_peft_model_state_dict

if TYPE_CHECKING:
    from dvirl.models.loading import LoadedModel

DRAFTER = "drafter.safetensors"


STATE = ("trainer.safetensors", "trainer.json")


MANIFEST = "manifest.json"


def prune(run_dir: Path, keep: int) -> None:
    """Remove all checkpoints of a run but the newest `keep` and the one of the best `score`."""
    folders = _checkpoints(run_dir)
    best = max(folders, key=_score)
    for folder in folders[:-keep]:
        if folder != best:
            _discard(folder)


def _checkpoints(run_dir: str | Path) -> list[Path]:
    """The checkpoints of a run, the newest last."""
    found = Path(run_dir, "checkpoints").glob("step-[0-9]*[0-9]")
    return sorted(found, key=lambda folder: (len(folder.name), folder.name))


def _score(folder: Path) -> float:
    """What a checkpoint says of its run; a damaged one is the worst."""
    try:
        return max(-math.inf, float(parse_line("", read_text(folder / "trainer.json"))["score"]))  # not NaN
    except (ValueError, TypeError, KeyError, ArithmeticError):
        return -math.inf


def _sums(folder: Path) -> dict[str, str]:
    """The checksum of every file of a folder, by its path inside."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def verify(folder: Path) -> None:
    """See that a checkpoint holds what was written.

    Raises:
        DvirlError: for a file that is missing, truncated or changed; the message names it.
    """
    try:
        manifest = {DRAFTER: "", **parse_line(MANIFEST, read_text(folder / MANIFEST), dict)}
        now = _sums(folder)
    except (OSError, ValueError) as error:
        raise DvirlError(f"{folder}: no readable {MANIFEST} ({error}); not a complete checkpoint") from error
    for name, checksum in manifest.items():
        if now.get(name) != checksum:
            wrong = "is missing" if name not in now else "is not what was written, cut off or changed"
            raise DvirlError(f"{folder / ' '.join(name.split())} {wrong}; remove {folder} to go on from the one before")


def seed_all(seed: int) -> None:
    """Seed every global random generator."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """The state of every global random generator: tensors under `tensors`, plain numbers under `numbers`."""
    tensors = {"rng.torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "tensors": tensors,
        "numbers": {"python": random.getstate(), "numpy": [name, np.asarray(keys).tolist(), *rest]},
    }


def set_random_state(tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    """Restore what `random_state` gave."""
    torch.set_rng_state(tensors["rng.torch"].cpu())
    if torch.cuda.is_available() and "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"].cpu())
    version, inner, gauss = numbers["python"]
    random.setstate((version, tuple(inner), gauss))
    np.random.set_state(tuple(numbers["numpy"]))


def step_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step is written."""
    return run_dir / "checkpoints" / f"step-{step:06d}"


def save(
    run_dir: Path, step: int, peft_model: PeftModel, model: KangarooModel, state: dict[str, Any] | None = None
) -> Path:
    """Write `checkpoints/step-…`, whole or not at all.

    Args:
        run_dir: the run's folder.
        step: updates so far.
        peft_model: its adapters are saved as plain PEFT folders.
        model: its drafter goes into `drafter.safetensors`.
        state: the trainer's, tensors and numbers; None for weights alone.
    """
    folder = step_folder(run_dir, step)
    with atomic_directory(folder) as scratch:
        _save_adapters(peft_model, scratch)
        save_file(model.drafter_state(), scratch / DRAFTER)
        if state is not None:
            tensors = {key: value.contiguous() for key, value in state["tensors"].items()}
            save_file(tensors, scratch / "trainer.safetensors")
            (scratch / "trainer.json").write_text(json.dumps(state["numbers"], indent=1) + "\n")
        (scratch / MANIFEST).write_text(json.dumps(_sums(scratch), indent=1) + "\n")
    return folder


def load(folder: Path, peft_model: PeftModel, model: KangarooModel, draft_only: bool = False) -> dict[str, Any]:
    """Load the weights of a checkpoint in place, and return the trainer's state.

    With `draft_only`, what drafts is loaded, lora_S and drafter, from any checkpoint, and no state is returned.

    Raises:
        DvirlError: if a part is missing, unreadable, or does not fit the model.
    """
    adapters = ["lora_S"] if draft_only else list(peft_model.peft_config)
    missing = [name for name in (*adapters, DRAFTER, *(() if draft_only else STATE)) if not (folder / name).exists()]
    if missing:
        raise DvirlError(f"{folder}: not a complete checkpoint, {', '.join(missing)} missing")
    if not draft_only or (folder / MANIFEST).exists():
        verify(folder)
    device = model.head_model.weight.device
    try:
        for name in adapters:
            _load_adapter(folder / name, peft_model, name)
        model.load_drafter(folder)
        if draft_only:
            return {}
        tensors = load_file(folder / "trainer.safetensors", device=str(device))
        numbers = parse_line(str(folder / "trainer.json"), read_text(folder / "trainer.json"), dict)
    except (SafetensorError, OSError, IndexError, RuntimeError) as error:
        raise DvirlError(f"{folder}: unreadable checkpoint ({error!s:.300})") from error
    except ValueError as error:
        raise DvirlError(str(error)) from error
    return {"tensors": tensors, "numbers": numbers}


def export(
    folder: Path, peft_model: PeftModel, model: KangarooModel, config: ModelSettings, loaded: "LoadedModel", **made: Any
) -> None:
    """Write a drafter to ship, in bfloat16, whole or not at all: `lora_S/`, `drafter.safetensors`, `config.yaml`.

    Args:
        folder: where; `models.load_drafter` reads it.
        peft_model, model: hold lora_S and the drafter.
        config: of the run that made it.
        loaded: the model that it drafts for.
        made: how it was made and what it reached, plain numbers and text.
    """
    with atomic_directory(folder) as scratch:
        _save_adapters(peft_model, scratch, ["lora_S"])
        weights, about = (scratch / "lora_S" / f"adapter_{name}" for name in ("model.safetensors", "config.json"))
        save_file(_halved(load_file(weights)), weights, metadata={"format": "pt"})
        described = {**json.loads(about.read_text()), "base_model_name_or_path": loaded.name}  # not a path of here
        about.write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")
        save_file(_halved(model.drafter_state()), scratch / DRAFTER)
        write_config(scratch, config, loaded, made=made)


def _save_adapters(peft_model: PeftModel, folder: Path, names: list[str] | None = None) -> None:
    """Write all or some adapters as plain PEFT folders, without PEFT's empty model card."""
    how = {"selected_adapters": names, "safe_serialization": True, "save_embedding_layers": False}
    peft_model.save_pretrained(folder, **how)
    (folder / "README.md").unlink(missing_ok=True)


def _halved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Floating-point tensors in bfloat16, others as they are."""
    return {key: value.to(torch.bfloat16) if value.is_floating_point() else value for key, value in tensors.items()}


def _load_adapter(folder: Path, peft_model: PeftModel, name: str) -> None:
    state: dict[str, Tensor] = load_file(folder / "adapter_model.safetensors")
    own = get_peft_model_state_dict(peft_model, adapter_name=name)
    if {k: (v.shape, v.is_complex()) for k, v in state.items()} != {k: (v.shape, False) for k, v in own.items()}:
        raise DvirlError(f"{folder}: the adapter does not fit this model, exit layer and rank")
    set_peft_model_state_dict(peft_model, state, adapter_name=name)


def newest(run_dir: str | Path) -> Path:
    """The newest complete checkpoint of a run.

    Raises:
        DvirlError: if there is none.
    """
    if not (folders := _checkpoints(run_dir)):
        raise DvirlError(f"{run_dir}: no checkpoint there; expected checkpoints/step-…")
    return folders[-1]
