"""A draft that learns while it serves beside one that does not, and the prompts of one domain."""

from __future__ import annotations

import pandas as pd
import pytest
from test_drafters import exported
from test_models import save_tiny

from dvirl.data.domains import docstring_prompts
from dvirl.experiments.live import (
    FLIPS_EVERY,
    FROZEN,
    LIVE,
    REMEMBERS,
    break_even,
    figures,
    flipping,
    mixed,
    one_domain,
    poisoned,
    question_prompts,
    serve_both,
    windows,
)
from dvirl.live import LiveConfig
from dvirl.models import loading
from kangaroo.decoding.costs import StepCosts
from kangaroo.kangaroo_model import KangarooModel


def test_requests_of_one_domain_are_distinct_and_the_same_everywhere():
    prompts = docstring_prompts(10_000)
    assert len(set(prompts)) == len(prompts) > 600
    assert all("0x" not in prompt and "\ndef " in prompt for prompt in prompts)
    assert docstring_prompts(40, seed=3) == docstring_prompts(10_000, seed=3)[:40] != prompts[:40]


def test_streams_are_those_that_they_say():
    requests, questions = docstring_prompts(60, 1), question_prompts(60, 1)
    assert len(set(questions)) == 60 and not set(questions) & set(requests)
    assert one_domain(60, 1) == requests + questions[:10]
    both = mixed(60, 1)
    assert 15 < sum(prompt in requests for prompt in both) < 45
    assert set(both) <= {*requests, *questions}
    kinds = ["request" if prompt in requests else "question" for prompt in flipping(60, 1)]
    assert kinds == (["request"] * FLIPS_EVERY + ["question"] * FLIPS_EVERY) * 6
    spoiled = poisoned(60, 1)
    assert spoiled[::2] == requests[::2] and not set(spoiled[1::2]) & set(requests)
    assert spoiled[5] == spoiled[3] != spoiled[1] and sorted(spoiled[1]) == sorted(requests[1])
    for stream in (one_domain, mixed, flipping, poisoned):
        assert stream(60, 1) == stream(60, 1)


def test_a_third_session_remembers_and_does_not_learn(tmp_path, monkeypatch):
    # The same costs for all, so that their choices do not depend on the clock.
    costs = StepCosts((10.0, 10.5, 11.0, 11.5), 1.0)
    monkeypatch.setattr(KangarooModel, "step_costs", lambda *_: costs)
    model = save_tiny(tmp_path / "model")
    exported(tmp_path / "draft", loading.load(str(model), dtype="float32", device="cpu"), draft_vocab=0)
    config = LiveConfig(max_new_tokens=12, draft_len=3, threads=1, budget=0.9, fast_batch=1)
    prompts = docstring_prompts(3) * 2
    names = (FROZEN, REMEMBERS, LIVE)
    served = serve_both(str(model), str(tmp_path / "draft"), "float32", prompts, config, names)
    frozen, remembers, live = (served[served.session == name].reset_index() for name in names)
    assert remembers.done.eq("").all() and live.done.ne("").any()
    assert frozen.tokens.equals(remembers.tokens) and frozen.tokens.equals(live.tokens)
    again = slice(3, None)  # what was answered before is looked up
    assert remembers.blocks[again].sum() < frozen.blocks[again].sum()


def test_the_break_even_is_where_the_live_session_stays_ahead():
    def served(live):
        rows = [dict(prompt=at, session=FROZEN, answer_s=1.0, learn_s=0.0) for at in range(1, 5)]
        return pd.DataFrame(
            rows + [dict(prompt=at, session=LIVE, answer_s=s, learn_s=0.1) for at, s in enumerate(live, 1)]
        )

    assert break_even(served([0.5, 1.5, 0.5, 0.5])) == 3
    assert break_even(served([0.5, 0.5, 0.5, 0.5])) == 1
    assert break_even(served([1.0, 1.0, 1.0, 1.0])) is None


def test_both_sessions_answer_every_prompt_and_one_learns(tmp_path):
    model = save_tiny(tmp_path / "model")
    exported(tmp_path / "draft", loading.load(str(model), dtype="float32", device="cpu"), draft_vocab=0)
    settings = dict(max_new_tokens=12, draft_len=3, source="learned", adaptive=False, threads=1)
    config = LiveConfig(budget=0.9, stake=0.9, fast_batch=1, run_dir=str(tmp_path / "run"), **settings)
    served = serve_both(str(model), str(tmp_path / "draft"), "float32", docstring_prompts(8), config)
    assert served.groupby("session").prompt.apply(list).to_dict() == {
        FROZEN: [*range(1, 9)],
        LIVE: [*range(1, 9)],
    }
    frozen, live = (served[served.session == name].reset_index() for name in (FROZEN, LIVE))
    assert frozen.learn_s.sum() == 0 and set(frozen.done) == {""} and "update" in set(live.done)
    assert live.learn_s.sum() > 0 and (served.answer_s > 0).all()
    assert (served.tokens >= served.blocks).all()
    assert frozen.tokens.equals(live.tokens)  # the same answers, in other blocks


def test_windows_pool_blocks_and_add_up_seconds():
    served = pd.DataFrame(
        [
            dict(prompt=1, session=FROZEN, tokens=10, blocks=5, answer_s=1.0, learn_s=0.0),
            dict(prompt=1, session=LIVE, tokens=10, blocks=5, answer_s=1.0, learn_s=0.5),
            dict(prompt=2, session=LIVE, tokens=20, blocks=5, answer_s=0.5, learn_s=0.0),
            dict(prompt=2, session=FROZEN, tokens=20, blocks=10, answer_s=2.0, learn_s=0.0),
            dict(prompt=3, session=FROZEN, tokens=8, blocks=4, answer_s=1.0, learn_s=0.0),
            dict(prompt=3, session=LIVE, tokens=8, blocks=2, answer_s=1.0, learn_s=0.0),
        ]
    )
    table = windows(served, 2)
    assert list(table.index) == [2, 3]
    assert table[f"tokens a block, {FROZEN}"].tolist() == [2.0, 2.0]
    assert table[f"tokens a block, {LIVE}"].tolist() == [3.0, 4.0]
    assert table["live over frozen"].tolist() == pytest.approx([1.5, 2.0])
    short = figures(served, 2)
    assert (short["frozen_mat"], short["live_mat"]) == pytest.approx((38 / 19, 38 / 12))
    assert short["mat_ratio"] == pytest.approx(19 / 12) and short["slowest_window"] == pytest.approx(1.0)
    assert short["speed"] == pytest.approx(1.0 / (1 + 0.5 / 2.5)) and short["learning"] == pytest.approx(
        1 / 6
    )
    assert short["break_even"] == 2
    # Medians of 1 / 1 and 2 / 0.5, and of 1; a half of 1.5 seconds of answering went into learning.
    assert table["speed, live over frozen"].tolist() == pytest.approx([2.5 / (1 + 0.5 / 1.5), 1.0])
    assert table[f"seconds so far, {LIVE}"].tolist() == pytest.approx([2.0, 3.0])
    assert table[f"seconds so far, {FROZEN}"].tolist() == pytest.approx([3.0, 4.0])
