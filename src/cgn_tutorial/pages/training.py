"""The training loop of every page, and the history it returns."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice

import torch
from backpack import backpack
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from cgn_tutorial.cgn import Solve

__all__ = ["History", "accuracy", "default_device", "train"]

# BackPACK hooks the first layer, whose inputs need no gradient. Torch warns of that, harmlessly.
HARMLESS = "Full backward hook is firing"
warnings.filterwarnings("ignore", HARMLESS)


def default_device() -> torch.device:
    """The accelerator of this machine if there is one, else its CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    """The share of samples whose largest output is their target.

    Args:
        outputs: Scores, `[N, classes]`.
        targets: Class indices, `[N]`.

    Returns:
        A number between 0 and 1.
    """
    return (outputs.argmax(dim=1) == targets).float().mean().item()


@dataclass
class History:
    """What happened at each training step, one entry per step.

    Attributes:
        loss: The mini-batch loss, before the step.
        accuracy: The mini-batch accuracy, before the step, between 0 and 1.
        seconds: Wall-clock seconds of the step, without loading the data.
        solves: What the optimizer's linear solves did, empty for optimizers that have none.
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
        optimizer: A `CGNOptimizer` or any of torch's own.
        batches: Pairs of inputs and targets; each step takes the next.
        steps: How many steps to take, fewer if the batches run out.
        backward: Called with the loss and the outputs; leaves gradients, and the curvature products
            where the optimizer needs them. `None` calls `loss.backward()`, within BackPACK if the
            optimizer has a `bp_extension`; model and loss function must be extended for that.
        log_every: Print loss and accuracy every so many steps; `None` prints nothing.

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
        history.solves.append(getattr(optimizer, "solves", {}))
        del loss, outputs  # else their graph lives on while the next one is built
        if log_every and i % log_every == 0:
            bar.write(
                f"Iteration {i:3d}/{steps - 1:3d}  Minibatch Loss {history.loss[-1]:.5f}  "
                f"Accuracy {history.accuracy[-1]:.5f}"
            )
    return history


def _backpack_backward(optimizer: Optimizer) -> Callable[[Tensor, Tensor], None]:
    """The backward pass of the optimizer's BackPACK extension, a plain one if it has none."""
    extensions = [optimizer.bp_extension] if hasattr(optimizer, "bp_extension") else []

    def backward(loss: Tensor, outputs: Tensor) -> None:
        with backpack(*extensions):
            loss.backward()

    return backward
