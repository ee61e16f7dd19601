"""Where drafts are rejected: accept events of answers, their trace files, and `dvirl trace FILE`."""

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode

from dvirl import plots
from dvirl.evaluation.report import write_out
from dvirl.metrics import FACETS, accept_rates
from dvirl.models.streaming import UNDECODED
from dvirl.rollout import Rollout, draft_rollout, score_drafts
from dvirl.runs.errors import DvirlError
from dvirl.runs.log import numbered, parse_line, read_text, to_plain
from dvirl.runs.settings import Settings, command_line, has_type, positional, several
from kangaroo.decoding.blocks import DecodeConfig, Verification
from kangaroo.decoding.sampling import choose_tokens
from kangaroo.kangaroo_model import KangarooModel

BYTES = {letter: byte for byte, letter in bytes_to_unicode().items()}
"""The byte of each letter in byte-level vocabularies."""
ANSWER = ("method", "question_id", "category")
"""What a trace notes of every answer, at least."""
EVENT: dict[str, Any] = {
    "position": list[int],
    "at": list[int],
    "accepted": list[int],
    "confidence": list[float | None],
    "drafted": list[int],
    "verified": list[int],
    "token_class": list[str],
}
"""What it notes of every scored draft, see `accept_events`, and the type of each list."""


def token_texts(tokenizer: Any, spell_bytes: bool = False) -> Callable[[int], str]:
    """What each token of a Hugging Face tokenizer adds to a text, "" for control tokens.

    In SentencePiece vocabularies (Llama, Vicuna) a token that is decoded alone loses its leading space, so each is
    decoded after a full stop.

    Args:
        tokenizer: the tokenizer.
        spell_bytes: show a piece of a character by its bytes, such as <0xF0><0x9F>, rather than as U+FFFD.
    """
    stop = tokenizer.encode(".", add_special_tokens=False)
    decode = partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    prefix = len(decode(stop))

    def text_of(token: int) -> str:
        text = str(decode([*stop, token]))[prefix:]
        if not spell_bytes or UNDECODED not in text:
            return text
        piece = tokenizer.convert_ids_to_tokens(token)
        # SentencePiece names a byte <0xF0>; byte-level BPE has a letter for each.
        if piece.startswith("<0x") or UNDECODED in piece:
            return str(piece)
        spelled = bytes(BYTES[letter] for letter in piece).decode(errors="surrogateescape")
        return re.sub("[\udc80-\udcff]", lambda found: f"<0x{ord(found[0]) - 0xDC00:02X}>", spelled)

    return text_of


def token_class(text: str, before: str = "") -> str:
    r"""The class of a token.

    Args:
        text: what it adds to the response, its space included; "" for a control token (`token_texts`).
        before: what the token before it added; "" at the start of a response.

    Returns:
        "control": no text at all, as an end-of-sequence token.
        "space": white space and line breaks only.
        "word": letters that begin a word, after a space, a line break, punctuation or nothing (" cat", "The", "(x").
        "word part": letters that join a letter or digit before them ("ing", "th" of "4th", "'s"); in scripts that put
            no spaces that is all but the first of a run.
        "number": digits and no letter, whatever stands beside them (" 12", "3", "1.5", "%2").
        "punctuation": marks, brackets, currency and operators (".", " (", "),\n", "$", "+=").
        "other": the rest, such as emoji and the pieces of a character that several tokens spell.
    """
    if not text.strip():
        return "space" if text else "control"
    if any(map(str.isalpha, text)):
        first = text.lstrip("'\u2019")[:1]
        joins = before[-1:].isalnum() and first.isalnum()
        return "word part" if joins else "word"
    if any(map(str.isnumeric, text)):
        return "number"
    categories = map(unicodedata.category, "".join(text.split()))
    symbols = ("P", "Sc", "Sk", "Sm")  # punctuation, currency, modifiers, mathematics
    return "punctuation" if all(category.startswith(symbols) for category in categories) else "other"


def accept_events(
    blocks: Sequence[Verification],
    words: Callable[[int], str],
    **about: Any,
) -> dict[str, Any]:
    """The scored drafts of one answer, as a line for `log_line`.

    Args:
        blocks: the answer's verifications, the prefill's first.
        words: the text that a token id adds (`token_texts`).
        about: what to note of the answer: method, question_id, category, and more such as turn and repeat.

    Returns:
        `about`, and these lists, with one entry for each scored draft (up to and including the first reject of each
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
    texts = list(map(words, response))
    rows = []
    for block in blocks:
        tokens = block.draft.tokens.tolist()
        confidence = block.draft.confidence.tolist()
        for position in range(block.num_drafted):
            index = block.start - blocks[0].start + position
            row = (
                position,
                index,
                int(position < block.num_accepted),
                round(confidence[position], 4),
                tokens[position],
                response[index],
                token_class(texts[index], texts[index - 1]),
            )
            rows.append(row)
    events = pd.DataFrame(rows, columns=[*EVENT]).to_dict("list")
    return dict(to_plain({**about, **events}))


def read_trace(path: str | Path) -> pd.DataFrame:
    """The table of a trace: one row for each scored draft, with what its line notes of the answer.

    Raises:
        DvirlError: if there is no such file, or a line is not a JSON object of `accept_events`.
    """
    answers: list[dict[str, Any]] = []
    kinds = {**dict.fromkeys(ANSWER, str | int), **EVENT}
    for where, line in numbered(path, read_text(path)):
        answer = parse_line(where, line, dict)
        typed = all(has_type(answer.get(name), kind) for name, kind in kinds.items())
        if not typed or len({len(answer[name]) for name in EVENT}) > 1:
            expected = f"{', '.join(ANSWER)} and, of one length, the lists {', '.join(EVENT)}"
            raise DvirlError(f"{where}: no accept events of an answer; expected {expected}")
        answers.append(answer)
    return events_table(answers)


def events_table(answers: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row for each scored draft of the lines of `accept_events`; answers without drafts have none."""
    drafted = [answer for answer in answers if answer["at"]]
    if not drafted:
        return pd.DataFrame(columns=[*ANSWER, *EVENT]).astype({"confidence": float})
    table = pd.DataFrame(drafted).explode([*EVENT], ignore_index=True)
    return table.infer_objects().astype({"confidence": float})


def judged_events(
    model: KangarooModel,
    rollout: Rollout,
    how: DecodeConfig,
    words: Callable[[int], str],
    about: Sequence[Mapping[str, Any]],
) -> pd.DataFrame:
    """The accept events of decoding step by step, computed by one pass of the draft over greedy answers.

    Args:
        model: drafts.
        rollout: the verifier's greedy answers.
        how: draft_len and threshold.
        words: as in `accept_events`.
        about: what to note of each answer.
    """
    drafts = draft_rollout(model, rollout, how.draft_len)
    records = score_drafts(model, rollout, drafts, how).records
    row = records.row
    # Records have no confidence of the draft: each row's are found after those of the rows before it.
    confidence = torch.stack([choose_tokens(logits)[1] for logits in drafts.logits])  # [depths, N]
    depths = records.depth.clamp(max=len(confidence) - 1)
    counts = (rollout.response_lens - 1).clamp(min=0)
    index = (counts.cumsum(0) - counts)[row] + records.position - 1
    before = rollout.tokens[row, rollout.prompt_lens[row] + records.position - 1]
    verified = records.verifier_token.tolist()
    classes = map(token_class, map(words, verified), map(words, before.tolist()))
    answers = pd.DataFrame(about).iloc[row.tolist()].reset_index(drop=True)
    return answers.assign(
        position=records.depth.tolist(),
        at=records.position.tolist(),
        accepted=records.reward.long().tolist(),
        confidence=confidence[depths, index].double().round(decimals=4).tolist(),
        drafted=records.token.tolist(),
        verified=verified,
        token_class=list(classes),
    )


@dataclass(frozen=True)
class TraceConfig(Settings):
    """Settings of `dvirl trace`."""

    trace: str = positional()
    """JSONL file of accept events, an answer a line."""
    method: list[str] = several()
    """Only these methods; all by default."""
    figure: str = ""
    """Also draw the rates into this file (PNG or SVG)."""
    out: str = ""
    """Also write the rates to this JSON file."""


parse_args = command_line(TraceConfig, "dvirl trace", "Count where drafts are rejected.")
"""Settings from flags; see `settings.parse_args`."""


def main(config: TraceConfig) -> dict[str, dict[str, Any]]:
    """Print where each method's drafts are rejected, by position in the block, token class and category.

    Intervals are of 95 %, by bootstrap over questions; `rejects` is the fraction of all rejects.

    Raises:
        DvirlError: for bad input.
    """
    events = read_trace(config.trace)
    known = list(events.method.unique())
    if not known or not set(config.method) <= set(known):
        expected = config.method or "a method"
        raise DvirlError(f"{config.trace}: expected drafts of {expected}; it has {known or 'none'}")
    events = events[events.method.isin(config.method or known)]
    figures: dict[str, dict[str, Any]] = {}
    for name, drafts in events.groupby("method", sort=False):
        print(f"{name}: {drafts.accepted.mean():.3f} of {len(drafts)} scored drafts accepted")
        tables = figures[str(name)] = {}
        for facet in FACETS:
            rates = accept_rates(drafts, facet)
            print(rates.to_string(float_format="{:.3f}".format))
            tables[facet] = rates.reset_index().to_dict("records")
    write_out(config, figures=figures)
    if config.figure:
        plots.rejections(events, config.figure)
    return figures
