"""The races behind page 7, in full: `nox -s experiments`, or run this file.

For each problem, every contender gets the same number of settings, drawn at random from its own
space. Each setting trains for a quarter of the time, from a seed that the report does not use. The
setting with the smallest error in L² races for the whole time, from the seeds of the report.

A run is a process of one thread, as many at once as there are cores. What is finished is kept in
races.jsonl: after an interruption, the same command goes on from there.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measuring import Row, machine, write

from cgn_tutorial.pages.pinn import Race, Setting

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "src" / "cgn_tutorial" / "pages" / "least_squares.json"  # what page 7 shows
SETTINGS = 6  # for each contender and problem
TUNING_SEED = 100

Draw = Callable[[random.Random], Any]


def one_of(*values: Any) -> Draw:
    """A value of these."""
    return lambda draw: draw.choice(values)


def between(low: float, high: float) -> Draw:
    """A power of ten, with an exponent between these."""
    return lambda draw: float(f"{10 ** draw.uniform(low, high):.2g}")


DECAY = one_of("none", "linear", "cosine")
HISTORY = one_of(10, 30, 100, 300)
SCALE = one_of(1e4, 1e6, 1e8)
BETAS = one_of(*((a, b) for a in (0.5, 0.8, 0.9) for b in (0.9, 0.99, 0.999)))
NEWTON = {"damping": between(-4, 0), "tol": one_of(1e-1, 1e-2, 1e-3)}

#: The options of each contender, and what each is drawn from.
SPACES: Mapping[str, Mapping[str, Draw]] = {
    "Momentum": {"lr": between(-4, -1), "momentum": one_of(0.9, 0.95, 0.99), "decay": DECAY},
    "Adam": {"lr": between(-3, -1), "betas": BETAS, "decay": DECAY},
    "L-BFGS": {"history": HISTORY, "tolerance": one_of(0.0, 1e-9)},
    "L-BFGS, scaled loss": {"history": HISTORY, "scale": SCALE},
    "Adam, then L-BFGS": {
        "lr": between(-3, -1),
        "share": one_of(0.05, 0.1, 0.2, 0.4),
        "history": HISTORY,
        "scale": SCALE,
    },
    "BFGS (SciPy)": {"scale": one_of(1.0, 1e2, 1e4, 1e6, 1e8)},
    "least_squares (SciPy)": {
        "solver": one_of("lm", "exact", "lsmr"),
        "x_scale": one_of(1.0, "jac"),
    },
    "SSBroyden": {"wolfe": one_of(0.1, 0.5, 0.9), "share": one_of(0.0, 0.05)},
    "CGN, Nyström": NEWTON | {"rank": one_of(50, 100), "every": one_of(1, 2, 4)},
    "CGN, exact": NEWTON,
}
FEW = [name for name in SPACES if name not in ("Momentum", "L-BFGS")]  # never the best of 257
#: A single update of BFGS would take longer than the race: n³ operations.
LARGE = [name for name in FEW if name != "BFGS (SciPy)"]


class Report(NamedTuple):
    """How a problem is raced.

    Attributes:
        seconds: The processor seconds of a run.
        seeds: The seeds of the report.
        methods: The contenders.
    """

    seconds: float
    seeds: Sequence[int]
    methods: Sequence[str] = tuple(SPACES)


REPORTS: Mapping[str, Report] = {
    "Poisson, 257": Report(20, range(5)),
    "fit, 301": Report(10, range(5)),
    "Poisson, 1,185": Report(30, range(3), FEW),
    "heat, 1,185": Report(10, range(3), FEW),
    "Poisson in 5-D, 449": Report(10, range(3), FEW),
    "Poisson, 9,873": Report(40, range(3), LARGE),
}


class Job(NamedTuple):
    """A run of a setting."""

    problem: str
    method: str
    options: str  # as JSON, so that jobs compare and are keys
    seed: int
    seconds: float


def settings(problem: str, method: str, count: int) -> list[str]:
    """Different settings of a contender, drawn at random, as JSON."""
    draw = random.Random(f"{problem}, {method}")
    drawn: dict[str, None] = {}
    for _ in range(100):
        values = {name: value(draw) for name, value in SPACES[method].items()}
        drawn[json.dumps(values)] = None
        if len(drawn) == count:
            break
    return list(drawn)


def run(job: Job) -> list[tuple[float, ...]]:
    """The measurements of a run; none if numbers that are not finite ended the run."""
    torch.set_num_threads(1)
    options = json.loads(job.options)
    race = Race(job.problem, Setting(job.method, options), job.seed, job.seconds)
    try:
        return [tuple(float(f"{x:.4g}") for x in m) for m in race.run()]
    except RuntimeError:
        return []


class Runs:
    """The finished runs, in a file.

    Args:
        file: A JSON object a line: the job, and its measurements.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.done: dict[Job, list[list[float]]] = {}
        for line in file.read_text().splitlines() if file.exists() else ():
            entry = json.loads(line)
            self.done[Job(*entry["job"])] = entry["measurements"]

    def finish(self, jobs: Sequence[Job]) -> None:
        """Run the jobs that are not done."""
        missing = [job for job in jobs if job not in self.done]
        with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
            futures = {pool.submit(run, job): job for job in missing}
            for future in as_completed(futures):
                job = futures[future]
                self.done[job] = [list(m) for m in future.result()]
                entry = {"job": job, "measurements": self.done[job]}
                with self.file.open("a") as out:
                    out.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def error(self, job: Job) -> float:
        """The last error in L² of a run; infinite if the run failed."""
        measurements = self.done[job]
        error = measurements[-1][2] if measurements else math.inf
        return math.inf if math.isnan(error) else error


def tune(runs: Runs, problem: str, report: Report, count: int) -> dict[str, str]:
    """The best setting of each contender."""
    jobs = {
        method: [
            Job(problem, method, options, TUNING_SEED, report.seconds / 4)
            for options in settings(problem, method, count)
        ]
        for method in report.methods
    }
    runs.finish([job for some in jobs.values() for job in some])
    return {method: min(some, key=runs.error).options for method, some in jobs.items()}


def finals(problem: str, report: Report, best: Mapping[str, str]) -> dict[str, list[Job]]:
    """The runs of the report."""
    return {
        method: [Job(problem, method, options, seed, report.seconds) for seed in report.seeds]
        for method, options in best.items()
    }


def table(runs: Runs, problem: str, report: Report, best: Mapping[str, str]) -> list[Row]:
    """The errors of all contenders at the end, the smallest first: medians, and ranges."""
    rows: list[tuple[float, Row]] = []
    for method, jobs in finals(problem, report, best).items():
        ends = [runs.done[job][-1] for job in jobs if runs.error(job) < math.inf]
        row = {"Contender": method, "Settings": words(best[method])}
        error = math.inf
        if len(ends) > len(jobs) / 2:
            _, steps, l2, h1 = zip(*ends, strict=True)
            error = statistics.median(l2)
            row |= {
                "Error in L²": f"{error:.1e} ({min(l2):.1e} to {max(l2):.1e})",
                "Error in H¹": f"{statistics.median(h1):.1e}",
                "Steps": f"{statistics.median(steps):,.0f}",
                "Failed": f"{len(jobs) - len(ends)} of {len(jobs)}",
            }
        rows.append((error, row))
    columns = "Contender", "Error in L²", "Error in H¹", "Steps", "Failed", "Settings"
    ordered = (row for _, row in sorted(rows, key=lambda pair: pair[0]))
    return [{column: row.get(column, "") for column in columns} for row in ordered]


def record(runs: Runs, problem: str, report: Report, best: Mapping[str, str]) -> dict[str, Any]:
    """The time of a problem's race, and the median error in L² of each contender at the end."""
    ends = {
        method: statistics.median(map(runs.error, jobs))
        for method, jobs in finals(problem, report, best).items()
    }
    return {"seconds": report.seconds, "errors": ends}


def words(options: str) -> str:
    """Options in words."""
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in json.loads(options).items()
    )


def file_name(problem: str) -> str:
    """The name of a problem's table: "Poisson, 1,185" is in poisson_1185.csv."""
    return "_".join(re.findall(r"[a-z0-9]+", problem.lower().replace(",", "")))


def main(arguments: Sequence[str] | None = None) -> None:
    """Race on all problems, and write a table for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "least_squares")
    parser.add_argument(
        "--quick", action="store_true", help="two short runs of each contender, on one problem"
    )
    parser.add_argument("--problems", nargs="+", choices=REPORTS, default=list(REPORTS))
    chosen = parser.parse_args(arguments)
    chosen.output.mkdir(parents=True, exist_ok=True)
    runs = Runs(chosen.output / "races.jsonl")
    records: dict[str, Any] = {}
    for problem in chosen.problems[: 1 if chosen.quick else None]:
        report = REPORTS[problem]
        if chosen.quick:
            report = report._replace(seconds=0.4, seeds=[0])
        best = tune(runs, problem, report, 2 if chosen.quick else SETTINGS)
        runs.finish([job for some in finals(problem, report, best).values() for job in some])
        write(table(runs, problem, report, best), chosen.output / f"{file_name(problem)}.csv")
        records[problem] = record(runs, problem, report, best)
    write(machine(), chosen.output / "machine.csv")
    if list(records) == list(REPORTS):
        RECORDS.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
