"""What README shows runs. What the site's pages show runs while it is built."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_readmes_code_runs():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    assert names["step"] == 2
    assert len(names["optimizer"].solves) == 8
