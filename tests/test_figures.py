"""The dark theme's figures are the light one's in other colours; some bring data to the page."""

import json
import re
import runpy
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from matplotlib import pyplot as plt

from cgn_tutorial.pages import plotting

FIGURES = runpy.run_path(str(Path(__file__).parents[1] / "docs" / "_ext" / "figures.py"))
EXPECTED = {"#000000": FIGURES["INK"], "#ffffff": FIGURES["PAPER"]}  # as SVG writes black, white


def everything():
    """A figure with black and white in each way that Matplotlib writes them."""
    figure, axes = plt.subplots()
    axes.plot([0, 1], [0, 1], "o-", color="black", markeredgecolor="white", label="line")
    axes.plot([0, 1], [1, 0], "s--", color="#1f7fbf", markerfacecolor="black")
    axes.scatter([0.2, 0.4], [0.5, 0.6], color=["black", "#d55e00"])
    axes.bar([0.5], [0.4], color="white", edgecolor="black", hatch="//")
    axes.bar([0.8], [0.4], color="black", alpha=0.5, hatch="x", edgecolor="white")
    axes.imshow([[0, 1], [1, 0]], cmap="gray", extent=(0, 0.2, 0, 0.2))
    axes.contour([[0, 1], [1, 0]], colors="black")
    axes.text(0.5, 0.5, "$λ^2$ in the middle")
    axes.legend(framealpha=0.5)
    return figure


def parts(svg):
    """Each element: its name, what it has besides colours, and the colours it is drawn in."""

    def walk(element, colours):
        style = element.get("style", "")
        own = dict(re.findall(r"(fill|stroke): (#[0-9a-f]{6}|none|url\(#\w+\))", style))
        own |= {name: element.attrib[name] for name in ("fill", "stroke") if element.get(name)}
        colours = colours | own
        rest = {name: value for name, value in element.items() if name not in own}
        rest["style"] = re.sub(r"(fill|stroke): #[0-9a-f]{6}", "", style)
        yield element.tag, rest, colours
        for child in element:
            yield from walk(child, colours)

    return list(walk(ElementTree.fromstring(svg), {"fill": "#000000", "stroke": "none"}))


def test_a_dark_figure_differs_in_black_and_white_alone(tmp_path):
    path = tmp_path / "figure.svg"
    figure = everything()
    FIGURES["save"](figure, path)
    plt.close(figure)
    svg = path.read_text(encoding="utf-8")
    light, dark = parts(svg), parts(FIGURES["dark"](svg))
    for name in ("fill", "stroke"):
        assert {colours[name] for *_, colours in light} >= EXPECTED.keys()
    for (tag, rest, colours), (dark_tag, dark_rest, dark_colours) in zip(light, dark, strict=True):
        assert (dark_tag, dark_rest) == (tag, rest)
        assert dark_colours == {k: EXPECTED.get(colour, colour) for k, colour in colours.items()}


def scraped(figure_data, tmp_path):
    """What the page of a gallery gets for a figure, whose data are given if it is to move."""
    figure, axes = plt.subplots()
    axes.plot([0, 1])
    plotting.describe(figure, "A line that goes up.")
    if figure_data:
        plotting.explorable(figure, *figure_data)
    paths = {"image_path_iterator": iter([str(tmp_path / "figure.png")])}
    return FIGURES["scrape"](None, paths, {"src_dir": tmp_path})


def test_a_figure_to_move_brings_its_kind_and_its_data_to_the_page(tmp_path):
    still = scraped(None, tmp_path)
    moving = scraped(("runs", {"λ": [0.1, 1], "name": "a < b\\c"}), tmp_path)
    assert moving.startswith(still)
    option, empty, data = moving[len(still) :].splitlines()
    assert (option, empty) == ("   :explore: runs", "")
    assert data.startswith("   {")
    assert json.loads(data) == {"λ": [0.1, 1], "name": "a < b\\c"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), torch.ones(1)])
def test_data_that_json_cannot_hold_are_refused_on_the_page(value):
    figure = plt.figure()
    with pytest.raises((TypeError, ValueError), match="JSON"):
        plotting.explorable(figure, "runs", {"loss": value})
    plt.close(figure)
