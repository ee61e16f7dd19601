"""Spec-Bench's files and figures: read as published, written so that others can read them, never a question twice."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import EOS, tiny_loaded
from safetensors.torch import load_file, save_file
from test_bench import answer
from test_drafters import exported
from test_models import save_tiny
from test_processes import in_processes

from dvirl import cli
from dvirl.evaluation import runner
from dvirl.evaluation.equal import compare_files
from dvirl.evaluation.measure import Answer
from dvirl.evaluation.methods import METHODS
from dvirl.evaluation.questions import TASKS, Question, prompts_of, read_questions
from dvirl.evaluation.rejections import read_trace
from dvirl.evaluation.runner import EvalConfig, answer_question, questions_that_fit
from dvirl.evaluation.spec_bench import answer_row, answer_table, measures, resume_answers
from dvirl.models import loading
from dvirl.models.drafters import open_draft
from dvirl.runs.errors import DvirlError
from dvirl.runs.folder import run_lock
from dvirl.runs.log import log_line

ASKED = [
    {"question_id": 81, "category": "writing", "turns": ["Write it", "Once more"]},
    {"question_id": 161, "category": "qa", "turns": ["What is it?"]},
    {"question_id": 7, "category": "math", "turns": ["Sum up", "And now?"]},
]
TINY = ["--dtype", "float32", "--device", "cpu", "--threads", "1", "--answer_tokens", "8"]


def write_questions(path, rows=ASKED) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def draft(tmp_path_factory):
    """Folder of a tiny drafter."""
    folder = tmp_path_factory.mktemp("draft")
    exported(folder / "d", loading.load(str(save_tiny(folder / "model")), dtype="float32", device="cpu"))
    return str(folder / "d")


@pytest.fixture(scope="module")
def evaluated(draft, tmp_path_factory):
    """An evaluation of all methods, two repeats: its folder and its table."""
    folder = tmp_path_factory.mktemp("evaluation")
    config = EvalConfig(draft=draft, questions=write_questions(folder / "q.jsonl"), repeats=2, methods=",".join(METHODS), answer_tokens=8, threads=1,
                        dtype="float32", device="cpu", run_dir=str(folder / "run"))  # fmt: skip
    return folder / "run", runner.main(config)


# Questions


def test_the_packaged_set_has_four_questions_of_each_task():
    questions = read_questions("mini")
    assert Counter(one.task for one in questions) == dict.fromkeys(TASKS.values(), 4)
    assert all(len(one.turns) == (2 if one.task == "mt_bench" else 1) for one in questions)
    assert len({one.question_id for one in questions}) == 24


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**ASKED[0], "category": "poetry"}, "q.jsonl:2: category is 'poetry'; expected one of writing"),
        ({**ASKED[0], "question_id": 161}, "q.jsonl:2: question_id 161 is there twice"),
        ({**ASKED[0], "question_id": [1]}, "q.jsonl:2: 'question_id' is [1]; expected a number or a string"),
        (
            {**ASKED[0], "question_id": "\x85"},
            "q.jsonl:2: 'question_id' is '\\x85'; expected a number or a string",
        ),
        (
            {**ASKED[0], "category": "a\0"},
            "q.jsonl:2: 'question_id' is 81; expected a number or a string, and like the",
        ),
        ({**ASKED[0], "turns": []}, "q.jsonl:2: expected 'turns' to be a list"),
        ({"turns": ["x"]}, "q.jsonl:2: expected an object with 'question_id'"),
    ],
)
def test_a_bad_question_is_named_with_its_line(tmp_path, row, message):
    with pytest.raises(DvirlError) as error:
        read_questions(write_questions(tmp_path / "q.jsonl", [ASKED[1], row]))
    assert message in str(error.value)


def test_other_categories_are_tasks_of_their_own_where_asked_for(tmp_path):
    path = write_questions(
        tmp_path / "q.jsonl", [{**ASKED[1], "category": "poetry"}, {**ASKED[0], "category": ""}]
    )
    assert [one.task for one in read_questions(path, any_category=True)] == ["poetry", "other"]


def test_no_category_has_the_name_of_all_tasks_together(tmp_path):
    path = write_questions(tmp_path / "q.jsonl", [{**ASKED[1], "category": "overall"}, ASKED[0]])
    with pytest.raises(DvirlError, match="q.jsonl:1: category is 'overall'; expected another"):
        read_questions(path, any_category=True)


def test_a_file_that_is_no_question_file_is_said(tmp_path):
    (tmp_path / "q.jsonl").write_text("{no json\n")
    for path, message in (
        (tmp_path / "q.jsonl", "q.jsonl:1: not valid JSON"),
        (tmp_path / "x.jsonl", "no such file"),
    ):
        with pytest.raises(DvirlError, match=message):
            read_questions(str(path))


# Answering


def test_a_later_turn_sees_the_answer_before_it():
    loaded, seen = tiny_loaded(), []

    def decode(prompt):
        seen.append(list(prompt))
        return Answer([70 + len(seen), 71, EOS], 1.0)

    texts, answers = answer_question(Question(1, "writing", ("One", "Two")), decode, loaded, 8)
    assert [one.tokens[0] for one in answers] == [71, 72] and all("<|im_end|>" not in text for text in texts)
    assert seen == [loaded.chat.encode(["One"]), loaded.chat.encode(["One", texts[0], "Two"])]
    assert prompts_of(Question(1, "writing", ("One", "Two")), texts, loaded) == seen


@pytest.mark.parametrize("turns", [("x" * 260,), ("x", "y" * 260), ("x",) * 16])
def test_a_question_beyond_the_context_is_refused_before_any_is_answered(draft, tmp_path, capsys, turns):
    rows = [*ASKED, {"question_id": 5, "category": "qa", "turns": turns}]
    flags = ["--draft", draft, "--questions", write_questions(tmp_path / "q.jsonl", rows), *TINY]
    assert cli.main(["evaluate", *flags, "--run_dir", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and not (tmp_path / "run").exists()
    assert re.search(
        r"question 5: up to \d+ tokens with its answers; expected at most .* context, 256", said[0]
    )


def test_a_question_needs_room_for_every_answer_at_its_longest():
    loaded = tiny_loaded()
    room = 256 - len(loaded.chat.encode(["", "", ""])) - 2 * 20
    fits = Question(1, "qa", ("x" * room, ""))
    longer = Question(2, "qa", ("x" * room, "x"))
    assert questions_that_fit([fits], loaded, 20, "refuse") == ([fits], [])
    with pytest.raises(DvirlError, match="question 2: up to 257 tokens with its answers"):
        questions_that_fit([fits, longer], loaded, 20, "refuse")
    assert questions_that_fit([fits, longer], loaded, 20, "skip") == ([fits], [2])
    assert questions_that_fit([fits, longer], loaded, 20, "cut") == ([fits, longer], [2])
    with pytest.raises(DvirlError, match="none of 1 questions fits"):
        questions_that_fit([longer], loaded, 20, "skip")
    with pytest.raises(DvirlError, match="answer_tokens is 256; expected less"):
        questions_that_fit([fits], loaded, 256, "cut")


def test_a_long_prompt_is_cut_from_the_left():
    loaded = tiny_loaded()
    question = Question(1, "qa", ("y" * 300,))
    assert prompts_of(question, [], loaded, 20)[0] == loaded.chat.encode(["y" * 300])[-236:]


@pytest.mark.parametrize("too_long", ["skip", "cut"])
def test_the_report_names_what_was_too_long(draft, tmp_path, too_long):
    rows = [*ASKED, {"question_id": 5, "category": "qa", "turns": ["x" * 260]}]
    flags = ["--draft", draft, "--questions", write_questions(tmp_path / "q.jsonl", rows), *TINY]
    run_dir = tmp_path / "run"
    assert cli.main(["evaluate", *flags, "--run_dir", str(run_dir), "--too_long", too_long]) == 0
    assert json.loads((run_dir / "results.json").read_text())["too_long"] == [5]
    said = "left out: 5." if too_long == "skip" else "cut from the left where it was needed: 5."
    assert said in (run_dir / "report.md").read_text()
    answered = (run_dir / "answers/plain-1.jsonl").read_text()
    assert ('"question_id": 5' in answered) == (too_long == "cut")


def test_sampled_answers_follow_settings_and_seed(draft, tmp_path):
    """The same seed gives the same answers, whatever drafts; another one others; every method samples."""
    flags = ["--draft", draft, "--questions", write_questions(tmp_path / "q.jsonl", ASKED), *TINY]
    flags += ["--temperature", "1.5", "--top_p", "0.95", "--methods", "generate,plain,kangaroo,fixed"]

    def answers(name, seed):
        assert cli.main(["evaluate", *flags, "--run_dir", str(tmp_path / name), "--seed", str(seed)]) == 0
        rows = {}
        for path in (tmp_path / name / "answers").iterdir():
            lines = map(json.loads, path.read_text().splitlines())
            rows[path.name] = [line["choices"][0]["tokens"] for line in lines]
        return rows

    first = answers("a", 1)
    other = answers("b", 2)
    assert first == answers("c", 1)
    assert all(first[name] != other[name] for name in first)
    assert first["plain-1.jsonl"] == first["kangaroo-1.jsonl"] == first["fixed-1.jsonl"]
    assert "sampled at temperature 1.5, top_p 0.95, seed 1" in (tmp_path / "a/report.md").read_text()
    assert cli.main(["evaluate", *flags, "--temperature", "0", "--run_dir", str(tmp_path / "d")]) == 2


def test_sampled_answers_are_draws_of_their_own_and_the_same_for_every_method(draft, tmp_path):
    """The same question again, in another turn and in another repeat; methods without drafts show the draws."""
    rows = [{"question_id": number, "category": "qa", "turns": ["What is it?"]} for number in (1, 2)]
    flags = ["--draft", draft, "--questions", write_questions(tmp_path / "q.jsonl", rows), *TINY]
    flags += ["--temperature", "1.5", "--methods", "plain,pld", "--repeats", "2"]
    assert cli.main(["evaluate", *flags, "--run_dir", str(tmp_path / "run")]) == 0

    def answers(name):
        rows = resume_answers(tmp_path / "run/answers" / name).values()
        return [tuple(row["choices"][0]["tokens"][0]) for row in rows]

    plain = answers("plain-1.jsonl") + answers("plain-2.jsonl")
    assert len(set(plain)) == 4
    assert plain[:2] == answers("pld-1.jsonl")


def test_an_evaluation_does_not_go_on_with_other_questions_or_another_draft(draft, tmp_path, capsys):
    """The settings name files, and those may have changed: answers to what was there before are no answers now."""
    own = tmp_path / "d"
    shutil.copytree(draft, own)
    file = tmp_path / "q.jsonl"
    flags = ["--draft", str(own), "--questions", write_questions(file), *TINY, "--methods", "plain,fixed"]
    flags = ["evaluate", *flags, "--run_dir", str(tmp_path / "run")]
    assert cli.main(flags) == 0 == cli.main(flags)
    before = sorted((path, path.read_bytes()) for path in (tmp_path / "run").rglob("*.*") if path.is_file())
    write_questions(file, [{**ASKED[0], "turns": ["Write others"]}, *ASKED[1:]])
    assert cli.main(flags) == 2
    assert "config.yaml: the content of questions has changed since" in capsys.readouterr().err
    write_questions(file)
    weights = load_file(own / "drafter.safetensors")
    name = next(name for name, tensor in weights.items() if tensor.is_floating_point())
    save_file({**weights, name: 2 * weights[name]}, own / "drafter.safetensors")
    assert cli.main(flags) == 2
    assert "config.yaml: the content of draft has changed since" in capsys.readouterr().err
    after = sorted((path, path.read_bytes()) for path in (tmp_path / "run").rglob("*.*") if path.is_file())
    assert after == before


def evaluate_by(methods, draft, folder):
    """Answer the usual questions in `folder / "run"`; the exit code."""
    flags = ["--draft", draft, "--questions", write_questions(folder / "q.jsonl"), *TINY]
    return cli.main(["evaluate", *flags, "--methods", methods, "--run_dir", str(folder / "run")])


def test_an_evaluation_of_the_reference_alone_has_a_report(draft, tmp_path):
    assert evaluate_by("plain", draft, tmp_path) == 0
    assert (tmp_path / "run/speedup.png").exists() and "plain" in (tmp_path / "run/report.md").read_text()


def test_a_folder_belongs_to_one_evaluation_at_a_time(draft, tmp_path, capsys):
    """Two would answer the same questions, and none could read the answers afterwards."""
    with run_lock(tmp_path / "run"):
        assert evaluate_by("plain,pld", draft, tmp_path) == 2
    assert "run is in use by process" in capsys.readouterr().err
    assert not (tmp_path / "run/answers").exists()


# Measures


def published(ours, baseline, task=None):
    """Spec-Bench's speed.py by its description: mean accepted tokens, tokens a second, and their ratio."""
    lengths, rates, bases = [], [], []
    for mine, its in zip(map(json.loads, ours), map(json.loads, baseline), strict=True):
        assert mine["question_id"] == its["question_id"]
        if task in (None, TASKS[mine["category"]]):
            own, other = mine["choices"][0], its["choices"][0]
            lengths += own["accept_lengths"]
            rates.append(sum(own["new_tokens"]) / sum(own["wall_time"]))
            bases.append(sum(other["new_tokens"]) / sum(other["wall_time"]))
    return np.mean(lengths), np.mean(rates), np.mean(rates) / np.mean(bases)


def test_independent_metrics_read_our_files_to_the_same_figures(evaluated):
    folder, _ = evaluated
    lines = {name: (folder / f"answers/{name}-1.jsonl").read_text().splitlines() for name in METHODS}
    files = {(name, 0): resume_answers(folder / f"answers/{name}-1.jsonl") for name in METHODS}
    found = measures(answer_table(files), "plain").set_index(["task", "method"])
    for task in ("mt_bench", "qa", "overall"):
        for name in METHODS:
            mat, rate, speedup = published(lines[name], lines["plain"], None if task == "overall" else task)
            row = found.loc[task, name]
            assert (row.mat, row.tok_per_s, row.speedup) == pytest.approx((mat, rate, speedup), rel=1e-12)


def test_an_answer_has_the_published_layout(evaluated):
    folder, _ = evaluated
    for name in METHODS:
        for row in map(json.loads, (folder / f"answers/{name}-2.jsonl").read_text().splitlines()):
            assert list(row) == ["question_id", "category", "answer_id", "model_id", "choices", "tstamp"]
            (choice,) = row["choices"]
            turns = next(one["turns"] for one in ASKED if one["question_id"] == row["question_id"])
            for key in ("turns", "decoding_steps", "new_tokens", "wall_time"):
                assert len(choice[key]) == len(turns)
            assert choice["index"] == 0 and sum(choice["accept_lengths"]) == sum(choice["new_tokens"]) - len(
                turns
            )
            assert sum(choice["decoding_steps"]) == len(choice["accept_lengths"]) + len(turns)
            assert choice["new_tokens"] == list(map(len, choice["tokens"]))
            assert len(choice["prefill_time"]) == len(turns)
            held, learns = choice["drafts"], name not in ("generate", "plain", "pld")
            assert len(held) == (0 if name == "generate" else len(choice["accept_lengths"]))
            assert sum(map(sum, held)) >= sum(choice["num_drafted"]) >= sum(choice["num_accepted"])
            assert all(
                (learns or not own) and (name in ("pld", "hybrid") or not (copied or second))
                for own, copied, second in held
            )
            for whole, first in zip(choice["wall_time"], choice["prefill_time"], strict=True):
                assert (first is None) if name == "generate" else 0 < first <= whole


def test_figures_by_hand(tmp_path):
    questions = [Question(1, "qa", ("a",)), Question(2, "rag", ("b",))]
    for name, seconds in (("plain", (1.0, 2.0)), ("dvi", (0.5, 0.5))):
        for question, wall_s in zip(questions, seconds, strict=True):
            answers = [answer(5, 9, wall_s, wall_s / 2, 8 if name == "plain" else 2)]
            log_line(tmp_path / name, answer_row(question, "m", ["x"], answers))
    files = {(name, 0): resume_answers(tmp_path / name) for name in ("plain", "dvi")}
    found = measures(answer_table(files), "plain").set_index(["task", "method"])
    assert found.loc[("overall", "dvi"), "speedup"] == pytest.approx(
        (18 + 18) / (9 + 4.5)
    )  # of means, not of ratios
    assert (
        found.loc[("rag", "dvi"), "speedup"] == pytest.approx(4.0) and found.loc[("qa", "dvi"), "mat"] == 4.0
    )
    low, high = found.loc[("overall", "dvi"), ["low", "high"]]
    assert low == pytest.approx(2.0) and high == pytest.approx(4.0)  # only one question, or only the other
    assert math.isnan(found.loc[("qa", "plain"), "accept_rate"]) and math.isnan(
        found.loc[("qa", "dvi"), "speedup_std"]
    )


def test_repeats_give_a_deviation_and_intervals_hold_the_figure(evaluated):
    _, found = evaluated
    assert set(found.task) == {"mt_bench", "qa", "overall"} and set(found.method) == set(METHODS)
    assert (found.low <= found.speedup).all() and (found.speedup <= found.high).all()
    plain = found[found.method == "plain"]
    assert (plain.speedup == 1).all() and (plain.mat == 1).all() and (plain.speedup_std == 0).all()
    assert (
        found.speedup_std.notna().all() and (found.identical == found.questions * 2).all()
    )  # float32: all the same


def test_perplexity_is_that_of_the_answers_and_nothing_drifts(evaluated, draft):
    folder, found = evaluated
    loaded = open_draft(draft, "float32", "cpu").loaded
    nll, count = 0.0, 0
    for question in read_questions(str(folder.parent / "q.jsonl")):
        choice = resume_answers(folder / "answers/dvi-1.jsonl")[question.question_id]["choices"][0]
        for prompt, tokens in zip(
            prompts_of(question, choice["turns"], loaded), choice["tokens"], strict=True
        ):
            with torch.no_grad(), loaded.model.without_adapters("lora_S"):
                states = loaded.model.forward_deep(
                    loaded.model.forward_shallow(torch.tensor([prompt + tokens]))
                )
                logs = loaded.model.lm_head(states)[0].log_softmax(-1)
            nll -= sum(float(logs[len(prompt) - 1 + at, token]) for at, token in enumerate(tokens))
            count += len(tokens)
    overall = found[(found.task == "overall")].set_index("method")
    assert (
        overall.ppl["dvi"] == pytest.approx(math.exp(nll / count), rel=1e-4)
        and overall.drift_kl.abs().max() < 1e-6
    )


# Results


def test_results_report_trace_and_figure_are_written(evaluated):
    folder, found = evaluated
    results = json.loads((folder / "results.json").read_text())
    assert (
        len(results["figures"]) == len(found)
        and results["model"]["dtype"] == "float32"
        and results["overhead"] > 0
    )
    page, text = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    assert (
        "<table>" in page
        and '<img src="speedup.png"' in page
        and "| kangaroo |" in text
        and "http" not in page
    )
    assert (folder / "speedup.png").stat().st_size > 5000
    events = read_trace(folder / "trace.jsonl")
    assert set(events.method) <= {"pld", "kangaroo", "fixed", "dvi", "hybrid"}
    rows = [row["choices"][0] for row in resume_answers(folder / "answers/kangaroo-1.jsonl").values()]
    own = events[(events.method == "kangaroo") & (events.repeat == 0)]
    assert len(own) == sum(sum(one["num_drafted"]) for one in rows) > 0
    assert own.accepted.sum() == sum(sum(one["num_accepted"]) for one in rows)


def test_an_evaluation_that_was_killed_goes_on_and_asks_nothing_twice(draft, tmp_path, monkeypatch):
    flags = ["evaluate", "--draft", draft, "--questions", write_questions(tmp_path / "q.jsonl"), *TINY,
             "--methods", "plain,dvi", "--run_dir", str(tmp_path / "run")]  # fmt: skip
    calls = []

    def killed(path, line):
        if path.parent.name == "answers":
            calls.append(line)
            if len(calls) == 4:
                raise KeyboardInterrupt  # the trace has this answer, the answer file has not
        log_line(path, line)

    monkeypatch.setattr(runner, "log_line", killed)
    assert cli.main(flags) == 130
    kept = (tmp_path / "run/answers/plain-1.jsonl").read_text()
    with (tmp_path / "run/answers/plain-1.jsonl").open("a") as file:
        file.write('{"question_id": 7, "cat')  # torn
    calls[:] = [None] * 4
    assert cli.main(flags) == 0
    assert len(calls) == 4 + 3 and (tmp_path / "run/answers/plain-1.jsonl").read_text().startswith(kept)
    for name in ("plain", "dvi"):
        ids = [json.loads(line)["question_id"] for line in (tmp_path / f"run/answers/{name}-1.jsonl").open()]
        assert sorted(ids) == [7, 81, 161]
    keys = [
        (row["method"], row["question_id"], row["turn"])
        for row in map(json.loads, (tmp_path / "run/trace.jsonl").open())
    ]
    assert len(keys) == len(set(keys)) == 2 * 5
    calls[:] = [None] * 4
    assert cli.main(flags) == 0 and len(calls) == 4  # nothing left


@pytest.mark.no_cover
def test_two_processes_share_the_questions_and_the_first_judges(evaluated, draft, tmp_path, capfd):
    folder, alone = evaluated
    flags = ["evaluate", "--draft", draft, "--questions", str(folder.parent / "q.jsonl"), *TINY, "--repeats", "2",
             "--methods", ",".join(METHODS), "--run_dir", str(tmp_path / "run")]  # fmt: skip
    decoded = []

    def work(rank):
        real = runner.answer_question
        patch = pytest.MonkeyPatch()
        patch.setattr(
            runner, "answer_question", lambda *args: decoded.append(args[0].question_id) or real(*args)
        )
        assert cli.main(flags) == 0
        left = decoded[len(METHODS) :]  # after those that warm up
        assert sorted(set(left)) == [[7, 81], [161]][rank] and len(left) == 2 * len(METHODS) * [2, 1][rank]

    assert in_processes(2, work) == [0, 0]
    assert capfd.readouterr().out.count("results: ") == 1
    for path in (folder / "answers").iterdir():
        one, two = ({key: row["choices"][0]["tokens"] for key, row in resume_answers(file).items()}
                    for file in (path, tmp_path / "run/answers" / path.name))  # fmt: skip
        assert one == two and len(one) == 3
    key = ["method", "question_id", "repeat", "turn", "position", "at", "accepted"]
    traces = [read_trace(run / "trace.jsonl")[key] for run in (folder, tmp_path / "run")]
    fixed = [
        one[one.method.isin(("kangaroo", "fixed"))].sort_values(key, ignore_index=True) for one in traces
    ]
    assert len(fixed[0]) > 20 and fixed[0].equals(fixed[1])  # others draft by what they have seen before
    found = pd.DataFrame(json.loads((tmp_path / "run/results.json").read_text())["figures"])
    assert (found.questions == alone.questions).all() and (found.identical == alone.identical).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--answer_tokens", "9"], "answer_tokens (8, now 9)"),
        (["--methods", "dvi"], "expected the reference plain in it"),
        (["--methods", "plain,best"], "methods has best; expected some of generate"),
        (["--questions", "nowhere.jsonl"], "no such file"),
    ],
)
def test_what_does_not_fit_is_said(evaluated, draft, capsys, change, message):
    folder, _ = evaluated
    flags = [
        "--draft",
        draft,
        "--questions",
        str(folder.parent / "q.jsonl"),
        "--repeats",
        "2",
        *TINY,
        "--run_dir",
        str(folder),
    ]
    assert cli.main(["evaluate", *flags, *change]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no json\n", "plain-1.jsonl:1: not valid JSON"),
        ('{"question_id": 1}\n', "plain-1.jsonl:1: expected question_id and choices"),
        (
            '{"question_id": 1, "category": "qa", "choices": [{"turns": ["a"]}]}\n',
            "1: choices[0].new_tokens is None",
        ),
    ],
)
def test_an_answer_file_that_cannot_be_read_is_said(tmp_path, text, message):
    (tmp_path / "plain-1.jsonl").write_text(text)
    with pytest.raises(DvirlError) as error:
        resume_answers(tmp_path / "plain-1.jsonl")
    assert message in str(error.value)


def test_a_question_that_is_answered_twice_is_said(tmp_path):
    for _ in range(2):
        log_line(
            tmp_path / "a.jsonl", answer_row(Question(3, "qa", ("x",)), "m", ["y"], [Answer([4, 5], 1.0)])
        )
    with pytest.raises(DvirlError, match=r"a.jsonl:2: question_id 3 is answered twice"):
        resume_answers(tmp_path / "a.jsonl")


def test_our_answer_files_are_compared_token_by_token(evaluated, draft, tmp_path):
    folder, _ = evaluated
    plain, hybrid = (str(folder / f"answers/{name}-1.jsonl") for name in ("plain", "hybrid"))
    loaded, questions = open_draft(draft, "float32", "cpu").loaded, [str(folder.parent / "q.jsonl")]
    report = compare_files(plain, hybrid, questions, loaded, torch.float32, 8)
    assert (report.answers, report.identical) == (3, 3)
    rows = [json.loads(line) for line in Path(hybrid).read_text().splitlines()]
    rows[0]["choices"][0]["tokens"][1][2] += 1  # the text says nothing of it
    other = write_questions(tmp_path / "a.jsonl", rows)
    (found,) = compare_files(plain, other, questions, loaded, torch.float32, 8).differences
    assert (found.question, found.position, found.verdict) == ("81, turn 2", 2, "error")
