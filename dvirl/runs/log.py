"""The log of a run: one JSON object a line, written at once, read as a table."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from dvirl.runs.errors import DvirlError
from dvirl.runs.files import atomic_file

JsonObject = dict[str, Any]
"""An object of a JSON file."""
Line = Mapping[str, Any]
"""A line of a log: figures by name."""


def to_plain(values: Any) -> Any:
    """The same value as JSON has it: numbers that JSON cannot spell, such as NaN, become None."""
    return json.loads(json.dumps(values), parse_constant=lambda _: None)


def write_text(path: str | Path, text: str) -> None:
    """Write a file as `atomic_file` does."""
    with atomic_file(Path(path)) as scratch:
        scratch.write_text(text, encoding="utf-8")


def write_json(path: str | Path, values: Any) -> None:
    """Write a JSON file as `write_text` does; numbers that JSON cannot spell become null."""
    write_text(path, json.dumps(to_plain(values), indent=1) + "\n")


def log_line(path: Path, values: Line) -> None:
    """Append one line to a JSONL file and write it at once; numbers that JSON cannot spell become null.

    Raises:
        DvirlError: if it cannot be written; then no part of it is.
    """
    line = json.dumps(to_plain(values)).encode() + b"\n"
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            while line:
                line = line[file.write(line) :]
        except OSError as error:
            file.truncate(before)
            raise DvirlError(f"{path}: could not be written ({error.strerror})") from error


def keep_lines(path: Path, keep: Callable[[JsonObject], bool]) -> None:
    """Keep the lines of a log for which `keep` says so; a last line without an end is dropped.

    Raises:
        DvirlError: for another line that is not a JSON object.
    """
    if not path.exists():
        return
    lines = numbered(path, read_text(path).rpartition("\n")[0])
    try:
        kept = [f"{line}\n" for where, line in lines if keep(parse_line(where, line, dict))]
    except (KeyError, TypeError) as error:
        raise DvirlError(f"{path}: a line of another kind of log ({error!r})") from error
    write_text(path, "".join(kept))


def cut_log(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`: a run that goes on from that step's checkpoint writes them again."""
    keep_lines(path, lambda line: line.get("step", 0) <= step)


def parse_line(where: str, text: str, kind: type = object) -> Any:
    """The value of a JSON text; `kind` is dict if it must be an object.

    Raises:
        DvirlError: if it is not JSON, or holds half a character; the message begins with `where`.
    """
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():  # half of a surrogate pair cannot be encoded again
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise DvirlError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(value, kind):
        raise DvirlError(f"{where}: expected a JSON object")
    return value


def read_text(path: str | Path) -> str:
    """The text of a file, unpacked if its name ends with `.gz`; a byte order mark is no part of it.

    Raises:
        DvirlError: if there is none, or it is damaged or not UTF-8.
    """
    try:
        if str(path).endswith(".gz"):
            return gzip.decompress(Path(path).read_bytes()).decode("utf-8-sig")
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, EOFError, zlib.error) as error:
        raise DvirlError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    except ValueError as error:
        raise DvirlError(f"{path}: not readable as UTF-8 ({error})") from error


def numbered(path: str | Path, text: str) -> Iterator[tuple[str, str]]:
    """The lines of a JSONL file that are not blank, each after its place, which messages name.

    Only line feeds end lines: JSON strings may hold other separators, such as U+2028, as they are.
    """
    return (
        (f"{path}:{number}", line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()
    )


def read_metrics(path: str | Path, columns: Sequence[str] = ()) -> pd.DataFrame:
    """The table of a `metrics.jsonl`, one row a line; a log without lines has the `columns` that are given.

    Raises:
        DvirlError: if there is no such file or a line is no JSON object.
    """
    rows = [parse_line(where, line, dict) for where, line in numbered(path, read_text(path))]
    return pd.DataFrame(rows, columns=None if rows else list(columns))
