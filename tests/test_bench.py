"""`dvirl bench`: the ways it times, the figures that it makes of times, and what it writes."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import random_prompts, tiny_kangaroo, tiny_loaded
from test_distill import question_file
from test_drafters import exported
from test_models import save_tiny

from dvirl import cli
from dvirl.evaluation import bench
from dvirl.evaluation.bench import _speed, ways
from dvirl.evaluation.measure import Answer, in_turn, timed
from dvirl.evaluation.methods import BRANCHES, GENERATE, PLAIN
from dvirl.evaluation.questions import MeasureSettings, question_sets, spread
from dvirl.models import loading
from dvirl.models.drafters import load_drafter
from dvirl.runs.errors import DvirlError
from kangaroo.decoding.blocks import DecodeConfig, DraftBlock, Verification


def answer(token: int, count: int, wall_s: float, decoding_s: float, blocks: int) -> Answer:
    """So many tokens in so many equal blocks after the prefill's, without drafts."""
    draft = DraftBlock(torch.tensor([]), torch.tensor([]), torch.zeros(0, 4))
    sizes = [1] + [(count - 1) // blocks] * blocks if blocks else []
    verdicts = [Verification(0, (token,) * size, 0, 0, draft, torch.tensor([])) for size in sizes]
    return Answer([token] * count, wall_s, wall_s - decoding_s, verdicts)


def test_figures_are_medians_of_ratios_on_the_same_question():
    plain = [answer(1, 10, 1.0, 9e-4, 9), answer(2, 10, 2.0, 1.8e-3, 9), answer(3, 10, 4.0, 9e-4, 9)]
    way = [answer(1, 10, 0.5, 6e-4, 3), answer(2, 10, 2.0, 1.8e-3, 9), answer(4, 21, 2.1, 8e-4, 4)]
    found = _speed(way, plain)
    assert found.over_plain == 2.0  # of 2, 1 and 4
    assert found.tok_per_s == pytest.approx((20 + 5 + 10) / 3)
    assert found.mat == pytest.approx((9 + 9 + 20) / 16) and (found.equal, found.questions) == (2, 3)
    theirs = _speed([Answer(one.tokens, one.wall_s) for one in way], plain)
    assert theirs.mat is None and theirs.over_plain == 2.0


def test_what_capturing_takes_is_left_out_of_an_answer(monkeypatch):
    model, captured = tiny_kangaroo(0), iter([1.0, 1.5])
    clock = iter([10.0, 10.2, 12.0])
    monkeypatch.setattr(type(model), "now", lambda _: next(clock))
    monkeypatch.setattr(type(model.base_model), "capture_s", property(lambda _: next(captured)))
    one = timed(model, [3, 4], 5, DecodeConfig(0))
    assert (one.wall_s, one.prefill_s, one.decoding_s) == pytest.approx((1.5, 0.2, 1.3))
    assert one.accept_lengths == [1] * 4 == Answer(one.tokens, 1.0).accept_lengths


def test_the_order_changes_from_turn_to_turn():
    assert [in_turn("abc", turn) for turn in range(4)] == [list("abc"), list("bca"), list("cab"), list("abc")]


def test_questions_are_spread_over_a_file():
    assert (
        spread(list(range(10)), 3) == [0, 3, 7]
        and spread([1, 2], 5) == [1, 2]
        and spread([1, 2], 0) == [1, 2]
    )


def test_every_question_counts_though_it_differs_in_a_sign_alone(tmp_path):
    """To training these are repeats."""
    asked = [["What is 12 + 30?"], ["What is 12 - 30?", "And now?"], ["what is 12 - 30"]]
    loaded = tiny_loaded()
    own = MeasureSettings(questions=[question_file(tmp_path / "q.jsonl", asked)], max_new_tokens=8)
    ((_, prompts),) = question_sets(loaded, own).items()
    assert prompts == [loaded.chat.encode(turns[:1]) for turns in asked]
    with pytest.raises(DvirlError, match="no questions found"):
        question_sets(loaded, MeasureSettings(questions=[question_file(tmp_path / "none.jsonl", [])]))


@pytest.mark.parametrize("command", [["agreement"], ["bench", "--threads", "1"], ["check"]])
def test_a_question_beyond_the_context_is_named_before_any_is_answered(tmp_path, capsys, command):
    exported(tmp_path / "d", loading.load(str(save_tiny(tmp_path / "m")), dtype="float32", device="cpu"))
    asked = question_file(tmp_path / "q.jsonl", [["What is it?"], ["word " * 100]])
    assert cli.main([*command, str(tmp_path / "d"), "--questions", asked]) == 2
    said = capsys.readouterr()
    assert "q.jsonl:2: the prompt has " in said.err and "the model's context, 256" in said.err
    assert not said.out


def test_more_texts_at_once_than_questions_are_refused_before_the_clock_runs(tmp_path, capsys):
    exported(tmp_path / "d", loading.load(str(save_tiny(tmp_path / "m")), dtype="float32", device="cpu"))
    asked = question_file(tmp_path / "q.jsonl", [["What is it?"], ["Count"]])
    flags = ["--questions", asked, "--threads", "1", "--rows", "3"]
    assert cli.main(["bench", str(tmp_path / "d"), *flags]) == 2
    said = capsys.readouterr()
    assert "rows is 3; expected at most the 2 questions" in said.err and not said.out


def test_the_command_times_every_way_and_all_say_the_same_in_float32(tmp_path, capsys):
    source = save_tiny(tmp_path / "model")
    exported(tmp_path / "d", loading.load(str(source), dtype="float32", device="cpu"))
    questions = question_file(tmp_path / "q.jsonl", [["What is it?"], ["Count"], ["Sum up"]])
    flags = [
        "--questions",
        questions,
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--max_new_tokens",
        "12",
        "--rows",
        "2",
    ]
    assert (
        cli.main(["bench", str(tmp_path / "d"), *flags, "--threads", "1", "--out", str(tmp_path / "o.json")])
        == 0
    )
    printed = capsys.readouterr().out
    assert "blocks of four drafts beat plain decoding above an acceptance of " in printed
    content = json.loads((tmp_path / "o.json").read_text())
    assert list(content["figures"]) == [questions]
    figures = content["figures"][questions]
    assert set(figures) == {GENERATE, *ways(8)} and all(f"\n{way} " in printed for way in figures)
    assert all(one["equal"] == one["questions"] == 3 and one["tok_per_s"] > 0 for one in figures.values())
    assert figures[PLAIN]["mat"] == 1.0 == figures[PLAIN]["over_plain"] and figures[GENERATE]["mat"] is None
    assert figures["learned, 4"]["mat"] >= 1.0 and len(content["costs"]["verify"]) == 9
    assert figures["learned, 4"]["accept_rate"] is not None and figures[PLAIN]["accept_rate"] is None
    assert set(content["batched"]) == set(bench.BATCHED) and content["capture_s"] == 0
    assert all(set(one) == {"batch 2 tok_per_s", "batch 1 tok_per_s", "over batch 1"} and min(one.values()) > 0
               for one in content["batched"].values())  # fmt: skip
    assert content["versions"] and content["model"]["dtype"] == "float32"


def test_a_set_that_is_done_is_kept_when_the_next_fails(tmp_path, monkeypatch):
    source = save_tiny(tmp_path / "model")
    exported(tmp_path / "d", loading.load(str(source), dtype="float32", device="cpu"))
    files = [question_file(tmp_path / f"{name}.jsonl", [["What is it?"]]) for name in "ab"]
    real, calls = bench._speed, []

    def speed(*args):
        calls.append(args)
        if len(calls) > len(ways(8)) + 1:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(bench, "_speed", speed)
    flags = ["--dtype", "float32", "--device", "cpu", "--max_new_tokens", "4", "--threads", "1"]
    with pytest.raises(KeyboardInterrupt):
        bench.main(
            bench.parse_args(
                [str(tmp_path / "d"), "--questions", *files, *flags, "--out", str(tmp_path / "o.json")]
            )
        )
    assert list(json.loads((tmp_path / "o.json").read_text())["figures"]) == files[:1]


def test_the_learned_draft_is_timed_in_turn_with_plain_decoding(tmp_path, monkeypatch):
    source = save_tiny(tmp_path / "model")
    loaded = loading.load(str(source), dtype="float32", device="cpu")
    exported(tmp_path / "d", loaded)
    drafter = load_drafter(tmp_path / "d", None, "float32", "cpu", str(source), 0)
    asked = []
    real = bench.answer_in_turn
    monkeypatch.setattr(bench, "answer_in_turn", lambda run, *args: asked.extend(run) or real(run, *args))
    prompts = random_prompts(3)
    speed = bench.over_plain(drafter, prompts, 8, longest=3)
    assert asked == [PLAIN, "learned"] and speed.questions == speed.equal == 3
    assert speed.over_plain > 0 and speed.mat >= 1 and speed.tok_per_s > 0


def test_hostile_drafts_say_another_token_and_change_no_answer(tmp_path, monkeypatch):
    source = save_tiny(tmp_path / "model")
    model = exported(tmp_path / "d", loading.load(str(source), dtype="float32", device="cpu"))
    flags = [
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--max_new_tokens",
        "8",
        "--threads",
        "1",
        "--questions",
    ]
    real, seen = bench.compare, []
    monkeypatch.setattr(bench, "compare", lambda drafter, *args: seen.append(drafter) or real(drafter, *args))
    questions = question_file(tmp_path / "q.jsonl", [["What is it?"]])
    (found,) = bench.main(bench.parse_args([str(tmp_path / "d"), *flags, questions, "--hostile"])).values()
    assert not (seen[0].model.draft_ids == model.draft_ids).any()
    assert all(one.equal == 1 for one in found.values())


def test_the_ways_are_those_that_the_table_names():
    assert ways(6)[PLAIN] == DecodeConfig(0) and ways(6)["hybrid"] == DecodeConfig(
        6, source="hybrid", adaptive=True, branches=BRANCHES
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--draft_len", "0"], "draft_len is 0; expected a number from 1"),
        (["--max_new_tokens", "0"], "max_new_tokens is 0; expected a number from 1"),
        (["--rows", "-1"], "rows is -1; expected a number from 0"),
        ([], "nothing to measure on"),
    ],
)
def test_what_cannot_be_timed_is_said(tmp_path, capsys, flags, message):
    exported(tmp_path / "d", loading.load(str(save_tiny(tmp_path / "m")), dtype="float32", device="cpu"))
    assert cli.main(["bench", str(tmp_path / "d"), "--threads", "1", *flags]) == 2
    assert message in capsys.readouterr().err
