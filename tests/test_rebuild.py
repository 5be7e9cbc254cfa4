"""What a build of the site runs again, and what it leaves, on a site of two small pages.

The site's `conf.py`, its extensions and the package are copies of the project's.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = '''\
r"""
Page {name}
======

A figure and a number, :math:`\\sqrt{{x}}`.
"""

# %%
# What the package says.

import os
from pathlib import Path

from matplotlib import pyplot as plt

from cgn_tutorial.pages import plotting

with Path(os.environ["RUNS"]).open("a") as runs:
    runs.write("{name}")
print("blue is", plotting.COLORS["blue"])

# %%
# Its colour:

figure, axes = plt.subplots()
axes.plot([1, 2, {last}], color=plotting.COLORS["blue"])
_ = plotting.describe(figure, "A line from 1 to {last}.")
'''


class Site:
    """A small site in a folder of its own."""

    def __init__(self, folder):
        self.folder = folder
        self.html = folder / "docs" / "_build" / "html"

    def page(self, name):
        return self.folder / "examples" / f"plot_{name}.py"

    def build(self, *before):
        """Build it; return which pages ran, one letter each, and what the build said."""
        runs = self.folder / "runs"
        runs.write_text("")
        options = ("-W", "-n", "-b", "html", "-d", self.folder / "doctrees")
        finished = subprocess.run(
            [*before, sys.executable, "-m", "sphinx", *options, self.folder / "docs", self.html],
            env=os.environ | {"PYTHONPATH": str(self.folder / "src"), "RUNS": str(runs)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=500,
        )
        return "".join(sorted(runs.read_text())), finished.returncode, finished.stdout

    def files(self):
        """The published files, by name."""
        files = (path for path in self.html.rglob("*") if path.is_file())
        return {str(path.relative_to(self.html)): path.read_bytes() for path in files}

    def text(self, name):
        return (self.html / "auto_examples" / f"plot_{name}.html").read_text()


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def make(folder):
    """A site that was never built."""
    for part, other in (("src", ["mnist"]), ("docs", ["*.rst", "_build", "auto_examples", "api"])):
        ignored = shutil.ignore_patterns("__pycache__", *other)
        shutil.copytree(ROOT / part, folder / part, ignore=ignored)
    toctree = ".. toctree::\n\n   auto_examples/index\n"
    (folder / "docs" / "index.rst").write_text(f"Site\n====\n\n{toctree}")
    site = Site(folder)
    site.page("a").parent.mkdir()
    (folder / "examples" / "GALLERY_HEADER.rst").write_text("Pages\n=====\n")
    for name, last in (("a", 3), ("b", 4)):
        site.page(name).write_text(PAGE.format(name=name, last=last))
    return site


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A site that was built once."""
    site = make(tmp_path_factory.mktemp("built"))
    runs, status, said = site.build()
    assert (runs, status) == ("ab", 0), said
    return site


@pytest.fixture
def site(built, tmp_path):
    """A copy of it, as old and as built."""
    return Site(shutil.copytree(built.folder, tmp_path / "site"))


def test_an_unchanged_tree_runs_no_page(site):
    before = site.files()
    runs, status, said = site.build()
    assert (runs, status) == ("", 0), said
    assert site.files() == before


def test_a_change_in_the_package_runs_the_pages_again(site):
    edit(site.folder / "src" / "cgn_tutorial" / "pages" / "plotting.py", '"#1f7fbf"', '"#123456"')
    runs, status, said = site.build()
    assert (runs, status) == ("ab", 0), said
    assert all("blue is #123456" in re.sub("<[^>]+>", "", site.text(name)) for name in "ab")
    assert site.build()[0] == ""


def test_a_change_in_the_packages_data_runs_the_pages_again(site):
    edit(site.folder / "src" / "cgn_tutorial" / "pages" / "published_run.json", "{", "{ ")
    runs, status, said = site.build()
    assert (runs, status) == ("ab", 0), said


def test_a_change_in_one_page_runs_that_page_alone(site):
    edit(site.page("b"), "A figure and a number", "A number and a figure")
    before = site.text("a")
    runs, status, said = site.build()
    assert (runs, status) == ("b", 0), said
    assert "A number and a figure" in site.text("b")
    assert site.text("a") == before


def test_a_failing_page_stops_the_build_and_leaves_the_site_as_it_was(site):
    before = site.files()
    edit(site.page("a"), "A figure and a number", "A number and a figure")
    edit(site.page("b"), '\nprint("blue', '\nassert 1 + 1 == 3\nprint("blue')
    line = site.page("b").read_text().splitlines().index("assert 1 + 1 == 3") + 1
    runs, status, said = site.build()
    assert "b" in runs
    assert status != 0
    assert re.search(rf'plot_b\.py", line {line}\b', said), said
    assert "AssertionError" in said
    assert site.files() == before

    edit(site.page("b"), "1 + 1 == 3", "1 + 1 == 2")
    runs, status, said = site.build()
    assert (runs.removeprefix("a"), status) == ("b", 0), said  # a, too, if b stopped it half way
    assert "A number and a figure" in site.text("a")


def test_without_a_network_the_site_is_the_same_to_the_byte(built, tmp_path):
    alone = ("unshare", "--map-root-user", "--net")
    if not shutil.which("unshare") or subprocess.run([*alone, "true"]).returncode:
        pytest.skip("this machine does not let its users make a network namespace")
    site = make(tmp_path / "elsewhere")
    runs, status, said = site.build(*alone)
    assert (runs, status) == ("ab", 0), said
    shown = (".html", ".svg", ".css", ".js", ".woff", ".py", ".ipynb")
    there, here = (
        {
            name: re.sub(rb"This page ran in \d+ seconds", b"", data)  # a busy machine takes longer
            for name, data in each.files().items()
            if name.endswith(shown)
        }
        for each in (built, site)
    )
    assert sum(name.endswith(".svg") for name in here) >= 4  # two figures, light and dark
    assert here.keys() == there.keys()
    assert [name for name in here if here[name] != there[name]] == []


def test_the_maths_font_has_the_signs_of_roots(built):
    from fontTools.ttLib import TTFont

    assert "<msqrt>" in built.text("a")
    font = TTFont(built.html / "_static" / "stix-two-math.woff")
    assert {ord("√"), ord("𝑥")} <= font.getBestCmap().keys()
