"""What a page shows is whole and large enough to read: on a wide screen, and on a phone.

A page is opened once, and its window changes its width.
"""

import re
from urllib.parse import urlsplit
from xml.etree import ElementTree

from conftest import SITE
from test_pages import written_pages

WIDE, PHONE = 1280, 390
SMALLEST = 9  # pixels of a letter's font
SVG = "{http://www.w3.org/2000/svg}"

OPEN_ALL = """
() => { for (const fold of document.querySelectorAll("details.fold")) fold.open = true; }
"""

#: The boxes whose contents are wider, with all folds open. Rows of an output that wrap are broken,
#: too: one line of text stays one line.
CUT = """
(selector) => [...document.querySelectorAll(selector)].filter((box) => {
  if (!box.getClientRects().length) return false;
  const before = box.style.whiteSpace;
  if (box.matches("pre")) box.style.whiteSpace = "pre";
  const cut = box.scrollWidth > box.clientWidth + 1;
  box.style.whiteSpace = before;
  return cut;
}).map((box) => `${box.scrollWidth} in ${box.clientWidth}: ${box.textContent.trim()}`)
"""
COUNT = "(selector) => document.querySelectorAll(selector).length"
TABLES = "main .pst-scrollable-table-container:has(table)"
OUTPUTS = ".sphx-glr-script-out pre"
EVERYTHING = f"main pre, main div.highlight, {TABLES}, main .math-block"

#: Whether the page itself scrolls sideways.
SCROLLS = """
() => Math.max(...[
  ...document.querySelectorAll("html, body, main, main *:has(article), article"),
].map((element) => element.scrollWidth - element.clientWidth)) > 0
"""

#: Every picture with its width, and whether it shows whole, or in a box that scrolls.
PICTURES = """
() => [...document.querySelectorAll("article img.only-light")]
  .filter((image) => image.getClientRects().length).map((image) => {
    const box = image.closest(".wide-figure") ?? image.parentElement;
    return {
      source: image.src,
      width: image.getBoundingClientRect().width,
      whole: image.getBoundingClientRect().right <= document.documentElement.clientWidth,
      scrolls: getComputedStyle(box).overflowX === "auto",
    };
  })
"""

#: The size of the words in figures that the reader moves.
MOVING = """
() => [...document.querySelectorAll(".explore > svg text")].map((text) =>
  parseFloat(getComputedStyle(text).fontSize) * text.ownerSVGElement.getScreenCTM().a)
"""

#: The size of an output's letters.
LETTERS = """
(selector) => [...document.querySelectorAll(selector)].map(
  (box) => parseFloat(getComputedStyle(box).fontSize))
"""


def at(page, width):
    page.set_viewport_size({"width": width, "height": 900})
    page.evaluate(OPEN_ALL)
    assert not page.evaluate(SCROLLS), "the page scrolls sideways"


@written_pages
def test_nothing_is_cut(opened, tally):
    at(opened, WIDE)
    assert opened.evaluate(CUT, EVERYTHING) == []
    tally("wide: outputs, listings, tables and formulas that show whole")
    at(opened, PHONE)
    assert opened.evaluate(CUT, f"{OUTPUTS}, {TABLES}") == []
    for what, selector in (("outputs", OUTPUTS), ("tables", TABLES)):
        if count := opened.evaluate(COUNT, selector):
            tally(f"{what} on a phone: whole", count)
    assert min(opened.evaluate(LETTERS, OUTPUTS), default=SMALLEST) >= SMALLEST


def sizes(drawing):
    """The size of each text of a figure in the figure's own units, in which its width is given.

    Matplotlib draws letters as outlines: 100 units are the font's size, a text's group scales them.
    Indices and exponents are smaller by nature; their text counts.
    """
    found = {}
    for text in drawing.iter(f"{SVG}g"):
        if text.get("id", "").startswith("text_"):
            assert not [*text.iter(f"{SVG}text")], "letters that are no outlines"
            scale = re.search(r"scale\((\S+) ", " ".join(g.get("transform", "") for g in text))
            if scale:  # an empty text has none
                found[text.get("id")] = 100 * float(scale[1])
    return found


@written_pages
def test_words_in_figures_are_large_enough(opened, tally):
    at(opened, PHONE)
    for picture in opened.evaluate(PICTURES):
        assert picture["whole"] or picture["scrolls"], picture
        name = urlsplit(picture["source"]).path.lstrip("/")
        drawing = ElementTree.parse(SITE / name).getroot()
        width = float(drawing.get("viewBox").split()[2])
        unit = picture["width"] / width
        assert {
            word: round(size * unit, 2)
            for word, size in sizes(drawing).items()
            if size * unit < SMALLEST
        } == {}, name
        tally("figures on a phone: words of 9 pixels")
    moving = opened.evaluate(MOVING)
    assert min(moving, default=SMALLEST) >= SMALLEST
