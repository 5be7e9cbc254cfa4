"""Figures for both themes: each is saved twice, and the theme shows the one that fits.

A figure is drawn once, with black for what must stand out from the page and colours that read on
both. For the dark theme black and white change places. The backgrounds are transparent.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.artist import Artist
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

INK, PAPER = "#ced6dd", "#14181e"  # the dark theme's text and background
SWAPPED = {"black": INK, "white": PAPER}

RST = """
.. rst-class:: figure-light

.. image:: /{light}
   :class: only-light
   :alt: {alt}
   {size}

.. rst-class:: figure-dark

.. image:: /{dark}
   :class: only-dark
   :alt: {alt}
   {size}
"""


def scrape(block: Any, block_vars: dict[str, Any], gallery_conf: dict[str, Any]) -> str:
    """Save the open figures for Sphinx-Gallery, and write how the page shows them."""
    paths: Iterator[str] = block_vars["image_path_iterator"]
    pieces = []
    for number, path in zip(plt.get_fignums(), paths, strict=False):
        figure = plt.figure(number)
        alt = " ".join(str(figure.get_label()).split())
        if not alt:
            raise ValueError(
                f"Figure {number} needs a description: plotting.describe(figure, ...)."
            )
        light, dark = Path(path).with_suffix(".svg"), Path(path).with_suffix(".dark.svg")
        save(figure, light)
        swap_ink(figure)
        save(figure, dark)
        source = Path(gallery_conf["src_dir"])
        pieces.append(
            RST.format(
                light=light.relative_to(source).as_posix(),
                dark=dark.relative_to(source).as_posix(),
                alt=alt,
                size=size(light),
            )
        )
    plt.close("all")
    return "".join(pieces)


def save(figure: Figure, path: Path) -> None:
    """Save as SVG, so that the same drawing gives the same bytes."""
    with mpl.rc_context({"svg.hashsalt": "figures"}):  # before each page, all settings are reset
        figure.savefig(path, transparent=True, bbox_inches="tight", metadata={"Date": None})


def size(path: Path) -> str:
    """How large a figure is, so that the page keeps its place until it comes into view."""
    found = re.search(r'<svg [^>]*?width="([\d.]+)pt" height="([\d.]+)pt"', path.read_text("utf-8"))
    if not found:
        raise ValueError(f"{path} does not say how large it is.")
    width, height = (round(float(points) * 4 / 3) for points in found.groups())
    return f":width: {width}\n   :height: {height}\n   :loading: lazy"


def swap_ink(figure: Figure) -> None:
    """Change black to the dark theme's ink, and white to its paper, in every part of a figure."""
    for artist in figure.findobj():
        for attribute in ("color", "edgecolor", "facecolor", "markeredgecolor", "markerfacecolor"):
            _swap(artist, attribute)


def _swap(artist: Artist, attribute: str) -> None:
    """Swap one colour of an artist, if it has it and the colour is plain black or white."""
    getter = getattr(artist, f"get_{attribute}", None)
    setter = getattr(artist, f"set_{attribute}", None)
    if getter is None or setter is None:
        return
    try:
        red, green, blue, alpha = to_rgba(getter()[0] if _is_list(getter()) else getter())
    except (ValueError, TypeError, IndexError):
        return  # "none", or a list of many colours, which are data
    for old, new in SWAPPED.items():
        if alpha > 0 and (red, green, blue) == to_rgba(old)[:3]:
            setter(to_rgba(new, alpha))


def _is_list(colour: Any) -> bool:
    """Whether a getter returned the one colour of a collection as a list of one."""
    return hasattr(colour, "shape") and colour.ndim == 2 and len(colour) == 1


def _get_sg_image_scraper() -> Any:
    """What Sphinx-Gallery calls when `image_scrapers` names this module."""
    return scrape
