"""Files and folders that appear whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from dvirl.runs.errors import DvirlError

Tensors = dict[str, Tensor]
"""Tensors by their names, as a file of safetensors holds them."""
ASIDE = ".aside-"
"""How the name of a folder begins that lies aside."""


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary file to write. At the end it replaces `path` in one step; if anything fails, it is removed.

    Raises:
        DvirlError: if it, or its folder where there is none, cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as scratch:
            written = Path(scratch) / path.name
            yield written
            flush(written)
            os.replace(written, path)
        flush(path.parent)
    except (OSError, SafetensorError) as error:
        raise DvirlError(f"{path}: could not be written ({error}); what was there before is whole") from error


@contextmanager
def atomic_directory(folder: Path) -> Iterator[Path]:
    """A temporary folder to fill, which replaces `folder` as `atomic_file` does a file.

    Two folders cannot change places in one step: for a moment the old one lies aside, and `bring_back` knows of it.
    """
    aside = folder.with_name(f"{ASIDE}{folder.name}")
    try:
        with atomic_file(folder) as scratch:
            scratch.mkdir()
            yield scratch
            for path in scratch.rglob("*"):
                flush(path)
            if folder.exists():
                os.replace(folder, aside)
    finally:
        bring_back(aside)


def bring_back(aside: Path) -> None:
    """Put a folder that lies aside in its place again, or remove it if another one has taken that."""
    folder = aside.with_name(aside.name.removeprefix(ASIDE))
    if aside.exists() and not folder.exists():
        os.replace(aside, folder)
    elif aside.exists():
        shutil.rmtree(aside)


def flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def discard(folder: Path) -> None:
    """Remove a folder if it exists. It is renamed first, so that no part of it is ever left under its name."""
    if folder.exists():
        doomed = folder.with_name(f".gone-{folder.name}")
        os.replace(folder, doomed)
        shutil.rmtree(doomed)
