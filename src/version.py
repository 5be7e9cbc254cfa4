"""The package's version: the release, and a sum of the package's files that moves with them.

The build and the site read `VERSION`; it is not installed.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

RELEASE = "0.1.0"
PACKAGE = Path(__file__).with_name("cgn_tutorial")


def content(folder: Path) -> str:
    """Return eight hexadecimal digits that depend on every file in a folder, and on its name."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix != ".pyc":
            name = path.relative_to(folder).as_posix()
            digest.update(hashlib.sha256(name.encode()).digest())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:8]


VERSION = f"{RELEASE}+{content(PACKAGE)}"
