"""Least squares to many digits: differential equations, a network for them, and a race.

A contender of the race is one function in `CONTENDERS`. Write such a function to add a rival.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from importlib import resources
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import least_squares, line_search, minimize
from torch import Tensor, nn

from cgn_tutorial import GGN, CGNOptimizer, JacobianGGN, LevenbergMarquardt, Nystrom, cholesky

__all__ = [
    "CONTENDERS",
    "PROBLEMS",
    "Measurement",
    "Network",
    "Problem",
    "Race",
    "Setting",
    "fit",
    "heat",
    "load_published",
    "load_races",
    "poisson",
]

DTYPE = torch.float64


class Network(nn.Module):
    """A tanh network that also computes its derivatives by the input.

    Args:
        widths: The widths of the layers, from the input to the output.
    """

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers: Any = nn.ModuleList(nn.Linear(*w, dtype=DTYPE) for w in pairwise(widths))

    def forward(self, x: Tensor, weights: Sequence[float] = ()) -> Any:
        """The output u(x), or u, its gradient and Σ w_i ∂²u/∂x_i².

        All three move from layer to layer together, by the chain rule: a linear layer multiplies
        each by its matrix, and for a = tanh(z)

            ∂_i a = a′ ∂_i z,        Σ w_i ∂_i² a = a′ Σ w_i ∂_i² z + a″ Σ w_i (∂_i z)².

        Args:
            x: Points, `[…, d]`.
            weights: The d weights w_i; none for u alone.

        Returns:
            u, `[…]`; or a tuple of u, `[…]`, the gradient, `[…, d]`, and the sum, `[…]`.
        """
        *hidden, last = self.layers
        if not weights:
            for layer in hidden:
                x = torch.tanh(layer(x))
            return last(x).squeeze(-1)
        d = x.shape[-1]
        w = x.new_tensor(weights)[:, None]
        one = torch.eye(d, dtype=x.dtype, device=x.device).expand(*x.shape[:-1], d, d)
        rows = torch.cat([x[..., None, :], one, torch.zeros_like(x)[..., None, :]], dim=-2)
        for layer in hidden:
            rows = rows @ layer.weight.T
            z, first, second = rows[..., 0, :], rows[..., 1:-1, :], rows[..., -1, :]
            a = torch.tanh(z + layer.bias)
            slope = 1 - a * a
            second = slope * second - 2 * a * slope * (w * first * first).sum(-2)
            parts = a[..., None, :], slope[..., None, :] * first, second[..., None, :]
            rows = torch.cat(parts, dim=-2)
        rows = (rows @ last.weight.T).squeeze(-1)
        return rows[..., 0] + last.bias[0], rows[..., 1:-1], rows[..., -1]


Term = tuple[Any, ...]


@dataclass(frozen=True)
class Problem:
    """A problem of nonlinear least squares with a known solution.

    Attributes:
        terms: The terms of the loss, as `JacobianGGN.backward` takes them.
        solution: The solution u at points `[N, d]`.
        points: Points to measure the error at, `[N, d]`.
    """

    terms: tuple[Term, ...]
    solution: Callable[[Tensor], Tensor]
    points: Tensor

    def loss(self, model: nn.Module) -> Tensor:
        """½ Σ_t mean of r_t², all samples at once: what a first-order method differentiates."""
        return torch.stack([r(model, *x).square().mean() / 2 for r, *x in self.terms]).sum()

    def residuals(self, model: nn.Module) -> Tensor:
        """All residuals, those of term t over √N_t, so that the loss is ½‖r‖²."""
        return torch.cat([r(model, *x) / len(x[0]) ** 0.5 for r, *x in self.terms])

    def errors(self, model: nn.Module) -> tuple[float, float]:
        """The errors of the network relative to the solution, in the norms of L² and H¹.

        ‖u‖² is the mean of u² in L², and the mean of u² + |∇u|² in H¹.
        """
        x = self.points.clone().requires_grad_()
        u = self.solution(x)
        (du,) = torch.autograd.grad(u.sum(), x)
        with torch.no_grad():
            v, dv, _ = model(self.points, (1.0,) * x.shape[1])
            value, slope = (v - u).square().mean(), (dv - du).square().sum(1).mean()
            size, steepness = u.square().mean(), du.square().sum(1).mean()
            l2 = (value / size).sqrt().item()
            return l2, ((value + slope) / (size + steepness)).sqrt().item()


def poisson(d: int = 2, interior: int = 900, boundary: int = 120) -> Problem:
    """Poisson's equation on the unit cube in d dimensions, with u given on the boundary.

    In two dimensions, −Δu = 2π² sin πx sin πy and u = sin πx sin πy; else −Δu = π² Σ cos πx_i and
    u = Σ cos πx_i.
    """
    random = torch.Generator().manual_seed(0)

    def solution(x: Tensor) -> Tensor:
        return torch.sin(math.pi * x).prod(1) if d == 2 else torch.cos(math.pi * x).sum(1)

    x = torch.rand(interior, d, generator=random, dtype=DTYPE)
    f = (2 if d == 2 else 1) * math.pi**2 * solution(x)
    faces = torch.rand(boundary, d, generator=random, dtype=DTYPE)
    sides = torch.arange(boundary) % (2 * d)
    faces[torch.arange(boundary), sides // 2] = (sides % 2).to(DTYPE)
    points = torch.rand(4000, d, generator=random, dtype=DTYPE)

    def inside(model: Callable[..., Any], x: Tensor, f: Tensor) -> Tensor:
        laplacian: Tensor = model(x, (1.0,) * d)[2]
        return laplacian + f

    return Problem(((inside, x, f), (_value, faces, solution(faces))), solution, points)


def heat(interior: int = 900, boundary: int = 120) -> Problem:
    """The heat equation u_t = ¼ u_xx for (t, x) in the unit square, u = exp(−π²t/4) sin πx.

    The network gets u for t = 0, x = 0 and x = 1.
    """
    random = torch.Generator().manual_seed(0)

    def solution(x: Tensor) -> Tensor:
        return torch.exp(-(math.pi**2) / 4 * x[:, 0]) * torch.sin(math.pi * x[:, 1])

    x = torch.rand(interior, 2, generator=random, dtype=DTYPE)
    edge = torch.rand(boundary, 2, generator=random, dtype=DTYPE)
    sides = torch.arange(boundary) % 3
    edge[sides == 0, 0] = 0.0
    edge[sides == 1, 1] = 0.0
    edge[sides == 2, 1] = 1.0
    points = torch.rand(4000, 2, generator=random, dtype=DTYPE)

    def inside(model: Callable[..., Any], x: Tensor) -> Tensor:
        _, gradient, second = model(x, (0.0, 0.25))
        result: Tensor = gradient[..., 0] - second
        return result

    return Problem(((inside, x), (_value, edge, solution(edge))), solution, points)


def fit(samples: int = 400, noise: float = 0.0) -> Problem:
    """The fit of sin(10x) / (10x) on [−1, 1], from samples with noise of this deviation."""
    random = torch.Generator().manual_seed(0)

    def solution(x: Tensor) -> Tensor:
        return torch.sinc(10 / math.pi * x[:, 0])

    x = torch.linspace(-1, 1, samples, dtype=DTYPE)[:, None]
    y = solution(x) + noise * torch.randn(samples, generator=random, dtype=DTYPE)
    points = 2 * torch.rand(4000, 1, generator=random, dtype=DTYPE) - 1
    return Problem(((_value, x, y),), solution, points)


def _value(model: Callable[..., Any], x: Tensor, u: Tensor) -> Tensor:
    """The residual u(x) − u."""
    result: Tensor = model(x) - u
    return result


#: The problems, with the widths of a network for each.
PROBLEMS: Mapping[str, tuple[Callable[[], Problem], tuple[int, ...]]] = {
    "fit, 301": (fit, (1, 100, 1)),
    "Poisson, 257": (poisson, (2, 64, 1)),
    "Poisson, 1,185": (poisson, (2, 32, 32, 1)),
    "Poisson, 9,873": (poisson, (2, 64, 64, 48, 48, 1)),
    "heat, 1,185": (heat, (2, 32, 32, 1)),
    "heat, 9,873": (heat, (2, 64, 64, 48, 48, 1)),
    "Poisson in 5-D, 449": (partial(poisson, 5, 1000, 500), (5, 64, 1)),
}


def load_published() -> dict[str, Any]:
    """The errors of a published comparison after 60 and 1,000 seconds on a GPU.

    Returns:
        For `"poisson_2d"` and `"heat_1d"`: the `"equation"`, the `"parameters"`, and the root mean
        square error of each method, `"at_60_s"` and `"at_1000_s"`. For the relative error in L²,
        multiply by 2 for Poisson's equation.

    Source:
        Run logs of Dangel, Müller and Zeinhofer, "Kronecker-Factored Approximate Curvature for
        Physics-Informed Neural Networks" (2024).
    """
    file = resources.files("cgn_tutorial.pages") / "published_pinn.json"
    published: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return published


def load_races() -> dict[str, Any]:
    """What the full races found, as the site's page "Least squares in full" has it.

    Returns:
        For each problem, the processor `"seconds"` of a run, and the `"errors"`: the median error
        in L² of each contender at the end.
    """
    file = resources.files("cgn_tutorial.pages") / "least_squares.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


class Measurement(NamedTuple):
    """A measurement during a run.

    Attributes:
        seconds: Processor seconds of training so far.
        steps: Steps so far; for L-BFGS, evaluations of the gradient.
        l2: The relative error in L².
        h1: The relative error in H¹.
    """

    seconds: float
    steps: int
    l2: float
    h1: float


@dataclass(frozen=True)
class Setting:
    """A contender of the race.

    Attributes:
        method: A key of `CONTENDERS`.
        options: The options of the method.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)


class Over(Exception):  # noqa: N818
    """The time of a run is over."""


class Race:
    """The training of a network by one contender, for some seconds of processor time.

    Contenders call `tick()` after each step. Measurements of the error do not count as time.

    Args:
        problem: A key of `PROBLEMS`.
        setting: The contender.
        seed: The seed of the network's weights.
        seconds: The processor seconds to train for.
        first: The time of the first measurement; each next follows when the time has grown by a
            sixth.

    Attributes:
        problem: The problem.
        model: The network.
        seconds: As given.
        measurements: The measurements so far.
    """

    def __init__(
        self, problem: str, setting: Setting, seed: int, seconds: float, first: float = 0.2
    ) -> None:
        make, widths = PROBLEMS[problem]
        self.problem = make()
        torch.manual_seed(seed)
        self.model = Network(*widths)
        self.seconds = seconds
        self.measurements: list[Measurement] = []
        self._setting = setting
        self._next = first
        self._steps = 0
        self._unmeasured = 0.0

    def run(self) -> list[Measurement]:
        """Train until the time is over or the contender ends, and measure a last time.

        Torch has one thread meanwhile: the clock adds up the time of all threads.
        """
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        self._begin = time.process_time()
        try:
            with suppress(Over):
                CONTENDERS[self._setting.method](self, **self._setting.options)
        finally:
            torch.set_num_threads(threads)
        if not self.measurements or self.measurements[-1].steps < self._steps:
            self._measure()
        return self.measurements

    @property
    def elapsed(self) -> float:
        """The processor seconds of training so far."""
        return time.process_time() - self._begin - self._unmeasured

    def tick(self, steps: int = 1) -> None:
        """Count steps, measure if it is time, and end the run if the time is over.

        Args:
            steps: How many steps to count.
        """
        self._steps += steps
        elapsed = self.elapsed
        if elapsed >= min(self._next, self.seconds):
            self._measure()
            self._next = max(self._next, elapsed) * 7 / 6
        if elapsed >= self.seconds:
            raise Over

    def _measure(self) -> None:
        elapsed = self.elapsed
        begin = time.process_time()
        errors = self.problem.errors(self.model)
        self.measurements.append(Measurement(elapsed, self._steps, *errors))
        self._unmeasured += time.process_time() - begin


def _first_order(
    race: Race,
    optimizer: Callable[..., torch.optim.Optimizer],
    lr: float,
    decay: str = "cosine",
    until: float = 1.0,
    **options: Any,
) -> None:
    """Steps of an optimizer of torch; the rate falls to zero as the share `until` of time runs out.

    `decay` is "none", "linear" or "cosine".
    """
    steps = optimizer(race.model.parameters(), lr=lr, **options)
    while (t := race.elapsed / (until * race.seconds)) < 1:
        left = {"none": 1.0, "linear": 1 - t, "cosine": (1 + math.cos(math.pi * t)) / 2}[decay]
        steps.param_groups[0]["lr"] = lr * left
        steps.zero_grad()
        race.problem.loss(race.model).backward()
        steps.step()
        race.tick()


def _lbfgs(race: Race, scale: float = 1.0, history: int = 100, tolerance: float = 0.0) -> None:
    """Torch's L-BFGS on the loss times `scale`, with its line search."""
    optimizer = torch.optim.LBFGS(
        race.model.parameters(),
        history_size=history,
        tolerance_grad=tolerance,
        tolerance_change=tolerance,
        line_search_fn="strong_wolfe",
    )
    evaluations = 0

    def closure() -> float:
        nonlocal evaluations
        evaluations += 1
        optimizer.zero_grad()
        loss = scale * race.problem.loss(race.model)
        loss.backward()
        return loss.item()

    while True:
        evaluations = 0
        optimizer.step(closure)
        race.tick(evaluations)


def _adam_lbfgs(race: Race, lr: float, share: float, scale: float, history: int) -> None:
    """Adam for a share of the time, then L-BFGS."""
    _first_order(race, torch.optim.Adam, lr, "cosine", until=share)
    _lbfgs(race, scale, history)


def _evaluator(race: Race, scale: float = 1.0) -> Callable[[Any], tuple[float, Any]]:
    """The loss times `scale`, and its gradient, as a function of a vector x of all parameters."""

    def evaluate(x: Any) -> tuple[float, Any]:
        _assign(race.model, x)
        race.model.zero_grad()
        loss = scale * race.problem.loss(race.model)
        loss.backward()
        gradients = [p.grad.reshape(-1) for p in race.model.parameters() if p.grad is not None]
        return loss.item(), torch.cat(gradients).numpy()

    return evaluate


def _bfgs(race: Race, scale: float = 1.0) -> None:
    """SciPy's BFGS, with a dense approximation of the inverse Hessian, on the loss times `scale`.

    If rounding spoils the line search, BFGS stops; then a new run begins from there.
    """

    def tick(x: Any) -> None:
        _assign(race.model, x)
        race.tick()

    options = {"gtol": 0.0, "maxiter": 10**9}
    evaluate = _evaluator(race, scale)
    while True:
        start = _numbers(race.model)
        result = minimize(evaluate, start, method="BFGS", jac=True, callback=tick, options=options)
        tick(result.x)


def _ssbroyden(race: Race, wolfe: float = 0.9, share: float = 0.0) -> None:
    """Self-scaled Broyden steps, with a dense approximation H of the inverse Hessian.

    With the step s = αd along d = −Hg, the change y of the gradient g, and v = s/yᵀs − Hy/yᵀHy,

        H ← (H − Hyyᵀ H/yᵀHy + φ yᵀHy vvᵀ) / τ + ssᵀ/yᵀs,

    which takes n² operations. BFGS has φ = τ = 1. `wolfe` is the part of the slope that a line
    search may leave. Adam trains for a `share` of the time before.

    Source:
        Al-Baali, "Numerical experience with a class of self-scaling quasi-Newton algorithms"
        (1998), for φ and τ; Urbán, Stefanou and Pons, "Unveiling the optimization process of
        physics informed neural networks" (2025), for networks that solve differential equations.
    """
    if share:
        _first_order(race, torch.optim.Adam, 1e-2, "cosine", until=share)
    at = lru_cache(maxsize=4)(lambda key: _evaluator(race)(np.frombuffer(key)))

    def loss(x: Any) -> float:
        return at(x.tobytes())[0]

    def slope(x: Any) -> Any:
        return at(x.tobytes())[1]

    x = _numbers(race.model).copy()
    n, before = len(x), None
    H = torch.zeros(0)
    while True:
        g = slope(x)
        if fresh := not len(H):
            H = torch.eye(n, dtype=DTYPE) / float(np.linalg.norm(g))
        d = -(H @ torch.from_numpy(g)).numpy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of a search that fails
            alpha = line_search(loss, slope, x, d, g, loss(x), before, c2=wolfe, maxiter=25)[0]
        if alpha is None:  # rounding spoils the search: begin again
            _assign(race.model, x)
            race.tick()
            if fresh:
                return
            H = torch.zeros(0)
            continue
        before, s = loss(x), alpha * d
        x = x + s
        y = slope(x) - g
        b = -alpha * float(s @ g) / float(s @ y)  # sᵀBs / sᵀy, for B, the inverse of H
        if fresh:
            H = torch.eye(n, dtype=DTYPE) * float(s @ y) / float(y @ y)
            b = float(s @ s) * float(y @ y) / float(s @ y) ** 2
        _update(H, torch.from_numpy(s), torch.from_numpy(y), b)
        _assign(race.model, x)
        race.tick()


def _update(H: Tensor, s: Tensor, y: Tensor, b: float) -> None:
    """Al-Baali's φ and τ, and the update of H; see `_ssbroyden`."""
    Hy, sy = H @ y, float(s @ y)
    yHy = float(y @ Hy)
    h = yHy / sy
    a = max(h * b - 1, 1e-14)
    low = min(1.0, h * (1 - math.sqrt(a / (1 + a))))
    theta = max((low - 1) / a, min(1 / low, (1 - b) / b))
    sigma, rho = 1 + a * theta, min(1.0, 1 / b)
    power = sigma ** (-1 / (len(s) - 1))
    tau = rho * min(power, 1 / theta) if theta > 0 else min(rho * power, sigma)
    phi = (1 - theta) / sigma
    v = s / sy - Hy / yHy
    left = torch.stack([-Hy / yHy, phi * yHy * v, tau * s / sy])
    H.addmm_(torch.stack([Hy, v, s]).T, left).div_(tau)


def _least_squares(race: Race, solver: str = "exact", x_scale: float | str = 1.0) -> None:
    """SciPy's `least_squares`, from all residuals and their stored Jacobian.

    The solver "lm" is MINPACK's method of Levenberg and Marquardt, which takes no fewer residuals
    than parameters. "exact" and "lsmr" are those of the method of trust regions. If rounding ends a
    run, a new run begins from there.
    """
    model, terms = race.model, race.problem.terms
    curvature = JacobianGGN(model, [model.parameters()])

    @torch.no_grad()
    def residuals(x: Any) -> Any:
        _assign(model, x)
        return race.problem.residuals(model).numpy()

    def jacobian(x: Any) -> Any:
        _assign(model, x)
        race.tick()
        model.zero_grad()
        curvature.backward(*terms)
        return getattr(next(model.parameters()), curvature.savefield).root.numpy()

    x, most = _numbers(model).copy(), {"max_nfev": 10**6, "x_scale": x_scale}
    if solver == "lm" and len(residuals(x)) < len(x):
        return
    method = {"method": "lm"} if solver == "lm" else {"method": "trf", "tr_solver": solver}
    while True:
        options = dict.fromkeys(("ftol", "xtol", "gtol"), 1e-15) | most | method
        x = least_squares(residuals, x, jacobian, **options).x
        _assign(model, x)
        race.tick()


def _assign(model: nn.Module, x: Any) -> None:
    """Set the parameters to the numbers x."""
    nn.utils.vector_to_parameters(torch.from_numpy(x.copy()), model.parameters())


def _numbers(model: nn.Module) -> Any:
    """The numbers of all parameters."""
    return nn.utils.parameters_to_vector(model.parameters()).detach().numpy()


def _newton(
    race: Race,
    damping: float = 1e-3,
    preconditioner: Callable[..., Any] | None = None,
    *,
    graph: bool = False,
    **options: Any,
) -> None:
    """Damped Gauss–Newton steps for the whole network as one block, with Nielsen's damping.

    `graph` takes products through the graph of the loss in place of a stored Jacobian.
    """
    model, terms = race.model, race.problem.terms
    blocks = [model.parameters()]
    stored, recorded = JacobianGGN(model, blocks), GGN([model.parameters()])
    optimizer = CGNOptimizer(
        model.parameters(),
        recorded if graph else stored,
        lr=1.0,
        damping=damping,
        atol=0.0,
        preconditioner=preconditioner,
        **{"tol": 1e-2, **options},
    )
    adaptive = LevenbergMarquardt(optimizer, minimum=1e-14, rule="nielsen")
    while True:
        optimizer.zero_grad()
        if graph:
            outputs = race.problem.residuals(model)
            loss = outputs.square().sum() / 2
            recorded.backward(loss, outputs)
        else:
            loss = stored.backward(*terms)
        adaptive.step(loss, lambda: stored.loss(*terms))
        race.tick()


def _nystrom(race: Race, rank: int = 50, every: int = 1, **options: Any) -> None:
    """Newton steps by CG with a preconditioner."""
    _newton(race, preconditioner=Nystrom(rank, every), **options)


#: Each contender trains `race.model` with some options, and calls `race.tick()` after each step.
CONTENDERS: dict[str, Callable[..., None]] = {
    "Momentum": partial(_first_order, optimizer=partial(torch.optim.SGD, nesterov=True)),
    "Adam": partial(_first_order, optimizer=torch.optim.Adam),
    "L-BFGS": _lbfgs,
    "L-BFGS, scaled loss": _lbfgs,
    "Adam, then L-BFGS": _adam_lbfgs,
    "BFGS (SciPy)": _bfgs,
    "least_squares (SciPy)": _least_squares,
    "SSBroyden": _ssbroyden,
    "CGN, products through the graph": partial(_newton, graph=True),
    "CGN, stored J": _newton,
    "CGN, Nyström": _nystrom,
    "CGN, exact": partial(_newton, preconditioner=cholesky),
}
