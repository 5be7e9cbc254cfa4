"""How the cost of a product, and of a solve, grows with the batch and with the model."""

from __future__ import annotations

import os
import statistics
from functools import partial
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from measuring import DEVICE, MB, Row, in_turns, linear_fit, peak_memory, seconds, summary
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from workloads import BATCH_SIZE, SOLVER, Problem, mnist

from cgn_tutorial import cg
from cgn_tutorial.pages import make_model
from cgn_tutorial.pages.plotting import COLORS

DENSE_SECONDS = 30  # a dense solve that would take longer is left out


def perceptron(width: int) -> nn.Sequential:
    """A fully connected network of two hidden layers."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, width),
        nn.Sigmoid(),
        nn.Linear(width, width),
        nn.Sigmoid(),
        nn.Linear(width, 10),
    ).to(DEVICE)


class System(Problem):
    """The Newton system of a whole network on one batch, solved matrix-free or dense."""

    def __init__(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
        super().__init__(model, inputs, targets)
        self.n = sum(p.numel() for p in self.parameters)
        self.v = torch.randn(self.n, device=DEVICE)

    def once(self) -> Tensor:
        """From the inputs to one product with a vector."""
        (product,) = self.products()
        return product(self.v[None])

    def solve(self) -> Tensor:
        """From the inputs to the Newton step, by as many products as the main page allows."""
        (product,) = self.products()
        g = torch.cat([p.grad.reshape(-1) for p in self.parameters if p.grad is not None])
        options = {"maxiter": SOLVER["maxiter"], "tol": 0.0, "atol": 0.0}
        return cg(lambda v: product(v[None])[0] + SOLVER["damping"] * v, -g, **options).x

    def dense_solve(self) -> Tensor:
        """From the inputs to the Newton step, by the matrix Jᵀ H J + λI and its Cholesky factor."""
        g = torch.autograd.grad(
            cross_entropy(self.model(self.inputs), self.targets), self.parameters
        )
        z = self.model(self.inputs)
        pick = torch.eye(z.numel(), device=DEVICE).view(-1, *z.shape)
        rows = torch.autograd.grad(z, self.parameters, pick, is_grads_batched=True)
        J = torch.cat([row.flatten(1) for row in rows], dim=1)
        # The loss Hessian of a sample is S Sᵀ / N with S = (I − q 1ᵀ) diag(√q), q its softmax.
        q = z.detach().softmax(1)
        root = (torch.eye(10, device=DEVICE) - q[:, :, None]) * q.sqrt()[:, None, :]
        J = (root.mT @ J.view(*z.shape, -1)).flatten(0, 1) / len(z) ** 0.5
        G = J.T @ J
        del rows
        G.diagonal().add_(SOLVER["damping"])
        b = -torch.cat([g_i.reshape(-1) for g_i in g])[:, None]
        return torch.cholesky_solve(b, torch.linalg.cholesky(G))[:, 0]


def check_dense_solve() -> None:
    """The dense solve and an exact matrix-free one agree."""
    torch.manual_seed(0)
    problem = System(perceptron(2).double(), *(t for t in mnist(16)))
    problem.inputs = problem.inputs.double()
    (product,) = problem.products()
    g = torch.cat([p.grad.reshape(-1) for p in problem.parameters if p.grad is not None])
    v = problem.dense_solve()
    residual = product(v[None])[0] + SOLVER["damping"] * v + g
    if residual.norm() > 1e-6 * g.norm():
        raise AssertionError(f"The dense solve leaves a residual of {residual.norm():.1e}.")


def bench_growth(quick: bool) -> tuple[list[Row], list[Row], Figure]:
    """Seconds and bytes of a product over the batch size and over the number of parameters."""
    check_dense_solve()
    rounds = 3 if quick else 11
    torch.manual_seed(0)
    sizes = (16, 32) if quick else (16, 32, 64, 128, 256, 512, 1024)
    widths = (3, 6) if quick else (6, 9, 12, 26, 100, 300, 800, 1880)
    by_batch = {n: System(make_model().to(DEVICE), *mnist(n)) for n in sizes}
    perceptrons = [System(perceptron(width), *mnist(BATCH_SIZE)) for width in widths]
    by_width = {problem.n: problem for problem in perceptrons}

    tables: list[list[Row]] = []
    lines: list[Any] = []
    for problems, name in ((by_batch, "batch size"), (by_width, "parameters")):
        products = {x: problem.products()[0] for x, problem in problems.items()}
        durations = in_turns(
            {x: partial(products[x], problem.v[None]) for x, problem in problems.items()},
            rounds,
            warm=True,
        )
        del products
        memory = [peak_memory(problem.once) / MB for problem in problems.values()]
        medians = [1e3 * statistics.median(values) for values in durations.values()]
        time_fit, memory_fit = linear_fit(problems, medians), linear_fit(problems, memory)
        lines.append((list(problems), medians, memory, time_fit, memory_fit))
        table: list[Row] = [
            {
                name: f"{x:,}",
                "milliseconds per product": summary([1e3 * s for s in durations[x]]),
                "fit, ms": f"{time_fit[0] + time_fit[1] * x:.2f}",
                "peak memory, MB": f"{bytes_:.2f}",
                "fit, MB": f"{memory_fit[0] + memory_fit[1] * x:.2f}",
            }
            for x, bytes_ in zip(problems, memory, strict=True)
        ]
        deviations = {"fit, ms": f"{time_fit[2]:.0%}", "fit, MB": f"{memory_fit[2]:.0%}"}
        tables.append([*table, {name: "largest deviation"} | deviations])

    solves = bench_solves(by_width, tables[1])
    return tables[0], tables[1], draw_growth(lines, solves)


def bench_solves(problems: dict[int, System], table: list[Row]) -> dict[str, dict[int, float]]:
    """Add to the table, and return, what whole solves cost, matrix-free and dense."""
    solves: dict[str, dict[int, float]] = {"CG": {}, "dense": {}, "dense memory": {}}
    durations = in_turns({n: problem.solve for n, problem in problems.items()}, 3)
    expected = 0.0
    for row, (n, problem) in zip(table, problems.items(), strict=False):
        solves["CG"][n] = 1e3 * statistics.median(durations[n])
        row["solve by CG, ms"] = f"{solves['CG'][n]:,.0f}"
        row["dense matrix, MB"] = f"{4 * n**2 / MB:,.0f}"
        if solves["dense"]:
            before = max(solves["dense"])
            expected = solves["dense"][before] / 1e3 * (n / before) ** 3
        if expected > DENSE_SECONDS or 12 * n**2 > available_memory():
            continue
        dense: list[float] = []
        peak = peak_memory(lambda: dense.append(seconds(problem.dense_solve)))  # noqa: B023
        solves["dense"][n], solves["dense memory"][n] = 1e3 * dense[0], peak / MB
        row["dense solve, ms"] = f"{solves['dense'][n]:,.0f}"
        row["dense solve, MB"] = f"{solves['dense memory'][n]:,.0f}"
    return solves


def available_memory() -> float:
    """Bytes that the device can hold."""
    if DEVICE.type == "cuda":
        return float(torch.cuda.mem_get_info()[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def draw_growth(lines: list[Any], solves: dict[str, dict[int, float]]) -> Figure:
    """Cost over batch size in the upper row, over the number of parameters in the lower."""
    figure, axes = plt.subplots(2, 2, figsize=(5, 5.6), layout="constrained")
    for row, xlabel, (x, times, memory, time_fit, memory_fit) in zip(
        axes, ("batch size", "parameters"), lines, strict=True
    ):
        for ax, y, (a, b, _), ylabel in (
            (row[0], times, time_fit, "milliseconds"),
            (row[1], memory, memory_fit, "peak memory in MB"),
        ):
            grid = np.geomspace(min(x), max(x))
            ax.loglog(x, y, "o", color=COLORS["blue"], label="one product")
            ax.loglog(grid, a + b * grid, "--", color="black", linewidth=1, label="linear fit")
            ax.set(xlabel=xlabel, ylabel=ylabel)
            ax.minorticks_off()
    for ax in axes[0]:
        ax.set_xticks(lines[0][0][::2], [str(size) for size in lines[0][0][::2]])
        ax.set_yticks([10, 100], ["10", "100"])
    for ax, series in zip(
        axes[1],
        (
            (("CG", "^:", "green", "solve by CG"), ("dense", "s-", "red", "dense solve")),
            (("dense memory", "s-", "red", "dense solve"),),
        ),
        strict=True,
    ):
        for name, style, color, label in series:
            points = solves[name]
            ax.loglog(list(points), list(points.values()), style, color=COLORS[color], label=label)
    shown = axes[1, 0].get_legend_handles_labels()
    figure.legend(*shown, loc="outside lower center", ncols=2, frameon=False)
    return figure
