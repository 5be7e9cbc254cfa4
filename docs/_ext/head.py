"""What a page's head tells search engines, shared links and, for 404.html, the browser.

`sphinxext-opengraph` writes formulas into a description as LaTeX, and an address for a site without
one. `sphinx-notfound-page` wants links from the root of a host, which no file system has.
"""

from __future__ import annotations

from html import escape
from textwrap import shorten
from typing import Any

from docutils import nodes
from mathml import plain, to_mathml
from sphinx.application import Sphinx

LENGTH = 200  # characters of a description that search engines and previews show


def describe(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """Add a page's title and description, and where its links start if it can be anywhere."""
    title = app.env.titles[page].astext() if doctree else context.get("title", "")
    tags = {"og:type": "article", "og:site_name": app.config.project, "og:title": title}
    if doctree and (text := opening(doctree)):
        tags |= {"description": text, "og:description": text}
    if app.config.html_baseurl:
        tags["og:url"] = context["pageurl"]
    head = [
        f'<meta {"property" if name.startswith("og:") else "name"}="{name}" '
        f'content="{escape(content)}" />'
        for name, content in tags.items()
    ]
    if page == "404":
        head.append('<meta name="robots" content="noindex" />')
        if app.config.html_baseurl:
            head.insert(0, f'<base href="{escape(app.config.html_baseurl)}" />')
    context["metatags"] = "\n    ".join([*head, context.get("metatags", "")])


def opening(doctree: nodes.document) -> str:
    """A page's first paragraph of prose, as one line of plain text."""
    for paragraph in doctree.findall(nodes.paragraph):
        if isinstance(paragraph.parent, nodes.section | nodes.container):
            copy = paragraph.deepcopy()
            for formula in list(copy.findall(nodes.math)):
                text = plain(to_mathml(formula.astext(), display=False))
                formula.parent.replace(formula, nodes.Text(text))
            return shorten(copy.astext(), LENGTH, placeholder=" …")
    return ""


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect to the writing of each page."""
    app.connect("html-page-context", describe)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
