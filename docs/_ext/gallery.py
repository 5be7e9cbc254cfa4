"""What the site adds to Sphinx-Gallery, which has no settings for it.

Pages run again when the package changed. Pages that go deeper, by a letter in place of a number,
stand under a heading of their own. Notebooks work away from the site: their folds are HTML,
their links lead to the site or to other notebooks. One archive has all downloads and the package.
Source that a page prints is highlighted, and a page says what it ran on. A card of the
gallery shows the first sentence of its page.
"""

from __future__ import annotations

import ast
import hashlib
import html
import json
import os
import platform
import re
from importlib import metadata
from pathlib import Path
from textwrap import dedent
from typing import Any
from urllib.parse import urljoin
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

import torch
from docutils import nodes
from fold import to_html
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx_gallery.backreferences import THUMBNAIL_PARENT_DIV, THUMBNAIL_PARENT_DIV_CLOSE
from sphinx_gallery.downloads import generate_zipfiles
from sphinx_gallery.notebook import jupyter_notebook
from sphinx_gallery.py_source_parser import split_code_and_text_blocks
from sphinx_gallery.utils import zip_files

import cgn_tutorial
from cgn_tutorial.pages import default_device

FIGURES = Path(__file__).with_name("figures.py")
CARD = '\n.. raw:: html\n\n    <div class="sphx-glr-thumbcontainer"'
DEEPER = """\
Going deeper
------------

Each of these pages answers a further question: with proofs, related matrices, and limits.
"""


def forget_results(app: Sphinx) -> None:
    """Make every page run again if the package, or how figures are saved, changed since they ran.

    Sphinx-Gallery compares each page's own text with the sum it left beside its result, and runs
    those that differ; it knows nothing of what the pages import. What they ran with stays written
    beside the results.
    """
    gallery = Path(app.srcdir) / "auto_examples"
    stamp = gallery / ".package"
    installed = "site-packages" in Path(cgn_tutorial.__file__).parts
    package = f"wheel {metadata.version('cgn-tutorial')}" if installed else "source"
    figures = hashlib.sha256(FIGURES.read_bytes()).hexdigest()
    digest = f"{package}\n{app.config.release} {figures}"
    if stamp.exists() and stamp.read_text() == digest:
        return
    for md5 in gallery.rglob("*.md5"):
        md5.unlink()
    gallery.mkdir(exist_ok=True)
    stamp.write_text(digest)


def write_notebooks(app: Sphinx) -> None:
    """Write the notebooks in place of Sphinx-Gallery's, and pack the downloads again."""
    gallery = Path(app.srcdir) / "auto_examples"
    conf = app.config.sphinx_gallery_conf
    for page in gallery.glob("plot_*.py"):
        made = json.dumps(notebook(page, conf, app.config.html_baseurl), indent=1)
        path = page.with_suffix(".ipynb")
        if not path.exists() or path.read_text() != made:
            path.write_text(made)
            zip_files([page, path], page.with_suffix(".zip"), gallery)
    generate_zipfiles(gallery, app.srcdir, conf)


def notebook(page: Path, conf: dict[str, Any], address: str) -> dict[str, Any]:
    """A page as a notebook.

    Args:
        page: The page's source.
        conf: The settings of Sphinx-Gallery.
        address: The site's address, with a slash at its end, or nothing.

    Returns:
        The notebook, as JSON has it.
    """
    _, blocks = split_code_and_text_blocks(str(page))
    blocks = [
        block._replace(content=to_html(block.content)) if block.type == "text" else block
        for block in blocks
    ]
    made: dict[str, Any] = jupyter_notebook(blocks, conf, str(page.parent))
    for cell in made["cells"]:
        if cell["cell_type"] == "markdown":
            text = re.sub(r"(\]\([^()\s]+\))_", r"\1", "".join(cell["source"]))  # of `text <url>`__
            cell["source"] = [
                re.sub(
                    r"\[([^][]+)\]\((?!https?:)([^()\s]+)\)",
                    lambda link: _absolute(link[1], link[2], page, address),
                    text,
                )
            ]
    return made


def _absolute(text: str, target: str, page: Path, address: str) -> str:
    """A link within the site as a notebook has it: with the address, or to another notebook."""
    if address:
        return f"[{text}]({urljoin(f'{address}auto_examples/{page.stem}.html', target)})"
    other = target.partition("#")[0].replace(".html", ".ipynb")
    return f"[{text}]({other})" if other.startswith("plot_") else text


def pack_everything(app: Sphinx, exception: Exception | None) -> None:
    """Pack everything that the site offers for download into one archive."""
    if exception or app.builder.format != "html":
        return
    site, gallery = Path(app.outdir), Path(app.srcdir) / "auto_examples"
    files = [*gallery.glob("plot_*.py"), *gallery.glob("plot_*.ipynb")]
    files += [*site.glob("*.py"), *site.glob("*.whl")]
    with ZipFile(site / "everything.zip", "w") as archive:
        for file in sorted(files):
            entry = ZipInfo(file.name)  # without a date: the same files give the same bytes
            archive.writestr(entry, file.read_bytes(), compress_type=ZIP_DEFLATED)


def describe_cards(app: Sphinx, doctree: nodes.document) -> None:
    """Write below the title of each card of the gallery the first sentence of its page."""
    if app.env.current_document.docname != "auto_examples/index":
        return
    page = ""
    for node in doctree.findall():
        if isinstance(node, addnodes.pending_xref):
            page = node["reftarget"]
        elif isinstance(node, nodes.raw) and "sphx-glr-thumbnail-title" in node.astext():
            source = (Path(app.srcdir) / f"{page.lstrip('/')}.py").read_text("utf-8")
            sentence = f'<div class="sentence">{html.escape(first_sentence(source))}</div>'
            title, end, rest = node.astext().partition("</div>")
            node.children = [nodes.Text(f"{title}{end}\n{sentence}{rest}")]


def first_sentence(source: str) -> str:
    """The first sentence of a page below its title, without markup."""
    _, _, text = (ast.get_docstring(ast.parse(source)) or "").partition("\n\n")
    plain = re.sub(r"(?::\w+:)?`+([^`<]+?)(?: <[^>]*>)?`+_*", r"\1", " ".join(text.split()))
    found = re.match(r".+?[.?!](?= |$)", plain.replace("*", ""))
    if not found:
        raise ValueError(f"A page begins without a sentence: {text[:80]!r}")
    return found[0]


def head_deeper_pages(app: Sphinx, page: str, content: list[str]) -> None:
    """Put the cards of the pages with a letter, `plot_a_…`, under a heading of their own."""
    if page != "auto_examples/index":
        return
    before, *cards = content[0].split(CARD)
    deeper = [bool(re.search(r"auto_examples/plot_[a-z]_\w", card)) for card in cards]
    if True in deeper:
        first = deeper.index(True)
        cards[first - 1] += f"{THUMBNAIL_PARENT_DIV_CLOSE}\n{DEEPER}{THUMBNAIL_PARENT_DIV}"
    content[0] = CARD.join([before, *cards])


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


def say_where_it_ran(app: Sphinx, doctree: nodes.document) -> None:
    """Complete what Sphinx-Gallery says of a page's running time by what it ran on."""
    for paragraph in doctree.findall(nodes.paragraph):
        time = re.match(
            r"Total running time of the script: \((\d+) minutes? ([\d.]+) seconds?\)",
            paragraph.astext(),
        )
        if time:
            took = 60 * int(time[1]) + float(time[2])
            seconds = f"{took:.0f} second{'' if round(took) == 1 else 's'}"
            text = f"This page ran in {seconds}, on {machine()}."
            paragraph.children = [nodes.Text(text)]


def machine() -> str:
    """The processor or the accelerator that the pages run on, and PyTorch."""
    if (device := default_device()).type == "cpu":
        cpuinfo = Path("/proc/cpuinfo")
        model = re.search(r"model name\s*: (.+)", cpuinfo.read_text() if cpuinfo.exists() else "")
        processor = model[1] if model else platform.machine()
        name = f"{torch.get_num_threads()} of {os.cpu_count()} cores ({processor})"
    else:
        name = torch.get_device_module(device).get_device_name()
    return f"{name}, with PyTorch {torch.__version__.partition('+')[0]}"


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect all to the build, before Sphinx-Gallery looks at the pages, after it, and later."""
    app.connect("builder-inited", forget_results, priority=100)
    app.connect("builder-inited", write_notebooks, priority=900)
    app.connect("doctree-read", describe_cards)
    app.connect("source-read", head_deeper_pages)
    app.connect("doctree-read", highlight_printed_source)
    app.connect("doctree-read", say_where_it_ran)
    app.connect("build-finished", pack_everything)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
