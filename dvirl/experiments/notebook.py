"""What notebooks share: their parameters, checked, a run folder of their own, captions, and answers block by block."""

import ast
import dataclasses
import html
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

from IPython.display import HTML

from dvirl.config import DVIConfig
from dvirl.evaluation.report import origin
from dvirl.runs.errors import DvirlError
from dvirl.runs.settings import Settings, from_mapping
from kangaroo.decoding.blocks import Verification

INJECTED = "# Parameters"
"""First line of the cell in which papermill puts `-p` parameters."""
DECLARED = "# Parameters of this notebook"
"""First line of the cell in which a notebook declares its own."""
LOOKS = {
    "accepted": ("\u2713", "background:#009e7355"),
    "rejected": ("\u2717", "background:#d55e0055;text-decoration:line-through"),
    "not judged": ("\u25cb", "background:#88888830"),
    "the verifier's token": ("+", "border-bottom:3px solid #56b4e9;font-weight:bold"),
}
"""How a token of a block looks, by what became of it: a sign and a colour, on white as on black."""
BLOCK_STYLE = """<style>
table.dvirl-blocks {border-collapse:collapse; width:100%; margin:0 0 1.5em}
table.dvirl-blocks caption {caption-side:top; text-align:left; font-weight:bold; padding:.3em 0}
table.dvirl-blocks :is(th, td) {text-align:left; vertical-align:top; padding:.35em .6em; border-bottom:1px solid #8886}
table.dvirl-blocks tbody th {font-weight:normal; white-space:nowrap}
table.dvirl-blocks td div, table.dvirl-blocks caption div div {display:inline-block}
table.dvirl-blocks caption div {font-weight:normal}
table.dvirl-blocks span {white-space:pre-wrap; margin-right:.35em; padding:0 .2em; border-radius:.2em;
  display:inline-block; line-height:1.5}
@media (max-width:36em) {
  table.dvirl-blocks thead {display:none}
  table.dvirl-blocks :is(tbody, tr, th, td) {display:block}
  table.dvirl-blocks :is(th, td) {border:0; padding:.1em 0}
  table.dvirl-blocks tr {border-bottom:1px solid #8886; padding:.4em 0}
  table.dvirl-blocks td:nth-child(3)::before {content:"\u2192 "}
}
</style>"""
"""A row a block on a wide page, three short lines a block on a phone."""
BLOCK_HEAD = "<thead><tr><th>block</th><th>drafts and verdicts</th><th>committed</th></tr></thead>"


def assigned_names(source: str) -> list[str]:
    """Names that a cell assigns at its top level, in order."""
    assignments = (statement for statement in ast.parse(source).body if isinstance(statement, ast.Assign))
    return [target.id for one in assignments for target in one.targets if isinstance(target, ast.Name)]


def _parameters(namespace: Mapping[str, Any], mark: str) -> set[str]:
    """Names that the executed cells assign whose first line begins with a mark; none in nbval, which keeps no `In`."""
    cells = [cell for cell in namespace.get("In", ()) if cell.startswith(mark)]
    return {name for cell in cells for name in assigned_names(cell)}


def notebook_config(namespace: Mapping[str, Any], kind: type[Settings] = DVIConfig, **fixed: Any) -> Settings:
    """Settings from a notebook's parameters, which stand in its `globals()`, and `fixed` ones that it decides itself.

    Every setting of `kind` may be given with `-p`, and every parameter that the notebook declares.

    Raises:
        DvirlError: for a parameter that is neither, or a value out of range.
    """
    settings = {spec.name for spec in dataclasses.fields(kind)}
    declared = _parameters(namespace, DECLARED)
    known = settings - {*fixed} | declared
    asked = _parameters(namespace, INJECTED)
    if taken := sorted(asked & {*fixed} - declared):
        raise DvirlError(f"notebook parameter {', '.join(taken)}: this notebook sets it itself")
    if unknown := sorted(asked - known):
        raise DvirlError(
            f"unknown notebook parameter {', '.join(unknown)}; known are {', '.join(sorted(known))}"
        )
    given = {name: value for name, value in namespace.items() if name in settings}
    return from_mapping(kind, {**given, **fixed}, "notebook parameters")


NOT_FIGURES = {"run_dir", "threads", "device", "tracker"}
"""Parameters that change where a notebook runs and writes, but none of its figures."""


def fingerprint(parameters: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits that tell these parameters from others, whatever their order."""
    kept = sorted((name, value) for name, value in parameters.items() if name not in NOT_FIGURES)
    return f"{crc32(repr(kept).encode()):08x}"


def claims(namespace: Mapping[str, Any], defaults: str) -> Callable[[bool, str], bool]:
    """A notebook's claims: asserted for its default run, while other parameters show their own numbers.

    Args:
        namespace: the notebook's `globals()`, with the parameters given by `-p` or edited in its first cell.
        defaults: `fingerprint` of its default parameters.

    Returns:
        `claim(holds, message)`, which returns whether the claim holds. At the default parameters a claim that does not
        hold is an AssertionError with the message.
    """
    names = _parameters(namespace, INJECTED)
    # In nbval, which changes no parameters, there are none.
    at_defaults = not names or fingerprint({name: namespace[name] for name in names}) == defaults

    def claim(holds: bool, message: str) -> bool:
        assert holds or not at_defaults, message
        return bool(holds)

    return claim


def new_run_dir(wished: str, name: str) -> str:
    """The wished run folder, or if none was wished a new one, `runs/NAME-DATE-TIME`."""
    if wished:
        return wished
    first = f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = first
    number = 1
    while Path(folder).exists():
        number += 1
        folder = f"{first}-{number}"
    return folder


def caption(*records: Mapping[str, Any]) -> HTML:
    """When, where and by which command recorded results were measured, small, for under a figure or a table.

    Args:
        records: what `report.read_recorded` gave; of several the commands are hidden until asked for.
    """
    lines = [f"{origin(one)}: <code>{html.escape(one['command'])}</code>" for one in records]
    text = lines[0]
    if len(lines) > 1:
        places = " and ".join(sorted({origin(one).removeprefix("recorded ") for one in records}))
        items = "".join(f"<li>{line}</li>" for line in lines)
        text = f"<details><summary>recorded {places}, by {len(lines)} commands</summary><ul>{items}</ul></details>"
    return HTML(f'<div class="provenance" style="font-size:85%;overflow-wrap:anywhere">{text}</div>')


def show_blocks(
    blocks: Sequence[Verification], words: Callable[[int], str], title: str = "", most: int = 12
) -> HTML:
    """An answer as its blocks made it, a row each: what drafted, each draft with its verdict, what was committed.

    Args:
        blocks: the answer's, the prefill's first.
        words: what a token id adds to a text (`rejections.token_texts`).
        title: stands above.
        most: blocks shown; the others are counted in the last row.
    """
    key = " ".join(_piece(kind, kind) for kind in LOOKS)
    title_and_key = f"<caption>{html.escape(title)}<div>{key}</div></caption>"
    rows = [_block_row(number, block, words) for number, block in enumerate(blocks[:most])]
    if left := len(blocks) - len(rows):
        rows.append(f'<tr><td colspan="3">{left} more blocks like these</td></tr>')
    table = f"{title_and_key}{BLOCK_HEAD}<tbody>{''.join(rows)}</tbody>"
    return HTML(f'{BLOCK_STYLE}<table class="dvirl-blocks">{table}</table>')


def _piece(kind: str, text: str, says: str = "") -> str:
    """A token in the look of its kind, with the kind's sign before it; line ends are shown."""
    sign, look = LOOKS[kind]
    shown = html.escape(text or "\u25a1").replace("\n", "\u21b5")
    return f'<div>{sign}<span style="{look}" title="{html.escape(says or kind)}">{shown}</span></div>'


def _block_row(number: int, block: Verification, words: Callable[[int], str]) -> str:
    """The row of a block; block 0 is the prefill, which has no drafts."""
    sources = set()
    parts = []
    drafts = zip(block.draft.tokens.tolist(), block.draft.confidence.tolist(), strict=True)
    for place, (token, sure) in enumerate(drafts):
        looked_up = math.isnan(sure)
        sources.add("lookup" if looked_up else "learned")
        judged = "rejected" if place < block.num_drafted else "not judged"
        kind = "accepted" if place < block.num_accepted else judged
        how = "looked up" if looked_up else f"confidence {sure:.2f}"
        parts.append(_piece(kind, words(token), f"{kind}, {how}"))
    if block.block_len > block.num_accepted:
        parts.append(_piece("the verifier's token", words(block.committed[-1])))
    said = html.escape("".join(map(words, block.committed)).lstrip(" ")).replace("\n", "\u21b5")
    source = ", ".join(sorted(sources, reverse=True)) or "no draft"
    return f"<tr><th>{number} <small>{source}</small></th><td>{' '.join(parts)}</td><td><span>{said}</span></td></tr>"
