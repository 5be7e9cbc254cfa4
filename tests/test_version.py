"""The version moves with the package's content, and only with it."""

import runpy
import shutil
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"


@pytest.fixture
def copy(tmp_path):
    """A copy of `src`, to change."""
    ignored = shutil.ignore_patterns("__pycache__")
    return Path(shutil.copytree(SOURCE, tmp_path / "src", ignore=ignored))


def version(folder):
    return runpy.run_path(str(folder / "version.py"))["VERSION"]


def test_a_copy_elsewhere_has_the_same_version(copy):
    assert version(copy) == version(SOURCE)


def test_a_file_that_python_caches_changes_nothing(copy):
    (copy / "cgn_tutorial" / "cgn.pyc").write_bytes(b"cached")
    assert version(copy) == version(SOURCE)


@pytest.mark.parametrize(
    "change",
    [
        lambda package: (package / "cgn.py").write_text("x"),
        lambda package: (package / "more.json").write_text("{}"),
        lambda package: (package / "cgn.py").rename(package / "moved.py"),
        lambda package: (package / "py.typed").unlink(),
    ],
    ids=["edited", "added", "renamed", "removed"],
)
def test_any_other_change_moves_it(copy, change):
    change(copy / "cgn_tutorial")
    assert version(copy) != version(SOURCE)
