"""Every page that `make book` and `make book-page` built, as a browser shows it: wide and narrow, light and dark."""

from __future__ import annotations

import os
import re
from html import unescape
from pathlib import Path
from unicodedata import normalize

import pytest
import yaml
from chromium import until
from conftest import BUILT
from faults import Anchors, broken_links, noise, seen
from pypdf import PdfReader

ROOT = Path(__file__).parents[1]
HTML, SINGLE = BUILT / "html", BUILT / "singlehtml"
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text())
LISTED = [TOC["root"], *(chapter["file"] for part in TOC["parts"] for chapter in part["chapters"])]
PAGES = [*(f"html/{name}.html" for name in (*LISTED, "genindex", "py-modindex")), "singlehtml/index.html"]
LOOKS = [(1280, False), (1280, True), (390, False), (390, True)]


@pytest.mark.parametrize("origin", ["http", "file"])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_well(page, origins, name, origin):
    found = {}
    for width, dark in LOOKS:
        page.look(width, dark)
        page.open(origins[origin] + name)
        found[f"{width} px, {'dark' if dark else 'light'}"] = seen(page, origins[origin])
        if origin == "http":
            shot = f"{name.removesuffix('.html')}-{width}{'-dark' if dark else ''}.png"
            page.screenshot(BUILT / "screenshots" / shot)
    assert not any(found.values()), found


def test_the_first_page_leads_to_the_introduction(page, origins):
    page.look(1280, False)
    page.call("Page.navigate", url=origins["http"] + "html/")
    page.settle(origins["http"] + "html/book/intro.html")
    assert page.js("document.querySelector('h1').innerText")


def test_equations_and_figures_are_there(page, origins):
    page.look(1280, False)
    page.open(origins["http"] + "html/book/method.html")
    assert page.js("document.querySelectorAll('mjx-container[display=true]').length") > 10
    page.open(origins["http"] + "html/notebooks/01_early_exit.html")
    assert page.js("document.querySelectorAll('.cell_output img').length") >= 3
    assert page.js("document.querySelectorAll('.cell_output span[style*=background]').length") > 20


@pytest.mark.parametrize("name", [name for name in PAGES if name.startswith("html/")])
def test_the_table_of_contents_leads_everywhere(page, origins, name):
    page.look(1280, False)
    page.open(origins["http"] + name)
    links = page.js(
        "[...document.querySelectorAll('nav.bd-links a[href]')].map(link => link.href.split('#')[0])"
    )
    assert {link.removeprefix(f"{origins['http']}html/") for link in links} == {
        f"{entry}.html" for entry in LISTED
    }


def test_every_link_leads_to_a_page_and_a_place():
    assert not broken_links(HTML) and not broken_links(SINGLE)
    assert sum(len(Anchors(HTML / f"{name}.html").links) for name in LISTED) > 1000


def test_no_page_names_a_folder_of_the_machine_that_built_it():
    pages = [path for folder in (HTML, SINGLE) for path in folder.rglob("*.html")]
    assert len(pages) > len(LISTED)
    assert not [
        path
        for path in pages
        if str(ROOT) in path.read_text() or str(Path.home()) + os.sep in path.read_text()
    ]


@pytest.mark.parametrize("origin", ["http", "file"])
def test_a_reader_finds_reinforce(page, origins, origin):
    page.look(1280, False)
    page.open(origins[origin] + "html/book/intro.html")
    page.js("""(() => {
        const field = [...document.querySelectorAll('input[name=q]')].at(-1);
        field.value = 'REINFORCE';
        field.form.requestSubmit();
    })()""")
    page.settle(f"{origins[origin]}html/search.html?q=REINFORCE")
    assert until(
        lambda: page.js("/finished, found/.test(document.querySelector('.search-summary')?.innerText)")
    )
    links = page.js("[...document.querySelectorAll('#search-results li a')].map(link => link.href)")
    assert f"{origins[origin]}html/book/method.html" in [re.split("[?#]", link)[0] for link in links]
    if origin == "http":  # from files the summaries of what was found cannot be read
        page.settle(page.js("location.href"))
        assert not noise(page, origins[origin])
    page.open(links[0])
    assert page.js("/reinforce/i.test(document.querySelector('article').innerText)")


def test_the_pdf_has_every_chapter():
    path = BUILT / "dvirl.pdf"
    pages = [" ".join(page.extract_text().split()) for page in PdfReader(path).pages]
    assert len(pages) > 20 and path.stat().st_size > 1e5
    assert sum(len(text) < 20 for text in pages) < len(pages) / 20  # full figures apart, no empty sheets
    titles = [re.search("<title>(.*?) +&#8212;", (HTML / f"{name}.html").read_text())[1] for name in LISTED]
    text = normalize("NFKC", " ".join(pages))  # without ligatures
    assert not [title for title in map(unescape, titles) if title not in text]
