"""The directive `themed-image`: an SVG, and its copy for the dark theme.

With the option `explore`, the reader can move the figure: the script `explore.js` puts a drawing
with controls in the place of both images. The option is the kind of figure, the directive's content
its data as JSON. The data stand in the page itself, since browsers let no script read another file
from the file system, and for the same reason the script is no module. Without scripts, the images
stay.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from figures import dark
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

MOVES = "explore"  # the class of the box around a figure that the reader can move
WIDE = 600  # pixels, beyond which a phone would shrink a figure's words too far
#: The classes of the box in which a phone scrolls a wide figure. The theme lets the keyboard reach
#: what scrolls in a box of the first class, which is the one for tables.
SCROLLS = ["pst-scrollable-table-container", "wide-figure"]


class ThemedImage(SphinxDirective):
    """Show an SVG drawn in black on white; its dark copy is written beside it."""

    required_arguments = 1
    has_content = True
    option_spec: ClassVar = {
        "alt": directives.unchanged_required,
        "explore": directives.class_option,
    }

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
        images = [
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
        if bool(self.content) != ("explore" in self.options):
            raise self.error(f"{address} needs both :explore: and its data, or none of them.")
        if not self.content:
            return [nodes.container("", *images, classes=SCROLLS)] if int(width) > WIDE else images
        (kind,) = self.options["explore"]
        # Without a "<", nothing in the data can end the script.
        data = json.dumps(json.loads("\n".join(self.content))).replace("<", r"\u003c")
        script = f'<script type="application/json" data-explore="{kind}">{data}</script>'
        return [nodes.container("", *images, nodes.raw("", script, format="html"), classes=[MOVES])]


def load_script(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """Load the script on the pages that have a figure to move, and on no other."""
    if doctree and any(MOVES in box["classes"] for box in doctree.findall(nodes.container)):
        app.add_js_file("explore.js", loading_method="defer")


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive, and load its script where it is needed."""
    app.add_directive("themed-image", ThemedImage)
    app.connect("html-page-context", load_script)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
