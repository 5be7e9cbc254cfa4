"""The races behind page 4, in full: `nox -s experiments`, or run this file.

Writes tables (CSV) and figures (SVG) for docs/experiments.rst. A job is a race from one seed, in
a process of one thread, as many as there are cores. What is finished is kept in runs.jsonl:
after an interruption, the same command goes on from there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from measuring import Row, draw, machine, summary, write
from torch import Tensor

from cgn_tutorial import CGResult, cg, cgn
from cgn_tutorial.pages.autoencoder import train_autoencoder
from cgn_tutorial.pages.plotting import COLORS
from cgn_tutorial.pages.races import Setting, race, step_rates

ROOT = Path(__file__).parents[2]
GOALS = (0.90, 0.95, 0.97)
SEEDS = range(5)
QUICK_SECONDS = 0.01  # a step and a test
TUNING_SEEDS = (100, 101)  # others, so that no setting is chosen for the batches it is shown on


def grid(method: str, *, average: float, batch_size: int, **values: Sequence[Any]) -> list[Setting]:
    """Settings with all combinations of these values."""
    return [
        Setting(method, dict(zip(values, chosen, strict=True)), batch_size, average=average)
        for chosen in product(*values.values())
    ]


Ways = dict[str, list[Setting]]  # the settings of each way to train, by its name in the tables


def together(*parts: Ways) -> Ways:
    """The settings of all parts, where several may add to one way."""
    ways: Ways = {}
    for part in parts:
        for name, settings in part.items():
            ways.setdefault(name, []).extend(settings)
    return ways


def first_order(batch_size: int, average: float, *rates: Sequence[float]) -> Ways:
    """SGD, momentum and Adam at these rates."""
    return {
        method: grid(method, average=average, batch_size=batch_size, lr=lr)
        for method, lr in zip(("SGD", "Momentum", "Adam"), rates, strict=True)
    }


def newton(batch_size: int, lr: Sequence[float], damping: Sequence[float]) -> Ways:
    """CGN, alone and with Adam for the convolutions."""
    common: dict[str, Any] = {"batch_size": batch_size, "lr": lr, "damping": damping, "tol": [0.3]}
    return {
        "CGN": grid("CGN", average=0.8, maxiter=[(1, 2, 5, 5)], **common),
        "CGN + Adam": grid("CGN + Adam", average=0.9, maxiter=[5], max_length=[0.2], **common),
    }


class Workload(NamedTuple):
    """A batch size, or another network, with everything that races there."""

    ways: Ways
    seconds: float  # the most per run
    tuning_seeds: Sequence[int] = TUNING_SEEDS


SLOW: dict[str, Any] = {"average": 0.5, "batch_size": 64, "tol": [0.3]}
CURVATURES = (
    "CGN per parameter",
    "CGN, BackPACK",
    "CGN, PCH-abs",
    "CGN, PCH-clip",
    "CGN, Hessian",
)

#: A control: is it enough to let the linear layers have a rate of their own?
TWO_RATES = [
    (convolutions,) * 4 + (linear,) * 4
    for convolutions, linear in product((1e-2, 2e-2), (1e-3, 2.5e-3, 5e-3))
]

# SGD, momentum and Adam have 24 settings in all, and all forms of CGN no more.
AT_64 = together(
    first_order(
        64,
        0.95,
        (0.03, 0.1, 0.3, 1, 3, 10),
        (0.01, 0.03, 0.1, 0.3, 1, 3),
        (1e-3, 2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2),
    ),
    {
        "CGN": grid(
            "CGN", lr=[0.15], damping=[2e-4, 5e-4, 1e-3], maxiter=[(1, 2, 10, 10), 20], **SLOW
        )
    },
    newton(64, [0.15], [3e-3]),
    {
        "CGN + Adam": grid(
            "CGN + Adam",
            average=0.95,
            batch_size=64,
            lr=[0.1, 0.2],
            damping=[3e-3, 1e-2],
            tol=[0.3],
            maxiter=[5],
            max_length=[0.2],
        )
    },
    {name: grid(name, lr=[0.15], damping=[1e-3], maxiter=[20], **SLOW) for name in CURVATURES},
    {
        "CGN, Hessian": grid("CGN, Hessian", lr=[0.1], damping=[1e-2], maxiter=[20], **SLOW),
        "Adam, two rates": grid("Adam", average=0.95, batch_size=64, lr=TWO_RATES),
        "CGN, bounded": grid(
            "CGN",
            average=0.5,
            batch_size=64,
            lr=[0.15],
            damping=[1e-4, 2e-4],
            tol=[0.1, 0.3],
            maxiter=[20],
            max_length=[0.2],
        ),
    },
)


def larger(batch_size: int, average: float, seconds: float, factor: float = 1) -> Workload:
    """What races at a larger batch size, with momentum's and Adam's rates larger by a factor."""
    two_rates = grid("Adam", average=average, batch_size=batch_size, lr=TWO_RATES[::2])
    ways = together(
        first_order(
            batch_size,
            average,
            (0.3, 1, 3),
            [factor * lr for lr in (0.1, 0.3, 1)],
            [factor * lr for lr in (2.5e-3, 5e-3, 1e-2, 2e-2)],
        ),
        newton(batch_size, [0.3], [1e-3, 3e-3]),
        newton(batch_size, [0.5], [3e-3]),
        {"Adam, two rates": two_rates},
    )
    return Workload(ways, seconds, TUNING_SEEDS[:1])


def rectified() -> Workload:
    """What races on the network with ReLU in place of sigmoids."""
    ways = together(
        first_order(
            64,
            0.95,
            (0.03, 0.1, 0.3, 1),
            (3e-3, 1e-2, 3e-2, 0.1),
            (5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2),
        ),
        newton(64, [0.05, 0.15], [1e-2, 1e-1]),
    )
    for name, settings in ways.items():
        ways[name] = [replace(setting, activation="ReLU") for setting in settings]
    return Workload(ways, 3.0, TUNING_SEEDS[:1])


WORKLOADS: Mapping[str, Workload] = {
    "batch 64": Workload(AT_64, 6.0),
    "batch 256": larger(256, 0.9, 8.0),
    "batch 1024": larger(1024, 0.8, 10.0, factor=3),
    "ReLU, batch 64": rectified(),
}

# What does the work: the main page's settings, but a block per layer.
MAIN = {"lr": 0.1, "damping": 1e-2, "tol": 0.1, "maxiter": 20}
ABLATION = {
    "GGN": Setting("CGN", MAIN),
    "zero in conv 1": Setting("CGN", MAIN | {"without_curvature": (0,)}),
    "zero in both conv": Setting("CGN", MAIN | {"without_curvature": (0, 1)}),
    "zero in all but the last": Setting("CGN", MAIN | {"without_curvature": (0, 1, 2)}),
    "zero in linear 1": Setting("CGN", MAIN | {"without_curvature": (2,)}),
    "zero in both linear": Setting("CGN", MAIN | {"without_curvature": (2, 3)}),
    "Momentum": Setting("Momentum", {"lr": 0.3}),
    "Adam": Setting("Adam", {"lr": 5e-3}),
}
ABLATION_STEPS = 51
RATES = (0.3, 1.0, 3.0)
RATES_STEPS = 200

MAP_DAMPING = (2e-4, 5e-4, 2e-3, 1e-2)
MAP_BUDGET = (1, 2, 5, 20)
MAP_LENGTHS = (math.inf, 0.2)

AUTOENCODER: Mapping[str, dict[str, Any]] = {
    "Adam, 5e-3, batch 256": {"damping": None, "lr": 5e-3, "batch_size": 256},
    "Adam, 5e-3, batch 500": {"damping": None, "lr": 5e-3},
    "λ = 0.03, solves from zero": {"adapt_to": None, "warm_start": 0.0},
    "λ = 0.03": {"adapt_to": None},
    "λ = 3": {"adapt_to": None, "damping": 3.0},
    "λ = 0.03, stop by progress": {
        "adapt_to": None,
        "tol": 0.0,
        "maxiter": 250,
        "by_progress": True,
    },
    "λ adapts, from 0.03": {},
    "λ adapts, from 3": {"damping": 3.0},
    "λ adapts, batch 64": {"batch_size": 64},
    "λ adapts to another batch": {"adapt_to": "another batch"},
}


class Job(NamedTuple):
    """What one process does at a time."""

    key: str
    weight: float  # about how many seconds it takes
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


def settings_race(settings: Sequence[Setting], seed: int, seconds: float) -> list[Any]:
    """A race to the last goal: tests and losses' fate of each run."""
    runs = race(settings, seed, goal=GOALS[-1], seconds=seconds)
    return [{"tests": rounded(run.tests), "fell": run.fell_back()} for run in runs]


def rounded(tests: Iterable[Sequence[float]]) -> list[list[float]]:
    """Tests as short numbers."""
    return [[float(f"{number:.4g}") for number in test] for test in tests]


def ablation(seed: int, steps: int, rates_steps: int) -> dict[str, list[float]]:
    """The losses of each way, and of SGD with one rate, and with a rate per parameter."""
    runs = race(list(ABLATION.values()), seed, steps=steps)
    found = dict(zip(ABLATION, (run.losses for run in runs), strict=True))
    rates: dict[str, Any] = {f"SGD, rate {rate:g}": rate for rate in RATES}
    rates["SGD, a rate per parameter"] = step_rates(ABLATION["GGN"], seed, min(steps, 15))
    runs = race([Setting("SGD", {"lr": lr}) for lr in rates.values()], seed, steps=rates_steps)
    found |= zip(rates, (run.losses for run in runs), strict=True)
    return {label: [round(loss, 4) for loss in losses] for label, losses in found.items()}


def map_cell(damping: float, budget: int, length: float, seed: int) -> dict[str, Any]:
    """The way to the first goal with one damping and budget."""
    options = {"lr": 0.15, "damping": damping, "tol": 0.0 if budget == 1 else 0.1}
    options |= {"maxiter": budget, "max_length": length}
    (run,) = race([Setting("CGN", options, average=0.5)], seed, goal=GOALS[0], seconds=3.0)
    test = run.reached(GOALS[0])
    return {"test": test and rounded([test])[0], "fell": run.fell_back()}


def autoencoder(label: str, seed: int, seconds: float) -> list[list[float]]:
    """The autoencoder's way."""
    options = dict(AUTOENCODER[label])
    by_progress = options.pop("by_progress", False)
    with mock.patch.object(cgn, "cg", cg_by_progress) if by_progress else nullcontext():
        return rounded(train_autoencoder(seed, seconds=seconds, **options))


def cg_by_progress(
    A: Callable[[Tensor], Tensor], b: Tensor, x0: Tensor | None = None, **options: Any
) -> CGResult:
    """Martens' stop: CG up to where the model q hardly falls any more.

    It ends after iteration i if q_i < 0 and (q_i − q_{i−k}) / q_i < 0.0005 k, for
    k = max(10, i / 10). A row of the table needs it, and nothing else does: so it is not in the
    package. From a start that is not zero it costs one product more, one in some forty.
    """
    x0, r0, models = torch.zeros_like(b) if x0 is None else x0, b, [0.0]
    if x0.any():
        r0 = b - A(x0)
        models = [-(x0 * (b + r0)).sum().item() / 2]
    if models[0] > 0:  # as the optimizer does
        x0, r0, models = torch.zeros_like(b), b, [0.0]

    def hardly_falls(x: Tensor) -> bool:
        # The residual at x is orthogonal to x − x0, so that the model needs no product.
        models.append(models[0] - (r0 * (x - x0)).sum().item() / 2)
        i = len(models) - 1
        k = max(10, math.ceil(i / 10))
        return i > k and models[i] < 0 and (models[i] - models[i - k]) / models[i] < 5e-4 * k

    return cg(A, b, x0 if x0.any() else None, callback=hardly_falls, **options)


def tuning_jobs(quick: bool) -> Iterator[Job]:
    """Races of all settings, to choose from."""
    for name, workload in WORKLOADS.items():
        for seed in workload.tuning_seeds[: 1 if quick else None]:
            for way, settings in workload.ways.items():
                chosen = settings[: 1 if quick else None]
                seconds = QUICK_SECONDS if quick else workload.seconds
                weight = 2 * seconds * len(chosen)
                arguments = (chosen, seed, seconds)
                yield Job(f"tune {name} {way} {seed}", weight, settings_race, arguments)


def best(found: Mapping[str, Any], name: str, quick: bool) -> dict[str, dict[float, Setting]]:
    """For each way and goal, the setting with the least median time over the tuning seeds.

    A run that did not reach the goal counts as infinitely long.
    """
    workload = WORKLOADS[name]
    chosen: dict[str, dict[float, Setting]] = {}
    for way, settings in workload.ways.items():
        for goal in GOALS:
            times = [
                statistics.median(
                    first(found[f"tune {name} {way} {seed}"][k]["tests"], goal)[1]
                    for seed in workload.tuning_seeds[: 1 if quick else None]
                )
                for k in range(1 if quick else len(settings))
            ]
            if min(times) < math.inf:
                chosen.setdefault(way, {})[goal] = settings[times.index(min(times))]
    return chosen


def first(tests: Sequence[Sequence[float]], goal: float) -> Sequence[float]:
    """The first test at or above the goal, or one that took infinitely long."""
    return next((test for test in tests if test[3] >= goal), (math.inf,) * 4)


def finalists(found: Mapping[str, Any], name: str, quick: bool) -> list[Setting]:
    """What is best for some goal, once each."""
    settings: list[Setting] = []
    for goals in best(found, name, quick).values():
        for setting in goals.values():
            if setting not in settings:
                settings.append(setting)
    return settings


def final_jobs(found: Mapping[str, Any], quick: bool) -> Iterator[Job]:
    """Races of what is best, from the seeds that are shown."""
    for name, workload in WORKLOADS.items():
        settings = finalists(found, name, quick)
        seconds = QUICK_SECONDS if quick else workload.seconds
        for seed in SEEDS[: 1 if quick else None]:
            weight = 2 * seconds * len(settings)
            if settings:
                yield Job(f"race {name} {seed}", weight, settings_race, (settings, seed, seconds))


def other_jobs(quick: bool) -> Iterator[Job]:
    """Ablations, the map, and the autoencoder."""
    seeds = SEEDS[: 1 if quick else None]
    for seed in seeds[: 1 if quick else 3]:
        for label in AUTOENCODER:
            seconds = QUICK_SECONDS if quick else 16.0
            yield Job(f"autoencoder {label} {seed}", seconds, autoencoder, (label, seed, seconds))
    for seed in seeds:
        steps = (2, 2) if quick else (ABLATION_STEPS, RATES_STEPS)
        yield Job(f"ablation {seed}", 25.0, ablation, (seed, *steps))
    cells = product(MAP_DAMPING, MAP_BUDGET, MAP_LENGTHS, SEEDS[:2])
    for damping, budget, length, seed in list(cells)[: 1 if quick else None]:
        arguments = (damping, budget, length, seed)
        yield Job(f"map {damping} {budget} {length} {seed}", 4.0, map_cell, arguments)


def work(jobs: Iterable[Job], found: dict[str, Any], path: Path, later: float) -> None:
    """Do the jobs that are not done, in all cores, and write each down as it ends."""
    jobs = sorted((job for job in jobs if job.key not in found), key=lambda job: -job.weight)
    total = remaining = sum(job.weight for job in jobs)
    begin = time.perf_counter()
    context = get_context("spawn")
    with ProcessPoolExecutor(
        os.cpu_count(), context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        futures = {pool.submit(job.function, *job.arguments): job for job in jobs}
        for n, future in enumerate(as_completed(futures), start=1):
            job = futures[future]
            found[job.key] = future.result()
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"job": job.key, "found": found[job.key]}) + "\n")
            remaining -= job.weight
            pace = (time.perf_counter() - begin) / (total - remaining)
            left = pace * (remaining + later) / 60
            print(f"{n}/{len(jobs)}  {job.key:48}  about {left:.0f} minutes left", flush=True)


def described(setting: Setting) -> str:
    """A setting as a table has it."""
    names = {"lr": "lr", "damping": "λ", "tol": "tol", "maxiter": "products"}
    names |= {"max_length": "length"}
    parts = [
        f"{names[name]} {'+'.join(f'{x:g}' for x in value)}"
        if isinstance(value, tuple) and name != "lr"
        else f"{names[name]} {' and '.join(f'{x:g}' for x in dict.fromkeys(value))}"
        if isinstance(value, tuple)
        else f"{names[name]} {value:g}"
        for name, value in setting.options.items()
    ]
    return ", ".join([*parts, f"average {setting.average:g}"])


def race_tables(found: Mapping[str, Any], quick: bool) -> Iterator[tuple[str, list[Row]]]:
    """For each workload and goal, the best setting of each way, fastest first."""
    for name, workload in WORKLOADS.items():
        table = []
        chosen = best(found, name, quick)
        for goal in GOALS:
            rows = [
                race_row(found, name, way, chosen.get(way, {}).get(goal), goal, quick)
                for way in workload.ways
            ]
            table += [row for _, row in sorted(rows, key=lambda row: row[0])]
        yield name.lower().replace(",", "").replace(" ", "_"), table


def race_row(
    found: Mapping[str, Any],
    name: str,
    way: str,
    setting: Setting | None,
    goal: float,
    quick: bool,
) -> tuple[float, Row]:
    """How a way got to a goal: the median of its seconds, and the row of the table."""
    row = {"Goal": f"{goal:.0%}", "Method": way}
    if setting is None:
        return math.inf, row | {"Seconds": "never in tuning"}
    seeds = SEEDS[: 1 if quick else None]
    k = finalists(found, name, quick).index(setting)
    runs = [found[f"race {name} {seed}"][k] for seed in seeds]
    tests = [first(run["tests"], goal) for run in runs]
    steps, seconds, gradients, _ = (list(column) for column in zip(*tests, strict=True))
    row |= {
        "Seconds": to_goal(seconds, 2),
        "Steps": to_goal(steps, 0),
        "Gradients": to_goal(gradients, 0),
        "Setting": described(setting),
        "Fell back": f"{sum(run['fell'] for run in runs)} of {len(runs)}",
    }
    return statistics.median(seconds), row


def to_goal(values: Sequence[float], digits: int) -> str:
    """The median and the range of what it took; runs that did not get there took for ever."""
    if min(values) == math.inf:
        return "never"
    return summary(values, digits).replace("inf", "never")


def race_figure(found: Mapping[str, Any], quick: bool) -> Figure:
    """Accuracy over steps and over seconds, all seeds, for the methods that the page names."""
    figure, axes = plt.subplots(2, 2, figsize=(7.5, 6), sharey=True, layout="constrained")
    for row, name in zip(axes, ("batch 64", "batch 256"), strict=True):
        settings = finalists(found, name, quick)
        chosen = best(found, name, quick)
        for method, color, line in (
            ("SGD", "gray", ":"),
            ("Momentum", "purple", "-."),
            ("Adam", "orange", "--"),
            ("CGN", "blue", "-"),
            ("CGN + Adam", "green", "-"),
        ):
            if method not in chosen:
                continue
            setting = chosen[method][max(chosen[method])]
            k = settings.index(setting)
            for seed in SEEDS[: 1 if quick else None]:
                tests = found[f"race {name} {seed}"][k]["tests"]
                style = {"color": COLORS[color], "ls": line, "lw": 1}
                label = method if seed == 0 else None
                row[0].plot([t[0] for t in tests], [t[3] for t in tests], label=label, **style)
                row[1].plot([t[1] for t in tests], [t[3] for t in tests], **style)
        row[0].set(xscale="log", xlabel="step", ylabel=f"test accuracy, {name}", ylim=(0.5, 1))
        row[1].set(xlabel="seconds", xlim=(0, 6))
    axes[0, 0].legend(fontsize=8)
    return figure


def ablation_results(found: Mapping[str, Any], quick: bool) -> tuple[list[Row], Figure]:
    """Late losses, and all curves."""
    runs = [found[f"ablation {seed}"] for seed in SEEDS[: 1 if quick else None]]
    table = []
    figure, axes = plt.subplots(3, 4, figsize=(7.5, 5.6), sharey=True, layout="constrained")
    for ax, label in zip(axes.flat, runs[0], strict=True):
        late = [statistics.mean(run[label][:ABLATION_STEPS][-10:]) for run in runs]
        end = [statistics.mean(run[label][-10:]) for run in runs]
        row = {"Way": label, "Mean loss of steps 41 to 50": summary(late)}
        if len(runs[0][label]) > ABLATION_STEPS:
            row["Of the last ten of 200"] = summary(end)
        table.append(row)
        for run in runs:
            ax.plot(run[label], color=COLORS["blue"], lw=0.8)
        ax.set_title(label, fontsize=8)
        ax.set(ylim=(0, 2.6))
    for ax in axes[-1]:
        ax.set(xlabel="step")
    for ax in axes[:, 0]:
        ax.set(ylabel="mini-batch loss")
    return table, figure


def map_results(found: Mapping[str, Any], quick: bool) -> tuple[list[Row], Figure]:
    """Runs that got there, and how fast, over damping and budget."""
    table = []
    figure, axes = plt.subplots(1, 2, figsize=(7.5, 3.2), layout="constrained")
    medians: dict[tuple[float, int], tuple[float, float]] = {}
    for length, damping, budget in product(MAP_LENGTHS, MAP_DAMPING, MAP_BUDGET):
        keys = [f"map {damping} {budget} {length} {seed}" for seed in SEEDS[:2]]
        cells = [found[key] for key in keys if key in found]
        if not cells:
            continue
        tests = [cell["test"] or [math.inf] * 4 for cell in cells]
        steps, seconds = ([test[i] for test in tests] for i in (0, 1))
        if length == math.inf:
            medians[damping, budget] = statistics.median(steps), statistics.median(seconds)
        table.append(
            {
                "Bound on the length": "none" if length == math.inf else f"{length:g}",
                "λ": f"{damping:g}",
                "Products": str(budget),
                "Steps to 90 %": to_goal(steps, 0),
                "Seconds": to_goal(seconds, 2),
                "Fell back": f"{sum(cell['fell'] for cell in cells)} of {len(cells)}",
            }
        )
    for ax, i, title in zip(axes, (0, 1), ("steps to 90 %", "seconds to 90 %"), strict=True):
        grid_values = torch.tensor(
            [[medians.get((d, b), (math.inf,) * 2)[i] for b in MAP_BUDGET] for d in MAP_DAMPING]
        )
        shown = grid_values.masked_fill(grid_values.isinf(), math.nan)
        ax.imshow(shown.log(), cmap="viridis_r", aspect="auto")
        for (row, column), value in (
            ((r, c), grid_values[r, c].item())
            for r in range(len(MAP_DAMPING))
            for c in range(len(MAP_BUDGET))
        ):
            text = "never" if math.isinf(value) else f"{value:.2f}" if i else f"{value:.0f}"
            ax.text(
                column,
                row,
                text,
                ha="center",
                va="center",
                fontsize=8,
                bbox={"fc": "white", "ec": "none", "pad": 1.5},
            )
        ax.set(title=title, xlabel="most products per block", ylabel="damping λ")
        ax.set(xticks=range(len(MAP_BUDGET)), xticklabels=MAP_BUDGET)
        ax.set(yticks=range(len(MAP_DAMPING)), yticklabels=[f"{d:g}" for d in MAP_DAMPING])
    return table, figure


def autoencoder_results(found: Mapping[str, Any], quick: bool) -> tuple[list[Row], Figure]:
    """Errors at the end and after equal steps, and all curves."""
    table = []
    figure, axes = plt.subplots(1, 3, figsize=(7.5, 3.4), layout="constrained")
    colors = list(COLORS.values())
    for i, label in enumerate(AUTOENCODER):
        runs = [found[f"autoencoder {label} {seed}"] for seed in SEEDS[: 1 if quick else 3]]
        ends = [run[-1] for run in runs]
        at_40 = [next((test[2] for test in run if test[0] >= 40), math.inf) for run in runs]
        table.append(
            {
                "Way": label,
                "Error after 40 steps": to_goal(at_40, 1),
                "Error at the end": summary([end[2] for end in ends], 1),
                "Steps by then": summary([end[0] for end in ends], 0),
                "Seconds": summary([end[1] for end in ends], 1),
                "λ at the end": powers([end[3] for end in ends]) if end_is_damped(ends) else "",
            }
        )
        for run in runs:
            style = {"color": colors[i % len(colors)], "lw": 1}
            style["ls"] = ("-", "--")[i // len(colors)]
            name = label if run is runs[0] else None
            axes[0].plot([t[0] for t in run], [t[2] for t in run], label=name, **style)
            axes[1].plot([t[1] for t in run], [t[2] for t in run], **style)
            if end_is_damped(ends) and "adapts" in label:
                axes[2].plot([t[0] for t in run], [t[3] for t in run], **style)
    axes[0].set(xscale="log", xlabel="step", ylabel="squared error per image")
    axes[0].set(ylim=(10, 62))
    axes[1].set(xlabel="seconds", ylim=(10, 62))
    axes[2].set(xscale="log", yscale="log", xlabel="step", ylabel="damping λ")
    figure.legend(loc="outside lower center", ncols=2, fontsize=7, frameon=False)
    return table, figure


def powers(values: Sequence[float]) -> str:
    """The median and the range of numbers of any size."""
    return f"{statistics.median(values):.2g} ({min(values):.2g} to {max(values):.2g})"


def end_is_damped(ends: Sequence[Sequence[float]]) -> bool:
    """Whether these runs have a λ."""
    return not math.isnan(ends[0][3])


def results(found: Mapping[str, Any], quick: bool) -> Iterator[tuple[str, list[Row] | Figure]]:
    """All tables and figures, with their names."""
    yield "machine", machine()
    yield from race_tables(found, quick)
    yield "race", race_figure(found, quick)
    for name, make in (
        ("ablation", ablation_results),
        ("map", map_results),
        ("autoencoder", autoencoder_results),
    ):
        table, figure = make(found, quick)
        yield name, table
        yield name, figure


def main() -> None:
    """Run what is not finished, and write what the page shows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small part of each, as a check")
    parser.add_argument("--fresh", action="store_true", help="forget what is finished")
    parser.add_argument("--output", type=Path, help="where to write; by default docs/experiments")
    arguments = parser.parse_args()
    if arguments.quick and arguments.output is None:
        parser.error("--quick does too little for docs/experiments: name another --output.")
    quick = arguments.quick
    folder = arguments.output or ROOT / "docs" / "experiments"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "runs.jsonl"
    if arguments.fresh:
        path.unlink(missing_ok=True)
    found: dict[str, Any] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            found[entry["job"]] = entry["found"]
    later = sum(job.weight for job in tuning_jobs(quick)) * 1.2
    jobs = [*tuning_jobs(quick), *other_jobs(quick)]
    work(jobs, found, path, later)
    work(final_jobs(found, quick), found, path, 0.0)
    for name, result in results(found, quick):
        if isinstance(result, Figure):
            draw(result, folder / f"{name}.svg")
        else:
            write(result, folder / f"{name}.csv")


if __name__ == "__main__":
    main()
