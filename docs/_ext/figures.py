"""Figures for both themes: each is drawn once, and its SVG written again in other colours.

A figure uses black for what must stand out from the page, and colours that read on both themes.
For the dark theme black and white change places. The backgrounds are transparent.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

INK, PAPER = "#ced6dd", "#14181e"  # the dark theme's text and background
SWAPPED = {"#000000": INK, "#ffffff": PAPER}


def scrape(block: Any, block_vars: dict[str, Any], gallery_conf: dict[str, Any]) -> str:
    """Save the open figures for Sphinx-Gallery, and write how the page shows them."""
    paths: Iterator[str] = block_vars["image_path_iterator"]
    shown = []
    for number, path in zip(plt.get_fignums(), paths, strict=False):
        figure = plt.figure(number)
        alt = " ".join(str(figure.get_label()).split())
        if not alt:
            raise ValueError(
                f"Figure {number} needs a description: plotting.describe(figure, ...)."
            )
        svg = Path(path).with_suffix(".svg")
        save(figure, svg)
        address = svg.relative_to(gallery_conf["src_dir"]).as_posix()
        shown.append(f"\n.. themed-image:: /{address}\n   :alt: {alt}\n")
        if "explorable" in vars(figure):
            kind, data = vars(figure)["explorable"]
            shown.append(f"   :explore: {kind}\n\n   {data}\n")
    plt.close("all")
    return "".join(shown)


def save(figure: Figure, path: Path) -> None:
    """Save as SVG, so that the same drawing gives the same bytes, and as few as it takes."""
    with mpl.rc_context({"svg.hashsalt": "figures"}):  # before each page, all settings are reset
        figure.savefig(path, transparent=True, bbox_inches="tight", metadata={"Date": None})
    svg = re.sub(r"(\d\d\.\d\d)\d+", r"\1", path.read_text("utf-8"))  # hundredths of a point do
    path.write_text(re.sub(r"(?m)^ +| +$|<!--.*?-->\n", "", svg), "utf-8")


def dark(svg: str) -> str:
    """A drawing for the dark theme: the same, with its ink for black and its paper for white."""
    swapped = re.sub("|".join(SWAPPED), lambda colour: SWAPPED[colour[0]], svg)
    # Matplotlib leaves out a fill that is black, as SVG's default is.
    return swapped.replace("<svg ", f'<svg fill="{INK}" ', 1)


def _get_sg_image_scraper() -> Any:
    """What Sphinx-Gallery calls when `image_scrapers` names this module."""
    return scrape
