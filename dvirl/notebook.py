"""What notebooks share: their parameters, checked, and a run folder of their own."""

import ast
import dataclasses
import time
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from dvirl.config import DVIConfig
from dvirl.errors import DvirlError
from dvirl.settings import from_mapping

INJECTED = "# Parameters"
"""First line of the cell in which papermill puts `-p` parameters."""
DECLARED = "# Parameters of this notebook"
"""First line of the cell in which a notebook declares its own."""


def assigned_names(source: str) -> list[str]:
    """Names that a cell assigns at its top level, in order."""
    assignments = (statement for statement in ast.parse(source).body if isinstance(statement, ast.Assign))
    return [target.id for one in assignments for target in one.targets if isinstance(target, ast.Name)]


def notebook_config(namespace: Mapping[str, Any], **fixed: Any) -> DVIConfig:
    """Settings from a notebook's parameters, which stand in its `globals()`, and `fixed` ones that it decides itself.

    Every setting of `DVIConfig` may be given with `-p`, and every parameter that the notebook declares.

    Raises:
        DvirlError: for a parameter that is neither, or a value out of range.
    """
    cells = [cell for cell in namespace["In"] if cell.startswith(INJECTED)]
    declared = [name for cell in cells if cell.startswith(DECLARED) for name in assigned_names(cell)]
    injected = [name for cell in cells if not cell.startswith(DECLARED) for name in assigned_names(cell)]
    settings = {spec.name for spec in dataclasses.fields(DVIConfig)}
    known = settings | set(declared)
    if unknown := sorted(set(injected) - known):
        raise DvirlError(f"unknown notebook parameter {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    given = {name: namespace[name] for name in (*declared, *injected) if name in settings}
    return from_mapping(DVIConfig, {**given, **fixed}, "notebook parameters")


def new_run_dir(wished: str, name: str) -> str:
    """The wished run folder, or if none was wished a new one, `runs/NAME-DATE-TIME`."""
    if wished:
        return wished
    first = f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folders = (first if number == 1 else f"{first}-{number}" for number in count(1))
    return next(folder for folder in folders if not Path(folder).exists())
