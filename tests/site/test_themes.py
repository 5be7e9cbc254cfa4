"""The site's figures for the dark theme are those of the light one, in other colours."""

import re

import pytest
from conftest import SITE

DARK = sorted(path.name for path in SITE.glob("_images/*.dark.svg"))


def drawing(name):
    """A figure without its colours."""
    svg = (SITE / "_images" / name).read_text(encoding="utf-8")
    return re.sub(r'#[0-9a-f]{6}(?=[;"])|^(<svg) fill="\S+"', r"\1", svg, flags=re.MULTILINE)


@pytest.mark.parametrize("name", DARK)
def test_the_dark_figure_differs_in_its_colours_alone(name, tally):
    assert drawing(name) == drawing(name.replace(".dark", ""))
    tally("figures: the same drawing in both themes")
