"""Prompts: readers for every source, and one stream whose position can be saved and restored."""

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

Parsed = TypeVar("Parsed")


HUB_ROWS = 10_000
"""Rows streamed from a hub data set at most."""


@dataclass(frozen=True)
class Prompt:
    """A conversation that ends with the user's turn.

    Attributes:
        turns: user, assistant, user, …; an odd number.
        category: what kind of prompt, if the source says.
        response: what to learn to answer, of supervised sources.
    """

    turns: tuple[str, ...]
    category: str = ""
    response: str = ""

    @property
    def key(self) -> str:
        """Equal for prompts that differ only in case, punctuation and white space."""
        text = " ".join(self.turns)
        kept = "".join(one if one.isalnum() or category(one)[0] == "M" else " " for one in text.lower())
        return " ".join(kept.split()) or text


def read_rows(source: str) -> Iterator[tuple[str, Any]]:
    """Rows of a JSON array, a JSONL file, or a hub data set, each with its place for messages.

    Raises:
        DvirlError: if there is no such file or data set; a line that is no JSON is a row that holds the error.
    """
    path = Path(source)
    if not os.path.exists(source):  # which says no, where Path's raises, of a name that is too long
        yield from _read_hub(source)
        return
    text = read_text(path)
    if text.lstrip().startswith("["):
        rows = parse_line(str(path), text)
        yield from ((f"{path}: row {number}", row) for number, row in enumerate(rows, start=1))
        return
    for where, line in numbered(path, text):
        try:
            yield where, parse_line(where, line)
        except DvirlError as error:
            yield where, error


def _read_hub(name: str) -> Iterator[tuple[str, Any]]:
    if not name or name.startswith((".", "/")) or name.count("/") > 1 or Path(name).suffix in (".json", ".jsonl"):
        raise DvirlError(f"{name!r:.200}: no such file")
    from datasets import load_dataset
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    if name in _PACKAGED_DATASETS_MODULES:
        raise DvirlError(f"{name!r}: no such file, and no name on the hub; datasets would read files of this folder")
    try:
        rows = load_dataset(name, split="train", streaming=True)
        for number, row in enumerate(islice(rows, HUB_ROWS), start=1):
            yield f"{name}: row {number}", row
    except Exception as error:  # datasets raises a dozen kinds for what is all one thing to the user
        reason = " ".join(str(error).split())
        raise DvirlError(f"{name!r}: no such file, and no readable data set on the hub ({reason})") from error


def _text(row: Any, key: str) -> str:
    if not isinstance(row, dict) or not isinstance(row.get(key), str) or not row[key].strip():
        raise DvirlError(f"expected an object with a non-empty string {key!r}")
    return str(row[key])


def _texts(values: Any, what: str) -> tuple[str, ...]:
    if not isinstance(values, list) or not values or not all(isinstance(v, str) and v.strip() for v in values):
        raise DvirlError(f"expected {what!r} to be a list of non-empty strings")
    return tuple(values)


def parse_sharegpt(row: Any) -> Prompt:
    """`{"conversations": [{"from": "human", "value": …}, …]}`: its first human turn."""
    turns = row.get("conversations") if isinstance(row, dict) else None
    if not isinstance(turns, list):
        raise DvirlError("expected an object with a list 'conversations'")
    for turn in turns:
        if isinstance(turn, dict) and turn.get("from") in ("human", "user"):
            return Prompt((_text(turn, "value"),))
    raise DvirlError("expected a turn with from 'human'")


def parse_dolly(row: Any) -> Prompt:
    """`{"instruction", "context", "response", "category"}`: instruction and, if there is one, its context."""
    instruction = _text(row, "instruction")
    context = row.get("context") or row.get("input") or ""
    if not isinstance(context, str):
        raise DvirlError("expected 'context' to be a string")
    category = row.get("category", "")
    return Prompt((f"{instruction}\n\n{context}" if context.strip() else instruction,), str(category))


def parse_jsonl(row: Any) -> Prompt:
    """`{"prompt": …}`, or `{"turns": [user, assistant, user, …]}` that ends with the user."""
    if isinstance(row, dict) and "turns" in row:
        turns = _texts(row["turns"], "turns")
        if len(turns) % 2 == 0:
            raise DvirlError(f"'turns' has {len(turns)} entries; expected an odd number, the user's last")
        return Prompt(turns, str(row.get("category", "")))
    return Prompt((_text(row, "prompt"),), str(row.get("category", "")))


def parse_spec_bench(row: Any) -> list[Prompt]:
    """Spec-Bench's `{"question_id", "category", "turns": [user, user, …]}`: every turn, as a prompt of its own.

    Its category may be missing.
    """
    if not isinstance(row, dict) or "question_id" not in row:
        raise DvirlError("expected an object with 'question_id', 'category' and 'turns'")
    category = row.get("category") or ""
    if not isinstance(category, str):
        raise DvirlError("expected 'category' to be a string")
    return [Prompt((turn,), category) for turn in _texts(row.get("turns"), "turns")]


def parse_supervised(row: Any) -> list[Prompt]:
    """Dolly's schema, response included, or self-instruct's `{"instruction", "instances": [{"input", "output"}]}`."""
    if not isinstance(row, dict) or "instances" not in row:
        return [replace(parse_dolly(row), response=_text(row, "response"))]
    instances = row["instances"]
    if not isinstance(instances, list) or not instances or not all(isinstance(one, dict) for one in instances):
        raise DvirlError("expected 'instances' to be a list of objects with 'input' and 'output'")
    return [replace(parse_dolly({**row, **one}), response=_text(one, "output")) for one in instances]


PARSERS: dict[str, Callable[[Any], Prompt | list[Prompt]]] = {
    "sharegpt": parse_sharegpt,
    "dolly": parse_dolly,
    "jsonl": parse_jsonl,
    "spec_bench": lambda row: parse_spec_bench(row)[0],
    "spec_bench_turns": parse_spec_bench,
    "supervised": parse_supervised,
}


def parsed_rows(
    source: str, parse: Callable[[Any], Parsed], on_bad_row: str = "refuse"
) -> Iterator[tuple[str, Parsed]]:
    """What `parse` makes of each row of a file or hub data set, with its place for messages.

    Args:
        source: path or hub id.
        parse: raises a DvirlError for a malformed row.
        on_bad_row: "refuse" raises at the first malformed row, "skip" reports it on standard error.

    Raises:
        DvirlError: for a malformed row, with its file and line.
    """
    for where, row in read_rows(source):
        try:
            if isinstance(row, DvirlError):
                raise row
            parsed = parse(row)
        except DvirlError as error:
            message = str(error) if str(error).startswith(where) else f"{where}: {error}"
            if on_bad_row == "refuse":
                raise DvirlError(message) from error
            tqdm.write(f"skipped {message}", file=sys.stderr)
            continue
        yield where, parsed


def read_prompts(kind: str, source: str, on_bad_row: str = "refuse") -> list[Prompt]:
    """All prompts of a file or hub data set, without repeats.

    Args:
        kind: a key of `PARSERS`.
        source, on_bad_row: as in `parsed_rows`.

    Raises:
        DvirlError: for a malformed row, with its file and line, or when no prompt is left.
    """
    prompts: dict[str, Prompt] = {}
    for _, found in parsed_rows(source, PARSERS[kind], on_bad_row):
        for prompt in found if isinstance(found, list) else [found]:
            prompts.setdefault(prompt.key, prompt)
    if not prompts:
        raise DvirlError(f"{source}: no prompts found; expected {kind} rows")
    return list(prompts.values())


def chatterbot_prompts() -> list[Prompt]:
    """The openings, with replies, of the English conversations that chatterbot-corpus ships, without repeats."""
    prompts: dict[str, Prompt] = {}
    folder = Path(str(resources.files("chatterbot_corpus"))) / "data" / "english"
    for file in sorted(folder.glob("*.yml")):
        for opening, *_, reply in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            prompt = Prompt((str(opening),), file.stem, str(reply))
            prompts.setdefault(prompt.key, prompt)
    return list(prompts.values())
