"""What the guides for reference say: the page to print, when to use what, and contributing."""

import csv
import inspect
import math
import re
import runpy
from pathlib import Path

import pytest

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


# What `guides/when` says of the races, from their tables; a goal's rows begin with the fastest.


def table(name):
    """The rows of an experiment's table."""
    with (DOCS / "experiments" / f"{name}.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def race(name):
    """For each goal, each method's median of steps, or infinity."""
    goals = {}
    for row in table(name):
        steps = row["Steps"].partition(" ")[0]
        goals.setdefault(row["Goal"], {})[row["Method"]] = (
            float(steps) if steps.isdigit() else math.inf
        )
    return goals


def first(rows):
    return next(iter(rows))


def test_adam_wins_with_relu_to_each_goal():
    goals = race("relu_batch_64")
    assert [first(rows) for rows in goals.values()] == ["Adam"] * 3


def test_newton_steps_win_to_the_goals_that_the_page_names():
    assert first(race("batch_64")["90%"]) == "CGN"
    assert first(race("batch_256")["97%"]) == "CGN + Adam"
    assert not first(race("batch_64")["97%"]).startswith("CGN")  # not to all


@pytest.mark.parametrize("batch", [64, 256, 1024])
def test_newton_steps_are_fewer_where_they_arrive(batch):
    for rows in race(f"batch_{batch}").values():
        newton = min(steps for method, steps in rows.items() if method.startswith("CGN"))
        other = min(steps for method, steps in rows.items() if not method.startswith("CGN"))
        assert newton < other or newton == math.inf


def test_the_hessian_and_the_pch_in_the_races():
    rows = race("batch_64")
    assert all(goal["CGN, Hessian"] == math.inf for goal in rows.values())
    for method in ("CGN, PCH-abs", "CGN, PCH-clip"):
        assert rows["90%"][method] == rows["90%"]["CGN, BackPACK"] < math.inf
        assert rows["95%"][method] == rows["95%"]["CGN, BackPACK"] == math.inf


def test_the_autoencoder_is_adams_by_the_clock_and_newtons_by_steps():
    def column(name):
        rows = (row for row in table("autoencoder") if row[name] != "never")
        return {row["Way"]: float(row[name].split()[0]) for row in rows}

    late, early = column("Error at the end"), column("Error after 40 steps")
    assert min(late, key=late.get).startswith("Adam")
    assert early["λ = 0.03"] < min(error for way, error in early.items() if way.startswith("Adam"))
