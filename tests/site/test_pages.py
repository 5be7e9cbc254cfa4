"""Every page, as a browser shows it: over HTTP and from files, light and dark, wide and narrow.

A page is opened once on the server, and all tests look at that. From a file it is opened again.
"""

from contextlib import suppress

import pytest
from axe_playwright_python.sync_playwright import Axe
from conftest import BASE, MAIN, PAGES, SITE, WRITTEN
from playwright.sync_api import TimeoutError as TimedOut

THEMES = ("light", "dark")
WIDTHS = (1280, 375)

#: What a page shows, in one look, with all its folds open. Text is what is neither code nor a
#: formula. Words are those of the article without the figures to move, which are pictures without
#: scripts, and without the wheel's address, which is a file's name there.
LOOK = r"""
() => {
  for (const fold of document.querySelectorAll("details.fold")) fold.open = true;
  const shown = (element) => element.getClientRects().length > 0;
  const files = (kind) => [...document.querySelectorAll(`article img.only-${kind}`)].filter(shown);
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const text = [];
  while (walker.nextNode()) {
    const parent = walker.currentNode.parentElement;
    if (!parent.closest("math, pre, code, script, style, noscript"))
      text.push(walker.currentNode.data);
  }
  const formulas = [...document.querySelectorAll("math")];
  const images = [...document.querySelectorAll("img")].filter(shown);
  const moving = [...document.querySelectorAll(".explore, pre a[href$='.whl']")];
  const show = (display) => moving.forEach((figure) => { figure.style.display = display; });
  show("none");
  const words = document.querySelector("article")?.innerText.replace(/\s+/g, " ").trim();
  show("");
  const pairs = document.querySelectorAll("article img.only-light").length;
  return {
    theme: document.documentElement.dataset.theme,
    overflow: Math.max(...[
      ...document.querySelectorAll("html, body, main, main *:has(article), article"),
    ].map((element) => element.scrollWidth - element.clientWidth)),
    formulas: formulas.length,
    emptyFormulas: formulas.filter((formula) => {
      const {width, height} = formula.getBoundingClientRect();
      return !(width > 3 && height > 3);
    }).map((formula) => formula.textContent),
    wideFormulas: [...document.querySelectorAll(".math-block")].filter(
      (box) => box.scrollWidth > box.clientWidth + 1).map((box) => box.textContent),
    // Places that a link leads to are scrolled to that far below the upper edge.
    header: (document.querySelector(".bd-header")?.offsetHeight ?? 0)
      - (parseFloat(getComputedStyle(document.documentElement).scrollPaddingTop) || 0),
    mathFont: !formulas.length || document.fonts.check('16px "STIX Two Math Site"', "𝑥"),
    raw: text.join("").match(/\\[a-zA-Z]+|\$[^$\n]+\$|:[a-z]+:`|^\.\. |`__/gm) ?? [],
    pairs,
    figures: {light: files("light").length, dark: files("dark").length},
    broken: images.filter((image) => !image.naturalWidth).map((image) => image.src),
    words,
  };
}
"""

#: Pictures load as they come near the screen: bring each there.
LOAD_ALL = """
async () => {
  for (const image of document.querySelectorAll("img[loading=lazy]")) {
    if (!image.getClientRects().length) continue;
    image.scrollIntoView();
    await image.decode();
  }
  scrollTo(0, 0);
}
"""

#: What can differ between the themes, and not with the width of the screen.
RULES_ABOUT_COLOUR = ["color-contrast", "link-in-text-block"]
NO_COLOUR = {"rules": {rule: {"enabled": False} for rule in RULES_ABOUT_COLOUR}}
#: What axe looks for, at which width and in which theme.
LOOKS = [
    (WIDTHS[1], "light", NO_COLOUR),
    (WIDTHS[0], "light", {}),
    (WIDTHS[0], "dark", {"runOnly": RULES_ABOUT_COLOUR}),
]

#: Of what is alike, axe looks at a few, or it takes minutes: the contrast of a token depends on its
#: class alone, that of a formula is the text's, and rows without links are like a table's first.
THIN_OUT = """
() => {
  for (const fold of document.querySelectorAll("details.fold")) fold.open = true;
  const seen = new Set();
  for (const token of [...document.querySelectorAll(":is(.highlight, dt.sig) span[class]")]) {
    const kind = token.className + Boolean(token.closest(".sphx-glr-script-out"));
    if (seen.has(kind) && !token.matches("a *, :has(a, button)"))
      token.replaceWith(...token.childNodes);
    seen.add(kind);
  }
  for (const formula of document.querySelectorAll("math")) formula.textContent += "";
  for (const row of document.querySelectorAll("tbody > tr:nth-child(n + 4)"))
    if (!row.querySelector("a, button, math, th")) row.remove();
  document.body.normalize();
}
"""


def check(look, theme, tally):
    """Check one look at a page."""
    assert look["theme"] == theme
    assert look["overflow"] <= 0, "the page scrolls sideways"
    assert look["emptyFormulas"] == []
    assert look["wideFormulas"] == [], "a formula is wider than the page"
    assert look["header"] <= 0, "the header covers the place that a link leads to"
    assert look["mathFont"], "the font of formulas did not load"
    assert look["raw"] == []
    assert look["broken"] == []
    assert look["figures"] == {"light": 0, "dark": 0} | {theme: look["pairs"]}
    tally("page × theme × width: no sideways scroll, no raw markup, no broken image")
    if look["formulas"]:
        tally("formulas × theme × width: visible, in their font", look["formulas"])
    if look["pairs"]:
        tally("figures × theme × width: in the theme's version alone", look["pairs"])


def ours(page, address):
    """Check that a page asked for nothing from elsewhere, and that nothing went wrong."""
    own = (address, "data:", *filter(None, [BASE]))
    strangers = [url for url in page.requests if not url.startswith(own)]
    assert strangers == []
    assert page.problems == []


def in_turn(paths):
    """Let one process look at a page, test after test: they share the page that is opened."""
    groups = [pytest.param(path, marks=pytest.mark.xdist_group(path)) for path in paths]
    return pytest.mark.parametrize("opened", groups, indirect=True)


every_page, written_pages = in_turn(PAGES), in_turn(WRITTEN)

#: The theme lets the keyboard reach what scrolls, and no more, a moment after the width changed.
REACHABLE = """
() => [...document.querySelectorAll("pre, .pst-scrollable-table-container")].every((box) =>
  (box.scrollWidth > box.clientWidth || box.scrollHeight > box.clientHeight)
  === (box.tabIndex === 0))
"""


def show(page, width, theme):
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=theme)
    page.wait_for_function(f"document.documentElement.dataset.theme === '{theme}'")
    with suppress(TimedOut):  # the tests say what stays out of reach
        page.wait_for_function(REACHABLE, timeout=2000)


@every_page
def test_page(opened, server, visit, tally, request):
    looks = []
    for width in WIDTHS:
        for theme in THEMES:
            show(opened, width, theme)
            opened.evaluate(LOAD_ALL)
            looks.append(opened.evaluate(LOOK))
            check(looks[-1], theme, tally)
            if len(looks) == 1:
                lengths = (response.headers["content-length"] for response in opened.responses)
                assert (
                    0 < sum(map(int, lengths)) < (1_500_000 if opened.path == MAIN else 2_500_000)
                )
                tally("page: bytes within the limit")
            if folder := request.config.getoption("--shots"):
                name = f"{opened.path.replace('/', '-')}.{theme}.{width}.png"
                opened.screenshot(path=folder / name, full_page=True)
    ours(opened, server)
    tally("page: no error, no request to another host")

    page = visit(f"{server}/{opened.path}", java_script_enabled=False, color_scheme="dark")
    look = page.evaluate(LOOK)
    check(look | {"broken": []}, "light", lambda *_: None)  # pictures load as they scroll into view
    assert {look["words"] for look in looks} == {look["words"]}
    tally("page: reads the same without JavaScript")


@pytest.mark.parametrize("path", WRITTEN)
def test_page_from_a_file(path, visit, tally):
    """What the address decides is whether scripts, fonts and pictures load, not the layout."""
    page = visit(f"{SITE.as_uri()}/{path}")
    show(page, WIDTHS[0], "light")
    page.evaluate(LOAD_ALL)
    check(page.evaluate(LOOK), "light", tally)
    ours(page, SITE.as_uri())
    tally("page from a file: no error, no request to another host")


@written_pages
def test_page_is_accessible(opened, tally):
    opened.evaluate(THIN_OUT)
    for width, theme, rules in LOOKS:
        show(opened, width, theme)
        found = Axe().run(opened, options={"resultTypes": ["violations"], "preload": False} | rules)
        assert [
            (violation["id"], [node["html"] for node in violation["nodes"]])
            for violation in found.response["violations"]
        ] == []
        tally("page × theme, or width: axe-core without a violation")


@written_pages
def test_keyboard_reaches_everything(opened, tally):
    show(opened, WIDTHS[0], "light")
    expected = opened.evaluate("""
        () => {
          for (const fold of document.querySelectorAll("details.fold")) fold.open = false;
          const all = document.querySelectorAll("a[href], button, input, summary, [tabindex='0']");
          window.missing = new Set([...all].filter((element) => element.checkVisibility()
              && !element.disabled && element.tabIndex >= 0));
          window.unseen = [];
          document.addEventListener("focusin", ({target}) => {
            window.missing.delete(target);
            const style = getComputedStyle(target);
            if (style.opacity < 0.5 || style.visibility === "hidden")
              window.unseen.push(target.outerHTML);
          });
          document.activeElement.blur();
          return window.missing.size;
        }""")
    for presses in range(2 * expected + 20):  # boxes that scroll stop the Tab key, too
        opened.keyboard.press("Tab")
        if presses % 10 == 9 and not opened.evaluate("window.missing.size"):
            break
    assert opened.evaluate("[...window.missing].map((element) => element.outerHTML)") == []
    assert opened.evaluate("window.unseen") == []
    tally("links, buttons and fields: reached by the keyboard, and seen there", expected)


@pytest.mark.parametrize("where", ["missing.html", "nowhere/at/all/missing.html"])
def test_missing_page_leads_back(where, server, visit, tally):
    if "/" in where and not BASE:
        pytest.skip("only a site built for an address, SITE_URL, knows the way back from anywhere")
    page = visit(f"{server}/{where}")
    page.get_by_role("link", name="first page").click()
    page.wait_for_url(f"{BASE or server + '/'}index.html")
    assert page.locator("article .landing").is_visible()
    tally("missing page: leads back")
