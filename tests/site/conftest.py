"""What the tests of the built site share: the pages, a server, one browser, and the tally.

`nox -s site` runs them, in an environment of its own, except for those of the downloads, which run
by `nox -s downloads` in one that has nothing of the project but the site's wheel.
"""

import collections
import functools
import http.server
import re
import shutil
import threading
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import playwright.sync_api
import pytest

collect_ignore = ["test_downloads.py"]

ROOT = Path(__file__).parents[2]
SITE = ROOT / "docs" / "_build" / "html"
PAGES = sorted(
    (
        path.relative_to(SITE).as_posix()
        for path in SITE.rglob("*.html")
        if "_static" not in path.relative_to(SITE).parts
    ),
    key=lambda path: (path.startswith("_modules/"), path),
)
#: The pages that somebody wrote, the first of all: no listings of source.
WRITTEN = [path for path in PAGES if not path.startswith("_modules/")]
#: The pages of the tutorial, which are programs.
TUTORIAL = [f"auto_examples/{path.stem}.html" for path in sorted(ROOT.glob("examples/plot_*.py"))]
#: The address that the site is built for, which its page for missing ones starts from, if any.
BASE = "".join(re.findall(r'<base href="(.*?)"', (SITE / "404.html").read_text())) if PAGES else ""
#: One page stands for all where these cannot differ: the largest.
MAIN = next(path for path in TUTORIAL if "/plot_3_" in path)
TALLY: collections.Counter[str] = collections.Counter()
CLIPBOARD = ["clipboard-read", "clipboard-write"]


def pytest_addoption(parser):
    parser.addoption("--shots", type=Path, help="save a picture of every page in this folder")


def pytest_configure(config):
    if "index.html" not in PAGES:
        pytest.exit(f"There is no site in {SITE}: build it first, nox -s docs", returncode=2)
    if not shutil.which("chromium"):
        pytest.exit("There is no chromium on PATH: apt-get install chromium", returncode=2)


def pytest_generate_tests(metafunc):
    if "address" in metafunc.fixturenames:
        metafunc.parametrize("address", ["http", "file"], indirect=True)


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # one of several processes
        session.config.workeroutput["tally"] = dict(TALLY)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    TALLY.update(getattr(node, "workeroutput", {}).get("tally", {}))


def pytest_terminal_summary(terminalreporter):
    terminalreporter.section("checked")
    for what, count in sorted(TALLY.items()):
        terminalreporter.write_line(f"{count:6}  {what}")


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves the site as its host does: what is missing gets the site's own page for that."""

    def log_message(self, *args):
        pass

    def send_error(self, code, message=None, explain=None):
        body = (SITE / "404.html").read_bytes()
        self.send_response(code)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture(scope="session")
def server():
    """The address of the site on a local server."""
    handler = functools.partial(Handler, directory=SITE)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="session")
def chromium():
    with playwright.sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"))
        yield browser
        browser.close()


@pytest.fixture
def address(request, server):
    """Where the site is: on a server, or in the file system."""
    return server if request.param == "http" else SITE.as_uri()


def file(url):
    """The file at an address below the one that the site is built for."""
    return SITE / (urlsplit(url.removeprefix(BASE)).path or "index.html")


def failure(request):
    """What failed, unless the browser itself gave the request up, as it may an icon's."""
    if request.failure != "net::ERR_ABORTED":
        yield f"failed: {request.url}, {request.failure}"


@contextmanager
def visits(chromium):
    """A function that opens pages in a browser that has seen none before, until the end.

    The page's list `problems` collects what goes wrong.
    """
    contexts = []

    def visit(url, **options):
        # Colours change at once, so that nothing is looked at half way.
        defaults = {"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce"}
        contexts.append(chromium.new_context(**defaults | options))
        page = contexts[-1].new_page()
        if BASE:
            page.route(f"{BASE}**", lambda route: route.fulfill(path=file(route.request.url)))
        page.problems, page.requests, page.responses = [], [], []
        page.on("pageerror", lambda error: page.problems.append(f"script: {error}"))
        page.on("console", lambda line: line.type == "error" and page.problems.append(line.text))
        page.on("requestfailed", lambda request: page.problems.extend(failure(request)))
        page.on("request", lambda request: page.requests.append(request.url))
        page.on("response", lambda response: page.responses.append(response))
        page.goto(url)
        page.evaluate("document.fonts.ready")
        return page

    try:
        yield visit
    finally:
        for context in contexts:
            context.close()


@pytest.fixture
def visit(chromium):
    """Open pages for one test."""
    with visits(chromium) as visit:
        yield visit


@pytest.fixture(scope="module")
def opened(request, chromium, server):
    """A page on the server, opened once for all tests of a module, which leave it as they like."""
    with visits(chromium) as visit:
        page = visit(f"{server}/{request.param}", permissions=CLIPBOARD)
        page.path = request.param
        yield page


@pytest.fixture
def tally():
    """Count what was checked, for the list at the end."""

    def tally(what, count=1):
        assert count > 0, f"no {what} to check"
        TALLY[what] += count

    return tally
