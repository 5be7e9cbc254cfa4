"""What the curvature products and the optimizer cost: `nox -s bench`, or run this file.

Writes tables (CSV) and figures (SVG) for docs/benchmarks.rst, and the tables of
docs/guides/backpack.rst. Everything that is compared takes turns, so that whatever else the machine
does slows all of it alike.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

# Torch's profiler would tell of every start, and of tensors that it did not see come.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from growth import bench_growth
from loops import bench_loops, draw_diagnostics
from matplotlib.figure import Figure
from measuring import Row, draw, machine, write
from processes import bench_processes
from studies import bench_products_tried, bench_tried
from timing import bench_products, bench_resnet, bench_shortcut, bench_steps
from trials import trial_tables

ROOT = Path(__file__).parents[2]


def results(quick: bool) -> Iterator[tuple[str, list[Row] | Figure]]:
    """All tables and figures, with their names."""
    yield "machine", machine()
    table, figure = bench_steps(quick)
    yield "steps", table
    yield "steps", figure
    yield "products", bench_products(quick)
    yield "shortcut", bench_shortcut(quick)
    by_batch, by_width, figure = bench_growth(quick)
    yield "batch", by_batch
    yield "width", by_width
    yield "growth", figure
    yield "resnet", bench_resnet(quick)
    table, scaling, figure = bench_processes(quick)
    yield "processes", table
    yield "scaling", scaling
    yield "scaling", figure
    yield "loops", bench_loops(quick)
    yield "diagnostics", draw_diagnostics()
    yield "tried", bench_tried(quick)
    yield "products_tried", bench_products_tried(quick)
    yield from trial_tables(quick)


def main() -> None:
    """Run everything and write what the page shows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small part of each, as a check")
    parser.add_argument("--output", type=Path, help="where to write; by default docs/bench")
    arguments = parser.parse_args()
    if arguments.quick and arguments.output is None:
        parser.error("--quick measures too little for docs/bench: name another --output.")
    folder = arguments.output or ROOT / "docs" / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", "Full backward hook is firing")  # BackPACK's, harmless
    start = time.perf_counter()
    for name, result in results(arguments.quick):
        if isinstance(result, Figure):
            draw(result, folder / f"{name}.svg")
        else:
            write(result, folder / f"{name}.csv")
    print(f"\n{time.perf_counter() - start:.0f} seconds")


if __name__ == "__main__":
    main()
