"""Live learning: what a session learns, when, what it goes back to, and what it leaves on the disk."""

from __future__ import annotations

import json
import math
import os
from contextlib import nullcontext

import pytest
import torch
import yaml
from conftest import EOS, copied, in_child, random_prompts, scramble_lora, timeless, tiny_loaded
from safetensors.torch import load_file
from test_drafters import exported, trained

from dvirl.data.stream import PromptSplit, PromptStream
from dvirl.live import KeptDraft, LiveConfig, LiveSession, training_settings
from dvirl.lora import head_parameters
from dvirl.models.drafters import export, load_drafter
from dvirl.rollout import decoded_records, decoded_rollout, generate, judge
from dvirl.runs.checkpoint import newest
from dvirl.runs.errors import DvirlError
from dvirl.runs.optim import make_optimizer
from dvirl.trainer import DVITrainer
from kangaroo.decoding.blocks import DecodeConfig
from kangaroo.decoding.costs import expected_tokens

FIXED = dict(
    max_new_tokens=16,
    draft_len=3,
    source="learned",
    adaptive=False,
    budget=0.9,
    stake=0.9,
    fast_batch=1,
    hold_every=3,
    guard_every=3,
    guard_answers=2,
    checkpoint_every=2,
    threads=1,
)
"""Settings by which sessions of tiny models learn at once, and the same in every run."""
PROMPTS = [[*prompt, 9, 9] for prompt in random_prompts(14, 3)]


class Clock:
    """Goes on by one second whenever it is read."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        self.seconds += 1.0
        return self.seconds


def good_drafter(folder, **changes):
    loaded = tiny_loaded(deep_scale=0.1)
    model, peft_model, config = trained(loaded, draft_vocab=0, **changes)
    model._start_from_base()
    scramble_lora(model, ["lora_S"], 0.02)
    export(folder, peft_model, model, config, loaded)
    return folder


@pytest.fixture(scope="module")
def drafter(tmp_path_factory):
    """The folder of a drafter for the tiny model; some of what it drafts is right."""
    return good_drafter(tmp_path_factory.mktemp("drafter") / "d")


@pytest.fixture(scope="module")
def recurrent(tmp_path_factory):
    """The same with feedback, whose later drafts stand on embeddings."""
    return good_drafter(tmp_path_factory.mktemp("drafter") / "r", feedback=True, recurrent=True)


def session(drafter, **changes):
    return LiveSession(
        tiny_loaded(deep_scale=0.1), drafter, LiveConfig(**{**FIXED, **changes}), clock=Clock()
    )


def records_of(live, prompt):
    """The records of an answer that nothing was learned from."""
    blocks = list(live.model.decode_blocks(prompt, 16, live.config.decode, (EOS,)))
    rollout = decoded_rollout(prompt, blocks, 16)
    return decoded_records(rollout, blocks, head_states=True), blocks


def weights(live):
    return [parameter.detach().clone() for parameter in live.trainer.shallow]


def same(first, second):
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def events(folder):
    return [json.loads(line) for line in (folder / "live.jsonl").read_text().splitlines()]


# What it learns


@pytest.mark.parametrize("kind", ["drafter", "recurrent"])
def test_updates_are_those_of_the_trainer_on_the_same_records(kind, request):
    """The offline trainer judges the verifier's text anew, with passes of its own; there, too, the head alone learns."""
    folder = request.getfixturevalue(kind)
    offline = load_drafter(folder, tiny_loaded(deep_scale=0.1))
    config = training_settings(LiveConfig(**FIXED), offline, str(folder))
    trainer = DVITrainer(config, offline.loaded, PromptSplit(PromptStream([[0]], None), []), draft=offline)
    trainer.shallow = head_parameters(offline.model)
    trainer.fast_optimizer = make_optimizer(trainer.shallow, config.lr_shallow)
    with session(folder, guard_every=100, replay_every=0) as live:
        before = weights(live)
        depths = set()
        for number, prompt in enumerate(PROMPTS[:8], start=1):
            live.answer(prompt)
            rollout = generate(offline.model.base_model, [prompt], 16, (EOS,))
            judgement = judge(offline.model, rollout, DecodeConfig(3))
            depths |= set(judgement.records.depth.tolist())
            trainer.count(rollout, judgement)
            if number % 3:
                trainer.buffer.add(judgement.records, rollout)
                if trainer.buffer.due(1):
                    trainer.step()
        assert live.trainer.counters.step == trainer.counters.step > 3 and depths == {0, 1, 2}
        assert live.trainer.baseline.value == pytest.approx(trainer.baseline.value)
        assert not same(weights(live), before)
        for own, expected in zip(weights(live), trainer.shallow, strict=True):
            torch.testing.assert_close(own, expected.detach(), atol=2e-5, rtol=1e-3)


@pytest.mark.no_cover
@pytest.mark.parametrize("kind", ["drafter", "recurrent"])
@pytest.mark.parametrize(
    "changes", [{}, {"source": "hybrid"}, {"source": "lookup", "budget": 0.0}, {"schedule": "tv"}]
)
def test_answers_are_plain_decodings_whatever_is_learned_and_remembered(kind, request, changes):
    with session(request.getfixturevalue(kind), lr=0.05, **changes) as live:
        if live.memory:
            live.memory.add([*PROMPTS[0], *[9, 9, 7] * 20])  # what follows 9, 9 in every prompt, wrongly
        for prompt in PROMPTS:
            expected = generate(live.model.base_model, [prompt], 16, (EOS,)).responses()[0]
            assert live.answer(prompt).tokens == expected
        assert live.trainer.counters.step > 2 or not live.config.budget


@pytest.mark.no_cover
def test_it_gets_better_at_what_it_is_asked(tmp_path):
    """Two prompts, asked again and again: more of the drafts are accepted, and the guard takes the draft for good."""
    exported(tmp_path / "d", tiny_loaded(deep_scale=0.1), draft_vocab=0)
    with session(tmp_path / "d", lr=0.01, guard_every=5, max_new_tokens=32) as live:
        means = []
        for turn in range(60):
            blocks = live.answer(PROMPTS[turn % 2]).blocks[1:]
            means.append(sum(block.block_len for block in blocks) / len(blocks))
        assert sum(means[-10:]) > 1.3 * sum(means[:10])
        assert live.guard.floor is not live.guard.start


def test_sampled_answers_are_learned_from_too(drafter):
    with session(drafter, temperature=0.8) as live:
        for prompt in PROMPTS[:6]:
            live.answer(prompt)
        assert live.trainer.counters.step > 1
        assert live.answer(PROMPTS[0]).tokens != live.answer(PROMPTS[0]).tokens


def test_held_back_answers_are_not_learned_from(drafter):
    with session(drafter) as live:
        for prompt in PROMPTS[:6]:
            live.answer(prompt)
        assert len(live.guard.held) == 2
        for (states, tokens), prompt in zip(live.guard.held, (PROMPTS[2], PROMPTS[5]), strict=True):
            records, _ = records_of(live, prompt)
            assert len(states) == len(tokens) and tokens[0] == records.verifier_token[0]
        held = [PROMPTS[2], PROMPTS[5]]
        learned = live.trainer.buffer.recent(100)
        prompts = [
            row[:length].tolist() for row, length in zip(learned.tokens, learned.prompt_lens, strict=True)
        ]
        assert prompts and not any(prompt in held for prompt in prompts)


def test_an_answer_that_is_broken_off_counts_as_far_as_it_came(drafter):
    with session(drafter) as live:
        stream = live.stream(PROMPTS[0])
        blocks = [next(stream), next(stream)]
        stream.close()
        assert live.counters.answers == 1 and live.trainer.counters.tokens == sum(b.block_len for b in blocks)
        assert len(live.answer(PROMPTS[1]).tokens)


def test_without_a_budget_nothing_is_kept_and_nothing_is_written(drafter, tmp_path):
    with session(drafter, budget=0.0, run_dir=str(tmp_path / "run")) as live:
        before = weights(live)
        blocks = live.answer(PROMPTS[0]).blocks
        assert live.learn() == "" and same(weights(live), before) and not len(live.trainer.buffer)
        assert not any(block.verifier_hidden.numel() for block in blocks)
    assert not (tmp_path / "run").exists()


# The budget


@pytest.mark.no_cover
@pytest.mark.parametrize("budget", [0.05, 0.1, 0.3])
def test_the_budget_is_held(drafter, budget):
    """By a clock by which a block, an update and taking an answer in last a second each."""
    with session(drafter, budget=budget) as live:
        done = []
        for prompt in PROMPTS * 4:
            live.answer(prompt)
            done.append(live.trainer.counters.step)
            # What is learned from is copied at every answer, without asking.
            paid = live.counters.learn_s - live.counters.answers
            total = live.counters.answer_s + live.counters.learn_s
            assert paid <= max(1.0, budget * total)
        assert (done[-1] > 3) == (budget > 0.25)


def test_once_the_guard_has_looked_learning_costs_little_more_than_it_saves(drafter):
    with session(drafter, budget=0.5, stake=0.1, lr=0.0) as live:
        for prompt in PROMPTS * 3:
            live.answer(prompt)
        assert live.counters.gain == 0.0  # a rate of 0 teaches nothing
        first = live.counters.learning_share
        steps = live.trainer.counters.step
        for prompt in PROMPTS * 3:
            live.answer(prompt)
        assert live.trainer.counters.step - steps < 3 and live.counters.learning_share < max(first, 0.2)
        live.counters.gain, live.counters.learned = 0.6, 1.0
        assert live._share() == pytest.approx(0.4)
        live.counters.learned = 0.25  # a better draft saves nothing in blocks that were looked up
        assert live._share() == pytest.approx(0.175)
        live.counters.gain, live.counters.learned = 3.0, 1.0
        assert live._share() == 0.5


def test_time_for_learning_is_saved_up_for_a_few_answers_only(drafter):
    """After long without a thing to learn, learning takes no more of the next answers' time than it always may."""
    with session(drafter, budget=0.25) as live:
        live.learn = lambda: ""
        for prompt in PROMPTS * 5:
            live.answer(prompt)
        answers, seconds = live.counters.answers, live.counters.answer_s
        saved = 10 * seconds / answers / 3  # a quarter of all time is a third of answering
        assert 0 < live.counters.allowance <= saved
        live.counters.gain, live.config = 3.0, LiveConfig(**{**FIXED, "budget": 0.5})
        live.answer(PROMPTS[0])  # what was saved up at a quarter is no more at a half
        assert live.counters.allowance < saved + 2 * seconds / answers


def test_the_share_of_learned_blocks_is_of_the_last_answers(drafter):
    with session(drafter, source="lookup", lr=0.0) as live:
        for prompt in PROMPTS[:10]:
            live.answer(prompt)
        assert live.counters.learned == pytest.approx(0.9**10)


def test_an_update_waits_for_the_budget_and_learns_from_the_last_answers_alone(drafter):
    with session(drafter, budget=0.5) as live:
        live.answer(PROMPTS[0])
        live.counters.costs["update"] = 1e6
        for prompt in PROMPTS[1:5]:
            live.answer(prompt)
        assert live.trainer.counters.step == 1 and live.trainer.buffer.num_fresh > 16
        live.counters.costs["update"] = 0.0
        seen = []
        update = live.trainer.fast_update
        live.trainer.fast_update = lambda batch: seen.append(batch) or update(batch)
        assert live.learn() == "update" and len(seen[0].tokens) == 3  # of the last four one is held back
        assert seen[0].tokens[-1, : len(PROMPTS[4])].tolist() == PROMPTS[4]


# The guard


def test_the_guard_goes_back_to_the_last_good_draft(drafter):
    with session(drafter, lr=0.01, guard_every=4, max_new_tokens=32) as live:
        for turn in range(40):
            live.answer(PROMPTS[turn % 2])
        live._merged.close()
        while live.guard.look()["verdict"] != "":
            pass
        floor = live.guard.floor
        assert floor is not live.guard.start and live.trainer.fast_optimizer.state
        with torch.no_grad():
            for parameter in live.trainer.shallow:
                parameter.add_(torch.randn_like(parameter))
        live._merge()
        live.counters.unguarded = 4
        assert live.learn() == "back"
        assert same(weights(live), floor.weights) and not live.trainer.fast_optimizer.state
        tokens = live.answer(PROMPTS[0]).tokens  # decoding has the old weights at once
        assert tokens == generate(live.model.base_model, [PROMPTS[0]], 32, (EOS,)).responses()[0]


def test_the_guard_goes_back_to_the_beginning_where_that_is_better(drafter):
    """As after a change of domain: the last good draft was good at something else."""
    with session(drafter) as live:
        start = weights(live)
        for prompt in PROMPTS[:2]:
            live.guard.hold(records_of(live, prompt)[0])
        with torch.no_grad():
            for parameter in live.trainer.shallow:
                parameter.add_(torch.randn_like(parameter))
        live.guard.floor = KeptDraft(weights(live))
        figures = live.guard.look()
        assert figures["verdict"] == "back" and figures["start"] > figures["floor"] == figures["live"]
        assert same(weights(live), start) and live.guard.floor is live.guard.start
        again = live.guard.look()
        assert (
            again["verdict"] == "" and again["live"] == again["floor"] == again["start"] == figures["start"]
        )


@pytest.mark.parametrize("kind", ["drafter", "recurrent"])
def test_what_the_guard_measures_is_how_often_drafts_are_right(kind, request):
    with session(request.getfixturevalue(kind)) as live:
        rates = []
        for prompt in PROMPTS[:2]:
            records, blocks = records_of(live, prompt)
            live.guard.hold(records)
            drafted = sum(block.num_drafted for block in blocks)
            rates.append(sum(block.num_accepted for block in blocks) / drafted)
        expected = expected_tokens(sum(rates) / 2, 4)
        assert live.guard.look()["live"] == pytest.approx(expected)


# What it remembers


def test_a_question_that_was_answered_before_is_looked_up(drafter):
    with session(drafter, source="lookup", budget=0.0, max_new_tokens=32) as live:
        first = live.answer(PROMPTS[0])
        again = live.answer(PROMPTS[0])
    assert again.tokens == first.tokens and 2 * len(again.blocks) < len(first.blocks)


@pytest.mark.parametrize("keep_text", [False, True])
def test_what_is_remembered_ends_with_the_session_unless_text_is_kept(drafter, tmp_path, keep_text):
    changes = dict(source="hybrid", run_dir=str(tmp_path), keep_text=keep_text)
    with session(drafter, **changes) as live:
        for prompt in PROMPTS[:4]:
            live.answer(prompt)
        texts = list(live.memory.texts)
    assert len(texts) == 4 and texts[0][: len(PROMPTS[0])] == tuple(PROMPTS[0])
    with session(drafter, **changes) as again:
        assert list(again.memory.texts) == (texts if keep_text else [])


def test_nothing_is_remembered_where_it_is_not_looked_up_or_not_wanted(drafter):
    assert session(drafter, source="hybrid", remember=0).memory is None
    assert session(drafter).memory is None


# Going on


def numbers(folder):
    return timeless_all(json.loads((folder / "trainer.json").read_text()))


def timeless_all(values):
    """Without seconds of the machine's clock, at any depth; those of the session's own clock stay."""
    own = values.pop("live")
    values = {name: timeless(value) if isinstance(value, dict) else value for name, value in values.items()}
    return {**values, "live": own}


@pytest.mark.no_cover
@pytest.mark.parametrize("killed_after", [3, 5, 8])
def test_a_killed_session_goes_on_as_if_nothing_had_happened(drafter, tmp_path, killed_after):
    changes = dict(keep_text=True, checkpoint_every=1, budget=0.6)

    def run(folder, stop=None):
        with session(drafter, run_dir=str(tmp_path / folder), **changes) as live:
            for number in range(live.counters.answers, 10):
                stream = live.stream(PROMPTS[number])
                next(stream)
                if number == stop:
                    os._exit(9)  # in the middle of an answer
                list(stream)
                live.learn()

    run("whole")
    assert in_child(lambda: run("killed", killed_after)) == 9 << 8
    assert 0 < events(tmp_path / "killed")[-1]["answer"] <= killed_after
    run("killed")
    whole, killed = newest(tmp_path / "whole"), newest(tmp_path / "killed")
    assert whole.name == killed.name and numbers(whole) == numbers(killed)
    for name in ("trainer.safetensors", "drafter.safetensors", "lora_S/adapter_model.safetensors"):
        first, second = load_file(whole / name), load_file(killed / name)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first), name
    assert events(tmp_path / "whole") == events(tmp_path / "killed")


def test_without_text_a_session_goes_on_with_its_weights_and_an_empty_buffer(drafter, tmp_path):
    changes = dict(run_dir=str(tmp_path / "run"), lr=0.01)
    with session(drafter, **changes) as live:
        for prompt in PROMPTS[:9]:
            live.answer(prompt)
        before, moments = weights(live), live.trainer.fast_optimizer.state_dict()["state"]
        floor = live.guard.floor.weights
        counters, baseline = vars(live.counters), live.trainer.baseline.value
    with session(drafter, **changes) as again:
        assert same(weights(again), before) and same(again.guard.floor.weights, floor)
        assert {**vars(again.counters), "unsaved": 0} == {**counters, "unsaved": 0}
        assert again.trainer.baseline.value == baseline
        state = again.trainer.fast_optimizer.state_dict()["state"]
        assert state.keys() == moments.keys()
        assert all(torch.equal(state[key]["exp_avg_sq"], moments[key]["exp_avg_sq"]) for key in state)
        assert not len(again.trainer.buffer) and not again.guard.held
        for prompt in PROMPTS[:4]:
            again.answer(prompt)
        assert again.trainer.counters.step > live.trainer.counters.step


def test_an_error_between_answers_loses_nothing_and_one_in_an_update_saves_nothing_half_done(
    drafter, tmp_path, monkeypatch
):
    for between in (True, False):
        folder = tmp_path / str(between)
        with (
            pytest.raises(KeyboardInterrupt),
            session(drafter, run_dir=str(folder), checkpoint_every=100) as live,
        ):
            live.answer(PROMPTS[0])
            if not between:
                live.trainer.fast_update = raise_interrupt
                live.answer(PROMPTS[1])
            raise_interrupt()
        assert bool(list(folder.glob("checkpoints/step-*"))) == between


def raise_interrupt(*_):
    raise KeyboardInterrupt


def test_ctrl_c_while_the_guard_looks_leaves_the_live_head(drafter):
    with session(drafter, lr=0.01, guard_every=100) as live:
        for prompt in PROMPTS[:9]:
            live.answer(prompt)
        before = weights(live)
        assert live.guard.held and not same(before, live.guard.start.weights)
        live.model.token_ids = raise_interrupt
        with pytest.raises(KeyboardInterrupt):
            live.guard.look()
        assert same(weights(live), before)


@pytest.mark.no_cover
@pytest.mark.parametrize("checkpoint_every", [1, 3, 50])
def test_a_session_that_ended_and_goes_on_is_the_one_that_did_not(drafter, tmp_path, checkpoint_every):
    """With its text; also what it remembers, some of which was forgotten."""
    changes = dict(
        keep_text=True, budget=0.6, source="hybrid", remember=60, checkpoint_every=checkpoint_every
    )
    ends = []
    for name, cuts in (("whole", [16]), ("cut", [5, 16])):
        for stop in cuts:
            with session(drafter, run_dir=str(tmp_path / name), **changes) as live:
                while live.counters.answers < stop:
                    live.answer(PROMPTS[live.counters.answers % len(PROMPTS)])
        ends.append((weights(live), vars(live.counters), timeless_events(tmp_path / name)))
    (one, counters, log), (other, *rest) = ends
    assert same(one, other) and [counters, log] == rest


def timeless_events(folder):
    return [(line["answer"], line["event"], line["step"]) for line in events(folder)]


def test_without_text_nothing_is_replayed_before_there_is_something_to_replay(drafter, tmp_path):
    changes = dict(run_dir=str(tmp_path), replay_every=4, hold_every=5, guard_every=100)
    with session(drafter, **changes) as live:
        for prompt in PROMPTS[:9]:
            live.answer(prompt)
        live.counters.unreplayed = 4
    with session(drafter, **changes) as again:
        assert again._due() != "replay" and again.learn() == ""
        again.answer(PROMPTS[9])  # held: it leaves no records


def test_a_checkpoint_does_not_wait_for_the_budget(drafter, tmp_path):
    with session(drafter, run_dir=str(tmp_path), checkpoint_every=1) as live:
        live.answer(PROMPTS[0])
        live.counters.allowance = -1e9
        assert live.learn() == "checkpoint" and list(tmp_path.glob("checkpoints/step-*"))


def test_a_checkpoint_that_cannot_be_written_is_due_again(drafter, tmp_path, monkeypatch):
    with session(drafter, run_dir=str(tmp_path), checkpoint_every=1) as live:
        live.answer(PROMPTS[0])
        with monkeypatch.context() as patch, pytest.raises(DvirlError, match="disk full"):
            patch.setattr(live, "save_checkpoint", no_space)
            live.learn()
        assert live._due() == "checkpoint" and live.learn() == "checkpoint"
        assert live.answer(PROMPTS[1]).tokens and timeless_events(tmp_path)[-1][0] == 2


def no_space():
    raise DvirlError("disk full")


def test_lines_after_the_last_checkpoint_are_written_anew(drafter, tmp_path):
    """Of an answer after which a checkpoint came first, and then an update."""
    changes = dict(run_dir=str(tmp_path), keep_text=True, checkpoint_every=2, hold_every=6, guard_every=100)

    def work():
        with session(drafter, **changes) as live:
            for prompt in PROMPTS[:3]:
                live.answer(prompt)
            while live.learn():
                pass
            os._exit(9)

    in_child(work)
    assert [event for _, event, _ in timeless_events(tmp_path)][-2:] == ["checkpoint", "update"]
    with session(drafter, **changes):
        assert timeless_events(tmp_path)[-1][1] == "checkpoint"


def test_records_of_another_dtype_are_learned_from_again(drafter, tmp_path):
    for dtype in (torch.float32, torch.float16, torch.float32):
        loaded = tiny_loaded(deep_scale=0.1)
        loaded.model.to(dtype)
        config = LiveConfig(**{**FIXED, "run_dir": str(tmp_path), "keep_text": True, "replay_every": 1})
        with LiveSession(loaded, drafter, config, clock=Clock()) as live:
            for prompt in PROMPTS[:4]:
                live.answer(prompt)
    assert [event for _, event, _ in timeless_events(tmp_path)].count("replay") > 1


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_it_learns_where_gradients_are_off(drafter, around):
    with session(drafter) as live, around():
        live.answer(PROMPTS[0])
        assert live.trainer.counters.step == 1


@pytest.mark.parametrize("budget", [0.0, 0.9])
def test_a_prompt_may_be_a_tensor(drafter, budget):
    expected, found = [], []
    for prompt, tokens in ((PROMPTS[0], expected), (torch.tensor([PROMPTS[0]]), found)):
        with session(drafter, source="hybrid", budget=budget) as live:
            tokens += [live.answer(prompt).tokens, live.answer(prompt).tokens, list(live.memory.texts)]
    assert found == expected


def test_a_stream_that_outlives_its_session_leaves_no_trace(drafter, tmp_path):
    with session(drafter, run_dir=str(tmp_path)) as live:
        live.answer(PROMPTS[0])
        stream = live.stream(PROMPTS[1])
        next(stream)
    stream.close()
    assert live.counters.answers == 1 and [answer for answer, *_ in timeless_events(tmp_path)] == [1, 1]


def test_an_error_at_the_start_gives_the_folder_free(drafter, tmp_path, monkeypatch):
    first = session(drafter, run_dir=str(tmp_path))
    monkeypatch.setattr(first.model, "block_policy", raise_interrupt)
    with pytest.raises(KeyboardInterrupt), first:
        pass
    with session(drafter, run_dir=str(tmp_path)) as live:
        assert live.answer(PROMPTS[0]).tokens


def test_a_long_answer_needs_no_memory_that_learning_does_not_take(drafter, monkeypatch):
    monkeypatch.setattr("dvirl.models.placement.free_memory", lambda device: 3e5)
    with session(drafter) as live:
        assert live.answer(PROMPTS[0]).tokens


# What is on the disk


def spellings(live, prompt, response):
    """The forms in which a text could lie in a file: characters, ids as numbers of several sizes, and JSON."""
    for ids in (prompt, response):
        yield live.loaded.tokenizer.decode(ids).encode()
        yield ", ".join(map(str, ids)).encode()
        yield ",".join(map(str, ids)).encode()
        yield "\n".join(map(str, ids)).encode()
        for dtype in (torch.int16, torch.int32, torch.int64):
            yield torch.tensor(ids, dtype=dtype).numpy().tobytes()
    states = generate(live.model.base_model, [prompt], 16, (EOS,)).verifier_hidden[0]
    yield from (state.numpy().tobytes() for state in states)


@pytest.mark.parametrize("keep_text", [False, True])
def test_the_users_text_is_on_the_disk_only_where_asked_for(drafter, tmp_path, keep_text):
    with session(drafter, run_dir=str(tmp_path), keep_text=keep_text, guard_every=2) as live:
        prompt = live.loaded.chat.encode(("my secret word is xylophone",))
        for _ in range(8):
            response = live.answer(prompt).tokens
        assert live.trainer.counters.step and live.guard.held
        looked_for = list(spellings(live, prompt, response))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {
        "config.yaml",
        "metrics.jsonl",
        "live.jsonl",
        "trainer.safetensors",
    }
    content = b"\0".join(path.read_bytes() for path in files)
    found = [text for text in looked_for if text in content]
    assert bool(found) == keep_text and (b"xylophone" in content) == keep_text
    if keep_text:
        line = [line for line in events(tmp_path) if line["event"] == "answer"][-1]
        assert line["answer"] == 8 and "xylophone" in line["prompt"]


def test_the_log_says_what_was_done_and_what_it_cost(drafter, tmp_path):
    with session(drafter, run_dir=str(tmp_path), replay_every=2) as live:
        for prompt in PROMPTS * 2:
            live.answer(prompt)
        counters = live.counters
    lines = events(tmp_path)
    assert sum(line["event"] == "answer" for line in lines) == 2 * len(PROMPTS) == counters.answers
    assert {line["event"] for line in lines} == {"answer", "update", "replay", "guard", "checkpoint"}
    assert sum(line["event"] == "update" for line in lines) == live.trainer.counters.step
    guard = next(line for line in lines if line["event"] == "guard")
    assert guard["verdict"] in ("", "floor", "back") and guard["live"] >= 1 and guard["seconds"] > 0
    assert all(0 <= line["learning_share"] < 1 for line in lines)
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps] == list(range(1, live.trainer.counters.step + 1))
    assert all(math.isfinite(line["loss"]) for line in steps)


# Bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 1.0}, "budget is 1.0; expected a number from 0 to 0.9"),
        ({"schedule": "reinforce"}, "schedule is 'reinforce'"),
        ({"hold_every": 1}, "hold_every is 1"),
        ({"source": "magic"}, "source is 'magic'"),
        ({"max_new_tokens": 1}, "max_new_tokens is 1"),
    ],
)
def test_bad_settings_are_one_sentence(changes, message):
    with pytest.raises(DvirlError, match=message):
        LiveConfig(**changes)


def test_drafters_that_cannot_learn_live_are_refused(drafter, tmp_path):
    exported(tmp_path / "f", tiny_loaded(), head="frozen")
    with pytest.raises(DvirlError, match="expected a drafter of dvirl with a trained exit head"):
        session(tmp_path / "f")
    with pytest.raises(DvirlError, match="no drafter 'nowhere'"):
        session("nowhere")


def test_a_folder_of_something_else_is_refused(drafter, tmp_path):
    with session(drafter, run_dir=str(tmp_path / "run")) as live:
        live.answer(PROMPTS[0])
        with (
            pytest.raises(DvirlError, match="in use by process"),
            session(drafter, run_dir=str(tmp_path / "run")),
        ):
            pass
    other = tmp_path / "other"
    exported(other, tiny_loaded(deep_scale=0.1), exit_layer=1)
    with (
        pytest.raises(DvirlError, match="other settings: start_from"),
        session(other, run_dir=str(tmp_path / "run")),
    ):
        pass
    path = tmp_path / "run/config.yaml"
    written = path.read_text()
    path.write_text(written.replace("sha256:tiny", "sha256:else"))
    with (
        pytest.raises(DvirlError, match="the content of model has changed"),
        session(drafter, run_dir=str(tmp_path / "run")),
    ):
        pass
    content = yaml.safe_load(written)
    for changes, message in (
        ({"live": None}, "the run there is no live session"),
        ({"inputs": {"drafter": "sha256:another"}}, "the content of drafter has changed"),
        ({"model": None, "inputs": []}, ""),  # says nothing of them
    ):
        kept = {**content, **changes}
        if "live" in changes:
            del kept["live"]
        path.write_text(yaml.safe_dump(kept))
        with (
            pytest.raises(DvirlError, match=message) if message else nullcontext(),
            session(drafter, run_dir=str(tmp_path / "run")),
        ):
            pass
    path.unlink()
    with (
        pytest.raises(DvirlError, match="config.yaml: No such file"),
        session(drafter, run_dir=str(tmp_path / "run")),
    ):
        pass


def test_a_prompt_that_cannot_be_read_leaves_the_session_as_it_was(drafter):
    with session(drafter) as live:
        for prompt, message in (
            ([], "the prompt is empty"),
            ([1] * 300, "300 tokens"),
            ([10**6], "the token 1000000"),
        ):
            with pytest.raises(ValueError, match=message):
                live.answer(prompt)
        assert live.counters.answers == 0


@pytest.mark.no_cover
@pytest.mark.real
def test_the_default_model_learns_and_answers_as_before(real):
    """With the drafter in the box, in float32."""
    config = LiveConfig(
        max_new_tokens=24, source="learned", adaptive=False, draft_len=4, fast_batch=1, budget=0.9, threads=1
    )
    with LiveSession(copied(real), "smollm2-135m-k2", config) as live:
        start = weights(live)
        for name in ("merge", "split", "sort"):
            prompt = real.chat.encode((f"Write a docstring for the Python function `{name}_lists(a, b)`.",))
            plain = generate(real.model, [prompt], 24, real.eos_ids).responses()[0]
            assert live.answer(prompt).tokens == plain
        assert live.trainer.counters.step >= 2 and not same(weights(live), start)
        assert live.counters.learning_share < 0.9
