"""Colours, curves and descriptions for the figures of several pages."""

from __future__ import annotations

import json
from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cgn_tutorial.pages.training import History

__all__ = ["COLORS", "describe", "explorable", "plot_histories"]

#: Colours that colour-blind readers can tell apart (after Okabe and Ito, 2008). Each colour has a
#: contrast of at least 3 to a white page and to a dark page.
COLORS = {
    "blue": "#1f7fbf",
    "orange": "#c77700",
    "green": "#0a9469",
    "purple": "#b8659b",
    "red": "#d55e00",
    "gray": "#808080",
}


def describe(figure: Figure, alt: str) -> Figure:
    """Attach to a figure a description in words, which the site makes the alternative text.

    Args:
        figure: The figure.
        alt: One or two sentences for readers who cannot see the figure.

    Returns:
        The figure.
    """
    figure.set_label(alt)
    return figure


def explorable(figure: Figure, kind: str, data: Mapping[str, object]) -> Figure:
    """Attach to a figure the data of a moving figure, which the site shows in its place.

    In scripts and notebooks, the figure stays as drawn.

    Args:
        figure: The figure, drawn as the moving figure opens.
        kind: The name of the moving figure in `explore.js`.
        data: The first settings of the moving figure, or its measurements, as values for JSON.

    Returns:
        The figure.
    """
    vars(figure)["explorable"] = kind, json.dumps(data, allow_nan=False)
    return figure


def plot_histories(axes: Axes, histories: Mapping[str, History], name: str) -> None:
    """Draw one curve per run. Runs differ in colour, marker and line style.

    Runs with curvature products have solid lines; other runs have dashed lines.

    Args:
        axes: The axes to draw on.
        histories: The runs, by label.
        name: The attribute of `History` to draw, `"loss"` or `"accuracy"`.
    """
    colors, markers = list(COLORS.values()), "os^Dv<>Px"
    for i, (label, history) in enumerate(histories.items()):
        axes.plot(
            getattr(history, name),
            color=colors[i % len(colors)],
            linestyle="-" if any(history.products) else "--",
            linewidth=1.2,
            marker=markers[i % len(markers)],
            markersize=4,
            markevery=(i, 10),  # staggered, so that curves that coincide both show
            label=label,
        )
    axes.set(xlabel="iteration", ylabel=f"mini-batch {name}")
