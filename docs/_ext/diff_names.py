"""Diffs name their files without the folders of the machine that builds the site."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx


def shorten(app: Sphinx, doctree: nodes.document) -> None:
    """Keep of the two names at the head of each diff what stands behind the last slash."""
    for block in doctree.findall(nodes.literal_block):
        if block.get("language") == "udiff":
            head = r"\A(--- )\S*/(\S+)(.*\n\+\+\+ )\S*/(\S+)"
            block.rawsource = re.sub(head, r"\1\2\3\4", block.astext())
            block.children = [nodes.Text(block.rawsource)]


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect to the reading of pages."""
    app.connect("doctree-read", shorten)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
