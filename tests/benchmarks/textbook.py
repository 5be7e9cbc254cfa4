"""The optimizer as its equations stand in a textbook: slow, short, a reference for the fast one.

Compared with `cgn_tutorial.CGNOptimizer`, it moves each parameter as soon as its system is solved,
computes the first residual from a product with zero, records the solves for differentiation, allows
one iteration more than `maxiter`, and takes no notice of negative curvature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def textbook_cg(
    A: Callable[[Tensor], Tensor], b: Tensor, *, maxiter: int, tol: float, atol: float
) -> Tensor:
    """Solve A x = b from x = 0 on, until ‖b − A x‖ ≤ max(tol · ‖b‖, atol)."""
    bound = max(tol * b.norm(), atol)
    x = torch.zeros_like(b)
    r = b - A(x)
    p, rr = r, (r * r).sum()
    for _ in range(maxiter + 1):
        if rr.sqrt() <= bound:
            break
        Ap = A(p)
        alpha = rr / (p * Ap).sum()
        x = x + alpha * p
        r = r - alpha * Ap
        rr, rr_before = (r * r).sum(), rr
        beta = rr / rr_before
        p = r + beta * p
    return x


class TextbookOptimizer(torch.optim.Optimizer):
    """x ← x + γ v with (C + λI) v = −g, for one parameter after another.

    Takes the arguments of `cgn_tutorial.CGNOptimizer`, and one product per parameter.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        bp_extension: Any,
        lr: float = 0.1,
        damping: float = 1e-2,
        maxiter: int = 100,
        tol: float = 1e-1,
        atol: float = 1e-8,
    ) -> None:
        self.bp_extension = bp_extension
        self.damping = damping
        self.solver: dict[str, Any] = {"maxiter": maxiter, "tol": tol, "atol": atol}
        super().__init__(parameters, {"lr": lr})

    def step(self) -> None:  # type: ignore[override]
        """Solve and move, parameter by parameter."""
        for group in self.param_groups:
            for x in group["params"]:
                v = textbook_cg(self.damped(x), -x.grad, **self.solver)
                with torch.no_grad():
                    x.add_(v, alpha=group["lr"])

    def damped(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """The function v ↦ (C + λI) v for the block of x."""
        C = getattr(x, self.bp_extension.savefield)
        return lambda v: C(v.unsqueeze(0)).squeeze(0) + self.damping * v
