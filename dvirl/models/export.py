"""A draft as a plain Llama, which other engines serve as a draft model: `dvirl export DRAFTER OUT --to hf|gguf`."""

import copy
import shutil
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from dvirl.models.drafters import OF_BASE, DrafterOptions, open_draft
from dvirl.models.gguf_file import QUANTISED, write_gguf
from dvirl.models.hf_config import read_json
from dvirl.models.loading import DTYPES, find_file, source
from dvirl.models.weights import EMBEDDING, HEAD, FindFile
from dvirl.runs.errors import DvirlError
from dvirl.runs.files import Tensors, atomic_directory
from dvirl.runs.log import write_json
from dvirl.runs.settings import choice, command_line, number, positional
from kangaroo.kangaroo_model import KangarooModel

BESIDE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
"""Files of the base model that an export has as well, where the base model has them."""
CHANGED = ("num_hidden_layers", "max_position_embeddings", "tie_word_embeddings")
"""What a draft's configuration has otherwise than that of its base model."""
DROPPED = ("_name_or_path", "auto_map", "dtype", "torch_dtype")
"""What does not hold for a draft: where the base model lay, its own code, and its dtype under either name."""
SHORTEST = 1024
"""Positions below which a drafter's window is no context to serve with unless it is asked for."""


def plain_context(model: KangarooModel, asked: int = 0) -> int:
    """Positions up to which a plain Llama computes what the drafter does.

    Args:
        model: drafts.
        asked: so many; 0 for all of the model's, or of the drafter's window.

    Raises:
        DvirlError: for a drafter that no plain Llama computes; the message says what comes nearest.
    """
    adapter = model.adapter_model
    config = model.base_model.config
    if adapter.embed_tokens is not None:
        raise DvirlError("the draft is a plain model already; expected a drafter that reads exit states")
    if model.feedback:
        raise DvirlError(
            "a drafter with feedback reads the verifier's last state, which no engine gives to a draft model; "
            "expected a drafter that was trained without --feedback"
        )
    for name in OF_BASE:
        own, expected = (getattr(shape, name) for shape in (adapter.config, config))
        if own != expected:
            raise DvirlError(
                f"the drafter's {name} is {own}, and a plain Llama has one for all layers; "
                f"expected a drafter that has the model's, {expected}"
            )
    longest: int = config.max_position_embeddings
    if asked > longest:
        raise DvirlError(f"context is {asked}; expected {longest} at most, the model's own")
    seen = min(longest, adapter.window or longest) if len(adapter.layers) else longest
    context = asked or (seen if seen >= SHORTEST else longest)
    if context > seen:
        raise DvirlError(
            f"context is {context}, but the drafter's attention sees {seen} positions, and a plain Llama's sees all; "
            f"expected --context {seen}, or a drafter that was trained with --adapter_window {longest}"
        )
    scaling = config.rope_scaling or {}
    kind = scaling.get("rope_type", "linear")
    fixed = kind == "linear" or (kind == "llama3" and "original_max_position_embeddings" in scaling)
    if context < longest and not fixed:
        raise DvirlError(
            f"context is {context}, but {kind} positions depend on the model's own, {longest}; "
            f"expected a drafter that was trained with --adapter_window {longest}"
        )
    return context


def plain_llama(model: KangarooModel, context: int = 0) -> tuple[LlamaConfig, Tensors]:
    """The first k layers with lora_S merged, the drafter's layers, exit norm and exit head as one Llama.

    Tokens that the draft vocabulary lacks keep the base model's rows of the head. An adapter's layer has no
    feed-forward half; zeros stand for it, which add nothing to a state.

    Args:
        model: drafts, on the CPU.
        context, errors: as in `plain_context`.

    Returns:
        The base model's configuration, with the draft's number of layers and context; the tensors by Hugging Face's
        names, in the base model's dtype, with no head if it is the embedding.
    """
    base = model.base_model
    config = copy.deepcopy(base.config)
    config.max_position_embeddings = plain_context(model, context)
    with base.merged():
        layers = [layer.state_dict() for layer in base.model.layers[: base.exit_layer]]
    layers += [layer.state_dict() for layer in model.adapter_model.layers]
    config.num_hidden_layers = len(layers)
    embedding = base.model.embed_tokens.weight
    tensors = {EMBEDDING: embedding, "model.norm.weight": model.exit_norm.weight}
    for index, layer in enumerate(layers):
        for name, like in layers[0].items():
            tensors[f"model.layers.{index}.{name}"] = layer.get(name, torch.zeros_like(like))
    parts = model.drafter_parts()
    assert parts.weights.head_weight is not None
    head = model.head_model.weight.clone()
    rows = slice(None) if parts.draft_ids is None else parts.draft_ids
    head[rows] = parts.weights.head_weight
    config.tie_word_embeddings = torch.equal(head, embedding)
    if not config.tie_word_embeddings:
        tensors[HEAD] = head
    plain = {name: tensor.detach().to(base.dtype).contiguous() for name, tensor in tensors.items()}
    return config, plain


def write_hf(folder: Path, config: LlamaConfig, tensors: Tensors, find: FindFile) -> None:
    """Write a Hugging Face folder, whole or not at all.

    Args:
        folder: to make.
        config, tensors: the draft.
        find: finds the base model's files, whose `config.json` is kept but for what the draft has otherwise.
    """
    values = read_json(find("config.json"))
    for name in DROPPED:
        values.pop(name, None)
    values |= {name: getattr(config, name) for name in CHANGED}
    values["architectures"] = ["LlamaForCausalLM"]
    values["torch_dtype"] = str(tensors[EMBEDDING].dtype).removeprefix("torch.")
    with atomic_directory(folder) as scratch:
        write_json(scratch / "config.json", values)
        save_file(tensors, scratch / "model.safetensors", metadata={"format": "pt"})
        for name in BESIDE:
            file = find(name)
            if file:
                shutil.copyfile(file, scratch / name)


@dataclass(frozen=True)
class ExportConfig(DrafterOptions):
    """What to export, and as what."""

    drafter: str = positional()
    """smollm2-135m-k2, the shipped drafter that can be exported, a drafter's folder, or a run."""
    out: str = positional()
    """What to make: a folder for hf, a file for gguf."""
    to: str = choice("hf", ("hf", "gguf"))
    """hf (a Hugging Face folder, as transformers and vLLM take it) or gguf (a file, as llama.cpp takes it)."""
    dtype: str = choice("bfloat16", (*DTYPES, *QUANTISED))
    """Of the weights: float32, bfloat16 or float16; q8_0 and q4_1 for gguf alone."""
    context: int = number(0, 0)
    """Positions of the exported model; by default the model's, or as many as the drafter sees if these are fewer and at
    least 1,024."""


parse_args = command_line(ExportConfig, "dvirl export", "Write a draft as a plain Llama for other engines.")
"""Settings from the command line; see `settings.parse_args`."""


def main(config: ExportConfig) -> None:
    """Export a drafter and print where it is.

    Raises:
        DvirlError: for a drafter that no engine takes, an `out` that exists, or a setting that does not fit.
    """
    out = Path(config.out)
    if out.exists():
        raise DvirlError(f"{out} exists already; choose another name, or remove it")
    if config.to == "hf" and config.dtype not in DTYPES:
        raise DvirlError(f"dtype is {config.dtype!r}; expected one of {', '.join(DTYPES)} for hf")
    # What is quantised is rounded once, from float32.
    dtype = config.dtype if config.dtype in DTYPES else "float32"
    drafter = open_draft(config.drafter, dtype, "cpu", config.model_name, config.exit_layer)
    llama, tensors = plain_llama(drafter.model, config.context)
    context = llama.max_position_embeddings
    longest = drafter.model.base_model.config.max_position_embeddings
    if context < longest:
        print(f"{out}: a model of {context} positions; its base has {longest}", file=sys.stderr)
    if config.to == "hf":
        write_hf(out, llama, tensors, partial(find_file, source(drafter.loaded.name)))
    else:
        write_gguf(out, llama, tensors, drafter.loaded.tokenizer, config.dtype)
    print(out)
