"""Random models, drafters, prompts and ways of decoding: every answer is plain decoding's.

`make fuzz` tries other models each time, on a GPU if there is one.
"""

from __future__ import annotations

import os
import random
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from conftest import scramble_lora
from transformers import LlamaConfig, LlamaForCausalLM

from kangaroo.decoding.blocks import DecodeConfig
from kangaroo.decoding.drafting import Memory
from kangaroo.decoding.layers import on_own_cpu_kernels
from kangaroo.earlyexit import EarlyExitLlamaForCausalLM
from kangaroo.kangaroo_model import KangarooModel
from kangaroo.sgp_lora import inject_dual_lora

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
LAST = torch.device("cuda", torch.cuda.device_count() - 1) if torch.cuda.is_available() else DEVICE
"""Where layers lie from some layer on: with several GPUs on another one."""
MODELS = int(os.environ.get("DVIRL_RANDOM_MODELS", "8"))
FIRST = int(os.environ.get("DVIRL_RANDOM_FIRST", "0"))
LENGTHS = (1, 3, 17, 64, 65, 190, 193, 300) if MODELS > 8 else (1, 3, 17, 65, 70)
"""Tokens of prompts: up to 64 and 192 they are read by our own kernels, on a CPU and on CUDA."""


def random_config(draw: random.Random) -> LlamaConfig:
    pick = draw.choice
    heads = pick([1, 2, 3, 4, 9])
    size = pick([16, 32, 64, 64, 80, 96, 128])
    scaling = pick([None, None, {"type": "linear", "factor": 2.0}, {"type": "dynamic", "factor": 2.0}])
    return LlamaConfig(
        hidden_size=heads * size,
        intermediate_size=pick([64, 100, 176, heads * size, 2 * heads * size + 16]),
        num_hidden_layers=draw.randint(3, 6),
        num_attention_heads=heads,
        num_key_value_heads=pick([groups for groups in range(1, heads + 1) if heads % groups == 0]),
        vocab_size=pick([264, 1000, 5001]),
        # Dynamic positions of most texts are stretched.
        max_position_embeddings=32 if scaling and scaling["type"] == "dynamic" else 2048,
        rope_scaling=scaling,
        rms_norm_eps=pick([1e-5, 1e-6]),
        hidden_act=pick(["silu", "silu", "silu", "gelu"]),
        initializer_range=pick([0.1, 0.2, 0.6]) * (32 / (heads * size)) ** 0.5,
        tie_word_embeddings=pick([True, False]),
        pad_token_id=None,
    )


def random_draft(draw: random.Random, seed: int) -> KangarooModel:
    """A model whose deep layers say little, so that drafts are often right, and its draft."""
    pick = draw.choice
    config = random_config(draw)
    torch.manual_seed(seed)
    theirs = LlamaForCausalLM(config)
    exit_layer = draw.randint(1, config.num_hidden_layers - 1)
    base = EarlyExitLlamaForCausalLM(config, EARLY_STOP_LAYER=exit_layer).eval()
    base.load_state_dict(
        {name: value for name, value in theirs.state_dict().items() if "inv_freq" not in name}
    )
    scale = pick([0.02, 0.1, 0.5])
    for layer in base.model.layers[exit_layer:]:
        layer.mlp.down_proj.weight.data *= scale
        layer.self_attn.o_proj.weight.data *= scale
    base.to(DEVICE, pick([torch.bfloat16, torch.bfloat16, torch.float32, torch.float16]))
    has_lora = pick([False, True])
    if has_lora:
        inject_dual_lora(base, exit_layer, rank=4, alpha=8.0)
    drafter = pick(["none", "layer", "layer", "adapter"])
    feedback = drafter != "none" and pick([False, True])
    deeper = [0, *range(exit_layer + 1, config.num_hidden_layers)]
    args = Namespace(
        drafter=drafter,
        drafter_layers=pick([1, 2]),
        adapter_window=pick([8, 64, 4096]),
        feedback=feedback,
        recurrent=feedback and drafter == "layer" and pick([False, True]),
        middle_layer=pick(deeper) if feedback else 0,
        head=pick(["frozen", "full", "lora"]),
        head_rank=4,
        draft_vocab=pick([None, sorted(draw.sample(range(config.vocab_size), config.vocab_size // 2))]),
    )
    model = KangarooModel(base, None, args, exit_layer)
    if has_lora:
        scramble_lora(model, ["lora_S"], 0.03, seed)
        scramble_lora(model, ["lora_D"], 0.02, seed + 1)
        model.to(DEVICE)
    for layer in base.model.layers[draw.randint(1, config.num_hidden_layers) :]:
        layer.to(LAST)
    return model


def random_prompt(draw: random.Random, vocab_size: int) -> list[int]:
    """Some repeat themselves, for lookups."""
    length = draw.choice(LENGTHS)
    pattern = [draw.randrange(3, vocab_size) for _ in range(draw.choice([draw.randint(1, 9), length]))]
    return (pattern * (length // len(pattern) + 1))[:length]


def random_way(draw: random.Random, plain: DecodeConfig) -> DecodeConfig:
    """Drafts for the answers of `plain`."""
    pick = draw.choice
    return replace(
        plain,
        draft_len=pick([1, 2, 4, 7, 15]),
        source=pick(["learned", "lookup", "hybrid", "hybrid"]),
        adaptive=pick([True, False]),
        branches=0 if plain.deterministic else pick([0, 0, 1, 2]),
        threshold=pick([0.0, 0.3]),
        keep_states=pick([False, False, True]),
        draft_temperature=pick([0.0, 0.5]) if plain.temperature else 0.0,
    )


def rounds_alike(model: KangarooModel) -> bool:
    """Whether a token has the same bits in every pass: by our own kernels, or nearly so in float32."""
    base = model.base_model
    if base.dtype == torch.float32 or on_own_cpu_kernels(DEVICE, base.dtype):
        return True
    return any(stages.passes.own_kernels for stages in base._kept_stages)


@pytest.mark.no_cover
@pytest.mark.parametrize("seed", range(FIRST, FIRST + MODELS))
def test_every_answer_is_plain_decodings(seed):
    draw = random.Random(seed)
    pick = draw.choice
    model = random_draft(draw, seed)
    base = model.base_model
    prompts = [random_prompt(draw, base.config.vocab_size) for _ in range(draw.randint(2, 4))]
    length = pick([2, 20, 40])
    ends = pick([(), (2,), tuple(range(3, 3 + base.config.vocab_size // 40))])
    temperature = pick([0.0, 0.0, 1.0])
    cut = {"top_k": pick([0, 5]), "top_p": pick([1.0, 0.9])} if temperature else {}
    target = "base" if model.feedback else pick(["base", "adapted"])
    plain = DecodeConfig(0, temperature=temperature, target=target, **cut)
    model.generate(prompts[0], 2, plain)
    if not rounds_alike(model):
        plain = replace(plain, deterministic=True)
    alone = [
        model.generate(prompt, length, plain, ends, seed=row).tokens for row, prompt in enumerate(prompts)
    ]
    for how in [random_way(draw, plain) for _ in range(4)]:
        memory = pick([None, Memory(4000)])
        for row, prompt in enumerate(prompts):
            blocks = model.decode_blocks(prompt, length, how, ends, seed=row, memory=memory)
            tokens = [token for block in blocks for token in block.committed]
            assert tokens == alone[row], (how, row)
            if memory:
                memory.add([*prompt, *tokens])
        if not plain.deterministic:  # which says nothing about other texts
            together = model.generate_batch(prompts, length, how, ends, seed=range(len(prompts)))
            assert [one.tokens for one in together] == alone, how
