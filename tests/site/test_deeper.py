"""The tutorial's contents: the thread of numbered pages first, then what goes deeper."""

import re

from bs4 import BeautifulSoup
from conftest import SITE


def test_pages_with_a_letter_stand_below_the_numbered_ones_under_a_heading(tally):
    contents = BeautifulSoup((SITE / "auto_examples" / "index.html").read_bytes(), "html.parser")
    deeper = contents.select_one("section#going-deeper")

    def named(part):
        pages = [link["href"] for link in part.select(".sphx-glr-thumbcontainer a")]
        return re.findall(r"plot_(.)_", " ".join(dict.fromkeys(pages)))

    letters = named(deeper)
    numbers = named(contents)[: -len(letters)]
    assert letters == sorted(letters)
    assert numbers == sorted(numbers)
    assert letters
    assert all(letter.isalpha() for letter in letters)
    assert numbers
    assert all(number.isdigit() for number in numbers)
    tally("contents: pages in their order", len(letters + numbers))
