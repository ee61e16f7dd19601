"""Reports: a page of tables and figures, as Markdown and as HTML."""

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mistune
import pandas as pd

from dvirl.runs.errors import DvirlError

RESULTS = Path(__file__).parents[2] / "book/results"
"""Larger runs on record."""
STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;display:block;overflow-x:auto}th,td{padding:.2rem .7rem;text-align:right}
th{border-bottom:1px solid}td:first-child,th:first-child{text-align:left}img{max-width:100%;background:#fff}
@media(prefers-color-scheme:dark){body{background:#111;color:#ddd}}"""


def markdown_table(frame: pd.DataFrame) -> str:
    """A table in Markdown, its index first; what is not a number is empty."""
    head = [str(frame.index.name or ""), *(str(name) for name in frame.columns)]
    rows = [[_cell(value) for value in row] for row in frame.itertuples()]
    lines = [head, ["---", *["---:"] * len(frame.columns)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    digits = 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return "" if pd.isna(value) else f"{value:.{digits}f}"


def describe(content: Mapping[str, Any]) -> str:
    """What a result was measured on, in a sentence."""
    machine, model = content["machine"], content["model"]
    where = machine.get("accelerator") or f"{machine['cores']} cores"
    versions = content["versions"]
    what = f"Measured {content['date']} on {where} in {model['dtype']}, torch {versions['torch']}"
    return f"{what}, dvirl {versions['dvirl']}, the model {model['fingerprint'][:15]}…"


def recorded(name: str) -> dict[str, Any]:
    """What a run on record found, `book/results/NAME.json`; printed is what it ran on, when, and the command.

    Raises:
        DvirlError: if there is none of this name.
    """
    path = RESULTS / f"{name}.json"
    if not path.exists():
        raise DvirlError(f"{path}: no such result on record; expected a checkout of the repository that has it")
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    given = {flag: value for flag, value in content.get("arguments", {}).items() if value not in ("", [], None)}
    flags = (
        f"--{flag} {' '.join(map(str, value)) if isinstance(value, list) else value}" for flag, value in given.items()
    )
    command = content.get("command") or " ".join(["dvirl", name.split("-")[0], *flags])
    where = content["machine"].get("accelerator") or f"{content['machine']['cores']} CPU cores"
    print(f"recorded {content['date']} on {where} by\n{command}")
    return content


def write_report(path: Path, title: str, parts: Sequence[str]) -> None:
    """Write `path`.md and `path`.html, from parts in Markdown."""
    text = "\n\n".join([f"# {title}", *parts]) + "\n"
    path.with_name(f"{path.name}.md").write_text(text, encoding="utf-8")
    body = str(mistune.create_markdown(plugins=["table"])(text))
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    )
    page = f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>{body}</body></html>\n'
    path.with_name(f"{path.name}.html").write_text(page, encoding="utf-8")
