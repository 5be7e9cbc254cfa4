"""What a reader does on the site: switch the theme, download, copy, search."""

from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from conftest import CLIPBOARD, MAIN, ROOT, TUTORIAL

WHEEL_COMMAND = "pre:has(a[href$='.whl'])"


tutorial_pages = pytest.mark.parametrize("opened", TUTORIAL, indirect=True)


def test_figures_follow_the_theme_switch(address, visit, tally):
    """On one page: the others' figures follow the same attribute, which `test_page` sets."""
    page = visit(f"{address}/{MAIN}")
    figures = {kind: page.locator(f"article img.only-{kind}") for kind in ("light", "dark")}
    assert figures["light"].count() == figures["dark"].count() > 0
    for theme, other in (("dark", "light"), ("light", "dark")):
        page.get_by_role("button", name="Color mode").click()
        page.get_by_role("button", name=theme, exact=False).first.click()
        assert all(figure.is_visible() for figure in figures[theme].all())
        assert not any(figure.is_visible() for figure in figures[other].all())
        page.reload()
        assert page.evaluate("document.documentElement.dataset.theme") == theme
    tally("address: figures follow the theme switch, which is remembered")


def folds(page):
    """For each fold whether what it hides is seen."""
    return page.locator("details.fold").evaluate_all("""
        (folds) => folds.map((fold) =>
          fold.querySelector(":scope > :not(summary):last-child").checkVisibility())""")


def check_folds(page):
    """Check the folds of a page that has just been opened; return how many there are."""
    summaries = page.locator("details.fold > summary").all()
    assert not any(folds(page))
    page.emulate_media(media="print")
    assert all(folds(page))
    page.emulate_media(media="screen")
    for number, summary in enumerate(summaries):
        summary.press("Enter")
        assert folds(page) == [other <= number for other in range(len(summaries))]
    return len(summaries)


@tutorial_pages
def test_folds_open_and_are_printed_open(opened, tally):
    tally("folds: closed at first, opened by the keyboard, open in print", check_folds(opened))
    lines = opened.locator("details.fold > summary").all_inner_texts()
    assert len([line for line in lines if line.endswith("?")]) >= 3  # to check oneself
    assert any(line.startswith("Draw ") for line in lines)
    assert all(lines)
    assert opened.problems == []


def test_folds_open_without_scripts(server, visit, tally):
    page = visit(f"{server}/{MAIN}", java_script_enabled=False)
    tally("folds of one page: the same without scripts", check_folds(page))


def code_of(source):
    """The lines that a page's copy buttons may copy."""
    lines = (ROOT / source).read_text().splitlines()
    if any(line.startswith(">>> ") for line in lines):
        return {line[4:].strip() for line in lines if line.startswith((">>> ", "... "))}
    package = "".join(path.read_text() for path in ROOT.glob("src/**/*.py"))
    code = {line.strip() for line in [*lines, *package.splitlines()]}  # which a page may print
    return code | {line.removeprefix("#").strip() for line in lines}  # commands in a page's text


#: Press each copy button, and wait for what it copies, for a second at most.
COPY = """
async () => {
  const copied = [];
  for (const button of document.querySelectorAll("button.copybtn")) {
    await navigator.clipboard.writeText("nothing");
    button.click();
    let text = "nothing";
    for (let tries = 0; text === "nothing" && tries < 100; tries++) {
      await new Promise((resume) => setTimeout(resume, 10));
      text = await navigator.clipboard.readText();
    }
    copied.push(text);
  }
  return copied;
}
"""


def check_copies(page, source):
    """Check what each copy button of a page copies; return how many there are."""
    code = code_of(source)
    if source == "README.md":
        code.add(page.locator(WHEEL_COMMAND).inner_text().strip())
    assert page.locator(".sphx-glr-script-out button.copybtn").count() == 0
    page.locator("details.fold").evaluate_all("all => all.forEach(fold => { fold.open = true; })")
    page.evaluate("navigator.clipboard.writeText('nothing')")
    page.locator("button.copybtn").first.press("Enter")
    page.wait_for_function("async () => await navigator.clipboard.readText() !== 'nothing'")
    by_keyboard = page.evaluate("navigator.clipboard.readText()")
    copies = page.evaluate(COPY)
    assert copies[0] == by_keyboard
    for copied in copies:
        assert copied.strip() not in ("", "nothing")
        assert {line.strip() for line in copied.splitlines()} - code <= {""}
    return len(copies)


@tutorial_pages
def test_copy_buttons_copy_code_alone(opened, tally):
    source = f"examples/{opened.path[14:-5]}.py"
    tally("code blocks: copied without output and prompts", check_copies(opened, source))


@pytest.mark.parametrize(
    ("path", "source"), [("index.html", "README.md"), ("misuse.html", "docs/misuse.rst")]
)
def test_copy_buttons_copy_code_alone_from_either_address(path, source, address, visit, tally):
    page = visit(f"{address}/{path}", permissions=CLIPBOARD)
    tally("code blocks × address: copied without output and prompts", check_copies(page, source))


def test_downloads_save_the_right_bytes(server, visit, tally):
    """On one page: `test_reading` holds the files of all pages against their sources."""
    page = visit(f"{server}/{MAIN}")
    name = MAIN.removeprefix("auto_examples/").removesuffix(".html")
    for file, source in ((f"{name}.py", "examples"), (f"{name}.ipynb", "docs/auto_examples")):
        with page.expect_download() as download:
            page.locator(f".sphx-glr-download a[href$='/{file}']").click()
        assert download.value.suggested_filename == file
        assert download.value.path().read_bytes() == (ROOT / source / file).read_bytes()
        tally("download: saves the right bytes")


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
