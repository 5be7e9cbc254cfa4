"""What `LevenbergMarquardt` promises."""

from __future__ import annotations

import math

import pytest
import torch
from test_optimizer import EXTENSION, SHAPES, Quadratic, assert_equal
from torch import Tensor, nn

from cgn_tutorial import GGN, CGNOptimizer, LevenbergMarquardt


def adaptive_step(rho: float, damping: float = 0.1, **options) -> tuple[list, list, float, float]:
    """Values before and after a step, ρ, and λ, if the loss changes by ρ times what is promised."""
    quadratic = Quadratic(SHAPES).backward()
    optimizer = CGNOptimizer(quadratic.parameters.values(), EXTENSION, damping=damping, maxiter=20)
    adaptive = LevenbergMarquardt(optimizer, **options)
    before = quadratic.values()
    found = adaptive.step(1.0, lambda: 1.0 + rho * optimizer.predicted)
    return before, quadratic.values(), found, optimizer.param_groups[0]["damping"]


@pytest.mark.parametrize(
    ("rho", "factor"), [(2.0, 2 / 3), (0.76, 2 / 3), (0.74, 1), (0.26, 1), (0.24, 1.5), (0.01, 1.5)]
)
def test_damping_follows_the_ratio(rho, factor):
    before, after, found, damping = adaptive_step(rho)
    assert found == pytest.approx(rho)
    assert damping == pytest.approx(0.1 * factor)
    assert not any(torch.equal(x, p) for x, p in zip(before, after, strict=True))


@pytest.mark.parametrize("rho", [0.0, -1.0, math.nan, math.inf, -math.inf])
def test_a_step_that_does_not_lower_the_loss_is_taken_back(rho):
    before, after, found, damping = adaptive_step(rho)
    if math.isfinite(rho) or rho < 0:
        assert_equal(after, before)
    assert damping == pytest.approx(0.15)
    assert found == pytest.approx(rho) if math.isfinite(rho) else found == -math.inf


def test_damping_stays_above_its_minimum():
    assert adaptive_step(1.0, damping=2e-4, minimum=2e-4)[3] == 2e-4
    assert adaptive_step(0.0, damping=0.0, minimum=2e-4)[3] == pytest.approx(3e-4)


@pytest.mark.parametrize("minimum", [-1.0, math.inf, math.nan])
def test_the_minimum_must_be_finite(minimum):
    optimizer = CGNOptimizer([nn.Parameter(torch.ones(2))], EXTENSION)
    with pytest.raises(
        ValueError, match=f"minimum must be finite and at least 0, but is {minimum}"
    ):
        LevenbergMarquardt(optimizer, minimum)


def test_the_ratio_is_one_on_a_quadratic_without_damping():
    random = torch.Generator().manual_seed(0)
    X, y = torch.randn(50, 8, dtype=torch.float64, generator=random).split([7, 1], dim=1)
    model = nn.Linear(7, 1).double()
    curvature = GGN([model.parameters()])
    optimizer = CGNOptimizer(model.parameters(), curvature, lr=0.5, damping=0.0, warm_start=0.9)
    adaptive = LevenbergMarquardt(optimizer, minimum=0.0)

    def evaluate():
        return nn.functional.mse_loss(model(X), y)

    for _ in range(3):
        optimizer.zero_grad()
        z = model(X)
        loss = nn.functional.mse_loss(z, y)
        curvature.backward(loss, z)
        assert adaptive.step(loss, evaluate) == pytest.approx(1.0)


class Regression:
    """A linear regression, on which the model of a whole-network step is exact."""

    def __init__(self, dtype: torch.dtype = torch.float64, **options: object) -> None:
        random = torch.Generator().manual_seed(0)
        data = torch.randn(50, 8, dtype=torch.float64, generator=random).to(dtype)
        self.X, self.y = data.split([7, 1], dim=1)
        torch.manual_seed(0)
        self.model = nn.Linear(7, 1).to(dtype)
        self.curvature = GGN([self.model.parameters()])
        settings = {"lr": 1.0, "damping": 1e-3} | options
        self.optimizer = CGNOptimizer(self.model.parameters(), self.curvature, **settings)
        self.adaptive = LevenbergMarquardt(self.optimizer)

    def evaluate(self) -> Tensor:
        return nn.functional.mse_loss(self.model(self.X), self.y)

    def step(self, evaluate=None) -> float:
        self.optimizer.zero_grad()
        z = self.model(self.X)
        loss = nn.functional.mse_loss(z, self.y)
        self.curvature.backward(loss, z)
        return self.adaptive.step(loss, evaluate or self.evaluate)

    @property
    def damping(self) -> float:
        return self.optimizer.param_groups[0]["damping"]

    def values(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


def test_the_penalty_of_weight_decay_is_part_of_the_loss():
    """A quadratic with a penalty: the model is exact, so the ratio is near 1, and λ falls."""
    regression = Regression(weight_decay=0.5, tol=1e-10)

    def objective() -> float:
        squares = sum(p.square().sum() for p in regression.model.parameters())
        return (regression.evaluate() + 0.25 * squares).item()

    before = objective()
    assert regression.step() == pytest.approx(1.0, abs=1e-2)
    assert objective() < before
    assert regression.damping == pytest.approx(1e-3 * 2 / 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("warm_start", [0.0, 0.9])
def test_after_convergence_the_damping_stays(dtype, warm_start):
    regression = Regression(dtype, tol=1e-6, warm_start=warm_start)
    for _ in range(200):
        regression.step()
    assert regression.damping <= 1e-3
    X, y = torch.cat([regression.X, torch.ones_like(regression.y)], 1).double(), regression.y
    lowest = (X @ torch.linalg.lstsq(X, y.double()).solution - y).square().mean().item()
    assert regression.evaluate().item() == pytest.approx(lowest, rel=1e-5)


def test_after_rejected_steps_a_warm_start_leads_downhill():
    """The rejected step nearly solves the next system, which differs by more damping."""
    regression = Regression(warm_start=0.9)
    for _ in range(5):
        before = regression.values()
        regression.step(lambda: 1e9)
        assert_equal(regression.values(), before)
        assert regression.optimizer.predicted < 0
    assert regression.step() > 0.75


def test_what_evaluate_raises_leaves_everything_as_it_was():
    regression = Regression(warm_start=0.9)
    regression.step()
    before, damping = regression.values(), regression.damping
    state = {p: s["v"].clone() for p, s in regression.optimizer.state.items()}

    def broken() -> float:
        raise ArithmeticError("broken")

    with pytest.raises(ArithmeticError, match="broken"):
        regression.step(broken)
    assert_equal(regression.values(), before)
    assert regression.damping == damping
    assert_equal([s["v"] for s in regression.optimizer.state.values()], list(state.values()))


def test_a_loss_may_differentiate_inside_itself():
    """−u″ = 1 on an interval: a Laplacian in the loss."""
    torch.manual_seed(0)
    u = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    points = torch.linspace(0, 1, 20, dtype=torch.float64)[:, None]
    edge = torch.tensor([[0.0], [1.0]], dtype=torch.float64)

    def residuals() -> Tensor:
        x = points.clone().requires_grad_()
        (slope,) = torch.autograd.grad(u(x).sum(), x, create_graph=True)
        (bend,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
        return torch.cat([bend + 1, 10 * u(edge)])

    curvature = GGN([u.parameters()])
    optimizer = CGNOptimizer(u.parameters(), curvature, lr=1.0, damping=1e-3, tol=1e-3)
    adaptive = LevenbergMarquardt(optimizer, minimum=1e-10)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        z = residuals()
        loss = z.square().mean()
        curvature.backward(loss, z)
        adaptive.step(loss, lambda: residuals().square().mean())
        losses.append(loss.item())
    assert losses[-1] < 1e-2 * losses[0]


@pytest.mark.parametrize("taken_back", [False, True])
def test_buffers_are_those_of_the_training_pass(taken_back):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double()
    inputs, targets = torch.randn(2, 40, 3, dtype=torch.float64), torch.randn(40, 1).double()
    curvature = GGN([model.parameters()])
    optimizer = CGNOptimizer(model.parameters(), curvature, lr=1.0)
    adaptive = LevenbergMarquardt(optimizer, buffers=model.buffers())
    z = model(inputs[0])
    loss = nn.functional.mse_loss(z, targets)
    curvature.backward(loss, z)
    before = [buffer.clone() for buffer in model.buffers()]

    def evaluate() -> Tensor | float:
        loss = nn.functional.mse_loss(model(inputs[0]), targets)
        return 1e9 if taken_back else loss

    adaptive.step(loss, evaluate)
    assert_equal(list(model.buffers()), before)


def test_adapts_around_an_optimizer_that_is_wrapped():
    """As Accelerate wraps it: step() takes a closure, and nothing else."""
    regression = Regression()

    class Wrapped:
        def __init__(self, optimizer):
            self.optimizer = optimizer

        def __getattr__(self, name):
            return getattr(self.optimizer, name)

        def step(self, closure=None):
            return self.optimizer.step(closure)

    regression.adaptive = LevenbergMarquardt(Wrapped(regression.optimizer))
    assert regression.step() > 0.75


def test_nielsens_rule_falls_fast_and_rises_faster_each_time():
    model = torch.nn.Linear(1, 1)
    optimizer = CGNOptimizer(model.parameters(), GGN([model.parameters()]), damping=1.0)
    adaptive = LevenbergMarquardt(optimizer, minimum=0.1, rule="nielsen")
    factors = [adaptive._factor(rho) for rho in (1.0, 0.75, 0.5, 0.25, -1.0, -1.0, -math.inf)]
    assert factors == [1 / 3, 0.875, 1.0, 1.125, 2.0, 4.0, 8.0]
    assert adaptive._factor(math.nan) == 1 / 3
    assert adaptive._factor(0.9) == max(1 / 3, 1 - 0.8**3)
    assert adaptive._factor(-1.0) == 2.0


def test_an_unknown_rule_is_refused():
    model = torch.nn.Linear(1, 1)
    optimizer = CGNOptimizer(model.parameters(), GGN([model.parameters()]))
    with pytest.raises(ValueError, match="'martens' or 'nielsen', but is 'newton'"):
        LevenbergMarquardt(optimizer, rule="newton")
