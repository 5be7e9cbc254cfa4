"""The directive `themed-image`: an SVG, and its copy for the dark theme."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from figures import dark
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class ThemedImage(SphinxDirective):
    """Show an SVG drawn in black on white; its dark copy is written beside it."""

    required_arguments = 1
    option_spec: ClassVar = {"alt": directives.unchanged_required}

    def run(self) -> list[nodes.Node]:
        """Write the dark copy, and show both images, of which the theme hides one."""
        address = self.arguments[0]
        if "alt" not in self.options:
            raise self.error(f"{address} needs :alt:, a description for who cannot see it.")
        relative, path = self.env.relfn2path(address)
        svg = Path(path).read_text("utf-8")
        size = re.search(r'<svg [^>]*?width="([\d.]+)pt" height="([\d.]+)pt"', svg)
        if not size:
            raise self.error(f"{address} does not say its width and height in points.")
        width, height = (str(round(float(points) * 4 / 3)) for points in size.groups())

        copy = Path(path).with_suffix(".dark.svg")
        if not copy.exists() or copy.read_text("utf-8") != dark(svg):
            copy.write_text(dark(svg), "utf-8")
        addresses = {"only-light": f"/{relative}", "only-dark": f"/{relative[:-4]}.dark.svg"}
        return [
            nodes.image(
                uri=uri,
                classes=[theme],
                alt=" ".join(self.options["alt"].split()),
                width=width,  # the page keeps its place until the image comes into view
                height=height,
                loading="lazy",
            )
            for theme, uri in addresses.items()
        ]


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive."""
    app.add_directive("themed-image", ThemedImage)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
