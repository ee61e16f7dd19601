"""Where prompts come from: readers of files, of hub data sets and of the packaged conversations."""

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
        letters = [
            letter if letter.isalnum() or category(letter)[0] == "M" else " " for letter in text.lower()
        ]
        return " ".join("".join(letters).split()) or text  # a text of punctuation alone is its own key


def read_rows(source: str) -> Iterator[tuple[str, Any]]:
    """Rows of a JSON array, a JSONL file or a hub data set, each after its place, which messages name.

    For a line that is not JSON, the row is the error.

    Raises:
        DvirlError: if there is no such file or data set.
    """
    if not os.path.exists(source):  # of a name that is too long it says no, where Path.exists raises
        yield from _read_hub(source)
        return
    text = read_text(source)
    if text.lstrip().startswith("["):
        for number, row in enumerate(parse_line(source, text), start=1):
            yield f"{source}: row {number}", row
        return
    for where, line in numbered(source, text):
        try:
            yield where, parse_line(where, line)
        except DvirlError as error:
            yield where, error


def _read_hub(name: str) -> Iterator[tuple[str, Any]]:
    if (
        not name
        or name.startswith((".", "/"))
        or name.count("/") > 1
        or Path(name).suffix in (".json", ".jsonl")
    ):
        raise DvirlError(f"{name!r:.200}: no such file")
    from datasets import load_dataset
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    if name in _PACKAGED_DATASETS_MODULES:
        raise DvirlError(
            f"{name!r}: no such file, and no name on the hub; datasets would read files of this folder"
        )
    try:
        rows = load_dataset(name, split="train", streaming=True)
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


def parse_sharegpt(row: Any) -> Prompt:
    """`{"conversations": [{"from": "human", "value": …}, …]}`: its first human turn."""
    if not isinstance(row, dict) or not isinstance(row.get("conversations"), list):
        raise DvirlError("expected an object with a list 'conversations'")
    for turn in row["conversations"]:
        if isinstance(turn, dict) and turn.get("from") in ("human", "user"):
            return Prompt((_text(turn, "value"),))
    raise DvirlError("expected a turn with from 'human'")


def parse_dolly(row: Any) -> Prompt:
    """`{"instruction", "context", "response", "category"}`: instruction and, if there is one, its context."""
    instruction = _text(row, "instruction")
    context = row.get("context") or row.get("input") or ""
    if not isinstance(context, str):
        raise DvirlError("expected 'context' to be a string")
    turn = f"{instruction}\n\n{context}" if context.strip() else instruction
    return Prompt((turn,), str(row.get("category", "")))


def parse_jsonl(row: Any) -> Prompt:
    """`{"prompt": …}`, or `{"turns": [user, assistant, user, …]}` that ends with the user."""
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
    """Dolly's schema, response included, or self-instruct's `{"instruction", "instances": [{"input", "output"}]}`."""
    if not isinstance(row, dict) or "instances" not in row:
        return [replace(parse_dolly(row), response=_text(row, "response"))]
    instances = row["instances"]
    if not instances or not has_type(instances, list[dict[str, Any]]):
        raise DvirlError("expected 'instances' to be a list of objects with 'input' and 'output'")
    prompts = []
    for instance in instances:
        prompt = parse_dolly({**row, **instance})
        prompts.append(replace(prompt, response=_text(instance, "output")))
    return prompts


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
    """Each row of a file or hub data set, parsed, after its place, which messages name.

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
