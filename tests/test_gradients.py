"""The promise: each update steps its own weights and no others, with the right gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import scramble_lora, tiny_loaded, tiny_split
from test_trainer import tiny_settings

from dvirl.config import SCHEDULES
from dvirl.lora import train_only
from dvirl.losses import OBJECTIVES, REPLAYING, fast_loss
from dvirl.trainer import DVITrainer


def collected(**changes) -> DVITrainer:
    """A trainer with one batch of records in its buffer and adapters that matter."""
    trainer = DVITrainer(tiny_settings(**changes), tiny_loaded(), tiny_split())
    scramble_lora(trainer.model, ["lora_S", "lora_D"], 0.1)
    for group in trainer.collect():
        trainer.judge(group)
    trainer.counters.step = 5
    return trainer


def snapshot(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def changed(trainer, before):
    return {
        name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])
    }


def layers(names):
    return {int(name.split("layers.")[1].split(".")[0]) for name in names}


@pytest.mark.no_cover
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("exit_layer", [1, 2, 3])
def test_a_fast_update_changes_lora_s_and_nothing_else(schedule, exit_layer):
    trainer = collected(
        schedule=schedule, exit_layer=exit_layer, head="frozen", drafter="none", draft_vocab=0
    )
    before = snapshot(trainer)
    trainer.fast_update(trainer.buffer.take_fresh())
    moved = changed(trainer, before)
    assert moved - {"adapter_model.norm.weight"} and all(
        "lora_S" in n for n in moved - {"adapter_model.norm.weight"}
    )
    assert layers(moved - {"adapter_model.norm.weight"}) == set(range(exit_layer))


@pytest.mark.parametrize(
    "changes",
    [
        dict(schedule="reinforce", kl_weight=0.2, entropy_weight=0.01),
        dict(schedule="kl", kl_kind="reverse"),
        dict(schedule="kl", kl_kind="js", kl_top_k=4),
    ],
)
def test_regularisers_and_other_divergences_move_the_same_weights(changes):
    trainer = collected(head="full", draft_vocab=100, **changes)
    before = snapshot(trainer)
    trainer.fast_update(trainer.buffer.take_fresh())
    moved = changed(trainer, before)
    assert "exit_proj.weight" in moved and any("lora_S" in name for name in moved)
    assert not [n for n in moved if "lora_S" not in n and not n.startswith(("exit_proj", "adapter_model"))]


@pytest.mark.parametrize("schedule", REPLAYING)
def test_a_replay_does_not_look_at_the_draw(schedule):
    """The same old responses with other drafts and rewards move the weights to the same place."""
    ends = []
    for other in (False, True):
        trainer = collected(schedule=schedule, draft_vocab=100)
        batch = trainer.buffer.recent(4)
        if other:
            batch = replace(batch, token=batch.token.flip(0), reward=1 - batch.reward)
        before = snapshot(trainer)
        trainer.replay_update(batch)
        assert changed(trainer, before)
        ends.append(snapshot(trainer))
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_with_a_trained_head_and_drafter_these_move_too():
    trainer = collected(head="full", drafter="adapter", draft_vocab=100)
    before = snapshot(trainer)
    trainer.fast_update(trainer.buffer.take_fresh())
    trainer.replay_update(trainer.buffer.sample_responses(2, trainer.generator))
    moved = changed(trainer, before)
    assert "exit_proj.weight" in moved and any("adapter_model.layers.0" in name for name in moved)
    assert not [n for n in moved if "lora_S" not in n and not n.startswith(("exit_proj", "adapter_model"))]


@pytest.mark.parametrize("target", ["base", "adapted"])
def test_a_slow_update_changes_lora_d_and_nothing_else(target):
    trainer = collected(target=target)
    before = snapshot(trainer)
    result = trainer.slow_update(trainer.buffer.recent(4))
    moved = changed(trainer, before)
    assert result is not None and moved and all("lora_D" in name for name in moved)
    assert layers(moved) == {2, 3}


def test_a_whole_run_leaves_the_base_bit_for_bit(tmp_path):
    trainer = DVITrainer(tiny_settings(run_dir=str(tmp_path)), tiny_loaded(), tiny_split())
    before = {n: v.clone() for n, v in trainer.loaded.model.state_dict().items() if "lora_" not in n}
    trainer.train(show_progress=False)
    after = trainer.loaded.model.state_dict()
    assert trainer.counters.step > 3
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_guard_left_open_would_be_seen():
    """The control: were everything trainable, the fast update would still step only its own optimizer's weights, and
    the slow loss would leave gradients on the shallow layers; `train_only` keeps them away."""
    trainer = collected()
    batch = trainer.buffer.take_fresh()
    train_only(trainer.model, trainer.shallow)
    OBJECTIVES["kl"](trainer.decisions(batch)).backward()
    assert all(p.grad is None for p in trainer.deep)
    assert all(p.grad is not None for p in trainer.shallow if p.numel())


@pytest.mark.parametrize("actions", ["sampled", "argmax"])
def test_the_fast_gradient_equals_an_independent_recomputation(actions):
    """Every record alone, its whole prefix through the model without padding, batching or caches; loss by hand."""
    trainer = collected(schedule="reinforce", actions=actions, draft_vocab=100, head="full", drafter="layer")
    trainer.loaded.model.double()
    trainer.model.adapter_model.double()
    trainer.model.exit_proj.double()
    batch = trainer.buffer.take_fresh()
    baseline = 0.37
    train_only(trainer.model, trainer.shallow)
    loss = fast_loss(trainer.decisions(batch, baseline))
    found = torch.autograd.grad(loss, trainer.shallow, allow_unused=True)
    model, total = trainer.model, 0.0
    ids = model.draft_ids.tolist()
    for n in range(len(batch.token)):
        row, position = int(batch.row[n]), int(batch.position[n])
        prefix = batch.tokens[row, : int(batch.prompt_lens[row]) + position][None]
        states = model.base_model(prefix, output_hidden_states=True).hidden_states[2]
        hidden = model.adapter_model.forward_early_stop(states)[0, -1]
        log_policy = F.log_softmax((model.exit_proj.weight @ hidden).float(), dim=-1)
        total = total - (float(batch.reward[n]) - baseline) * log_policy[ids.index(int(batch.token[n]))]
    expected = torch.autograd.grad(total / len(batch.token), trainer.shallow, allow_unused=True)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)
    assert sum(float(g.abs().sum()) for g in found) > 0.1


def test_stored_states_carry_no_gradient():
    """Trap 1: learning from the buffer's own states would leave lora_S where it is."""
    trainer = collected()
    batch = trainer.buffer.take_fresh()
    assert not batch.hidden.requires_grad and not batch.verifier_hidden.requires_grad


def test_learning_from_stored_states_leaves_lora_s_where_it_was():
    trainer = collected(exit_states="stored", schedule="kl", head="full", drafter="none")
    before, recomputed = snapshot(trainer), collected(schedule="kl", head="full", drafter="none")
    stored = trainer.fast_update(trainer.buffer.take_fresh())
    assert changed(trainer, before) == {"adapter_model.norm.weight", "exit_proj.weight"}
    fast = recomputed.fast_update(recomputed.buffer.take_fresh())
    assert stored["loss_kl"] == pytest.approx(fast["loss_kl"], abs=1e-5)
    assert stored["grad_norm"] < fast["grad_norm"]


def test_accepted_drafts_alone_teach_reinforce_nothing():
    trainer = collected(records="accepted", schedule="reinforce", head="full", drafter="none")
    before = snapshot(trainer)
    fast = trainer.fast_update(batch := trainer.buffer.take_fresh())
    assert len(batch) == trainer.buffer.field("reward").sum() > 0
    assert (fast["reward"], fast["baseline"], fast["grad_norm"]) == (1.0, 1.0, 0.0)
    assert not changed(trainer, before)


def test_the_frozen_reference_is_the_base():
    trainer = collected()
    batch = trainer.buffer.recent(3)
    everywhere = torch.ones_like(batch.reward, dtype=torch.bool)
    with torch.no_grad():
        frozen = trainer._verifier_logits(batch, everywhere, without=("lora_D",))
        untouched = tiny_loaded().model(batch.tokens).logits
    before = batch.prompt_lens[batch.row] + batch.position - 1
    torch.testing.assert_close(frozen, untouched[batch.row, before], atol=1e-4, rtol=0)
    assert trainer.measure_drift(batch).drift_kl > 1e-4


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted():
    trainer = collected()
    batch = trainer.buffer.take_fresh()
    before = snapshot(trainer)
    broken = replace(batch, reward=batch.reward * float("nan"))
    trainer.config = replace(trainer.config, schedule="reinforce")
    trainer.fast_update(broken)
    assert not changed(trainer, before) and trainer.counters.skipped == 1
