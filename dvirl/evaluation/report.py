"""Reports, as Markdown and HTML pages, and the recorded results of the book."""

import html
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mistune
import pandas as pd

from dvirl.runs.errors import DvirlError
from dvirl.runs.folder import environment
from dvirl.runs.log import write_json

RESULTS = Path(__file__).parents[2] / "book/results"
"""Recorded results of larger runs."""
STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;display:block;overflow-x:auto}th,td{padding:.2rem .7rem;text-align:right}
th{border-bottom:1px solid}td:first-child,th:first-child{text-align:left}img{max-width:100%;background:#fff}
@media(prefers-color-scheme:dark){body{background:#111;color:#ddd}}"""


def markdown_table(table: pd.DataFrame) -> str:
    """The table in Markdown, its index first; what is not a number is empty."""
    return str(table.map(_cell).to_markdown(disable_numparse=True, stralign="right"))


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    if pd.isna(value):
        return ""
    # Three significant digits, about.
    size = abs(value)
    digits = 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{value:.{digits}f}"


def _machine(content: Mapping[str, Any]) -> str:
    machine = content["machine"]
    return str(machine.get("accelerator") or f"{machine['cores']} CPU cores")


def describe(content: Mapping[str, Any]) -> str:
    """What a result was measured on, in a sentence."""
    model = content["model"]
    versions = content["versions"]
    return (
        f"Measured {content['date']} on {_machine(content)} in {model['dtype']}, torch {versions['torch']}, "
        f"dvirl {versions['dvirl']}, the model {model['fingerprint'][:15]}…"
    )


def read_recorded(name: str) -> dict[str, Any]:
    """Read the recorded result `book/results/NAME.json`, its `command` included.

    Raises:
        DvirlError: if there is none of this name.
    """
    path = RESULTS / f"{name}.json"
    if not path.exists():
        raise DvirlError(
            f"{path}: no such result on record; expected a checkout of the repository that has it"
        )
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if not content.get("command"):
        # Results from before `command` was kept are named after it, and have its arguments.
        words = ["dvirl", name.split("-")[0]]
        for flag, value in content.get("arguments", {}).items():
            if value not in ("", [], None):
                values = value if isinstance(value, list) else [value]
                words += [f"--{flag}", *map(str, values)]
        content["command"] = " ".join(words)
    return content


def origin(content: Mapping[str, Any]) -> str:
    """When a recorded result was measured, and on what machine."""
    return f"recorded {content['date']} on {_machine(content)}"


def command_record(command: str, argv: Sequence[str]) -> dict[str, Any]:
    """What repeats a result: the command, the date, the versions and the machine."""
    line = shlex.join(["dvirl", command, *argv])
    return {"command": line, **environment()}


def write_out(config: Any, **content: Any) -> None:
    """Write a command's settings and what it found to the JSON file `config.out`, if one is asked for."""
    if config.out:
        write_json(config.out, {"arguments": asdict(config), **content})


def write_report(path: Path, title: str, parts: Sequence[str]) -> None:
    """Write `path`.md and `path`.html, from parts in Markdown."""
    text = "\n\n".join([f"# {title}", *parts]) + "\n"
    Path(f"{path}.md").write_text(text, encoding="utf-8")
    body = mistune.create_markdown(plugins=["table"])(text)
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n<body>{body}</body></html>\n"
    )
    Path(f"{path}.html").write_text(page, encoding="utf-8")
