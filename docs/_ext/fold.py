"""Parts of a page that open when asked to, `<details>`: code beside the argument, and answers.

On a page of the gallery, code that begins with a comment is folded under it, with its output where
that is long. So is the source of a long function that a page prints. The directive `fold` folds
what a page says, and a notebook gets it as HTML:

    .. fold:: Why does the step have no minus sign?

       The answer.

No script is needed; browsers open a fold in which they find what the reader searches for. Sphinx's
own, an admonition with `:collapsible:`, is a box with a frame, a shadow and a sign, which the theme
would have to be told to leave out; the one of sphinx-design loads a stylesheet and a script.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from textwrap import dedent
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

LONG = 25  # lines of an output, beyond which it may fold


def fold(line: Iterable[nodes.Node], content: Iterable[nodes.Node]) -> list[nodes.Node]:
    """The content, folded under the line, which stays."""
    opened, between, closed = (
        nodes.raw("", html, format="html")
        for html in ('<details class="fold">\n<summary>', "</summary>\n", "</details>\n")
    )
    return [opened, *line, between, *content, closed]


class Fold(SphinxDirective):
    """Fold the content under the argument, a line of text."""

    required_arguments = 1
    final_argument_whitespace = True
    has_content = True

    def run(self) -> list[nodes.Node]:
        """Parse the line and the content."""
        line, messages = self.parse_inline(" ".join(self.arguments[0].split()))
        return fold(line, [*self.parse_content_to_nodes(), *messages])


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
            block.parent.replace(block, fold([nodes.Text(title.rstrip("."))], [block]))


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


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive, and what folds code."""
    app.add_directive("fold", Fold)
    app.connect("doctree-read", fold_code)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
