"""What all tests share: reproducible property tests, and skips where there is no GPU."""

import pytest
import systems
import torch
from hypothesis import settings

from cgn_tutorial.pages.training import HARMLESS

# These run in environments of their own, by `nox -s rebuild clients` and `nox -s site downloads`.
collect_ignore = ["test_rebuild.py", "clients", "site"]

settings.register_profile("reproducible", derandomize=True, deadline=None)
settings.load_profile("reproducible")


def pytest_configure(config: pytest.Config) -> None:
    # Around each test pytest sets filters of its own, above the one that the package sets.
    config.addinivalue_line("filterwarnings", f"ignore:{HARMLESS}")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"property cases: {systems.drawn} systems")
