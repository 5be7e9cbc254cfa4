"""The problems of page 7, their network, and the clock of the race."""

import pytest
import torch

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
        "fit, 301", Setting(method, OPTIONS.get(method, {})), seed=0, seconds=0.3, first=0.0
    )
    start = race.problem.errors(race.model)[0]
    measurements = race.run()
    assert min(m.l2 for m in measurements) < start
    times = [m.seconds for m in measurements]
    assert times == sorted(times)
    assert times[-1] >= 0.3
    assert measurements[-1].l2 == race.problem.errors(race.model)[0]


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
