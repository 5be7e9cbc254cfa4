"""The gallery runs its pages again when the package changed, and highlights code they print."""

from __future__ import annotations

import ast
import hashlib
from pathlib import Path
from textwrap import dedent
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

PACKAGE = Path(__file__).parents[2] / "src" / "cgn_tutorial"


def forget_results(app: Sphinx) -> None:
    """Make every page run again if the package's source is not what the pages last ran with.

    Sphinx-Gallery compares each page's own text with the sum it left beside its result, and runs
    those that differ; it knows nothing of what the pages import.
    """
    gallery = Path(app.srcdir) / "auto_examples"
    stamp = gallery / ".package"
    digest = hashlib.sha256(
        b"".join(path.read_bytes() for path in sorted(PACKAGE.rglob("*.py")))
    ).hexdigest()
    if stamp.exists() and stamp.read_text() == digest:
        return
    for md5 in gallery.rglob("*.md5"):
        md5.unlink()
    gallery.mkdir(exist_ok=True)
    stamp.write_text(digest)


def highlight_printed_source(app: Sphinx, doctree: nodes.document) -> None:
    """Highlight what a page printed if it is Python source, `print(inspect.getsource(...))`."""
    for block in doctree.findall(nodes.literal_block):
        text = dedent(block.astext())
        if block.get("language") == "none" and text.lstrip().startswith(("def ", "class ", "@")):
            try:
                ast.parse(text)
            except SyntaxError:
                continue
            block["language"] = "python"


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect both to the build, the first before Sphinx-Gallery looks at the pages."""
    app.connect("builder-inited", forget_results, priority=100)
    app.connect("doctree-read", highlight_printed_source)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
