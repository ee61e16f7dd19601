"""Where prompts come from: readers of files, of hub data sets and of the packaged conversations."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar
from unicodedata import category

import yaml
from tqdm import tqdm

from dvirl.runs.errors import DvirlError
from dvirl.runs.log import numbered, parse_line, read_text
from dvirl.runs.settings import has_type

Parsed = TypeVar("Parsed")
CONVERSATIONS = ("messages", "conversations", "conversation", "items")
"""Where a row holds a conversation: OpenAI's name, ShareGPT's, that of LMSYS-Chat-1M and WildChat, old ShareGPT's."""
ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
}
ROLES |= {"bing": "assistant", "bard": "assistant", "model": "assistant", "system": "system"}
"""Who speaks, by the names in use."""
ROW_FIELDS = {*CONVERSATIONS, "prompt", "turns", "instruction", "question_id"}
"""One of these a row has; an object without them stands around the rows."""
HUB_ROWS = 10_000
"""Rows streamed from a hub data set at most."""


@dataclass(frozen=True)
class Prompt:
    """A conversation that ends with the user's turn.

    Attributes:
        turns: user, assistant, user, …; an odd number.
        category: what kind of prompt, if the source says.
        response: what to learn to answer, of supervised sources.
        system: a system text before the first turn, if the source has one.
    """

    turns: tuple[str, ...]
    category: str = ""
    response: str = ""
    system: str = ""

    @property
    def key(self) -> str:
        """Equal for prompts that differ only in case, punctuation and white space."""
        text = " ".join([self.system, *self.turns])
        letters = [
            letter if letter.isalnum() or category(letter)[0] == "M" else " " for letter in text.lower()
        ]
        return " ".join("".join(letters).split()) or text  # a text of punctuation alone is its own key


def read_rows(source: str) -> Iterator[tuple[str, Any]]:
    """Rows of a file or hub data set, each after its place, which messages name.

    A file is JSONL, JSON (an array, one row, or an object around the rows), either with `.gz` behind its name, or
    parquet. For a line that is not JSON, the row is the error.

    Raises:
        DvirlError: if there is no such file or data set, or it cannot be read.
    """
    if not os.path.exists(source):  # of a name that is too long it says no, where Path.exists raises
        yield from _read_hub(source)
        return
    rows = _parquet_rows(source) if source.endswith(".parquet") else _json_rows(source)
    if rows is not None:
        for number, row in enumerate(rows, start=1):
            yield f"{source}: row {number}", row
        return
    for where, line in numbered(source, read_text(source)):
        try:
            yield where, parse_line(where, line)
        except DvirlError as error:
            yield where, error


def _parquet_rows(source: str) -> list[Any]:
    from pyarrow import parquet

    try:
        rows: list[Any] = parquet.read_table(source).to_pylist()
    except Exception as error:  # the library raises many kinds of error that mean the same to the user
        raise DvirlError(f"{source}: not a readable parquet file ({error!s:.200})") from error
    return rows


def _json_rows(source: str) -> list[Any] | None:
    """The rows of a file that is one JSON value; None if it is JSONL."""
    text = read_text(source)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        if text.lstrip().startswith("["):
            parse_line(source, text)  # says what is wrong
        return None
    if isinstance(value, dict) and ROW_FIELDS.isdisjoint(value):
        # An object around the rows, such as {"data": [...]}; the hub's viewer puts each into another object.
        lists = [member for member in value.values() if has_type(member, list[dict[str, Any]])]
        if len(lists) == 1:
            return [row.get("row", row) for row in lists[0]]
    if "\n" not in text.strip() and not isinstance(value, list):
        return None  # a JSONL file of one line
    parse_line(source, text)  # half characters are refused
    return value if isinstance(value, list) else [value]


def _read_hub(name: str) -> Iterator[tuple[str, Any]]:
    """Rows of a data set on the hub, `NAME`, `NAME:CONFIG` or `NAME:CONFIG:SPLIT`; the split is train if not given."""
    hub_id, _, rest = name.partition(":")
    config, _, split = rest.partition(":")
    if (
        not name
        or name.startswith((".", "/"))
        or hub_id.count("/") > 1
        or Path(name).suffix in (".json", ".jsonl", ".gz", ".parquet")
    ):
        raise DvirlError(f"{name!r:.200}: no such file")
    from datasets import load_dataset
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    if hub_id in _PACKAGED_DATASETS_MODULES:
        raise DvirlError(
            f"{name!r}: no such file, and no name on the hub; datasets would read files of this folder"
        )
    try:
        rows = load_dataset(hub_id, config or None, split=split or "train", streaming=True)
        for number, row in enumerate(islice(rows, HUB_ROWS), start=1):
            yield f"{name}: row {number}", row
    except Exception as error:  # datasets raises a dozen kinds of error that mean the same to the user
        reason = " ".join(str(error).split())
        raise DvirlError(f"{name!r}: no such file, and no readable data set on the hub ({reason})") from error


def _text(row: Any, key: str) -> str:
    text = row.get(key) if isinstance(row, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise DvirlError(f"expected an object with a non-empty string {key!r}")
    return text


def _texts(values: Any, what: str) -> tuple[str, ...]:
    if not has_type(values, list[str]) or not values or not all(text.strip() for text in values):
        raise DvirlError(f"expected {what!r} to be a list of non-empty strings")
    return tuple(values)


def _category(row: dict[str, Any]) -> str:
    category = row.get("category") or ""
    if not isinstance(category, str):
        raise DvirlError("expected 'category' to be a string")
    return category


def parse_conversation(row: Any) -> Prompt:
    """A conversation under one of `CONVERSATIONS`: turns with role and content, or with from and value.

    One that ends with the user's turn is a prompt as it stands. Of another the first question is the prompt, and the
    first answer the response. A system text at the beginning counts in both.
    """
    name = next((name for name in CONVERSATIONS if isinstance(row, dict) and name in row), None)
    turns = row[name] if name else None
    if not turns or not has_type(turns, list[dict[str, Any]]):
        raise DvirlError(f"expected an object with a non-empty list of turns {', '.join(CONVERSATIONS)}")
    texts: list[str] = []
    system = ""
    for turn in turns:
        role = ROLES.get(str(turn.get("role") or turn.get("from")))
        if role is None:
            raise DvirlError(
                f"expected turns by {', '.join(ROLES)}, not {turn.get('role', turn.get('from'))!r}"
            )
        text = _content(turn.get("content", turn.get("value")))
        if role == "system" and not texts:
            system = text
        elif role == ("assistant" if len(texts) % 2 else "user"):
            texts.append(text)
        elif texts:  # what comes before the user's first turn is passed over
            raise DvirlError(
                f"expected turns of user and assistant in turn; turn {len(texts) + 1} is {role}'s"
            )
    if not texts:
        raise DvirlError("expected a turn with the role user (or from human)")
    if len(texts) % 2:
        return Prompt(tuple(texts), system=system)
    return Prompt((texts[0],), response=texts[1], system=system)


def _content(content: Any) -> str:
    """A turn's text, which may be a list of parts."""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    if not has_type(parts, list[dict[str, Any]]) or any(part.get("type") != "text" for part in parts):
        raise DvirlError("expected a turn's content to be text")
    texts = [_text(part, "text") for part in parts]
    return "\n".join(texts)


def parse_dolly(row: Any) -> Prompt:
    """`{"instruction", "context", "response", "category"}`: instruction and, if there is one, its context."""
    instruction = _text(row, "instruction")
    context = row.get("context") or row.get("input") or ""
    if not isinstance(context, str):
        raise DvirlError("expected 'context' to be a string")
    turn = f"{instruction}\n\n{context}" if context.strip() else instruction
    return Prompt((turn,), str(row.get("category", "")))


def parse_jsonl(row: Any) -> Prompt:
    """`{"prompt": …}`, `{"turns": [user, assistant, user, …]}` that ends with the user, or a conversation."""
    if isinstance(row, dict) and isinstance(row.get("prompt"), list):
        return parse_conversation({"messages": row["prompt"]})
    if isinstance(row, dict) and not row.keys().isdisjoint(CONVERSATIONS):
        return parse_conversation(row)
    has_turns = isinstance(row, dict) and "turns" in row
    turns = _texts(row["turns"], "turns") if has_turns else (_text(row, "prompt"),)
    if len(turns) % 2 == 0:
        raise DvirlError(f"'turns' has {len(turns)} entries; expected an odd number, the user's last")
    return Prompt(turns, str(row.get("category", "")))


def parse_spec_bench(row: Any) -> list[Prompt]:
    """Spec-Bench's `{"question_id", "category", "turns": [user, user, …]}`: every turn, as a prompt of its own.

    Its category may be missing.
    """
    if not isinstance(row, dict) or "question_id" not in row:
        raise DvirlError("expected an object with 'question_id', 'category' and 'turns'")
    category = _category(row)
    return [Prompt((turn,), category) for turn in _texts(row.get("turns"), "turns")]


def parse_supervised(row: Any) -> list[Prompt]:
    """Supervised records: a question and its answer.

    In Dolly's schema with its response, in Alpaca's with its output, in self-instruct's
    `{"instruction", "instances": [{"input", "output"}]}`, or the first exchange of a conversation.
    """
    if isinstance(row, dict) and not row.keys().isdisjoint(CONVERSATIONS):
        prompt = parse_conversation(row)
        if not prompt.response:
            raise DvirlError("expected a conversation with an answer to its first question, at its end")
        return [prompt]
    if not isinstance(row, dict) or "instances" not in row:
        answer = (
            "output" if isinstance(row, dict) and "response" not in row and "output" in row else "response"
        )
        return [replace(parse_dolly(row), response=_text(row, answer))]
    instances = row["instances"]
    if not instances or not has_type(instances, list[dict[str, Any]]):
        raise DvirlError("expected 'instances' to be a list of objects with 'input' and 'output'")
    prompts = []
    for instance in instances:
        prompt = parse_dolly({**row, **instance})
        prompts.append(replace(prompt, response=_text(instance, "output")))
    return prompts


PARSERS: dict[str, Callable[[Any], Prompt | list[Prompt]]] = {
    "sharegpt": parse_conversation,
    "dolly": parse_dolly,
    "jsonl": parse_jsonl,
    "spec_bench": lambda row: parse_spec_bench(row)[0],
    "spec_bench_turns": parse_spec_bench,
    "supervised": parse_supervised,
}


def parsed_rows(
    source: str, parse: Callable[[Any], Parsed], on_bad_row: str = "refuse"
) -> Iterator[tuple[str, Parsed]]:
    """Each row of a file or hub data set, parsed, after its place, which messages name.

    Args:
        source: path or hub id.
        parse: raises a DvirlError for a malformed row.
        on_bad_row: "refuse" raises at the first malformed row, "skip" reports it on standard error.

    Raises:
        DvirlError: for a malformed row, with its file and line.
    """
    total = 0
    skipped = 0
    for where, row in read_rows(source):
        total += 1
        try:
            if isinstance(row, DvirlError):
                raise row
            parsed = parse(row)
        except DvirlError as error:
            message = str(error) if str(error).startswith(where) else f"{where}: {error}"
            if on_bad_row == "refuse":
                raise DvirlError(message) from error
            tqdm.write(f"skipped {message}", file=sys.stderr)
            skipped += 1
            continue
        yield where, parsed
    if skipped:
        tqdm.write(f"{source}: left out {skipped} of {total} rows", file=sys.stderr)


def read_prompts(kind: str, source: str, on_bad_row: str = "refuse") -> list[Prompt]:
    """All prompts of a file or hub data set, without repeats.

    Args:
        kind: a key of `PARSERS`.
        source, on_bad_row: as in `parsed_rows`.

    Raises:
        DvirlError: for a malformed row, with its file and line, or when no prompt is left.
    """
    prompts: dict[str, Prompt] = {}
    for _, parsed in parsed_rows(source, PARSERS[kind], on_bad_row):
        for prompt in parsed if isinstance(parsed, list) else [parsed]:
            prompts.setdefault(prompt.key, prompt)
    if not prompts:
        raise DvirlError(f"{source}: no prompts found; expected {kind} rows")
    return list(prompts.values())


def chatterbot_prompts() -> list[Prompt]:
    """The openings, with replies, of the English conversations that chatterbot-corpus ships, without repeats."""
    prompts: dict[str, Prompt] = {}
    folder = Path(str(resources.files("chatterbot_corpus"))) / "data" / "english"
    for file in sorted(folder.glob("*.yml")):
        conversations = yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]
        for opening, *_, reply in conversations:
            prompt = Prompt((str(opening),), file.stem, str(reply))
            prompts.setdefault(prompt.key, prompt)
    return list(prompts.values())
