"""`dvirl cost`: what is recommended follows from the costs, and the model of them from blocks by hand."""

import json

import pytest
import torch
from test_bench import save_tiny
from test_distill import question_file
from test_drafters import exported

from dvirl import cli
from dvirl.evaluation import cost
from dvirl.evaluation.cost import SHAPES, random_model, recommend
from dvirl.models import loading
from kangaroo.decoding.costs import StepCosts


def test_what_is_recommended_is_the_fastest_block():
    costs = StepCosts((10.0, 11.0, 12.0, 20.0), 2.0)
    # At 0.8: 1.8 of 13 ms, 2.44 of 16 ms, 2.952 of 26 ms, against 1 of 10 ms.
    assert recommend(costs, 0.8) == (2, pytest.approx(2.44 / 16.0 * 10.0))
    assert recommend(costs, 0.0) == (0, 1.0)
    assert costs.break_even(1) == pytest.approx(0.3) and costs.break_even(2) == pytest.approx(
        0.4220, abs=1e-4
    )


@pytest.fixture
def flags(tmp_path):
    source = save_tiny(tmp_path / "model")
    exported(tmp_path / "d", loading.load(str(source), dtype="float32", device="cpu"))
    questions = question_file(tmp_path / "q.jsonl", [["What is it?"], ["Count"]])
    return ["cost", "--model_name", str(source), "--dtype", "float32", "--device", "cpu", "--threads", "1",
            "--check", str(tmp_path / "d"), "--questions", questions, "--max_new_tokens", "10"]  # fmt: skip


def test_the_command_measures_recommends_checks_and_draws(tmp_path, capsys, flags):
    more = ["--exit_layers", "1", "3", "--contexts", "8", "24", "--draft_len", "3", "--rows", "2"]
    files = ["--out", str(tmp_path / "o.json"), "--figure", str(tmp_path / "f.png")]
    assert cli.main([*flags, *more, *files]) == 0
    printed = capsys.readouterr().out
    assert (
        "at an acceptance of 0.70 the fastest is exit layer " in printed
        and "draft_len 6: predicted " in printed
    )
    content = json.loads((tmp_path / "o.json").read_text())
    assert [(one["exit_layer"], one["context"]) for one in content["costs"]] == [
        (1, 8),
        (1, 24),
        (3, 8),
        (3, 24),
    ]
    for one in content["costs"]:
        steps = StepCosts(tuple(one["steps"]["verify"]), one["steps"]["draft"])
        assert recommend(steps, 0.7) == (one["draft_len"], one["speedup"]) and len(steps.verify) == 4
    assert [one["draft_len"] for one in content["checked"]] == [2, 4, 6]
    assert all(one["predicted"] > 0 and one["measured"] > 0 for one in content["checked"])
    assert (tmp_path / "f.png").stat().st_size > 5000


def test_shapes_have_random_weights_and_take_no_file(monkeypatch, capsys):
    monkeypatch.setitem(SHAPES, "small", dict(hidden_size=16, intermediate_size=24, num_hidden_layers=3,
                                              num_attention_heads=2, num_key_value_heads=2, vocab_size=40))  # fmt: skip
    model = random_model("small", torch.bfloat16, torch.device("cpu"))
    assert model.lm_head.weight.dtype is torch.bfloat16 and model.lm_head.weight.float().std() > 0
    assert torch.get_default_dtype() is torch.float32
    few = ["--exit_layers", "2", "--contexts", "8", "--draft_len", "2", "--draft_vocab", "0"]
    assert cli.main(["cost", "--model_name", "small", "--device", "cpu", "--dtype", "float32", *few]) == 0
    assert " 2 " in capsys.readouterr().out and cost.LENGTHS[0] == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--exit_layers", "9"], "exit_layer is 9; this model of 4 layers takes 1 to 3"),
        (["--drafter", "other"], "drafter is 'other'; expected one of"),
        (["--contexts", "0"], "contexts is 0; expected a number from 1"),
        (["--acceptance", "1.5"], "acceptance is 1.5; expected a number from 0 to 1"),
        (["--rows", "0"], "rows is 0; expected a number from 1"),
    ],
)
def test_bad_settings_are_said(capsys, flags, more, message):
    assert cli.main([*flags, *more]) == 2
    assert message in capsys.readouterr().err
