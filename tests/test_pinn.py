"""The problems of page 7, their network, and the clock of the race."""

import csv
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


@pytest.mark.parametrize("solver", ["lm", "exact", "lsmr"])
@pytest.mark.parametrize("x_scale", [1.0, "jac"])
def test_least_squares_trains_by_each_solver(solver, x_scale):
    options = {"solver": solver, "x_scale": x_scale}
    race = Race("fit, 301", Setting("least_squares (SciPy)", options), 0, 0.3, first=0.01)
    start = race.problem.errors(race.model)[0]
    assert race.run()[-1].l2 < start


def test_lm_takes_no_fewer_residuals_than_parameters():
    race = Race("heat, 1,185", Setting("least_squares (SciPy)", {"solver": "lm"}), 0, 0.3)
    assert [m.steps for m in race.run()] == [0]


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


def test_a_run_has_one_thread(monkeypatch):
    seen = []
    contender = pinn.CONTENDERS["Adam"]
    monkeypatch.setitem(
        pinn.CONTENDERS,
        "Adam",
        lambda *args, **options: (
            seen.append(torch.get_num_threads()) or contender(*args, **options)
        ),
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        Race("fit, 301", Setting("Adam", {"lr": 1e-2}), 0, 0.05).run()
        assert (seen, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(threads)


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
        assert least_squares.record(runs, problem, report, best) == pinn.load_races()[problem]


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


def multiples(problem):
    """The errors of the rivals, as multiples of that of the better CGN, in two digits."""
    found = pinn.load_races()[problem]["errors"]
    ours = min(error for name, error in found.items() if name.startswith("CGN"))
    return {
        name: float(f"{error / ours:.2g}")
        for name, error in found.items()
        if not name.startswith("CGN")
    }


def test_page_7_compares_with_the_published_errors():
    text = prose()
    found = errors("Poisson, 257")
    ours = min(found["CGN, exact"], found["CGN, Nyström"])
    assert f"CGN is at {ours:.1e} after 20 seconds".replace("e-0", "e-") in text
    published = pinn.load_published()["poisson_2d"]
    early, late = published["at_60_s"], published["at_1000_s"]
    assert ours < 2 * min(early.values())
    for method in ("Hessian-free", "KFAC", "KFAC*", "ENGD (per layer)", "ENGD (full)"):
        assert 2 * late[method] < ours
    ratio = found["L-BFGS, scaled loss"] / (2 * early["L-BFGS"])
    assert f"scaled loss ends, after 20 seconds, at {ratio:.1f} times the error of their" in text
    assert 2 * early["SGD"] < found["Momentum"]


@pytest.mark.parametrize(
    "path", ["README.md", "docs/index.rst", "docs/least_squares.rst", "examples/plot_7"]
)
def test_what_is_said_of_the_races_in_short(path):
    (file,) = ROOT.glob(f"{path}*")
    text = " ".join(re.sub(r"^# ?", "", file.read_text("utf-8"), flags=re.MULTILINE).split())
    packaged = [
        min(times[name] for name in times.keys() - {"SSBroyden"})
        for times in map(multiples, REPORTS)
    ]
    low, high = min(packaged), max(packaged)
    assert f"has {low:g} to {high:g} times the error of" in text
    assert sum(multiples(problem)["SSBroyden"] < 1 for problem in REPORTS) == 4
    assert re.search(r"(?:Broyden[^.]* ahead|[Oo]n four problems, SSBroyden)", text)


def test_what_is_said_of_least_squares():
    closest = {
        problem: min(times.keys() - {"SSBroyden"}, key=times.get)
        for problem in REPORTS
        for times in [multiples(problem)]
    }
    assert closest.pop("Poisson, 9,873") == "Adam, then L-BFGS"
    assert set(closest.values()) == {"least_squares (SciPy)"}
    factors = [multiples(problem)["least_squares (SciPy)"] for problem in REPORTS]
    low, high = min(factors), max(factors)
    text = " ".join((ROOT / "docs" / "guides" / "when.rst").read_text("utf-8").split())
    assert f"`least_squares` ends at {low:g} to {high:g} times the error of CGN" in text
