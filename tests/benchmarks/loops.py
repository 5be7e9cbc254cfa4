"""The guides' loops: Newton steps, and SGD and Adam in as many steps and in as much time."""

from __future__ import annotations

import inspect
import math
import runpy
import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from measuring import Row, summary
from torch.optim.optimizer import register_optimizer_step_post_hook

from cgn_tutorial.pages import load_mnist
from cgn_tutorial.pages.plotting import COLORS

FOLDER = Path(__file__).parents[2] / "docs" / "guides" / "loops"
RATES = {"SGD": (0.03, 0.1, 0.3, 1.0, 3.0), "Adam": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)}
NEWTON = {
    "images": {"CGN": "images_cgn"},
    "table": {"CGN": "table_cgn", "CGN, BackPACK": "table_backpack"},
    "text": {"CGN": "text_cgn"},
}

Train = Callable[..., float]


load_once = cache(load_mnist)


def load(name: str) -> Train:
    """The function that a file trains with; the images are read once for all runs."""
    with mock.patch("cgn_tutorial.pages.load_mnist", load_once):
        train: Train = runpy.run_path(str(FOLDER / f"{name}.py"))["train"]
    return train


def runs(train: Train, steps: int, seeds: range, **options: Any) -> tuple[list[float], float]:
    """The loss for each seed, and the median seconds of so many steps, without what surrounds them.

    They are timed from the end of the first step to the end of the last. A run's time less that of
    its start would be no measure: a start can vary by more than all steps take.
    """
    ends: list[float] = []
    losses, took = [], []
    hook = register_optimizer_step_post_hook(lambda *_: ends.append(time.perf_counter()))
    try:
        for seed in seeds:
            ends.clear()
            losses.append(train(**options, steps=steps, seed=seed))
            took.append((ends[-1] - ends[0]) * steps / (steps - 1))
    finally:
        hook.remove()
    return losses, statistics.median(took)


def best(
    train: Train, method: str, rates: Sequence[float], steps: int, seeds: range
) -> tuple[float, list[float], float]:
    """The rate with the least median loss, its losses, and seconds."""
    with mock.patch("torch.optim.SGD", getattr(torch.optim, method)):
        found = [(rate, *runs(train, steps, seeds, lr=rate)) for rate in rates]
    return min(
        found,
        key=lambda of: statistics.median(x if math.isfinite(x) else math.inf for x in of[1]),
    )


def row(loop: str, way: str, steps: int, rate: str, losses: list[float], took: float) -> Row:
    """A row of the table."""
    return {
        "loop": f"{loop}.py",
        "trained with": way,
        "steps": f"{steps:,}",
        "rate": rate,
        "loss": summary(losses, 3),
        "seconds": f"{took:.2f}",
    }


def bench_loops(quick: bool) -> list[Row]:
    """Each loop with each optimizer, in as many steps and in as much time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seeds = range(1 if quick else 3)
    table = []
    for loop, files in NEWTON.items():
        plain = load(loop)
        steps = 3 if quick else inspect.signature(plain).parameters["steps"].default
        took = {}
        for way, file in files.items():
            losses, took[way] = runs(load(file), steps, seeds)
            table.append(row(loop, way, steps, "", losses, took[way]))
        for method, of_method in RATES.items():
            rates = of_method[: 1 if quick else None]
            rate, losses, spent = best(plain, method, rates, steps, seeds)
            table.append(row(loop, method, steps, f"{rate:g}", losses, spent))
            as_long = max(2, round(steps * took["CGN"] / spent))
            rate, losses, spent = best(plain, method, rates, as_long, seeds)
            way = f"{method}, in the time of CGN"
            table.append(row(loop, way, as_long, f"{rate:g}", losses, spent))
    torch.set_num_threads(threads)
    return table


RUNS: dict[str, dict[str, Any]] = {
    "goes well": {"lr": 0.3, "damping": 1e-2, "tol": 0.1, "maxiter": 50},
    "goes badly": {"lr": 1.0, "damping": 1e-5, "tol": 0.01, "maxiter": 50},
}
SHADES = {"converged": "blue", "maxiter": "orange"}
OTHERS = "red"  # solves that ended otherwise


def draw_diagnostics() -> Figure:
    """The products and the reasons of each block, on a run that goes well and one that does not."""
    fit = runpy.run_path(str(FOLDER.parent / "symptoms.py"))["fit"]
    figure, axes = plt.subplots(4, 2, figsize=(5, 6), sharex=True, sharey="row")
    for column, (title, options) in zip(axes.T, RUNS.items(), strict=True):
        losses, solves = fit(0, **options)
        for step, of_step in enumerate(solves):
            for ax, solve in zip(column[1:], of_step.values(), strict=True):
                ax.bar(
                    step, solve.products, color=COLORS[SHADES.get(solve.reason, OTHERS)], width=0.9
                )
        column[0].semilogy(losses, color="black")
        column[0].set_title(title)
        column[-1].set_xlabel("step")
    axes[0, 0].set_ylabel("loss")
    for ax, layer in zip(axes[1:, 0], range(1, 4), strict=True):
        ax.set_ylabel(f"products,\nlayer {layer}")
    handles = [Rectangle((0, 0), 1, 1, color=COLORS[color]) for color in SHADES.values()]
    figure.legend(handles[:2], list(SHADES)[:2], loc="lower center", ncols=2, frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    return figure
