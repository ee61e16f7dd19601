"""What notebooks share: their parameters, checked, a run folder of their own, and text in the colours of its blocks."""

import ast
import dataclasses
import html
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any
from zlib import crc32

from IPython.display import HTML

from dvirl.config import DVIConfig
from dvirl.runs.errors import DvirlError
from dvirl.runs.settings import Settings, from_mapping
from kangaroo.decoding.blocks import Verification

INJECTED = "# Parameters"
"""First line of the cell in which papermill puts `-p` parameters."""
DECLARED = "# Parameters of this notebook"
"""First line of the cell in which a notebook declares its own."""
LOOKS = {
    "accepted": "background:#009e7355",
    "rejected": "background:#d55e0055;text-decoration:line-through",
    "not judged": "opacity:0.75;text-decoration:line-through dotted",
    "the verifier's word": "border-bottom:3px solid #56b4e9;font-weight:bold",
}
"""How a token of a block looks, by what became of it: not by colour alone, and on white as on black."""


def assigned_names(source: str) -> list[str]:
    """Names that a cell assigns at its top level, in order."""
    assignments = (statement for statement in ast.parse(source).body if isinstance(statement, ast.Assign))
    return [target.id for one in assignments for target in one.targets if isinstance(target, ast.Name)]


def notebook_config(namespace: Mapping[str, Any], kind: type[Settings] = DVIConfig, **fixed: Any) -> Settings:
    """Settings from a notebook's parameters, which stand in its `globals()`, and `fixed` ones that it decides itself.

    Every setting of `kind` may be given with `-p`, and every parameter that the notebook declares.

    Raises:
        DvirlError: for a parameter that is neither, or a value out of range.
    """
    cells = [cell for cell in namespace["In"] if cell.startswith(INJECTED)]
    declared = [name for cell in cells if cell.startswith(DECLARED) for name in assigned_names(cell)]
    injected = [name for cell in cells if not cell.startswith(DECLARED) for name in assigned_names(cell)]
    settings = {spec.name for spec in dataclasses.fields(kind)}
    known = settings | set(declared)
    if unknown := sorted(set(injected) - known):
        raise DvirlError(
            f"unknown notebook parameter {', '.join(unknown)}; known are {', '.join(sorted(known))}"
        )
    given = {name: namespace[name] for name in namespace if name in settings}  # nbval keeps no `In`
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
    executed = [cell for cell in namespace.get("In", ()) if cell]
    names = {name for cell in executed if cell.startswith(INJECTED) for name in assigned_names(cell)}
    # nbval keeps no history of cells, and changes no parameters.
    at_defaults = not executed or fingerprint({name: namespace[name] for name in names}) == defaults

    def claim(holds: bool, message: str) -> bool:
        assert holds or not at_defaults, message
        return bool(holds)

    return claim


def new_run_dir(wished: str, name: str) -> str:
    """The wished run folder, or if none was wished a new one, `runs/NAME-DATE-TIME`."""
    if wished:
        return wished
    first = f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folders = (first if number == 1 else f"{first}-{number}" for number in count(1))
    return next(folder for folder in folders if not Path(folder).exists())


def show_blocks(blocks: Sequence[Verification], words: Callable[[int], str]) -> HTML:
    """An answer as its blocks made it: drafts, what became of them, and the verifier's word; a key goes before.

    Args:
        blocks: the answer's, the prefill's first.
        words: what a token id adds to a text (`trace.token_texts`).
    """

    def piece(kind: str, text: str, says: str = "") -> str:
        shown = html.escape(text or "\u25a1").replace("\n", "\u21b5<br>")
        return f'<span style="{LOOKS[kind]}" title="{html.escape(says or kind)}">{shown}</span>'

    parts = [piece(kind, kind) for kind in LOOKS]
    parts[-1] += "<br><br>"
    for block in blocks:
        drafts = zip(block.draft.tokens.tolist(), block.draft.confidence.tolist(), strict=True)
        for place, (token, sure) in enumerate(drafts):
            judged = "rejected" if place < block.num_drafted else "not judged"
            kind = "accepted" if place < block.num_accepted else judged
            parts.append(piece(kind, words(token), f"{kind}, confidence {sure:.2f}"))
        if block.block_len > block.num_accepted:
            parts.append(piece("the verifier's word", words(block.committed[-1])))
        parts.append("\u200a")
    return HTML(f'<div style="line-height:1.9">{" ".join(parts[:4])}{"".join(parts[4:])}</div>')
