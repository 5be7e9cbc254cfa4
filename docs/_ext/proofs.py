"""Tables with a column "Checked by": each test there becomes a link to its source.

A reader of the site has no tests at hand, so that a test's name alone says nothing. If the
repository's address is known, "a test" leads to the test; else the words stand alone.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging

COLUMN = "Checked by"
TESTS = Path(__file__).parents[2] / "tests"


def places() -> dict[str, str]:
    """For each function of the tests, its file and its line: `tests/test_cg.py#L12`."""
    return {
        definition[1]: f"tests/{path.name}#L{number}"
        for path in sorted(TESTS.glob("*.py"))
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1)
        if (definition := re.match(r"def (\w+)", line))
    }


def link(app: Sphinx, doctree: nodes.document) -> None:
    """Put links, or words, in the place of the names of tests."""
    tables = [table for table in doctree.findall(nodes.table) if heads(table)[-1:] == [COLUMN]]
    found = places() if tables else {}
    for table in tables:
        for row in next(iter(table.findall(nodes.tbody))).children:
            names = list(row.children[-1].findall(nodes.literal))
            for number, name in enumerate(names):
                if name.astext() not in found:
                    logging.getLogger(__name__).warning(
                        "no test is called %s", name.astext(), location=name
                    )
                    continue
                words = "another" if number else "a test"
                place = f"{app.config.repository}/blob/HEAD/{found[name.astext()]}"
                new: nodes.Node = nodes.Text(words)
                if app.config.repository:
                    new = nodes.reference("", words, refuri=place, reftitle=name.astext())
                name.parent.replace(name, new)


def heads(table: nodes.table) -> list[str]:
    """The words at the head of each column."""
    return [
        entry.astext() for head in table.findall(nodes.thead) for entry in head.findall(nodes.entry)
    ]


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect to the reading of pages."""
    app.add_config_value("repository", "", "env", str)
    app.connect("doctree-read", link)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
