"""How the benchmarks measure, and how they write what they found."""

from __future__ import annotations

import csv
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

import matplotlib as mpl
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch.profiler import ProfilerActivity, profile

from cgn_tutorial.pages import default_device

DEVICE = default_device()
MB = 1e6

Row = dict[str, str]
K = TypeVar("K")


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    if DEVICE.type != "cpu":
        torch.accelerator.synchronize()
    start = time.perf_counter()
    result = work()
    if DEVICE.type != "cpu":
        torch.accelerator.synchronize()
    duration = time.perf_counter() - start
    del result
    return duration


def in_turns(
    works: Mapping[K, Callable[[], object]], rounds: int, *, warm: bool = False
) -> dict[K, list[float]]:
    """Seconds of each work in each round, after one call of each to warm up.

    With `warm`, another call right before each that counts finds the caches as others left them.
    """
    for work in works.values():
        work()
    durations: dict[K, list[float]] = {label: [] for label in works}
    for _ in range(rounds):
        for label, work in works.items():
            if warm:
                work()
            durations[label].append(seconds(work))
    return durations


def peak_memory(work: Callable[[], object]) -> int:
    """The most bytes that tensors occupy while `work` runs, on top of those that were there."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    # Torch's allocator reports each tensor that comes and goes; the process's size would also count
    # what the system has not been given back yet.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = work()
    del kept
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    events = [event for event in events if event["name"] == "[memory]"]
    events.sort(key=lambda event: float(event["ts"]))
    return int(max(accumulate(event["args"]["Bytes"] for event in events)))


def summary(values: Sequence[float], digits: int = 2) -> str:
    """The median, and the range."""
    low, high = min(values), max(values)
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def linear_fit(x: Collection[float], y: Sequence[float]) -> tuple[float, float, float]:
    """The line a + b x with the least relative errors, both positive, and the largest of them."""
    X = np.column_stack([np.ones(len(x)), list(x)]) / np.array(y)[:, None]
    (a, b), *_ = np.linalg.lstsq(X, np.ones(len(y)))
    if a < 0:
        a, b = 0.0, X[:, 1].sum() / (X[:, 1] ** 2).sum()
    return float(a), float(b), float(np.abs(X @ np.array([a, b]) - 1).max())


def machine() -> list[Row]:
    """What it ran on."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    if DEVICE.type == "cuda":
        name = f"{torch.cuda.get_device_name()}; {name}"
    facts = {
        "Processor": name,
        "Cores": str(os.cpu_count()),
        "Threads used": str(torch.get_num_threads()),
        "Instructions": torch.backends.cpu.get_cpu_capability(),
        "PyTorch": torch.__version__,
        "BackPACK": metadata.version("backpack-for-pytorch"),
        "Python": platform.python_version(),
        "System": platform.system(),
        "Date": datetime.now(UTC).date().isoformat(),
    }
    return [{"Measured on": key, "this machine": value} for key, value in facts.items()]


def write(table: Sequence[Row], path: Path) -> None:
    """Write a table as CSV, and print it."""
    columns = list(dict.fromkeys(column for row in table for column in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    cells = [columns, *([row.get(column, "") for column in columns] for row in table)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print(f"\n{path.stem}")
    for line in cells:
        print("  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)))
    sys.stdout.flush()


def draw(figure: Figure, path: Path) -> None:
    """Save a figure, so that the same drawing gives the same bytes."""
    with mpl.rc_context({"svg.hashsalt": "figures"}):
        figure.savefig(path, transparent=True, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
