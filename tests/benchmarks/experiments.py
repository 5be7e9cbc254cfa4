"""The races behind page 4, in full: `nox -s experiments`, or run this file.

Writes tables (CSV) and figures (SVG) for docs/experiments.rst, and what page 4 shows. A job is a
search of settings, or a race from one seed, in a process of one thread, as many as there are cores.
What is finished is kept in runs.jsonl: after an interruption, the same command goes on from there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from measuring import Row, draw, machine, summary, write

from cgn_tutorial import BlockProduct, CGNOptimizer
from cgn_tutorial.pages.autoencoder import train_autoencoder
from cgn_tutorial.pages.plotting import COLORS
from cgn_tutorial.pages.races import Run, Setting, clock, go_on, race

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "src" / "cgn_tutorial" / "pages" / "races.json"  # what page 4 shows
GOALS = (0.90, 0.95, 0.97)
SEEDS = range(5)
FEW_SEEDS = range(3)  # of costs, the ablation and the autoencoder
TUNING_SEEDS = (100, 101)  # others, so that no setting is chosen for the batches it is shown on
QUICK_SECONDS = 0.01  # a step and a test

# The spaces of the random search.

Draw = Callable[[random.Random], Any]


def choice(*values: Any) -> Draw:
    """One of these values."""
    return lambda r: r.choice(values)


def log(low: float, high: float) -> Draw:
    """A number with two digits, spread evenly over the logarithms."""
    return lambda r: float(f"{math.exp(r.uniform(math.log(low), math.log(high))):.2g}")


def betas(r: random.Random) -> tuple[float, float]:
    """The decays of Adam's means."""
    return r.choice((0.5, 0.8, 0.9)), r.choice((0.9, 0.95, 0.999))


#: What every contender chooses. A rate that falls is zero after so many images.
COMMON: dict[str, Draw] = {
    "batch_size": choice(64, 128, 256, 1024),
    "average": choice(0.0, 0.0, 0.5, 0.8, 0.9, 0.95),
    "schedule": choice("constant", "linear", "cosine"),
    "images": log(6e3, 5e4),
}
NEWTON: dict[str, Draw] = {
    "lr": log(0.1, 1),
    "tol": choice(0.1, 0.3, 0.5),
    "max_length": choice(0.1, 0.2, 0.5, math.inf),
    "images": log(2e3, 5e4),
}
#: A rival is added by one more entry, here and in `METHODS`.
SPACES: Mapping[str, dict[str, Draw]] = {
    "SGD": {"lr": log(0.05, 3), "momentum": choice(0.0, 0.5, 0.8, 0.9, 0.95)},
    "Adam": {"lr": log(2e-3, 4e-2), "betas": betas},
    "RMSprop": {
        "lr": log(3e-4, 1e-2),
        "alpha": choice(0.9, 0.95, 0.99),
        "momentum": choice(0.0, 0.5, 0.9),
    },
    "Muon": {
        "lr": log(3e-2, 0.6),
        "momentum": choice(0.8, 0.9, 0.95),
        "adam_lr": log(2e-3, 0.1),
        "betas": betas,
    },
    "L-BFGS": {
        "lr": log(0.1, 1),
        "max_iter": choice(1, 2, 4, 10),
        "history_size": choice(5, 10, 30),
        "line_search_fn": choice(None, "strong_wolfe"),
        "batch_size": choice(256, 1024, 4096),
        "images": log(3e4, 3e5),
    },
    "CGN": NEWTON
    | {"damping": log(1e-4, 1e-2), "maxiter": choice((1, 2, 5, 5), (1, 2, 10, 10), 5, 20)},
    "CGN + Adam": NEWTON
    | {
        "damping": log(5e-4, 2e-2),
        "maxiter": choice(3, 5, 10),
        "last": choice(1, 2),
        "adam_lr": log(5e-3, 4e-2),
        "betas": betas,
    },
    "CGN + Muon": NEWTON
    | {
        "damping": log(1e-3, 3e-2),
        "maxiter": choice(2, 3, 5),
        "last": choice(1, 2),
        "muon_lr": log(3e-2, 0.6),
        "momentum": choice(0.8, 0.9, 0.95),
        "adam_lr": log(2e-3, 0.1),
        "betas": betas,
    },
}


#: How each contender is drawn.
LINES = {
    "SGD": ("gray", "--"),
    "Adam": ("orange", "--"),
    "RMSprop": ("red", "--"),
    "Muon": ("purple", "--"),
    "L-BFGS": ("gray", ":"),
    "CGN": ("blue", "-."),
    "CGN + Adam": ("orange", "-"),
    "CGN + Muon": ("purple", "-"),
}

MLP: Mapping[str, dict[str, Draw]] = {  # another number of layers
    "CGN": {"maxiter": choice(5, 10, 20)},
    "CGN + Adam": {"last": choice(2, 3, 5)},
    "CGN + Muon": {"last": choice(1, 2, 3)},
}


class Workload(NamedTuple):
    """How a network is tuned and raced.

    Attributes:
        settings: The number of settings of each contender.
        rungs: The seconds at which the worse half of the settings is given up, and those at which
            all end.
        seconds: The most per run of the race.
        scale: How many times as many images a horizon has.
        other: What replaces parts of the spaces.
    """

    settings: int
    rungs: Sequence[float]
    seconds: float
    scale: float = 1.0
    other: Mapping[str, dict[str, Draw]] = {}


WORKLOADS: Mapping[str, Workload] = {
    "sigmoid CNN": Workload(40, (1.0, 2.0, 4.5), 5.0),
    "sigmoid MLP": Workload(12, (0.75, 1.5, 3.0), 4.0, scale=4.0, other=MLP),
    "ReLU CNN": Workload(12, (0.5, 1.0, 2.0), 3.0, scale=0.5),
}

#: What was tuned by hand after the search, on its two seeds, each by one who took its side: one or
#: two of about 36 settings (SGD, RMSprop: 20).
BY_HAND: Mapping[str, Sequence[Setting]] = {
    "sigmoid CNN": [
        Setting(method, options, channels_last=True, **fields)
        for method, options, fields in (
            ("SGD", {"lr": 0.25, "momentum": 0.9}, {"average": 0.5}),
            ("Adam", {"lr": 0.015, "betas": (0.5, 0.95)}, {"average": 0.9, "batch_size": 32}),
            ("Adam", {"lr": 0.02, "betas": (0.5, 0.95)}, {"average": 0.9}),
            ("RMSprop", {"lr": 0.0054, "alpha": 0.9, "momentum": 0.5}, {"average": 0.95}),
            (
                "Muon",
                {"lr": 0.5, "momentum": 0.6, "adam_lr": 0.03, "betas": (0.5, 0.95)},
                {"average": 0.8},
            ),
            (
                "Muon",
                {"lr": 0.4, "momentum": 0.6, "adam_lr": 0.039, "betas": (0.5, 0.9)},
                {"average": 0.9, "schedule": "cosine", "horizon": 230},
            ),
            (
                "CGN + Adam",
                {"lr": 0.35, "damping": 6e-3, "tol": 0.5, "maxiter": 2, "last": 1}
                | {"adam_lr": 0.02, "betas": (0.5, 0.9)},
                {"average": 0.9},
            ),
            (
                "CGN + Adam",
                {"lr": 1.0, "damping": 5e-3, "tol": 0.3, "maxiter": 3, "max_length": 0.2}
                | {"last": 2, "adam_lr": 0.02, "betas": (0.5, 0.99)},
                {"average": 0.9},
            ),
            (
                "CGN + Muon",
                {"lr": 0.3, "damping": 0.01, "tol": 0.5, "maxiter": 2, "max_length": 0.5}
                | {"last": 1, "muon_lr": 0.45, "momentum": 0.6, "adam_lr": 0.02}
                | {"betas": (0.5, 0.95)},
                {"average": 0.9},
            ),
            (
                "CGN + Muon",
                {"lr": 0.3, "damping": 5e-3, "tol": 0.5, "maxiter": 2, "max_length": 0.2}
                | {"last": 1, "muon_lr": 0.5, "momentum": 0.6, "adam_lr": 0.03}
                | {"betas": (0.5, 0.95)},
                {"average": 0.8, "schedule": "linear", "horizon": 110},
            ),
        )
    ],
}


def settings_of(network: str, contender: str) -> list[Setting]:
    """The settings of a contender, drawn at random, the same each time."""
    workload = WORKLOADS[network]
    space = COMMON | SPACES[contender] | workload.other.get(contender, {})
    r = random.Random(f"{network} {contender}")
    settings = []
    for _ in range(workload.settings):
        drawn = {name: draw_one(r) for name, draw_one in space.items()}
        fields = {name: drawn.pop(name) for name in ("batch_size", "average", "schedule")}
        steps = max(2, round(workload.scale * drawn.pop("images") / fields["batch_size"]))
        settings.append(
            Setting(
                contender,
                drawn,
                network=network,
                horizon=None if fields["schedule"] == "constant" else steps,
                # L-BFGS takes no other layout; for all others, this one is as fast or faster.
                channels_last=network.endswith("CNN") and contender != "L-BFGS",
                **fields,
            )
        )
    return settings


# What does the work: the settings of page 3, with a block per layer. In some layers, a gradient
# step takes the Newton step's place, at the rate γ/λ or as long as the Newton step.
MAIN = {"lr": 0.1, "damping": 1e-2, "tol": 0.1, "maxiter": 20}
PARTS = {
    "both convolutions": (0, 1),
    "the first linear layer": (2,),
    "the last layer": (3,),
    "both linear layers": (2, 3),
    "all layers": (0, 1, 2, 3),
}
LENGTHS = {"as long": True, "rate γ/λ": False}
ABLATION: Mapping[tuple[str, str], Setting] = {("none", ""): Setting("CGN", MAIN)} | {
    (part, length): Setting("CGN", MAIN | {"without_curvature": which, "keep_length": keep})
    for part, which in PARTS.items()
    for length, keep in LENGTHS.items()
}
ABLATION_STEPS = 51
#: The same in the last layers of CGN with Muon, at the setting that was tuned.
BESIDE_MUON = {
    "Newton": {},
    "the gradient, as long": {"keep_length": True},
    "the gradient, rate γ/λ": {"keep_length": False},
}

AUTOENCODER: Mapping[str, dict[str, Any]] = {
    "Adam, 5e-3, batch 256": {"damping": None, "lr": 5e-3, "batch_size": 256},
    "Adam, 5e-3, batch 500": {"damping": None, "lr": 5e-3},
    "λ = 0.03, solves from zero": {"adapt_to": None, "warm_start": 0.0},
    "λ = 0.03": {"adapt_to": None},
    "λ = 3": {"adapt_to": None, "damping": 3.0},
    "λ adapts, from 0.03": {},
    "λ adapts, from 3": {"damping": 3.0},
    "λ adapts to another batch": {"adapt_to": "another batch"},
}


class Job(NamedTuple):
    """What one process does at a time."""

    key: str
    weight: float  # about how many seconds it takes
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


Tests = list[list[float]]


def rounded(tests: Iterable[Sequence[float]]) -> Tests:
    """Tests as short numbers."""
    return [[float(f"{number:.4g}") for number in test] for test in tests]


def first(tests: Sequence[Sequence[float]], goal: float) -> Sequence[float]:
    """The first test at or above the goal, or one that took infinitely long."""
    return next((test for test in tests if test[2] >= goal), (math.inf,) * 3)


def search(network: str, contender: str, quick: bool) -> dict[str, Any]:
    """Try all settings on one seed, the worse half for a shorter time, and the best on another.

    Accuracies are those on training images that are held out.
    """
    workload = WORKLOADS[network]
    settings = settings_of(network, contender)[: 1 if quick else None]
    rungs = [QUICK_SECONDS] if quick else workload.rungs
    runs = [Run(setting, TUNING_SEEDS[0], tuning=True) for setting in settings]
    racing = runs
    for seconds in rungs:
        go_on(racing, goals=GOALS, seconds=seconds)
        racing = sorted(racing, key=promise)[: max(1, len(racing) // 2)]
    found = [rounded(run.tests) for run in runs]
    again = [Run(settings[k], TUNING_SEEDS[1], tuning=True) for k in promising(found)]
    go_on(again, goals=GOALS, seconds=rungs[-1])
    second = {str(k): rounded(run.tests) for k, run in zip(promising(found), again, strict=True)}
    return {"first": found, "seconds": [round(run.seconds, 3) for run in runs], "second": second}


def promise(run: Run) -> tuple[float, float]:
    """How well a run has done, small is good: seconds to the last goal, then the accuracy."""
    test = run.reached(GOALS[-1])
    best = max((test.accuracy for test in run.tests), default=0.0)
    return (test.seconds if test else math.inf), -best


def promising(found: Sequence[Tests]) -> list[int]:
    """The numbers of the settings that were among the three fastest to some goal."""
    chosen: set[int] = set()
    for goal in GOALS:
        times = [first(tests, goal)[1] for tests in found]
        chosen |= {
            k for k in sorted(range(len(found)), key=times.__getitem__)[:3] if times[k] < math.inf
        }
    return sorted(chosen)


def best(found: Mapping[str, Any], network: str, contender: str) -> dict[float, int]:
    """For each goal, the number of the setting that got there on most tuning seeds, then fastest.

    A goal that no setting reached is left out.
    """
    result = found[f"search {network}, {contender}"]
    chosen: dict[float, int] = {}
    for goal in GOALS:
        ranked = []
        for k, again in result["second"].items():
            times = [first(tests, goal)[1] for tests in (result["first"][int(k)], again)]
            reached = [time for time in times if time < math.inf]
            if reached:
                ranked.append((-len(reached), statistics.mean(reached), int(k)))
        if ranked:
            chosen[goal] = min(ranked)[2]
    return chosen


def entrants(found: Mapping[str, Any], network: str) -> list[Setting]:
    """What races: the best settings for some goal, once each, and those tuned by hand."""
    chosen = [
        settings_of(network, contender)[k]
        for contender in SPACES
        for k in sorted(set(best(found, network, contender).values()))
    ]
    return [*chosen, *BY_HAND.get(network, ())]


def settings_race(settings: Sequence[Setting], seed: int, seconds: float) -> list[Tests]:
    """A race to the last goal: the tests of each run."""
    return [rounded(run.tests) for run in race(settings, seed, goals=GOALS, seconds=seconds)]


def ablation(seed: int, steps: int) -> list[list[float]]:
    """The losses of each way."""
    runs = race(list(ABLATION.values()), seed, steps=steps)
    return [[round(loss, 4) for loss in run.losses] for run in runs]


def beside_muon(setting: Setting, seed: int, steps: int) -> list[Tests]:
    """The tests of each way."""
    last = tuple(range(setting.options["last"]))
    ways = [options and options | {"without_curvature": last} for options in BESIDE_MUON.values()]
    settings = [replace(setting, options={**setting.options, **options}) for options in ways]
    return [rounded(run.tests) for run in race(settings, seed, goals=GOALS, steps=steps)]


def costs(settings: Mapping[str, Setting], seed: int, steps: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a step, and of its parts, after the plateau."""
    found: dict[str, dict[str, float]] = {}
    for name, tuned in settings.items():
        setting = replace(tuned, schedule="constant", horizon=None)  # no run ends
        run = Run(setting, seed)
        while len(run.losses) < steps:
            run.step()
        products, solves = Stopwatch(BlockProduct.__call__), Stopwatch(CGNOptimizer.step)
        begin = run.seconds
        with (
            mock.patch.object(BlockProduct, "__call__", products.method),
            mock.patch.object(CGNOptimizer, "step", solves.method),
        ):
            for _ in range(steps):
                run.step()
        parts = {
            "step": 1e3 * (run.seconds - begin),
            "products": 1e3 * products.seconds,
            "rest of the solves": 1e3 * (solves.seconds - products.seconds),
            "number": products.calls,
        }
        other = Run(replace(setting, channels_last=False), seed)
        while len(other.losses) < steps:
            other.step()
        begin = other.seconds
        while len(other.losses) < 2 * steps:
            other.step()
        parts["channels first"] = 1e3 * (other.seconds - begin)
        found[name] = {part: float(f"{value / steps:.4g}") for part, value in parts.items()}
    return found


class Stopwatch:
    """What the calls of a function take.

    Args:
        function: The function.

    Attributes:
        method: The function, as a method of a class.
        seconds: The seconds of its calls.
        calls: Their number.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.seconds, self.calls = 0.0, 0

        def method(*arguments: Any) -> Any:
            begin = clock()
            result = function(*arguments)
            self.seconds += clock() - begin
            self.calls += 1
            return result

        self.method = method


def autoencoder(label: str, seed: int, seconds: float) -> list[list[float]]:
    """The autoencoder's way."""
    return rounded(train_autoencoder(seed, seconds=seconds, **AUTOENCODER[label]))


def search_jobs(network: str, quick: bool) -> Iterator[Job]:
    """Searches of all settings, to choose from."""
    workload = WORKLOADS[network]
    for contender in SPACES:
        weight = workload.settings * workload.rungs[-1] * 0.8
        yield Job(f"search {network}, {contender}", weight, search, (network, contender, quick))


def final_jobs(found: Mapping[str, Any], network: str, quick: bool) -> Iterator[Job]:
    """Races of what is best, from the seeds that are shown."""
    settings = entrants(found, network)
    seconds = QUICK_SECONDS if quick else WORKLOADS[network].seconds
    for seed in SEEDS[: 1 if quick else None]:
        if settings:
            weight = seconds * len(settings)
            yield Job(f"race {network}, {seed}", weight, settings_race, (settings, seed, seconds))


def cost_jobs(found: Mapping[str, Any], quick: bool) -> Iterator[Job]:
    """What the steps cost that got to the first goal fastest."""
    settings: dict[str, Setting] = {}
    for contender in ("Adam", "Muon", "CGN", "CGN + Adam", "CGN + Muon"):
        if way := outcome(found, "sigmoid CNN", contender, GOALS[0], quick):
            settings[contender] = way[0]
    for seed in FEW_SEEDS[: 1 if quick else None]:
        yield Job(f"costs {seed}", 5.0, costs, (settings, seed, 2 if quick else 30))


def other_jobs(found: Mapping[str, Any], quick: bool) -> Iterator[Job]:
    """Ablations, and the autoencoder."""
    way = outcome(found, "sigmoid CNN", "CGN + Muon", GOALS[1], quick)
    for seed in FEW_SEEDS[: 1 if quick else None]:
        if way:
            arguments = way[0], seed, 2 if quick else 2 * ABLATION_STEPS
            yield Job(f"beside Muon {seed}", 10.0, beside_muon, arguments)
        for label in AUTOENCODER:
            seconds = QUICK_SECONDS if quick else 16.0
            yield Job(f"autoencoder {label} {seed}", seconds, autoencoder, (label, seed, seconds))
        yield Job(f"ablation {seed}", 30.0, ablation, (seed, 2 if quick else ABLATION_STEPS))


def work(jobs: Iterable[Job], found: dict[str, Any], path: Path, processes: int | None) -> None:
    """Do the jobs that are not done, each in a process of one thread, and write each down."""
    jobs = sorted((job for job in jobs if job.key not in found), key=lambda job: -job.weight)
    total = remaining = sum(job.weight for job in jobs)
    begin = time.perf_counter()
    context = get_context("spawn")
    with ProcessPoolExecutor(
        processes, context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        futures = {pool.submit(job.function, *job.arguments): job for job in jobs}
        for n, future in enumerate(as_completed(futures), start=1):
            job = futures[future]
            found[job.key] = future.result()
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"job": job.key, "found": found[job.key]}) + "\n")
            remaining -= job.weight
            left = (time.perf_counter() - begin) * remaining / (total - remaining) / 60
            print(f"{n}/{len(jobs)}  {job.key:48}  about {left:.0f} minutes left", flush=True)


def described(setting: Setting) -> str:
    """A setting as a table has it."""
    names = {"lr": "rate", "muon_lr": "Muon's rate", "damping": "λ", "maxiter": "products"}
    names |= {"max_length": "length", "betas": "β", "adam_lr": "Adam's rate", "last": "last layers"}
    names |= {"max_iter": "evaluations", "history_size": "history", "line_search_fn": "line search"}
    parts = [f"batch {setting.batch_size}"]
    for name, value in setting.options.items():
        values = value if isinstance(value, tuple) else (value,)
        if value not in (None, math.inf):
            words = "+".join(x if isinstance(x, str) else f"{x:g}" for x in values)
            parts.append(f"{names.get(name, name)} {words.replace('_', ' ')}")
    if setting.average:
        parts.append(f"average {setting.average:g}")
    if setting.horizon:
        parts.append(f"{setting.schedule} to {setting.horizon} steps")
    return ", ".join(parts)


def outcome(
    found: Mapping[str, Any], network: str, contender: str, goal: float, quick: bool
) -> tuple[Setting, list[Sequence[float]]] | None:
    """Of the settings that race, the one with the least median time to the goal.

    Returns:
        The setting, and for each seed the first test at the goal; `None` if none raced.
    """
    ways = [
        (setting, [first(found[f"race {network}, {seed}"][i], goal) for seed in seeds(quick)])
        for i, setting in enumerate(entrants(found, network))
        if setting.method == contender
    ]
    return min(ways, key=lambda way: median_of(way[1], 1), default=None)


def seeds(quick: bool) -> Sequence[int]:
    """The seeds that are shown."""
    return SEEDS[: 1 if quick else None]


def median_of(tests: Sequence[Sequence[float]], column: int) -> float:
    """The median of the steps (0) or the seconds (1)."""
    return statistics.median(test[column] for test in tests)


def race_table(found: Mapping[str, Any], network: str, quick: bool) -> list[Row]:
    """For each goal, how each contender got there, fastest first."""
    table: list[Row] = []
    for goal in GOALS:
        rows: list[tuple[float, Row]] = []
        for contender in SPACES:
            row = {"Goal": f"{goal:.0%}", "Contender": contender}
            way = outcome(found, network, contender, goal, quick)
            if way is None:
                rows.append((math.inf, row | {"Seconds": "never in tuning"}))
                continue
            setting, tests = way
            row |= {
                "Seconds": to_goal([test[1] for test in tests], 2),
                "Steps": to_goal([test[0] for test in tests], 0),
                "Setting": described(setting),
                "Tuned": "by hand" if setting in BY_HAND.get(network, ()) else "by search",
            }
            rows.append((median_of(tests, 1), row))
        table += [row for _, row in sorted(rows, key=lambda pair: pair[0])]
    return table


def to_goal(values: Sequence[float], digits: int) -> str:
    """The median and the range of what it took; runs that did not get there took for ever."""
    if min(values) == math.inf:
        return "never"
    return summary(values, digits).replace("inf", "never")


def tuning_figure(found: Mapping[str, Any]) -> Figure:
    """The seconds to a goal at the best of k settings, over the seconds of tuning them.

    The median over random orders of the settings, on the first tuning seed.
    """
    figure, axes = plt.subplots(2, 1, figsize=(5, 7), sharex=True, layout="constrained")
    for ax, goal in zip(axes, GOALS[::2], strict=True):
        for contender, (color, style) in LINES.items():
            result = found[f"search sigmoid CNN, {contender}"]
            times = [first(tests, goal)[1] for tests in result["first"]]
            spent, fastest = best_of_k(times, result["seconds"])
            ax.plot(spent, fastest, style, color=COLORS[color], label=contender)
        ax.set(xscale="log", yscale="log", title=f"to {goal:.0%}")
        ax.set(xlim=(1, 100), ylim=(0.15, 6), ylabel="seconds at the best setting so far")
    axes[1].set(xlabel="seconds of tuning")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)
    return figure


def best_of_k(
    times: Sequence[float], spent: Sequence[float], orders: int = 301
) -> tuple[list[float], list[float]]:
    """For k = 1, 2, …: the mean seconds of trying k settings, and the median of the best time."""
    r = random.Random(0)
    n = len(times)
    shuffled = [r.sample(range(n), n) for _ in range(orders)]
    fastest = [
        statistics.median(min(times[i] for i in order[:k]) for order in shuffled)
        for k in range(1, n + 1)
    ]
    return [k * statistics.mean(spent) for k in range(1, n + 1)], fastest


def ablation_table(found: Mapping[str, Any], quick: bool) -> list[Row]:
    """Late losses of each way."""
    runs = [found[f"ablation {seed}"] for seed in FEW_SEEDS[: 1 if quick else None]]
    late = {
        way: summary([statistics.mean(run[i][-10:]) for run in runs])
        for i, way in enumerate(ABLATION)
    }
    rows = [
        {"A gradient step in": part} | {f"{length}": late[part, length] for length in LENGTHS}
        for part in PARTS
    ]
    return [{"A gradient step in": "no layer", "as long": late["none", ""]}, *rows]


def beside_muon_table(found: Mapping[str, Any], quick: bool) -> list[Row]:
    """Steps to each goal of each way, with Muon in the other layers."""
    if "beside Muon 0" not in found:  # a quick search may have chosen nothing
        return []
    return [
        {"Step of the last layer": way}
        | {
            f"Steps to {goal:.0%}": to_goal(
                [
                    first(found[f"beside Muon {seed}"][i], goal)[0]
                    for seed in FEW_SEEDS[: 1 if quick else None]
                ],
                0,
            )
            for goal in GOALS[:2]
        }
        for i, way in enumerate(BESIDE_MUON)
    ]


def cost_table(found: Mapping[str, Any], quick: bool) -> list[Row]:
    """Milliseconds of a step and of its parts: medians over the seeds."""
    runs = [found[f"costs {seed}"] for seed in FEW_SEEDS[: 1 if quick else None]]
    table = []
    for name in runs[0]:
        parts = {part: statistics.median(run[name][part] for run in runs) for part in runs[0][name]}
        rest = parts["step"] - parts["products"] - parts["rest of the solves"]
        table.append(
            {
                "Milliseconds per step": name,
                "All": f"{parts['step']:.1f}",
                "Gradient, graph, Adam, Muon": f"{rest:.1f}",
                "Products": f"{parts['products']:.1f}",
                "Rest of the solves": f"{parts['rest of the solves']:.1f}",
                "Number of products": f"{parts['number']:.1f}",
                "All, channels first": f"{parts['channels first']:.1f}",
            }
        )
    return table


def records(found: Mapping[str, Any], quick: bool) -> dict[str, Any]:
    """What page 4 shows: settings and outcomes, and the losses of the ablation."""
    races: dict[str, Any] = {}
    for network in WORKLOADS:
        for goal in GOALS:
            ways = {name: outcome(found, network, name, goal, quick) for name in SPACES}
            races.setdefault(network, {})[f"{goal:.0%}"] = {
                name: {
                    "setting": described(way[0]),
                    "steps": [test[0] if test[0] < math.inf else None for test in way[1]],
                    "seconds": [test[1] if test[1] < math.inf else None for test in way[1]],
                }
                for name, way in ways.items()
                if way
            }
    late = {
        f"{part}, {length}": [
            round(statistics.mean(found[f"ablation {seed}"][i][-10:]), 3)
            for seed in FEW_SEEDS[: 1 if quick else None]
        ]
        for i, (part, length) in enumerate(ABLATION)
    }
    return {
        "races": races,
        "ablation": late,
        "beside Muon": beside_muon_table(found, quick),
        "costs": cost_table(found, quick),
    }


def autoencoder_results(found: Mapping[str, Any], quick: bool) -> tuple[list[Row], Figure]:
    """Errors at the end and after equal steps, and all curves."""
    table = []
    figure, axes = plt.subplots(3, 1, figsize=(5, 9), layout="constrained")
    colors = list(COLORS.values())
    for i, label in enumerate(AUTOENCODER):
        runs = [found[f"autoencoder {label} {seed}"] for seed in FEW_SEEDS[: 1 if quick else None]]
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
    axes[1].set(xlabel="seconds", ylabel="squared error per image", ylim=(10, 62))
    axes[2].set(xscale="log", yscale="log", xlabel="step", ylabel="damping λ")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
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
    for network in WORKLOADS:
        yield network.lower().replace(" ", "_"), race_table(found, network, quick)
    yield "tuning", tuning_figure(found)
    yield "ablation", ablation_table(found, quick)
    yield "beside_muon", beside_muon_table(found, quick)
    yield "costs", cost_table(found, quick)
    table, figure = autoencoder_results(found, quick)
    yield "autoencoder", table
    yield "autoencoder", figure


def main() -> None:
    """Run what is not finished, and write what the pages show."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small part of each, as a check")
    parser.add_argument("--fresh", action="store_true", help="forget what is finished")
    parser.add_argument("--output", type=Path, help="where to write; by default docs/experiments")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="at a time")
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
    for network in WORKLOADS:
        work(search_jobs(network, quick), found, path, arguments.processes)
        work(final_jobs(found, network, quick), found, path, arguments.processes)
    others = [*cost_jobs(found, quick), *other_jobs(found, quick)]
    work(others, found, path, arguments.processes)
    for name, result in results(found, quick):
        if isinstance(result, Figure):
            draw(result, folder / f"{name}.svg")
        else:
            write(result, folder / f"{name}.csv")
    kept = json.dumps(records(found, quick), indent=1, ensure_ascii=False)
    (folder / RECORDS.name if quick else RECORDS).write_text(kept + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
