"""What the built site offers for download works away from it, with nothing but the site's wheel.

All pages ran with the wheel when the site was built, and a page's notebook and script are its
program. Two notebooks and a script, the quick ones, run here again, in an empty folder.

The package that the tests run with is the one that a notebook's first cell installs, here from a
local server in place of the site's address.
"""

import ast
import functools
import html
import http.server
import importlib.metadata
import os
import re
import runpy
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
SITE = ROOT / "docs" / "_build" / "html"
SOURCES = {page.name: page.read_bytes() for page in (ROOT / "examples").glob("plot_*.py")}
SCRIPTS = sorted(SITE.glob("_downloads/*/plot_*.py"), key=lambda path: path.name)
NOTEBOOKS = sorted(SITE.glob("_downloads/*/plot_*.ipynb"), key=lambda path: path.name)
FILES = ["cgn.py", "curvature.py", "pages/train_parallel.py"]
QUICK = [path for path in NOTEBOOKS if re.match(r"plot_[16]_", path.name)]  # 6 starts processes
(SCRIPT,) = (path for path in SCRIPTS if path.name.startswith("plot_2_"))
VERSION = runpy.run_path(str(ROOT / "src" / "version.py"))["VERSION"]
WHEEL = SITE / f"cgn_tutorial-{VERSION}-py3-none-any.whl"
pages = functools.partial(pytest.mark.parametrize, ids=lambda path: path.name)


def notebook(path):
    return nbformat.reads(path.read_text(), as_version=4)


def prose(path):
    """The prose of a notebook, without its literals and formulas."""
    cells = [cell.source for cell in notebook(path).cells if cell.cell_type == "markdown"]
    return re.sub(r"``.+?``|\$.+?\$", "", "\n\n".join(cells), flags=re.DOTALL)


def shown(path):
    """The lines of output that a script's page shows."""
    page = (SITE / "auto_examples" / f"{path.stem}.html").read_text()
    blocks = re.findall(r'<div class="sphx-glr-script-out.*?<pre>(.*?)</pre>', page, re.DOTALL)
    return html.unescape(re.sub(r"<[^>]+>", "", "\n".join(blocks))).splitlines()


def execute(made, folder):
    NotebookClient(made, timeout=500, resources={"metadata": {"path": folder}}).execute()
    return [output for cell in made.cells for output in cell.get("outputs", [])]


def installed():
    """Where a new interpreter of this environment finds the package."""
    find = "from importlib.util import find_spec as find; print(find('cgn_tutorial'))"
    return subprocess.check_output([sys.executable, "-I", "-c", find], text=True)


@pytest.fixture(scope="session", autouse=True)
def requests(tmp_path_factory):
    """Let the first cell of a notebook install the package; return what it asked the server for."""
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            requests.append(self.path)

    subprocess.run([sys.executable, "-m", "pip", "uninstall", "--yes", "cgn-tutorial"], check=True)
    assert installed() == "None\n"
    handler = functools.partial(Handler, directory=SITE)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        first = notebook(NOTEBOOKS[0])
        (cell,) = first.cells = first.cells[:1]
        at_site, here = rf"\S*{re.escape(WHEEL.name)}", f"http://127.0.0.1:{server.server_port}"
        cell.source, count = re.subn(at_site, f"{here}/{WHEEL.name}", cell.source)
        assert count == 2  # to install it, and to say how
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("PIP_NO_INDEX", "1")  # what the package needs is there
            environment.setenv("PIP_NO_CACHE_DIR", "1")
            environment.setenv("PIP_CONFIG_FILE", os.devnull)  # a machine may cap versions
            environment.setenv("NO_PROXY", "127.0.0.1")
            for _ in range(2):
                execute(first, tmp_path_factory.mktemp("empty"))
        server.shutdown()
    return requests


def test_the_first_cell_installs_the_wheel_where_the_package_is_missing_and_only_there(requests):
    assert requests == [f"/{WHEEL.name}"]
    assert f"origin='{sys.prefix}" in installed()


def first_cell(installed):
    """Run a notebook's first cell where this version is installed."""
    cell = notebook(NOTEBOOKS[0]).cells[0].source
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.metadata, "version", lambda name: installed)
        exec(re.sub("%pip install --quiet .+", "raise AssertionError", cell), {})


def test_the_first_cell_is_silent_where_the_notebooks_version_is_installed(capsys):
    first_cell(VERSION)
    assert capsys.readouterr().out == ""


def test_the_first_cell_says_so_where_another_version_is_installed(capsys):
    first_cell("0.0.1+0123abcd")
    said, remedy = capsys.readouterr().out.splitlines()
    assert said == f"cgn-tutorial 0.0.1+0123abcd is installed; this notebook ran with {VERSION}."
    assert remedy.endswith(f"{WHEEL.name}, and restart the kernel.")


@pages("path", NOTEBOOKS)
def test_every_notebook_begins_with_that_cell(path):
    assert notebook(path).cells[0].source == notebook(NOTEBOOKS[0]).cells[0].source


def test_every_page_has_a_script_and_a_notebook():
    assert [path.name for path in SCRIPTS] == sorted(SOURCES)
    assert [path.stem for path in NOTEBOOKS] == [path.stem for path in SCRIPTS]


def test_every_page_ran_with_the_wheel_and_not_with_the_source():
    ran_with, _ = (ROOT / "docs" / "auto_examples" / ".package").read_text().splitlines()
    assert ran_with == f"wheel {VERSION}"


def test_no_page_wrote_a_file_where_it_ran():
    known = {*SOURCES, "GALLERY_HEADER.rst", "ruff.toml", "__pycache__"}
    assert {path.name for path in (ROOT / "examples").iterdir()} <= known


@pages("path", SCRIPTS)
def test_no_page_shows_a_warning(path):
    assert [line for line in shown(path) if "Warning" in line] == []


@pages("path", SCRIPTS)
def test_a_script_is_the_source_that_the_build_ran(path):
    assert path.read_bytes() == SOURCES[path.name]


@pages("path", SCRIPTS)
def test_a_script_says_how_to_install_the_package(path):
    assert "pip install" in ast.get_docstring(ast.parse(path.read_text()))


@pages("path", NOTEBOOKS)
def test_a_notebook_has_the_scripts_code(path):
    _, *cells = [cell.source for cell in notebook(path).cells if cell.cell_type == "code"]
    code = ast.parse(SOURCES[f"{path.stem}.py"]).body[1:]  # after the docstring
    assert ast.dump(ast.parse("\n".join(cells))) == ast.dump(ast.Module(code, type_ignores=[]))


@pages("path", NOTEBOOKS)
def test_a_notebook_shows_no_raw_markup(path):
    assert not re.findall(
        r":[a-z:]+:`|^ *\.\. |`_|\]\([^)]*\)_|<[^>]*>`", prose(path), re.MULTILINE
    )


@pages("path", NOTEBOOKS)
def test_a_notebook_folds_the_answers_to_its_questions(path):
    texts = [cell.source for cell in notebook(path).cells if cell.cell_type == "markdown"]
    text = "\n".join(texts)
    folds = re.findall(r"<details><summary>(.+?)</summary>\n\n(.+?)\n\n</details>", text, re.DOTALL)
    assert len(folds) >= 3
    assert all(question.endswith("?") and "\n" not in question for question, _ in folds)
    assert not any(line.startswith(" ") for _, answer in folds for line in answer.splitlines())
    assert ".. fold" not in text


@pages("path", NOTEBOOKS)
def test_a_notebooks_links_lead_somewhere_from_anywhere(path):
    links = re.findall(r"\]\(([^)]+)\)", prose(path))
    notebooks = {other.name for other in NOTEBOOKS}
    assert links
    assert [link for link in links if not link.startswith("http") and link not in notebooks] == []


@pages("path", QUICK)
def test_a_notebook_runs_in_an_empty_folder(path, tmp_path):
    outputs = execute(notebook(path), tmp_path)
    assert outputs
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []
    assert not list(tmp_path.iterdir())


def test_a_script_runs_in_an_empty_folder_and_prints_what_its_page_shows(tmp_path):
    finished = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", SCRIPT],
        cwd=tmp_path,
        env=os.environ | {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"},  # as the site was built
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    assert not list(tmp_path.iterdir())
    printed = [line.strip() for line in finished.stdout.splitlines() if line.strip()]
    assert len(printed) >= 10
    following = iter(printed)  # the script also prints what the page folds, a listing
    assert all(line.strip() in following for line in shown(SCRIPT) if line.strip())


def test_the_script_for_several_processes_trains_in_an_empty_folder(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--local-addr=127.0.0.1", "--nproc-per-node=2"]
    script = [SITE / "train_parallel.py", "--steps=2", "--batch-size=64"]
    finished = subprocess.run(
        [*torchrun, *script],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert finished.returncode == 0, finished.stderr
    printed = re.findall(r"^step +(\d): loss 2\.\d{5}$", finished.stdout, re.MULTILINE)
    assert printed == ["0", "1"]
    assert not list(tmp_path.iterdir())


def packed(path):
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None
        return {name: file.read(name) for name in file.namelist()}


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("auto_examples_python.zip", SCRIPTS),
        ("auto_examples_jupyter.zip", NOTEBOOKS),
        *((f"{a.stem}.zip", [a, b]) for a, b in zip(SCRIPTS, NOTEBOOKS, strict=True)),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)} files",
)
def test_a_zip_has_the_same_files(name, files):
    (path,) = SITE.glob(f"_downloads/*/{name}")
    assert packed(path) == {file.name: file.read_bytes() for file in files}


def test_one_zip_has_everything():
    files = [*SCRIPTS, *NOTEBOOKS, *(SITE / Path(name).name for name in FILES), WHEEL]
    expected = {file.name: file.read_bytes() for file in files}
    assert packed(SITE / "everything.zip") == expected


@pytest.mark.parametrize("name", FILES)
def test_the_files_to_copy_are_the_packages(name):
    source = (ROOT / "src" / "cgn_tutorial" / name).read_bytes()
    assert (SITE / Path(name).name).read_bytes() == source
    assert packed(WHEEL)[f"cgn_tutorial/{name}"] == source


def test_the_wheel_has_all_of_the_package():
    package = ROOT / "src" / "cgn_tutorial"
    files = [path for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    source = {str(path.relative_to(ROOT / "src")): path.read_bytes() for path in files}
    assert {
        name: data for name, data in packed(WHEEL).items() if ".dist-info/" not in name
    } == source
