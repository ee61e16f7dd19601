"""The batched rollout gives what the step-by-step decoder gives: the same text and the same records."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from conftest import EOS, capture_passes, random_prompts, tiny_config, tiny_kangaroo
from hypothesis import given, settings
from hypothesis import strategies as st

from dvirl.experiments.tape import Tape
from dvirl.rollout import (
    Records,
    decoded_records,
    decoded_rollout,
    generate,
    judge,
    replay_blocks,
    verifier_states,
)
from dvirl.runs.errors import DvirlError
from kangaroo.adapter import rotary_for
from kangaroo.decoding.blocks import DecodeConfig
from kangaroo.decoding.drafting import BlockPolicy
from kangaroo.decoding.generate import common_prefix

LENGTH = 20


def assert_same_records(found, expected):
    for field in ("row", "position", "depth", "token", "reward", "verifier_token"):
        assert getattr(found, field).tolist() == getattr(expected, field).tolist(), field
    torch.testing.assert_close(found.hidden, expected.hidden, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(found.verifier_confidence, expected.verifier_confidence, atol=1e-4, rtol=1e-4)


def records_of(decoded, prompt_len, row):
    """The records of one step-by-step decoding, in the same form."""
    blocks = [block for block in decoded.blocks if block.num_drafted]
    device = decoded.blocks[0].verifier_confidence.device
    count = [block.num_drafted for block in blocks]
    rewards = [float(i < block.num_accepted) for block in blocks for i in range(block.num_drafted)]
    positions = [block.start - prompt_len + i for block in blocks for i in range(block.num_drafted)]
    depths = [i for block in blocks for i in range(block.num_drafted)]
    own = [decoded.tokens[position] for position in positions]
    return Records(
        hidden=torch.cat([block.draft.exit_hidden[:n] for block, n in zip(blocks, count, strict=True)]),
        token=torch.cat([block.draft.tokens[:n] for block, n in zip(blocks, count, strict=True)]),
        reward=torch.tensor(rewards, device=device),
        verifier_confidence=torch.cat(
            [block.verifier_confidence[:n] for block, n in zip(blocks, count, strict=True)]
        ),
        verifier_token=torch.tensor(own, device=device),
        row=torch.full((len(own),), row, device=device),
        position=torch.tensor(positions, device=device),
        depth=torch.tensor(depths, device=device),
    )


def compare(model, config, prompts, eos, noise=None):
    rollout = generate(model.base_model, prompts, LENGTH, eos, config.target)
    judgement = judge(model, rollout, config, noise)
    parts = []
    for row, prompt in enumerate(prompts):
        decoded = model.generate(prompt, LENGTH, config, eos, None if noise is None else noise[row])
        parts.append(records_of(decoded, len(prompt), row))
        assert rollout.responses()[row] == decoded.tokens
        blocks = [
            (b.start - len(prompt), b.num_drafted, b.num_accepted, b.block_len) for b in decoded.blocks[1:]
        ]
        replayed = judgement.blocks[row]
        assert [
            (b.start - len(prompt), b.num_drafted, b.num_accepted, b.block_len) for b in replayed
        ] == blocks
        assert [b.committed for b in replayed] == [b.committed for b in decoded.blocks[1:]]
    joined = type(parts[0])(
        *(torch.cat([getattr(p, f) for p in parts]) for f in parts[0].__dataclass_fields__)
    )
    assert_same_records(judgement.records, joined)
    return judgement


@pytest.mark.no_cover
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 6),
    exit_layer=st.integers(1, 3),
    draft_len=st.integers(1, 6),
    threshold=st.sampled_from([0.0, 0.2, 0.6]),
    drafter=st.sampled_from(["none", "adapter", "layer"]),
    feedback=st.sampled_from(["none", "whole", "recurrent", "middle"]),
    target=st.sampled_from(["base", "adapted"]),
    sampled=st.booleans(),
)
def test_records_equal_the_step_by_step_decoders(
    seed, exit_layer, draft_len, threshold, drafter, feedback, target, sampled
):
    args = dict(drafter=drafter, adapter_window=6, draft_vocab=range(200), feedback=feedback != "none")
    args["recurrent"] = feedback == "recurrent"
    args["middle_layer"] = 3 if feedback == "middle" and exit_layer < 3 else 0
    model = tiny_kangaroo(seed, exit_layer, **args)
    if feedback != "none":
        target = "base"
        adapter = model.adapter_model
        for fuse in filter(None, (adapter.fuse, adapter.fuse_later, adapter.fuse_middle)):
            fuse.weight.data += 0.3 * torch.randn_like(fuse.weight)
    config = DecodeConfig(draft_len, threshold, target, 0.5 if sampled else 0.0)
    noise = None
    if sampled:  # in float64: noise may lie within float32's rounding of where one token's share ends
        model = model.double()
        noise = torch.rand(4, LENGTH, generator=torch.Generator().manual_seed(seed))
    compare(model, config, random_prompts(4, seed), (EOS,), noise)


def test_they_agree_where_drafts_are_often_right():
    """With the exit near the end and weak adapters much is accepted, and ends fall inside blocks."""
    model = tiny_kangaroo(0, 3, lora=False, deep_scale=0.1)
    prompts = random_prompts(6, 5)
    plain = generate(model.base_model, prompts, LENGTH)
    ends = {plain.responses()[row][7] for row in range(3)}
    judgement = compare(model, DecodeConfig(4), prompts, tuple(ends))
    rate = float(judgement.records.reward.mean())
    assert rate > 0.4
    assert any(block.block_len == block.num_accepted for row in judgement.blocks for block in row), (
        "no end was accepted"
    )


def test_texts_that_dynamic_positions_stretch_are_not_judged_at_once():
    """Beyond the context of training a pass over a whole text has other angles than decoding had."""
    model = tiny_kangaroo(0, 3, lora=False)
    prompts = random_prompts(2, 5, longest=4)
    rollout = generate(model.base_model, prompts, LENGTH)
    scaling = {"type": "dynamic", "factor": 2.0}
    longest = rollout.tokens.shape[1]
    for context, one in (
        (longest, model.base_model),
        (longest - 1, model.adapter_model),
        (longest - 1, model.base_model),
    ):
        config = tiny_config(rope_scaling=scaling, max_position_embeddings=context)
        one.rotary = rotary_for(config)
        refused = pytest.raises(
            DvirlError, match=f"texts have up to {longest} tokens; expected at most {context}"
        )
        with nullcontext() if context == longest else refused:
            judge(model, rollout, DecodeConfig(2))


def test_rewards_hold_accepts_and_rejects():
    records = judge(
        tiny_kangaroo(1, 3),
        generate(tiny_kangaroo(1, 3).base_model, random_prompts(6), LENGTH),
        DecodeConfig(3),
    ).records
    assert 0 < records.num_accepted < len(records)


def test_a_shared_prefix_is_computed_once_and_changes_nothing():
    model = tiny_kangaroo(2).base_model
    prompts = [[7, 8, 9, 10, *prompt] for prompt in random_prompts(5, 2)]
    together = generate(model, prompts, LENGTH)
    for row, prompt in enumerate(prompts):
        assert together.responses()[row] == generate(model, [prompt], LENGTH).responses()[0]
    assert together.prompts() == prompts
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(p) for p in prompts], batch_first=True)
    assert common_prefix(padded, torch.tensor([len(p) for p in prompts])) >= 4


def test_rows_that_end_early_leave_the_batch():
    model = tiny_kangaroo(3).base_model
    prompts = random_prompts(8, 3)
    free = [generate(model, [prompt], LENGTH).responses()[0] for prompt in prompts]
    ends = tuple({response[index] for index, response in enumerate(free)})
    stopped = generate(model, prompts, LENGTH, ends)
    for row, response in enumerate(free):
        cut = next((i + 1 for i, token in enumerate(response) if token in ends), LENGTH)
        assert stopped.responses()[row] == response[:cut]


def test_block_rule_by_hand():
    config = DecodeConfig(2)
    # Positions 1…6: right, right, right, wrong, right, right; 1+2 and bonus 3, then 4 rejected, then 5 and bonus 6.
    blocks = replay_blocks([True, True, True, False, True, True], [1.0] * 6, config, 7)
    assert [(b.start, b.num_drafted, b.num_accepted, b.block_len) for b in blocks] == [
        (1, 2, 2, 3),
        (4, 1, 0, 1),
        (5, 1, 1, 2),
    ]


def test_a_tape_plays_the_same_answers_to_the_same_prompts():
    model = tiny_kangaroo(0).base_model
    prompts = random_prompts(4)
    tape = Tape()
    first = tape.recording(lambda batch: generate(model, batch, 6))(prompts)
    play = tape.playing()
    assert play(prompts) is first
    with pytest.raises(ValueError, match="no answers to these prompts"):
        play(prompts)
    with pytest.raises(ValueError, match="no answers to these prompts"):
        tape.playing()(prompts[:2])
    second = tape.recording(lambda batch: generate(model, batch, 6))(prompts[:2])
    goes_on = tape.playing()  # as for a run that had its first answers before it was interrupted
    assert goes_on(prompts[:2]) is second
    with pytest.raises(ValueError, match="no answers to these prompts"):
        goes_on(prompts)


@pytest.mark.parametrize(("prompts", "length"), [([], 4), ([[3], []], 4), ([[3]], 0)])
def test_bad_prompts_are_refused(prompts, length):
    with pytest.raises(ValueError, match="at least one token"):
        generate(tiny_kangaroo(0).base_model, prompts, length)


@pytest.mark.no_cover
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 6),
    draft_len=st.integers(1, 6),
    threshold=st.sampled_from([0.0, 0.3]),
    drafter=st.sampled_from(["none", "layer"]),
    target=st.sampled_from(["base", "adapted"]),
)
def test_records_of_decoded_blocks_are_those_of_a_rollout(seed, draft_len, threshold, drafter, target):
    model = tiny_kangaroo(seed, 3, drafter=drafter, draft_vocab=range(200), deep_scale=0.3)
    config = DecodeConfig(draft_len, threshold, target, keep_states=True)
    for prompt in random_prompts(3, seed):
        rollout = generate(model.base_model, [prompt], LENGTH, (EOS,), target)
        judgement = judge(model, rollout, config)
        decoded = model.generate(prompt, LENGTH, config, (EOS,))
        found = decoded_rollout(prompt, decoded.blocks, LENGTH)
        assert_same_records(decoded_records(found, decoded.blocks), judgement.records)
        for name in ("tokens", "prompt_lens", "response_lens"):
            assert torch.equal(getattr(found, name), getattr(rollout, name))
        torch.testing.assert_close(found.verifier_hidden, rollout.verifier_hidden, atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(
            found.verifier_confidence, rollout.verifier_confidence, atol=1e-4, rtol=1e-4
        )


def records_from(prompt, blocks):
    return decoded_records(decoded_rollout(prompt, blocks, LENGTH), blocks)


def test_only_learned_drafts_leave_records(monkeypatch):
    """Lookups leave none, nor do those after learned drafts."""
    model = tiny_kangaroo(0, 3, lora=False, deep_scale=0.3)
    prompt = [5, 6, 7, 8] * 5
    looked_up = model.generate(prompt, LENGTH, DecodeConfig(3, source="lookup", keep_states=True))
    assert not len(records_from(prompt, looked_up.blocks))
    # What is looked up is what follows, so it is right wherever the drafts before it are.
    text = [*prompt, *looked_up.tokens]

    def follows(policy):
        length = len(policy._index.tokens) + len(policy._drafts)
        return text[length : length + 2]

    monkeypatch.setattr(BlockPolicy, "look_up", follows)
    config = DecodeConfig(5, source="hybrid", keep_states=True)
    decoded = model.generate(prompt, LENGTH, config)
    assert decoded.tokens == looked_up.tokens
    assert any(block.num_accepted > block.draft.num_learned > 0 for block in decoded.blocks)
    records = records_from(prompt, decoded.blocks)
    scored = [min(block.num_drafted, block.draft.num_learned, block.block_len) for block in decoded.blocks]
    assert len(records) == len(records.hidden) == sum(scored)
    own = torch.tensor(decoded.tokens)[records.position]
    assert torch.equal(records.verifier_token, own)
    assert torch.equal(records.reward, (records.token == own).float())
    assert 0 < records.num_accepted < len(records)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_states_are_kept_where_asked_for_alone(count, temperature, monkeypatch):
    model = tiny_kangaroo(1, 3, deep_scale=0.3)
    prompts = random_prompts(count, 1)
    plain = model.generate_batch(prompts, LENGTH, DecodeConfig(3, temperature=temperature))
    capture_passes(model, monkeypatch)
    kept = model.generate_batch(prompts, LENGTH, DecodeConfig(3, temperature=temperature, keep_states=True))
    assert all(not block.verifier_hidden.numel() for answer in plain for block in answer.blocks)
    for prompt, answer, other in zip(prompts, kept, plain, strict=True):
        assert answer.tokens == other.tokens
        states = torch.cat([block.verifier_hidden[: block.block_len] for block in answer.blocks])
        tokens = torch.tensor([[*prompt, *answer.tokens]])
        expected = verifier_states(model.base_model, tokens, ["lora_S"])[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(states, expected, atol=2e-4, rtol=1e-4)
