"""The logs of a run and of an evaluation: one JSON object a line, written at once, read as a table."""

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from dvirl.runs.errors import DvirlError
from dvirl.runs.log import numbered, parse_line, read_text, to_plain
from dvirl.runs.settings import has_type

if TYPE_CHECKING:
    from kangaroo.decoding.blocks import Verification

ANSWER = ("method", "question_id", "category")
"""What a trace says of every answer, at least."""


EVENT = dict.fromkeys(("position", "at", "accepted", "confidence", "drafted", "verified", "token_class"), list[int])
EVENT |= dict[str, Any](confidence=list[float | None], token_class=list[str])
"""What it says of every scored draft, see `accept_events`, and the type of such a list."""


FACETS = {"position": "position in block", "token_class": "token class", "category": "category"}
"""By what accept events are counted."""


def token_texts(tokenizer: Any) -> Callable[[int], str]:
    """What each token of a Hugging Face tokenizer adds to a text, "" for control tokens.

    A token decoded alone loses its leading space in SentencePiece vocabularies (Llama, Vicuna), so each is decoded
    behind a full stop.
    """
    stop = tokenizer.encode(".", add_special_tokens=False)
    how = dict(skip_special_tokens=True, clean_up_tokenization_spaces=False)
    before = len(tokenizer.decode(stop, **how))
    return lambda token: str(tokenizer.decode([*stop, token], **how))[before:]


def token_class(text: str, before: str = "") -> str:
    r"""The class of a token.

    Args:
        text: what it adds to the response, its space included; "" for a control token (`token_texts`).
        before: what the token before it added; "" at the start of a response.

    Returns:
        "control": no text at all, as an end-of-sequence token.
        "space": white space and line breaks only.
        "word": letters that begin a word, behind a space, a line break, punctuation or nothing (" cat", "The", "(x").
        "word part": letters that join a letter or digit before them ("ing", "th" of "4th", "'s"); in scripts that put
            no spaces that is all but the first of a run.
        "number": digits and no letter, whatever stands beside them (" 12", "3", "1.5", "%2").
        "punctuation": marks, brackets, currency and operators (".", " (", "),\n", "$", "+=").
        "other": the rest, such as emoji and the pieces of a character that several tokens spell.
    """
    if not text.strip():
        return "space" if text else "control"
    if any(map(str.isalpha, text)):
        joins = before[-1:].isalnum() and text.lstrip("'\u2019")[:1].isalnum()
        return "word part" if joins else "word"
    if any(map(str.isnumeric, text)):
        return "number"
    kinds = {unicodedata.category(letter) for letter in "".join(text.split())}
    return "punctuation" if all(kind[0] == "P" or kind in ("Sc", "Sk", "Sm") for kind in kinds) else "other"


def accept_events(blocks: Sequence["Verification"], words: Callable[[int], str], **about: Any) -> dict[str, Any]:
    """One answer's scored drafts, as a line for `log_line`.

    Args:
        blocks: the answer's, the prefill's first.
        words: what a token id adds to a text (`token_texts`).
        about: what to note of the answer: method, question_id and category, and more such as turn and repeat.

    Returns:
        What is to be noted, and a list each, one entry a scored draft (up to and including the first reject of each
        block):
        position: its place in the block, from 0.
        at: its place in the response, from 0, which is the prefill's token.
        accepted: 1 or 0.
        confidence: the draft's, to four digits; None where it was looked up.
        drafted: its token id.
        verified: the id of the token that the verifier put there.
        token_class: `token_class` of the verifier's token.
    """
    response = [token for block in blocks for token in block.committed]
    texts, events = ["", *map(words, response)], []
    for block in blocks:
        drafts, sure = block.draft.tokens.tolist(), block.draft.confidence.tolist()
        for place in range(block.num_drafted):
            at, accepted = block.start - blocks[0].start + place, int(place < block.num_accepted)
            kind = token_class(texts[at + 1], texts[at])
            events.append((place, at, accepted, round(sure[place], 4), drafts[place], response[at], kind))
    return dict(to_plain({**about, **{name: [event[index] for event in events] for index, name in enumerate(EVENT)}}))


def read_trace(path: str | Path) -> pd.DataFrame:
    """The table of a trace, one row a scored draft, beside what its line says of the answer.

    Raises:
        DvirlError: if there is no such file or a line is no JSON object of `accept_events`.
    """
    rows: list[dict[str, Any]] = []
    kinds = {**dict.fromkeys(ANSWER, str | int), **EVENT}
    for where, line in numbered(path, read_text(path)):
        row = parse_line(where, line, dict)
        if (
            not all(has_type(row.get(name), kinds[name]) for name in kinds)
            or len({len(row[name]) for name in EVENT}) > 1
        ):
            expected = f"{', '.join(ANSWER)} and, of one length, the lists {', '.join(EVENT)}"
            raise DvirlError(f"{where}: no accept events of an answer; expected {expected}")
        rows += [row] if row["at"] else []
    return events_table(rows)


def events_table(answers: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row a scored draft of what `accept_events` says of answers that have some."""
    table = pd.DataFrame(answers, columns=None if answers else [*ANSWER, *EVENT])
    return table.explode([*EVENT], ignore_index=True).infer_objects().astype({"confidence": float})


def accept_rates(events: pd.DataFrame, by: str) -> pd.DataFrame:
    """Where the drafts of one method are rejected.

    Args:
        events: of `read_trace`.
        by: the column to group by.

    Returns:
        A row a group: `questions`, `drafted` (scored) and `accepted` drafts, `accept_rate`, `low` and `high`, its 95 %
        interval by 1000 bootstrap samples of questions (drafts of one answer resemble each other, and its repeats are
        the same), and `rejects`, the share of all rejects that falls there, NaN if there are none.
    """
    counts = events.groupby([by, "question_id"]).accepted.agg(["size", "sum"]).unstack(fill_value=0)
    drafted, accepted = counts["size"].to_numpy(), counts["sum"].to_numpy()  # [groups, questions]
    count = events.question_id.nunique()
    draws = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=1000).T
    low, high = pd.DataFrame(accepted @ draws).div(drafted @ draws).quantile([0.025, 0.975], axis=1).to_numpy()
    sums = dict(questions=(drafted > 0).sum(1), drafted=drafted.sum(1), accepted=accepted.sum(1))
    table = pd.DataFrame(sums, counts.index)
    rejects = table.drafted - table.accepted
    return table.assign(accept_rate=table.accepted / table.drafted, low=low, high=high, rejects=rejects / rejects.sum())
