"""The folder of a run: its settings, its lock, and folders that appear whole or not at all."""

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from dvirl.config import ModelSettings
from dvirl.runs.errors import DvirlError
from dvirl.runs.log import write_text
from dvirl.runs.settings import Settings, read_yaml

if TYPE_CHECKING:
    from dvirl.models.loading import LoadedModel


def environment() -> dict[str, Any]:
    """What a result depends on besides its settings: versions and machine."""
    packages = ("dvirl", "torch", "transformers", "peft", "tokenizers", "safetensors", "numpy")
    machine: dict[str, Any] = {"platform": platform.platform(), "cores": os.cpu_count()}
    if torch.cuda.is_available():
        machine["accelerator"] = torch.cuda.get_device_name()
    return {
        "versions": {"python": sys.version.split()[0], **{name: version(name) for name in packages}},
        "machine": machine,
    }


def provenance(loaded: "LoadedModel") -> dict[str, Any]:
    """What else a result depends on: the model's hash and how it was loaded, the versions, the machine."""
    return {
        "model": {
            "fingerprint": loaded.fingerprint,
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "device": str(loaded.model.device),
            "chat_format": loaded.chat.chat_format,
        },
        **environment(),
    }


def write_config(folder: Path, config: Settings, loaded: "LoadedModel", **more: Any) -> None:
    """Write `config.yaml`: every setting, the versions, the model's hash, what it runs on, and what else is given."""
    content = {"config": asdict(config), **provenance(loaded), **more}
    write_text(folder / "config.yaml", yaml.safe_dump(content, sort_keys=False))


def start_log(run_dir: Path, config: ModelSettings, loaded: "LoadedModel", new: bool = True) -> Path:
    """Write the `config.yaml` of a run, and return its `metrics.jsonl`, which is there from now on.

    Raises:
        DvirlError: if the run is a new one and another has been logged in this folder.
    """
    log = run_dir / "metrics.jsonl"
    if new and log.exists():
        raise DvirlError(f"run_dir {run_dir} already holds a run; choose another name, or remove it")
    write_config(run_dir, config, loaded)
    log.touch()
    return log


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Keep other processes out of a run's folder, and clear away what a killed one left half-written.

    Raises:
        DvirlError: if another process is at it; the message says which.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    lock, holder = FileLock(run_dir / ".lock", timeout=0), run_dir / ".holder"
    try:
        lock.acquire()
    except Timeout as error:
        raise DvirlError(f"{run_dir} is in use by {holder.read_text()}; wait for it, or choose another") from error
    try:
        write_text(holder, f"process {os.getpid()} on {platform.node()}")
        for left in (*run_dir.glob("checkpoints/.writing-*"), *run_dir.glob("checkpoints/.gone-*")):
            shutil.rmtree(left)
        yield
    finally:
        lock.release()


@contextmanager
def atomic_directory(folder: Path) -> Iterator[Path]:
    """A temporary folder to fill, which takes the place of `folder` at the end, or is gone if anything fails.

    Raises:
        DvirlError: if it cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".writing-") as scratch:
        filled = Path(scratch) / folder.name
        filled.mkdir()
        try:
            yield filled
            for path in (*filled.rglob("*"), filled):
                _flush(path)
        except (OSError, SafetensorError) as error:
            raise DvirlError(f"{folder}: could not be written ({error}); what was there before is whole") from error
        _discard(folder)
        os.replace(filled, folder)
        _flush(folder.parent)


def _flush(path: Path) -> None:
    """Have a file or folder on the disk."""
    number = os.open(path, os.O_RDONLY)
    os.fsync(number)
    os.close(number)


def _discard(folder: Path) -> None:
    """Remove a folder if it is there, never leaving a part of it under its name."""
    if folder.exists():
        gone = folder.with_name(f".gone-{folder.name}")
        os.replace(folder, gone)
        shutil.rmtree(gone)


def claim(run_dir: Path, config: Settings, loaded: "LoadedModel") -> None:
    """Write `config.yaml` into a new run folder, or see that a run that is to go on has the same settings.

    Raises:
        DvirlError: if the settings of the run there differ; the message names them.
    """
    path = run_dir / "config.yaml"
    if path.exists():
        refuse_other_settings(path, read_yaml(path).get("config", {}), asdict(config))
    write_config(run_dir, config, loaded)


def run_settings(run_dir: str | Path) -> dict[str, Any]:
    """The settings of a run, from its `config.yaml`.

    Raises:
        DvirlError: if the folder holds no run.
    """
    path = Path(run_dir) / "config.yaml"
    settings = read_yaml(path).get("config")
    if not isinstance(settings, dict):
        raise DvirlError(f"{path}: expected the settings of a run under 'config'")
    return settings


def refuse_other_settings(
    path: Path, before: Mapping[str, Any], now: Mapping[str, Any], instead: str = "choose another folder"
) -> None:
    """See that settings kept in a file are those of now; `instead` is what else to do.

    Raises:
        DvirlError: if they differ; the message names them.
    """
    if differ := [f"{name} ({before.get(name)!r}, now {now[name]!r})" for name in now if before.get(name) != now[name]]:
        raise DvirlError(f"{path}: the run there has other settings: {', '.join(differ)}; {instead}")
