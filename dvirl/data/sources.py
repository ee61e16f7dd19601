"""Where prompts come from: readers of files, of hub data sets and of the packaged conversations."""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar
from unicodedata import category

import yaml
from tqdm import tqdm

from dvirl.runs.errors import DvirlError
from dvirl.runs.log import JsonObject, numbered, parse_line, read_text
from dvirl.runs.settings import has_type

Item = TypeVar("Item")
Parsed = TypeVar("Parsed")
Row = tuple[str, Any]
"""A row after its place, which messages name."""
CONVERSATIONS = ("messages", "conversations", "conversation", "items")
"""Where a row holds a conversation: OpenAI's name, ShareGPT's, that of LMSYS-Chat-1M and WildChat, old ShareGPT's."""
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "developer": "system",
}
"""Who speaks, by the other names in use."""
ROW_FIELDS = {"prompt", "turns", "instruction", "question_id"}
"""A row has one of these or a conversation; an object without these may stand around the rows."""
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


def read_rows(source: str) -> Iterator[Row]:
    """Rows of a file or hub data set, each after its place, which messages name.

    A file is JSONL, JSON (an array, one row, or an object around the rows), either with `.gz` after its name, or
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
        raise DvirlError(
            f"{source}: not a readable parquet file ({' '.join(str(error).split()):.200})"
        ) from error
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
        lists = [rows for rows in map(_wrapped_rows, value.values()) if rows]
        if len(lists) == 1:
            parse_line(source, text)  # half characters are refused
            return lists[0]
    if "\n" not in text.strip() and not isinstance(value, list):
        return None  # a JSONL file of one line
    parse_line(source, text)
    return value if isinstance(value, list) else [value]


def _wrapped_rows(member: Any) -> list[Any]:
    """The rows that a member of an object holds, as "data" of {"data": [...]} does; none if it holds something else."""
    if not has_type(member, list[JsonObject]):
        return []
    rows = [row.get("row", row) for row in member]  # the hub's viewer puts each into another object
    # The turns of a conversation are objects too, but have no field of a row.
    return rows if any(_has_any(row, *ROW_FIELDS, *CONVERSATIONS) for row in rows) else []


def _read_hub(name: str) -> Iterator[Row]:
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
        raise DvirlError(
            f"{name!r}: no such file, and no readable data set on the hub ({' '.join(str(error).split())})"
        ) from error


def _has_any(row: Any, *names: str) -> bool:
    """Whether a row is an object with one of these fields."""
    return isinstance(row, dict) and not row.keys().isdisjoint(names)


def _text(row: Any, key: str) -> str:
    text = row[key] if _has_any(row, key) else None
    if not isinstance(text, str) or not text.strip():
        raise DvirlError(f"expected an object with a non-empty string {key!r}")
    return text


def _texts(values: Any) -> tuple[str, ...]:
    if not has_type(values, list[str]) or not values or not all(text.strip() for text in values):
        raise DvirlError("expected 'turns' to be a list of non-empty strings")
    return tuple(values)


def parse_conversation(row: Any, exchange: bool = False) -> Prompt:
    """A conversation under one of `CONVERSATIONS`: turns with role and content, or with from and value.

    One that ends with the user's turn is a prompt as it stands. Of another the first question is the prompt, and the
    answer that follows it the response; later turns are not looked at. System texts before the question count in both.

    Args:
        row: the object that holds it.
        exchange: take the first question and its answer, whoever has the last turn.
    """
    turns = next((row[name] for name in CONVERSATIONS if _has_any(row, name)), None)
    if not turns or not has_type(turns, list[JsonObject]):
        raise DvirlError(
            f"expected a non-empty list of turns under one of {', '.join(CONVERSATIONS)}, not {turns!r:.40}"
        )
    names = [str(turn.get("role") or turn.get("from")).lower() for turn in turns]
    roles = [ROLES.get(name, name) for name in names]
    if "user" not in roles:
        raise DvirlError(f"expected a turn with the role user or from human, not only {roles!r:.80}")
    first = roles.index("user")
    system = [_content(turn) for role, turn in zip(roles, turns[:first], strict=False) if role == "system"]
    last = len(turns) if roles[-1] == "user" and not exchange else first + 1
    texts = []
    for index in range(first, last):
        if roles[index] != ("assistant" if (index - first) % 2 else "user"):
            raise DvirlError(
                f"expected turns of user and assistant in turn; turn {index + 1} is by {roles[index]!r:.40}"
            )
        text = _content(turns[index])
        if not text.strip():
            raise DvirlError(f"expected turn {index + 1} to have a non-empty text")
        texts.append(text)
    answered = roles[last : last + 1] == ["assistant"]
    response = _content(turns[last]) if answered else ""
    return Prompt(tuple(texts), response=response, system="\n".join(system).strip())


def _content(turn: JsonObject) -> str:
    """A turn's text, which may be a list of parts."""
    content = turn.get("content")
    if content is None:
        content = turn.get("value")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
    texts = []
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise DvirlError(f"expected a turn's content to be text, not {part!r:.80}")
        texts.append(part["text"])
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
    if _has_any(row, "prompt") and isinstance(row["prompt"], list):
        return parse_conversation({"messages": row["prompt"]})
    if _has_any(row, *CONVERSATIONS):
        return parse_conversation(row)
    if not _has_any(row, "prompt", "turns"):
        raise DvirlError(
            f"expected an object with one of prompt, turns, {', '.join(CONVERSATIONS)}, not {row!r:.80}"
        )
    turns = _texts(row["turns"]) if "turns" in row else (_text(row, "prompt"),)
    if len(turns) % 2 == 0:
        raise DvirlError(f"'turns' has {len(turns)} entries; expected an odd number, the user's last")
    return Prompt(turns, str(row.get("category", "")))


def parse_spec_bench(row: Any) -> list[Prompt]:
    """Spec-Bench's `{"question_id", "category", "turns": [user, user, …]}`: every turn, as a prompt of its own.

    Its category may be missing.
    """
    if not _has_any(row, "question_id"):
        raise DvirlError("expected an object with 'question_id', 'category' and 'turns'")
    category = row.get("category") or ""
    if not isinstance(category, str):
        raise DvirlError("expected 'category' to be a string")
    return [Prompt((turn,), category) for turn in _texts(row.get("turns"))]


def parse_supervised(row: Any) -> list[Prompt]:
    """Supervised records: a question and its answer.

    In Dolly's schema with its response, in Alpaca's with its output, in self-instruct's
    `{"instruction", "instances": [{"input", "output"}]}`, or the first exchange of a conversation.
    """
    if _has_any(row, *CONVERSATIONS):
        prompt = parse_conversation(row, exchange=True)
        if not prompt.response.strip():
            raise DvirlError("expected a conversation with an answer after its first question")
        return [prompt]
    if not _has_any(row, "instances"):
        answer = "output" if _has_any(row, "output") and "response" not in row else "response"
        return [replace(parse_dolly(row), response=_text(row, answer))]
    instances = row["instances"]
    if not instances or not has_type(instances, list[JsonObject]):
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


@contextmanager
def placed(where: str) -> Iterator[None]:
    """Begin the message of an error inside with the place of the row."""
    try:
        yield
    except DvirlError as error:
        message = str(error) if str(error).startswith(where) else f"{where}: {error}"
        raise DvirlError(message) from error


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

    def parsed(place: Row) -> tuple[str, Parsed]:
        where, row = place
        with placed(where):
            if isinstance(row, DvirlError):
                raise row
            return where, parse(row)

    return usable(read_rows(source), parsed, on_bad_row, f"rows of {source}")


def usable(
    items: Iterable[Item], make: Callable[[Item], Parsed], on_bad_row: str, items_name: str
) -> Iterator[Parsed]:
    """The result for each item, or, if bad items are skipped, for the good ones.

    Args:
        items: rows, or prompts.
        make: raises a DvirlError for an item that is of no use.
        on_bad_row: "refuse" raises the first such error, "skip" says it on standard error and goes on.
        items_name: what the items are, for the total that is said at the end.
    """
    total = 0
    skipped = 0
    for item in items:
        total += 1
        try:
            yield make(item)
        except DvirlError as error:
            if on_bad_row == "refuse":
                raise
            tqdm.write(f"skipped {error}", file=sys.stderr)
            skipped += 1
    if skipped:
        tqdm.write(f"left out {skipped} of {total} {items_name}", file=sys.stderr)


def read_prompts(kind: str, source: str, on_bad_row: str = "refuse") -> list[Prompt]:
    """All prompts of a file or hub data set, without repeats.

    Args:
        kind: a key of `PARSERS`.
        source, on_bad_row: as in `parsed_rows`.

    Raises:
        DvirlError: for a malformed row, with its file and line, or when no prompt is left.
    """
    prompts: dict[str, Prompt] = {}

    def parse(row: Any) -> Prompt | list[Prompt]:
        # Tables have every column in every row, and null where a row has nothing.
        if isinstance(row, dict):
            row = {name: value for name, value in row.items() if value is not None}
        return PARSERS[kind](row)

    for _, parsed in parsed_rows(source, parse, on_bad_row):
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
        for opening, *_, reply in _conversations(file):
            prompt = Prompt((str(opening),), file.stem, str(reply))
            prompts.setdefault(prompt.key, prompt)
    return list(prompts.values())


@cache  # parsing takes 0.4 s of each run
def _conversations(file: Path) -> list[list[Any]]:
    content: dict[str, list[list[Any]]] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return content["conversations"]
