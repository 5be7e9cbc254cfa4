"""Tables too wide for a phone, which it shows as a list: each cell tells the name of its column.

The names are attributes, `data-label`, that the style sheet shows on narrow screens alone.
"""

from __future__ import annotations

import re
from html import escape, unescape
from statistics import mean
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

PROSE = 12  # characters of a cell, in the mean, beyond which a table is prose
FIT = 6  # columns of numbers that a phone has room for


def words(html: str) -> str:
    """The text of a piece of HTML."""
    return " ".join(unescape(re.sub(r"<[^>]*>", "", html)).split())


def label(table: str) -> str:
    """A table whose cells tell their columns, if these are many, or three and more of prose."""
    heads = [words(head) for head in re.findall(r"<th\b.*?</th>", table, re.DOTALL)]
    cells = re.findall(r"<td\b.*?</td>", table, re.DOTALL)
    if len(heads) <= 2 or not cells or len(cells) % len(heads):
        return table
    if len(heads) <= FIT and mean(len(words(cell)) for cell in cells) < PROSE:
        return table
    names = iter(heads * (len(cells) // len(heads)))

    def tell(cell: re.Match[str]) -> str:
        name = next(names)
        if name == heads[0] and not re.fullmatch(r"[\d.,%]+", words(cell[0])):
            return cell[0]  # a row's own name
        return cell[0].replace("<td", f'<td data-label="{escape(name)}"', 1)

    labelled = re.sub(r"<td\b.*?</td>", tell, table, flags=re.DOTALL)
    return re.sub(r'<table class="', '<table class="stacked ', labelled, count=1)


def label_tables(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """Label the tables of a page."""
    if "body" in context:
        context["body"] = re.sub(
            r"<table\b.*?</table>", lambda table: label(table[0]), context["body"], flags=re.DOTALL
        )


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect to the writing of each page."""
    app.connect("html-page-context", label_tables)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
