"""Models by name: the embedded default, a local folder, or the hub id of any Llama."""

import hashlib
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, PreTrainedTokenizerFast
from transformers.utils.hub import cached_file, extract_commit_hash

from dvirl.models.chat import ChatEncoder, detect_format
from dvirl.models.embedded import EMBEDDED, ensure_embedded
from dvirl.runs.errors import DvirlError
from kangaroo.earlyexit import EarlyExitLlamaForCausalLM

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_MODEL = "smollm2-135m"
TEXTS = ("bos_token", "eos_token", "unk_token", "pad_token", "chat_template")
"""Entries that are taken from a model's `tokenizer_config.json`."""


@dataclass(frozen=True)
class LoadedModel:
    """A model with all that belongs to it.

    Attributes:
        model: frozen, in evaluation mode.
        tokenizer: Hugging Face's.
        chat: encodes conversations.
        eos_ids: tokens that end a response.
        name: as asked for.
        fingerprint: sha256 of the weight files, or the hub's commit.
    """

    model: EarlyExitLlamaForCausalLM
    tokenizer: Any
    chat: ChatEncoder
    eos_ids: tuple[int, ...]
    name: str
    fingerprint: str

    def description(self) -> dict[str, str]:
        """What results say of it: fingerprint, dtype, device and chat format."""
        return {
            "fingerprint": self.fingerprint,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": str(self.model.device),
            "chat_format": self.chat.chat_format,
        }


def resolve_device(device: str = "auto") -> torch.device:
    """`auto` is CUDA if there is a device.

    Raises:
        DvirlError: for a device that is not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise DvirlError(f"device is {device!r}; expected auto, cpu or cuda") from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise DvirlError(f"device is {device!r}, but this machine has no CUDA device")
    return resolved


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 if the hardware computes it fast, else float32.

    Raises:
        DvirlError: for an unknown name.
    """
    if dtype != "auto":
        if dtype not in DTYPES:
            raise DvirlError(f"dtype is {dtype!r}; expected auto, {', '.join(DTYPES)}")
        return DTYPES[dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def source(name_or_path: str) -> str:
    """The name by which Hugging Face's loaders find a model: its own, or the folder of an embedded one."""
    return str(ensure_embedded(name_or_path)) if name_or_path in EMBEDDED else name_or_path


def load(
    name_or_path: str = DEFAULT_MODEL, dtype: str = "auto", device: str = "auto", chat_format: str = "auto"
) -> LoadedModel:
    """Load a Llama-architecture model for drafting and verifying.

    Args:
        name_or_path: "smollm2-135m" (fetched once), a local Hugging Face folder, or a hub id.
        dtype: auto, float32, bfloat16 or float16.
        device: auto, cpu, cuda, cuda:1, …
        chat_format: auto, chatml, vicuna, llama-2 or none.

    Raises:
        DvirlError: for another architecture, a missing file, no network, a wrong hash or a full disk.
    """
    where = resolve_device(device)
    torch_dtype = resolve_dtype(dtype, where)
    path = source(name_or_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*resume_download.*", category=FutureWarning)
        try:
            config = _config(path)
            tokenizer = _tokenizer(path)
            model = EarlyExitLlamaForCausalLM.from_pretrained(path, config=config, torch_dtype=torch_dtype)
        except DvirlError as error:
            raise DvirlError(f"{name_or_path}: {error}") from error
        except (
            Exception
        ) as error:  # transformers raises a dozen kinds of error that mean the same to the user
            raise DvirlError(
                f"could not load the model {name_or_path!r}: {' '.join(str(error).split())}"
            ) from error
    model = model.to(where).requires_grad_(False).eval()
    if where.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # its attention takes 30 ms to plan each new shape
    if chat_format == "auto":
        chat_format = detect_format(tokenizer, name_or_path)
    chat = ChatEncoder(tokenizer, chat_format)
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    eos_ids = tuple(int(token) for token in ends if token is not None)
    return LoadedModel(model, tokenizer, chat, eos_ids, name_or_path, _fingerprint(path, config))


def _config(path: str) -> LlamaConfig:
    """The model's `config.json`, which cannot ask for code here.

    Raises:
        DvirlError: for another architecture, or a folder that refers to other weights than its own.
    """
    file = cached_file(path, "config.json")
    values = json.loads(Path(file).read_text(encoding="utf-8"))
    if values.get("model_type") != "llama":
        raise DvirlError(f"architecture is {values.get('model_type')!r}, expected 'llama'")
    if _cached(path, "adapter_config.json"):
        raise DvirlError("an adapter_config.json is there; expected a whole model, with no adapter beside it")
    config: LlamaConfig = LlamaConfig.from_dict({**values, "_commit_hash": extract_commit_hash(file, None)})
    return config


def _tokenizer(path: str) -> PreTrainedTokenizerFast:
    """The tokenizer of `tokenizer.json`, with some texts of `tokenizer_config.json`; no class that it names is run.

    Raises:
        DvirlError: if there is no `tokenizer.json`.
    """
    file = _cached(path, "tokenizer.json")
    if not file:
        raise DvirlError("no tokenizer.json; expected a model with a fast tokenizer")
    config_file = _cached(path, "tokenizer_config.json")
    entries = json.loads(Path(config_file).read_text(encoding="utf-8")) if config_file else {}
    texts = {}
    for name in TEXTS:
        entry = entries.get(name)
        text = entry.get("content") if isinstance(entry, dict) else entry
        if isinstance(text, str):
            texts[name] = text
    return PreTrainedTokenizerFast(tokenizer_file=file, clean_up_tokenization_spaces=False, **texts)


def _cached(path: str, name: str) -> str | None:
    """The path of a file of a model, None if the model does not have it."""
    file: str | None = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
    return file


def _fingerprint(path: str, config: Any) -> str:
    folder = Path(path)
    if not folder.is_dir():
        return f"commit:{getattr(config, '_commit_hash', None)}"
    digest = hashlib.sha256()
    for weights in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        with weights.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return f"sha256:{digest.hexdigest()}"
