"""The directive `promises`: the promises that a file of tests checks, as its tests are named."""

from __future__ import annotations

import ast
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class Promises(SphinxDirective):
    """List the names of a file's tests as sentences: `test_zero_b_costs_nothing` is a promise."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Read the tests, and write one item each."""
        relative, path = self.env.relfn2path(self.arguments[0])
        self.env.note_dependency(relative)
        with open(path, encoding="utf-8") as file:
            functions = [x for x in ast.parse(file.read()).body if isinstance(x, ast.FunctionDef)]
        promises = nodes.bullet_list()
        for name in (function.name for function in functions):
            if not name.startswith("test_"):
                continue
            sentence = name.removeprefix("test_").replace("_", " ")
            promises += nodes.list_item(
                "", nodes.paragraph(text=sentence[0].upper() + sentence[1:])
            )
        return [promises]


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive."""
    app.add_directive("promises", Promises)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
