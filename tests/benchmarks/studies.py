"""What else was tried: other solves of the same systems, other ways to compute the products."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import torch
from backpack import backpack, extend
from backpack.extensions import DiagGGNExact
from measuring import DEVICE, Row, in_turns, summary
from torch import Tensor, nn
from workloads import BATCH_SIZE, SOLVER, STEPS, Problem, Run, mnist

from cgn_tutorial import Block, CGNOptimizer, CGResult, cg
from cgn_tutorial.pages import make_model


class Jacobi(CGNOptimizer):
    """`CGNOptimizer` preconditioned by the exact diagonal of the GGN."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Solve for every block, then move, as the optimizer does, but with a preconditioner."""
        (group,) = self.param_groups
        lam = group["damping"]
        options = {name: group[name] for name in ("maxiter", "tol", "atol")}
        solved: list[tuple[Block, CGResult]] = []
        for block in self.blocks():
            parameters: tuple[Any, ...] = block.parameters
            g = torch.cat([p.grad.flatten() for p in parameters])
            D = torch.cat([p.diag_ggn_exact.flatten() for p in parameters]) + lam
            A = partial(damped, block, lam)
            solved.append((block, cg(A, -g, M=D.reciprocal().mul, **options)))
        for block, (solution, _) in solved:
            for p, _, v in block.split(solution):
                p.add_(v, alpha=group["lr"])
        self.solves = {block.names: solve for block, (_, solve) in solved}


def damped(block: Block, lam: float, v: Tensor) -> Tensor:
    """(C + λI) v."""
    return block(v[None])[0] + lam * v


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
    "start from the solution before": (lambda **o: Run(warm_start=1.0, **o), None),
    "start from half of it": (lambda **o: Run(warm_start=0.5, **o), None),
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
    steps, seeds = (3, (0,)) if quick else (STEPS, (0, 1))
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
        (product,), (other,) = problem.products([block]), channels_last.products([other_block])
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

    z, pullback, *_ = torch.func.vjp(outputs, block)
    q = z.softmax(1)

    def product(v: Tensor) -> Tensor:
        parts = zip(block.items(), v.split([p.numel() for p in block.values()]), strict=True)
        tangents = {name: part.view_as(p) for (name, p), part in parts}
        _, Jv, *_ = torch.func.jvp(outputs, (block,), (tangents,))
        HJv = (q * Jv - q * (q * Jv).sum(1, keepdim=True)) / len(z)
        (result,) = pullback(HJv)
        return torch.cat([part.reshape(-1) for part in result.values()])

    return product
