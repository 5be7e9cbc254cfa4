"""The directive `backpack-support`: what BackPACK and autograd make of layers, or of losses."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from tried import LAYERS, LOSSES, verdicts


class BackpackSupport(SphinxDirective):
    """A table of verdicts, of the layers or of the losses."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Try all cases."""
        cases = {"layers": LAYERS, "losses": LOSSES}[self.arguments[0]]
        lines = [".. list-table::", "   :header-rows: 1", ""]
        rows = [["", "BackPACK's `GGNMP`", "`HMP`", "`PCHMP`", "autograd's `GGN`", "`Hessian`"]]
        rows[0] += ["What is said where it raises"]
        rows += [[name, *verdicts(case).values()] for name, case in cases.items()]
        for row in rows:
            lines += [f"   {'*' if i == 0 else ' '} - {cell}" for i, cell in enumerate(row)]
        return self.parse_text_to_nodes("\n".join(lines))


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive."""
    app.add_directive("backpack-support", BackpackSupport)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
