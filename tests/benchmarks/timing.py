"""What a step and a product cost."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from backpack import backpack, extend
from backpack.extensions import GGNMP
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from measuring import DEVICE, MB, Row, in_turns, peak_memory, seconds, summary
from textbook import TextbookOptimizer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision.models import resnet18
from workloads import BATCH_SIZE, STEPS, Problem, Run, mnist

from cgn_tutorial import CGNOptimizer, curvature
from cgn_tutorial.curvature import GGN, layers
from cgn_tutorial.pages import make_model
from cgn_tutorial.pages.plotting import COLORS

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
    rounds, steps = (1, 3) if quick else (5, STEPS)
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

    return table, draw_steps(milliseconds, ratios)


def draw_steps(milliseconds: dict[str, list[float]], ratios: dict[str, list[float]]) -> Figure:
    """Medians and ranges of each optimizer, one panel below the other, as a phone shows them."""
    figure, axes = plt.subplots(2, 1, figsize=(5, 5.6), layout="constrained")
    for ax, values, xlabel in (
        (axes[0], milliseconds, "milliseconds per step"),
        (axes[1], ratios, "times as fast as the textbook"),
    ):
        for i, (of_label, color) in enumerate(zip(values.values(), COLORS.values(), strict=False)):
            ax.plot([min(of_label), max(of_label)], [i, i], color="black", linewidth=1)
            ax.plot(statistics.median(of_label), i, "o", color=color)
        ax.set(xlabel=xlabel, ylim=(len(values) - 0.5, -0.5))
        ax.set_xlim(left=0)
        ax.set_yticks(range(len(values)), [label.replace(", ", ",\n", 1) for label in values])
    return figure


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
    per_parameter = problem.products(problem.parameters)
    per_layer = problem.products(layers(problem.model))
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
        set_up: lambda: problem.products(layers(problem.model)),
        "BackPACK " + set_up: extended_backward,
    }
    for (name, p), product in zip(parameters.items(), per_parameter, strict=True):
        v = torch.randn(1, *p.shape, device=DEVICE)
        works[name] = partial(product, v.view(1, -1))
        works["BackPACK " + name] = partial(untracked, extended.get_parameter(name).ggnmp, v)
    names: dict[Tensor, str] = {p: name for name, p in parameters.items()}
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


def same(v: Tensor) -> Tensor:
    """A change of a parameter, as it arrives at the parameter itself."""
    return v


def bench_shortcut(quick: bool) -> list[Row]:
    """Products with and without the shortcut past the second derivative of a convolution."""
    rounds = 5 if quick else 101
    torch.manual_seed(0)
    problem = Problem(make_model().to(DEVICE), *mnist(BATCH_SIZE))
    first, second, *_ = layers(problem.model)
    table: list[Row] = []
    for label, block in (
        ("first convolution", first),
        ("second convolution", second),
        ("whole network", problem.parameters),
    ):
        (taken,) = problem.products([block])
        with mock.patch.object(curvature, "_points", lambda p, users: [(p, same)]):
            (without,) = problem.products([block])
        v = torch.randn(1, sum(p.numel() for p in block), device=DEVICE)
        torch.testing.assert_close(taken(v), without(v), rtol=1e-3, atol=1e-5)
        durations = in_turns({"with": partial(taken, v), "without": partial(without, v)}, rounds)
        ratios = np.divide(durations["without"], durations["with"])
        table.append(
            {
                "product": label,
                "with the shortcut, ms": summary([1e3 * s for s in durations["with"]]),
                "without, ms": summary([1e3 * s for s in durations["without"]]),
                "times as fast": summary(ratios.tolist()),
            }
        )
    return table


def bench_resnet(quick: bool) -> list[Row]:
    """One Newton step on a residual network, with a block per layer."""
    torch.manual_seed(0)
    model = resnet18(num_classes=10).to(DEVICE)
    size, maxiter = (4, 1) if quick else (8, 5)
    inputs = torch.randn(size, 3, 32, 32, device=DEVICE)
    targets = torch.randint(10, (size,), device=DEVICE)
    ggn = GGN(layers(model))
    optimizer = CGNOptimizer(model.parameters(), ggn, maxiter=maxiter)

    def gradient() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs), targets)
        loss.backward()
        return loss

    def step() -> None:
        optimizer.zero_grad()
        outputs = model(inputs)
        ggn.backward(cross_entropy(outputs, targets), outputs)
        optimizer.step()

    (gradients,) = in_turns({"": gradient}, 1 if quick else 5).values()
    duration = seconds(step)
    products = sum(solve.products for solve in optimizer.solves.values())
    gradient_memory = peak_memory(gradient)
    optimizer.param_groups[0]["maxiter"] = 1  # the first iteration needs what all of them need
    return [
        {
            "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
            "blocks": str(len(ggn.blocks)),
            "products": str(products),
            "seconds per step": f"{duration:.1f}",
            "milliseconds per product": f"{1e3 * duration / products:.0f}",
            "milliseconds per gradient": f"{1e3 * statistics.median(gradients):.0f}",
            "peak memory of the step, MB": f"{peak_memory(step) / MB:.0f}",
            "of forward and backward, MB": f"{gradient_memory / MB:.0f}",
        }
    ]
