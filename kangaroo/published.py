"""Reads an adapter in the layout of the published Kangaroo: a folder of `config.json` and one file of weights."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig

from kangaroo.adapter import AdapterModel

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
_NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads")
_FIELDS = (
    *_NEEDED,
    "num_key_value_heads",
    "rms_norm_eps",
    "max_position_embeddings",
)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def is_whole_model(folder: Path) -> bool:
    """Whether a folder is that of a whole model in Hugging Face's layout: it has a tokenizer, which no adapter has."""
    return (folder / "config.json").exists() and any((folder / name).exists() for name in TOKENIZERS)


def is_published(folder: Path) -> bool:
    """Whether a folder has the files of the published layout."""
    if is_whole_model(folder):
        return False
    return (folder / "config.json").exists() and any((folder / name).exists() for name in WEIGHTS)


def read_published(folder: Path, hidden_size: int) -> AdapterModel:
    """The adapter in `folder`, float32 on the CPU: full attention; heads, epsilon and rope as its own config says.

    The published code itself computes with a rope base of 10000 whatever the config says; it ships configs without
    `rope_theta`, which mean 10000 here too.

    Args:
        folder: holds `config.json`, and `model.safetensors` or else `pytorch_model.bin`.
        hidden_size: D of the base model.

    Raises:
        ValueError: if a file is missing or unreadable, or something in it does not fit.
    """
    if not (folder / "config.json").exists():
        raise ValueError(
            f"{folder}: neither drafter.safetensors nor a published adapter's config.json is there"
        )
    path = next((folder / name for name in WEIGHTS if (folder / name).exists()), None)
    if path is None:
        raise ValueError(f"{folder}: the adapter's weights are missing; expected {' or '.join(WEIGHTS)}")
    state = _read_tensors(path)
    adapter = _build(folder / "config.json", hidden_size, len(state))
    expected = adapter.state_dict()
    different = sorted(expected.keys() ^ state.keys())
    if different:
        name = different[0]
        problem = "missing" if name in expected else "foreign to a Kangaroo adapter"
        raise ValueError(f"{path}: tensor {name} is {problem}")
    for name, value in expected.items():
        if state[name].shape != value.shape:
            raise ValueError(f"{path}: {name} is {list(state[name].shape)}, expected {list(value.shape)}")
    adapter.load_state_dict(state)
    return adapter


def _build(path: Path, hidden_size: int, most: int) -> AdapterModel:
    """An adapter of the shape that the config at `path` gives, its weights still random; of `most` layers at most."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        config = LlamaConfig(**{name: raw[name] for name in _FIELDS if name in _NEEDED or name in raw})
        # Newer files have all that concerns positions in one place.
        positions = {
            "rope_theta": raw.get("rope_theta", config.rope_theta),
            **(raw.get("rope_parameters") or {}),
        }
        config.rope_theta = float(positions.pop("rope_theta"))
        config.rope_scaling = raw.get("rope_scaling") or positions or None
        for name, usual in (("partial_rotary_factor", 1), ("sliding_window", None)):
            if raw.get(name) not in (None, usual):
                raise ValueError(f"{name} is {raw[name]!r}, which is not computed here")
        if config.hidden_size != hidden_size:
            raise ValueError(f"its hidden_size is {config.hidden_size}, the base model's {hidden_size}")
        heads = config.num_attention_heads
        groups = config.num_key_value_heads
        config.rms_norm_eps = float(config.rms_norm_eps)
        # So many positions are tabulated at first; the table grows on demand.
        config.max_position_embeddings = min(config.max_position_embeddings, 2**17)
        if config.num_hidden_layers > most:
            raise ValueError(f"{config.num_hidden_layers} layers, but {most} tensors in all")
        if hidden_size % (2 * heads) or heads % groups:
            raise ValueError(
                f"{heads} query and {groups} key/value heads do not split a hidden_size of {hidden_size}"
            )
        return AdapterModel(config, "adapter", None, config.num_hidden_layers)
    except KeyError as error:
        raise ValueError(f"{path}: {error.args[0]} is missing") from error
    except Exception as error:  # values that LlamaConfig takes unseen can raise anything
        raise ValueError(
            f"{path}: not the config of a Kangaroo adapter for this model ({error!s:.300})"
        ) from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors by name, rotary tables of older transformers left out; nothing that a pickle asks for is run."""
    try:
        tensors = path.suffix == ".safetensors"
        state = load_file(path) if tensors else torch.load(path, map_location="cpu", weights_only=True)
        if not all(isinstance(value, Tensor) and value.dtype in _DTYPES for value in state.values()):
            raise TypeError("a value is not a floating-point tensor")
        if not all(value.isfinite().all() for value in state.values()):
            raise TypeError("a number is not finite")
        return {name: value for name, value in state.items() if not name.endswith("rotary_emb.inv_freq")}
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(
            f"{path}: unreadable, or more than a plain dict of finite tensors in 16 or 32 bits"
        ) from error
