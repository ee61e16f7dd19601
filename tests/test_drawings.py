"""The book's drawings: said in words, light and dark, with text that can be read, and nothing loaded from elsewhere."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

BOOK = Path(__file__).parents[1] / "book"
DRAWINGS = sorted((BOOK / "figures").glob("*.svg"))
SVG = "{http://www.w3.org/2000/svg}"
CONTRAST = 4.5
"""Of text on its ground, as WCAG 2 counts it, for level AA."""


def palettes(drawing):
    """Its colours by name, on a light and on a dark page."""
    light, dark = drawing.read_text().split("prefers-color-scheme: dark")
    named = [dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", text)) for text in (light, dark)]
    assert named[0].keys() == named[1].keys()
    return named


def luminance(colour):
    """Of `#rrggbb`, by WCAG 2."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(share * part for share, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    dim, bright = sorted(map(luminance, (one, other)))
    return (bright + 0.05) / (dim + 0.05)


def test_contrast_is_that_of_the_standard():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


def test_the_loop_the_split_model_and_the_chains_are_drawn_and_shown():
    assert {path.stem for path in DRAWINGS} == {"loop", "split-model", "chains"}
    method = (BOOK / "method.md").read_text()
    assert all(f"figures/{path.name}\n:alt: " in method for path in DRAWINGS)
    for page in (BOOK / "intro.md", BOOK.parent / "README.md"):
        shown = re.findall(r"figures/[\w-]+\.(?:svg|png)", page.read_text())
        assert shown[0] == "figures/loop.svg"


@pytest.mark.parametrize("drawing", DRAWINGS, ids=lambda path: path.stem)
def test_a_drawing_is_said_in_words_and_loads_nothing(drawing):
    root = ElementTree.parse(drawing).getroot()
    assert root.get("role") == "img" and root.get("aria-labelledby") == "title desc"
    assert len(root.find(f"{SVG}title").text) > 15 and len(root.find(f"{SVG}desc").text) > 100
    text = drawing.read_text().replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"https?:|@import|<script|<image", text)


@pytest.mark.parametrize("drawing", DRAWINGS, ids=lambda path: path.stem)
def test_text_can_be_read_on_every_ground_in_both_looks(drawing):
    for colours in palettes(drawing):
        grounds = [colours[name] for name in ("panel", "draft", "verify", "learn", "yes", "no", "open")]
        assert min(contrast(colours["text"], ground) for ground in grounds) >= CONTRAST
        boxes = [colours[name] for name in ("panel", "draft", "verify", "learn")]
        assert min(contrast(colours["soft"], ground) for ground in boxes) >= CONTRAST


@pytest.mark.parametrize("drawing", DRAWINGS, ids=lambda path: path.stem)
def test_text_is_large_enough_on_a_phone(drawing):
    width = float(ElementTree.parse(drawing).getroot().get("viewBox").split()[2])
    sizes = [float(size) for size in re.findall(r"font(?:-size)?: ([\d.]+)px", drawing.read_text())]
    assert len(sizes) == 3 and min(sizes) * 358 / width > 9.5  # a page of 390 px has 358 for its text
