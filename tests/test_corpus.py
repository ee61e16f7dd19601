"""Self-written conversations: the answers are the model's own, the frame is right, shards are whole."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import random_prompts, tiny_loaded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pad_sequence

from dvirl.rollout import generate
from dvirl.runs.errors import DvirlError
from dvirl.scale.corpus import (
    Responses,
    answer,
    join,
    overlapping,
    read_shard,
    without_repeats,
    write_conversations,
    write_shard,
)

ENDS = (2, *range(240, 264))


def talkative(seed: int = 0):
    """A tiny model whose turns and answers often end: many of its tokens do."""
    return dataclasses.replace(tiny_loaded(seed), eos_ids=ENDS)


def of(rows, prompt_lens) -> Responses:
    lengths = torch.tensor([len(row) for row in rows])
    tokens = pad_sequence([torch.tensor(row, dtype=torch.int32) for row in rows], batch_first=True)
    return Responses(tokens, torch.tensor(prompt_lens), lengths - torch.tensor(prompt_lens))


def rows_of(responses) -> list[list[int]]:
    ends = (responses.prompt_lens + responses.response_lens).tolist()
    return [row[:end] for row, end in zip(responses.tokens.tolist(), ends, strict=True)]


def equal(one: Responses, other: Responses) -> bool:
    return all(torch.equal(value, vars(other)[name]) for name, value in vars(one).items())


@pytest.mark.parametrize("batch", [1, 4, 100])
def test_answers_are_those_of_one_prompt_at_a_time_in_the_prompts_order(batch):
    loaded, prompts = talkative(), random_prompts(11)
    found = answer(loaded, prompts, 9, batch)
    assert found.tokens.dtype == torch.int32 and found.prompt_lens.tolist() == [
        len(prompt) for prompt in prompts
    ]
    alone = [prompt + generate(loaded.model, [prompt], 9, ENDS).responses()[0] for prompt in prompts]
    assert rows_of(found) == alone and len({len(row) for row in alone}) > 3
    assert found.num_tokens == sum(map(len, alone)) - sum(map(len, prompts)) == len(found.response_tokens())
    expected = [row[len(prompt) :] for row, prompt in zip(alone, prompts, strict=True)]
    assert found.response_tokens().tolist() == [token for row in expected for token in row]


def test_conversations_stand_in_the_chat_frame_and_follow_ups_contain_the_first_turn():
    loaded = talkative()
    start, between, again = loaded.chat.frame()
    found = write_conversations(loaded, 40, 3, 12, 1.0, 16)
    rows = rows_of(found)
    prompts = [row[:length] for row, length in zip(rows, found.prompt_lens.tolist(), strict=True)]
    ended = [row[:-1] for row in rows if row[-1] in ENDS]
    contexts = [row + again for row in ended]
    seconds = [prompt for prompt in prompts if any(prompt[: len(c)] == c for c in contexts)]
    assert 0 < len(seconds) < len(prompts) and len({tuple(prompt) for prompt in prompts}) == len(prompts)
    assert prompts[-len(seconds) :] == seconds
    control = set(loaded.tokenizer.all_special_ids)
    for prompt in prompts:
        context = next((c for c in contexts if prompt in seconds and prompt[: len(c)] == c), start)
        assert prompt[: len(context)] == context and prompt[-len(between) :] == between
        assert not control & set(prompt[len(context) : -len(between)])
    assert equal(answer(loaded, prompts, 12, 16), found)


def test_the_share_of_follow_ups_and_the_seed_decide():
    loaded = talkative()
    base, again = (write_conversations(loaded, 24, 3, 12, 0.5, 8) for _ in range(2))
    assert equal(base, again)
    other, none = (
        write_conversations(loaded, 24, 4, 12, 0.5, 8),
        write_conversations(loaded, 24, 3, 12, 0.0, 8),
    )
    assert rows_of(base) != rows_of(other) and rows_of(base)[: len(none)] == rows_of(none)
    assert len(none) < len(base) < len(write_conversations(loaded, 24, 3, 12, 1.0, 8))
    with pytest.raises(DvirlError, match="the model wrote no usable turn of 8"):
        write_conversations(dataclasses.replace(loaded, eos_ids=()), 8, 0, 4, 0.0, 8)


def test_tasks_about_texts_hold_answers_of_the_model():
    """Each task is one of the packaged ones about answers, and is answered as the model answers alone."""
    loaded = talkative()
    first = write_conversations(loaded, 30, 3, 12, 0.0, 16)
    found = write_conversations(loaded, 30, 3, 12, 0.0, 16, about_text=0.5)
    rows, answers = rows_of(found), []
    assert rows[: len(first)] == rows_of(first) and len(rows) == len(first) + round(0.5 * len(first))
    for tokens, prompt_len in zip(rows, found.prompt_lens.tolist(), strict=True):
        stop = len(tokens) - (tokens[-1] in ENDS)
        answers.append(loaded.tokenizer.decode(tokens[prompt_len:stop]).strip())
    start, end, _ = loaded.chat.frame()
    lengths = set()
    for tokens, prompt_len in list(zip(rows, found.prompt_lens.tolist(), strict=True))[len(first) :]:
        assert tokens[: len(start)] == start and tokens[prompt_len - len(end) : prompt_len] == end
        task = loaded.tokenizer.decode(tokens[len(start) : prompt_len - len(end)])
        held = [answer for answer in answers[: len(first)] if answer and answer in task]
        assert held and "{" not in task
        lengths.add(prompt_len)
    assert len(lengths) > 3
    again = answer(
        loaded, [row[:length] for row, length in zip(rows, found.prompt_lens.tolist(), strict=True)], 12, 16
    )
    assert equal(again, found)


def test_a_shard_comes_back_and_a_broken_one_is_named(tmp_path):
    responses, path = of([[3, 4, 5], [6, 7]], [1, 1]), tmp_path / "new" / "shard-00000.safetensors"
    write_shard(path, responses)
    assert equal(read_shard(path), responses) and [p.name for p in path.parent.iterdir()] == [path.name]
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DvirlError, match=r"shard-00000\.safetensors: not a readable shard .*; remove it"):
        read_shard(path)
    with pytest.raises(DvirlError, match="missing"):
        read_shard(tmp_path / "missing")


def test_parts_are_joined_taken_and_freed_of_repeats():
    one, other = of([[3, 4, 5], [6, 7]], [1, 1]), of([[3, 4, 5, 9], [6, 8, 1, 1], [3, 4, 5]], [2, 1, 1])
    both = join([one, other])
    assert rows_of(both) == [[3, 4, 5], [6, 7], [3, 4, 5, 9], [6, 8, 1, 1], [3, 4, 5]]
    assert rows_of(without_repeats(both)) == [[3, 4, 5], [6, 7], [3, 4, 5, 9]]
    taken = both.take(torch.tensor([4, 1]))
    assert rows_of(taken) == [[3, 4, 5], [6, 7]] and taken.tokens.shape == (2, 3)
    assert len(both.take(torch.tensor([], dtype=torch.long))) == 0


texts = st.lists(st.integers(1, 3), min_size=0, max_size=9)


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(texts.filter(bool), min_size=1, max_size=5),
    questions=st.lists(texts, max_size=4),
    n=st.integers(1, 5),
)
def test_overlaps_are_those_of_a_search_by_hand(rows, questions, n):
    def runs(tokens, length):
        return {tuple(tokens[i : i + length]) for i in range(len(tokens) - length + 1)}

    expected = [
        any(runs(row, min(n, len(q))) & runs(q, min(n, len(q))) for q in questions if q) for row in rows
    ]
    found = overlapping(of(rows, [0] * len(rows)), questions, n)
    assert found.tolist() == expected
