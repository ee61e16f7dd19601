"""Checkpoints of a run, which appear whole or not at all: adapters, drafter, and the trainer's state."""

import hashlib
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dvirl.runs.errors import DvirlError, bad_input
from dvirl.runs.files import Tensors, atomic_directory, discard
from dvirl.runs.log import JsonObject, parse_line, read_text
from kangaroo.kangaroo_model import KangarooModel
from kangaroo.published import is_published, is_whole_model
from kangaroo.sgp_lora import get_peft_model_state_dict

State = dict[str, Any]
"""A trainer's, for a checkpoint: tensors under `tensors`, plain numbers under `numbers`."""
DRAFTER = "drafter.safetensors"
"""Weights of the drafter and the exit head, and the draft vocabulary."""
PORTABLE = (
    "base_model_name_or_path",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "peft_type",
    "r",
    "target_modules",
    "task_type",
)
"""Entries of an adapter's configuration that are not every PEFT's defaults; every PEFT knows them."""
MANIFEST = "manifest.json"
"""The checksum of every other file of a checkpoint."""


def prune(run_dir: Path, keep: int) -> None:
    """Remove all checkpoints of a run but the newest `keep` and the one with the best `score`."""
    folders = _checkpoints(run_dir)
    best = max(folders, key=_score)
    for folder in folders[:-keep]:
        if folder != best:
            discard(folder)


def _checkpoints(run_dir: str | Path) -> list[Path]:
    """The checkpoints of a run, the newest last."""
    folders = Path(run_dir, "checkpoints").glob("step-[0-9]*[0-9]")
    return sorted(folders, key=lambda folder: (len(folder.name), folder.name))


def _score(folder: Path) -> float:
    """The score that a trainer noted in its checkpoint; a damaged checkpoint has the worst one."""
    try:
        score = float(parse_line("", read_text(folder / "trainer.json"))["score"])
    except (ValueError, TypeError, KeyError, ArithmeticError):
        return -math.inf
    return -math.inf if math.isnan(score) else score


def _checksums(folder: Path) -> dict[str, str]:
    """The checksum of every file of a folder but the manifest, by its path inside."""
    checksums = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            checksums[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return checksums


def verify(folder: Path) -> None:
    """Check that the files of a checkpoint are those that were written.

    Raises:
        DvirlError: for a file that is missing, truncated or changed; the message names it.
    """
    try:
        manifest = {DRAFTER: "", **parse_line(MANIFEST, read_text(folder / MANIFEST), dict)}
        checksums = _checksums(folder)
    except (OSError, ValueError) as error:
        raise DvirlError(f"{folder}: no readable {MANIFEST} ({error}); not a complete checkpoint") from error
    for name, checksum in manifest.items():
        if checksums.get(name) != checksum:
            wrong = "is not what was written, cut off or changed" if name in checksums else "is missing"
            raise DvirlError(
                f"{folder / ' '.join(name.split())} {wrong}; remove {folder} to go on from the one before"
            )


def seed_all(seed: int) -> None:
    """Seed every global random generator."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> State:
    """The state of every global random generator: tensors under `tensors`, other values under `numbers`."""
    tensors = {"rng.torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    name, keys, *rest = np.random.get_state(legacy=True)
    numbers = {"python": random.getstate(), "numpy": [name, np.asarray(keys).tolist(), *rest]}
    return {"tensors": tensors, "numbers": numbers}


def set_random_state(tensors: Tensors, numbers: JsonObject) -> None:
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


def save(run_dir: Path, step: int, peft_model: PeftModel, model: KangarooModel, state: State) -> Path:
    """Write `checkpoints/step-…`, whole or not at all.

    Args:
        run_dir: the run's folder.
        step: updates so far.
        peft_model: its adapters are saved as plain PEFT folders.
        model: its drafter goes into `drafter.safetensors`.
        state: the trainer's, tensors and numbers.
    """
    folder = step_folder(run_dir, step)
    with atomic_directory(folder) as scratch:
        save_adapters(peft_model, scratch)
        save_file(model.drafter_state(), scratch / DRAFTER)
        tensors = {key: value.contiguous() for key, value in state["tensors"].items()}
        save_file(tensors, scratch / "trainer.safetensors")
        (scratch / "trainer.json").write_text(json.dumps(state["numbers"], indent=1) + "\n")
        (scratch / MANIFEST).write_text(json.dumps(_checksums(scratch), indent=1) + "\n")
    return folder


def load(folder: Path, peft_model: PeftModel, model: KangarooModel) -> State:
    """Load the weights of a checkpoint in place, and return the trainer's state.

    Raises:
        DvirlError: if a part is missing, unreadable, or does not fit the model.
    """
    _refuse_missing(folder, ["trainer.safetensors", "trainer.json", MANIFEST])
    load_weights(folder, peft_model, model, list(peft_model.peft_config))
    try:
        tensors = load_file(folder / "trainer.safetensors", device=str(model.head_model.weight.device))
    except (SafetensorError, OSError) as error:
        raise DvirlError(f"{folder}: unreadable checkpoint ({error!s:.300})") from error
    for name, value in tensors.items():
        if "hidden" in name:  # states, of a run that may have had another dtype
            tensors[name] = value.to(model.base_model.dtype)
    numbers = parse_line(str(folder / "trainer.json"), read_text(folder / "trainer.json"), dict)
    return {"tensors": tensors, "numbers": numbers}


def load_weights(
    folder: Path,
    peft_model: PeftModel,
    model: KangarooModel,
    adapters: Sequence[str],
    to_start: bool = False,
) -> None:
    """Load some adapters and the drafter of a checkpoint, or of a folder that ships a drafter, in place.

    What drafts is lora_S and the drafter; lora_D makes another verifier.

    A published Kangaroo adapter is all that its folder holds; it becomes the model's drafter as it is. `to_start` is
    for `KangarooModel.load_drafter`.

    Raises:
        DvirlError: if a part is missing, unreadable, or does not fit the model.
    """
    if is_whole_model(folder):
        raise DvirlError(f"{folder}: a whole model drafts as it is; expected a drafter, to go on from")
    if is_published(folder):
        adapters = []
    else:
        _refuse_missing(folder, [*adapters, DRAFTER])
    if (folder / MANIFEST).exists():  # what ships has none
        verify(folder)
    try:
        with bad_input():
            for name in adapters:
                _load_adapter(folder / name, peft_model, name)
            model.load_drafter(folder, to_start)
    except (SafetensorError, OSError, IndexError, RuntimeError) as error:
        raise DvirlError(f"{folder}: unreadable checkpoint ({error!s:.300})") from error


def _refuse_missing(folder: Path, names: Sequence[str]) -> None:
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise DvirlError(f"{folder}: not a complete checkpoint, {', '.join(missing)} missing")


def _load_adapter(folder: Path, peft_model: PeftModel, name: str) -> None:
    state: Tensors = load_file(folder / "adapter_model.safetensors")
    expected = get_peft_model_state_dict(peft_model, adapter_name=name)
    if _layout(state) != _layout(expected):
        raise DvirlError(f"{folder}: the adapter does not fit this model, exit layer and rank")
    set_peft_model_state_dict(peft_model, state, adapter_name=name)


def _layout(state: Tensors) -> dict[str, tuple[torch.Size, bool]]:
    return {name: (tensor.shape, tensor.is_complex()) for name, tensor in state.items()}


def save_adapters(peft_model: PeftModel, folder: Path, names: list[str] | None = None) -> None:
    """Write all or some adapters as PEFT folders that any PEFT reads, and that hold no path of this machine."""
    # PEFT's own `save_pretrained` writes a model card, too, which takes longer than all the rest.
    for name in names or peft_model.peft_config:
        own = folder / name
        own.mkdir(parents=True)
        state = get_peft_model_state_dict(peft_model, adapter_name=name)
        save_file(state, own / "adapter_model.safetensors", metadata={"format": "pt"})
        values = peft_model.peft_config[name].to_dict()
        # PEFT refuses entries that it does not know, and every release knows others.
        portable = {entry: values[entry] for entry in PORTABLE}
        portable["base_model_name_or_path"] = (
            values["base_model_name_or_path"] or peft_model.base_model.model.name_or_path
        )
        portable["inference_mode"] = True
        portable["target_modules"] = sorted(portable["target_modules"])  # PEFT's is a set, in any order
        (own / "adapter_config.json").write_text(json.dumps(portable, indent=2) + "\n")


def newest(run_dir: str | Path) -> Path:
    """The newest complete checkpoint of a run.

    Raises:
        DvirlError: if there is none.
    """
    folders = _checkpoints(run_dir)
    if not folders:
        raise DvirlError(f"{run_dir}: no checkpoint there; expected checkpoints/step-…")
    return folders[-1]
