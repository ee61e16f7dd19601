"""What the book needs of Sphinx beyond jupyter-book: docstrings as they are written here, the repository's address."""

import os
import re
import subprocess
from typing import Any

from sphinx.ext.autodoc import DataDocumenter

ONE_TICK = re.compile(r"(?<![`:])`([^`\n]+(?:\n[^`\n]+)?)`(?!`)")
NAMED = re.compile(r'    ("[\w ]+"|\w+): ')


def readable(_app: Any, _what: str, _name: str, _obj: Any, _options: Any, lines: list[str]) -> None:
    """Docstrings say `code` as Markdown does, and list under Returns what they return; reStructuredText does not."""
    text = ONE_TICK.sub(lambda found: f"``{' '.join(found[1].split())}``", "\n".join(lines))
    lines[:] = text.split("\n")
    if "Returns:" not in lines:
        return
    first = lines.index("Returns:") + 1
    stop = next((at for at in range(first, len(lines)) if lines[at][:1].strip()), len(lines))
    named = [at for at in range(first, stop) if NAMED.match(lines[at])]
    if len(named) < 2:
        return
    for at in range(named[0], stop):
        lines[at] = f"    {'- ' if at in named else '  '}{lines[at].strip()}".rstrip()
    lines[named[0] : named[0]] = [""] if named[0] > first else ["    Namely", ""]


class Data(DataDocumenter):
    """Shows the values of constants, except folders of the machine at hand."""

    def should_suppress_value_header(self) -> bool:
        """As Sphinx decides, or because it is a path."""
        return "Path('" in repr(self.object) or super().should_suppress_value_header()


def repository_url() -> str:
    """Of the GitHub repository that is built: the workflow's own, else that of the remote `origin`; or nothing."""
    if name := os.environ.get("GITHUB_REPOSITORY"):
        return f"https://github.com/{name}"
    asked = subprocess.run(
        ["git", "remote", "get-url", "origin"], capture_output=True, text=True, check=False
    )
    found = re.fullmatch(r"(?:https://|git@)github\.com[/:](.+?/.+?)(?:\.git)?", asked.stdout.strip())
    return f"https://github.com/{found[1]}" if found else ""


def theme(_app: Any, config: Any) -> None:
    """One search field, and launch buttons that open this repository's files; without an address there are none."""
    url = repository_url()
    config.html_theme_options["navbar_persistent"] = []
    config.html_theme_options["repository_url"] = url
    config.html_theme_options["repository_branch"] = os.environ.get("GITHUB_REF_NAME", "main")
    if not url:
        config.html_theme_options["launch_buttons"] = {}


def single(app: Any, _page: str, _template: str, context: dict[str, Any], _doctree: Any) -> None:
    """The book as one page has a title, and neither pages beside it, whose list would be empty, nor a search."""
    if app.builder.name == "singlehtml":
        context.update(
            docstitle=context["title"], sidebars=[], theme_disable_search=True, hasdoc=lambda _name: False
        )


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_config_value(
        "comments_config", {}, ""
    )  # jupyter-book sets it for sphinx_comments, which is left out
    app.add_autodocumenter(Data, override=True)
    app.connect("autodoc-process-docstring", readable, priority=400)
    app.connect("config-inited", theme, priority=100)
    app.connect("html-page-context", single, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
