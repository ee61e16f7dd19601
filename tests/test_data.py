"""Prompts: every source, malformed rows, and a stream that can be put back where it was."""

from __future__ import annotations

import ast
import getpass
import gzip
import json
import subprocess
import sys
from dataclasses import replace

import pandas as pd
import pytest
from conftest import tiny_loaded
from hypothesis import given
from hypothesis import strategies as st
from test_models import save_tiny
from test_sgp import sgp_settings
from test_trainer import tiny_settings

from dvirl import train_dvi
from dvirl.config import DVIConfig
from dvirl.data import sources
from dvirl.data.domains import docstring_prompts
from dvirl.data.sources import Prompt, chatterbot_prompts, read_prompts
from dvirl.data.stream import PromptStream, load_prompts
from dvirl.models.chat import ChatEncoder
from dvirl.runs.errors import DvirlError
from dvirl.sgp import SGPTrainer

ROWS = {
    "sharegpt": [{"id": "a", "conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "Hi there"},
                                               {"from": "gpt", "value": "Hello"}]}],
    "dolly": [{"instruction": "Sum up", "context": "A long text", "response": "r", "category": "summarization"}],
    "jsonl": [{"prompt": "One"}, {"turns": ["One", "answer", "Two"]}],
    "spec_bench": [{"question_id": 81, "category": "writing", "turns": ["Write", "Rewrite"]},
                   {"question_id": 82, "category": "", "turns": ["Sum up"]}, {"question_id": 83, "turns": ["Add"]}],
    "spec_bench_turns": [{"question_id": 81, "category": "writing", "turns": ["Write"]},
                         {"question_id": 82, "category": None, "turns": ["Sum up", "Shorter"]}],
}  # fmt: skip
TURNS = {
    "sharegpt": [("Hi there",)],
    "dolly": [("Sum up\n\nA long text",)],
    "jsonl": [("One",), ("One", "answer", "Two")],
    "spec_bench": [("Write",), ("Sum up",), ("Add",)],
    "spec_bench_turns": [("Write",), ("Sum up",), ("Shorter",)],
}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("as_lines", [True, False])
def test_every_schema_is_read(tmp_path, kind, as_lines):
    path = tmp_path / "rows.json"
    path.write_text("\n".join(map(json.dumps, ROWS[kind])) if as_lines else json.dumps(ROWS[kind]))
    assert [prompt.turns for prompt in read_prompts(kind, str(path))] == TURNS[kind]


@pytest.mark.parametrize(
    ("kind", "line", "message"),
    [
        ("jsonl", '{"prompt": 3}', "non-empty string 'prompt'"),
        ("jsonl", "{nonsense", "not valid JSON"),
        ("jsonl", '{"turns": ["a", "b"]}', "odd number"),
        ("jsonl", '{"turns": []}', "list of non-empty strings"),
        ("sharegpt", '{"conversations": "x"}', "non-empty list of turns"),
        (
            "sharegpt",
            '{"conversations": [{"from": "gpt", "value": "x"}]}',
            "expected a turn with the role user",
        ),
        ("dolly", '{"instruction": "x", "context": 3}', "'context' to be a string"),
        ("spec_bench", '{"turns": ["x"]}', "question_id"),
        ("spec_bench", "[]", "question_id"),
        ("spec_bench", '{"question_id": 1, "category": 3, "turns": ["x"]}', "'category' to be a string"),
        ("spec_bench", '{"question_id": 1, "turns": [""]}', "'turns' to be a list of non-empty strings"),
    ],
)
def test_a_malformed_row_is_named_or_skipped(tmp_path, capsys, kind, line, message):
    path = tmp_path / "rows.jsonl"
    good = json.dumps(ROWS[kind][0])
    path.write_text(f"{good}\n\n{line}\n")
    with pytest.raises(DvirlError, match=message) as caught:
        read_prompts(kind, str(path))
    assert str(caught.value).startswith(f"{path}:3: ")
    assert [prompt.turns for prompt in read_prompts(kind, str(path), "skip")] == TURNS[kind][:1]
    assert f"skipped {path}:3" in capsys.readouterr().err


USER = {"role": "user", "content": "Hi there"}
ANSWER = {"role": "assistant", "content": "Hello"}
AGAIN = {"role": "user", "content": "Bye"}
KIND = {"role": "system", "content": "Be kind."}


@pytest.mark.parametrize(
    ("row", "turns", "system", "response"),
    [
        ({"messages": [USER, ANSWER]}, ("Hi there",), "", "Hello"),
        ({"messages": [KIND, USER]}, ("Hi there",), "Be kind.", ""),
        ({"prompt": [KIND, USER, ANSWER, AGAIN]}, ("Hi there", "Hello", "Bye"), "Be kind.", ""),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}, ("Hi",), "", ""),
        ({"conversation_id": "x", "model": "m", "conversation": [USER, ANSWER, AGAIN, ANSWER]}, ("Hi there",), "", "Hello"),
        ({"conversations": [USER, ANSWER]}, ("Hi there",), "", "Hello"),
        ({"conversations": [{"from": "gpt", "value": "x"}, {"from": "human", "value": "Hi"}]}, ("Hi",), "", ""),
        ({"items": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]}, ("Hi",), "", "Yo"),
    ],
)  # fmt: skip
def test_conversations_by_every_name(tmp_path, row, turns, system, response):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    for kind in ("jsonl", "sharegpt"):
        if kind == "sharegpt" and "prompt" in row:
            continue
        (prompt,) = read_prompts(kind, str(path))
        assert (prompt.turns, prompt.system, prompt.response) == (turns, system, response)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, "non-empty list of turns"),
        ({"messages": [ANSWER]}, "expected a turn with the role user"),
        ({"messages": [USER, USER]}, "turn 2 is by 'user'"),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            "expected a turn with the role user or from human, not only .'tool'",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "content to be text"),
        ({"messages": [{"role": "user", "content": None}]}, "expected turn 1 to have a non-empty text"),
        ({"messages": [{"role": "user", "content": []}]}, "expected turn 1 to have a non-empty text"),
        ({"messages": [USER, ANSWER, KIND, AGAIN]}, "turn 3 is by 'system'"),
        ({"messages": "Hi"}, "list of turns under one of messages, .* not 'Hi'"),
        ({"messages": None}, "expected an object with one of prompt, turns, messages"),
    ],
)
def test_a_bad_conversation_names_its_row_and_skipping_ends_with_a_total(tmp_path, capsys, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(one) for one in ({"messages": [USER]}, row, {"messages": [AGAIN]})))
    with pytest.raises(DvirlError, match=f"{path}:2: .*{message}"):
        read_prompts("jsonl", str(path))
    assert len(read_prompts("jsonl", str(path), "skip")) == 2
    assert f"left out 1 of 3 rows of {path}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "Add", "input": "1 2", "output": "3"}, None),
        ({"messages": [KIND, USER, ANSWER]}, None),
        ({"messages": [USER]}, "an answer after its first question"),
        ({"messages": [USER, ANSWER, AGAIN]}, None),
        ({"instruction": "Add", "output": "3", "response": None}, None),
        ({"instruction": "Add", "output": ""}, "non-empty string 'output'"),
        ({"instruction": "Add"}, "non-empty string 'response'"),
    ],
)
def test_supervised_records_of_every_schema(tmp_path, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    if message:
        with pytest.raises(DvirlError, match=message):
            read_prompts("supervised", str(path))
    else:
        assert read_prompts("supervised", str(path))[0].response in ("3", "Hello")


LATER = [
    [USER, USER, ANSWER],
    [USER, {"role": "assistant", "content": ""}, AGAIN, ANSWER],
    [USER, {"role": "assistant", "content": None, "tool_calls": [1]}, {"role": "tool", "content": "x"}, ANSWER],
]  # fmt: skip


@pytest.mark.parametrize("turns", LATER)
def test_turns_that_no_prompt_needs_are_not_looked_at(tmp_path, turns):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"conversations": turns}]))
    (prompt,) = read_prompts("sharegpt", str(path))
    assert (prompt.turns, prompt.response) == (("Hi there",), "")


def test_system_texts_are_joined_and_empty_ones_are_none(tmp_path):
    developer = {"role": "developer", "content": "Be brief."}
    nobody = {"role": "system", "content": ""}
    speaker = {"role": "User", "content": "Hello!"}
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "\n".join(json.dumps({"messages": turns}) for turns in ([KIND, developer, USER], [nobody, speaker]))
    )
    assert [(prompt.system, prompt.turns) for prompt in read_prompts("jsonl", str(path))] == [
        ("Be kind.\nBe brief.", ("Hi there",)),
        ("", ("Hello!",)),
    ]


def test_a_table_has_null_where_a_row_has_nothing(tmp_path):
    path = str(tmp_path / "rows.parquet")
    other = {"from": "human", "value": "Yes?"}
    rows = [{"prompt": "One", "category": "c"}, {"messages": [USER]}, {"messages": [other]}]
    pd.DataFrame(rows).to_parquet(path)
    assert [(prompt.turns, prompt.category) for prompt in read_prompts("jsonl", path)] == [
        (("One",), "c"),
        (("Hi there",), ""),
        (("Yes?",), ""),
    ]


def test_a_table_without_a_usable_column_says_what_it_has(tmp_path):
    path = str(tmp_path / "rows.parquet")
    pd.DataFrame({"text": ["x"], "label": [1]}).to_parquet(path)
    expected = "row 1: expected an object with one of prompt, .*, not {'text': 'x', 'label': 1}"
    with pytest.raises(DvirlError, match=expected) as caught:
        read_prompts("jsonl", path)
    assert "\n" not in str(caught.value)


def test_files_as_people_have_them(tmp_path):
    """Pretty-printed, wrapped, packed, with a byte order mark, or parquet: the same rows."""
    rows = [{"messages": [USER, ANSWER], "extra": [1]}, {"messages": [AGAIN], "extra": []}]
    lines = "\n".join(map(json.dumps, rows))
    files = {
        "pretty.json": json.dumps(rows, indent=2).encode(),
        "wrapped.json": json.dumps({"version": 1, "data": rows}, indent=2).encode(),
        "viewer.json": json.dumps({"features": [{"feature_idx": 0, "name": "messages"}], "num_rows_total": 2,
                                   "rows": [{"row_idx": 0, "row": row} for row in rows]}).encode(),
        "items.json": json.dumps({"items": rows}).encode(),
        "conversations.json": json.dumps({"conversations": [{"id": 1}, *rows]}).encode(),
        "mark.jsonl": lines.encode("utf-8-sig"),
        "packed.jsonl.gz": gzip.compress(lines.encode()),
        "packed.json.gz": gzip.compress(json.dumps(rows).encode()),
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    pd.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    for name in [*files, "rows.parquet"]:
        assert [prompt.turns for prompt in read_prompts("jsonl", str(tmp_path / name), "skip")] == [
            ("Hi there",),
            ("Bye",),
        ]
    (tmp_path / "one.json").write_text(json.dumps(rows[0], indent=2))
    assert len(read_prompts("jsonl", str(tmp_path / "one.json"))) == 1
    for name in ("packed.jsonl.gz", "rows.parquet"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:40])
        with pytest.raises(DvirlError, match=name):
            read_prompts("jsonl", str(path))


def test_a_limit_that_leaves_no_room_for_a_prompt_says_so():
    config = DVIConfig(max_new_tokens=400)
    with pytest.raises(
        DvirlError, match="max_new_tokens is 400, which leaves no room for a prompt; expected less"
    ):
        load_prompts(config, tiny_loaded())


@pytest.mark.parametrize("changes", [{"max_prompt_tokens": 2}, {"max_new_tokens": 254}])
def test_a_limit_that_no_prompt_fits_is_not_blamed_on_the_source(changes):
    with pytest.raises(
        DvirlError, match=r"none of \d+ prompts has 2 tokens or fewer \(max_prompt_tokens is "
    ):
        load_prompts(tiny_settings(**changes), tiny_loaded())


def test_prompts_that_the_chat_format_cannot_spell_are_skipped_too(tmp_path, capsys):
    path = tmp_path / "p.jsonl"
    texts = ("One", "Say [INST]", "Two")
    path.write_text("\n".join(json.dumps({"prompt": text}) for text in texts))
    loaded = tiny_loaded()
    loaded = replace(loaded, chat=ChatEncoder(loaded.tokenizer, "llama-2"))
    settings = dict(prompts_source="jsonl", prompts_path=str(path), held_out=1)
    with pytest.raises(DvirlError, match=r"'Say \[INST\]' spells \[INST\]"):
        load_prompts(tiny_settings(**settings), loaded)
    assert len(load_prompts(tiny_settings(on_bad_row="skip", **settings), loaded).stream) == 1
    assert "left out 1 of 3 prompts" in capsys.readouterr().err
    records = [Prompt((text,), response="Yes") for text in texts]
    trainer = SGPTrainer(sgp_settings(on_bad_row="skip"), loaded, records)
    assert len(trainer.train_set) + len(trainer.held_out) == 2
    said = capsys.readouterr().err
    assert "left out 1 of 3 prompts" in said and "records" not in said


def test_a_fast_batch_that_is_never_reached_is_said(tmp_path, capsys):
    model = save_tiny(tmp_path / "m")
    config = tiny_settings(
        model_name=str(model), run_dir=str(tmp_path / "run"), num_prompts=4, fast_batch=10**6
    )
    trainer = train_dvi.main(config)
    said = capsys.readouterr().out
    accepted = trainer.buffer.accepted_since_update
    assert f"nothing was learned: {accepted} drafts were accepted in all" in said
    assert "fast_batch = 1000000; lower it, or give more prompts" in said and "acceptance rate" not in said


def test_nothing_to_read_is_an_error(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "array.json").write_text("[1,")
    for name, message in [
        ("empty.jsonl", "no prompts"),
        ("bytes.jsonl", "UTF-8"),
        ("array.json", "not valid JSON"),
    ]:
        with pytest.raises(DvirlError, match=message):
            read_prompts("jsonl", str(tmp_path / name))
    with pytest.raises(DvirlError, match="no such file"):
        read_prompts("jsonl", str(tmp_path / "missing.jsonl"))


def test_the_hub_is_streamed(monkeypatch):
    import datasets

    rows = [{"instruction": f"Do {n}", "context": "", "response": "", "category": "c"} for n in range(5)]
    asked = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, config, **how: asked.append((name, config, how)) or iter(rows)
    )
    monkeypatch.setattr(sources, "HUB_ROWS", 3)
    assert len(read_prompts("dolly", "owner/name")) == 3
    assert read_prompts("dolly", "owner/name:big:test") and read_prompts("dolly", "owner/name::test")
    train = {"split": "train", "streaming": True}
    test = {"split": "test", "streaming": True}
    assert asked == [("owner/name", None, train), ("owner/name", "big", test), ("owner/name", None, test)]

    def offline(name, config, **how):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DvirlError, match="no route to host"):
        read_prompts("dolly", "owner/name")


def test_the_default_corpus():
    prompts = chatterbot_prompts()
    assert len(prompts) > 700 and len({prompt.key for prompt in prompts}) == len(prompts)
    assert any(prompt.turns == ("What is AI?",) and prompt.category == "ai" for prompt in prompts)


def test_requests_for_docstrings_are_the_same_in_every_process(monkeypatch):
    here = docstring_prompts()
    bare = "from dvirl.data.domains import docstring_prompts; print(ascii(docstring_prompts()))"
    out = subprocess.run([sys.executable, "-c", bare], capture_output=True, text=True, check=True).stdout
    assert ast.literal_eval(out) == here
    monkeypatch.setattr(getpass, "getpass", lambda prompt="": "")  # as Jupyter does
    assert docstring_prompts() == here


def test_docstrings_are_a_source_of_one_domain():
    loaded = tiny_loaded()
    split = load_prompts(
        tiny_settings(prompts_source="docstrings", held_out=9, max_prompt_tokens=500), loaded
    )
    texts = [loaded.tokenizer.decode(ids) for ids in split.stream.prompts + split.held_out]
    assert len(split.held_out) == 9 and len(texts) > 300
    assert all("def " in text for text in texts)
    assert not {*map(tuple, split.held_out)} & {*map(tuple, split.stream.prompts)}


@given(count=st.integers(1, 7), seed=st.integers(0, 3), taken=st.integers(0, 20), more=st.integers(0, 9))
def test_a_stream_goes_on_from_a_saved_position(count, seed, taken, more):
    prompts = [[n] for n in range(count)]
    stream = PromptStream(prompts, seed)
    stream.take(taken)
    saved = stream.position
    peeked = stream.peek(more)
    expected = stream.take(more)
    again = PromptStream(prompts, seed)
    again.position = saved
    assert again.take(more) == expected == peeked


def test_a_stream_passes_over_all_before_it_repeats_any():
    stream = PromptStream([[n] for n in range(10)], 0)
    first, second = stream.take(10), stream.take(10)
    assert sorted(first) == sorted(second) == [[n] for n in range(10)] and first != second
    assert PromptStream([[n] for n in range(10)], 1).take(10) != first
    with pytest.raises(DvirlError, match="stream is empty"):
        PromptStream([], 0)


def test_held_out_prompts_never_come_up():
    loaded = tiny_loaded()
    split = load_prompts(tiny_settings(held_out=64), loaded)
    seen = split.stream.take(len(split.stream))
    assert len(split.held_out) == 64 and not {tuple(p) for p in seen} & {tuple(p) for p in split.held_out}
    with pytest.raises(DvirlError, match="leaves none for training"):
        load_prompts(tiny_settings(held_out=5000), loaded)
    with pytest.raises(DvirlError, match="needs prompts_path"):
        load_prompts(tiny_settings(prompts_source="jsonl"), loaded)


def test_long_prompts_are_left_out(tmp_path, capsys):
    path = tmp_path / "p.jsonl"
    path.write_text(
        "\n".join(json.dumps({"prompt": text}) for text in ("short one", "another", "long " * 500))
    )
    for most, limit in ((200, 200), (512, 256 - 16)):  # the tiny model's context holds prompt and response
        config = tiny_settings(
            prompts_source="jsonl", prompts_path=str(path), held_out=1, max_prompt_tokens=most
        )
        assert len(load_prompts(config, tiny_loaded()).stream) == 1
        assert f"left out 1 prompts over {limit} tokens" in capsys.readouterr().err
