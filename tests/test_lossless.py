"""The promise: speculative output equals the verifier's plain greedy output, whatever drafts."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch
from conftest import EOS, copied, random_prompts, scramble_lora, tiny_kangaroo, tiny_pair
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from dvirl.lora import shallow_parameters
from dvirl.models.embedded import ensure_embedded
from kangaroo.decoding.blocks import DecodeConfig
from kangaroo.earlyexit import EarlyExitLlamaForCausalLM
from kangaroo.kangaroo_model import KangarooModel
from kangaroo.sgp_lora import inject_dual_lora

pytestmark = pytest.mark.no_cover

LENGTH = 24


def hf_greedy(model: LlamaForCausalLM, prompt: list[int], length: int, eos: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False,
                         eos_token_id=eos, pad_token_id=eos)  # fmt: skip
    return out[0, len(prompt) :].tolist()


@torch.no_grad()
def hf_says(model: LlamaForCausalLM, prompt: list[int], answer: list[int]) -> list[int]:
    """The model's next token after each part of an answer, in one pass; for a greedy answer that is the answer itself."""
    return model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].argmax(dim=-1).tolist()


@torch.no_grad()
def as_hugging_face(model: EarlyExitLlamaForCausalLM, *without: str) -> LlamaForCausalLM:
    """Hugging Face's Llama with our weights, the active adapters merged in."""
    with model.without_adapters(*without), model.merged():
        state = {name: value.clone() for name, value in model.state_dict().items()}
    theirs = LlamaForCausalLM(model.config).eval()
    missing = theirs.load_state_dict(state, strict=False).missing_keys
    assert not [name for name in missing if "inv_freq" not in name]
    return theirs


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 5),
    exit_layer=st.integers(1, 3),
    draft_len=st.integers(0, 7),
    threshold=st.sampled_from([0.0, 0.05, 0.4, 1.0]),
    drafter=st.sampled_from(["none", "adapter", "layer"]),
    layers=st.integers(1, 2),
    head=st.sampled_from(["frozen", "full", "lora"]),
    covered=st.sampled_from([None, 100]),
    target=st.sampled_from(["base", "adapted"]),
    lora=st.booleans(),
)
def test_output_is_the_verifiers_greedy_output(
    seed, exit_layer, draft_len, threshold, drafter, layers, head, covered, target, lora
):
    ids = range(covered) if covered else None
    model = tiny_kangaroo(seed, exit_layer, drafter=drafter, drafter_layers=layers, head=head, head_rank=3,
                          draft_vocab=ids, adapter_window=5)  # fmt: skip
    if not lora:
        scramble_lora(model, ["lora_S"], 0.0)
    for parameter in shallow_parameters(model, lora_shallow=False):
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    reference = as_hugging_face(model.base_model, *(["lora_S"] if target == "base" else []))
    config = DecodeConfig(draft_len, threshold, target)
    for prompt in random_prompts(2, seed):
        decoded = model.generate(prompt, LENGTH, config, (EOS,))
        assert decoded.tokens == hf_greedy(reference, prompt, LENGTH, EOS)


def test_without_lora_d_the_reference_is_the_untouched_model():
    theirs, ours = tiny_pair(3)
    inject_dual_lora(ours, 2, rank=4)
    model = KangarooModel(ours, None, Namespace(drafter="adapter"), 2)
    scramble_lora(model, ["lora_S"], 0.5)
    for prompt in random_prompts(6, 3):
        assert model.generate(prompt, LENGTH, DecodeConfig(4), (EOS,)).tokens == hf_greedy(
            theirs, prompt, LENGTH, EOS
        )


def test_an_adapted_target_would_not_pass_as_the_base():
    """The control: the comparison above can fail."""
    model = tiny_kangaroo(1)
    untouched = as_hugging_face(model.base_model, "lora_S", "lora_D")
    prompts = random_prompts(6, 1)
    found = [
        model.generate(prompt, LENGTH, DecodeConfig(4, target="adapted"), (EOS,)).tokens for prompt in prompts
    ]
    assert found != [hf_greedy(untouched, prompt, LENGTH, EOS) for prompt in prompts]


@pytest.mark.real
def test_the_default_model_on_twenty_prompts(real):
    base = copied(real)
    inject_dual_lora(base.model, 6)
    model = KangarooModel(
        base.model, None, Namespace(drafter="layer", head="full", draft_vocab=range(8192)), 6
    )
    scramble_lora(model, ["lora_S"], 0.02)
    reference = LlamaForCausalLM.from_pretrained(ensure_embedded("smollm2-135m"), low_cpu_mem_usage=True)
    questions = [
        f"Tell me something about the number {number} and the letter {chr(97 + number)}."
        for number in range(20)
    ]
    drafted = 0
    for number, question in enumerate(questions):
        prompt = base.chat.encode([question])
        decoded = model.generate(prompt, 12, DecodeConfig(3), base.eos_ids)
        drafted += sum(block.num_drafted for block in decoded.blocks)
        assert decoded.tokens == hf_says(reference, prompt, decoded.tokens), question
        assert base.eos_ids[0] in decoded.tokens[-1:] or len(decoded.tokens) == 12
        assert base.eos_ids[0] not in decoded.tokens[:-1]
        if number < 4:
            assert decoded.tokens == hf_greedy(reference, prompt, 12, base.eos_ids[0])
    assert drafted > 100
