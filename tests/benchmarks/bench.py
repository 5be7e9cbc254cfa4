"""What the curvature products and the optimizer cost: `nox -s bench`, or run this file.

Writes tables (CSV) and figures (SVG, for both themes) for docs/benchmarks.rst. Everything that is
compared takes turns, so that whatever else the machine does slows all of it alike.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, TypeVar

# Torch's profiler would tell of every start, and of tensors that it did not see come.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import numpy as np
import torch
from backpack import backpack, extend
from backpack.extensions import GGNMP, DiagGGNExact
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from textbook import TextbookOptimizer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile
from torchvision.models import resnet18

from cgn_tutorial import (
    CGNOptimizer,
    CGResult,
    cg,
    default_device,
    load_mnist,
    load_published_run,
    make_model,
    mnist_loader,
)
from cgn_tutorial.curvature import GGN, layers
from cgn_tutorial.plotting import COLORS

ROOT = Path(__file__).parents[2]
CONFIG = load_published_run()["config"]
SOLVER = {
    "lr": CONFIG["lr"],
    "damping": CONFIG["damping"],
    "maxiter": CONFIG["cg_maxiter"],
    "tol": CONFIG["cg_tol"],
    "atol": CONFIG["cg_atol"],
}
BATCH_SIZE: int = CONFIG["batch_size"]
STEPS = 51  # iterations 0 to 50
DENSE_SECONDS = 30  # a dense solve that would take longer is left out
DEVICE = default_device()
MB = 1e6

Row = dict[str, object]
K = TypeVar("K")


# ---- measuring ----


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    if DEVICE.type != "cpu":
        torch.accelerator.synchronize()
    start = time.perf_counter()
    result = work()
    if DEVICE.type != "cpu":
        torch.accelerator.synchronize()
    duration = time.perf_counter() - start
    del result
    return duration


def in_turns(
    works: Mapping[K, Callable[[], object]], rounds: int, *, warm: bool = False
) -> dict[K, list[float]]:
    """Seconds of each work in each round, after one call of each to warm up.

    With `warm`, another call right before each that counts finds the caches as others left them.
    """
    for work in works.values():
        work()
    durations: dict[K, list[float]] = {label: [] for label in works}
    for _ in range(rounds):
        for label, work in works.items():
            if warm:
                work()
            durations[label].append(seconds(work))
    return durations


def peak_memory(work: Callable[[], object]) -> int:
    """The most bytes that tensors occupy while `work` runs, on top of those that were there."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    # Torch's allocator reports each tensor that comes and goes; the process's size would also count
    # what the system has not been given back yet.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = work()
    del kept
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    events = [event for event in events if event["name"] == "[memory]"]
    events.sort(key=lambda event: float(event["ts"]))
    return int(max(accumulate(event["args"]["Bytes"] for event in events)))


def summary(values: Sequence[float], digits: int = 2) -> str:
    """The median, and the range."""
    low, high = min(values), max(values)
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def linear_fit(x: Collection[float], y: Sequence[float]) -> tuple[float, float, float]:
    """The line a + b x with the least relative errors, both positive, and the largest of them."""
    X = np.column_stack([np.ones(len(x)), list(x)]) / np.array(y)[:, None]
    (a, b), *_ = np.linalg.lstsq(X, np.ones(len(y)))
    if a < 0:
        a, b = 0.0, X[:, 1].sum() / (X[:, 1] ** 2).sum()
    return float(a), float(b), float(np.abs(X @ np.array([a, b]) - 1).max())


def mnist(count: int, train: bool = True) -> tuple[Tensor, Tensor]:
    """The first images and labels."""
    images, labels = load_mnist(train)[:count]
    return images.to(DEVICE), labels.to(DEVICE)


# ---- the main page's run, step by step ----


class Run:
    """A training run from its seed, one step at a time."""

    def __init__(
        self,
        products: str = "layer",
        optimizer_type: type[torch.optim.Optimizer] = CGNOptimizer,
        seed: int = CONFIG["seed"],
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> None:
        torch.manual_seed(seed)
        self.model = make_model().to(DEVICE, dtype)
        self.loss_function: nn.Module = nn.CrossEntropyLoss()
        extension: Any
        if products == "BackPACK":
            extend(self.model)
            extend(self.loss_function)
            extension = GGNMP()
        else:
            parameters = list(self.model.parameters())
            blocks: dict[str, Any] = {
                "parameter": parameters,
                "layer": layers(self.model),
                "network": [parameters],
            }
            extension = GGN(blocks[products])
        self.extension = extension
        self.optimizer = optimizer_type(self.model.parameters(), extension, **SOLVER | options)
        self.batches = [
            (x.to(DEVICE, dtype), y.to(DEVICE)) for x, y in islice(mnist_loader(BATCH_SIZE), STEPS)
        ]
        self.losses: list[float] = []
        self.products: list[int] = []
        self.seconds: list[float] = []

    def backward(self, loss: Tensor, outputs: Tensor) -> None:
        """Leave gradients and products."""
        if isinstance(self.extension, GGNMP):
            with backpack(self.extension):
                loss.backward()
        else:
            self.extension.backward(loss, outputs)

    def _step(self) -> Tensor:
        inputs, targets = self.batches[len(self.losses)]
        self.optimizer.zero_grad()
        outputs = self.model(inputs)
        loss: Tensor = self.loss_function(outputs, targets)
        self.backward(loss, outputs)
        self.optimizer.step()
        return loss

    def step(self) -> None:
        """Take the next step and keep its time."""
        loss: list[Tensor] = []
        self.seconds.append(seconds(lambda: loss.append(self._step())))
        self.losses.append(loss[0].item())
        self.products.append(sum(s.products for s in getattr(self.optimizer, "solves", [])))

    @property
    def printed(self) -> list[str]:
        """The losses as the main page prints them."""
        return [f"{loss:.5f}" for loss in self.losses]

    def test_loss(self) -> float:
        """The loss over the test images."""
        inputs, targets = mnist(10_000, train=False)
        with torch.no_grad():
            return cross_entropy(self.model(inputs), targets).item()


CONTESTANTS: dict[str, Callable[..., Run]] = {
    "textbook optimizer, BackPACK's products": lambda **options: Run(
        "BackPACK", TextbookOptimizer, **options
    ),
    "CGNOptimizer, BackPACK's products": lambda **options: Run("BackPACK", **options),
    "CGNOptimizer, GGN per parameter": lambda **options: Run("parameter", **options),
    "CGNOptimizer, GGN per layer": lambda **options: Run("layer", **options),
    "CGNOptimizer, GGN per layer, tol 0.07": lambda **options: Run("layer", tol=0.07, **options),
}


def train_in_turns(labels: Sequence[str], steps: int, **options: Any) -> list[Run]:
    """Runs of these contestants; each step is taken by all of them before the next one."""
    runs = [CONTESTANTS[label](**options) for label in labels]
    for i in range(steps):
        for run in runs[i % len(runs) :] + runs[: i % len(runs)]:
            run.step()
    return runs


def bench_steps(quick: bool) -> tuple[list[Row], Figure]:
    """Seconds per step of the main page's GGN run."""
    rounds, steps = (2, 11) if quick else (5, STEPS)
    labels = list(CONTESTANTS)
    train_in_turns(labels, 1)
    milliseconds: dict[str, list[float]] = {label: [] for label in labels}
    ratios: dict[str, list[float]] = {label: [] for label in labels}
    for _ in range(rounds):
        runs = train_in_turns(labels, steps)
        for label, run in zip(labels, runs, strict=True):
            milliseconds[label].append(1e3 * statistics.fmean(run.seconds))
            ratios[label].append(sum(runs[0].seconds) / sum(run.seconds))
    exact = dict(
        zip(labels[:3], train_in_turns(labels[:3], steps, dtype=torch.float64), strict=True)
    )

    def same(run: Run, reference: Run) -> str:
        agree = [a == b for a, b in zip(run.printed, reference.printed, strict=True)]
        return f"{sum(agree)} of {steps}"

    table: list[Row] = [
        {
            "run": label,
            "milliseconds per step": summary(milliseconds[label], 0),
            "times as fast": summary(ratios[label]),
            "products per step": f"{statistics.fmean(run.products):.1f}"
            if any(run.products)
            else "",
            "losses printed alike, float32": same(run, runs[0]),
            "in float64": same(exact[label], exact[labels[0]]) if label in exact else "",
            "last loss": run.printed[-1],
            "loss on the test images": f"{run.test_loss():.3f}",
        }
        for label, run in zip(labels, runs, strict=True)
    ]

    figure, (left, right) = plt.subplots(1, 2, figsize=(7, 3), sharey=True)
    for ax, values, xlabel in (
        (left, milliseconds, "milliseconds per step"),
        (right, ratios, "times as fast as the textbook"),
    ):
        for i, label in enumerate(labels):
            ax.plot([min(values[label]), max(values[label])], [i, i], color="black", linewidth=1)
            ax.plot(statistics.median(values[label]), i, "o", color=list(COLORS.values())[i])
        ax.set(xlabel=xlabel)
        ax.set_xlim(left=0)
    left.set_yticks(range(len(labels)), [label.replace(", ", ",\n", 1) for label in labels])
    left.set(ylim=(len(labels) - 0.5, -0.5))
    figure.tight_layout()
    return table, figure


# ---- how the cost grows ----


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


class Problem:
    """The GGN of a whole network on one batch, matrix-free or dense."""

    def __init__(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
        self.model, self.inputs, self.targets = model, inputs, targets
        self.parameters = list(model.parameters())
        self.n = sum(p.numel() for p in self.parameters)
        self.v = torch.randn(self.n, device=DEVICE)

    def gradient(self) -> Tensor:
        """A plain forward and backward pass."""
        self.model.zero_grad()
        loss = cross_entropy(self.model(self.inputs), self.targets)
        loss.backward()
        return loss

    def product(self, blocks: Any = None) -> list[Any]:
        """The products that one forward and one backward pass leave, whole network by default."""
        self.model.zero_grad()
        outputs = self.model(self.inputs)
        loss = cross_entropy(outputs, self.targets)
        return GGN(blocks or [self.parameters]).backward(loss, outputs)

    def once(self) -> Tensor:
        """From the inputs to one product with a vector."""
        return self.product()[0](self.v[None])

    def solve(self) -> Tensor:
        """From the inputs to the Newton step, by as many products as the main page allows."""
        (product,) = self.product()
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
    problem = Problem(perceptron(2).double(), *(t for t in mnist(16)))
    problem.inputs = problem.inputs.double()
    (product,) = problem.product()
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
    sizes = (16, 64, 256) if quick else (16, 32, 64, 128, 256, 512, 1024)
    widths = (6, 12, 100) if quick else (6, 9, 12, 26, 100, 300, 800, 1880)
    by_batch = {n: Problem(make_model().to(DEVICE), *mnist(n)) for n in sizes}
    perceptrons = [Problem(perceptron(width), *mnist(BATCH_SIZE)) for width in widths]
    by_width = {problem.n: problem for problem in perceptrons}

    tables: list[list[Row]] = []
    lines: list[Any] = []
    for problems, name in ((by_batch, "batch size"), (by_width, "parameters")):
        products = {x: problem.product()[0] for x, problem in problems.items()}
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


def bench_solves(problems: dict[int, Problem], table: list[Row]) -> dict[str, dict[int, float]]:
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
    figure, axes = plt.subplots(2, 2, figsize=(7, 6))
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
        ax.set_xticks(lines[0][0], [str(size) for size in lines[0][0]])
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
    axes[0, 0].legend(frameon=False)
    axes[1, 0].legend(frameon=False)
    figure.tight_layout()
    return figure


# ---- product by product ----


@torch.no_grad()
def untracked(product: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
    """The product as the optimizer computes it."""
    return product(v)


def bench_products(quick: bool) -> list[Row]:
    """Milliseconds of each block's product, and of forming them, beside a gradient."""
    rounds = 5 if quick else 51
    torch.manual_seed(0)
    problem = Problem(make_model().to(DEVICE), *mnist(BATCH_SIZE))
    parameters = dict(problem.model.named_parameters())
    per_parameter, per_layer = (
        problem.product(problem.parameters),
        problem.product(layers(problem.model)),
    )
    extended, loss_function = extend(deepcopy(problem.model)), extend(nn.CrossEntropyLoss())

    def extended_backward() -> Tensor:
        extended.zero_grad()
        loss: Tensor = loss_function(extended(problem.inputs), problem.targets)
        with backpack(GGNMP()):
            loss.backward()
        return loss

    extended_backward()
    gradient, set_up = "forward and backward", "the same, leaving products"
    works: dict[str, Callable[[], object]] = {
        gradient: problem.gradient,
        set_up: lambda: problem.product(layers(problem.model)),
        "BackPACK " + set_up: extended_backward,
    }
    for (name, p), product in zip(parameters.items(), per_parameter, strict=True):
        v = torch.randn(1, *p.shape, device=DEVICE)
        works[name] = partial(product, v.view(1, -1))
        works["BackPACK " + name] = partial(untracked, extended.get_parameter(name).ggnmp, v)
    names = {p: name for name, p in parameters.items()}
    for product in per_layer:
        v = torch.randn(1, sum(p.numel() for p in product.parameters), device=DEVICE)
        works[" and ".join(names[p] for p in product.parameters)] = partial(product, v)
    ours = in_turns(works, rounds)
    theirs = {label: ours.pop("BackPACK " + label, None) for label in list(ours)}
    return [
        {
            "computation": label,
            "milliseconds": summary([1e3 * s for s in values]),
            "in forward and backward passes": summary(np.divide(values, ours[gradient]).tolist()),
            "BackPACK, milliseconds": summary([1e3 * s for s in theirs[label] or ()])
            if theirs[label]
            else "",
        }
        for label, values in ours.items()
    ]


# ---- a large model ----


def bench_resnet(quick: bool) -> list[Row]:
    """One Newton step on a residual network, with a block per layer."""
    torch.manual_seed(0)
    model = resnet18(num_classes=10).to(DEVICE)
    size, maxiter = (4, 1) if quick else (8, 5)
    inputs = torch.randn(size, 3, 32, 32, device=DEVICE)
    targets = torch.randint(10, (size,), device=DEVICE)
    curvature = GGN(layers(model))
    optimizer = CGNOptimizer(model.parameters(), curvature, maxiter=maxiter)

    def gradient() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs), targets)
        loss.backward()
        return loss

    def step() -> None:
        optimizer.zero_grad()
        outputs = model(inputs)
        curvature.backward(cross_entropy(outputs, targets), outputs)
        optimizer.step()

    (gradients,) = in_turns({"": gradient}, 5).values()
    duration = seconds(step)
    products = sum(solve.products for solve in optimizer.solves)
    gradient_memory = peak_memory(gradient)
    optimizer.param_groups[0]["maxiter"] = 1  # the first iteration needs what all of them need
    return [
        {
            "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
            "blocks": len(curvature.blocks),
            "products": products,
            "seconds per step": f"{duration:.1f}",
            "milliseconds per product": f"{1e3 * duration / products:.0f}",
            "per forward and backward": f"{1e3 * statistics.median(gradients):.0f}",
            "peak memory of the step, MB": f"{peak_memory(step) / MB:.0f}",
            "of forward and backward, MB": f"{gradient_memory / MB:.0f}",
        }
    ]


# ---- what else was tried ----


class Tried(CGNOptimizer):
    """`CGNOptimizer` with starting points from the step before, or a diagonal preconditioner."""

    warm = 0.0
    diagonal = ""

    def _solve(self, block: Any) -> CGResult:
        group = block.groups[0]
        g = torch.cat([p.grad.reshape(-1) for p in block.parameters])
        before = self.state[block.parameters[0]].get("v")
        M = None
        if self.diagonal:
            D = torch.cat([getattr(p, self.diagonal).reshape(-1) for p in block.parameters])
            D = D + group["damping"]
            M = lambda v: v / D  # noqa: E731
        result = cg(
            lambda v: block.product(v[None])[0] + group["damping"] * v,
            -g,
            self.warm * before if self.warm and before is not None else None,
            M=M,
            **{name: group[name] for name in ("maxiter", "tol", "atol")},
        )
        self.state[block.parameters[0]]["v"] = result.x
        return result


class WarmStart(Tried):
    """Each solve starts from the solution of the step before."""

    warm = 1.0


class DampedWarmStart(Tried):
    """Each solve starts from half the solution of the step before."""

    warm = 0.5


class Jacobi(Tried):
    """Each solve is preconditioned by the exact diagonal of the GGN."""

    diagonal = "diag_ggn_exact"


class JacobiRun(Run):
    """A run that also computes the diagonal, by BackPACK, for free as far as products count."""

    def __init__(self, **options: Any) -> None:
        super().__init__("layer", Jacobi, **options)
        extend(self.model)
        extend(self.loss_function)

    def backward(self, loss: Tensor, outputs: Tensor) -> None:
        """Leave gradients, products and diagonals."""
        with backpack(DiagGGNExact()):
            loss.backward(retain_graph=True)
        self.optimizer.zero_grad()
        super().backward(loss, outputs)


def early(run: Run, i: int) -> None:
    """Solve loosely for the first half of the steps."""
    run.optimizer.param_groups[0]["tol"] = 0.5 if i < STEPS // 2 else SOLVER["tol"]


TRIED: dict[str, tuple[Callable[..., Run], Callable[[Run, int], None] | None]] = {
    "per layer, as above": (Run, None),
    "start from the solution before": (lambda **o: Run(optimizer_type=WarmStart, **o), None),
    "start from half of it": (lambda **o: Run(optimizer_type=DampedWarmStart, **o), None),
    "precondition by the exact diagonal": (JacobiRun, None),
    "tol 0.5 for the first 25 steps": (Run, early),
    "tol 0.05": (lambda **o: Run(tol=0.05, **o), None),
    "tol 0.3": (lambda **o: Run(tol=0.3, **o), None),
    "whole network, tol 0.1": (lambda **o: Run("network", **o), None),
    "whole network, tol 0.01, maxiter 100": (
        lambda **o: Run("network", tol=0.01, maxiter=100, **o),
        None,
    ),
}


def bench_tried(quick: bool) -> list[Row]:
    """What other ways to solve cost, and where they lead."""
    steps, seeds = (11, (0,)) if quick else (STEPS, (0, 1))
    runs = {
        label: [make_run(seed=seed) for seed in seeds] for label, (make_run, _) in TRIED.items()
    }
    for i in range(steps):
        for j in range(len(seeds)):
            for label, (_, adjust) in TRIED.items():
                run = runs[label][j]
                if adjust:
                    adjust(run, i)
                run.step()
    return [
        {
            "variant": label,
            "products per step": f"{np.mean([run.products for run in group]):.1f}",
            "milliseconds per step": f"{1e3 * np.mean([run.seconds for run in group]):.0f}",
        }
        | {
            f"loss on the test images, seed {seed}": f"{run.test_loss():.3f}"
            for seed, run in zip(seeds, group, strict=True)
        }
        for label, group in runs.items()
    ]


def bench_products_tried(quick: bool) -> list[Row]:
    """Other ways to compute a product, next to the package's."""
    rounds = 5 if quick else 31
    torch.manual_seed(0)
    inputs, targets = mnist(BATCH_SIZE)
    model = make_model().to(DEVICE)
    last = deepcopy(model).to(memory_format=torch.channels_last)
    channels_last = Problem(last, inputs.to(memory_format=torch.channels_last), targets)
    problem = Problem(model, inputs, targets)
    names = [name for name, _ in model.named_parameters()]
    works: dict[str, dict[str, Callable[[], object]]] = {}
    for label, indices in (
        ("first convolution", [0]),
        ("second convolution", [2]),
        ("whole network", range(8)),
    ):
        block = [problem.parameters[i] for i in indices]
        other_block = [channels_last.parameters[i] for i in indices]
        v = torch.randn(1, sum(p.numel() for p in block), device=DEVICE)
        (product,), (other,) = problem.product([block]), channels_last.product([other_block])
        forward = forward_mode(model, [names[i] for i in indices], inputs, targets)
        torch.testing.assert_close(forward(v[0]), product(v)[0], rtol=1e-3, atol=1e-5)
        works[label] = {
            "as the package does": partial(product, v),
            "J by forward mode": partial(forward, v[0]),
            "channels-last memory": partial(other, v),
        }
    rows: dict[str, Row] = {}
    for label, ways in works.items():
        for way, values in in_turns(ways, rounds).items():
            row = rows.setdefault(way, {"milliseconds per product": way})
            row[label] = summary([1e3 * s for s in values])
    return list(rows.values())


def forward_mode(
    model: nn.Module, names: list[str], inputs: Tensor, targets: Tensor
) -> Callable[[Tensor], Tensor]:
    """The GGN product of a block with J by forward mode, Jᵀ by a pullback that is kept."""
    block = {name: p.detach() for name, p in model.named_parameters() if name in names}

    def outputs(block: dict[str, Tensor]) -> Tensor:
        result: Tensor = torch.func.functional_call(model, block, (inputs,))
        return result

    z, pullback = torch.func.vjp(outputs, block)
    q = z.softmax(1)

    def product(v: Tensor) -> Tensor:
        parts = zip(block.items(), v.split([p.numel() for p in block.values()]), strict=True)
        tangents = {name: part.view_as(p) for (name, p), part in parts}
        _, Jv = torch.func.jvp(outputs, (block,), (tangents,))
        HJv = (q * Jv - q * (q * Jv).sum(1, keepdim=True)) / len(z)
        (result,) = pullback(HJv)
        return torch.cat([part.reshape(-1) for part in result.values()])

    return product


# ---- the tables and figures of the page ----


def machine() -> list[Row]:
    """What it ran on."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    if DEVICE.type == "cuda":
        name = f"{torch.cuda.get_device_name()}; {name}"
    facts = {
        "Processor": name,
        "Cores": os.cpu_count(),
        "Threads used": torch.get_num_threads(),
        "Instructions": torch.backends.cpu.get_cpu_capability(),
        "PyTorch": torch.__version__,
        "BackPACK": metadata.version("backpack-for-pytorch"),
        "Python": platform.python_version(),
        "System": platform.system(),
        "Date": datetime.now(UTC).date().isoformat(),
    }
    return [{"Measured on": key, "this machine": value} for key, value in facts.items()]


def write(table: Sequence[Row], path: Path) -> None:
    """Write a table as CSV, and print it."""
    columns = list(dict.fromkeys(column for row in table for column in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    cells = [columns, *([str(row.get(column, "")) for column in columns] for row in table)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print(f"\n{path.stem}")
    for line in cells:
        print("  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)))
    sys.stdout.flush()


def draw(figure: Figure, path: Path) -> None:
    """Save a figure for both themes."""
    from figures import save, swap_ink

    save(figure, path)
    swap_ink(figure)
    save(figure, path.with_suffix(".dark.svg"))
    plt.close(figure)


def results(quick: bool) -> Iterator[tuple[str, list[Row] | Figure]]:
    """All tables and figures, with their names."""
    yield "machine", machine()
    table, figure = bench_steps(quick)
    yield "steps", table
    yield "steps", figure
    yield "products", bench_products(quick)
    by_batch, by_width, figure = bench_growth(quick)
    yield "batch", by_batch
    yield "width", by_width
    yield "growth", figure
    yield "resnet", bench_resnet(quick)
    yield "tried", bench_tried(quick)
    yield "products_tried", bench_products_tried(quick)


def main() -> None:
    """Run everything and write what the page shows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small part of each, as a check")
    parser.add_argument("--output", type=Path, help="where to write; by default docs/bench")
    arguments = parser.parse_args()
    if arguments.quick and arguments.output is None:
        parser.error("--quick measures too little for docs/bench: name another --output.")
    folder = arguments.output or ROOT / "docs" / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", "Full backward hook is firing")
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
    start = time.perf_counter()
    for name, result in results(arguments.quick):
        if isinstance(result, Figure):
            draw(result, folder / f"{name}.svg")
        else:
            write(result, folder / f"{name}.csv")
    print(f"\n{time.perf_counter() - start:.0f} seconds")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "docs" / "_ext"))
    main()
