"""The checks themselves: pages with one fault each are found out, and a page without any is not."""

from __future__ import annotations

import shutil
import socket
import struct
import zlib

import pytest
from chromium import serving
from conftest import BUILT
from faults import broken_links, seen

WELL = """<!doctype html><html><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<link rel="icon" href="data:,"><script>window.MathJax = {options: {processHtmlClass: "math"}}</script>
<script defer src="mathjax/tex-chtml.js"></script>
<style>@media (prefers-color-scheme: dark) { body { background: #111; color: #eee } .pale { color: #222 } }</style>
</head><body><h1 id="top">A page</h1><p>that is <a href="#top" style="color: inherit">well</a>, with
<span class="math">\\(x^2\\)</span>.</p><img src="two.png" width="20"></body></html>"""

FAULTS = {
    "console error": ("</body>", "<script>console.error('broken')</script></body>", "console error: ['broken']"),
    "console warning": ("</body>", "<script>console.warn('old')</script></body>", "console warning: ['old']"),
    "exception": ("</body>", "<script>nothing.there()</script></body>", "exception: ReferenceError: nothing"),
    "rejected promise": ("</body>", "<script>Promise.reject(Error('no'))</script></body>", "exception: Error: no"),
    "missing script": ("</head>", '<script src="none.js"></script></head>', "none.js gave 404"),
    "foreign script": ("</head>", '<script src="https://cdn.example.org/a.js"></script></head>', "foreign: https://cdn"),
    "foreign font": ("</style>", "@font-face { font-family: F; src: url(http://fonts.example.org/f) } h1 { font: 9px F }"
                     "</style>", "foreign: http://fonts"),
    "foreign picture": ('"two.png"', '"https://badge.example.org/b.svg"', "foreign: https://badge"),
    "missing picture": ('"two.png"', '"none.png"', "none.png is not loaded"),
    "blank picture": ('"two.png"', '"one.png"', "one.png is blank"),
    "hidden text": ("<body>", '<body style="visibility: hidden">', "the text is hidden"),
    "no text": ("<body>", "<body><article></article>", "the text is hidden"),
    "narrow text": ("<body>", '<body style="width: 300px">', "the text is hidden, empty or narrow"),
    "too wide": ("<h1", '<pre style="width: 1400px">wide</pre><h1', "page is 14"),
    "code cut off": ("<h1", '<pre style="width: 200px; overflow: auto">one two three four five six seven</pre><h1',
                     'pre "one two three four five six seven" is cut off'),
    "table cut off": ("<h1", '<div style="width: 90px; overflow-x: auto"><table><td>wide_as_a_table_may_be</table></div><h1',
                      'table "wide_as_a_table_may_be" is cut off'),
    "closed code cut off": ("<h1", '<details><summary>code</summary><pre style="width: 90px; overflow: hidden">'
                            "import everything.at.once</pre></details><h1", 'pre "import everything.at.once" is cut off'),
    "equation without MathJax": ('<script defer src="mathjax/tex-chtml.js"></script>', "", "x^2\\) is not set"),
    "equation without an end": ("x^2", "\\frac{x", "is not set"),
    "equation with a mistake": ("x^2", "\\frac", "has an error: Missing argument"),
    "equation with an unknown word": ("x^2", "\\nosuch", "has an error"),
    "faint text": ("<h1", '<b style="color: #999; background: #aaa">hardly</b><h1', 'text "hardly" is faint'),
    "faint on its parent's ground": ("<h1", '<p style="background: #fff"><b style="color: #ffffff80">a</b></p><h1',
                                     'text "a" is faint'),
    "faded text": ("<h1", '<p style="opacity: 0.3">faded</p><h1', 'text "faded" is faint'),
}  # fmt: skip


def png(pixels):
    """A picture of one row of grey pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", len(pixels), 1, 8, 0, 0, 0, 0)
    row = zlib.compress(b"\0" + bytes(pixels))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", row) + chunk(b"IEND", b"")


@pytest.fixture(autouse=True)
def impatient(page, monkeypatch):
    """Pages that never get ready are not waited for long."""
    monkeypatch.setattr(page, "patience", 3)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with what the page needs, and its address."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(BUILT / "html/_static/mathjax", folder / "mathjax")
    (folder / "one.png").write_bytes(png([7] * 60))
    (folder / "two.png").write_bytes(png([0, 255] * 30))
    with serving(folder) as address:
        yield folder, address


def problems(page, site, text, width=1280, dark=False):
    """What the checks say of a text as a page, read by HTTP and as a file."""
    folder, address = site
    (folder / "page.html").write_text(text)
    page.look(width, dark)
    found = []
    for origin in (address, f"{folder.as_uri()}/"):
        page.open(f"{origin}page.html")
        found.append(seen(page, origin))
    return found


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_a_page_without_faults_has_none(page, site, width, dark):
    assert problems(page, site, WELL, width, dark) == [[], []]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(page, site, fault):
    old, new, says = FAULTS[fault]
    assert WELL.count(old) == 1
    by_http, as_file = problems(page, site, WELL.replace(old, new))
    assert any(says in sentence for sentence in by_http), by_http
    assert as_file or "blank" in fault


def test_phones_may_scroll_what_is_wide_and_closed_code_stays_closed(page, site):
    text = WELL.replace(
        "<h1", '<details><pre style="width: 90px; overflow: auto">wide as a table</pre></details><h1'
    )
    assert problems(page, site, text, width=390) == [[], []]
    assert "is cut off" in problems(page, site, text)[0][0]
    assert not page.js("document.querySelector('details').open")


def test_a_picture_that_never_comes_is_found(page, site):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = "http://{}:{}/".format(*silent.getsockname())
        found = problems(page, site, WELL.replace("two.png", address))[0]
    assert (
        "the page was not ready in time" in found
        and f"still loading: {address}" in found
        and f"foreign: {address}" in found
    )


def test_what_is_wrong_on_phones_or_in_the_dark_alone(page, site):
    text = WELL.replace("<h1", '<p class="pale" style="width: 700px">words</p><h1')
    assert problems(page, site, text)[0] == []
    assert "page is 7" in problems(page, site, text, width=390)[0][0]
    assert 'text "words" is faint' in problems(page, site, text, dark=True)[0][0]


@pytest.mark.parametrize(
    ("body", "says"),
    [('<a href="two.html#there">1</a><a href="#here">2</a><i id="here"></i><a href="https://a.org/x#y">3</a>', []),
     ('<a href="#gone">1</a>', ["one.html: #gone leads to no place on that page"]),
     ('<a href="two.html#gone">1</a>', ["one.html: two.html#gone leads to no place on that page"]),
     ('<a href="three.html">1</a>', ["one.html: three.html leads to no file"]),
     ('<form action="search.html"></form>', ["one.html: search.html leads to no file"]),
     ('<img src="../outside.png">', ["one.html: ../outside.png leads to no file"])],
)  # fmt: skip
def test_broken_links_are_found(tmp_path, body, says):
    folder = tmp_path / "site"
    folder.mkdir()
    (tmp_path / "outside.png").touch()
    (folder / "one.html").write_text(body)
    (folder / "two.html").write_text('<a id="there" href="one.html"></a>')
    assert broken_links(folder) == says
