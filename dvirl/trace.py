"""The logs of a run and of an evaluation: one JSON object a line, written at once, read as a table."""

import json
import os
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, get_args, get_origin

import numpy as np
import pandas as pd

from dvirl.errors import DvirlError

if TYPE_CHECKING:
    from kangaroo.earlyexit import Verification

ANSWER = ("method", "question_id", "category")
"""What a trace says of every answer, at least."""
EVENT = dict.fromkeys(("position", "at", "accepted", "confidence", "drafted", "verified", "token_class"), list[int])
EVENT |= dict[str, Any](confidence=list[float | None], token_class=list[str])
"""What it says of every scored draft, see `accept_events`, and the type of such a list."""
FACETS = {"position": "position in block", "token_class": "token class", "category": "category"}
"""By what accept events are counted."""


@dataclass(kw_only=True)
class Counters:
    """How far a run is, see `StepMetrics`; all of it is in every checkpoint."""

    step: int = 0
    prompts: int = 0
    tokens: int = 0
    skipped: int = 0
    drift_flag: bool = False
    rollout_s: float = 0.0
    fast_s: float = 0.0
    slow_s: float = 0.0
    wall_s: float = 0.0


@dataclass(kw_only=True)
class SlowResult:
    """What a slow update, or a measurement in its place, says of the verifier, see `StepMetrics`."""

    loss_slow: float | None = None
    drift_kl: float | None = None
    drift_tokens: float | None = None


@dataclass(kw_only=True)
class StepMetrics(Counters, SlowResult):
    """One fast step, and the slow update that followed it if one did. None where there is nothing to say.

    Attributes:
        step: fast updates so far.
        phase: objective in force: the schedule, or kl_to_rl's kl and ramp.
        loss: what the fast update minimised.
        loss_rl, loss_kl, loss_ce: REINFORCE, the KL by kl_kind and kl_top_k, and the cross-entropy on accepted tokens,
            measured whether or not they count.
        loss_slow: the slow update's loss.
        accept_rate, mat: of the served decoder (argmax drafts) on the responses of this step, before its update.
        reward: mean reward of the records learned from (sampled or argmax drafts).
        baseline: subtracted from the rewards in this step.
        ppl_sample: perplexity of the responses under the verifier that wrote them.
        drift_kl: KL of the verifier to the untouched model, nats a token, measured at slow updates. With target "base"
            on accepted tokens only, which are the easier ones, before the update; with "adapted" on all records.
        drift_tokens: share of its greedy tokens that differ from the untouched model's, measured likewise.
        drift_flag: from the first step on at which acceptance rose while the drift passed its bound.
        prompts: prompts seen so far.
        tokens: response tokens seen so far.
        tok_per_s: response tokens over wall seconds since the step before, generation and training together.
        grad_norm: before clipping.
        lr: of lora_S.
        buffer_size: records held.
        skipped: updates left out so far because a loss or gradient was not finite.
        rollout_s, fast_s, slow_s: seconds spent so far on generation, on drafting and fast updates, on slow updates.
        wall_s: seconds since the run began.
    """

    phase: str
    loss: float
    loss_rl: float
    loss_kl: float
    loss_ce: float
    accept_rate: float
    mat: float
    reward: float
    baseline: float
    ppl_sample: float
    tok_per_s: float
    grad_norm: float
    lr: float
    buffer_size: int


def plain(values: Any) -> Any:
    """The same for JSON: numbers that it cannot spell become None."""
    return json.loads(json.dumps(values), parse_constant=lambda _: None)


def write_text(path: str | Path, text: str) -> None:
    """Write a file, its folder too if there is none: whole or not at all, and on the disk when this returns.

    Raises:
        DvirlError: if it cannot be written.
    """
    path = Path(path)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with scratch.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise DvirlError(f"{path}: could not be written ({error.strerror})") from error


def write_json(path: str | Path, values: Any) -> None:
    """Write a JSON file as `write_text` does; what is not a number is null."""
    write_text(path, json.dumps(plain(values), indent=1) + "\n")


def log_line(path: Path, values: Mapping[str, Any]) -> None:
    """Append one line to a JSONL file, complete on disk at once; numbers that JSON cannot spell become null.

    Raises:
        DvirlError: if it cannot be written; no part of it is.
    """
    with path.open("ab", buffering=0) as file:
        line, before = json.dumps(plain(values)).encode() + b"\n", file.tell()
        try:
            while line:
                line = line[file.write(line) :]
        except OSError as error:
            file.truncate(before)
            raise DvirlError(f"{path}: could not be written ({error.strerror})") from error


def keep_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drop the lines of a log that are not to be kept, and a torn last one.

    Raises:
        DvirlError: for another line that is no JSON object.
    """
    if path.exists():
        lines = numbered(path, read_text(path).rpartition("\n")[0])
        try:
            write_text(path, "".join(f"{line}\n" for where, line in lines if keep(parse_line(where, line, dict))))
        except (KeyError, TypeError) as error:
            raise DvirlError(f"{path}: a line of another kind of log ({error!r})") from error


def cut_log(path: Path, step: int) -> None:
    """Drop lines of later steps and a torn last one, which a run that goes on from that checkpoint writes anew."""
    keep_lines(path, lambda line: line.get("step", 0) <= step)


def parse_line(where: str, text: str, kind: type = object) -> Any:
    """What a JSON text holds; `kind` is dict where it has to be an object.

    Raises:
        DvirlError: if it is none, or spells half a character; the message begins with `where`.
    """
    try:
        found = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(found, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise DvirlError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(found, kind):
        raise DvirlError(f"{where}: expected a JSON object")
    return found


def read_text(path: str | Path) -> str:
    """The text of a file.

    Raises:
        DvirlError: if there is none or it is not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DvirlError(f"{path}: {getattr(error, 'strerror', 0) or f'not readable as UTF-8 ({error})'}") from error


def numbered(path: str | Path, text: str) -> Iterator[tuple[str, str]]:
    """The lines of a JSONL file's text that are not blank, each with its place for messages.

    Only line feeds end lines: JSON strings may hold other separators, such as U+2028, as they are.
    """
    return ((f"{path}:{number}", line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a type, and its members of theirs; a whole number is a float too, a bool is no number."""
    if isinstance(kind, UnionType):
        return any(fits(value, one) for one in get_args(kind))
    if type(value) is get_origin(kind):  # list[inner] or dict[inner, last]
        (inner, *_, last), values = get_args(kind) * 2, value.values() if isinstance(value, dict) else ()
        return all(fits(one, inner) for one in value) and all(fits(one, last) for one in values)
    return kind in (Any, object) or type(value) in ((int, float) if kind is float else (kind,))


def read_metrics(path: str | Path) -> pd.DataFrame:
    """The table of a `metrics.jsonl`, one row a step.

    Raises:
        DvirlError: if there is no such file or a line is no JSON object.
    """
    rows = [parse_line(*line, dict) for line in numbered(path, read_text(path))]
    return pd.DataFrame(rows, columns=None if rows else [spec.name for spec in fields(StepMetrics)])


# Accept events


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
    return dict(plain({**about, **{name: [event[index] for event in events] for index, name in enumerate(EVENT)}}))


def read_trace(path: str | Path) -> pd.DataFrame:
    """The table of a trace, one row a scored draft, beside what its line says of the answer.

    Raises:
        DvirlError: if there is no such file or a line is no JSON object of `accept_events`.
    """
    rows: list[dict[str, Any]] = []
    kinds = {**dict.fromkeys(ANSWER, str | int), **EVENT}
    for where, line in numbered(path, read_text(path)):
        row = parse_line(where, line, dict)
        if not all(fits(row.get(name), kinds[name]) for name in kinds) or len({len(row[name]) for name in EVENT}) > 1:
            expected = f"{', '.join(ANSWER)} and, of one length, the lists {', '.join(EVENT)}"
            raise DvirlError(f"{where}: no accept events of an answer; expected {expected}")
        rows += [row] if row["at"] else []
    table = pd.DataFrame(rows, columns=None if rows else [*ANSWER, *EVENT])
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
