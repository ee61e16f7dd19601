"""Prompts that the model writes itself: openers, nucleus sampling, filters."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from conftest import tiny_loaded
from test_trainer import tiny_settings

from dvirl import cli
from dvirl.data.selfwritten import Openers, top_p_sampler, write_prompts
from dvirl.data.sources import read_prompts
from dvirl.data.stream import load_prompts
from dvirl.runs.errors import DvirlError


@pytest.mark.no_cover
def test_openers_are_drawn_by_their_shares_and_filled_in():
    openers, rng = Openers(), random.Random(0)
    drawn = [openers.draw(rng) for _ in range(4000)]
    assert sum(entry["share"] for entry in openers.table.values()) == pytest.approx(1.0)
    assert drawn.count("") / 4000 == pytest.approx(openers.table["free"]["share"], abs=0.03)
    assert not any("{" in opener or opener.endswith(" ") for opener in drawn)
    assert any(opener.startswith("A farmer has") for opener in drawn)
    assert all("def" in o or "class" in o or "import" in o or "rite" in o or "ode" in o or "fun" in o or "Python" in o
               for o in (Openers(["code"]).draw(rng) for _ in range(200)))  # fmt: skip
    with pytest.raises(DvirlError, match="unknown kind of prompt poems; known are free, question"):
        Openers(["poems"])


def test_the_sampler_draws_from_the_nucleus_in_proportion():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().repeat(20000, 1)
    drawn = top_p_sampler(torch.Generator().manual_seed(0), 1.0, 0.75)(logits)
    shares = torch.bincount(drawn, minlength=4) / 20000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.0, 0.0]) / 0.8, atol=0.02, rtol=0)
    sharper = top_p_sampler(torch.Generator().manual_seed(0), 0.5, 1.0)(logits)
    squares = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    torch.testing.assert_close(
        torch.bincount(sharper, minlength=4) / 20000, squares / squares.sum(), atol=0.02, rtol=0
    )


@pytest.mark.no_cover
@pytest.mark.real
def test_the_model_writes_its_own_prompts(real):
    prompts = write_prompts(real, 3, seed=3, batch=4)  # one of the four does not end
    start, answer, _ = real.chat.frame()
    assert len({tuple(prompt) for prompt in prompts}) == 3
    for prompt in prompts:
        assert prompt[: len(start)] == start and prompt[-len(answer) :] == answer
        assert not set(prompt[len(start) : -len(answer)]) & set(real.tokenizer.all_special_ids)
    assert write_prompts(real, 3, seed=3, batch=4) == prompts


@pytest.mark.real
def test_the_command_writes_a_question_file_of_every_kind_in_turn(tmp_path, capsys, real):
    path = tmp_path / "new/q.jsonl"
    flags = [
        "--each",
        "1",
        "--kinds",
        "free",
        "code",
        "--seed",
        "3",
        "--device",
        "cpu",
        "--dtype",
        "bfloat16",
    ]
    assert cli.main(["prompts", str(path), *flags]) == 0
    assert capsys.readouterr().out == f"written: {path}, 2 prompts\n"
    prompts = list(read_prompts("spec_bench", str(path)))
    assert [prompt.category for prompt in prompts] == ["free", "code"]
    assert len({prompt.key for prompt in prompts}) == 2 and all(prompt.turns[0].strip() for prompt in prompts)
    assert not any("<|im" in prompt.turns[0] for prompt in prompts)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--each", "0"], "each is 0; expected a number from 1"),
        (["--kinds", "x"], "unknown kind of prompt x"),
    ],
)
def test_prompts_that_cannot_be_written_are_said(tmp_path, capsys, flags, message):
    assert cli.main(["prompts", str(tmp_path / "q.jsonl"), *flags]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "q.jsonl").exists()


def test_a_model_that_writes_nothing_usable_is_said():
    with pytest.raises(DvirlError, match="only 0 usable prompts of 4;"):
        write_prompts(dataclasses.replace(tiny_loaded(), eos_ids=()), 4, seed=0, batch=8)


def test_kinds_are_chosen_by_the_path_setting():
    with pytest.raises(DvirlError, match="unknown kind of prompt poems"):
        load_prompts(tiny_settings(prompts_source="magpie", prompts_path="poems"), tiny_loaded())
