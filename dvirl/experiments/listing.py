"""The package's own source in a notebook, so that what is shown is what runs."""

import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any

from IPython.display import Markdown


def show_source(*functions: Callable[..., Any]) -> Markdown:
    """The source of functions, without their docstrings, as one block of code."""
    return Markdown("```python\n" + "\n\n".join(map(_without_docstring, functions)) + "\n```")


def _without_docstring(function: Callable[..., Any]) -> str:
    """The lines of a function as they stand in its file, less its indent and its docstring."""
    source = textwrap.dedent(inspect.getsource(function)).rstrip()
    return re.sub(r':\n *r?""".*?"""', ":", source, count=1, flags=re.DOTALL)
