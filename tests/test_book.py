"""The book as it lies in the repository: nothing left out, nothing that points nowhere, and its code runs."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import runpy
import subprocess
import tomllib
from collections import Counter
from pathlib import Path

import pytest
import yaml

from dvirl.evaluation import spec_bench
from dvirl.evaluation.rejections import ANSWER, EVENT
from dvirl.metrics import StepMetrics

ROOT = Path(__file__).parents[1]
BOOK = ROOT / "book"
PAGES = sorted(BOOK.rglob("*.md"))
TABLES = runpy.run_path(str(BOOK / "tables.py"))
TEXT = {page: page.read_text(encoding="utf-8") for page in [ROOT / "README.md", *PAGES]}
CODE = re.compile(r"```.*?```|<!--.*?-->", re.DOTALL)


def listed():
    """The files of the table of contents, without their endings."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    return [toc["root"], *(chapter["file"] for part in toc["parts"] for chapter in part["chapters"])]


def test_the_table_of_contents_has_every_page_and_notebook_once():
    there = [*PAGES, *(ROOT / "notebooks").glob("*.ipynb")]
    assert Counter(listed()) == Counter(str(path.relative_to(ROOT).with_suffix("")) for path in there)


def test_the_reference_has_every_module_once():
    pages = "".join(TEXT[page] for page in (BOOK / "api").glob("*.md"))
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for name in ("dvirl", "kangaroo")
        for path in (ROOT / name).rglob("*.py")
        if path.stem != "__init__"
    ]
    assert Counter(re.findall(r"automodule:: ([\w.]+)", pages)) == Counter(modules)


# Metrics


def explained(title):
    """The names that a section of metrics.md explains, each as a term with a text under it."""
    section = TEXT[BOOK / "metrics.md"].split(f"## {title}\n")[1].split("\n## ")[0]
    return re.findall(r"^`(\w+)`\n: \S", section, re.M)


def test_every_field_of_the_log_is_explained():
    assert Counter(explained("The log of a run")) == Counter(
        spec.name for spec in dataclasses.fields(StepMetrics)
    )


def test_every_column_of_the_evaluation_is_explained():
    choice = {
        name: [1.0]
        for name in (
            "turns",
            "new_tokens",
            "wall_time",
            "num_drafted",
            "num_accepted",
            "nll",
            "tokens",
            "accept_lengths",
        )
    }
    answers = {number: {"category": "qa", "choices": [choice]} for number in (1, 2)}
    measured = spec_bench.measures(spec_bench.answer_table({("plain", 0): answers}), "plain")
    recorded = json.loads((BOOK / "results/evaluate-mini-cpu.json").read_text())["figures"][0]
    assert set(measured) < set(recorded)
    assert Counter(explained("The table of `dvirl evaluate`")) == Counter(list(recorded))


def test_every_entry_of_the_trace_is_explained():
    assert explained("The trace of accept events") == list(EVENT)
    assert not set(ANSWER) & set(EVENT)


# References


def test_every_equation_has_a_label_of_its_own_and_is_referred_to():
    text = TEXT[BOOK / "method.md"]
    labels = re.findall(r"^\$\$ \(([\w-]+)\)$", text, re.M)
    assert len(labels) > 10 and Counter(labels) == Counter(set(labels))
    assert text.count("\n$$") == 2 * len(labels)
    asked = [name for page in PAGES for name in re.findall(r"\{eq\}`([\w-]+)`", TEXT[page])]
    assert set(asked) == set(labels)
    table = text.split("## The design's words")[1]
    assert set(re.findall(r"\{eq\}`([\w-]+)`", table)) == set(labels)


def found(name):
    """What a dotted name of our packages stands for."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[count:]:
            value = getattr(value, attribute)
        return value
    raise AttributeError(name)


def test_every_piece_of_code_that_the_book_names_exists():
    names = {name for page in PAGES for name in re.findall(r"\{py:\w+\}`~?([\w.]+)`", TEXT[page])}
    assert len(names) > 30
    for name in names:
        assert found(name) is not None


@pytest.mark.parametrize("page", TEXT, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_within_the_repository_leads_to_a_file(page):
    text = CODE.sub("", TEXT[page])
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    for link in links:
        target = link.split("#")[0]
        assert target.startswith(("http://", "https://")) or (page.parent / target).exists(), link
    for link in re.findall(r"\{doc\}`(?:[^`<]*<)?([^`>]+)>?`", text):
        assert any((page.parent / f"{link}{ending}").exists() for ending in (".md", ".ipynb")), link


def test_every_citation_is_in_the_bibliography():
    keys = set(re.findall(r"^@\w+\{(\w+),", (BOOK / "references.bib").read_text(), re.M))
    cited = {
        key
        for page in PAGES
        for keys in re.findall(r"\{cite\}`([\w,]+)`", TEXT[page])
        for key in keys.split(",")
    }
    assert cited <= keys


# Content


def test_every_table_of_results_stands_on_a_page():
    marked = [name for text in TEXT.values() for name in re.findall(r"<!-- table (\w+) -->", text)]
    assert Counter(marked) == Counter(list(TABLES["TABLES"]))


@pytest.mark.parametrize("page", TEXT, ids=lambda page: str(page.relative_to(ROOT)))
def test_tables_and_numbers_of_a_page_are_those_of_the_files(page):
    assert page in TABLES["PAGES"]
    assert TABLES["filled"](TEXT[page]) == TEXT[page]


def test_every_comment_with_a_source_follows_a_number():
    marked = [line for text in TEXT.values() for line in text.splitlines() if "<!-- =" in line]
    for line in marked:
        assert len(TABLES["NUMBER"].findall(line)) == line.count("<!-- ="), line
        assert not line.lstrip().startswith("<!--"), (
            f"{line} is no text: Markdown takes the whole line for HTML"
        )
    assert sum(line.count("<!-- =") for line in marked) > 100


def test_a_changed_result_changes_its_table():
    text = TEXT[BOOK / "results.md"].replace("0.336", "0.337")
    assert TABLES["filled"](text) != text


@pytest.mark.parametrize(
    ("shown", "source", "written"),
    [
        ("1.99", "cost-h200:checked:0:predicted", "1.46"),
        ("9", "cost-h200:checked:draft_len=2:predicted", "1"),
        ("**1.9**", "cost-h200:checked:0:predicted", "**1.5**"),
        ("1", "acceptance-default-cpu:figures:untrained:num_drafted", "1,727"),
        ("0 %", "acceptance-default-cpu:figures:trained:accept_rate", "34 %"),
        ("+0.0", "acceptance-default-cpu:figures:trained:mat minus 1", "+0.4"),
        ("0.0", "1 minus acceptance-default-cpu:figures:trained:mat", "\u22120.4"),
        ("0.00", "cost-h200:checked:0:measured over cost-h200:checked:0:predicted", "0.90"),
        ("0", "answers-h200", "384"),
    ],
)
def test_a_number_is_written_as_its_source_has_it(shown, source, written):
    comment = f"<!-- = {source} -->"
    page = TABLES["filled"](f"It was {shown}{comment}, they say.")
    assert page == f"It was {written}{comment}, they say."


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("cost-h200:checked:0:predictions", KeyError),
        ("cost-h200:checked:7:predicted", IndexError),
        ("cost-h200:checked:draft_len=3:predicted", StopIteration),
        ("cost-mars:checked:0:predicted", FileNotFoundError),
        ("answers-h300", ValueError),
    ],
)
def test_a_source_that_is_nowhere_is_an_error(source, error):
    with pytest.raises(error):
        TABLES["filled"](f"It was 1.46<!-- = {source} -->.")


@pytest.mark.filterwarnings("ignore:.*Converting a tensor.*:UserWarning")
def test_the_code_of_extending_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", TEXT[BOOK / "extending.md"], re.M | re.DOTALL)
    assert len(blocks) == 6
    monkeypatch.setattr("dvirl.losses.OBJECTIVES", dict(found("dvirl.losses.OBJECTIVES")))
    exec(compile("\n".join(blocks), "extending.md", "exec"), {"__name__": "extending"})
    assert (tmp_path / "runs/thin/metrics.jsonl").exists()


CARDS = sorted((ROOT / "weights").glob("*/README.md"))


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.parent.name)
def test_what_a_drafters_card_imports_is_there(card):
    (block,) = re.findall(r"^```python\n(.*?)^```", card.read_text(encoding="utf-8"), re.M | re.DOTALL)
    imports = [line for line in block.splitlines() if line.startswith("from ")]
    assert len(imports) == 2
    exec("\n".join(imports), {})


def test_what_the_pages_say_of_lookup_and_the_learned_draft_holds():
    """README, results and limits say where lookup wins and where the learned draft does."""
    speed = {}
    for place in TABLES["EVALUATIONS"]:
        for name, rows in TABLES["recorded_by"](place).items():
            speed[name, place] = {method: row["speedup"] for method, row in rows.items()}
    lookup = {place for place, by in speed.items() if by["pld"] > by["dvi"]}
    assert lookup == {("mini", "cpu"), ("mini", "h200"), ("humaneval", "h200")}
    fastest = {place for place, by in speed.items() if by["hybrid"] == max(by.values())}
    first = {place for place in speed if "," not in place[1]}
    second = {place for place in speed if "second" in place[1]} - {("gsm8k", "cpu, second drafter")}
    third = {place for place in speed if "bfloat16" in place[1]}
    assert fastest == first | second | third


# How it is built


def test_nothing_is_loaded_from_elsewhere_and_nothing_is_executed():
    config = yaml.safe_load((BOOK / "_config.yml").read_text())
    sphinx = config["sphinx"]["config"]
    assert not {"sphinx_thebe", "sphinx_comments", "sphinx.ext.intersphinx"} & set(sphinx["extensions"])
    assert "sphinx-mathjax-offline" in sphinx["extensions"] and sphinx["nb_ipywidgets_js"] == {}
    assert config["execute"]["execute_notebooks"] == "off" and config["only_build_toc_files"]
    own = "".join(path.read_text() for path in (BOOK / "_static").glob("*.css"))
    assert "http" not in own and "@import" not in own


def test_the_workflow_checks_and_publishes_what_make_builds():
    workflow = yaml.safe_load((ROOT / ".github/workflows/book.yml").read_text())
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    made = [step["run"] for step in steps if step.get("run", "").startswith("make")]
    assert [command.split()[1] for command in made] == ["check-book", "check-links"]
    used = [step["uses"] for step in steps if "uses" in step]
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", name) for name in used)
    folders = {
        step["uses"].split("/")[1]: step["with"].get("path")
        for step in steps
        if "upload" in step.get("uses", "")
    }
    assert folders == {"upload-artifact@v4": "_build/screenshots", "upload-pages-artifact@v3": "_build/html"}
    copied = next(step["run"] for step in steps if step.get("run", "").startswith("cp"))
    assert "_build/singlehtml _build/html/single" in copied and "_build/dvirl.pdf" in copied
    makefile = (ROOT / "Makefile").read_text()
    builds = re.findall(r"jupyter-book build .*$", makefile, re.M)
    assert all("--config book/_config.yml" in line for line in builds) and "--builder linkcheck" in builds[-1]
    assert [line.endswith(" -W -n --keep-going") for line in builds] == [True, True, False]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert "book" in extras and "'.[dev,book]'" in makefile


@pytest.mark.parametrize("target", ["check-book", "book-pdf"])
def test_a_missing_browser_is_one_sentence_before_anything_is_built(tmp_path, target):
    for name in (".ready", ".book"):
        (tmp_path / name).touch()
    free = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    asked = ["make", target, f"VENV={tmp_path}", "CHROMIUM=/nowhere/chromium"]
    result = subprocess.run(asked, cwd=ROOT, env=free, capture_output=True, text=True)
    assert result.returncode == 2
    assert (
        result.stdout == f"make {target} needs Chromium; apt-get install chromium, or CHROMIUM=/path/to/it\n"
    )


def test_the_browser_is_asked_for_by_make_check_book_alone():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["pytest"]["ini_options"]["testpaths"] == ["tests"]
    recipes = re.findall(r"^\t.*pytest (\S+)", (ROOT / "Makefile").read_text(), re.M)
    assert recipes.count("tests_browser") == 1 and "tests" in recipes
