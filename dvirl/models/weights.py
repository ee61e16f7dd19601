"""Reads a model's weight files: every tensor is there, of the right shape, and nothing is left random."""

import hashlib
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from dvirl.models.hf_config import read_json
from dvirl.runs.errors import DvirlError
from dvirl.runs.files import Tensors
from dvirl.runs.settings import has_type

FindFile = Callable[[str], str | None]
"""The path of one of a model's files by its name, None if the model does not have it."""
Stored = dict[str, Callable[[], Tensor]]
"""What reads each tensor, by the tensor's name."""
FILES = ("model.safetensors", "pytorch_model.bin")
"""Weights in one file; with `.index.json` after the name, the list of several files."""
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
COMPUTED = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
"""Tensors in older files that are computed and not learned."""
QUANTISED = re.compile(r"\.(qweight|qzeros|scales|g_idx|SCB|absmax|quant_\w+|weight_(packed|scale\w*))\b")
PREFIX = re.compile(r"(module|_orig_mod|base_model\.model)\.")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
UNREADABLE = (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, AttributeError)
"""What the libraries raise for damaged files."""


def load_weights(
    model: PreTrainedModel,
    find: FindFile,
    dtype: torch.dtype,
    device_of: Callable[[str], torch.device],
) -> str:
    """Fill a model that was made on the meta device, tensor by tensor, each straight onto its device.

    Args:
        model: whose parameters' names and shapes are expected.
        find: finds the files.
        dtype: of the model's parameters.
        device_of: the device of each parameter, by its name.

    Returns:
        The fingerprint: the sha256 of all tensors' names, shapes and bytes as stored, whatever the files or `dtype`.

    Raises:
        DvirlError: for a tensor that is missing, unexpected or mis-shaped, for quantised weights, or a damaged file.
    """
    expected = {name: parameter.shape for name, parameter in model.named_parameters()}
    stored = _open_all(find)
    _check_names(expected, stored, tied=model.config.tie_word_embeddings)
    filled: Tensors = {}

    def fill(name: str) -> str:
        tensor = stored[name]()
        found = f"{list(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"
        if tensor.shape != expected[name] or tensor.dtype not in DTYPES:
            raise DvirlError(f"tensor {name} is {found}; expected {list(expected[name])} of 16 or 32 bits")
        # A copy, so that the weights do not depend on the file that the tensor may still be mapped to.
        filled[name] = tensor.to(device_of(name), dtype, copy=True)
        _check_finite(name, filled[name])
        content = tensor.contiguous().view(torch.uint8).numpy().data
        return f"{name} {found} {hashlib.sha256(content).hexdigest()}\n"

    # Hashing and copying leave Python's lock, so threads share the work.
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as threads:
        lines = "".join(threads.map(fill, sorted(expected)))
    if HEAD not in expected and HEAD in stored and not torch.equal(stored[HEAD](), stored[EMBEDDING]()):
        raise DvirlError(f"config.json ties {HEAD} to {EMBEDDING}, but the files hold both, and they differ")
    model.load_state_dict(filled, strict=False, assign=True)
    model.tie_weights()
    return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"


def _check_finite(name: str, tensor: Tensor) -> None:
    """Refuse numbers that are none, or that the model's dtype cannot hold.

    Raises:
        DvirlError: with the tensor's name.
    """
    if not all(bound.isfinite() for bound in tensor.aminmax()):
        raise DvirlError(
            f"tensor {name} has numbers that are not finite in {str(tensor.dtype).removeprefix('torch.')}; "
            "expected finite ones"
        )


def _open_all(find: FindFile) -> Stored:
    """What reads each tensor, by the tensor's name.

    Raises:
        DvirlError: if there are no weights, or a file is missing or damaged.
    """
    for name in FILES:
        file = find(name)
        if file:
            return _open(file)
        index = find(f"{name}.index.json")
        if index:
            stored: Stored = {}
            places: Any = read_json(index).get("weight_map")
            if not has_type(places, dict[str, str]):
                raise DvirlError(f"{index}: weight_map is {places!r:.60}; expected the file of each tensor")
            for part in sorted(set(places.values())):
                part_file = find(part)
                if not part_file:
                    raise DvirlError(f"{part} is missing, which {Path(index).name} names")
                tensors = _open(part_file)
                twice = sorted(stored.keys() & tensors.keys())
                if twice:
                    raise DvirlError(
                        f"tensor {twice[0]} is in {part} and in a file before it; expected it once"
                    )
                stored |= tensors
            return stored
    raise DvirlError(f"no weights; expected {' or '.join(FILES)}, or their parts with an index")


def _open(file: str) -> Stored:
    """What reads each tensor of one file; nothing that a pickle asks for is run."""
    try:
        if file.endswith(".safetensors"):
            handle = safe_open(file, framework="pt")
            return {name: partial(handle.get_tensor, name) for name in handle.keys()}  # type: ignore[no-untyped-call]  # noqa: SIM118
        tensors = _unpickle(file)
        return {name: partial(tensors.__getitem__, name) for name in tensors}
    except UNREADABLE as error:
        raise DvirlError(
            f"{file}: not a readable file of tensors ({' '.join(str(error).split())!s:.200})"
        ) from error


def _unpickle(file: str) -> Tensors:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected pickle protocol", category=UserWarning)
        # torch before 1.6 wrote files that cannot be mapped.
        mapped = zipfile.is_zipfile(file)
        tensors: Tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    if not all(isinstance(value, Tensor) for value in tensors.values()):
        raise RuntimeError("expected tensors by their names")
    return tensors


def _check_names(expected: Mapping[str, object], stored: Mapping[str, object], tied: bool) -> None:
    """Compare the tensors' names.

    Raises:
        DvirlError: if one is missing or unexpected, with why as far as the names tell.
    """
    found = {name for name in stored if not COMPUTED.search(name)}
    if tied:
        found.discard(HEAD)
    missing = sorted(set(expected) - found)
    unexpected = sorted(found - set(expected))
    for name in unexpected:
        prefix = PREFIX.match(name)
        if QUANTISED.search(name):
            raise DvirlError(f"tensor {name} belongs to quantised weights; expected a model in 16 or 32 bits")
        if "lora_" in name:
            raise DvirlError(f"tensor {name} belongs to an adapter; expected a whole model, merged with it")
        if prefix:
            raise DvirlError(
                f"the tensors' names begin with {prefix[0]!r}, as in {name}; expected Hugging Face's names"
            )
    for kind, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            others = f", and {len(names) - 1} more" if len(names) > 1 else ""
            raise DvirlError(f"the weights do not fit config.json: tensor {names[0]} is {kind}{others}")
