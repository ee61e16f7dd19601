"""Prompts of one domain, made of what every Python has: requests for the docstrings of its own library."""

import inspect
import random
from importlib import import_module, resources

import yaml

REPLACED = {"getpass.getpass", "inspect.getfile", "pdb.set_trace"}
"""Functions that Jupyter, pytest or torch replace; without them the prompts of all processes are the same."""


def docstring_prompts(count: int | None = None, seed: int = 0) -> list[str]:
    """Requests for the docstring of a function, each of another function of Python's library, shuffled.

    Args:
        count: number of prompts; fewer if the library has fewer functions, and by default all.
        seed: of the order.
    """
    heads = []
    modules = (resources.files("dvirl.data") / "modules.yaml").read_text("utf-8")
    for name in yaml.safe_load(modules):
        module = import_module(name)
        for function, value in inspect.getmembers(module, inspect.isfunction):
            hidden = function.startswith("_") or f"{name}.{function}" in REPLACED
            if value.__module__ == name and not hidden:
                heads.append(f"def {function}{inspect.signature(value)}:")
    # Some heads name an address in memory, which no two programs share.
    heads = [head for head in dict.fromkeys(heads) if " at 0x" not in head]
    random.Random(seed).shuffle(heads)
    return [f"Write a short docstring for this Python function.\n\n{head}" for head in heads[:count]]
