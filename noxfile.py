# /// script
# requires-python = ">=3.11"
# dependencies = ["nox[uv]>=2025.2"]
# ///
"""The project's chores: `nox` lints and tests, `nox -s docs` builds the site, `nox -l` lists."""

from __future__ import annotations

import shutil
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
EXPECTED = "docs/_build/expected.json"


def install(session: nox.Session, *groups: str, options: Sequence[str] = ()) -> None:
    """Install the package, in place, and the named dependency groups."""
    session.install(*options, "-e", ".", *nox.project.dependency_groups(PYPROJECT, *groups))


def build_wheel(session: nox.Session) -> None:
    """Build the wheel that the site offers, in place of an earlier one."""
    shutil.rmtree(WHEEL, ignore_errors=True)
    for earlier in Path(SITE).glob("*.whl"):
        earlier.unlink()
    session.run(
        "hatchling", "build", "--target", "wheel", "--directory", str(Path(WHEEL).resolve())
    )


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests; arguments go to pytest."""
    install(session, "tests")
    session.run("pytest", *session.posargs)


@nox.session(python=OLDEST_PYTHON, venv_backend="uv", reuse_venv=False)
def lowest(session: nox.Session) -> None:
    """Run the tests with the oldest versions that pyproject.toml allows."""
    install(session, "tests", options=("--resolution", "lowest-direct"))
    session.run("pytest", *session.posargs)


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
    install(session, "docs")
    build_wheel(session)
    session.run("sphinx-build", "-W", "-n", "-b", "html", SOURCE, SITE, *session.posargs)
    session.run("python", "tests/site/expected.py", EXPECTED)  # here, where there is torch


@nox.session(name="docs-live")
def docs_live(session: nox.Session) -> None:
    """Build the site, serve it, and build it again whenever a file changes."""
    install(session, "docs")
    session.install("sphinx-autobuild>=2024.10")
    build_wheel(session)
    watched = [arg for folder in ("src", "examples") for arg in ("--watch", folder)]
    written = ("*/docs/auto_examples/*", "*/docs/api/*", "*.dark.svg")
    ignored = [arg for pattern in written for arg in ("--ignore", pattern)]
    session.run("sphinx-autobuild", *watched, *ignored, SOURCE, SITE, *session.posargs)


@nox.session
def downloads(session: nox.Session) -> None:
    """Run what the built site offers for download, with nothing of the project but its wheel."""
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
    """Race the optimizers of page 4 in full, and write docs/experiments, which the site shows."""
    install(session)
    session.run("python", "tests/benchmarks/experiments.py", *session.posargs)


@nox.session
def site(session: nox.Session) -> None:
    """Look at every page of the built site in a browser; arguments go to pytest."""
    session.install(*nox.project.dependency_groups(PYPROJECT, "site"))
    session.run("pytest", "--confcutdir=tests/site", "tests/site", *session.posargs)


@nox.session
def linkcheck(session: nox.Session) -> None:
    """Follow the site's links to other sites, which needs a network."""
    install(session, "docs")
    session.run("sphinx-build", "-b", "linkcheck", SOURCE, "docs/_build/linkcheck")


@nox.session
def rebuild(session: nox.Session) -> None:
    """Check what a second build of a small site runs again, and what a failing page leaves."""
    install(session, "docs")
    session.install("pytest>=8.4")
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
