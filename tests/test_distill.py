"""Distillation at scale: the right loss on the right weights, a draft that learns, a run that can be killed."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import copied, random_prompts, tiny_loaded
from test_corpus import ENDS
from test_models import save_tiny
from torch import nn
from torch.optim import AdamW, Muon

from dvirl import cli
from dvirl.evaluation.agreement import measure_agreement
from dvirl.lora import train_only
from dvirl.losses import BY_DEPTH, FOR_BLOCKS, Teacher, distillation_loss
from dvirl.models.drafters import load_drafter
from dvirl.rollout import Responses
from dvirl.runs import optim
from dvirl.runs.errors import DvirlError
from dvirl.runs.log import read_metrics
from dvirl.runs.optim import Optimizers
from dvirl.scale import distill
from dvirl.scale.corpus import answer, write_shard
from dvirl.scale.distill import DistillConfig, Distiller, _Objective


@pytest.fixture(scope="module")
def responses(tmp_path_factory) -> Path:
    """A folder with a shard of the tiny model's answers to few prompts, of many lengths."""
    folder = tmp_path_factory.mktemp("responses")
    loaded = dataclasses.replace(tiny_loaded(), eos_ids=ENDS)
    write_shard(folder / "shard-00000.safetensors", answer(loaded, random_prompts(29), 16, 8))
    return folder


def settings(run_dir, responses="", **changes) -> DistillConfig:
    """Small; one drafter layer, since the default's two would be all that the tiny model has after its exit."""
    values = dict(
        drafter_layers=1, run_dir=str(run_dir), responses_from=str(responses), lora_rank=4, head_rank=8, draft_vocab=100, batch=4,
        passes=3, warmup_steps=3, log_every=5, checkpoint_every=5, answer_tokens=16, threads=1, dtype="float32",
        device="cpu",
    )  # fmt: skip
    return DistillConfig(**{**values, **changes})


def distiller(run_dir, responses="", **changes) -> Distiller:
    return Distiller(settings(run_dir, responses, **changes), tiny_loaded())


# The loss


@pytest.mark.parametrize("ce_weight", [0.0, 0.3, 1.0])
def test_the_loss_is_that_of_a_plain_computation(ce_weight):
    generator = torch.Generator().manual_seed(0)
    draft, verifier = (3 * torch.randn(5, 7, generator=generator) for _ in range(2))
    index, weight = torch.tensor([0, 6, -1, 3, 2]), torch.tensor([1.0, 1.0, 1.0, 0.0, 0.5])

    def log_softmax(row):
        shift = math.log(sum(math.exp(x) for x in row))
        return [x - shift for x in row]

    total = 0.0
    for q, p, i, w in zip(
        draft.double().tolist(), verifier.double().tolist(), index.tolist(), weight.tolist(), strict=True
    ):
        q, p = log_softmax(q), log_softmax(p)
        kl = sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))
        total += w * ((1 - ce_weight) * kl + ce_weight * (-q[i] if i >= 0 else 0.0))
    assert float(
        (distillation_loss(draft, Teacher.of(verifier), index, ce_weight) * weight).sum()
    ) == pytest.approx(total, rel=1e-5)


def test_its_gradient_is_the_difference_of_distributions_and_reaches_no_verifier():
    generator = torch.Generator().manual_seed(0)
    draft, verifier = (torch.randn(4, 6, generator=generator, requires_grad=True) for _ in range(2))
    index, weight, c = torch.tensor([1, -1, 0, 5]), torch.tensor([1.0, 1.0, 0.0, 1.0]), 0.25
    gradient, none = torch.autograd.grad(
        (distillation_loss(draft, Teacher.of(verifier), index, c) * weight).sum() / 3,
        [draft, verifier],
        allow_unused=True,
    )
    p, q = verifier.softmax(-1), draft.softmax(-1)
    one_hot = torch.nn.functional.one_hot(index.clamp(min=0), 6) * (index >= 0)[:, None]
    pulled = (index >= 0)[:, None] * q - one_hot
    expected = ((1 - c) * (q - p) + c * pulled) * weight[:, None] / 3
    torch.testing.assert_close(gradient, expected.detach())
    assert none is None


KINDS = [
    {"feedback": False},
    {"feedback": True},
    {"feedback": True, "recurrent": True},
    {"feedback": True, "recurrent": True, "middle_layer": 3},
]
REWARDS = [
    {"feedback": True, "recurrent": True, "objective": objective, "kl_weight": 0.1}
    for objective in (*BY_DEPTH, *FOR_BLOCKS)
]


@pytest.mark.parametrize("changes", [*KINDS, *REWARDS[1:], {"objective": "reinforce_block"}])
def test_padding_changes_neither_loss_nor_gradient(tmp_path, responses, changes):
    """The shapes that CUDA graphs ask for: rows, widths and positions filled up; here for a short last batch too."""
    mine = distiller(tmp_path, responses, passes=1, ce_weight=0.2, **changes)
    train_only(mine.model, mine.parameters)
    batches = list(mine.batches())
    assert len(batches[-1][0]) < 4
    for batch, states in (batches[0], batches[-1]):
        found = []
        for padded in (False, True):
            inputs = mine._positions(batch, states, padded)
            outputs = _Objective(mine.model, mine.config)(*inputs, *mine._for_actions(len(inputs[1])))
            found.append([*outputs, *torch.autograd.grad(outputs[0], mine.parameters)])
        assert inputs[0].shape == (4, distill.WIDTH_STEP) and len(inputs[1]) == 4 * 15
        assert int(inputs[-1].sum()) == int((batch.response_lens - 1).sum())
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def chances_by_block(mine, batch, states, sampled) -> list[list[float]]:
    """For each block, one from every response position: the chance of each draft, by a loop over plain lists."""
    model = mine.model
    exit_hidden = model.base_model.forward_shallow(batch.tokens)
    depths = model.drafter_depths(batch.tokens, exit_hidden, states, 3)
    depths = [depths[min(depth, len(depths) - 1)] for depth in range(3)]
    blocks = []
    for row, (prompt, length) in enumerate(
        zip(batch.prompt_lens.tolist(), batch.response_lens.tolist(), strict=True)
    ):
        for start in range(prompt, prompt + length - 1):
            blocks.append([])
            for depth in range(min(3, prompt + length - 1 - start)):
                at = start + depth
                q = torch.zeros(model.head_model.weight.shape[0])
                q[model.draft_ids] = model.head_logits(depths[depth][row, at]).softmax(-1)
                p = model.head_model(states[row, at, : model.head_model.in_features]).softmax(-1)
                y = int(batch.tokens[row, at + 1])
                blocks[-1].append(float(torch.minimum(p, q).sum() if sampled else q[y]))
    return blocks


@pytest.mark.parametrize("changes", KINDS)
@pytest.mark.parametrize("objective", ["block", "block_alpha"])
def test_the_reward_of_blocks_is_that_of_a_loop_over_positions(tmp_path, responses, objective, changes):
    mine = distiller(tmp_path, responses, objective=objective, depths=3, batch=8, draft_vocab=150, **changes)
    batch, states = next(mine.batches())
    loss = mine.objective(*mine._positions(batch, states, False))[0]
    lengths = []
    for chances in chances_by_block(mine, batch, states, objective == "block_alpha"):
        lengths.append(sum(math.prod(chances[: depth + 1]) for depth in range(len(chances))))
    assert float(loss.detach()) == pytest.approx(-sum(lengths) / len(lengths), rel=1e-4)
    assert sum(lengths) / len(lengths) > 0.005


@pytest.mark.parametrize("feedback", [False, True])
def test_positions_and_the_logged_agreement_are_those_of_the_evaluation(tmp_path, responses, feedback):
    mine = distiller(tmp_path, responses, passes=1, batch=64, feedback=feedback)
    ((batch, states),) = mine.batches()
    _, agreement = mine.objective(*mine._positions(batch, states, False))
    found = measure_agreement(mine.model, mine.responses)
    assert float(agreement) == pytest.approx(found.rate, abs=1e-6)
    logits = mine.model.head_model(states)
    for row, (start, length) in enumerate(
        zip(batch.prompt_lens.tolist(), batch.response_lens.tolist(), strict=True)
    ):
        chosen = logits[row, start - 1 : start + length - 1].argmax(-1)
        assert chosen.tolist() == batch.tokens[row, start : start + length].tolist()


def test_kept_states_are_those_that_a_pass_computes(tmp_path, responses, monkeypatch):
    """With room and several passes the verifier reads each response once, a few at a time."""
    monkeypatch.setattr(distill, "SWEPT", 3)
    kept = distiller(tmp_path / "kept", responses, passes=2)
    monkeypatch.setattr(distill, "KEPT_SHARE", 0.0)
    computed = distiller(tmp_path / "computed", responses, passes=2)
    assert kept._kept and not computed._kept
    assert not distiller(tmp_path / "once", responses, passes=1)._kept
    monkeypatch.setattr(distill, "verifier_states", lambda *_: pytest.fail("read again"))
    found = list(kept.batches())
    monkeypatch.undo()
    for (batch, states), (same, expected) in zip(found, computed.batches(), strict=True):
        assert torch.equal(batch.tokens, same.tokens)
        inside = torch.arange(states.shape[1]) < (batch.prompt_lens + batch.response_lens)[:, None]
        torch.testing.assert_close(states[inside], expected[inside])


# What it trains


@pytest.mark.no_cover
@pytest.mark.parametrize(
    "changes", [{}, dict(muon=0.0), dict(head="full", drafter="adapter"), dict(drafter="none", ce_weight=0.5)]
)
def test_the_draft_learns(tmp_path, responses, changes):
    """Few responses, many times; a random model has no pattern that carries over to others."""
    mine = distiller(tmp_path / "a", responses, passes=25, draft_vocab=0, lr=1e-2, **changes)
    before = measure_agreement(mine.model, mine.responses).rate
    result = mine.train()
    after = measure_agreement(mine.model, mine.responses)
    assert before < 0.4 and after.rate > 0.75 and result.agreement == pytest.approx(after.rate, abs=0.1)


@pytest.mark.no_cover
@pytest.mark.parametrize("objective", ["alpha", "block"])
def test_rewards_teach_longer_blocks(tmp_path, responses, objective):
    changes = dict(feedback=True, recurrent=True, depths=2, draft_vocab=0, passes=12, lr=1e-2, log_every=1)
    mine = distiller(tmp_path, responses, objective=objective, reward_from=0.3, **changes)
    mine.train()
    log = read_metrics(tmp_path / "metrics.jsonl").query("phase == 'train'").agreement
    begun = math.ceil(0.3 * len(log))
    assert log.iloc[-5:].mean() > log.iloc[begun : begun + 5].mean() + 0.1


@pytest.mark.no_cover
def test_sampled_blocks_have_the_exact_gradient_in_the_mean(tmp_path, responses):
    """Of one batch, over many draws; with KL first, so that blocks are longer than none."""
    mine = distiller(tmp_path, responses, feedback=True, recurrent=True, depths=3, passes=12, lr=1e-2)
    mine.train()
    train_only(mine.model, mine.parameters)
    mine.counters.step = 0
    inputs = mine._positions(*next(mine.batches()), False)

    def gradient(objective, *more):
        kind = _Objective(mine.model, dataclasses.replace(mine.config, objective=objective))
        parts = torch.autograd.grad(kind(*inputs, *more)[0], [mine.model.head_down, mine.model.head_up])
        return torch.cat([part.flatten() for part in parts])

    draws, baselines = torch.Generator().manual_seed(0), torch.tensor([0.8, 0.7, 0.5])
    total = sum(
        gradient("reinforce_block", torch.rand(len(inputs[1]), 3, generator=draws), baselines)
        for _ in range(100)
    )
    assert torch.cosine_similarity(total, gradient("block"), dim=0) > 0.65


def test_the_reward_begins_when_it_is_asked_to(tmp_path, responses):
    mine = distiller(tmp_path, responses, objective="block", reward_from=0.5)
    begun = []
    for step in range(mine.length):
        mine.counters.step = step
        begun.append(mine._now.objective)
    half = math.ceil(mine.length / 2)
    assert begun == ["kl"] * half + ["block"] * (mine.length - half)


def test_baselines_follow_the_returns(tmp_path, responses):
    mine = distiller(tmp_path, responses, **{**SAMPLED, "reward_from": 0.0})
    train_only(mine.model, mine.parameters)
    batch, states = next(mine.batches())
    inputs = mine._positions(batch, states, False)
    means = mine.objective(*inputs, *mine._for_actions(len(inputs[1])))[2]
    mine.update(batch, states)
    torch.testing.assert_close(mine.baselines, 0.1 * means)
    assert means[0] > 0
    noise = mine._for_actions(4)[0]
    mine.counters.step += 1
    assert noise.shape == (4, 3) and not torch.equal(noise, mine._for_actions(4)[0])


def test_a_run_begun_again_is_a_fresh_run(tmp_path, responses):
    """From the same drafter, with the same responses; the first run leaves no trace."""
    start = distiller(tmp_path / "start", responses, feedback=True).train().drafter
    changes = dict(feedback=True, start_from=start, passes=1)
    fresh = distiller(tmp_path / "fresh", responses, **changes, objective="block", seed=3)
    mine = distiller(tmp_path / "one", responses, **changes)
    mine.train()
    config = settings(tmp_path / "two", responses, **changes, objective="block", seed=3)
    places = [parameter.data_ptr() for parameter in mine.model.parameters()]
    mine.begin_again(config)
    # Captured graphs read and write these places.
    assert places == [parameter.data_ptr() for parameter in mine.model.parameters()]
    fresh._kept = mine._kept
    fresh.train()
    mine.train()
    assert_same_end(fresh, mine)


def test_the_control_learns_nothing(tmp_path, responses):
    mine = distiller(tmp_path, responses, lr=0.0)
    before = measure_agreement(mine.model, mine.responses)
    mine.train()
    assert measure_agreement(mine.model, mine.responses) == before


@pytest.mark.parametrize(
    ("changes", "moving"),
    [
        ({}, {"lora_S", "adapter_model", "head_down", "head_up"}),
        (dict(head="full"), {"lora_S", "adapter_model", "exit_proj"}),
        (dict(head="frozen", drafter="none"), {"lora_S", "adapter_model"}),
        (dict(lora_shallow=False), {"adapter_model", "head_down", "head_up"}),
    ],
)
def test_only_what_drafts_moves(tmp_path, responses, changes, moving):
    mine = distiller(tmp_path, responses, passes=1, **changes)
    before = {name: value.clone() for name, value in mine.model.state_dict().items()}
    mine.train()
    moved = {name for name, value in mine.model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"lora_S" if "lora_S" in name else name.split(".")[0] for name in moved} == moving
    assert all("lora_S" in name for name in moved if name.startswith("base_model"))
    owned = {name for name in before if "lora_S" in name or name.split(".")[0] in moving - {"lora_S"}}
    assert moved == {name for name in owned if "lora_shallow" not in changes or "lora_S" not in name}


def test_muon_steps_the_drafters_matrices_at_its_own_rate(tmp_path, responses):
    """One step of Muon moves a matrix by 0.2 lr muon sqrt(max(A, B)) times an orthogonal one; AdamW by lr each entry."""
    mine = distiller(tmp_path, responses, warmup_steps=0, muon=3.0, lr=1e-3)
    batch, states = next(mine.batches())
    train_only(mine.model, mine.parameters)
    before = {name: value.clone() for name, value in mine.model.state_dict().items()}
    mine.update(batch, states)
    for name, value in mine.model.adapter_model.named_parameters():
        change = (value - before[f"adapter_model.{name}"]) / 1e-3
        if value.ndim == 2:
            sizes = torch.linalg.svdvals(change.detach()) / (3.0 * 0.2 * max(value.shape) ** 0.5)
            assert sizes.max() < 1.3 and sizes.median() > 0.5, name
        else:
            torch.testing.assert_close(change.abs(), torch.ones_like(change), atol=2e-2, rtol=0)
    tensors = mine.optimizers.tensors()
    matrices = [p for p in mine.model.adapter_model.parameters() if p.ndim == 2]
    assert len([key for key in tensors if key.startswith("muon.")]) == len(matrices) == 7
    assert len([key for key in tensors if key.startswith("fast.")]) == 3 * (
        len(mine.parameters) - len(matrices)
    )


# Runs


def state_of(mine: Distiller):
    return {**mine.model.state_dict(), **mine.optimizers.tensors(), "baselines": mine.baselines}


def assert_same_end(one: Distiller, other: Distiller) -> None:
    mine, its = state_of(one), state_of(other)
    assert mine.keys() == its.keys() and all(torch.equal(mine[name], its[name]) for name in mine)
    tables = [read_metrics(Path(d.config.run_dir) / "metrics.jsonl") for d in (one, other)]
    timeless = ["step", "tokens", "loss", "agreement", "lr", "grad_norm"]
    first, second = (table[table.phase == "train"][timeless].reset_index(drop=True) for table in tables)
    assert first.equals(second)


SAMPLED = dict(
    feedback=True, recurrent=True, objective="reinforce_block", kl_weight=0.2, depths=3, reward_from=0.2
)


@pytest.mark.no_cover
@pytest.mark.parametrize(
    ("changes", "killed_at"), [({}, 7), ({}, 13), ({"muon": 0.0}, 19), (SAMPLED, 7), (SAMPLED, 13)]
)
def test_a_killed_run_goes_on_bit_by_bit(tmp_path, responses, monkeypatch, changes, killed_at):
    whole = distiller(tmp_path / "whole", responses, **changes)
    assert whole.train().steps == whole.length == 3 * math.ceil(len(whole.responses) / 4)

    class KilledError(Exception):
        pass

    victim, update = distiller(tmp_path / "killed", responses, **changes), Distiller.update

    def dying(self, batch, states):
        if self.counters.step == killed_at:
            raise KilledError
        return update(self, batch, states)

    monkeypatch.setattr(Distiller, "update", dying)
    with pytest.raises(KilledError):
        victim.train()
    monkeypatch.undo()
    with (tmp_path / "killed/metrics.jsonl").open("a") as log:
        log.write('{"phase": "train", "st')
    again = distiller(tmp_path / "killed", responses, **changes)
    assert again.counters.step == killed_at // 5 * 5 and again.counters.tokens > 0
    result = again.train()
    assert result.steps == whole.counters.step and result.learned == whole.counters.tokens
    assert_same_end(whole, again)
    starts = read_metrics(tmp_path / "killed/metrics.jsonl").query("phase == 'start'")
    assert starts.step.tolist() == [0, killed_at // 5 * 5]


def test_a_torn_line_of_a_written_shard_does_not_join_the_next(tmp_path):
    config = settings(tmp_path / "run", num_tokens=60, passes=1)
    loaded = dataclasses.replace(tiny_loaded(), eos_ids=ENDS)
    Distiller(config, loaded)
    log = tmp_path / "run/metrics.jsonl"
    log.write_text(log.read_text().splitlines()[0][:20])
    for shard in (tmp_path / "run/responses").iterdir():
        shard.unlink()
    Distiller(config, dataclasses.replace(tiny_loaded(), eos_ids=ENDS)).train(show_progress=False)
    assert set(read_metrics(log).phase) == {"write", "start", "train"}


def test_a_run_killed_while_it_writes_goes_on_with_the_shards_it_has(tmp_path, monkeypatch):
    loaded = dataclasses.replace(tiny_loaded(), eos_ids=ENDS)
    monkeypatch.setattr(distill, "SHARD", 8)
    config = settings(tmp_path / "run", num_tokens=250, passes=1)
    whole = Distiller(dataclasses.replace(config, run_dir=str(tmp_path / "whole")), loaded)
    shards = sorted(path.name for path in (tmp_path / "whole/responses").iterdir())
    assert len(shards) > 2 and whole.responses.num_tokens + 40 > 250
    (tmp_path / "run/responses").mkdir(parents=True)
    shutil.copy(tmp_path / "whole/responses" / shards[0], tmp_path / "run/responses")
    again = Distiller(config, dataclasses.replace(tiny_loaded(), eos_ids=ENDS))
    assert all(
        torch.equal(value, vars(again.responses)[name]) for name, value in vars(whole.responses).items()
    )
    for one, count in ((whole, len(shards)), (again, len(shards) - 1)):
        result = one.train()
        log = read_metrics(Path(one.config.run_dir) / "metrics.jsonl")
        written = log[log.phase == "write"]
        assert len(written) == count and result.written == written.tokens.sum() > 0
        assert result.write_s == pytest.approx(written.wall_s.sum()) and result.write_s > 0
    assert_same_end(whole, again)


def test_a_finished_run_has_nothing_left_to_do(tmp_path, responses):
    first = distiller(tmp_path, responses, passes=1)
    result = first.train()
    again = distiller(tmp_path, responses, passes=1)
    assert dataclasses.replace(again.train(), memory_gb=0) == dataclasses.replace(result, memory_gb=0)
    assert_same_end(first, again)


def test_a_run_with_other_settings_is_left_alone(tmp_path, responses):
    distiller(tmp_path, responses)
    before = (tmp_path / "config.yaml").read_text()
    with pytest.raises(
        DvirlError, match=r"other settings: lora_rank \(4, now 2\), lr \(0\.004, now 0\.001\); choose"
    ):
        distiller(tmp_path, responses, lr=1e-3, lora_rank=2)
    assert (tmp_path / "config.yaml").read_text() == before


def test_the_clock_ends_a_run_and_its_schedule(tmp_path, responses, monkeypatch):
    clock = itertools.count(
        0.0, 0.01
    )  # one that every look at it moves on, so that the test is as fast as it is
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    mine = distiller(tmp_path, responses, passes=10_000, max_minutes=0.01, lr=1e-3, warmup_steps=0)
    result = mine.train()
    assert 40 < result.steps < 60 < mine.length and 0.6 <= result.train_s < 0.7
    log = read_metrics(tmp_path / "metrics.jsonl").query("phase == 'train'")
    assert log.step.iloc[-1] == result.steps and log.lr.iloc[-1] < 0.2e-3 < 0.9e-3 < log.lr.iloc[0]
    again = distiller(tmp_path, responses, passes=10_000, max_minutes=0.01, lr=1e-3, warmup_steps=0)
    assert again.train().steps == result.steps


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_an_update_that_is_not_finite_is_left_out_said_and_counted(tmp_path, responses, capsys, broken):
    mine = distiller(tmp_path, responses, log_every=3, checkpoint_every=1)
    update = mine.update

    def breaking(batch, states):
        before = [
            *(p.clone() for p in mine.parameters),
            *(t.clone() for t in mine.optimizers.tensors().values()),
        ]
        found = update(batch, states + broken if mine.counters.step == 4 else states)
        after = [*mine.parameters, *mine.optimizers.tensors().values()]
        same = len(before) == len(after) and all(
            torch.equal(a, b) for a, b in zip(before, after, strict=True)
        )
        assert same == (mine.counters.step == 5)
        return found

    mine.update = breaking
    mine.train()
    assert "step 5: loss or gradient is not finite; the update is left out" in capsys.readouterr().err
    log = read_metrics(tmp_path / "metrics.jsonl").query("phase == 'train'")
    assert (
        log.skipped.tolist() == [0, *[1] * (len(log) - 1)]
        and log.loss.notna().all()
        and mine.counters.step == mine.length
    )
    assert distiller(tmp_path, responses, log_every=3, checkpoint_every=1).counters.skipped == 1


def test_batches_hold_every_response_once_a_pass_in_another_order(tmp_path, responses):
    mine = distiller(tmp_path, responses, passes=2)
    batches = []
    for batch, states in mine.batches():
        assert states.shape[:2] == batch.tokens.shape
        batches.append(batch)
        mine.counters.step += 1

    def rows(part):
        return [
            tuple(row[: int(p + r)].tolist())
            for b in part
            for row, p, r in zip(b.tokens, b.prompt_lens, b.response_lens, strict=True)
        ]

    half = len(batches) // 2
    first, second = rows(batches[:half]), rows(batches[half:])
    assert sorted(first) == sorted(second) == sorted(rows([mine.responses])) and first != second


# Responses


def question_file(path: Path, turns) -> str:
    path.write_text(
        "\n".join(json.dumps({"question_id": n, "category": "", "turns": t}) for n, t in enumerate(turns))
    )
    return str(path)


def test_rows_that_share_text_with_a_question_are_left_out_and_counted(tmp_path, capsys):
    loaded = tiny_loaded()
    plain = loaded.chat.plain
    texts = ["Name a fruit, please", "What is the tallest mountain on Earth?", "Count to ten"]
    rows = [[*plain(text), 3, 4, 5] for text in (*texts, texts[0], "short")]
    rows[4] = rows[4][:-2]
    width = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.int32)
    responses = Responses(
        tokens,
        torch.tensor([len(r) - 3 for r in rows[:4]] + [len(rows[4]) - 1]),
        torch.tensor([3, 3, 3, 3, 1]),
    )
    write_shard(tmp_path / "shard-00000.safetensors", responses)
    one = question_file(tmp_path / "one.jsonl", [["And what is the tallest mountain?", "Why?"]])
    two = question_file(
        tmp_path / "two.jsonl", [["Say", "Count to ten"], ["Nothing of the kind is asked here"]]
    )
    mine = distiller(tmp_path / "run", tmp_path, exclude=f"{one},{two}", passes=1)
    assert mine.left_out == {"repeats": 1, "too_short": 1, "excluded": 2} and len(mine.responses) == 1
    assert mine.responses.tokens[0].tolist()[:-3] == plain(texts[0])
    assert f"left out 2 responses that overlap {one}, {two}" in capsys.readouterr().err
    mine.train()
    start = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert start == {
        "phase": "start",
        "step": 0,
        "rows": 1,
        "tokens": 3,
        "repeats": 1,
        "too_short": 1,
        "excluded": 2,
    }
    assert yaml.safe_load((tmp_path / "run/drafter/config.yaml").read_text())["made"]["excluded"] == 2
    with pytest.raises(DvirlError, match="none of 5 responses is left"):
        distiller(
            tmp_path / "none", tmp_path, exclude=question_file(tmp_path / "all.jsonl", [[*texts, "short"]])
        )
    with pytest.raises(DvirlError, match="no such file"):
        distiller(tmp_path / "other", tmp_path, exclude="none.jsonl")


def test_responses_from_nowhere_are_an_error(tmp_path):
    with pytest.raises(DvirlError, match=r"responses_from is .*; expected a folder of shard"):
        distiller(tmp_path / "run", tmp_path)


# The command line


def test_the_command_trains_goes_on_and_says_where_things_are(tmp_path, capsys, responses):
    model, run_dir = save_tiny(tmp_path / "model"), tmp_path / "run"
    flags = ["distill", "--model_name", str(model), "--run_dir", str(run_dir), "--responses_from", str(responses),
             "--exit_layer", "2", "--lora_rank", "2", "--head_rank", "4", "--draft_vocab", "100", "--batch", "8",
             "--threads", "1", "--device", "cpu", "--dtype", "float32"]  # fmt: skip
    for _ in range(2):
        assert cli.main(flags) == 0
        out = capsys.readouterr().out.splitlines()
        assert [line.split(":")[0] for line in out] == [
            "learned from",
            "agreement",
            "memory",
            "log",
            "checkpoint",
            "drafter",
        ]
        assert out[-2:] == [f"checkpoint: {run_dir}/checkpoints/step-000004", f"drafter: {run_dir}/drafter"]
        assert out[0].endswith("tokens/s") and " GB at most" in out[2]
    assert cli.main([*flags, "--lr", "0.5"]) == 2
    assert "the run there has other settings: lr (0.004, now 0.5)" in capsys.readouterr().err
    assert cli.main(["distill", "--muon", "-1"]) == 2 and "muon is -1.0" in capsys.readouterr().err


@pytest.mark.no_cover
@pytest.mark.real
def test_the_real_model_learns_its_own_answers_and_ships(tmp_path, real):
    """What it answered it begins to predict, and the drafter that it ships says the same."""
    prompts = [
        real.chat.encode([text])
        for text in ("Hello!", "Name three colours.", "What is rain?", "Count to ten.")
    ]
    write_shard(tmp_path / "shard-00000.safetensors", answer(real, prompts, 20, 4))
    # Without Muon, whose bfloat16 takes 20 s a step here on a CPU that has none; the tiny model's runs have it.
    how = dict(passes=12, muon=0.0, draft_vocab=1024, lora_rank=8, log_every=1, checkpoint_every=99)
    config = settings(tmp_path / "run", tmp_path, **how)
    mine = Distiller(config, copied(real))
    before = measure_agreement(mine.model, mine.responses).rate
    result = mine.train()
    after = measure_agreement(mine.model, mine.responses)
    assert before < 0.2 and after.rate > before + 0.3 and after.covered == 1.0 and result.steps == 12
    shipped = load_drafter(result.drafter, dtype="float32", device="cpu")
    assert measure_agreement(shipped.model, mine.responses).rate == pytest.approx(after.rate, abs=0.06)
    assert shipped.loaded.fingerprint == real.fingerprint


# Without the host


def test_a_captured_step_of_muon_is_muons_step(monkeypatch):
    """Beside torch's own optimizers over some updates, one of them with gradients that are not finite."""
    torch.manual_seed(0)
    shapes = [(8, 12), (20, 6), (5,)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    mine = Optimizers(ours, ours[:2], muon=0.5)
    mine._on_device = True  # as on CUDA
    mine._captured = optim.CapturedMuon(ours[:2])
    mine._fast = AdamW(ours[2:], weight_decay=0.0, fused=True)
    mine._parts = {"fast": mine._fast, "muon": mine._captured.muon}
    muon = Muon(theirs[:2], weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    adamw = AdamW(theirs[2:], weight_decay=0.0)
    for step in range(8):
        mine.zero_grad()
        kept = step not in (0, 4)
        for own, other in zip(ours, theirs, strict=True):
            other.grad = torch.randn(other.shape)
            own.grad = other.grad.clone() if kept else torch.full(own.shape, math.nan)
        lr = 0.1 / (step + 1)
        versions = [own._version for own in ours]
        mine.step(lr, torch.tensor(kept))
        # By these decoding sees that a weight has changed.
        assert all(own._version > version for own, version in zip(ours, versions, strict=True))
        if kept:
            for optimizer, rate in ((muon, 0.5 * lr), (adamw, lr)):
                optimizer.param_groups[0]["lr"] = rate
                optimizer.step()
        for own, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(own, other)
        if step == 5:  # as after a checkpoint
            mine.load(mine.tensors())


@pytest.mark.parametrize("recurrent", [False, True])
def test_it_goes_on_from_a_drafter(tmp_path, responses, recurrent):
    kind = dict(feedback=recurrent, recurrent=recurrent)
    first = distiller(tmp_path / "first", responses, **kind)
    result = first.train(show_progress=False)
    on = distiller(tmp_path / "on", responses, start_from=result.drafter, **kind)
    fresh = distiller(tmp_path / "fresh", responses, **kind)
    for parameter, trained, untrained in zip(on.parameters, first.parameters, fresh.parameters, strict=True):
        assert torch.equal(parameter, trained.bfloat16().float())
        assert not torch.equal(trained, untrained)
    if recurrent:  # a drafter that reads no middle state can begin to
        more = distiller(tmp_path / "more", responses, start_from=result.drafter, middle_layer=3, **kind)
        states = {len(row) for row in more._kept[0]}
        assert states == {2 * len(on._kept[0][0])} and not more.model.adapter_model.fuse_middle.weight.any()
    on.train(show_progress=False)
    log = [read_metrics(run.log).query("phase == 'train'").loss for run in (first, on)]
    assert log[1].iloc[0] < log[0].iloc[0]
    with pytest.raises(DvirlError, match="no drafter|nowhere"):
        distiller(tmp_path / "none", responses, start_from="nowhere", **kind)
