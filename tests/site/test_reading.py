"""What the pages' markup promises: links that lead somewhere, words for pictures, a proper head."""

import functools
import re
from urllib.parse import unquote, urljoin, urlsplit
from xml.etree import ElementTree

import pytest
from bs4 import BeautifulSoup
from conftest import BASE, PAGES, ROOT, SITE, TUTORIAL

PAPER = {"light": "#ffffff", "dark": "#14181e"}  # the themes' backgrounds
FIGURES = sorted(
    path.name for path in SITE.glob("_images/sphx_glr_plot_*.svg") if "thumb" not in path.name
)
READ = [path for path in PAGES if not re.match(r"_modules/|genindex|search|404", path)]


@functools.cache
def soup(path):
    return BeautifulSoup((SITE / path).read_bytes(), "html.parser")


@functools.cache
def anchors(path):
    return {element["id"] for element in soup(path).find_all(id=True)} | {""}


@pytest.mark.parametrize("path", PAGES)
def test_links_within_the_site_lead_somewhere(path, tally):
    count = 0
    for element in soup(path).find_all(["a", "link", "img", "script"]):
        url = element.get("href") or element.get("src")
        if url is None or urlsplit(url).scheme or urlsplit(url).netloc:
            continue
        target = urlsplit(urljoin(f"/{path}", url))
        file = unquote(target.path).lstrip("/")
        assert (SITE / file).is_file(), url
        if element.name == "a" and file.endswith(".html"):
            assert unquote(target.fragment) in anchors(file), url
        count += 1
    tally("links within the site: lead to a file, and to a place in it", count)


@pytest.mark.parametrize("page", TUTORIAL)
def test_downloads_are_the_pages_program(page, tally):
    name = page.removeprefix("auto_examples/").removesuffix(".html")
    for file, source in ((f"{name}.py", "examples"), (f"{name}.ipynb", "docs/auto_examples")):
        (link,) = soup(page).select(f".sphx-glr-download a[href$='/{file}']")
        there = unquote(urljoin(f"/{page}", link["href"])).lstrip("/")
        assert (SITE / there).read_bytes() == (ROOT / source / file).read_bytes()
        tally("downloads: the right bytes")


@pytest.mark.parametrize("read", READ)
def test_pictures_have_words(read, tally):
    for image in soup(read).select("article img, main img"):
        decoration = image.find_parent(class_="sphx-glr-thumbcontainer")  # its link has the name
        assert decoration or len(image["alt"].split()) >= 5, image
        tally("pictures: described")


@pytest.mark.parametrize("read", READ)
def test_tables_scroll_alone(read, tally):
    for table in soup(read).select("article table"):
        assert table.find_parent(class_="pst-scrollable-table-container"), table
        tally("tables: in a box that scrolls")


@pytest.mark.parametrize("read", READ)
def test_head_describes_the_page(read, tally):
    head = soup(read).head
    title = soup(read).find("h1").get_text().rstrip("#")

    def meta(name):
        (tag,) = head.select(f'meta[property="{name}"], meta[name="{name}"]')
        return tag["content"]

    assert meta("og:title") == title
    assert meta("og:description") == meta("description")
    assert 20 <= len(meta("description")) <= 200
    assert "\\" not in meta("description")
    canonical = [link["href"] for link in head.select('link[rel="canonical"]')]
    assert canonical == ([f"{BASE}{read}"] if BASE else [])
    tally("page: title and description for search engines and previews")


@pytest.mark.parametrize("read", READ)
def test_pages_form_one_chain(read, tally):
    def neighbour(page, which):
        links = soup(page).select(f".prev-next-area a.{which}")
        return urljoin(f"/{page}", links[0]["href"]).lstrip("/") if links else None

    after, before = neighbour(read, "right-next"), neighbour(read, "left-prev")
    assert after or before
    assert after is None or neighbour(after, "left-prev") == read
    assert before is None or neighbour(before, "right-next") == read
    tally("page: leads to the previous and the next")


def test_reference_links_to_source(tally):
    links = soup("api.html").select("a.reference[href^='_modules/']")
    tally("links from the reference to source", len(links))


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("figure", FIGURES)
def test_words_in_figures_read_in_their_theme(figure, tally):
    paper = PAPER["dark" if ".dark." in figure else "light"]
    svg = "{http://www.w3.org/2000/svg}"
    drawing = ElementTree.parse(SITE / "_images" / figure)
    words = [group for group in drawing.iter(f"{svg}g") if group.get("id", "").startswith("text_")]
    for word in words:
        style = next((g.get("style", "") for g in word.iter(f"{svg}g") if g is not word), "")
        fill = re.search(r"fill: (#[0-9a-f]{6})", style)
        colour = fill[1] if fill else drawing.getroot().get("fill", "#000000")
        assert contrast(colour, paper) >= 3, (word.get("id"), colour)
    tally("words in figures: contrast with the theme's background", len(words))
