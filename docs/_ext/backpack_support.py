"""The directive `backpack-support`: what became of the trials in trials.py."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from trials import CASES, errors, table


class Support(SphinxDirective):
    """The table of layers or of losses, the errors, or the versions that were tried."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Try everything, and write what became of it."""
        kind = self.arguments[0]
        if kind in CASES:
            return self.parse_text_to_nodes(table(kind))
        if kind == "errors":
            return self.parse_text_to_nodes(errors())
        if kind == "versions":
            versions = version("backpack-for-pytorch"), version("torch").partition("+")[0]
            return self.parse_text_to_nodes(
                "Tried with BackPACK {} and torch {}.".format(*versions)
            )
        raise self.error(f"backpack-support shows layers, losses, errors or versions, not {kind}.")


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive."""
    app.add_directive("backpack-support", Support)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
