"""Models by name: the embedded default, a local folder, or the hub id of any Llama."""

import sys
import warnings
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig
from transformers.utils.hub import cached_file

from dvirl.models.chat import ChatEncoder, detect_format
from dvirl.models.embedded import EMBEDDED, ensure_embedded
from dvirl.models.hf_config import read_config, read_json
from dvirl.models.placement import BALANCED, placement
from dvirl.models.tokenizers import load_tokenizer
from dvirl.models.weights import FindFile, load_weights
from dvirl.runs.errors import PANIC, DvirlError
from dvirl.runs.settings import ModelSettings, has_type
from kangaroo.earlyexit import EarlyExitLlamaForCausalLM

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_MODEL = "smollm2-135m"
CHANGES_ANSWERS: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty"), (None, 1)),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), (None, 0)),
    **dict.fromkeys(("min_length", "min_new_tokens"), (None, 0)),
    **dict.fromkeys(
        ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias"), (None, [], {})
    ),
    **dict.fromkeys(
        ("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"), (None,)
    ),
    **dict.fromkeys(("watermarking_config", "penalty_alpha", "dola_layers"), (None,)),
    **dict.fromkeys(("num_beams", "guidance_scale"), (None, 1)),
}
"""Settings by which `generate` chooses other greedy tokens than the model's, and the values that switch them off."""
POINTER = b"version https://git-lfs"
"""How a file begins that git-lfs has not fetched."""


@dataclass(frozen=True)
class LoadedModel:
    """A model with all that belongs to it.

    Attributes:
        model: frozen, in evaluation mode.
        tokenizer: Hugging Face's.
        chat: encodes conversations.
        eos_ids: tokens that end a response.
        name: as asked for.
        fingerprint: sha256 of the weights as stored, see `load_weights`.
    """

    model: EarlyExitLlamaForCausalLM
    tokenizer: Any
    chat: ChatEncoder
    eos_ids: tuple[int, ...]
    name: str
    fingerprint: str

    @property
    def response_end(self) -> tuple[int, ...]:
        """The token that ends a response to be learned: that of the chat format, else the first of `eos_ids`."""
        end = self.chat.turn_end
        return self.eos_ids[:1] if end is None else (end,)

    def description(self) -> dict[str, str]:
        """What results say of it: fingerprint, dtype, device and chat format."""
        return {
            "fingerprint": self.fingerprint,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": str(self.model.device),
            "chat_format": self.chat.chat_format,
        }


def resolve_device(device: str = "auto") -> torch.device:
    """`auto` is CUDA if there is a device, `balanced` the first of several.

    Raises:
        DvirlError: for a device that is not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == BALANCED:
        device = "cuda:0"
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise DvirlError(f"device is {device!r}; expected auto, cpu, cuda or balanced") from error
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
        device: auto, cpu, cuda, cuda:1, …, or balanced, which spreads the layers over all cards.
        chat_format: auto, template (the model's own), chatml, llama-2, llama-3, vicuna, zephyr or none.

    Raises:
        DvirlError: for another architecture, a missing or damaged file, something in the files that is not understood,
            no network, a wrong hash or a full disk.
    """
    where = resolve_device(device)
    torch_dtype = resolve_dtype(dtype, where)
    _refuse_no_folder(name_or_path)
    find = partial(find_file, source(name_or_path))
    try:
        config = _config(find)
        tokenizer = load_tokenizer(find, chat_format in ("auto", "template"))
        with torch.device("meta"):  # no memory, and no random numbers, for what the files fill
            model = EarlyExitLlamaForCausalLM(config)
        device_of = placement(model, torch_dtype, where) if device == BALANCED else lambda name: where
        fingerprint = load_weights(model, find, torch_dtype, device_of)
        why = ""
        if chat_format == "auto":
            chat_format, why = detect_format(tokenizer, name_or_path, config.vocab_size)
        chat = ChatEncoder(tokenizer, chat_format, config.vocab_size)
        ends = _end_tokens(find, config, chat)
    except DvirlError as error:
        raise DvirlError(f"{name_or_path}: {error}") from error
    except BaseException as error:  # what is in other people's files can raise anything, Rust's panics, too
        if not isinstance(error, Exception) and type(error).__name__ != PANIC:
            raise
        raise DvirlError(
            f"could not load the model {name_or_path!r}: {type(error).__name__}, "
            f"{' '.join(str(error).split()):.300}"
        ) from error
    if why and name_or_path not in EMBEDDED:
        _say_once(f"{name_or_path}: chat format {chat.chat_format} ({why})")
    if where.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # its attention takes 30 ms to plan each new shape
    return LoadedModel(model.requires_grad_(False).eval(), tokenizer, chat, ends, name_or_path, fingerprint)


def _refuse_no_folder(name_or_path: str) -> None:
    is_path = name_or_path.startswith((".", "/")) or name_or_path.count("/") > 1
    problem = "is a file" if Path(name_or_path).is_file() else ""
    if is_path and not Path(name_or_path).exists():
        problem = "is not there"
    if problem:
        raise DvirlError(f"{name_or_path} {problem}; expected the folder of a model in Hugging Face's layout")


def load_for(config: ModelSettings) -> LoadedModel:
    """The model that the settings of a run name; errors as in `load`."""
    return load(config.model_name, config.dtype, config.device, config.chat_format)


@cache
def _say_once(sentence: str) -> None:
    print(sentence, file=sys.stderr)


def find_file(path: str, name: str) -> str | None:
    """The path of a file of a model, by the name that `source` gives; None if the model does not have it.

    Raises:
        DvirlError: for a file that is only a pointer to its content.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*resume_download.*", category=FutureWarning)
        file: str | None = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
    if file:
        with open(file, "rb") as content:
            if content.read(len(POINTER)) == POINTER:
                raise DvirlError(f"{file} is a git-lfs pointer; expected the file itself (git lfs pull)")
    return file


def _config(find: FindFile) -> LlamaConfig:
    """The model's `config.json`, which cannot ask for code here.

    Raises:
        DvirlError: for a configuration that is not computed here, or an adapter beside the model.
    """
    file = find("config.json")
    if not file:
        raise DvirlError("no config.json; expected a model in Hugging Face's layout")
    if find("adapter_config.json"):
        raise DvirlError("an adapter_config.json is there; expected a whole model, with no adapter beside it")
    return read_config(read_json(file))


def _end_tokens(find: FindFile, config: LlamaConfig, chat: ChatEncoder) -> tuple[int, ...]:
    """Tokens that end a response: those of `config.json`, of `generation_config.json` and of the chat format.

    Raises:
        DvirlError: for what is no token.
    """
    generation = read_json(find("generation_config.json"))
    changed = [name for name in CHANGES_ANSWERS if generation.get(name) not in CHANGES_ANSWERS[name]]
    if changed:
        _say_once(
            f"generation_config.json sets {', '.join(changed)}, which `generate` of transformers applies; "
            "here answers are the model's own, without"
        )
    ids: dict[int, None] = {}
    places = {
        "config.json": config.eos_token_id,
        "generation_config.json": generation.get("eos_token_id"),
        "chat format": chat.turn_end,
    }
    for where, value in places.items():
        for token in value if isinstance(value, list) else [value]:
            if not has_type(token, int | None):
                raise DvirlError(f"{where}: eos_token_id has {token!r:.60}; expected whole numbers")
            if token in range(config.vocab_size):
                ids.setdefault(token)
    return tuple(ids)
