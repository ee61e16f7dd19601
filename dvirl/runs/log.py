"""The log of a run: one JSON object a line, written at once, read as a table."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from dvirl.runs.errors import DvirlError


def to_plain(values: Any) -> Any:
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
    write_text(path, json.dumps(to_plain(values), indent=1) + "\n")


def log_line(path: Path, values: Mapping[str, Any]) -> None:
    """Append one line to a JSONL file, complete on disk at once; numbers that JSON cannot spell become null.

    Raises:
        DvirlError: if it cannot be written; no part of it is.
    """
    with path.open("ab", buffering=0) as file:
        line, before = json.dumps(to_plain(values)).encode() + b"\n", file.tell()
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


def read_metrics(path: str | Path, columns: Sequence[str] = ()) -> pd.DataFrame:
    """The table of a `metrics.jsonl`, one row a line; a log without lines has the `columns` that are given.

    Raises:
        DvirlError: if there is no such file or a line is no JSON object.
    """
    rows = [parse_line(*line, dict) for line in numbered(path, read_text(path))]
    return pd.DataFrame(rows, columns=None if rows else list(columns))
