"""The folder of a run: its settings, what they depend on, and its lock."""

import hashlib
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from filelock import FileLock, Timeout

from dvirl.runs.errors import DvirlError
from dvirl.runs.files import ASIDE, bring_back
from dvirl.runs.log import write_text
from dvirl.runs.settings import Settings, Values, defaults, read_yaml

PACKAGES = ("dvirl", "torch", "transformers", "peft", "tokenizers", "safetensors", "numpy")
"""Packages whose versions a result depends on."""


class Describable(Protocol):
    """A model that says what it is: a `dvirl.models.loading.LoadedModel`."""

    def description(self) -> dict[str, str]:
        """Its fingerprint, and how it was loaded."""


def environment() -> dict[str, Any]:
    """What a result depends on besides its settings: date, versions and machine."""
    machine = {"platform": platform.platform(), "cores": os.cpu_count()}
    if torch.cuda.is_available():
        machine["accelerator"] = torch.cuda.get_device_name()
    versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    return {"date": time.strftime("%Y-%m-%d"), "versions": versions, "machine": machine}


def provenance(loaded: Describable) -> dict[str, Any]:
    """What a result depends on besides its settings: the model, date, versions and machine."""
    return {"model": loaded.description(), **environment()}


def write_config(folder: Path, config: Settings, loaded: Describable, **more: Any) -> None:
    """Write `config.yaml`: every setting, the provenance, and `more`."""
    content = {"config": asdict(config), **provenance(loaded), **more}
    write_text(folder / "config.yaml", yaml.safe_dump(content, sort_keys=False))


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Keep other processes out of a run's folder, and mend what a killed process left half-done.

    Raises:
        DvirlError: if another process holds the lock; the message says which.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    holder = run_dir / ".holder"
    try:
        locked = FileLock(run_dir / ".lock", timeout=0).acquire()
    except Timeout as error:
        raise DvirlError(
            f"{run_dir} is in use by {holder.read_text()}; wait for it, or choose another"
        ) from error
    with locked:
        write_text(holder, f"process {os.getpid()} on {platform.node()}")
        for left in (*run_dir.glob("checkpoints/.writing-*"), *run_dir.glob("checkpoints/.gone-*")):
            shutil.rmtree(left)
        for left in run_dir.glob(f"checkpoints/{ASIDE}*"):
            bring_back(left)
        yield


def claim(run_dir: Path, config: Settings, loaded: Describable, **inputs: str) -> None:
    """Write `config.yaml` into a run folder; if a run is there already, it must have the same settings and inputs.

    Args:
        run_dir: the folder.
        config: the settings.
        loaded: the model.
        inputs: fingerprints of what files hold that the settings only name; a run that kept none takes any.

    Raises:
        DvirlError: if the settings or inputs of the run there differ; the message names them.
    """
    path = run_dir / "config.yaml"
    if path.exists():
        refuse_other_settings(path, defaults(config) | run_settings(run_dir), asdict(config))
        refuse_other_inputs(path, {"model": loaded.description()["fingerprint"], **inputs})
    write_config(run_dir, config, loaded, inputs=inputs)


def refuse_other_inputs(path: Path, now: Mapping[str, str], instead: str = "choose another folder") -> None:
    """Refuse to go on if what the settings only name has other content than when the run in `path` began.

    Args:
        path: the run's `config.yaml`; what it has no fingerprint of may be anything.
        now: fingerprints by name.
        instead: what the user can do about it, for the message.

    Raises:
        DvirlError: if it has; the message names what.
    """
    before = {"model": model_fingerprint(path), **_part(path, "inputs")}
    changed = [name for name in now if before.get(name) not in (None, now[name])]
    if changed:
        raise DvirlError(f"{path}: the content of {' and '.join(changed)} has changed since then; {instead}")


def _part(path: Path, name: str) -> Values:
    """What a `config.yaml` has under a name, if it is by names again."""
    part = read_yaml(path).get(name)
    return part if isinstance(part, dict) else {}


def model_fingerprint(path: Path) -> object:
    """The fingerprint of a run's model by its `config.yaml`; None if it has none."""
    return _part(path, "model").get("fingerprint")


def fingerprint(value: object) -> str:
    """The sha256 of how plain values are written: numbers, texts, and lists and dataclasses of these."""
    return hashlib.sha256(repr(value).encode()).hexdigest()


def run_settings(run_dir: str | Path) -> Values:
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
    path: Path, before: Values, now: Values, instead: str = "choose another folder"
) -> None:
    """Refuse to go on if the settings `before`, kept in a file, are not those of `now`.

    Args:
        path: the file, for the message.
        before, now: names and values.
        instead: what the user can do about it, for the message.

    Raises:
        DvirlError: if they differ; the message names them.
    """
    differ = [
        f"{name} ({before.get(name)!r}, now {now[name]!r})" for name in now if before.get(name) != now[name]
    ]
    if differ:
        raise DvirlError(f"{path}: the run there has other settings: {', '.join(differ)}; {instead}")
