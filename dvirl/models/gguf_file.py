"""Writes a plain Llama as a GGUF file, as llama.cpp reads it."""

import json
import re
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import LlamaConfig

from dvirl.models.embedded import GGUF_SIZES, Array
from dvirl.models.tokenizers import TextEncoder
from dvirl.runs.errors import DvirlError
from dvirl.runs.files import Tensors, atomic_file
from kangaroo.adapter import head_dim, rotary_for

QUANTISED = ("q8_0", "q4_1")
"""Types of weights that GGUF has beside the plain ones, in blocks of 32 numbers."""
TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", **{name: name.upper() for name in QUANTISED}}
"""GGUF's name of each type of weights."""
SPLITS = {"Digits": "smollm", "Split": "llama-bpe", "ByteLevel": "gpt-2"}
"""llama.cpp's name of how a byte-level tokenizer splits text, by the component that tells it from others."""
BYTE = re.compile("<0x[0-9A-F]{2}>")


def permute(weight: Array, heads: int) -> Array:
    """Put the rows of a query or key matrix `[heads * E, D]`, or its bias, into GGUF's order; undoes `unpermute`."""
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, config: LlamaConfig, tensors: Tensors, tokenizer: Any, dtype: str) -> None:
    """Write a Llama, whole or not at all.

    Args:
        path: of the new file.
        config: of the model.
        tensors: by Hugging Face's names.
        tokenizer: a fast Hugging Face tokenizer.
        dtype: of the matrices, one of `TYPES`; vectors are float32.

    Raises:
        DvirlError: for a model or tokenizer that llama.cpp's Llama is not.
    """
    if config.hidden_act not in ("silu", "swish"):
        raise DvirlError(f"hidden_act is {config.hidden_act!r}; expected silu, the only one of a GGUF Llama")
    writer = gguf.GGUFWriter(None, "llama")
    _add_shape(writer, config)
    _add_tokenizer(writer, tokenizer, config)
    _add_positions(writer, config)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in tensors.items():
        array = tensor.float().numpy()
        projection = name.split(".")[-2]
        if projection in heads:
            array = permute(array, heads[projection])
        kind = gguf.GGMLQuantizationType[TYPES[dtype] if array.ndim > 1 else "F32"]
        if array.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            raise DvirlError(
                f"dtype is {dtype!r}; rows of {array.shape[-1]} numbers are no whole blocks of it"
            )
        name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
    with atomic_file(path) as scratch:
        writer.write_header_to_file(scratch)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _add_shape(writer: gguf.GGUFWriter, config: LlamaConfig) -> None:
    writer.add_vocab_size(config.vocab_size)
    for name, key in GGUF_SIZES.items():
        writer.add_uint32(f"llama.{key}", getattr(config, name))
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _add_positions(writer: gguf.GGUFWriter, config: LlamaConfig) -> None:
    """Rotary positions; dynamic ones are plain up to the model's context.

    Raises:
        DvirlError: for yarn, which engines compute in ways of their own.
    """
    scaling = config.rope_scaling or {}
    kind = scaling.get("rope_type", "default")
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_rope_freq_base(config.rope_theta)
    if kind == "yarn":
        raise DvirlError("positions are scaled by yarn; expected default, linear, dynamic or llama3 for gguf")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling["factor"])
    if kind == "llama3":
        rotary = rotary_for(config)
        cos, sin = rotary.table(2, torch.device("cpu"))
        plain = rotary.frequencies(rotary.base)
        # The angles of position 1 are the scaled frequencies; the file says by what the plain ones are divided.
        scaled = torch.atan2(sin[1], cos[1])[: len(plain)]
        writer.add_tensor("rope_freqs.weight", (plain / scaled).numpy())


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any, config: LlamaConfig) -> None:
    """Tokens, merges, special tokens and chat template.

    Raises:
        DvirlError: for a tokenizer of another kind than Llama's.
    """
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    model = definition["model"]
    if model["type"] != "BPE":
        raise DvirlError(f"the tokenizer's model is {model['type']}; expected BPE for gguf")
    if model.get("byte_fallback"):  # sentencepiece's pieces, which stand in the order of their merges
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([float(-index) for index in range(config.vocab_size)])
    else:
        writer.add_tokenizer_model("gpt2")
        steps = json.dumps(definition["pre_tokenizer"])
        known = (name for step, name in SPLITS.items() if f'"{step}"' in steps)
        writer.add_tokenizer_pre(next(known, "default"))
        if model["merges"]:
            writer.add_token_merges(model["merges"])
    texts = [f"[PAD{index}]" for index in range(config.vocab_size)]
    kinds = [gguf.TokenType.UNUSED] * config.vocab_size
    added = {token["id"]: token["special"] for token in definition["added_tokens"]}
    for text, index in tokenizer.get_vocab().items():
        if index >= config.vocab_size:
            continue
        texts[index] = text
        kinds[index] = gguf.TokenType.BYTE if BYTE.fullmatch(text) else gguf.TokenType.NORMAL
        if index in added:
            kinds[index] = gguf.TokenType.CONTROL if added[index] else gguf.TokenType.USER_DEFINED
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    # An engine refuses a draft model whose BOS or EOS is not that of the model.
    for role in ("bos", "eos", "unk", "pad"):
        token = getattr(tokenizer, f"{role}_token_id")
        if token is not None and token < config.vocab_size:  # the file has no token without an embedding
            getattr(writer, f"add_{role}_token_id")(token)
    _add_frame(writer, TextEncoder(tokenizer))
    template = tokenizer.init_kwargs.get("chat_template")
    if template:
        writer.add_chat_template(template)


def _add_frame(writer: gguf.GGUFWriter, encoder: TextEncoder) -> None:
    """What is put before and after a text."""
    before, after = encoder.frame
    writer.add_add_bos_token(bool(before))
    writer.add_add_eos_token(bool(after))
    spaced = encoder.encode("a", (), begins=True)
    writer.add_add_space_prefix(spaced != encoder.encode("a", (), begins=False))
