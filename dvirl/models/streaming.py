"""The text of an answer while it comes."""

from collections.abc import Iterable, Iterator
from typing import Any

from kangaroo.decoding.blocks import Verification

UNDECODED = "\ufffd"
"""What a tokenizer gives for bytes that are no whole character."""


def stream_text(tokenizer: Any, blocks: Iterable[Verification]) -> Iterator[str]:
    """What each block adds to an answer's text.

    Several tokens may spell one character, such as an emoji. Its bytes are held back until the last one is there, or
    until the answer ends without it.

    Args:
        tokenizer: Hugging Face's.
        blocks: those of the answer as they come, as `KangarooModel.decode_blocks` yields them.

    Yields:
        The new text after each block, and what is left at the end; together the text of all tokens.
    """
    tokens: list[int] = []
    text = ""
    shown = 0
    for block in blocks:
        tokens += block.committed
        text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        whole = len(text.rstrip(UNDECODED))
        yield text[shown:whole]
        shown = max(shown, whole)
    yield text[shown:]
