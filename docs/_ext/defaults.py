"""The directive `defaults`: the arguments of a signature, and their defaults."""

from __future__ import annotations

import inspect
import math
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import cgn_tutorial


def defaults(name: str) -> dict[str, str]:
    """The arguments of a function or class of the package that have a default, and the default."""
    written = {}
    for argument in inspect.signature(getattr(cgn_tutorial, name)).parameters.values():
        if argument.default is not argument.empty:
            value = argument.default
            written[argument.name] = "inf" if value == math.inf else repr(value)
    return written


class Defaults(SphinxDirective):
    """Show the defaults of a function or class of the package: `.. defaults:: cg`."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Write them in one paragraph."""
        name = self.arguments[0]
        shown = ", ".join(f"`{key}={value}`" for key, value in defaults(name).items())
        role = "class" if inspect.isclass(getattr(cgn_tutorial, name)) else "func"
        return self.parse_text_to_nodes(f":{role}:`~cgn_tutorial.{name}`: {shown}")


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive."""
    app.add_directive("defaults", Defaults)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
