"""The training loop of every page, and the history that the loop returns."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice

import torch
from backpack import backpack
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from cgn_tutorial import Solve

__all__ = ["History", "accuracy", "default_device", "train"]

# Torch warns about BackPACK's hook on the first layer, whose inputs need no gradient: harmless.
HARMLESS = "Full backward hook is firing"


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress the harmless warning of BackPACK's backward pass, and no other warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", HARMLESS)
        yield


def default_device() -> torch.device:
    """The accelerator of this machine if there is one, else its CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    """The share of samples whose largest output belongs to their class.

    Args:
        outputs: Scores of at least two classes, `[N, classes, ...]`.
        targets: Class indices `[N, ...]`; negative indices, such as `ignore_index`, do not count.
            Or class probabilities `[N, classes, ...]`; the class of the largest probability counts.

    Returns:
        A number between 0 and 1; NaN if the tensors are not scores and classes, as in a regression.
    """
    if not isinstance(outputs, Tensor) or outputs.ndim < 2 or outputs.shape[1] < 2:
        return math.nan
    if targets.is_floating_point():
        if targets.shape != outputs.shape or (targets < 0).any():
            return math.nan
        totals = targets.sum(dim=1)
        if not torch.allclose(totals, torch.ones_like(totals), atol=1e-3):
            return math.nan
        targets = targets.argmax(dim=1)
    answers = outputs.argmax(dim=1)
    if answers.shape != targets.shape:
        return math.nan
    return (answers == targets)[targets >= 0].float().mean().item()


@dataclass
class History:
    """What happened at each training step, one entry per step.

    Attributes:
        loss: The mini-batch loss, before the step.
        accuracy: The mini-batch accuracy, before the step, between 0 and 1; NaN if the targets are
            not classes.
        seconds: Wall-clock seconds of the step, without loading the data.
        solves: How the optimizer's linear solves went, by the names of their parameters; empty for
            optimizers without linear solves.
    """

    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    solves: list[dict[tuple[str, ...], Solve]] = field(default_factory=list)

    @property
    def products(self) -> list[int]:
        """Curvature products per step."""
        return [sum(solve.products for solve in solves.values()) for solves in self.solves]


def train(
    model: nn.Module,
    loss_function: Callable[[Tensor, Tensor], Tensor],
    optimizer: Optimizer,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    steps: int,
    backward: Callable[[Tensor, Tensor], object] | None = None,
    log_every: int | None = None,
) -> History:
    """Train for a number of steps, with any optimizer.

    Args:
        model: The model, on the device to train on.
        loss_function: Maps the model's outputs and the targets to the mean loss.
        optimizer: A `CGNOptimizer` or an optimizer of torch.
        batches: Pairs of inputs and targets; each step takes the next pair.
        steps: The number of steps; the training ends earlier if the batches run out.
        backward: A function of the loss and the outputs that leaves gradients, and curvature
            products if the optimizer needs them. `None` calls `loss.backward()`, within BackPACK if
            the optimizer has a `bp_extension`: then extend the model and the loss function.
        log_every: Print loss and accuracy every `log_every` steps; `None` prints nothing.

    Returns:
        Loss, accuracy, seconds and curvature products of each step.
    """
    device = next(model.parameters()).device
    backward = backward or _backpack_backward(optimizer)
    history = History()
    bar = tqdm(islice(batches, steps), total=steps, delay=2, leave=False, disable=None)
    for i, (inputs, targets) in enumerate(bar):
        inputs, targets = inputs.to(device), targets.to(device)
        start = time.perf_counter()

        optimizer.zero_grad()
        outputs = model(inputs)
        loss = loss_function(outputs, targets)
        backward(loss, outputs)
        optimizer.step()

        history.loss.append(loss.item())
        if device.type != "cpu":
            torch.accelerator.synchronize()
        history.seconds.append(time.perf_counter() - start)
        history.accuracy.append(accuracy(outputs, targets))
        history.solves.append(dict(getattr(optimizer, "solves", {})))
        del loss, outputs  # else two graphs are alive during the next forward pass
        if log_every and i % log_every == 0:
            bar.write(
                f"Iteration {i:3d}/{steps - 1:3d}  Minibatch Loss {history.loss[-1]:.5f}  "
                f"Accuracy {history.accuracy[-1]:.5f}"
            )
    return history


def _backpack_backward(optimizer: Optimizer) -> Callable[[Tensor, Tensor], None]:
    """A backward pass, with BackPACK if the optimizer has a `bp_extension`."""
    extensions = [optimizer.bp_extension] if hasattr(optimizer, "bp_extension") else []

    def backward(loss: Tensor, outputs: Tensor) -> None:
        with quiet(), backpack(*extensions):
            loss.backward()

    return backward
