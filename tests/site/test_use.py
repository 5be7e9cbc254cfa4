"""What a reader does on the site: switch the theme, download, copy, search."""

from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from conftest import PAGES, ROOT

WHEEL_COMMAND = "pre:has(a[href$='.whl'])"
TUTORIAL = [path for path in PAGES if path.startswith("auto_examples/plot_")]


@pytest.mark.parametrize("page_path", TUTORIAL)
def test_figures_follow_the_theme_switch(page_path, address, visit, tally):
    page = visit(f"{address}/{page_path}")
    figures = {kind: page.locator(f"article img.only-{kind}") for kind in ("light", "dark")}
    assert figures["light"].count() == figures["dark"].count() > 0
    for theme, other in (("dark", "light"), ("light", "dark")):
        page.get_by_role("button", name="Color mode").click()
        page.get_by_role("button", name=theme, exact=False).first.click()
        assert all(figure.is_visible() for figure in figures[theme].all())
        assert not any(figure.is_visible() for figure in figures[other].all())
        page.reload()
        assert page.evaluate("document.documentElement.dataset.theme") == theme
    tally("tutorial page × address: figures follow the theme switch, which is remembered")


@pytest.mark.parametrize("page_path", TUTORIAL)
def test_downloads_save_the_right_bytes(page_path, address, visit, tally):
    page = visit(f"{address}/{page_path}")
    name = page_path.removeprefix("auto_examples/").removesuffix(".html")
    expected = {
        f"{name}.py": (ROOT / "examples" / f"{name}.py").read_bytes(),
        f"{name}.ipynb": (ROOT / "docs" / "auto_examples" / f"{name}.ipynb").read_bytes(),
    }
    for file, content in expected.items():
        link = page.locator(f".sphx-glr-download a[href$='/{file}']")
        if address.startswith("file:"):  # the browser opens what is there already
            saved = Path(unquote(urlsplit(link.evaluate("(link) => link.href")).path))
        else:
            with page.expect_download() as download:
                link.click()
            assert download.value.suggested_filename == file
            saved = download.value.path()
        assert saved.read_bytes() == content
        tally("download × address: saves the right bytes")


@pytest.mark.parametrize(
    ("page_path", "source"),
    [
        *[(path, f"examples/{path[14:-5]}.py") for path in TUTORIAL],
        ("index.html", "README.md"),
        ("misuse.html", "docs/misuse.rst"),
    ],
)
def test_copy_buttons_copy_code_alone(page_path, source, address, visit, tally):
    page = visit(f"{address}/{page_path}", permissions=["clipboard-read", "clipboard-write"])
    lines = (ROOT / source).read_text().splitlines()
    if any(line.startswith(">>> ") for line in lines):
        code = {line[4:].strip() for line in lines if line.startswith((">>> ", "... "))}
    else:  # a page may print what the package runs
        package = "".join(path.read_text() for path in ROOT.glob("src/**/*.py"))
        code = {line.strip() for line in [*lines, *package.splitlines()]}
        code |= {line.removeprefix("#").strip() for line in lines}  # commands in a page's text
    if page_path == "index.html":
        code.add(page.locator(WHEEL_COMMAND).inner_text().strip())
    assert page.locator(".sphx-glr-script-out button.copybtn").count() == 0
    page.locator("details.fold").evaluate_all("all => all.forEach(fold => { fold.open = true; })")
    buttons = page.locator("button.copybtn").all()
    for button in buttons:
        page.evaluate("navigator.clipboard.writeText('nothing')")
        button.focus()
        page.keyboard.press("Enter")
        page.wait_for_function("async () => await navigator.clipboard.readText() !== 'nothing'")
        copied = page.evaluate("navigator.clipboard.readText()").strip()
        assert copied
        assert {line.strip() for line in copied.splitlines()} - code <= {""}
    tally("code blocks × address: copied without output and prompts", len(buttons))


@pytest.mark.parametrize("page_path", TUTORIAL)
@pytest.mark.parametrize("scripts", [True, False])
def test_folds_open_and_are_printed_open(page_path, scripts, server, visit, tally):
    page = visit(f"{server}/{page_path}", java_script_enabled=scripts)
    folds = page.locator("details.fold").all()
    lines = [fold.locator("> summary").inner_text() for fold in folds]
    assert len([line for line in lines if line.endswith("?")]) >= 3  # to check oneself
    assert any(line.startswith("Draw ") for line in lines)
    assert all(lines)

    def seen():
        return page.locator("details.fold").evaluate_all("""
            (folds) => folds.map((fold) =>
              fold.querySelector(":scope > :not(summary):last-child").checkVisibility())""")

    assert not any(seen())
    page.emulate_media(media="print")
    assert all(seen())
    page.emulate_media(media="screen")
    for number, fold in enumerate(folds):
        fold.locator("> summary").press("Enter")
        assert seen() == [other <= number for other in range(len(folds))]
    assert page.problems == [] or not scripts  # which are asked for, and not loaded
    tally("folds: closed at first, opened by the keyboard, open in print", len(folds))


def test_the_command_names_the_wheel_by_its_address(address, visit, tally):
    page = visit(f"{address}/index.html")
    command = page.locator(WHEEL_COMMAND).inner_text().strip()
    assert command.startswith("pip install ")
    wheel = command.split()[2]
    assert wheel.startswith(f"{address}/cgn_tutorial-")
    if address.startswith("file:"):
        assert Path(unquote(urlsplit(wheel).path)).is_file()
    tally("front page × address: the command names the wheel by its address")


@pytest.mark.parametrize(
    ("query", "target"),
    [("damping", "plot_1_newton_step"), ("negative curvature", "plot_2_conjugate_gradients")],
)
def test_search_finds(query, target, address, visit, tally):
    page = visit(f"{address}/index.html")
    page.keyboard.press("Control+k")
    page.keyboard.type(query)
    page.keyboard.press("Enter")
    page.wait_for_url("**/search.html?q=*")
    hit = page.locator(f"#search-results li a[href*='{target}']").first
    hit.wait_for()
    assert page.problems == []
    hit.click()
    page.wait_for_url(f"**/{target}.html*")
    assert query in page.locator("article").inner_text().lower()
    tally("search × address: finds the page")
