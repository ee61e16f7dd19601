"""`dvirl check`: equal answers pass, ties are shown to be ties, and what is broken is found."""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import EOS, VOCAB, random_prompts, tiny_kangaroo
from test_evaluation import run_dir  # noqa: F401
from test_models import save_tiny

from dvirl import cli
from dvirl.evaluation import equal
from dvirl.evaluation.equal import compare, compare_decoders, last_logits, read_answers, resolution
from dvirl.models import loading
from dvirl.runs.errors import DvirlError
from kangaroo.decoding import speculate
from kangaroo.decoding.blocks import DecodeConfig

A, B, C = 7, 8, 9


def logits(**values):
    """Logits in which token A has `a`, B has `b`, and so on; all others are far below."""
    row = torch.full((VOCAB,), -50.0)
    for name, value in values.items():
        row[{"a": A, "b": B, "c": C, "end": EOS}[name]] = value
    return lambda shared: row


def judged(reference, candidate, after=None, limit=8, dtype=torch.bfloat16):
    return compare("q", reference, candidate, limit, (EOS,), dtype, after)


def test_a_step_of_bfloat16_is_what_bfloat16_says():
    for value in (0.3, 1.0, 17.2, 36.0, -36.0):
        exact = torch.tensor(value).bfloat16()
        step = (torch.nextafter(exact.abs(), torch.tensor(float("inf")).bfloat16()) - exact.abs()).item()
        assert resolution(torch.bfloat16, value) == step


def test_equal_answers_are_no_difference():
    assert judged([A, B, EOS], [A, B, EOS]) is None


@pytest.mark.parametrize(("gap", "verdict"), [(0.0, "tie"), (0.1, "tie"), (0.2, "error")])
def test_a_tie_is_within_one_step_of_the_best_logit(gap, verdict):
    found = judged([A, B, A], [A, C, A], logits(b=20.0, c=20.0 - gap))
    assert (found.position, found.reference, found.candidate, found.verdict) == (1, B, C, verdict)
    assert found.gap == pytest.approx(gap, abs=1e-5) and found.resolution == 0.125


def test_a_tie_needs_both_tokens_near_the_best_one():
    assert judged([B], [C], logits(a=20.0, b=10.0, c=10.0)).verdict == "error"
    assert judged([A], [C], logits(a=20.0, c=19.9), dtype=torch.float32).verdict == "error"


def test_stop_rules_are_told_from_truncation():
    due, not_due = logits(end=20.0, a=3.0), logits(end=3.0, a=20.0)
    assert judged([A, EOS], [A, A, A], due).verdict == "stop rule"
    assert judged([A, EOS], [A, EOS, A]).verdict == "stop rule"
    assert judged([A] * 8, [A] * 11).verdict == "stop rule"
    for short, long in (([A, EOS], [A, A, A]), ([A, A, A], [A, EOS])):
        found = judged(short, long, not_due)
        assert (found.verdict, found.reason) == ("error", "one ends where the sequence goes on")
    assert (judged([A, A, A], [A, A]).verdict, judged([A, A, A], [A, A]).reason) == (
        "error",
        "the candidate is truncated",
    )
    assert judged([A], [A, A], due).reason == "the reference is truncated"


def test_without_a_model_no_tie_is_shown():
    assert judged([A], [B]).verdict == "error"


@pytest.mark.parametrize("target", ["base", "adapted"])
def test_drafts_change_no_answer(target):
    model, prompts = tiny_kangaroo(1, 3, deep_scale=0.2), random_prompts(6)
    report = compare_decoders(model, {"random": prompts}, 20, DecodeConfig(3, target=target), (EOS,))
    assert (report.answers, report.identical, report.differences) == (6, 6, [])


def test_the_logits_are_those_of_the_decoder():
    model, prompt = tiny_kangaroo(1, 3, deep_scale=0.2), random_prompts(1)[0]
    for target in ("base", "adapted"):
        tokens = model.generate(prompt, 6, DecodeConfig(0, target=target)).tokens
        for count, token in enumerate(tokens):
            assert int(last_logits(model.base_model, prompt, tokens[:count], target).argmax()) == token


def test_a_decoder_that_accepts_what_it_should_not_is_found(monkeypatch):
    model, prompts = tiny_kangaroo(0, 3), random_prompts(4)

    def generous(drafted, own):
        count = min(len(drafted), 1)
        own[:count] = drafted[:count]
        return count

    monkeypatch.setattr(speculate, "count_accepted", generous)
    report = compare_decoders(model, {"random": prompts}, 20, DecodeConfig(3), (EOS,))
    assert report.count("error") == len(report.differences) > 0
    assert all(one.gap > one.resolution for one in report.differences)


def test_in_bfloat16_every_difference_is_judged_in_float32():
    model, prompts = tiny_kangaroo(2, 3, deep_scale=0.2).bfloat16(), random_prompts(12, 3)
    report = compare_decoders(model, {"random": prompts}, 24, DecodeConfig(4), (EOS,))
    assert report.identical + len(report.differences) == 12
    assert model.head_model.weight.dtype == torch.float32
    assert all(math.log2(one.resolution).is_integer() and one.gap >= 0 for one in report.differences)


@pytest.mark.no_cover
@pytest.mark.parametrize(
    ("how", "own_kernels", "identical"),
    [
        (DecodeConfig(5, deterministic=True), False, True),
        (DecodeConfig(5, deterministic=True, source="hybrid", adaptive=True), False, True),
        (DecodeConfig(5), False, False),  # the control: it is the size of passes that makes the difference
        (DecodeConfig(5), True, True),
    ],
)
def test_in_bfloat16_own_kernels_or_passes_of_one_size_give_identical_answers(
    how, own_kernels, identical, monkeypatch
):
    if not own_kernels:
        monkeypatch.setattr("kangaroo.decoding.layers._cpu_kernels_work", lambda: False)
    model, prompts = tiny_kangaroo(2, 3, deep_scale=0.2, drafter="layer").bfloat16(), random_prompts(20, 3)
    prompts = [*prompts[:2], *prompts[11:]]  # of these four differ in the control; of the others none did
    report = compare_decoders(model, {"random": prompts}, 50, how, (EOS,))
    assert (report.identical == report.answers) == identical


def test_a_run_is_checked(run_dir, capsys, tmp_path):  # noqa: F811
    questions = tmp_path / "q.jsonl"
    rows = [
        {"question_id": n, "category": "x", "turns": [text]}
        for n, text in enumerate(["What?", "Who are you?"])
    ]
    questions.write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "check.json"
    arguments = [
        "check",
        str(run_dir),
        "--questions",
        str(questions),
        "--max_new_tokens",
        "12",
        "--out",
        str(out),
    ]
    assert cli.main([*arguments, "--dtype", "float32"]) == 0
    assert "2 of 2 answers are identical; differences: 0 tie, 0 stop rule, 0 error" in capsys.readouterr().out
    content = json.loads(out.read_text())
    assert content["report"] == {"answers": 2, "identical": 2, "differences": []}
    assert content["command"].startswith("dvirl check ") and content["date"].startswith("20")


# Files


def write_answers(path, answers):
    rows = [
        {"question_id": key, "category": "x", "choices": [{"index": 0, "turns": turns}]}
        for key, turns in answers
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """A saved tiny model, its questions, and its own greedy answers of two turns."""
    folder = tmp_path_factory.mktemp("answers")
    name = str(save_tiny(folder / "model"))
    loaded = loading.load(name, "float32", "cpu")
    model = tiny_model_of(loaded)
    questions, answers = [], []
    for key, turns in enumerate((["Hi", "And?"], ["Why?"], ["Go on"])):
        said, own = [], []
        for turn in turns:
            said.append(turn)
            ids = model.generate(loaded.chat.encode(said), 10, DecodeConfig(0), loaded.eos_ids).tokens
            own.append("".join(chr(97 + token % 26) for token in ids))  # any text: files hold texts
            said.append(own[-1])
        questions.append({"question_id": key, "category": "x", "turns": turns})
        answers.append((key, own))
    path = folder / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, questions)))
    return name, str(path), answers


def tiny_model_of(loaded):
    return equal.KangarooModel(loaded.model, EARLY_STOP_LAYER=1)


def check(name, *arguments):
    return cli.main(["check", *arguments, "--model_name", name, "--device", "cpu", "--max_new_tokens", "10"])


def test_equal_files_pass(answered, tmp_path, capsys):
    name, questions, answers = answered
    files = [write_answers(tmp_path / f"{n}.jsonl", answers) for n in "ab"]
    assert check(name, "--answers", *files, "--questions", questions) == 0
    assert "3 of 3 answers are identical" in capsys.readouterr().out


def test_a_question_may_be_named_like_a_turn(answered, tmp_path, capsys):
    name, _, answers = answered
    turns = answers[1][1]
    names = ("a, turn 1", "b")
    files = [write_answers(tmp_path / "a.jsonl", [(each, turns) for each in names])]
    files.append(write_answers(tmp_path / "b.jsonl", [(names[0], [turns[0] + "x"]), (names[1], turns)]))
    check(name, "--answers", *files)
    assert "1 of 2 answers are identical" in capsys.readouterr().out


def test_missing_extra_repeated_and_cut_answers_are_errors(answered, tmp_path, capsys):
    name, questions, answers = answered
    (first, turns), second = answers[:2]
    broken = [(first, [turns[0], turns[1][:4]]), second, second, (9, ["new"])]
    files = [write_answers(tmp_path / "a.jsonl", answers), write_answers(tmp_path / "b.jsonl", broken)]
    with pytest.raises(SystemExit) as stopped:
        check(name, "--answers", *files, "--questions", questions)
    out = capsys.readouterr().out
    assert stopped.value.code == 1
    assert "2: error at token 0: missing" in out and "9: error at token 0: extra" in out
    assert "1: error at token 0: answered twice" in out
    assert "0, turn 2: error at token 4, gap" in out and "one ends where the sequence goes on" in out
    assert "0 of 4 answers are identical; differences: 0 tie, 0 stop rule, 4 error" in out


@pytest.mark.parametrize(
    ("row", "message"),
    [("{}", "expected question_id and choices"), ("[", "not valid JSON"),
     ('{"question_id": 1, "choices": [{"turns": "text"}]}', "turns, a list of strings"),
     ('{"question_id": 1, "choices": []}', "expected question_id and choices")],
)  # fmt: skip
def test_a_file_of_another_layout_is_refused(tmp_path, row, message):
    path = tmp_path / "x.jsonl"
    path.write_text(row)
    with pytest.raises(DvirlError, match=message):
        read_answers(str(path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "give either a draft"), (["x", "--answers", "a", "b"], "give either a draft"),
     (["x", "--max_new_tokens", "0"], "max_new_tokens is 0"), (["x", "--draft_len", "-1"], "draft_len is -1"),
     (["x", "--source", "guess"], "source is 'guess'"), (["x", "--draft_len", "16", "--deterministic"], "expected below 16"),
     (["nothing-here"], "no drafter 'nothing-here'")],
)  # fmt: skip
def test_bad_arguments_are_said(arguments, message, capsys):
    assert cli.main(["check", *arguments]) == 2
    assert message in capsys.readouterr().err
