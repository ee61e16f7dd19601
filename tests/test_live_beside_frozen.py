"""A draft that learns while it serves beside one that does not, and the prompts of one domain."""

from __future__ import annotations

import pandas as pd
import pytest
from test_drafters import exported
from test_models import save_tiny

from dvirl.data.domains import docstring_prompts
from dvirl.experiments.live import FROZEN, LIVE, serve_both, windows
from dvirl.live import LiveConfig
from dvirl.models import loading


def test_requests_of_one_domain_are_distinct_and_the_same_everywhere():
    prompts = docstring_prompts(10_000)
    assert len(set(prompts)) == len(prompts) > 600
    assert all("0x" not in prompt and "\ndef " in prompt for prompt in prompts)
    assert docstring_prompts(40, seed=3) == docstring_prompts(10_000, seed=3)[:40] != prompts[:40]


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
    assert list(table.index) == [2, 4]
    assert table[f"tokens a block, {FROZEN}"].tolist() == [2.0, 2.0]
    assert table[f"tokens a block, {LIVE}"].tolist() == [3.0, 4.0]
    assert table["live over frozen"].tolist() == pytest.approx([1.5, 2.0])
    assert table[f"seconds so far, {LIVE}"].tolist() == pytest.approx([2.0, 3.0])
    assert table[f"seconds so far, {FROZEN}"].tolist() == pytest.approx([3.0, 4.0])
