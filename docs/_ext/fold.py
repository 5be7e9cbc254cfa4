"""Parts of a page that open when asked to, `<details>`: code beside the argument, and answers.

On a page of the gallery, code that begins with a comment is folded under it, with its output where
that is long. So is the source of a long function that a page prints. The directive `fold` folds
what a page says:

    .. fold:: Why does the step have no minus sign?

       The answer.

No script is needed; browsers open a fold in which they find what the reader searches for.
"""

from __future__ import annotations

import re
from textwrap import dedent
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.writers.html5 import HTML5Translator

LONG = 25  # lines of an output, beyond which it may fold


class fold(nodes.container):  # type: ignore[misc]  # noqa: N801, as docutils names nodes
    """What opens, below a `fold_line`."""


class fold_line(nodes.TextElement):  # type: ignore[misc]  # noqa: N801
    """The line that stays: what is folded."""


class Fold(SphinxDirective):
    """Fold the content under the argument, a line of text."""

    required_arguments = 1
    final_argument_whitespace = True
    has_content = True

    def run(self) -> list[nodes.Node]:
        """Parse the line and the content."""
        text = " ".join(self.arguments[0].split())
        inline, messages = self.state.inline_text(text, self.lineno)
        return [fold("", fold_line(text, "", *inline), *self.parse_content_to_nodes(), *messages)]


def fold_code(app: Sphinx, doctree: nodes.document) -> None:
    """Fold code that begins with a comment, and what is long, on the pages of the gallery."""
    if not app.env.current_document.docname.startswith("auto_examples/plot_"):
        return
    below_a_fold = False
    for block in list(doctree.findall(nodes.literal_block)):
        source = block.astext().strip("\n")
        length = len(source.splitlines())
        title = ""
        if block.get("language") == "Python":
            comment = re.match(r"(?:# .*\n)+", source)
            title = " ".join(re.findall(r"# (.*)\n", comment[0])) if comment else ""
            below_a_fold = bool(comment)
        elif length > LONG:
            function = re.match(r"\s*def (\w+)", source)
            if function:
                title = f"Source of {function[1]}, {length} lines"
            elif below_a_fold:
                title = f"Output, {length} lines"
        if title:
            folded = fold("", fold_line("", "", nodes.Text(title.rstrip("."))))
            block.replace_self(folded)
            folded += block


def to_html(text: str) -> str:
    """A page's text with folds as the HTML that notebooks take within their Markdown."""
    pattern = r"^\.\. fold:: (.+(?:\n   +\S.*)*)\n\n((?:   .*(?:\n|\Z)|\n)+)"
    return re.sub(
        pattern,
        lambda match: (
            f"<details><summary>{' '.join(match[1].split())}</summary>\n\n"
            f"{dedent(match[2]).strip()}\n\n</details>\n\n"
        ),
        text,
        flags=re.MULTILINE,
    )


def visit_fold(self: HTML5Translator, node: fold) -> None:
    """Open the element."""
    self.body.append('<details class="fold">\n')


def depart_fold(self: HTML5Translator, node: fold) -> None:
    """Close the element."""
    self.body.append("</details>\n")


def visit_line(self: HTML5Translator, node: fold_line) -> None:
    """Open the line."""
    self.body.append("<summary>")


def depart_line(self: HTML5Translator, node: fold_line) -> None:
    """Close the line."""
    self.body.append("</summary>\n")


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive, the elements, and what folds code."""
    app.add_node(fold, html=(visit_fold, depart_fold))
    app.add_node(fold_line, html=(visit_line, depart_line))
    app.add_directive("fold", Fold)
    app.connect("doctree-read", fold_code)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
