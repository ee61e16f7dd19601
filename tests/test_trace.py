"""Accept events: made of blocks, written, read back, counted by hand and drawn."""

from __future__ import annotations

import json

import matplotlib as mpl
import pandas as pd
import pytest
import torch
from conftest import EOS, random_prompts, tiny_kangaroo, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dvirl import cli, plots
from dvirl.evaluation.rejections import (
    EVENT,
    FACETS,
    accept_events,
    accept_rates,
    read_trace,
    token_class,
    token_texts,
)
from dvirl.experiments.notebook import show_blocks
from dvirl.runs.errors import DvirlError
from dvirl.runs.log import cut_log, log_line, read_metrics
from kangaroo.decoding.blocks import DecodeConfig, DraftBlock, Verification

mpl.use("Agg")

NAN = float("nan")
ABOUT = dict(method="learned", question_id=81, category="writing")
WORDS = {1: "The", 2: " cat", 3: "s", 4: " 12", 5: ".", 6: "\n", 7: "", 8: "'s"}


def block(start, committed, drafted=(), confidence=(), accepted=0):
    """A verification of these drafts, with what it commits."""
    draft = DraftBlock(torch.tensor(drafted, dtype=torch.long), torch.tensor(confidence), torch.empty(0, 4))
    return Verification(
        start, committed, min(len(drafted), accepted + 1), accepted, draft, torch.ones(len(drafted) + 1)
    )


@pytest.mark.parametrize(
    ("text", "before", "expected"),
    [
        (" cat", "The", "word"),
        ("The", "", "word"),
        ("The", "\n", "word"),
        ("is", ".", "word"),
        ("(x", " f", "word"),
        (" d'être", " raison", "word"),
        ("'", " the", "punctuation"),
        ("ing", " read", "word part"),
        ("th", "4", "word part"),
        ("'s", " cat", "word part"),
        ("\u2019t", " don", "word part"),
        ("ß", " Stra", "word part"),
        (" 12", " is", "number"),
        ("3", " v", "number"),
        ("1.5", "", "number"),
        (".", " end", "punctuation"),
        ("),\n", " x", "punctuation"),
        (" +=", " x", "punctuation"),
        ("€", " 12", "punctuation"),
        ("\n\n", ".", "space"),
        ("  ", "", "space"),
        ("", ".", "control"),
        ("\ufffd", " ", "other"),
        (" 🙂", "!", "other"),
    ],
)
def test_classes_of_tokens(text, before, expected):
    assert token_class(text, before) == expected


def test_events_by_hand(tmp_path):
    blocks = [
        block(10, (1,)),
        block(11, (2, 3, 4), [2, 3, 5, 6], [0.91239, 0.5, NAN, NAN], 2),  # the fourth draft is not scored
        block(14, (5,)),
        block(15, (6, 7, 4), [6, 7], [0.25, 1.0], 2).cut_at_end((7,)),
        block(17, (8,), [3], [0.125], 0),
    ]
    line = accept_events(blocks, WORDS.__getitem__, **ABOUT, turn=1)
    assert line == {
        **ABOUT,
        "turn": 1,
        "position": [0, 1, 2, 0, 1, 0],
        "at": [1, 2, 3, 5, 6, 7],
        "accepted": [1, 1, 0, 1, 1, 0],
        "confidence": [0.9124, 0.5, None, 0.25, 1.0, 0.125],
        "drafted": [2, 3, 5, 6, 7, 3],
        "verified": [2, 3, 4, 6, 7, 8],
        "token_class": ["word", "word part", "number", "space", "control", "word"],
    }
    undrafted = accept_events(blocks[:1], WORDS.__getitem__, **ABOUT, turn=2)
    assert undrafted == {**ABOUT, "turn": 2, **{name: [] for name in EVENT}}
    assert accept_events([], WORDS.__getitem__, **ABOUT) == {**ABOUT, **{name: [] for name in EVENT}}
    for one in (undrafted, line, {**line, "turn": 3}):
        log_line(tmp_path / "t.jsonl", one)
    table = read_trace(tmp_path / "t.jsonl")
    assert list(table.columns) == list(line) and list(table.turn) == [1] * 6 + [3] * 6
    assert (table.method == "learned").all() and (table.question_id == 81).all()
    for name in set(EVENT) - {"confidence"}:
        assert list(table[name]) == 2 * line[name]
    assert table.confidence.isna().sum() == 2 and table.confidence.sum() == pytest.approx(2 * 2.7874)


def test_a_decoders_events_are_its_counts(tmp_path):
    model, words = tiny_kangaroo(lora=False, deep_scale=0.2), token_texts(tiny_tokenizer())
    path, drafted, accepted = tmp_path / "t.jsonl", 0, 0
    for index, prompt in enumerate(random_prompts(4)):
        for way in (DecodeConfig(3), DecodeConfig(4, source="lookup"), DecodeConfig(0)):
            decoded = model.generate(prompt, 24, way, (EOS,))
            line = accept_events(decoded.blocks, words, method=way.source, question_id=index, category="")
            log_line(path, line)
            assert line["verified"] == [decoded.tokens[at] for at in line["at"]]
            hits = [int(a == b) for a, b in zip(line["drafted"], line["verified"], strict=True)]
            assert line["accepted"] == hits and line["at"] == sorted(set(line["at"]))
            assert way.source == "learned" or not any(line["confidence"])
            drafted += sum(one.num_drafted for one in decoded.blocks)
            accepted += sum(one.num_accepted for one in decoded.blocks)
    table = read_trace(path)
    assert len(table) == drafted > 40 and table.accepted.sum() == accepted > 10
    assert set(table.method) == {"learned", "lookup"}
    assert list(table.dtypes[["position", "at", "accepted", "drafted", "verified"]]) == ["int64"] * 5


def test_a_token_keeps_its_space_and_control_tokens_say_nothing():
    entries = ["</s>", ".", "\u2581cat", "cat", "\u2581", "<0x0A>"]
    tokenizer = Tokenizer(
        models.BPE({entry: index for index, entry in enumerate(entries)}, [], byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(add_prefix_space=False)
    steps = [
        decoders.Replace("\u2581", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    tokenizer.decoder = decoders.Sequence(steps)  # as Llama's, which strips the first space of a text
    tokenizer.add_special_tokens(["</s>"])
    llama = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    assert llama.decode([2]) == "cat"
    assert [token_texts(llama)(token) for token in range(6)] == ["", ".", " cat", "cat", " ", "\n"]
    tiny = tiny_tokenizer()
    assert [token_texts(tiny)(token) for token in (EOS, *tiny.encode(" é"))] == ["", " ", "\ufffd", "\ufffd"]


def test_tables_show_a_piece_of_a_character_by_its_bytes():
    pieces = tiny_tokenizer().encode("é")
    assert [token_class(token_texts(tiny_tokenizer())(token)) for token in pieces] == ["other"] * 2
    spelled = token_texts(tiny_tokenizer(), spell_bytes=True)
    assert [spelled(token) for token in (EOS, *pieces)] == ["", "<0xC3>", "<0xA9>"]
    assert "&lt;0xC3&gt;" in show_blocks([block(0, (pieces[0],))], spelled).data

    # Whole characters beside a piece of one stay, and a text's own replacement character is one.
    # By byte-level letters, the bytes of " ", f0, 9f and of U+FFFD itself.
    vocabulary = {"\u0120\u00f0\u0141": 0, ".": 1, "\u00ef\u00bf\u00bd": 2}
    byte_level = Tokenizer(models.BPE(vocabulary, []))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    words = token_texts(PreTrainedTokenizerFast(tokenizer_object=byte_level), spell_bytes=True)
    assert [words(token) for token in (0, 2)] == [" <0xF0><0x9F>", "\ufffd"]

    entries = {".": 0, "<0xE6>": 1, "<0x0A>": 2, "\ufffd": 3}
    fallback = Tokenizer(models.BPE(entries, [], byte_fallback=True))
    fallback.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    words = token_texts(PreTrainedTokenizerFast(tokenizer_object=fallback), spell_bytes=True)
    assert [words(token) for token in (1, 2, 3)] == ["<0xE6>", "\n", "\ufffd"]


GOOD = {**ABOUT, **{name: [] for name in EVENT}}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", "expected a JSON object"),
        ('{"method": "a"', "not valid JSON"),
        (json.dumps({**GOOD, "at": [1]}), "of one length, the lists position, at,"),
        (json.dumps({**GOOD, "at": 3}), "no accept events"),
        (json.dumps({**GOOD, "token_class": None}), "expected method, question_id, category and"),
        (
            json.dumps({name: value for name, value in GOOD.items() if name != "question_id"}),
            "no accept events",
        ),
        (json.dumps({**GOOD, **{name: ["x"] for name in EVENT}}), "no accept events"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n")
    with pytest.raises(DvirlError, match="t.jsonl:2: ") as caught:
        read_trace(path)
    assert message in str(caught.value)


def test_metrics_name_their_bad_line_too(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"step": 1}\n{\n')
    with pytest.raises(DvirlError, match=r"m.jsonl:2: not valid JSON"):
        read_metrics(tmp_path / "m.jsonl")


def write_line(path, method, question, category, positions, accepted, kinds, **about):
    count = len(positions)
    lists = [positions, list(range(1, count + 1)), accepted, [0.5] * count, [1] * count, [1] * count, kinds]
    answer = dict(method=method, question_id=question, category=category, **about)
    log_line(path, {**answer, **dict(zip(EVENT, lists, strict=True))})


@pytest.fixture
def trace(tmp_path):
    """Two methods; the first has two questions, drafts 4 and is right twice, all of it noted twice."""
    path = tmp_path / "trace.jsonl"
    for repeat in range(2):
        write_line(path, "a", 1, "maths", [0, 1, 0], [1, 0, 1], ["word", "number", "word"], repeat=repeat)
        write_line(path, "a", 2, "code", [0], [0], ["number"], repeat=repeat)
    write_line(path, "b", 1, "maths", [0, 1], [1, 1], ["word", "word"])
    write_line(path, "plain", 1, "maths", [], [], [])
    return path


def test_the_command_counts_by_hand(trace, tmp_path, capsys):
    files = ["--out", str(tmp_path / "new/o.json"), "--figure", str(tmp_path / "f.png")]
    assert cli.main(["trace", str(trace), *files]) == 0
    printed = capsys.readouterr().out
    assert "a: 0.500 of 8 scored drafts accepted\n" in printed
    assert "b: 1.000 of 2 scored drafts accepted\n" in printed and "plain" not in printed
    assert (tmp_path / "f.png").stat().st_size > 5000
    figures = json.loads((tmp_path / "new/o.json").read_text())["figures"]
    assert list(figures) == ["a", "b"] and all(list(one) == list(FACETS) for one in figures.values())

    def row(questions, drafted, accepted, low, high, rejects, **group):
        counts = {
            "questions": questions,
            "drafted": drafted,
            "accepted": accepted,
            "accept_rate": pytest.approx(accepted / drafted),
        }
        return {**group, **counts, "low": pytest.approx(low), "high": pytest.approx(high), "rejects": rejects}

    # Of the two questions each is drawn twice in a quarter of all samples, so an interval spans both their rates.
    assert figures["a"] == {
        "position": [row(2, 6, 4, 0, 1, 0.5, position=0), row(1, 2, 0, 0, 0, 0.5, position=1)],
        "token_class": [
            row(2, 4, 0, 0, 0, 1.0, token_class="number"),
            row(1, 4, 4, 1, 1, 0.0, token_class="word"),
        ],
        "category": [
            row(1, 2, 0, 0, 0, 0.5, category="code"),
            row(1, 6, 4, 2 / 3, 2 / 3, 0.5, category="maths"),
        ],
    }
    assert figures["b"]["category"] == [row(1, 2, 2, 1, 1, None, category="maths")]
    assert cli.main(["trace", str(trace), "--method", "b"]) == 0
    assert "0.500 of 8" not in capsys.readouterr().out


def test_repeats_of_an_answer_make_no_interval_narrower():
    generator = torch.Generator().manual_seed(0)
    rows = [
        dict(question_id=question, position=position, accepted=int(torch.rand(1, generator=generator) < 0.8 - 0.1 * position))
        for question in range(40)
        for position in (0, 1, 2, 0, 1)
    ]  # fmt: skip
    once = accept_rates(pd.DataFrame(rows), "position")
    thrice = accept_rates(pd.DataFrame(rows * 3), "position")
    pd.testing.assert_frame_equal(once[["low", "high", "rejects"]], thrice[["low", "high", "rejects"]])
    assert (once.low < once.accept_rate).all() and (once.accept_rate < once.high).all()
    # Near the normal interval: 1.96 standard errors of 80 drafts.
    rate = once.accept_rate[0]
    assert once.high[0] - once.low[0] == pytest.approx(2 * 1.96 * (rate * (1 - rate) / 80) ** 0.5, rel=0.25)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["TRACE", "--method", "c"], "expected drafts of ['c']; it has ['a', 'b']"),
        (["nowhere.jsonl"], "nowhere.jsonl: No such file"),
        (["EMPTY"], "expected drafts of a method; it has none"),
    ],
)
def test_bad_input_is_one_sentence(trace, tmp_path, argv, message, capsys):
    (tmp_path / "empty.jsonl").write_text("")
    named = {"TRACE": str(trace), "EMPTY": str(tmp_path / "empty.jsonl")}
    assert cli.main(["trace", *(named.get(word, word) for word in argv)]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1


def test_more_methods_than_colours_are_refused(tmp_path):
    for name in "abcdefg":
        write_line(tmp_path / "t.jsonl", name, 1, "maths", [0], [1], ["word"])
    with pytest.raises(DvirlError, match="7 methods; a figure shows 1 to 6"):
        plots.rejections(read_trace(tmp_path / "t.jsonl"))


def test_a_broken_line_of_a_log_that_is_cut_is_named(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"step": 1}\nno json\n{"step": 2}\n')
    with pytest.raises(DvirlError, match=r"t.jsonl:2: not valid JSON"):
        cut_log(path, 1)
    assert path.read_text().startswith('{"step": 1}\nno json')  # as it was
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    cut_log(path, 1)
    assert path.read_text() == '{"step": 1}\n'
