"""What the figures of several pages share."""

from __future__ import annotations

import json
from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cgn_tutorial.pages.training import History

__all__ = ["COLORS", "describe", "explorable", "plot_histories"]

#: Colours that colour-blind readers can tell apart (after Okabe and Ito, 2008), each with a
#: contrast of at least 3 to a white page and to a dark one.
COLORS = {
    "blue": "#1f7fbf",
    "orange": "#c77700",
    "green": "#0a9469",
    "purple": "#b8659b",
    "red": "#d55e00",
    "gray": "#808080",
}


def describe(figure: Figure, alt: str) -> Figure:
    """Attach to a figure what it shows, in words; the site makes it the alternative text.

    Args:
        figure: The figure.
        alt: One or two sentences for readers who cannot see it.

    Returns:
        The figure.
    """
    figure.set_label(alt)
    return figure


def explorable(figure: Figure, kind: str, data: Mapping[str, object]) -> Figure:
    """Attach to a figure what the site needs to let a reader move it.

    Elsewhere, in scripts and notebooks, the figure stays as it is drawn.

    Args:
        figure: The figure, which shows how the moving one opens.
        kind: Which of the site's moving figures it becomes, by its name in `explore.js`.
        data: The settings it opens with, or the measurements it moves along: what JSON can hold.

    Returns:
        The figure.
    """
    vars(figure)["explorable"] = kind, json.dumps(data, allow_nan=False)
    return figure


def plot_histories(axes: Axes, histories: Mapping[str, History], name: str) -> None:
    """Draw one curve per run, told apart by colour, marker and line style.

    Runs of an optimizer that uses curvature products are solid, others dashed.

    Args:
        axes: Where to draw.
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
            markevery=(i, 10),  # staggered: curves that coincide still show whose they are
            label=label,
        )
    axes.set(xlabel="iteration", ylabel=f"mini-batch {name}")
