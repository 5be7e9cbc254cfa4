"""The problems of page 7, their network, and the clock of the race."""

import csv
import math
import re
from pathlib import Path

import least_squares
import pytest
import torch
from least_squares import REPORTS, Runs

from cgn_tutorial.pages import pinn
from cgn_tutorial.pages.pinn import CONTENDERS, PROBLEMS, Network, Race, Setting

DOUBLE = torch.float64


def test_the_networks_derivatives_are_autograds():
    torch.manual_seed(0)
    model = Network(3, 7, 5, 1)
    points, weights = torch.rand(4, 3, dtype=DOUBLE), (1.0, 0.5, 0.0)
    u, gradient, second = model(points, weights)
    for x, *found in zip(points, u, gradient, second, strict=True):
        hessian = torch.autograd.functional.hessian(model, x)
        expected = (
            model(x),
            torch.autograd.functional.jacobian(model, x),
            (hessian.diagonal() * torch.tensor(weights, dtype=DOUBLE)).sum(),
        )
        torch.testing.assert_close(tuple(found), expected)


class Exact(torch.nn.Module):
    """A model that is the solution of a problem."""

    def __init__(self, problem):
        super().__init__()
        self.solution = problem.solution

    def forward(self, x, weights=()):
        flat = x.reshape(-1, x.shape[-1]).requires_grad_()
        u = self.solution(flat)
        if not weights:
            return u.reshape(x.shape[:-1]).detach()
        with torch.enable_grad():
            u = self.solution(flat)
            (du,) = torch.autograd.grad(u.sum(), flat, create_graph=True)
            second = sum(
                w * torch.autograd.grad(du[:, i].sum(), flat, retain_graph=True)[0][:, i]
                for i, w in enumerate(weights)
            )
        shape = x.shape[:-1]
        return u.reshape(shape).detach(), du.reshape(x.shape).detach(), second.reshape(shape)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_solution_has_no_residual_and_no_error(name):
    make, (d, *_) = PROBLEMS[name]
    problem = make()
    exact = Exact(problem)
    assert problem.residuals(exact).abs().max() < 1e-12
    assert max(problem.errors(exact)) < 1e-12
    assert problem.points.shape[1] == d


def test_the_loss_is_half_the_squares_of_the_residuals():
    for make, widths in PROBLEMS.values():
        problem, model = make(), Network(*widths)
        expected = problem.residuals(model).square().sum() / 2
        torch.testing.assert_close(problem.loss(model), expected)


def test_noise_keeps_the_solution():
    clean, noisy = pinn.fit(), pinn.fit(noise=0.1)
    difference = noisy.terms[0][2] - clean.terms[0][2]
    assert 0.08 < difference.std() < 0.12
    assert torch.equal(clean.solution(clean.points), noisy.solution(noisy.points))


OPTIONS = {
    "Momentum": {"lr": 1e-3, "momentum": 0.9},
    "Adam": {"lr": 1e-2},
    "Adam, then L-BFGS": {"lr": 1e-2, "share": 0.3, "scale": 1e4, "history": 10},
}


@pytest.mark.parametrize("method", CONTENDERS)
def test_each_contender_lowers_the_error_in_its_time(method):
    race = Race(
        "fit, 301", Setting(method, OPTIONS.get(method, {})), seed=0, seconds=0.3, first=0.01
    )
    start = race.problem.errors(race.model)[0]
    measurements = race.run()
    assert min(m.l2 for m in measurements) < start
    times = [m.seconds for m in measurements]
    assert times == sorted(times)
    assert times[-1] >= 0.3
    assert measurements[-1].l2 == race.problem.errors(race.model)[0]


def test_self_scaled_broyden_updates_a_symmetric_inverse_that_explains_the_last_step():
    torch.manual_seed(0)
    A, s = torch.randn(2, 5, 5, dtype=torch.float64)
    H, s = A @ A.T + torch.eye(5), s[0]
    y = (A.T @ A + torch.eye(5)) @ s
    for b in (0.5, 1.0, 3.0):
        updated = H.clone()
        pinn._update(updated, s, y, b)
        torch.testing.assert_close(updated @ y, s)
        torch.testing.assert_close(updated, updated.T)
        assert torch.linalg.eigvalsh(updated).min() > 0


def test_measuring_takes_no_time_of_the_run(monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(pinn.time, "process_time", lambda: next(clock) * 1.0)
    race = Race("fit, 301", Setting("Adam", {"lr": 1e-3, "decay": "none"}), 0, seconds=30.0)
    monkeypatch.setattr(race.problem.__class__, "errors", lambda *_: [next(clock)] * 2)
    measurements = race.run()
    assert 30 <= measurements[-1].seconds < 33


def test_the_published_errors_are_there():
    published = pinn.load_published()
    assert published["poisson_2d"]["parameters"] == sum(
        p.numel() for p in Network(*PROBLEMS["Poisson, 257"][1]).parameters()
    )
    assert {"Adam", "L-BFGS", "Hessian-free", "KFAC"} < published["heat_1d"]["at_60_s"].keys()


# What page 7 says of the recorded races.

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "examples" / "plot_7_where_it_wins.py").read_text(encoding="utf-8")
TABLES = ROOT / "docs" / "least_squares"


def errors(problem):
    """The median error of each contender, as the table of a problem has it."""
    with (TABLES / f"{least_squares.file_name(problem)}.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {row["Contender"]: float((row["Error in L²"] or "inf").split()[0]) for row in rows}


def test_the_tables_are_those_of_the_runs():
    runs = Runs(TABLES / "races.jsonl")
    for problem, report in REPORTS.items():
        best = least_squares.tune(runs, problem, report, least_squares.SETTINGS)
        table = least_squares.table(runs, problem, report, best)
        with (TABLES / f"{least_squares.file_name(problem)}.csv").open(encoding="utf-8") as file:
            assert list(csv.DictReader(file)) == table


def test_page_7_races_what_the_experiments_chose():
    (cell,) = re.findall(r"^SETTINGS = .+?^}$", PAGE, re.MULTILINE | re.DOTALL)
    names = {}
    exec(cell, names)
    report = REPORTS["Poisson, 257"]
    best = least_squares.tune(Runs(TABLES / "races.jsonl"), "Poisson, 257", report, 6)
    for method, options in names["SETTINGS"].items():
        shown = {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}
        assert shown == least_squares.json.loads(best[method])


def prose():
    """The text of page 7, in one line."""
    return " ".join(re.sub(r"^# ?", "", PAGE, flags=re.MULTILINE).split())


def test_page_7_says_what_the_tables_say():
    text = prose()
    rivals = {"Adam, then L-BFGS": "Adam, then L-BFGS,", "BFGS (SciPy)": "BFGS"}
    rivals["L-BFGS, scaled loss"] = "L-BFGS with the scaled loss"
    for problem, report in REPORTS.items():
        found = errors(problem)
        ours = min(found["CGN, exact"], found.get("CGN, Nyström", math.inf))
        packaged = (name for name in found if name in rivals)
        best = min(packaged, key=found.__getitem__)
        times = f"{float(f'{found[best] / ours:.2g}'):g}"
        said = re.escape(f"{report.seconds} seconds: CGN ends at {ours:.1e}".replace("e-0", "e-"))
        said += re.escape(f". {rivals[best]} has {times} times this error")
        if "SSBroyden" in found:
            said += (
                rf"(?:(?!- \*\*).)*SSBroyden has {found['SSBroyden'] / ours:.2g} times this error"
            )
        assert re.search(said, text), (problem, said)
        if problem in ("Poisson, 1,185", "Poisson, 9,873"):
            assert found["CGN, Nyström"] < found["CGN, exact"] / 2
    for problem in REPORTS.keys() - {"Poisson, 1,185", "heat, 1,185", "Poisson, 9,873"}:
        found = errors(problem)
        assert found["CGN, exact"] < found["CGN, Nyström"]
    poisson, fit = errors("Poisson, 257"), errors("fit, 301")
    for found, many in ((poisson, 370), (fit, 13)):
        ours = min(found["CGN, exact"], found["CGN, Nyström"])
        assert float(f"{found['L-BFGS, scaled loss'] / ours:.2g}") == many
    ours = min(poisson["CGN, exact"], poisson["CGN, Nyström"])
    assert poisson["Adam"] / ours > 10_000

    published = pinn.load_published()["poisson_2d"]
    early, late = published["at_60_s"], published["at_1000_s"]
    assert ours < 2 * min(early.values())
    for method in ("Hessian-free", "KFAC", "KFAC*", "ENGD (per layer)", "ENGD (full)"):
        assert 2 * late[method] < ours
    ratio = poisson["L-BFGS, scaled loss"] / (2 * early["L-BFGS"])
    assert f"L-BFGS with the scaled loss has {ratio:.1f} times the error of their" in text
    assert 2 * early["SGD"] < poisson["Momentum"]


def test_the_front_page_and_readme_say_how_often_and_by_how_much():
    factors = []
    for problem in REPORTS:
        found = errors(problem)
        ours = min(error for name, error in found.items() if name.startswith("CGN"))
        packaged = found.keys() - {"SSBroyden"}
        best = min(found[name] for name in packaged if not name.startswith("CGN"))
        factors.append(float(f"{best / ours:.2g}"))
    large = sorted(factor for factor in factors if factor > 5)
    assert (len(large), len(factors), large[0], large[-1]) == (5, 6, 9.4, 140)
    for path in "README.md", "docs/index.rst":
        text = " ".join((ROOT / path).read_text(encoding="utf-8").split())
        assert "five of six" in text
        assert "9.4 to 140 times the error of Newton steps in the same time" in text
        assert re.search(r"Broyden method[^.]* ahead [^.]*on four", text)
    behind = [
        problem
        for problem in REPORTS
        if (found := errors(problem)).get("SSBroyden", math.inf)
        < min(error for name, error in found.items() if name.startswith("CGN"))
    ]
    assert len(behind) == 4
