"""Our decoder computes what Hugging Face's Llama computes."""

from __future__ import annotations

import pytest
import torch
from conftest import random_prompts, tiny_config, tiny_pair
from transformers import LlamaForCausalLM

from dvirl.models.embedded import ensure_embedded
from kangaroo.adapter import LlamaRotaryEmbedding, _prepare_decoder_attention_mask, rotary_for
from kangaroo.earlyexit import EarlyExitLlamaForCausalLM

SHAPES = [dict(heads=4, groups=4), dict(heads=4, groups=2), dict(heads=8, groups=1, tied=False)]


def assert_same_states(theirs, ours, ids):
    with torch.no_grad():
        expected = theirs(ids, output_hidden_states=True)
        found = ours(ids, output_hidden_states=True)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=0)
    assert len(found.hidden_states) == len(expected.hidden_states) == ours.config.num_hidden_layers + 1
    for state, other in zip(found.hidden_states, expected.hidden_states, strict=True):
        # 1e-4 absolute; the default model has states up to 25,000, whose float32 steps are 2e-3, so there the bound is
        # 1e-4 of a state's norm over the square root of its size.
        scale = other.pow(2).mean(dim=-1, keepdim=True).sqrt().clamp(min=1.0)
        torch.testing.assert_close(state / scale, other / scale, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_states_equal_hugging_faces(shape):
    theirs, ours = tiny_pair(1, **shape)
    assert_same_states(theirs, ours, torch.randint(3, 200, (2, 17)))


@pytest.mark.real
def test_the_default_model_equals_hugging_faces(real):
    theirs = LlamaForCausalLM.from_pretrained(ensure_embedded("smollm2-135m"), low_cpu_mem_usage=True)
    ids = torch.tensor([real.chat.encode(["What is the capital of France, and what is it known for?"])])
    assert_same_states(theirs, real.model, ids)


@pytest.mark.parametrize("exit_layer", [1, 2, 3])
@pytest.mark.parametrize("cached", [False, True])
def test_shallow_and_deep_make_the_whole(exit_layer, cached):
    _, ours = tiny_pair(2)
    ours.set_exit_layer(exit_layer)
    ids = torch.randint(3, 200, (2, 11))
    with torch.no_grad():
        whole = ours(ids, output_hidden_states=True)
        stages = ours.new_stages(16, batch_size=2) if cached else None
        exits, logits = [], []
        for start, stop in [(0, 5), (5, 6), (6, 11)] if cached else [(0, 11)]:
            exits.append(stages.shallow(ids[:, start:stop]) if stages else ours.forward_shallow(ids))
            logits.append(ours.lm_head(stages.deep(exits[-1]) if stages else ours.forward_deep(exits[-1])))
    torch.testing.assert_close(torch.cat(exits, 1), whole.hidden_states[exit_layer], atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.cat(logits, 1), whole.logits, atol=1e-4, rtol=0)


def test_padding_on_either_side_changes_nothing():
    theirs, ours = tiny_pair(3)
    ids = torch.randint(3, 200, (2, 9))
    for mask in (torch.tensor([[0, 0, 0] + [1] * 6, [1] * 9]), torch.tensor([[1] * 6 + [0, 0, 0], [1] * 9])):
        with torch.no_grad():
            found = ours(ids, attention_mask=mask).logits
            alone = theirs(ids[:1, mask[0] == 1]).logits
        torch.testing.assert_close(found[:1, mask[0] == 1], alone, atol=1e-4, rtol=0)


def test_rows_of_different_length_share_a_cache():
    _, ours = tiny_pair(4)
    prompts = random_prompts(4, 1)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(p) for p in prompts], batch_first=True)
    shallow = ours.new_stages(32, batch_size=4).shallow
    with torch.no_grad():
        shallow(ids)
        shallow.cache.truncate(lengths.tolist())
        found = shallow(torch.full((4, 2), 7))
        for row, prompt in enumerate(prompts):
            alone = ours.forward_shallow(torch.tensor([[*prompt, 7, 7]]))
            torch.testing.assert_close(found[row], alone[0, -2:], atol=1e-4, rtol=0)


def test_forward_draft_or_large_model_is_the_two_halves():
    _, ours = tiny_pair(5)
    ids = torch.randint(3, 200, (1, 8))
    with torch.no_grad():
        exits = ours.forward_draft_or_large_model(in_tokens_small=ids)
        final = ours.forward_draft_or_large_model(in_features_large=exits)
        torch.testing.assert_close(ours.lm_head(final), ours(ids).logits, atol=1e-5, rtol=0)
        with ours.decoding(16, None):
            ours.forward_draft_or_large_model(in_tokens_small=ids)
            again = ours.forward_draft_or_large_model(
                in_tokens_small=ids[:, 3:], position_ids=torch.arange(3, 8)[None]
            )
            with pytest.raises(ValueError, match="gap"):
                ours.forward_draft_or_large_model(in_tokens_small=ids, position_ids=torch.tensor([[12]]))
    torch.testing.assert_close(again, exits[:, 3:], atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="exactly one"):
        ours.forward_draft_or_large_model()


def test_saves_and_loads_as_hugging_face_does(tmp_path):
    theirs, ours = tiny_pair(6)
    theirs.save_pretrained(tmp_path, safe_serialization=True)
    loaded = EarlyExitLlamaForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), ours.parameters(), strict=True))


def test_the_mask_sees_a_window():
    mask = _prepare_decoder_attention_mask(torch.tensor([[3, 4]]), torch.arange(6), window=2)
    assert mask[0, 0].int().tolist() == [[0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0]]


def test_angles_of_a_stretched_text_depend_on_nothing_but_its_length():
    """Not on other texts, nor on how far a table goes: libraries round the last numbers of a row in another way."""
    scaling = {"type": "dynamic", "factor": 2.0}
    rotary = rotary_for(tiny_config(rope_scaling=scaling, max_position_embeddings=40))
    positions = torch.arange(700)[None]
    lengths = list(range(37, 700, 21))
    together = rotary(positions, 699, torch.float32, lengths)
    for row, length in enumerate(lengths):
        alone = rotary(positions[:, :length], length - 1, torch.float32, [length])
        for one, other in zip(alone, together, strict=True):
            assert torch.equal(one[0], other[row, :, :length])
    whole = rotary.table(4000, torch.device("cpu"))[0]
    for size in range(41, 100):
        fresh = rotary_for(tiny_config(rope_scaling=scaling, max_position_embeddings=40))
        assert torch.equal(fresh.table(size, torch.device("cpu"))[0], whole[:size]), size


def test_rotary_table_grows_and_scales():
    rotary = LlamaRotaryEmbedding(8, 4)
    cos, _ = rotary(torch.tensor([[9]]), 9, torch.float32)
    assert rotary.max_seq_len_cached >= 10
    stretched = LlamaRotaryEmbedding(8, 32, scaling_factor=2.0)
    torch.testing.assert_close(stretched(torch.tensor([[18]]), 18, torch.float32)[0], cos)
    with pytest.raises(ValueError, match="rope_scaling"):
        config = tiny_config()
        config.rope_scaling = {"type": "longrope", "factor": 2.0}
        rotary_for(config)


def test_embeddings_can_be_resized_as_hugging_faces():
    theirs, ours = tiny_pair(8)
    ids = torch.randint(3, 200, (1, 7))
    for model in (theirs, ours):
        model.resize_token_embeddings(300)
    assert ours.lm_head.weight.shape == ours.model.embed_tokens.weight.shape == (300, 32)
    torch.testing.assert_close(ours(ids).logits[..., :264], theirs(ids).logits[..., :264], atol=1e-4, rtol=0)


def test_a_full_cache_and_a_bad_exit_layer_are_said():
    _, ours = tiny_pair(7)
    with pytest.raises(ValueError, match="needs 9 cache slots, the cache has 8"), ours.decoding(8, None):
        ours.forward_draft_or_large_model(in_tokens_small=torch.ones(1, 9, dtype=torch.long))
    with pytest.raises(ValueError, match="takes 1 to 3"):
        ours.set_exit_layer(4)
