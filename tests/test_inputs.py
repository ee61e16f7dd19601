"""What callers pass to decoding: every form that plainly means something, and a sentence for all others."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from conftest import EOS, VOCAB, tiny_config, tiny_kangaroo, tiny_loaded

from dvirl.evaluation.equal import compare_decoders
from dvirl.evaluation.inference_baseline import as_hugging_face, generate_forward
from dvirl.evaluation.inference_kangaroo import kangaroo_forward, measure_acceptance
from dvirl.evaluation.measure import timed
from dvirl.runs.errors import DvirlError
from kangaroo.decoding.blocks import DecodeConfig
from kangaroo.decoding.inputs import context_length, end_ids, token_ids

PROMPT = [5, 9, 100, 42]
HOW = DecodeConfig(2)


@pytest.fixture(scope="module")
def model():
    return tiny_kangaroo(0)


@pytest.fixture(scope="module")
def baseline():
    return as_hugging_face(tiny_loaded().model)


@pytest.mark.parametrize(
    "prompt",
    [
        torch.tensor(PROMPT),
        torch.tensor([PROMPT]),
        torch.tensor(PROMPT, dtype=torch.int32),
        [PROMPT],
        tuple(PROMPT),
        np.array([PROMPT]),
    ],
    ids=["[T]", "[1, T]", "int32", "list of one list", "tuple", "numpy"],
)
def test_a_prompt_may_come_as_its_tokenizer_gives_it(model, baseline, prompt):
    expected = model.generate(PROMPT, 12, HOW).tokens
    assert model.generate(prompt, 12, HOW).tokens == expected
    assert next(iter(model.decode_blocks(prompt, 12, HOW))).committed == tuple(expected[:1])
    assert kangaroo_forward(model, prompt, 12, HOW).tokens == expected
    assert measure_acceptance(model, [prompt], 12, HOW).responses == [expected]
    theirs = generate_forward(baseline, PROMPT, 12).tokens
    assert generate_forward(baseline, prompt, 12).tokens == theirs


def test_a_batch_may_be_one_tensor(model):
    rows = torch.tensor([PROMPT, PROMPT[::-1]])
    together = model.generate_batch(rows, 12, HOW)
    assert [one.tokens for one in together] == [model.generate(row, 12, HOW).tokens for row in rows]


def test_end_tokens_may_be_one_several_or_none(model, baseline):
    whole = model.generate(PROMPT, 12, HOW).tokens
    end = whole[4]
    short = whole[: whole.index(end) + 1]
    theirs = generate_forward(baseline, PROMPT, 12).tokens
    last = theirs.index(theirs[4]) + 1
    for ends in (end, [end], (end,), torch.tensor(end), torch.tensor([end]), np.int64(end)):
        assert model.generate(PROMPT, 12, HOW, ends).tokens == short
        assert timed(model, PROMPT, 12, HOW, ends).tokens == short
        assert measure_acceptance(model, [PROMPT], 12, HOW, ends).responses == [short]
    assert generate_forward(baseline, PROMPT, 12, theirs[4]).tokens == theirs[:last]
    for none in (None, (), []):
        assert model.generate(PROMPT, 12, HOW, none).tokens == whole
        assert timed(model, PROMPT, 12, HOW, none).tokens == whole
        assert generate_forward(baseline, PROMPT, 12, none).tokens == theirs
    with pytest.raises(ValueError, match="token ids are '</s>'; expected a list or a tensor"):
        model.generate(PROMPT, 12, HOW, "</s>")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty"),
        (torch.empty(1, 0), "the prompt is empty"),
        ([5, VOCAB], f"the prompt has the token {VOCAB}; expected 0 to {VOCAB - 1}"),
        ([5, -1], "the prompt has the token -1; expected 0"),
        ([5] * 257, "the prompt has 257 tokens, .* expected at most the model's context, 256"),
        ("Hello", "token ids are 'Hello'; expected a list or a tensor"),
        (5, "token ids are 5; expected a list or a tensor"),
        (None, "token ids are None"),
        ([0.5, 1.5], "token ids are"),
        ([[5], [6, 7]], "token ids are"),
        (torch.ones(2, 3, dtype=torch.long), "token ids are"),
        ([2**70], "token ids are"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_prompt_that_cannot_be_read_is_refused_in_one_sentence(model, baseline, prompt, message):
    with pytest.raises(ValueError, match=message):
        model.generate(prompt, 8, HOW)
    for decode in (
        lambda: kangaroo_forward(model, prompt, 8, HOW),
        lambda: measure_acceptance(model, [prompt], 8, HOW),
        lambda: generate_forward(baseline, prompt, 8),
        lambda: compare_decoders(model, {"x": [prompt]}, 8, HOW, ()),
    ):
        with pytest.raises(DvirlError, match=message) as error:
            decode()
        assert "\n" not in str(error.value)


def test_measures_need_room_for_the_answer(model, baseline):
    """Positions that the model was not made for say nothing of a draft."""
    assert len(timed(model, [5] * 248, 8, HOW).tokens) == 8
    for decode in (
        lambda: timed(model, [5] * 249, 8, HOW),
        lambda: generate_forward(baseline, [5] * 249, 8),
    ):
        with pytest.raises(DvirlError, match="the prompt has 249 tokens, and the response up to 8; expected"):
            decode()


def test_no_prompt_at_all_is_said(model):
    with pytest.raises(ValueError, match="there is no prompt"):
        model.generate_batch([], 8, HOW)


def test_the_context_is_that_of_the_scaled_positions():
    def context(**scaling):
        config = tiny_config()
        config.rope_scaling = scaling or None
        return context_length(config)

    assert context() == 256
    assert context(type="linear", factor=2.5) == 640
    assert context(type="llama3", factor=8.0) == context(type="yarn", factor=4.0) == 256
    assert context(type="dynamic", factor=2.0) == sys.maxsize


def test_ids_are_lists_of_python_numbers():
    assert token_ids(torch.tensor([[3, 4]])) == [3, 4] and end_ids(EOS) == [EOS] and end_ids(None) == []
