"""A plain Hugging Face Llama with an adapter on its exit state, by hooks: it drafts what our own decoder drafts."""

from __future__ import annotations

import pytest
import torch
from conftest import random_prompts, tiny_pair, write_published

from kangaroo.adapter import AdapterModel, LlamaForCausalLMWithAdapters, inject_adapter_hooks
from kangaroo.decoding.blocks import DecodeConfig
from kangaroo.kangaroo_model import KangarooModel


@pytest.fixture
def pair(tmp_path):
    """Hugging Face's model and ours, both with the same published adapter after two layers."""
    write_published(tmp_path, 3)
    theirs, ours = tiny_pair(3)
    model = KangarooModel(ours, tmp_path, None, 2)
    inject_adapter_hooks(theirs, model.adapter_model, 2)
    return theirs, model


def test_the_exit_logits_are_those_of_our_draft(pair):
    theirs, model = pair
    ids = torch.randint(3, 200, (2, 13))
    with torch.no_grad():
        output, expected = theirs(ids), model(ids)
    torch.testing.assert_close(output["exit_logits"], expected.exit_logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(output.logits, expected.final_logits, atol=1e-4, rtol=0)


def test_our_decoder_drafts_their_argmax(pair):
    theirs, model = pair
    for prompt in random_prompts(4):
        blocks = model.generate(prompt, 16, DecodeConfig(1, target="adapted")).blocks[1:]
        text = torch.tensor([[*prompt, *model.generate(prompt, 16, DecodeConfig(0)).tokens]])
        with torch.no_grad():
            said = theirs(text)["exit_logits"][0].argmax(dim=-1)
        drafted = [(block.start, int(block.draft.tokens[0])) for block in blocks if len(block.draft.tokens)]
        assert drafted and all(token == said[start - 1] for start, token in drafted)


def test_padding_on_the_left_changes_nothing(pair):
    theirs, _ = pair
    ids, mask = torch.randint(3, 200, (1, 9)), torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        padded = theirs(ids, attention_mask=mask)["exit_logits"][:, 3:]
        alone = theirs(ids[:, 3:])["exit_logits"]
    torch.testing.assert_close(padded, alone, atol=1e-4, rtol=0)


def test_gradients_reach_the_adapter_and_hooks_can_be_removed():
    theirs, ours = tiny_pair(1)
    adapter = AdapterModel(ours.config)
    handles = inject_adapter_hooks(theirs, adapter, 1)
    ids = torch.randint(3, 200, (1, 6))
    theirs(ids)["exit_logits"].sum().backward()
    assert adapter.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
    for handle in handles:
        handle.remove()
    assert "exit_logits" not in theirs(ids)


def test_the_class_replaces_its_adapter():
    theirs, ours = tiny_pair(2)
    model = LlamaForCausalLMWithAdapters(theirs.config).eval()
    model.load_state_dict(theirs.state_dict())
    ids, found = torch.randint(3, 200, (1, 6)), []
    for _ in range(2):
        adapter = AdapterModel(ours.config)
        with torch.no_grad():
            found.append(model.set_adapter(adapter, 2)(ids)["exit_logits"])
        assert model.adapter_model is adapter and len(model._forward_hooks) == 1
    assert not torch.allclose(*found)
    with pytest.raises(ValueError, match="takes 1 to 3"):
        model.set_adapter(adapter, 4)


def test_passes_over_a_cache_are_refused(pair):
    theirs, _ = pair
    ids = torch.randint(3, 200, (1, 5))
    cache = theirs(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="no past_key_values"):
        theirs(ids[:, :1], past_key_values=cache)
