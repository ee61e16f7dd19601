"""Federated averaging: what several clients trained becomes one adapter. `dvirl average-adapters`."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dvirl.runs import settings
from dvirl.runs.checkpoint import DRAFTER
from dvirl.runs.errors import DvirlError
from dvirl.runs.folder import atomic_directory
from dvirl.runs.log import parse_line, read_text
from dvirl.runs.settings import MANY, Settings, positional, several

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


PARTS = (*(f"{place}{name}" for place in ("", "lora_S/", "lora_D/") for name in (CONFIG, WEIGHTS)), DRAFTER)
"""Files that are averaged where the folders have them: an adapter folder's own, or a checkpoint's."""


CLIENTS_OWN = ("base_model_name_or_path", "revision")
"""What an adapter's configuration may say differently: where the client found the base model."""


def average_adapters(folders: Sequence[str | Path], weights: Sequence[float] | None, out: str | Path) -> Path:
    """Average adapters factor by factor, in float32: FedAvg (arXiv 1602.05629) on A and on B.

    An adapter's update is B A, and the mean of the factors is not the mean of the products: mean(B) mean(A) differs
    from mean(B A) by how B and A vary together across clients. Where all clients start a round from the same factors,
    that is of second order in what the round changes, so short rounds average well. Factors of separate beginnings
    mean nothing together, since a product determines its factors only up to an invertible r x r matrix.

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
    paths, target = [Path(folder) for folder in folders], Path(out)
    values = [1.0] * len(paths) if weights is None else list(weights)
    if not paths or len(values) != len(paths) or not all(0 < value < math.inf for value in values):
        raise DvirlError(f"the weights are {values}; expected a number above 0 for each of {len(paths)} folders")
    if target.exists():
        raise DvirlError(f"{target} exists already; choose another name, or remove it")
    parts = _common_parts(paths)
    with atomic_directory(target) as scratch:
        for part in parts:
            (scratch / part).parent.mkdir(exist_ok=True)
            mean = _mean([path / part for path in paths], [value / sum(values) for value in values])
            if part.endswith(".json"):
                (scratch / part).write_text(json.dumps(mean, indent=2) + "\n")
            else:
                save_file(mean, scratch / part, metadata={"format": "pt"})
    return target


def _common_parts(paths: Sequence[Path]) -> list[str]:
    """The files to average, which are the same in all folders."""
    held = [[part for part in PARTS if (path / part).exists()] for path in paths]
    if not ({CONFIG, WEIGHTS} <= {*held[0]} or {f"lora_S/{CONFIG}", f"lora_S/{WEIGHTS}", DRAFTER} <= {*held[0]}):
        raise DvirlError(f"{paths[0]}: expected {CONFIG} and {WEIGHTS}, or a checkpoint with lora_S/ and {DRAFTER}")
    for path, own in zip(paths, held, strict=True):
        if own != held[0]:
            there = ", ".join(own) or "none"
            raise DvirlError(f"{path}: holds {there}; expected {', '.join(held[0])} as in {paths[0]}")
    return held[0]


def _mean(files: Sequence[Path], shares: Sequence[float]) -> dict[str, Any]:
    """The weighted mean of the files' float tensors; all else must be equal. One client's are in memory at a time."""
    mean: dict[str, Any] = {}
    layout: dict[str, Any] = {}
    for file, share in zip(files, shares, strict=True):
        content = _read(file)
        own = {key: _comparable(value) for key, value in content.items() if key not in CLIENTS_OWN}
        layout = layout or own
        for key in sorted({*own, *layout}):
            value, expected = (side.get(key, "missing") for side in (own, layout))
            if value != expected:
                raise DvirlError(f"{file}: {key} is {str(value)[:80]}; expected {str(expected)[:80]} as in {files[0]}")
        for key, value in content.items():
            if _is_float(value):
                mean[key] = mean.get(key, 0.0) + share * value.float()
            else:
                mean.setdefault(key, value)
    return mean


def _comparable(value: Any) -> Any:
    """What must be equal: a float tensor's type and shape, another's values, a list's members in any order."""
    if _is_float(value):
        return f"{value.dtype} {list(value.shape)}"
    if isinstance(value, Tensor):
        return value.tolist()
    return sorted(value, key=str) if isinstance(value, list) else value


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _read(file: Path) -> dict[str, Any]:
    """A configuration, or tensors, whose floats must be finite."""
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
    """What to average, and by which weights."""

    out: str = positional()
    """Folder to make."""
    folders: list[str] = several(positional=True)
    """Adapter folders or checkpoints, all of one kind."""
    tokens: list[int] = several(limits=(0, MANY))
    """Tokens that each was trained on, which are its weight; all are equal by default."""


parse_args = partial(settings.parse_args, AverageConfig, "dvirl average-adapters", "Average the adapters of clients.")
"""Settings from the command line; see `settings.parse_args`."""


def main(config: AverageConfig) -> None:
    """Average the folders and print where the result is."""
    print(average_adapters(config.folders, config.tokens or None, config.out))
