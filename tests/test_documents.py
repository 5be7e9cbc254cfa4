"""What README shows runs, and so do the pages as they are downloaded."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from sphinx_gallery.gen_gallery import DEFAULT_GALLERY_CONF
from sphinx_gallery.notebook import jupyter_notebook
from sphinx_gallery.py_source_parser import split_code_and_text_blocks

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "examples").glob("plot_*.py"))
MAIN = ROOT / "examples" / "plot_3_matrix_free_optimization.py"


def test_readmes_code_runs():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    assert names["step"] == 2
    assert len(names["optimizer"].solves) == 8


def notebook(page: Path) -> nbformat.NotebookNode:
    """The notebook that Sphinx-Gallery makes of a page."""
    _, blocks = split_code_and_text_blocks(str(page))
    conf = DEFAULT_GALLERY_CONF | {"promote_jupyter_magic": False}
    made = jupyter_notebook(blocks, conf, str(page.parent))
    return nbformat.reads(json.dumps(made), as_version=4)


def test_the_main_pages_script_runs_in_an_empty_folder(tmp_path):
    finished = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", MAIN],
        cwd=tmp_path,
        env=os.environ | {"MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    assert "Iteration  10/ 50  Minibatch Loss 2.29479  Accuracy 0.07812" in finished.stdout
    assert not list(tmp_path.iterdir())


def test_the_main_pages_notebook_runs_in_an_empty_folder(tmp_path):
    run = NotebookClient(notebook(MAIN), timeout=600, resources={"metadata": {"path": tmp_path}})
    printed = json.dumps(run.execute())
    assert "Iteration  10/ 50  Minibatch Loss 2.29479  Accuracy 0.07812" in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_notebook_cell_shows_raw_markup(page):
    for cell in notebook(page).cells:
        if cell.cell_type == "markdown":
            assert not re.search(r":[a-z:]+:`|^\.\. |`__", cell.source, re.MULTILINE)
