"""What the guides for reference say: the page to print, when to use what, and contributing."""

import inspect
import re
import runpy
from pathlib import Path

import cgn_tutorial

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def text(path):
    return (DOCS / path).read_text("utf-8")


def test_the_loop_of_the_page_to_print_runs():
    names = runpy.run_path(str(DOCS / "guides" / "cheatsheet.py"))
    assert len(names["optimizer"].solves) == 4
    assert names["loss"].item() < 3


def test_the_page_to_print_names_options_that_exist():
    options = set(inspect.signature(cgn_tutorial.CGNOptimizer).parameters)
    options |= set(inspect.signature(cgn_tutorial.cg).parameters)
    table = text("guides/cheatsheet.rst").partition("list-table")[2].partition("rubric")[0]
    named = set(re.findall(r"(?<!:)`([a-z_]+)`", table))
    assert {"damping", "lr", "max_length", "warm_start", "weight_decay"} <= named
    assert named <= options


def test_contributing_has_a_row_for_each_room_and_no_other():
    noxfile = (ROOT / "noxfile.py").read_text("utf-8")
    sessions = re.findall(r"@nox\.session(.*)\ndef (\w+)", noxfile)
    rooms = [(re.findall(r'name="(.+?)"', options) or [name])[0] for options, name in sessions]
    rows = re.findall(r"^   \* - `([\w-]+)`$", text("contributing.rst"), re.MULTILINE)
    assert sorted(rows) == sorted(rooms)
    assert len(rooms) > 5


def test_contributing_names_files_that_exist():
    names = re.findall(r"`((?:docs|tests|src|examples|\.ci)/[\w./]+)`", text("contributing.rst"))
    assert {"docs/bench", "tests/benchmarks/trials.py", ".ci/run"} <= set(names)
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_the_version_and_the_authors_are_said_alike():
    release = runpy.run_path(str(ROOT / "src" / "version.py"))["RELEASE"]
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    assert re.search(r"^version: (.+)$", citation, re.MULTILINE)[1] == release
    author = re.search(r'^author = "(.+)"$', text("conf.py"), re.MULTILINE)[1]
    assert re.findall(r"^  - name: (.+)$", citation, re.MULTILINE) == [author]
    changes = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert re.search(r"^## \[(.+?)\]", changes, re.MULTILINE)[1] == release
