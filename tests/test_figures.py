"""The dark theme's figures are the light one's in other colours."""

import re
import runpy
from pathlib import Path
from xml.etree import ElementTree

from matplotlib import pyplot as plt

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
