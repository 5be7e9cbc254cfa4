"""What prose says of the recorded numbers, each fact once: docs/bench and docs/experiments."""

import csv
import json
import math
import re
from functools import cache
from pathlib import Path

import experiments
import pytest
from experiments import (
    FEW_SEEDS,
    GOALS,
    SEEDS,
    SPACES,
    WORKLOADS,
    first,
    median_of,
    outcome,
    settings_of,
)

from cgn_tutorial.pages.races import Setting, load_experiments, race

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGE = ROOT / "examples" / "plot_4_is_it_worth_it.py"
FOUND = {
    entry["job"]: entry["found"]
    for entry in map(
        json.loads, (DOCS / "experiments" / "runs.jsonl").read_text("utf-8").splitlines()
    )
}


def rows(path):
    """The rows of a table."""
    with (DOCS / path).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


# The tables are those of the runs, and the pages show them.


def test_every_run_is_kept():
    jobs = [*experiments.other_jobs(FOUND, quick=False), *experiments.cost_jobs(FOUND, quick=False)]
    for network in WORKLOADS:
        jobs += experiments.search_jobs(network, quick=False)
        jobs += experiments.final_jobs(FOUND, network, quick=False)
    assert {job.key for job in jobs} == set(FOUND)


@pytest.mark.parametrize("network", WORKLOADS)
def test_the_tables_are_those_of_the_runs(network):
    kept = rows(f"experiments/{network.lower().replace(' ', '_')}.csv")
    table = experiments.race_table(FOUND, network, quick=False)
    assert kept == [dict.fromkeys(kept[0], "") | row for row in table]


@pytest.mark.parametrize("name", ["ablation", "beside_muon", "costs"])
def test_the_short_tables_are_those_of_the_runs(name):
    make = {
        "ablation": experiments.ablation_table,
        "beside_muon": experiments.beside_muon_table,
        "costs": experiments.cost_table,
    }[name]
    kept = rows(f"experiments/{name}.csv")
    assert kept == [dict.fromkeys(kept[0], "") | row for row in make(FOUND, quick=False)]


def test_what_page_4_shows_are_the_runs():
    kept = json.dumps(experiments.records(FOUND, quick=False), sort_keys=True)
    assert kept == json.dumps(load_experiments(), sort_keys=True)


def test_every_table_and_figure_is_shown():
    shown = re.findall(
        r"experiments/(\w+\.(?:csv|svg))", (DOCS / "experiments.rst").read_text("utf-8")
    )
    kept = {path.name for path in (DOCS / "experiments").glob("*.[cs]*[vg]")}
    assert {name for name in kept if not name.endswith(".dark.svg")} == set(shown)
    assert len(shown) == 10


def chosen(network, contender, goal):
    """The setting that counts in the tables."""
    setting, _ = outcome(FOUND, network, contender, goal, quick=False)
    return setting


def page_settings():
    """The settings on page 4, from the cell that defines them."""
    (cell,) = re.findall(r"^LAST = .+?(?=^# %%)", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    names = {"Setting": Setting}
    exec(cell, names)
    return {
        "Muon": names["MUON"],
        "Adam": names["ADAM"],
        "CGN": names["CGN"],
        "CGN + Adam": names["WITH_ADAM"],
        "CGN + Muon": names["WITH_MUON"],
    }


def test_page_4_races_what_the_experiments_chose():
    for contender, setting in page_settings().items():
        assert setting == chosen("sigmoid CNN", contender, 0.9)


def test_page_3_trains_by_the_clock_what_the_experiments_chose():
    page = ROOT / "examples" / "plot_3_matrix_free_optimization.py"
    (cell,) = re.findall(
        r"^BUDGET = .+?^settings = .+?$", page.read_text(), re.MULTILINE | re.DOTALL
    )
    names = {"Setting": Setting}
    exec(cell, names)
    assert [setting.method for setting in names["settings"]] == ["Adam", "CGN"]
    for setting in names["settings"]:
        tuned = chosen("sigmoid CNN", setting.method, 0.9)
        options = {"max_length": math.inf} if setting.method == "CGN" else {}
        assert options | setting.options == tuned.options
        for field in ("schedule", "horizon", "batch_size"):
            assert getattr(setting, field) == getattr(tuned, field)


@pytest.mark.parametrize("contender", ["CGN", "CGN + Adam"])
def test_a_race_repeats_the_runs_that_are_kept(contender):
    _, tests = outcome(FOUND, "sigmoid CNN", contender, 0.9, quick=False)
    kept = [test[0] for test in tests]
    (run,) = race([chosen("sigmoid CNN", contender, 0.9)], 0, goals=[0.9], steps=200)
    # Rounding moves it a little.
    assert min(kept) / 1.5 <= run.reached(0.9).steps <= 1.5 * max(kept)


# The rules of the races.


def test_the_rules_on_the_page_are_those_of_the_code():
    rules = " ".join((DOCS / "experiments.rst").read_text("utf-8").split())
    assert "same number of settings at random: 40 for the sigmoid CNN, 12 for each" in rules
    assert [workload.settings for workload in WORKLOADS.values()] == [40, 12, 12]
    assert "first after five seconds (perceptron: four, ReLU: three)" in rules
    assert [workload.seconds for workload in WORKLOADS.values()] == [5, 4, 3]
    assert "ends at an early time, and the worse half of the rest at a second one" in rules
    assert {len(workload.rungs) for workload in WORKLOADS.values()} == {3}
    assert GOALS == (0.90, 0.95, 0.97)
    assert len(SEEDS) == 5
    assert "from five other seeds" in rules
    assert not set(SEEDS) & set(experiments.TUNING_SEEDS)


# Who wins the races.


@cache
def took(network, goal, column=1):
    """For each contender, the median over the seeds of the steps (0) or the seconds (1)."""
    found = {name: outcome(FOUND, network, name, goal, quick=False) for name in SPACES}
    return {name: median_of(way[1], column) if way else math.inf for name, way in found.items()}


NETWORK = "sigmoid CNN"


@pytest.mark.parametrize("network", WORKLOADS)
@pytest.mark.parametrize("goal", GOALS)
def test_muon_wins_but_for_the_last_goal_with_relus(network, goal):
    times = took(network, goal)
    if network == "sigmoid MLP" and goal == 0.97:
        assert min(times.values()) == math.inf
    else:
        last = network == "ReLU CNN" and goal == 0.97
        assert min(times, key=times.get) == ("Adam" if last else "Muon")


@pytest.mark.parametrize("network", ["sigmoid CNN", "sigmoid MLP"])
def test_cgn_with_muon_comes_second_on_sigmoids(network):
    for goal in GOALS[:2]:
        times = took(network, goal)
        assert sorted(times, key=times.get)[1] == "CGN + Muon"


def test_muon_alone_or_beside_newton_steps_takes_the_fewest_steps():
    for goal in GOALS:
        steps = took(NETWORK, goal, column=0)
        assert set(sorted(steps, key=steps.get)[:2]) == {"Muon", "CGN + Muon"}


def test_with_relus_cgn_with_adam_takes_the_fewest_steps():
    for goal in GOALS[:2]:
        steps = took("ReLU CNN", goal, column=0)
        assert min(steps, key=steps.get) == "CGN + Adam"


def test_adam_is_ahead_of_cgn_and_gets_to_90_percent_in_less_than_a_second():
    for goal in GOALS:
        times = took(NETWORK, goal)
        assert times["Adam"] < times["CGN"]
    _, tests = outcome(FOUND, NETWORK, "Adam", 0.9, quick=False)
    assert max(test[1] for test in tests) < 1
    assert chosen(NETWORK, "Adam", 0.9).options["betas"] == (0.5, 0.95)


def test_l_bfgs_reaches_no_goal_with_sigmoids():
    for network in ("sigmoid CNN", "sigmoid MLP"):
        assert {took(network, goal)["L-BFGS"] for goal in GOALS} == {math.inf}


def test_the_search_chose_small_batches_for_newton_steps():
    for contender in ("CGN", "CGN + Adam", "CGN + Muon"):
        batches = {
            settings_of(NETWORK, contender)[k].batch_size
            for k in experiments.best(FOUND, NETWORK, contender).values()
        }
        assert batches <= {64, 128}


@pytest.mark.parametrize(("goal", "many"), [(0.9, 3), (0.97, 12)])
def test_with_few_settings_cgn_with_muon_is_ahead_and_with_more_muon_is(goal, many):
    found = {}
    for name in SPACES:
        result = FOUND[f"search {NETWORK}, {name}"]
        times = [first(tests, goal)[1] for tests in result["first"]]
        _, found[name] = experiments.best_of_k(times, result["seconds"])
    for k in range(1, 41):
        ranked = sorted(found, key=lambda name: found[name][k - 1])
        if k >= many:
            assert ranked[:2] == ["Muon", "CGN + Muon"]
        elif goal == 0.9:
            assert ranked[0] == "CGN + Muon"


# The autoencoder.

ADAMS = ("Adam, 5e-3, batch 256", "Adam, 5e-3, batch 500")


def autoencoder(way):
    """The way of each seed."""
    return [FOUND[f"autoencoder {way} {seed}"] for seed in FEW_SEEDS]


def errors(way, after=math.inf):
    """The error of each seed after so many steps, or the next test; by default at the end."""
    return [next((t[2] for t in run if t[0] >= after), run[-1][2]) for run in autoencoder(way)]


def test_the_autoencoder_needs_a_warm_start_and_a_damping_that_fits():
    for after in (40, math.inf):
        assert min(errors("λ = 0.03, solves from zero", after) + errors("λ = 3", after)) > 52
    assert max(errors("λ adapts, from 3", 45)) < 51
    newton = experiments.AUTOENCODER.keys() - {*ADAMS, "λ = 0.03"}
    assert max(errors("λ = 0.03")) < min(min(errors(way)) for way in newton)


def test_the_autoencoder_is_adams_by_the_clock_and_newtons_by_steps():
    for adam in ADAMS:
        assert max(errors("λ = 0.03", 40)) < min(errors(adam, 40))
        for way in experiments.AUTOENCODER.keys() - set(ADAMS):  # in the same seconds
            assert max(errors(adam)) < min(errors(way))


def test_a_damping_that_adapts_to_another_batch_ends_most_runs():
    runs = autoencoder("λ adapts to another batch")
    assert sum(run[-1][2] == run[-2][2] and run[-1][3] > 1e9 for run in runs) == 2


# The benchmarks.


def numbers(table, column):
    """A column of a table of the benchmarks, without ranges, by the first column."""
    table = rows(f"bench/{table}.csv")
    label = next(iter(table[0]))
    found = {row[label]: row[column].partition(" ")[0].replace(",", "") for row in table}
    return {name: float(number) for name, number in found.items() if number}


def test_the_benchmarks_bear_out_what_is_said_of_them_in_short():
    product = numbers("products", "in forward and backward passes")
    assert 0.65 < product["0.weight"] < 0.85
    assert max(product[name] for name in product if name.startswith(("7.", "9."))) <= 0.1
    assert max(product[name] for name in product if "." in name) < 1
    faster = numbers("steps", "times as fast")
    assert 1.35 < faster["CGNOptimizer, BackPACK's products"] < 1.45
    assert 2.7 < faster["CGNOptimizer, GGN per layer"] < 3.5
    alike = numbers("steps", "losses printed alike, float32")
    assert alike["CGNOptimizer, BackPACK's products"] == 51
    sizes = {
        way: [int(n.replace(",", "")) for n in numbers("width", f"{way}, ms")]
        for way in ("dense solve", "solve by CG")
    }
    assert max(sizes["dense solve"]) < 10_000
    assert max(sizes["solve by CG"]) > 5_000_000


@pytest.mark.parametrize("name", ["images", "table", "text"])
def test_the_table_of_loops_says_what_the_page_does(name):
    loss = {
        row["trained with"]: float(row["loss"].split()[0])
        for row in rows("bench/loops.csv")
        if row["loop"].startswith(name)
    }
    newton = loss["CGN"]
    assert newton < min(loss["SGD"], loss["Adam"])
    assert loss["Adam, in the time of CGN"] < newton
    assert (loss["SGD, in the time of CGN"] < newton) == (name != "table")
