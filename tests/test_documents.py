"""What README shows runs. What the site's pages show runs while it is built."""

import re
import runpy
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_readmes_code_runs():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    assert names["step"] == 2
    assert len(names["optimizer"].solves) == 4  # one for each layer


def symbols(text):
    """The letters of all formulas, Latin and Greek, without indices and words."""
    formulas = re.findall(r":math:`(.+?)`", text, re.DOTALL)
    formulas += re.findall(r"\.\. math::(.*?)\n(?:# ?)?(?=[^\s#])", text, re.DOTALL)
    found = set()
    for formula in formulas:
        bare = re.sub(r"\\(?:mathrm|operatorname|text|begin|end)\{.*?\}", " ", formula)
        bare = re.sub(r"_\{.*?\}|_\\?\w+|\^\\?\w+|\^\{.*?\}", " ", bare)
        found |= set(re.findall(r"(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])", bare))
        found |= set(GREEK.findall(bare))
    return found


GREEK = re.compile(
    r"\\(alpha|beta|gamma|delta|kappa|lambda|mu|rho|sigma|theta|ell|phi|pi|varepsilon)\b"
)
#: What counts something, or is a sign of mathematics.
INDICES = set("ijklt") | {"I", "pi"}  # and what everybody knows


def test_notation_has_every_symbol_of_two_pages():
    pages = [symbols(path.read_text("utf-8")) for path in sorted(ROOT.glob("examples/plot_*.py"))]
    assert {"alpha", "kappa", "J", "v"} <= set.union(*pages)  # it reads formulas
    assert symbols("# .. math::\n#\n#    a = \\beta\n#\n# B") == {"a", "beta"}  # on lines, too
    uses = Counter(symbol for page in pages for symbol in page)
    several = {symbol for symbol, count in uses.items() if count > 1}
    explained = symbols((ROOT / "docs" / "notation.rst").read_text("utf-8"))
    assert several - INDICES - explained == set()


def test_the_front_page_marks_what_differs_from_sgd():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (marked,) = re.findall(r":emphasize-lines: (.+)", (ROOT / "docs" / "index.rst").read_text())
    numbers = set()
    for part in marked.split(","):
        first, _, last = part.partition("-")
        numbers |= set(range(int(first), int(last or first) + 1))
    lines = enumerate(code.splitlines(), start=1)
    ours = {n for n, line in lines if re.search("curvature|CGN|GGN", line)}
    assert numbers == ours


def test_the_front_page_and_the_tutorial_show_one_way_through():
    def way(path, *folders):
        text = path.read_text("utf-8").partition("he tutorial in 25 minutes")[2]
        steps = re.findall(r"^ *\d\. (.+?)(?=^ *\d\. |^\S|\n\n)", text, re.MULTILINE | re.DOTALL)
        text = " ".join(" ".join(steps).split())
        for folder in folders:
            text = text.replace(f"<{folder}", "<")
        return text

    front = way(ROOT / "docs" / "index.rst", "auto_examples/", "guides/")
    tutorial = way(ROOT / "examples" / "GALLERY_HEADER.rst", "../guides/")
    assert front == tutorial
    assert front.count("`__") == 9


@pytest.mark.parametrize("address", ["https://example.org/owner/name", ""])
def test_the_site_leads_to_the_repository_if_its_address_is_known(address, monkeypatch):
    monkeypatch.chdir(ROOT / "docs")
    monkeypatch.setattr("sys.path", [*sys.path])  # which conf.py adds to
    monkeypatch.setenv("REPOSITORY_URL", f"{address}/" if address else "")
    tags = set()
    conf = runpy.run_path("conf.py", {"tags": tags})
    links = [link["url"] for link in conf["html_theme_options"]["icon_links"]]
    assert links == [address] * bool(address)
    assert tags == ({"repository"} if address else set())
    workflow = (ROOT / ".github" / "workflows" / "checks.yml").read_text("utf-8")
    assert "REPOSITORY_URL: ${{ github.server_url }}/${{ github.repository }}" in workflow
