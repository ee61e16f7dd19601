"""Decoding by Hugging Face's `generate`, the baseline that is not ours."""

import time
from typing import Any

import torch
from accelerate import dispatch_model
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from dvirl.evaluation.measure import Answer
from dvirl.models.loading import LoadedModel, load
from dvirl.models.placement import BALANCED
from dvirl.runs.errors import bad_input
from kangaroo.adapter import LlamaRotaryEmbedding, head_dim
from kangaroo.decoding.blocks import DecodeConfig
from kangaroo.decoding.inputs import Ends, Ids, check_prompt, end_ids
from kangaroo.earlyexit import EarlyExitLlamaForCausalLM

KNOWN = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings"}
KNOWN |= {"rms_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id"}
"""Fields of a configuration that this transformers computes with as it is."""


class _Rotary(nn.Module):
    """Our rotary table under the signature of Hugging Face's, for scaled positions that this transformers lacks."""

    def __init__(self, rotary: LlamaRotaryEmbedding) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, states: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
        whole = [seq_len] if states.shape[-2] == seq_len else []
        if seq_len > self.rotary.max_seq_len_cached or whole:
            positions = torch.arange(seq_len, device=states.device)[None]
            return self.rotary.forward(positions, seq_len - 1, states.dtype, whole)
        cos = self.rotary.cos_cached[None, None, :seq_len]
        sin = self.rotary.sin_cached[None, None, :seq_len]
        return cos.to(states), sin.to(states)  # all layers share the table, whatever their devices


def hugging_face(loaded: LoadedModel) -> LlamaForCausalLM:
    """The untouched model, loaded again, in Hugging Face's class, in the same dtype on the same device."""
    spread = len(loaded.model.layer_devices()) > 1
    how = loaded.description()
    device = BALANCED if spread else how["device"]
    theirs = as_hugging_face(load(loaded.name, how["dtype"], device, how["chat_format"]).model)
    if spread:  # Accelerate's hooks move what a layer reads to its device
        home = loaded.model.device
        places = dict.fromkeys(("model.embed_tokens", "model.norm", "lm_head"), home)
        for index, layer in enumerate(theirs.model.layers):
            places[f"model.layers.{index}"] = layer.input_layernorm.weight.device
        theirs = dispatch_model(theirs, places, main_device=home)
    return theirs


def as_hugging_face(ours: EarlyExitLlamaForCausalLM) -> LlamaForCausalLM:
    """Hugging Face's attention, cache and loop over our weights, activation and rotary table, for every shape."""
    config = ours.config
    # Heads are set below; this transformers knows none whose sizes do not add up to the hidden size.
    known = LlamaConfig(**{name: getattr(config, name) for name in KNOWN}, num_attention_heads=1)
    with torch.device("meta"):
        theirs = LlamaForCausalLM(known)
    # Set one by one: a module computes with a weight of any shape.
    for name, parameter in ours.named_parameters(remove_duplicate=False):
        module, _, leaf = name.rpartition(".")
        setattr(theirs.get_submodule(module), leaf, parameter)
    layers: Any = ours.model.layers
    for layer, own in zip(theirs.model.layers, layers, strict=True):
        attention = layer.self_attn
        attention.num_heads = config.num_attention_heads
        attention.num_key_value_heads = config.num_key_value_heads
        attention.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        attention.head_dim = head_dim(config)
        attention.hidden_size = attention.num_heads * attention.head_dim  # the width of what o_proj reads
        attention.rotary_emb = _Rotary(ours.rotary)
        layer.mlp.act_fn = own.mlp.activation
    theirs.config.rope_scaling = config.rope_scaling  # says how long the context is; the table is ours
    # A folder's own generation_config, with its sampling or penalties, is not greedy decoding.
    theirs.generation_config = GenerationConfig()
    return theirs.eval()


def generate_forward(
    model: LlamaForCausalLM,
    prompt: Ids,
    limit: int,
    eos_ids: Ends = (),
    settings: DecodeConfig = DecodeConfig(0),  # noqa: B008  # it is frozen
    seed: int = 0,
) -> Answer:
    """Decode one prompt with `generate` and its cache.

    Args:
        model: Hugging Face's.
        prompt: token ids, a list or a tensor, `[T]` or `[1, T]`.
        limit: most tokens of the answer.
        eos_ids: tokens that end it, or one such token, or None.
        settings: how the answer is chosen: greedily, or sampled by temperature, top_k and top_p.
        seed: of a sampled answer.

    Raises:
        DvirlError: for a prompt that cannot be read, or that leaves no room for the answer.
    """
    how: dict[str, Any] = {"do_sample": settings.temperature > 0}
    if settings.temperature:
        torch.manual_seed(seed)
        how |= {name: getattr(settings, name) for name in ("temperature", "top_p", "top_k")}
    with bad_input():
        prompt_ids = torch.tensor([check_prompt(prompt, model, limit)], device=model.device)
        ends = end_ids(eos_ids)
    start = time.perf_counter()
    output = model.generate(
        prompt_ids,
        attention_mask=torch.ones_like(prompt_ids),
        max_new_tokens=limit,
        **how,
        eos_token_id=ends or None,
        pad_token_id=0,
    )
    tokens = output[0, prompt_ids.shape[1] :].tolist()  # waits for the device
    return Answer(tokens, time.perf_counter() - start)
