# /// script
# requires-python = ">=3.11"
# dependencies = ["nox[uv]>=2025.2"]
# ///
"""The project's chores: `nox` lints and tests, `nox -s docs` builds the site, `nox -l` lists."""

from __future__ import annotations

import nox

nox.needs_version = ">=2025.2"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "tests"]

PYPROJECT = nox.project.load_toml("pyproject.toml")
SOURCE = "docs"
SITE = "docs/_build/html"


def install(session: nox.Session, *groups: str) -> None:
    """Install the package, in place, and the named dependency groups."""
    session.install("-e", ".", *nox.project.dependency_groups(PYPROJECT, *groups))


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests; arguments go to pytest."""
    install(session, "tests")
    session.run("pytest", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, spelling and types."""
    install(session, "lint", "docs")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("codespell")
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the site, docs/_build/html/index.html, running the tutorial's pages that changed."""
    install(session, "docs")
    session.run("sphinx-build", "-W", "-n", "-b", "html", SOURCE, SITE, *session.posargs)


@nox.session(name="docs-live")
def docs_live(session: nox.Session) -> None:
    """Build the site, serve it, and build it again whenever a file changes."""
    install(session, "docs")
    session.install("sphinx-autobuild>=2024.10")
    watched = [arg for folder in ("src", "examples") for arg in ("--watch", folder)]
    ignored = ["--ignore", "*/docs/auto_examples/*", "--ignore", "*/docs/api/*"]
    session.run("sphinx-autobuild", *watched, *ignored, SOURCE, SITE, *session.posargs)


if __name__ == "__main__":
    nox.main()
