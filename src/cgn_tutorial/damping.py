"""Damping that adapts to how well the quadratic model predicts the change of the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor

from cgn_tutorial.cgn import CGNOptimizer

__all__ = ["LevenbergMarquardt"]

# A change of the loss below this many roundings of the loss may be rounding alone.
LOSS_ROUNDINGS = 10


class LevenbergMarquardt:
    """Damping that adapts to how well the quadratic model predicts the change of the loss.

    After a step γv, the rule compares the change of the loss L with the change that the damped
    quadratic model q predicts,

        ρ = (L(x + γv) − L(x)) / (q(γv) − q(0)),

    and changes the damping of all parameters. If the loss is not lower after a step, the rule takes
    the step back. L includes the penalty of the optimizer's `weight_decay`. There are two rules:

    - `"martens"`: λ ← 2/3 λ if ρ > 3/4, a good model; λ ← 3/2 λ if ρ < 1/4, a bad model. This rule
      changes λ slowly, as losses of mini-batches ask for.
    - `"nielsen"`: λ ← max(1/3, 1 − (2ρ − 1)³) λ if ρ > 0; else λ ← ν λ, with ν = 2, 4, …, 64
      from one such step to the next. λ may fall by powers of ten in a few steps, as exact losses of
      least squares allow.

    Compute both losses on the batch of the gradient and the curvature, several hundred samples or
    more. With losses on another batch, the λ of most runs in the tutorial grew until nothing moved.
    Solve for the whole network as one block, with γ = 1 and a warm start: the model of several
    blocks leaves out how the blocks act on each other.

    Args:
        optimizer: The optimizer that takes the steps.
        minimum: The smallest λ. The default suits float32; for many digits in float64, take 1e-14.
        buffers: Tensors that an evaluation of the loss changes, such as `model.buffers()` of a
            model with BatchNorm in train mode. Each evaluation leaves their values as they were.
        rule: `"martens"` or `"nielsen"`.

    Attributes:
        optimizer: As given.
        minimum: As given.
        rule: As given.

    Raises:
        ValueError: `minimum` is negative or not finite, or there is no such rule.

    Note:
        Both losses of ρ must be values of the same function. Dropout draws another function for
        each evaluation: seed both evaluations alike, or leave dropout out.

    Example:
        >>> from cgn_tutorial import GGN
        >>> model = torch.nn.Linear(2, 3)
        >>> curvature = GGN([model.parameters()])
        >>> optimizer = CGNOptimizer(model.parameters(), curvature, lr=1.0, warm_start=0.95)
        >>> adaptive = LevenbergMarquardt(optimizer)
        >>> inputs, targets = torch.randn(500, 2), torch.randint(3, (500,))
        >>> def evaluate():
        ...     return torch.nn.functional.cross_entropy(model(inputs), targets)
        >>> for _ in range(5):
        ...     optimizer.zero_grad()
        ...     outputs = model(inputs)
        ...     loss = torch.nn.functional.cross_entropy(outputs, targets)
        ...     _ = curvature.backward(loss, outputs)
        ...     rho = adaptive.step(loss, evaluate)

    Source:
        Martens, "Deep learning via Hessian-free optimization" (2010), after Levenberg (1944) and
        Marquardt (1963); Nielsen, "Damping parameter in Marquardt's method" (1999),
        whose ρ leaves the damping out of the prediction.
    """

    def __init__(
        self,
        optimizer: CGNOptimizer,
        minimum: float = 1e-4,
        buffers: Iterable[Tensor] = (),
        rule: Literal["martens", "nielsen"] = "martens",
    ) -> None:
        if not 0 <= minimum < math.inf:
            raise ValueError(f"minimum must be finite and at least 0, but is {minimum}.")
        if rule not in ("martens", "nielsen"):
            raise ValueError(f"rule must be 'martens' or 'nielsen', but is {rule!r}.")
        self.optimizer = optimizer
        self.minimum = minimum
        self.rule = rule
        self._rise = 2.0  # Nielsen's ν
        self._buffers = list(buffers)

    def step(self, loss: Tensor | float, evaluate: Callable[[], Tensor | float]) -> float:
        """Let the optimizer step, adapt the damping, and take back a step that did harm.

        Args:
            loss: The loss before the step. The parameters must carry its gradients and products.
            evaluate: Computes the same loss again, on the same batch. Autograd is on in `evaluate`
                if autograd is on for the caller, so that `evaluate` may differentiate.

        Returns:
            The ratio ρ. It is −∞ if the loss after the step was not finite, and NaN if both changes
            are smaller than the rounding of the loss. After NaN, "martens" leaves λ as it is, and
            "nielsen" divides λ by 3: λ may have grown so far that nothing moves.

        Raises:
            RuntimeError: As the optimizer's `step()`.
            Exception: What `evaluate` raises. After either error, parameters, λ and the optimizer's
                state are as before the step. Compute gradients and products anew for the next step.
        """
        groups = self.optimizer.param_groups
        parameters = [p for group in groups for p in group["params"]]
        before = [p.detach().clone() for p in parameters]
        state = {p: dict(values) for p, values in self.optimizer.state.items()}
        start = _number(loss) + self._penalty()
        self.optimizer.step()
        try:
            change = self._evaluated(evaluate) + self._penalty() - start
        except BaseException:
            _copy(before, parameters)
            self.optimizer.state.clear()
            self.optimizer.state.update(state)
            raise

        # Accelerate's wrapper has no `predicted`, but the wrapped optimizer has.
        predicted = getattr(self.optimizer, "optimizer", self.optimizer).predicted
        rho = change / predicted if predicted < 0 and math.isfinite(change) else -math.inf
        eps = max((torch.finfo(p.dtype).eps for p in parameters), default=0.0)
        if max(abs(change), abs(predicted)) <= LOSS_ROUNDINGS * eps * abs(start):
            rho = math.nan
        if not change < 0:
            _copy(before, parameters)
        if (factor := self._factor(rho)) != 1:
            for group in groups:
                damping = max(group["damping"], self.minimum)
                group["damping"] = max(factor * damping, self.minimum)
        return rho

    def _factor(self, rho: float) -> float:
        """What the rule multiplies λ by."""
        if self.rule == "martens":
            return 2 / 3 if rho > 3 / 4 else 3 / 2 if rho < 1 / 4 else 1.0  # NaN is neither
        if rho > 0 or math.isnan(rho):
            self._rise = 2.0
            return 1 / 3 if math.isnan(rho) else max(1 / 3, 1 - (2 * rho - 1) ** 3)
        rise, self._rise = self._rise, min(2 * self._rise, 64.0)
        return rise

    def _evaluated(self, evaluate: Callable[[], Tensor | float]) -> float:
        """The loss. The buffers are as before."""
        before = [buffer.clone() for buffer in self._buffers]
        try:
            return _number(evaluate())
        finally:
            _copy(before, self._buffers)

    def _penalty(self) -> float:
        """The penalty ½ Σ μ‖x‖² of the optimizer's weight decay."""
        total = 0.0
        for group in self.optimizer.param_groups:
            if group["weight_decay"]:
                squares = [p.detach().double().square().sum() for p in group["params"]]
                total += group["weight_decay"] / 2 * float(sum(squares))
        return total


def _number(loss: Tensor | float) -> float:
    """The value of a loss."""
    return loss.item() if isinstance(loss, Tensor) else float(loss)


@torch.no_grad()
def _copy(values: list[Tensor], tensors: list[Tensor]) -> None:
    """Put values back into tensors."""
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)
