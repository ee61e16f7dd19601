"""Text that is shown while it comes: whole characters only, and all of it in the end."""

from __future__ import annotations

import pytest
from conftest import tiny_kangaroo, tiny_tokenizer
from published import write_model

from dvirl.models.streaming import stream_text
from dvirl.models.tokenizers import load_tokenizer
from kangaroo.decoding.blocks import DecodeConfig, Verification

TEXT = "é\U0001f600\u6f22\u5b57 a\u200d\U0001f468\u200d\U0001f469 end"


def blocks_of(tokens, size):
    return [
        Verification(start, tuple(tokens[start : start + size]), 0, 0)
        for start in range(0, len(tokens), size)
    ]


@pytest.fixture(scope="module", params=["bytes", "byte fallback"])
def tokenizer(request, tmp_path_factory):
    if request.param == "bytes":
        return tiny_tokenizer()
    folder = write_model(tmp_path_factory.mktemp("model") / "m")
    return load_tokenizer(lambda name: str(folder / name) if (folder / name).exists() else None)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_half_a_character_is_held_back_until_it_is_whole(tokenizer, size):
    tokens = tokenizer.encode(TEXT, add_special_tokens=False)
    assert len(tokens) > len(TEXT)
    pieces = list(stream_text(tokenizer, blocks_of(tokens, size)))
    assert "".join(pieces) == tokenizer.decode(tokens, skip_special_tokens=True) == TEXT
    assert "\ufffd" not in "".join(pieces) and len([piece for piece in pieces if piece]) > 3


def test_what_never_becomes_a_character_comes_in_the_end(tokenizer):
    tokens = tokenizer.encode("ok \U0001f600", add_special_tokens=False)[:-1]
    *pieces, last = stream_text(tokenizer, blocks_of(tokens, 1))
    assert "".join(pieces) == "ok " and set(last) == {"\ufffd"}
    assert "".join(pieces) + last == tokenizer.decode(tokens, skip_special_tokens=True)


def test_bytes_that_are_no_character_are_shown_once_it_is_clear(tokenizer):
    first = tokenizer.encode("\U0001f600", add_special_tokens=False)[-3:-1]
    tokens = [*first, *tokenizer.encode("xy", add_special_tokens=False)[-2:]]
    assert "".join(stream_text(tokenizer, blocks_of(tokens, 1))) == tokenizer.decode(tokens)


def test_an_answer_is_streamed_as_it_is_decoded():
    model, tokenizer = tiny_kangaroo(0, deep_scale=0.2), tiny_tokenizer()
    how = DecodeConfig(3)
    pieces = stream_text(tokenizer, model.decode_blocks([5, 9, 100], 30, how))
    whole = tokenizer.decode(model.generate([5, 9, 100], 30, how).tokens, skip_special_tokens=True)
    assert "".join(pieces) == whole
