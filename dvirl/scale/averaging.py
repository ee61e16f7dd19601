"""Federated averaging: what several clients trained becomes one adapter. `dvirl average-adapters`."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dvirl.runs.checkpoint import DRAFTER
from dvirl.runs.errors import DvirlError
from dvirl.runs.files import atomic_directory
from dvirl.runs.log import parse_line, read_text
from dvirl.runs.settings import MANY, Settings, command_line, positional, several

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
ADAPTER = (CONFIG, WEIGHTS)
"""Files of an adapter folder."""
CHECKPOINT = (f"lora_S/{CONFIG}", f"lora_S/{WEIGHTS}", DRAFTER)
"""Files that a checkpoint has at least."""
FILES = (*ADAPTER, *CHECKPOINT, f"lora_D/{CONFIG}", f"lora_D/{WEIGHTS}")
"""Files that are averaged if the folders have them."""
MAY_DIFFER = ("base_model_name_or_path", "revision")
"""Where each client found the base model: the only entries of an adapter's configuration that may differ."""


def average_adapters(folders: Sequence[str | Path], weights: Sequence[float] | None, out: str | Path) -> Path:
    """Average adapters factor by factor, in float32: FedAvg (arXiv 1602.05629) on A and on B.

    An adapter's update is B A, and the mean of the factors is not the mean of the products: mean(B) mean(A) differs
    from mean(B A) by how B and A vary together across clients. If all clients start a round from the same factors, the
    difference is of second order in what the round changes, so short rounds average well. Factors that started apart
    cannot be averaged, because a product determines its factors only up to an invertible r x r matrix.

    Args:
        folders: PEFT adapter folders, or checkpoints, of which all adapters and `drafter.safetensors` are averaged and
            nothing else is kept; all of one kind.
        weights: one a folder, above 0, for instance the tokens that each client trained on; None for equal ones.
        out: a folder to make, of the same kind; it appears whole or not at all.

    Returns:
        `out`. Integers (the draft vocabulary) and the first folder's configurations are copied.

    Raises:
        DvirlError: for adapters that differ in configuration, tensors or draft vocabulary, or unreadable ones.
    """
    paths = [Path(folder) for folder in folders]
    target = Path(out)
    values = [1.0] * len(paths) if weights is None else list(weights)
    if not paths or len(values) != len(paths) or not all(0 < value < math.inf for value in values):
        raise DvirlError(
            f"the weights are {values}; expected a number above 0 for each of {len(paths)} folders"
        )
    if target.exists():
        raise DvirlError(f"{target} exists already; choose another name, or remove it")
    shares = [value / sum(values) for value in values]
    names = _common_files(paths)
    with atomic_directory(target) as scratch:
        for name in names:
            file = scratch / name
            file.parent.mkdir(exist_ok=True)
            mean = _mean([path / name for path in paths], shares)
            if name.endswith(".json"):
                file.write_text(json.dumps(mean, indent=2) + "\n")
            else:
                save_file(mean, file, metadata={"format": "pt"})
    return target


def _common_files(paths: Sequence[Path]) -> list[str]:
    """The files to average, which are the same in all folders."""
    first = _files(paths[0])
    if not any(set(kind) <= set(first) for kind in (ADAPTER, CHECKPOINT)):
        raise DvirlError(
            f"{paths[0]}: expected {CONFIG} and {WEIGHTS}, or a checkpoint with lora_S/ and {DRAFTER}"
        )
    for path in paths:
        names = _files(path)
        if names != first:
            raise DvirlError(
                f"{path}: holds {', '.join(names) or 'none'}; expected {', '.join(first)} as in {paths[0]}"
            )
    return first


def _files(folder: Path) -> list[str]:
    return [name for name in FILES if (folder / name).exists()]


def _mean(files: Sequence[Path], shares: Sequence[float]) -> dict[str, Any]:
    """The weighted mean of the files' float tensors; all else must be equal. One file is in memory at a time."""
    mean: dict[str, Any] = {}
    first: dict[str, Any] = {}
    for file, share in zip(files, shares, strict=True):
        content = _read(file)
        layout = {key: _comparable(value) for key, value in content.items() if key not in MAY_DIFFER}
        first = first or layout
        for key in sorted({*layout, *first}):
            value = layout.get(key, "missing")
            expected = first.get(key, "missing")
            if value != expected:
                raise DvirlError(
                    f"{file}: {key} is {str(value)[:80]}; expected {str(expected)[:80]} as in {files[0]}"
                )
        for key, value in content.items():
            if _is_float(value):
                mean[key] = mean.get(key, 0.0) + share * value.float()
            else:
                mean.setdefault(key, value)
    return mean


def _comparable(value: Any) -> Any:
    """What must be equal: type and shape of a float tensor, values of another one, members of a list in any order."""
    if _is_float(value):
        return f"{value.dtype} {list(value.shape)}"
    if isinstance(value, Tensor):
        return value.tolist()
    return sorted(value, key=str) if isinstance(value, list) else value


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _read(file: Path) -> dict[str, Any]:
    """The entries of a configuration, or tensors by name, whose floats must be finite."""
    try:
        content = parse_line(file.name, read_text(file), dict) if file.suffix == ".json" else load_file(file)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise DvirlError(f"{file}: unreadable ({error})") from error
    for name, value in content.items():
        if _is_float(value) and not bool(value.float().isfinite().all()):
            raise DvirlError(f"{file}: {name} holds numbers that are not finite")
    return dict(content)


@dataclass(frozen=True)
class AverageConfig(Settings):
    """What to average, and the weights of the average."""

    out: str = positional()
    """Folder to make."""
    folders: list[str] = several(positional=True)
    """Adapter folders or checkpoints, all of one kind."""
    tokens: list[int] = several(limits=(0, MANY))
    """Tokens that each was trained on, which are its weight; all are equal by default."""


parse_args = command_line(AverageConfig, "dvirl average-adapters", "Average the adapters of clients.")
"""Settings from the command line; see `settings.parse_args`."""


def main(config: AverageConfig) -> None:
    """Average the folders and print where the result is."""
    print(average_adapters(config.folders, config.tokens or None, config.out))
