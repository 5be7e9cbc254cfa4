"""The directive `defaults`: the arguments of a signature, and their defaults, in one paragraph.

Autodoc's directives show a whole docstring below a signature, which a page to print has no room
for.
"""

from __future__ import annotations

import inspect
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import cgn_tutorial


class Defaults(SphinxDirective):
    """Show the defaults of a function or class of the package: `.. defaults:: cg`."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Write them."""
        name = self.arguments[0]
        documented = getattr(cgn_tutorial, name)
        arguments = inspect.signature(documented).parameters.values()
        shown = ", ".join(
            f"`{a.name}={a.default!r}`" for a in arguments if a.default is not a.empty
        )
        role = "class" if inspect.isclass(documented) else "func"
        return self.parse_text_to_nodes(f":{role}:`~cgn_tutorial.{name}`: {shown}")


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive."""
    app.add_directive("defaults", Defaults)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
