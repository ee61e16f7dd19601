"""The replay buffer keeps accepts and rejects, first in, first out, and knows where they stood."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import EOS, random_prompts, tiny_kangaroo

from dvirl.buffer import FIELDS, ReplayBuffer
from dvirl.rollout import generate, judge
from kangaroo.decoding.blocks import DecodeConfig


def filled(capacity=1000, groups=3):
    model = tiny_kangaroo(1, 3)
    buffer, kept = ReplayBuffer(capacity), []
    for seed in range(groups):
        rollout = generate(model.base_model, random_prompts(4, seed), 12, (EOS,))
        records = judge(model, rollout, DecodeConfig(3)).records
        buffer.add(records, rollout)
        kept.append((records, rollout))
    return buffer, kept


def test_it_keeps_accepts_and_rejects_in_order():
    buffer, kept = filled()
    rewards = torch.cat([records.reward for records, _ in kept])
    assert torch.equal(buffer.field("reward"), rewards) and {0.0, 1.0} == set(rewards.tolist())
    assert len(buffer) == len(rewards)


def test_the_oldest_go_first():
    buffer, kept = filled(capacity=20)
    tokens = torch.cat([records.token for records, _ in kept])
    assert len(buffer) == 20 and torch.equal(buffer.field("token"), tokens[-20:])
    batch = buffer.batch(torch.arange(20))
    assert len(batch) == 20 and len(batch.tokens) <= 20


def test_every_record_finds_its_place():
    buffer, _ = filled()
    batch = buffer.batch(torch.arange(len(buffer)))
    own = batch.tokens[batch.row, batch.prompt_lens[batch.row] + batch.position]
    assert torch.equal(own, batch.verifier_token)
    assert torch.equal((batch.token == own).float(), batch.reward)
    model = tiny_kangaroo(1, 3)
    logits = model.head_model(batch.verifier_hidden)
    assert torch.equal(logits.argmax(-1), batch.verifier_token)
    torch.testing.assert_close(logits.softmax(-1).amax(-1), batch.verifier_confidence, atol=1e-5, rtol=1e-4)


def test_the_trigger_counts_accepted_tokens():
    buffer, kept = filled(groups=1)
    accepted = kept[0][0].num_accepted
    assert buffer.accepted_since_update == accepted
    assert buffer.due(accepted) and not buffer.due(accepted + 1)
    fresh = buffer.take_fresh()
    assert len(fresh.token) == len(kept[0][0]) and buffer.num_fresh == 0 and not buffer.due(1)
    buffer.add(*kept[0], num_accepted=7)
    assert buffer.accepted_since_update == 7 and len(buffer.take_fresh().token) == len(kept[0][0])


def test_recent_and_sampled_responses():
    buffer, kept = filled()
    recent = buffer.recent(4)
    assert torch.equal(recent.token, kept[-1][0].token)
    drawn = buffer.sample_responses(2, torch.Generator().manual_seed(0))
    assert len(drawn.tokens) == 2
    again = buffer.sample_responses(2, torch.Generator().manual_seed(0))
    assert torch.equal(drawn.token, again.token)
    assert len(buffer.sample_responses(10_000, torch.Generator())) == len(buffer)


def test_the_recent_responses_are_those_that_have_records():
    """One-token answers have none, and with `records=accepted` neither have those in which nothing was right."""
    buffer, kept = filled()
    records, rollout = kept[0]
    buffer.add(replace(records, **{name: value[:3] for name, value in vars(records).items()}), rollout)
    first = len(set(records.row[:3].tolist()))
    assert first < len(rollout)  # the last ones have no record
    assert torch.equal(buffer.recent(first).token, records.token[:3])
    buffer.skip_fresh(first)
    assert buffer.num_fresh == 3


def test_its_state_comes_back():
    buffer, kept = filled(capacity=30)
    other = ReplayBuffer(30)
    other.load_state_dict(buffer.state_dict())
    for one in (buffer, other):
        one.add(*kept[0])
    assert all(torch.equal(buffer.field(name), other.field(name)) for name in FIELDS)
    assert torch.equal(buffer.take_fresh().tokens, other.take_fresh().tokens)


def test_no_capacity_is_refused():
    with pytest.raises(ValueError, match="capacity is 0"):
        ReplayBuffer(0)
