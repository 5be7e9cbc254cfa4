# /// script
# requires-python = ">=3.11"
# dependencies = ["nox[uv]>=2025.2"]
# ///
"""The project's chores: `nox` lints and tests, `nox -s docs` builds the site, `nox -l` lists."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import nox

nox.needs_version = ">=2025.2"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "tests"]

PYPROJECT = nox.project.load_toml("pyproject.toml")
OLDEST_PYTHON = PYPROJECT["project"]["requires-python"].removeprefix(">=")
SOURCE = "docs"
SITE = "docs/_build/html"
WHEEL = "docs/_build/wheel"
PARALLEL = ("-n", "auto", "--maxprocesses", "4", "--dist", "worksteal")
THREAD = {"OMP_NUM_THREADS": "1"}  # networks this small are hardly faster on two


def install(session: nox.Session, *groups: str, options: Sequence[str] = ()) -> None:
    """Install the package, in place, and the named dependency groups."""
    session.install(*options, "-e", ".", *nox.project.dependency_groups(PYPROJECT, *groups))


def install_wheel(session: nox.Session, *groups: str) -> None:
    """Build the wheel that the site offers, and install it, not the source: downloads get no more.

    Args:
        session: The session, whose environment gets the wheel.
        groups: The dependency groups to install, one of which has hatchling, which builds.
    """
    session.install(*nox.project.dependency_groups(PYPROJECT, *groups))
    folder = Path(WHEEL).resolve()
    options = ("--clean", "--target", "wheel", "--directory", str(folder))
    session.run_install("hatchling", "build", *options)
    session.install(*map(str, folder.glob("*.whl")))


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests; arguments go to pytest."""
    install(session, "tests")
    session.run("pytest", *PARALLEL, *session.posargs, env=THREAD)


@nox.session(python=OLDEST_PYTHON, venv_backend="uv", reuse_venv=False)
def lowest(session: nox.Session) -> None:
    """Run what versions can break with the oldest that pyproject.toml allows."""
    install(session, "tests", options=("--resolution", "lowest-direct"))
    session.run("pytest", "-m", "versions", *PARALLEL, *session.posargs, env=THREAD)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, spelling and types."""
    install(session, "lint", "docs")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("codespell")
    session.run("actionlint")
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the site, docs/_build/html/index.html, running the tutorial's pages that changed."""
    install_wheel(session, "docs")
    for earlier in Path(SITE).glob("*.whl"):
        earlier.unlink()
    options = ("-W", "-n", "-b", "html", *session.posargs)
    session.run("sphinx-build", *options, SOURCE, SITE, env=THREAD)


@nox.session(name="docs-live")
def docs_live(session: nox.Session) -> None:
    """Build the site, serve it, and build it again whenever a file changes."""
    install(session, "docs")
    session.install("sphinx-autobuild>=2024.10")
    watched = [arg for folder in ("src", "examples") for arg in ("--watch", folder)]
    written = ("*/docs/auto_examples/*", "*/docs/api/*", "*.dark.svg")
    ignored = [arg for pattern in written for arg in ("--ignore", pattern)]
    session.run("sphinx-autobuild", *watched, *ignored, SOURCE, SITE, *session.posargs)


@nox.session
def downloads(session: nox.Session) -> None:
    """Try what the built site offers for download, with nothing of the project but its wheel."""
    wheels = list(Path(SITE).glob("*.whl"))
    if not wheels:
        session.error(f"{SITE} has no wheel: build the site first, nox -s docs")
    session.install(*map(str, wheels), *nox.project.dependency_groups(PYPROJECT, "downloads"))
    session.run(
        "pytest", "--verbose", "--noconftest", "tests/site/test_downloads.py", *session.posargs
    )


@nox.session
def bench(session: nox.Session) -> None:
    """Measure what steps and products cost, and write docs/bench, which the site shows."""
    install(session)
    session.run("python", "tests/benchmarks/bench.py", *session.posargs)


@nox.session
def experiments(session: nox.Session) -> None:
    """Race in full for pages 4 and 7: write docs/experiments and docs/least_squares."""
    install(session)
    session.run("python", "tests/benchmarks/experiments.py", *session.posargs)
    session.run("python", "tests/benchmarks/least_squares.py", *session.posargs)


@nox.session
def site(session: nox.Session) -> None:
    """Look at every page of the built site in a browser; arguments go to pytest."""
    install(session, "site")
    options = ("--confcutdir=tests/site", *PARALLEL, "--dist", "loadgroup")  # a page, a process
    session.run("pytest", *options, "tests/site", *session.posargs)


@nox.session
def linkcheck(session: nox.Session) -> None:
    """Follow the site's links to other sites, which needs a network."""
    install_wheel(session, "docs")
    session.run("sphinx-build", "-b", "linkcheck", SOURCE, "docs/_build/linkcheck")


@nox.session
def rebuild(session: nox.Session) -> None:
    """Check what a second build of a small site runs again, and what a failing page leaves."""
    install_wheel(session, "docs", "rebuild")
    session.run("pytest", "--verbose", "--noconftest", "tests/test_rebuild.py", *session.posargs)


@nox.session
def clients(session: nox.Session) -> None:
    """Train with the real Lightning, Accelerate, skorch and Ignite, on the CPU."""
    install(session, "clients")
    options = ("--noconftest", "--override-ini=filterwarnings=default")  # their warnings are theirs
    environment = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    session.run("pytest", *options, "tests/clients", *session.posargs, env=environment)


if __name__ == "__main__":
    nox.main()
